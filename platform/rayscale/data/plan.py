"""The order of everything: pure integer functions of (seed, position). No state, no memory that grows.

An endless sequence of *slots* runs through the epochs; slot `i` holds image `permutation(i % N)` of epoch
`i // N`. Slots are cut into *windows* of G images, dealt in turn to V virtual shards. A window's images are
decoded once and give K crops each, in K rounds: a round visits every image of the window once, in an order of
its own, cut into micro-batches of b. The global step is V micro-batches, one of every virtual shard:

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
from rayscale.data.degrade import Bicubic, Operator, scale_of
from rayscale.errors import ConfigError

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

VERSION = 1  # of the arithmetic below: another number is another sequence

_SAMPLE, _ORDER, _EPOCH = 1, 2, 3  # domains: one generator is never asked for two different things
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data half of a recipe: what a sample is, and the shape of the plan."""

    hr_crop_px: int = 128  # side of the high-resolution crop
    degradation: tuple[Operator, ...] = (Bicubic(scale=2),)
    flips: bool = True  # both mirrorings and quarter turns, in step on the whole pair
    micro_batch: int = 8  # b, samples
    virtual_shards: int = 4  # V, micro-batches a global step; the most workers that can take part
    window_images: int = 16  # G, images decoded once
    crops: int = 4  # K, crops of each of them
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hr_crop_px", "micro_batch", "virtual_shards", "window_images", "crops"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}", getattr(self, name), "must be at least 1", "raise it")
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


class Window(NamedTuple):
    """One window of one virtual shard: `epochs` and `images` [G]; `order` [R, b] of (slot in the window) * K + crop."""

    epochs: I64
    images: I64
    order: I64


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one run over `num_images` images."""

    num_images: int
    settings: DataSettings

    def __post_init__(self) -> None:
        if self.num_images < self.settings.window_images:
            s = self.settings
            raise ConfigError(
                "data.window_images",
                s.window_images,
                f"a window holds each image once and this split has {self.num_images}",
                f"pack more photos, or lower it (and data.micro_batch={s.micro_batch} to half of it)",
            )

    @property
    def rows(self) -> int:
        """R: micro-batches a window gives, which is global steps from one window to the next."""
        s = self.settings
        return s.window_images * s.crops // s.micro_batch

    def digest(self, photos: str) -> str:
        """Identity of the sequence over the photos with that digest: equal digests, equal global batches."""
        return digest({"version": VERSION, "photos": photos, "num_images": self.num_images, "settings": self.settings})

    def window(self, w: int, v: int) -> Window:
        """Window `w` of virtual shard `v`, O(window) work at any position."""
        s = self.settings
        index = w * s.virtual_shards + v
        slots = np.arange(s.window_images, dtype=np.int64) + index * s.window_images
        epochs = slots // self.num_images
        images = np.empty_like(slots)
        for epoch in np.unique(epochs):
            of = epochs == epoch
            images[of] = permute(slots[of] % self.num_images, self.num_images, _key(s.seed, int(epoch)))
        order = np.concatenate([self._round(index, k, images) for k in range(s.crops)])
        return Window(epochs, images, order)

    def _round(self, index: int, crop: int, images: I64) -> I64:
        """One round: [G / b, b] entries, each image once, no image twice in a micro-batch.

        A window over the seam of two epochs may hold an image twice. Sorted by a random key per *image*, its
        copies are neighbours, and dealing the sorted slots in turn puts neighbours into different micro-batches.
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
    return np.random.Generator(np.random.Philox(counter=[0, a, b, c], key=[seed & (2**64 - 1), domain]))


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


def _key(seed: int, epoch: int) -> int:
    return int(philox(seed, _EPOCH, epoch, 0, 0).integers(0, 2**60))


def _hash(x: U64) -> U64:
    """splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + _MIX[0]
        x = (x ^ (x >> np.uint64(30))) * _MIX[1]
        x = (x ^ (x >> np.uint64(27))) * _MIX[2]
        return x ^ (x >> np.uint64(31))
