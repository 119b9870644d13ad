"""Which held-out pictures, degraded how: what everything that is compared is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rayscale import contract
from rayscale.data import degrade
from rayscale.data.cut import fit
from rayscale.data.draws import Chain
from rayscale.data.operators import Operator
from rayscale.data.shards import Photos, open_split
from rayscale.errors import ConfigError, MissingError
from rayscale.features import FeatureNet, name_of
from rayscale.imaging import U8, decode_rgb

_READ_AT_ONCE = 8  # photos in memory; range reads of neighbours are coalesced


class Pair(NamedTuple):
    """One picture of a suite: lr u8[h, w, 3] (a burst: u8[T, h, w, 3]), hr u8[h * scale, w * scale, 3].

    mask: u8[h, w, 1], 255 where pixels are missing; None where the degradation makes none.
    """

    key: str
    lr: U8
    hr: U8
    mask: U8 | None = None
    label: str = ""

    @property
    def inputs(self) -> tuple[U8, ...]:
        """What a model is given."""
        return (self.lr,) if self.mask is None else (self.lr, self.mask)


@dataclass(frozen=True)
class Suite:
    """Which pictures, degraded how. A limit of 0 is none.

    max_images takes evenly spaced ones, so that a split sorted by class keeps its classes; max_side_px cuts the
    centre out of larger photos (shrinking them would make them sharper than photos are). For models of small whole
    pictures, photos are shrunk to fit_px on their shorter side and the centre square of side_px is taken.
    """

    photos_uri: str  # of a dataset, as data/shards.py packs it
    split: str
    degradation: tuple[Operator, ...]
    max_images: int = 0
    max_side_px: int = 0  # high resolution
    fit_px: int = 0
    side_px: int = 0
    features: FeatureNet = field(default_factory=FeatureNet)  # that generated pictures are compared in
    num_samples: int = 0  # of a generator; 0: as many as there are pictures, but 1,000 at least

    def __post_init__(self) -> None:
        for name in ("max_images", "fit_px", "side_px", "num_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"suite.{name}", getattr(self, name), "must not be negative", "0 is no limit")
        if self.max_side_px < 0 or 0 < self.max_side_px < self.scale:
            raise ConfigError(
                "suite.max_side_px", self.max_side_px, f"must be at least the scale, {self.scale}", "0 is no limit"
            )

    @property
    def scale(self) -> int:
        """High-resolution side / low-resolution side."""
        return degrade.scale_of(self.degradation)

    @cached_property
    def digest(self) -> str:
        """What makes two suites the same: content, not place."""
        photos = open_split(self.photos_uri, self.split)
        rest = {name: value for name, value in contract.to_json(self).items() if name != "photos_uri"}
        rest["features"] = name_of(self.features)
        return contract.digest({"photos": photos.digest, **rest})


def chosen(photos: Photos, suite: Suite) -> list[int]:
    """Numbers of the suite's photos in its split. Raises: MissingError for a split without photos."""
    count = len(photos)
    if count == 0:
        raise MissingError("suite.split", suite.split, f"{suite.photos_uri} has no photos in it", "pack more photos")
    taken = min(suite.max_images or count, count)
    return [i * count // taken for i in range(taken)]


def pairs(suite: Suite, keys: Collection[str] | None = None) -> Iterator[Pair]:
    """The suite's pictures in the order of its split, hr cut to multiples of the scale (right and bottom edge).

    keys: only these of them. Raises: MissingError for a split without photos; as `open_split` and `decode_rgb`.
    """
    photos = open_split(suite.photos_uri, suite.split)
    wanted = [i for i in chosen(photos, suite) if keys is None or str(photos.keys[i]) in keys]
    for start in range(0, len(wanted), _READ_AT_ONCE):
        indices = wanted[start : start + _READ_AT_ONCE]
        for index, data in zip(indices, photos.read(indices), strict=True):
            key = str(photos.keys[index])
            hr = _cut(fit(decode_rgb(data, name=key), suite.fit_px), suite, key)
            given = degrade.degrade(suite.degradation, hr, Chain(_generator(key)))
            yield Pair(key, given["lr"], hr, given.get("mask"), photos.label(index))


def _cut(hr: U8, suite: Suite, key: str) -> U8:
    most = suite.side_px or suite.max_side_px
    height, width = (min(side, most or side) for side in hr.shape[:2])
    if suite.side_px and min(height, width) < suite.side_px:
        rule = f"photo {key} has {min(height, width)} px"
        raise ConfigError("suite.side_px", suite.side_px, rule, "take other photos, or set fit_px")
    top, left = (hr.shape[0] - height) // 2, (hr.shape[1] - width) // 2
    height, width = height // suite.scale * suite.scale, width // suite.scale * suite.scale
    return hr[top : top + height, left : left + width]


def _generator(key: str) -> np.random.Generator:
    """A picture is degraded alike whatever else is in the suite, on every machine, in every run."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16])))
