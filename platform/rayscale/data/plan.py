"""The order of everything: pure integer functions of (seed, position). No state, no memory that grows.

An endless sequence of *slots* runs through the epochs; slot `i` holds image `permutation(i % N)` of epoch
`i // N`. Of several datasets, each cycle of `sum(weights)` slots holds exactly `weights[j]` of dataset j, in an
order of its own, and each dataset runs through epochs of its own. Slots are cut into *windows* of G images, dealt
in turn to V virtual shards. A window's images are decoded once and give K crops each, in K rounds: a round visits
every image of the window once, in an order of its own, cut into micro-batches of b. The global step is V
micro-batches, one of every virtual shard:

    position (one integer) = global step s -> window w = s // R, row r = s % R, R = G * K / b
    micro-batch (s, v) = row r of the window w of virtual shard v

Nothing here knows how many workers there are, so the sequence of global batches cannot depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayscale.contract import digest
from rayscale.data.augment import Augmentation
from rayscale.data.degrade import Bicubic, Operator, check, scale_of
from rayscale.data.extent import mask_in
from rayscale.errors import ConfigError, nearest

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

VERSION = 1  # of the arithmetic below: another number is another sequence

_SAMPLE, _ORDER, _EPOCH, _MIXTURE = 1, 2, 3, 4  # domains: one generator is never asked for two different things
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data half of a recipe: what a sample is, and the shape of the plan."""

    hr_crop_px: int = 128  # side of the high-resolution crop
    fit_px: int = 0  # a photo is shrunk first, so that its shorter side has so many pixels; 0 leaves it as it is
    tensors: tuple[str, ...] = ()  # that training gets, of lr, hr, mask and label; () is all but the label
    degradation: tuple[Operator, ...] = (Bicubic(scale=2),)
    augment: tuple[Augmentation, ...] = ()  # of the photo, before it is degraded
    flips: bool = True  # both mirrorings and quarter turns, in step on the whole pair
    micro_batch: int = 8  # b, samples
    virtual_shards: int = 4  # V, micro-batches a global step; the most workers that can take part
    window_images: int = 16  # G, images decoded once
    crops: int = 4  # K, crops of each of them
    seed: int = 0
    weights: tuple[int, ...] = ()  # shares of several datasets: of 4 samples, (3, 1) takes 3 of the first

    def __post_init__(self) -> None:
        for name in ("hr_crop_px", "micro_batch", "virtual_shards", "window_images", "crops"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}", getattr(self, name), "must be at least 1", "raise it")
        check(self.degradation)
        known = ("lr", "hr", "label", *(("mask",) if mask_in(self.degradation) else ()))
        for name in self.tensors:
            if name not in known:
                raise ConfigError("data.tensors", name, "no such tensor in this data", nearest(name, known))
        if self.fit_px and self.fit_px < self.hr_crop_px:
            rule = f"must be at least data.hr_crop_px={self.hr_crop_px}"
            raise ConfigError("data.fit_px", self.fit_px, rule, "raise it, or 0 to leave photos as they are")
        if self.hr_crop_px % self.scale:
            raise ConfigError(
                "data.hr_crop_px",
                self.hr_crop_px,
                f"must be a multiple of the scale {self.scale}",
                f"try {-(-self.hr_crop_px // self.scale) * self.scale}",
            )
        if self.window_images % self.micro_batch or self.window_images < 2 * self.micro_batch:
            raise ConfigError(
                "data.window_images",
                self.window_images,
                f"must be a multiple of data.micro_batch={self.micro_batch}, twice it or more",
                f"try {2 * self.micro_batch}",
            )

    @property
    def scale(self) -> int:
        """HR side / LR side."""
        return scale_of(self.degradation)

    @property
    def global_batch(self) -> int:
        """Samples a global step, over all workers."""
        return self.micro_batch * self.virtual_shards


CYCLE_MAX = 10_000  # sum of the weights: the work for one position grows with it


class Window(NamedTuple):
    """One window of one virtual shard: `epochs` and `images` [G]; `order` [R, b] of (slot in the window) * K + crop."""

    epochs: I64
    images: I64
    order: I64


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one run over datasets of `sizes` images, numbered through: the second one's go on after those
    of the first."""

    sizes: tuple[int, ...]
    settings: DataSettings

    def __post_init__(self) -> None:
        s, cycle = self.settings, sum(self.weights)
        if len(self.weights) != len(self.sizes) or min(self.weights) < 1 or cycle > CYCLE_MAX:
            rule = f"needs a share of at least 1 for each of the {len(self.sizes)} datasets, {CYCLE_MAX} together"
            raise ConfigError("data.weights", s.weights, rule, "e.g. --set data.weights=[3,1] for two")
        rows = s.window_images // s.micro_batch
        for size, weight in zip(self.sizes, self.weights, strict=True):
            slots = min(s.window_images, (s.window_images // cycle + 2) * weight)
            if not size or -(-slots // size) + 1 > rows:  # an image may come once in each micro-batch of a round
                raise ConfigError(
                    "data.window_images",
                    s.window_images,
                    f"a window takes {slots} images of this split, which has {size}: too few to keep them apart",
                    f"pack more photos, or lower it (and data.micro_batch={s.micro_batch} to half of it)",
                )

    @property
    def weights(self) -> tuple[int, ...]:
        """The share of each dataset."""
        return self.settings.weights or (1,)

    @property
    def num_images(self) -> int:
        """Of all datasets together."""
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        """R: micro-batches a window gives, which is global steps from one window to the next."""
        s = self.settings
        return s.window_images * s.crops // s.micro_batch

    def digest(self, photos: str) -> str:
        """Identity of the sequence over the photos with that digest: equal digests, equal global batches."""
        return digest({"version": VERSION, "photos": photos, "sizes": self.sizes, "settings": self.settings})

    def window(self, w: int, v: int) -> Window:
        """Window `w` of virtual shard `v`, O(window) work at any position."""
        s = self.settings
        index = w * s.virtual_shards + v
        epochs, images = self._images(*self._dealt(index))
        order = np.concatenate([self._round(index, k, images) for k in range(s.crops)])
        return Window(epochs, images, order)

    def substitute(self, w: int, v: int, attempt: int) -> I64:
        """Other images for the slots of a window [G], each for one that cannot be read; a new choice each attempt.

        Half an epoch further on in the same dataset: within an attempt no two slots of an epoch get the same one, and
        in a dataset of more than two windows it is no image of this window.
        """
        sources, local = self._dealt(w * self.settings.virtual_shards + v)
        sizes = np.array(self.sizes)[sources]
        epochs = local // sizes
        moved = epochs * sizes + (local + sizes // 2 + attempt) % sizes
        return self._images(sources, moved)[1]

    def _dealt(self, index: int) -> tuple[I64, I64]:
        """(dataset, slot of that dataset's own sequence) for the slots of window number `index`, both [G]."""
        size, cycle = self.settings.window_images, sum(self.weights)
        slots = np.arange(size, dtype=np.int64) + index * size
        if len(self.sizes) == 1:
            return np.zeros_like(slots), slots
        sources, local = np.empty_like(slots), np.empty_like(slots)
        weights = np.array(self.weights)
        for number in np.unique(slots // cycle):
            rng = philox(self.settings.seed, _MIXTURE, int(number), 0, 0)
            dealt = rng.permutation(np.repeat(np.arange(len(weights)), weights))
            rank = np.empty_like(dealt)  # how many of the same dataset came before, in this cycle
            rank[np.argsort(dealt, kind="stable")] = np.concatenate([np.arange(weight) for weight in weights])
            of = slots // cycle == number
            place = slots[of] % cycle
            sources[of] = dealt[place]
            local[of] = number * weights[dealt[place]] + rank[place]
        return sources, local

    def _images(self, sources: I64, local: I64) -> tuple[I64, I64]:
        """(epoch, image) at slots of the datasets' own sequences."""
        sizes, first = np.array(self.sizes), np.cumsum([0, *self.sizes])
        epochs = local // sizes[sources]
        images = np.empty_like(local)
        for source, epoch in set(zip(sources.tolist(), epochs.tolist(), strict=True)):
            of = (sources == source) & (epochs == epoch)
            size, key = self.sizes[source], _key(self.settings.seed, epoch, source)
            images[of] = first[source] + permute(local[of] % size, size, key)
        return epochs, images

    def _round(self, index: int, crop: int, images: I64) -> I64:
        """One round: [G / b, b] entries, each image once, no image twice in a micro-batch.

        A window over the seam of two epochs may hold an image twice, one of a small dataset more often. Sorted by a
        random key per *image*, its copies are neighbours, and dealing the sorted slots in turn puts neighbours into
        different micro-batches.
        """
        s = self.settings
        rng = philox(s.seed, _ORDER, index, crop, 0)
        distinct, inverse = np.unique(images, return_inverse=True)
        dealt = np.argsort(rng.permutation(len(distinct))[inverse], kind="stable")
        batches = dealt.reshape(s.micro_batch, -1).T  # row j takes the slots j, j + C, j + 2C, ... of C rows
        shuffled = rng.permuted(batches, axis=1)
        return np.asarray(rng.permutation(shuffled, axis=0) * s.crops + crop, np.int64)


def sample_generator(seed: int, epoch: int, image: int, crop: int) -> np.random.Generator:
    """All randomness of one sample: keyed by its identity, never by worker, position or time."""
    return philox(seed, _SAMPLE, epoch, image, crop)


def philox(seed: int, domain: int, a: int, b: int, c: int) -> np.random.Generator:
    """A counter-based generator of its own for every (seed, domain, a, b, c); 2^64 draws each."""
    counter, key = np.array([0, a, b, c], np.uint64), np.array([seed & (2**64 - 1), domain], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))  # lists would lose digits beyond 2^53


def permute(positions: I64, n: int, key: int) -> I64:
    """Where a permutation of range(n) puts `positions`: a Feistel network with cycle walking, O(1) memory."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    rounds: U64 = np.arange(_ROUNDS, dtype=np.uint64)
    keys = _hash(rounds + _hash(np.array([key], np.uint64)))  # mixed twice, so that no two rounds are related
    x = positions.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_hash(right ^ round_key) & mask)
        x[outside] = (left << shift) | right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _key(seed: int, epoch: int, source: int) -> int:
    return int(philox(seed, _EPOCH, epoch, source, 0).integers(0, 2**60))


def _hash(x: U64) -> U64:
    """splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + _MIX[0]
        x = (x ^ (x >> np.uint64(30))) * _MIX[1]
        x = (x ^ (x >> np.uint64(27))) * _MIX[2]
        return x ^ (x >> np.uint64(31))
