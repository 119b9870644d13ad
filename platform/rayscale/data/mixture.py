"""The photos of one or several datasets, numbered through: what a plan's image numbers mean."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayscale.contract import digest
from rayscale.data.plan import I64, DataSettings, Plan
from rayscale.data.shards import Photos, open_split
from rayscale.errors import ConfigError, MissingError, RayscaleError


@dataclass(frozen=True)
class Mixture:
    """Photos of `parts`, those of the second after those of the first. Small: indices are loaded where needed."""

    parts: tuple[Photos, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Photos of each part."""
        return tuple(len(part) for part in self.parts)

    @property
    def uri(self) -> str:
        """Where they are, several separated by commas."""
        return ",".join(part.uri for part in self.parts)

    @property
    def digest(self) -> str:
        """Of their contents and order: one dataset's is its own."""
        return self.parts[0].digest if len(self.parts) == 1 else digest([part.digest for part in self.parts])

    def __len__(self) -> int:
        return sum(self.sizes)

    def plan(self, settings: DataSettings) -> Plan:
        """The order in which training sees them."""
        return Plan(self.sizes, settings)

    def key(self, image: int) -> str:
        """The key of one photo in its dataset."""
        part, local = self._locate(np.array([image]))
        return str(self.parts[part[0]].keys[int(local[0])])

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels of all datasets together, sorted; "" is that of photos without one."""
        return _classes(self.parts)

    def label(self, image: int) -> int:
        """The place of a photo's label in `classes`."""
        part, local = self._locate(np.array([image]))
        return self.classes.index(self.parts[part[0]].label(int(local[0])))

    def read_each(self, images: I64) -> list[bytes | RayscaleError]:
        """The encoded photos, in order; in the place of one whose bytes are damaged for good, its IntegrityError.

        Raises: MissingError (a shard is gone), UnavailableError.
        """
        parts, local = self._locate(images)
        found: dict[int, Iterator[bytes | RayscaleError]] = {
            part: iter(self.parts[part].read_each(local[parts == part])) for part in set(parts.tolist())
        }
        return [next(found[part]) for part in parts.tolist()]

    def _locate(self, images: I64) -> tuple[NDArray[np.intp], I64]:
        """(part, number in it) of images."""
        first = np.cumsum([0, *self.sizes])
        parts = np.searchsorted(first, images, side="right") - 1
        return parts, images - first[parts]


@functools.lru_cache(maxsize=64)
def _classes(parts: tuple[Photos, ...]) -> tuple[str, ...]:
    return tuple(sorted({name for part in parts for name in part.classes}))


def open_mixture(uris: Sequence[str], split: str) -> Mixture:
    """One split of each dataset. Raises: MissingError where one is missing or has an empty split, ConfigError."""
    parts = tuple(open_split(uri, split) for uri in uris)
    for number, part in enumerate(parts):
        if part.digest in {other.digest for other in parts[:number]}:
            raise ConfigError("data", part.uri, "is given twice", "raise its share in data.weights instead")
        if not len(part):
            raise MissingError("data", part.uri, f"its split {split} is empty", "pack more photos, or lower fractions")
    return Mixture(parts)


def check_held_out(trained: Sequence[Photos], held_out: Sequence[Photos], remedy: str) -> None:
    """No photo that scores come from may be trained on. A dataset keeps to that by itself, two may not.

    Equal bytes are found, not what only looks alike. Memory: 32 bytes a photo, a few times over.

    Raises: ConfigError with their number; MissingError where a dataset is gone.
    """
    kept = [photos for photos in held_out if len(photos)]
    known = np.concatenate([np.empty((0, 32), np.uint8), *(photos.sha256 for photos in kept)])
    for photos in trained:
        found = np.isin(_whole(photos.sha256), _whole(known))
        if not found.any():
            continue
        first = photos.sha256[found][:1]
        other = next(o for o in kept if np.isin(_whole(first), _whole(o.sha256)).any())
        key = photos.keys[int(found.argmax())]
        rule = f"trains on {found.sum()} of the held-out photos: {key} is in split {other.split} of {other.uri}"
        raise ConfigError("data", photos.uri, rule, remedy)


def _whole(sha256: NDArray[np.uint8]) -> NDArray[np.void]:
    """One value a digest, as all of it must be equal: u8[n, 32] -> [n]."""
    return np.ascontiguousarray(sha256).view("V32").ravel()
