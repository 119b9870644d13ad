"""Labels, de-duplication and splits of what was scanned: pure functions, independent of the order of photos."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rayscale.data import duplicates
from rayscale.data.labels import Labels
from rayscale.data.manifest import KEY_CHARS, SPLITS
from rayscale.data.scan import PackSettings, Photo, Rejected

_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


class Sample(NamedTuple):
    """A photo with its place in the dataset."""

    photo: Photo
    label: str  # "" where nothing names one
    split: str  # one of SPLITS
    group: str = ""  # key of the photo that leads its near duplicates, or of a tile's whole photo; "" for one alone


class Assigned(NamedTuple):
    """All that goes into the dataset, in its order, and what does not."""

    samples: list[Sample]  # by (split, sha256): each split is contiguous, and its order already a shuffle
    rejected: list[Rejected]  # by key
    duplicates: list[tuple[str, str]]  # (left out, the equal photo that was kept), by name
    near: list[list[str]]  # names of photos that look alike and so share their split, sorted
    unlabelled: list[str]  # names of those that the table of labels does not know
    notes: list[str]  # what a person should hear about the splits


def assign(
    found: Sequence[Photo | Rejected],
    settings: PackSettings,
    table: Labels | None = None,
    beside: dict[str, str] | None = None,
) -> Assigned:
    """All about the dataset that needs all of its photos.

    A label is what `table` says, where there is one; else what lies `beside` a photo (key -> label); else its folder.
    """
    rejected = [f for f in found if isinstance(f, Rejected)]
    candidates: list[Sample] = []
    unlabelled: list[str] = []
    for photo in (f for f in found if isinstance(f, Photo)):
        folders = photo.source_key.split("/")[:-1]
        if photo.tar:
            del folders[photo.tar.count("/")]  # the tar itself is none
        split = "" if settings.split == "hash" else _FOLDERS.get(folders[0] if folders else "", "?")
        if split == "?":
            rejected.append(Rejected(photo.name, "not in a folder named train, validation (val) or test"))
            continue
        if table is not None:
            label = table(photo.source_key)
            if label is None:
                unlabelled.append(photo.name)
        else:
            labels = folders if settings.split == "hash" else folders[1:]
            label = (beside or {}).get(photo.source_key) or (labels[0] if labels else "")
        candidates.append(Sample(photo, label or "", split))
    kept, left_out = _once(candidates)
    leaders = _leaders(kept)
    notes: list[str] = []
    if settings.split == "hash":
        splits, notes = hash_splits(sorted(set(leaders.values())), *settings.fractions)
        kept = [s._replace(split=splits[leaders[_whole(s.photo)]]) for s in kept]
    near = _near(kept, leaders)
    if settings.split == "folder":
        notes += _leaks(kept, leaders)
    sizes = Counter(leaders[_whole(s.photo)] for s in kept)
    samples = [
        s._replace(group=leader[:KEY_CHARS]) if sizes[leader := leaders[_whole(s.photo)]] > 1 else s for s in kept
    ]
    samples.sort(key=lambda s: (SPLITS.index(s.split), _whole(s.photo), s.photo.sha256))
    return Assigned(samples, sorted(rejected), sorted(left_out), near, sorted(unlabelled), notes)


def _whole(photo: Photo) -> str:
    """Digest of the photo that decides: a tile's own photo, which keeps its tiles together."""
    return photo.whole or photo.sha256


def _once(candidates: list[Sample]) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Of equal photos the held-out one stays: what is scored must not be trained on."""
    candidates.sort(key=lambda s: (-SPLITS.index(s.split) if s.split else 0, s.photo.name))
    kept: dict[str, Sample] = {}
    left_out = []
    for sample in candidates:
        first = kept.setdefault(sample.photo.sha256, sample)
        if first is not sample:
            left_out.append((sample.photo.name, first.photo.name))
    return list(kept.values()), left_out


def _leaders(samples: Sequence[Sample]) -> dict[str, str]:
    """Digest of a whole photo -> the smallest digest among those that look like it, its own where none does."""
    looks = {_whole(s.photo): s.photo.look for s in samples}
    digests = sorted(looks)
    leader = duplicates.group([looks[d] for d in digests])
    return {digest: digests[i] for digest, i in zip(digests, leader.tolist(), strict=True)}


def _near(samples: Sequence[Sample], leaders: dict[str, str]) -> list[list[str]]:
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for sample in samples:
        groups[leaders[_whole(sample.photo)]].add(sample.photo.source_key)
    return sorted(sorted(keys) for keys in groups.values() if len(keys) > 1)


def _leaks(samples: Sequence[Sample], leaders: dict[str, str]) -> list[str]:
    """A note where folders hold photos out that look like others."""
    seen: dict[str, Sample] = {}
    crossing = []
    for sample in sorted(samples, key=lambda s: s.photo.name):
        first = seen.setdefault(leaders[_whole(sample.photo)], sample)
        if first.split != sample.split:
            crossing.append((first.photo.name, sample.photo.name))
    if not crossing:
        return []
    return [
        f"{len(crossing)} photos look like one of another split, the first: {crossing[0][1]} like {crossing[0][0]};"
        " scores on them flatter"
    ]


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
