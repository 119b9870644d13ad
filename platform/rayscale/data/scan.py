"""Every photo read once, hashed, fully decoded, and told from its near duplicates. `scan` touches the store."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

from rayscale import __version__
from rayscale.contract import dumps
from rayscale.data.duplicates import perceptual_hash
from rayscale.data.parallel import Mapper
from rayscale.data.source import TAR, Item, read_all
from rayscale.data.tile_photos import Box, boxes, crop
from rayscale.errors import ConfigError, ImageError, MediaTypeError, MissingError, TooLargeError
from rayscale.imaging import U8, Limits, decode_gray, decode_rgb
from rayscale.storage import Store

SCAN_CHUNK = 2000  # photos whose results are kept together, for a run that goes on after a kill
TASK_PHOTOS = 50  # that one worker looks at in one go

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, photos done, photos in all) before the work, then now and then, from the calling thread."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How photos become a dataset. Equal photos and settings give equal bytes."""

    shard_bytes: int = 64 << 20  # a shard is at most this long, unless it holds one photo; also the memory it takes
    min_side: int = 64  # pixels; smaller photos are quarantined
    tile_px: int | None = None  # photos with a longer side are cut into lossless tiles of at most this side
    labels: str = ""  # URI of a CSV or Parquet table; without one folders are the labels
    label_column: str = "label"  # of the table, or the field of a .json beside a photo in a tar
    key_column: str = ""  # of the table: relative path or file name; "" finds it
    split: Literal["hash", "folder"] = "hash"
    validation_fraction: float | None = None  # split "hash" only; None is 0.05
    test_fraction: float | None = None  # split "hash" only; None is 0.05
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 1 << 10 <= self.shard_bytes <= 1 << 30:
            raise ConfigError("shard_bytes", self.shard_bytes, "must be 1 KiB to 1 GiB", "64 MiB is a good size")
        if self.min_side < 1:
            raise ConfigError("min_side", self.min_side, "must be at least 1 pixel", "raise it")
        if self.tile_px is not None and self.tile_px < 4 * self.min_side:
            rule = f"must be at least four times min_side, {self.min_side}"
            raise ConfigError("tile_px", self.tile_px, rule, "2048 is a good size")
        if self.key_column and not self.labels:
            raise ConfigError("key_column", self.key_column, "has no effect without a table of labels", "leave it out")
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
    """One usable photo of the source, or a tile of one."""

    source_key: str
    size: int  # bytes
    sha256: str  # hex, of the bytes
    width: int  # pixels, upright
    height: int
    format: str  # as imaging names it
    look: str = ""  # perceptual hash of the whole photo
    box: str = ""  # of a tile in its photo: top, left, height, width
    whole: str = ""  # sha256 of a tile's photo
    tar: str = ""  # that holds it, with the place of the whole photo there
    tar_offset: int = 0
    tar_size: int = 0
    stamp: str = ""  # of its file when it was read, as `Store.stamp`

    @property
    def name(self) -> str:
        """What people know it by."""
        return f"{self.source_key}[{self.box}]" if self.box else self.source_key

    @property
    def item(self) -> Item:
        """Where its bytes, or those of its whole photo, are."""
        return Item(self.source_key, self.tar_size, "", self.tar, self.tar_offset)


class Rejected(NamedTuple):
    """One that is left out, and why."""

    source_key: str
    reason: str


Looked = list[Photo | Rejected]
"""What became of one file: a photo, several tiles, or nothing usable."""


def fingerprint(items: Sequence[Item], settings: PackSettings) -> str:
    """Digest of a listing: equal ones mean equal photos, without reading them."""
    total = hashlib.sha256(dumps([__version__, settings.accepted, settings.tile_px]).encode())
    for start in range(0, len(items), SCAN_CHUNK):
        total.update(json.dumps(items[start : start + SCAN_CHUNK]).encode())
    return total.hexdigest()


def scan(
    store: Store,
    items: Sequence[Item],
    settings: PackSettings,
    mapper: Mapper,
    *,
    cache: Store | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Photo | Rejected]:
    """Look at every photo, in order. With a `cache`, results are kept there under scan/ and not computed twice."""
    chunks = [items[start : start + SCAN_CHUNK] for start in range(0, len(items), SCAN_CHUNK)]
    names = [f"scan/{fingerprint(chunk, settings)}.json" for chunk in chunks]
    there = {entry.key for entry in cache.list("scan/")} if cache is not None else set()
    tasks = [
        chunk[start : start + TASK_PHOTOS]
        for chunk, name in zip(chunks, names, strict=True)
        if name not in there
        for start in range(0, len(chunk), TASK_PHOTOS)
    ]
    # One stream over all chunks: no worker waits for the end of a chunk.
    looked = itertools.chain.from_iterable(mapper(partial(look_all, store, settings.accepted, settings.tile_px), tasks))
    done = len(items) - sum(len(task) for task in tasks)
    if on_progress is not None and tasks:
        on_progress("scanning", done, len(items))
    for chunk, name in zip(chunks, names, strict=True):
        if cache is not None and name in there:
            rows = json.loads(cache.read(name))
            yield from (Photo(*row) if len(row) > 2 else Rejected(*row) for row in rows)
            continue
        found: Looked = []
        for results in itertools.islice(looked, len(chunk)):
            found += results
            done += 1
            if on_progress is not None:
                on_progress("scanning", done, len(items))
        if cache is not None:
            cache.write(name, json.dumps(found).encode())
        yield from found


def look_all(store: Store, limits: Limits, tile_px: int | None, items: Sequence[Item]) -> list[Looked]:
    """Look at some, in order. Raises: what the store raises, except for a file that is gone or unreadable."""
    reasons = {item.key: reason for item in items if (reason := _not_worth_reading(item, limits))}
    datas = read_all(store, [item for item in items if item.key not in reasons])
    return [
        [Rejected(_printable(item.key), reasons[item.key])]
        if item.key in reasons
        else _look(item, store.stamp(item.file), next(datas), limits, tile_px)  # the stamp is the older of the two
        for item in items
    ]


def _not_worth_reading(item: Item, limits: Limits) -> str:
    """Why, "" for one that is to be read."""
    if item.key != _printable(item.key):
        return "its name is not UTF-8"
    if item.key.endswith(TAR) and not item.tar:
        return "is no whole tar file; members before the damage are packed"
    return f"{item.size} bytes: at most {limits.max_bytes} bytes are read" if item.size > limits.max_bytes else ""


def _printable(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()


def _look(item: Item, stamp: str, data: bytes | MissingError, limits: Limits, tile_px: int | None) -> Looked:
    try:
        if isinstance(data, MissingError):
            raise data
        gray, header = decode_gray(data, limits, item.key)
    except (ImageError, MediaTypeError, TooLargeError, MissingError) as error:
        return [Rejected(item.key, f"{error.value}: {error.rule}")]
    whole = Photo(
        source_key=item.key,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        width=header.width,
        height=header.height,
        format=header.format,
        look=perceptual_hash(gray),
        tar=item.tar,
        tar_offset=item.offset,
        tar_size=item.size if item.tar else 0,
        stamp=stamp,
    )
    if tile_px is None or max(header.width, header.height) <= tile_px:
        return [whole]
    pixels = decode_rgb(data, limits, item.key)
    return [_tile(whole, pixels, box) for box in boxes(header.height, header.width, tile_px)]


def _tile(whole: Photo, pixels: U8, box: Box) -> Photo:
    data = crop(pixels, box)
    return whole._replace(
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        width=box.width,
        height=box.height,
        format="png",
        box=str(box),
        whole=whole.sha256,
    )
