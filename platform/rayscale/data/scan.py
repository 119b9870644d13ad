"""What there is to pack: every photo read once, hashed and fully decoded; then labelled, de-duplicated and split.

`scan` is the only part that touches a store. `assign` and `hash_splits` are pure.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from rayscale import __version__
from rayscale.contract import dumps
from rayscale.data.manifest import SPLITS
from rayscale.errors import ConfigError, ImageError, MediaTypeError, MissingError, TooLargeError
from rayscale.imaging import Limits, decode_rgb, read_header
from rayscale.storage import Entry, Store

SCAN_CHUNK = 2000  # photos whose results are kept together, for a run that goes on after a kill
_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, photos done, photos in all) now and then, from the calling thread."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How photos become a dataset. Equal photos and settings give equal bytes."""

    shard_bytes: int = 64 << 20  # a shard is at most this long, unless it holds one photo; also the memory it takes
    min_side: int = 64  # pixels; smaller photos are quarantined
    split: Literal["hash", "folder"] = "hash"
    validation_fraction: float | None = None  # split "hash" only; None is 0.05
    test_fraction: float | None = None  # split "hash" only; None is 0.05
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 1 << 10 <= self.shard_bytes <= 1 << 30:
            raise ConfigError("shard_bytes", self.shard_bytes, "must be 1 KiB to 1 GiB", "64 MiB is a good size")
        if self.min_side < 1:
            raise ConfigError("min_side", self.min_side, "must be at least 1 pixel", "raise it")
        if self.split not in ("hash", "folder"):
            raise ConfigError("split", self.split, "must be hash or folder", "set one of them")
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if value is not None and self.split == "folder":
                raise ConfigError(name, value, "has no effect where folders decide the split", "leave it out")
            if value is not None and not 0 <= value < 1:
                raise ConfigError(name, value, "must be at least 0 and below 1", "try 0.05")
        if sum(self.fractions) >= 1:
            raise ConfigError("test_fraction", self.fractions[1], "leaves nothing to train on", "lower the fractions")

    @property
    def fractions(self) -> tuple[float, float]:
        """(validation, test) of split "hash"."""
        given = (self.validation_fraction, self.test_fraction)
        return (0.05 if given[0] is None else given[0], 0.05 if given[1] is None else given[1])

    @property
    def accepted(self) -> Limits:
        """What a photo may be."""
        return replace(self.limits, min_side=max(self.min_side, self.limits.min_side))


class Photo(NamedTuple):
    """One usable photo of the source."""

    source_key: str
    size: int  # bytes
    sha256: str  # hex, of the bytes
    width: int  # pixels, upright
    height: int
    format: str  # as imaging names it


class Rejected(NamedTuple):
    """One that is left out, and why."""

    source_key: str
    reason: str


class Sample(NamedTuple):
    """A photo with its place in the dataset."""

    photo: Photo
    label: str  # "" where folders name none
    split: str  # one of SPLITS


class Assigned(NamedTuple):
    """All that goes into the dataset, in its order, and what does not."""

    samples: list[Sample]  # by (split, sha256): each split is contiguous, and its order already a shuffle
    rejected: list[Rejected]  # by key
    duplicates: list[tuple[str, str]]  # (key left out, key of the equal photo that was kept), by key
    notes: list[str]  # what a person should hear about the splits


def listing(store: Store) -> list[Entry]:
    """All that may be a photo, sorted by key; names that begin with a dot are not looked at, as everywhere.

    Raises: MissingError where there is nothing.
    """
    hidden = "/."
    found = sorted(e for e in store.list() if hidden not in f"/{e.key}")
    if not found:
        raise MissingError("source", store.uri, "holds no files", "give a folder or s3://bucket/prefix of photos")
    return found


def fingerprint(entries: Sequence[Entry], settings: PackSettings) -> str:
    """Digest of a listing: equal ones mean equal photos, without reading them."""
    total = hashlib.sha256(dumps([__version__, settings.accepted]).encode())
    for entry in entries:
        total.update(json.dumps(entry).encode())
    return total.hexdigest()


def num_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan(
    store: Store,
    entries: Sequence[Entry],
    settings: PackSettings,
    pool: Executor,
    *,
    cache: Store | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Photo | Rejected]:
    """Look at every photo, in order. With a `cache`, results are kept there under scan/ and not computed twice."""
    # Decoded pixels are the memory: no more pictures at once than CPUs, however many reads wait.
    decoding = threading.BoundedSemaphore(num_cpus())
    for start in range(0, len(entries), SCAN_CHUNK):
        chunk = entries[start : start + SCAN_CHUNK]
        kept = f"scan/{fingerprint(chunk, settings)}.json"
        if cache is not None and cache.exists(kept):
            rows = json.loads(cache.read(kept))
            yield from (Photo(*row) if len(row) > 2 else Rejected(*row) for row in rows)
            continue
        found: list[Photo | Rejected] = []
        for result in pool.map(lambda entry: look(store, entry, settings.accepted, decoding), chunk):
            found.append(result)
            if on_progress is not None:
                on_progress("scanning", start + len(found), len(entries))
        if cache is not None:
            cache.write(kept, json.dumps(found).encode())
        yield from found


def look(store: Store, entry: Entry, limits: Limits, decoding: threading.BoundedSemaphore) -> Photo | Rejected:
    """Read, hash and decode one file. Raises: what the store raises, except for a file that is gone or unreadable."""
    try:
        entry.key.encode()
    except UnicodeEncodeError:
        return Rejected(entry.key.encode(errors="backslashreplace").decode(), "its name is not UTF-8")
    if entry.size > limits.max_bytes:  # not worth reading
        return Rejected(entry.key, f"{entry.size} bytes: at most {limits.max_bytes} bytes are read")
    try:
        data = store.read(entry.key)
        header = read_header(data, limits, entry.key)
        with decoding:
            decode_rgb(data, limits, entry.key)
    except (ImageError, MediaTypeError, TooLargeError, MissingError) as error:
        return Rejected(entry.key, f"{error.value}: {error.rule}")
    digest = hashlib.sha256(data).hexdigest()
    return Photo(entry.key, len(data), digest, header.width, header.height, header.format)


def assign(found: Sequence[Photo | Rejected], settings: PackSettings) -> Assigned:
    """Labels, splits and de-duplication. Independent of the order of `found`."""
    rejected = [f for f in found if isinstance(f, Rejected)]
    candidates: list[Sample] = []
    for photo in (f for f in found if isinstance(f, Photo)):
        folders = photo.source_key.split("/")[:-1]
        split = "" if settings.split == "hash" else _FOLDERS.get(folders[0] if folders else "", "?")
        if split == "?":
            rejected.append(Rejected(photo.source_key, "not in a folder named train, validation (val) or test"))
            continue
        labels = folders if settings.split == "hash" else folders[1:]
        candidates.append(Sample(photo, labels[0] if labels else "", split))
    # Of equal photos the held-out one stays: what is scored must not be trained on.
    candidates.sort(key=lambda s: (-SPLITS.index(s.split) if s.split else 0, s.photo.source_key))
    kept: dict[str, Sample] = {}
    duplicates: list[tuple[str, str]] = []
    for sample in candidates:
        first = kept.setdefault(sample.photo.sha256, sample)
        if first is not sample:
            duplicates.append((sample.photo.source_key, first.photo.source_key))
    notes: list[str] = []
    if settings.split == "hash":
        splits, notes = hash_splits(list(kept), *settings.fractions)
        samples = [s._replace(split=splits[digest]) for digest, s in kept.items()]
    else:
        samples = list(kept.values())
    samples.sort(key=lambda s: (SPLITS.index(s.split), s.photo.sha256))
    return Assigned(samples, sorted(rejected), sorted(duplicates), notes)


def hash_splits(digests: Sequence[str], validation: float, test: float) -> tuple[dict[str, str], list[str]]:
    """(sha256 hex -> split, notes). A photo's split depends on its content alone, so it stays as others come and go.

    Read as a fraction, a digest below `validation` is validation, below `validation + test` test, the rest train.
    A wanted split that came out empty is given the photo nearest to its range, of a split that has another one;
    train, which must not be empty, takes it of any.
    """
    ranges = {
        "validation": (0.0, validation),
        "test": (validation, validation + test),
        "train": (validation + test, 1.0),
    }
    where = {d: int(d[:13], 16) / 16**13 for d in sorted(digests)}  # 52 bits: exact in a float

    def distance(digest: str, split: str) -> float:
        low, high = ranges[split]
        return max(low - where[digest], where[digest] - high, 0.0)

    splits = {d: next(s for s, (low, high) in ranges.items() if low <= x < high) for d, x in where.items()}
    notes: list[str] = []
    for split in SPLITS:
        low, high = ranges[split]
        if low == high or split in splits.values():
            continue
        sizes = Counter(splits.values())
        donors = [d for d, s in splits.items() if sizes[s] > 1] or [d for d in splits if split == "train"]
        if not donors:
            notes.append(f"split {split} is empty: too few photos")
            continue
        nearest = min(donors, key=lambda d: (distance(d, split), d))
        notes.append(f"split {split} came out empty: it was given 1 photo of {splits[nearest]}, the nearest by hash")
        splits[nearest] = split
    return splits, notes
