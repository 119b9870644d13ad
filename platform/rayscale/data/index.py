"""The index of one split in memory: 64 bytes a photo, read from Parquet a piece at a time."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscale.data.manifest import TRIES, Manifest
from rayscale.errors import IntegrityError
from rayscale.observe import log
from rayscale.storage import LocalStore, Store, join, os_errors

PIECE_ROWS = 1 << 14  # decoded at once
_NAMES = ("shard", "label", "split")  # read as numbers of few different names
_NUMBERS: dict[str, type[np.generic]] = {"offset": np.int64, "size": np.int64, "width": np.int32, "height": np.int32}


class Index(NamedTuple):
    """The rows of one split."""

    manifest: Manifest
    shards: tuple[str, ...]
    shard: NDArray[np.int32]  # into `shards`
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    classes: tuple[str, ...]  # of the whole dataset, sorted
    label: NDArray[np.int32]  # into `classes`
    sha256: NDArray[np.uint8]  # [n, 32]
    etags: dict[str, str]  # shard -> of the object that this process saw last
    overwritten: set[str]  # shards that were another object before


def load_index(store: Store, manifest: Manifest, split: str) -> Index:
    """The index of one split, verified. Raises: MissingError, IntegrityError, UnavailableError."""
    with _index_file(store, manifest) as path:
        return parse_index(manifest, path, split)


def parse_index(manifest: Manifest, path: Path, split: str) -> Index:
    """The rows of one split in an index file, in its order. Raises: IntegrityError where the manifest has others."""
    num = manifest.counts.get(split, 0)
    known: dict[str, dict[str, int]] = {name: {} for name in _NAMES}
    known["shard"] = {shard.name: i for i, shard in enumerate(manifest.shards)}
    found: dict[str, NDArray[Any]] = {name: np.empty(num, kind) for name, kind in _NUMBERS.items()}
    found |= {name: np.empty(num, np.int32) for name in ("shard", "label")}
    found["sha256"] = np.empty((num, 32), np.uint8)
    at = 0
    with pq.ParquetFile(path, read_dictionary=list(_NAMES), buffer_size=1 << 16, pre_buffer=False) as file:
        for piece in file.iter_batches(PIECE_ROWS, columns=[*_NAMES, *_NUMBERS, "sha256"], use_threads=False):
            columns = {name: _codes(piece[name], known[name]) for name in _NAMES}
            columns |= {name: _numbers(piece[name], kind) for name, kind in _NUMBERS.items()}
            columns["sha256"] = _numbers(piece["sha256"], np.uint8, 32)
            chosen = columns.pop("split") == known["split"].get(split, -1)
            end = at + int(chosen.sum())
            for name, values in columns.items():
                found[name][at:end] = values[chosen][: num - at]
            at = end
            pa.default_memory_pool().release_unused()  # of its own accord it keeps 30 MB
    pa.default_memory_pool().release_unused()
    if at != num or len(known["shard"]) != len(manifest.shards):
        told = f"the manifest says {num} in {len(manifest.shards)}"
        rule = f"holds {at} photos of {split} in {len(known['shard'])} shards, {told}"
        raise IntegrityError("index", path, rule, "restore both files, or pack the photos again")
    classes = sorted(known["label"])
    order = np.argsort(np.argsort(list(known["label"]))) if classes else np.zeros(0, np.int64)
    found["label"] = order.astype(np.int32)[found["label"]]
    shards = tuple(shard.name for shard in manifest.shards)
    return Index(manifest=manifest, shards=shards, classes=tuple(classes), etags={}, overwritten=set(), **found)


def _codes(column: Any, known: dict[str, int]) -> NDArray[np.int32]:
    """The numbers of a column's names; a name that was not known gets the next one."""
    names = column.dictionary.to_pylist()
    numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
    found: NDArray[np.int32] = numbers[_numbers(column.indices, np.int32)]
    return found


def _numbers(column: Any, kind: type[np.generic], width: int = 1) -> NDArray[Any]:
    """A view of a column without nulls. By hand: pyarrow's `to_numpy` imports pandas, 40 MB in each process."""
    values = np.frombuffer(column.buffers()[1], kind)
    values = values.reshape(-1, width) if width > 1 else values
    return values[column.offset : column.offset + len(column)]


@contextlib.contextmanager
def _index_file(store: Store, manifest: Manifest) -> Iterator[Path]:
    """The index as a file that is what the manifest says: never whole in memory."""
    with tempfile.TemporaryDirectory(prefix="rayscale-") as folder:
        for _ in range(TRIES):
            if isinstance(store, LocalStore):
                path = store.path(manifest.index_name)
            else:
                path = Path(folder, "index")
                store.download(manifest.index_name, path)
            with os_errors(path), path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == manifest.index_sha256:
                    yield path
                    return
            log.warning("%s is not what the manifest says; reading again", join(store.uri, manifest.index_name))
    rule = "is not what the manifest says"
    remedy = "restore the file, or pack the photos again"
    raise IntegrityError("index", join(store.uri, manifest.index_name), rule, remedy)
