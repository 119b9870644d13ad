"""Photos read back from a dataset by byte range, each verified."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscale.data.manifest import KEY_CHARS, SPLITS, TRIES, Manifest, read_manifest
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError, RayscaleError, nearest
from rayscale.observe import log
from rayscale.storage import Store, join, open_store

GAP_BYTES = 64 << 10  # neighbours no further apart are read together

RUN_BYTES = 8 << 20  # one read is at most this long, unless it holds one photo
READERS = 16  # range reads at once, where the store is remote


def open_split(manifest_uri: str, split: str) -> Photos:
    """One split of the dataset at a folder's URI (or its manifest.json's); a split may be empty.

    Raises: MissingError for no dataset (a half-packed one is none), ConfigError for an unknown split, IntegrityError.
    """
    if split not in SPLITS:
        raise ConfigError("split", split, "no such split", nearest(split, SPLITS))
    uri = open_store(str(manifest_uri).removesuffix("/manifest.json")).uri
    manifest = read_manifest(open_store(uri))
    if manifest is None:
        raise MissingError("data", uri, "holds no manifest.json", "pack photos there with `rayscale ingest`")
    return Photos(uri, split, manifest.digest)


class _Index(NamedTuple):
    """The rows of one split. About 64 bytes a sample."""

    manifest: Manifest
    shards: tuple[str, ...]
    shard: NDArray[np.int32]  # into `shards`
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    classes: tuple[str, ...]  # of the whole dataset
    label: NDArray[np.int32]  # into `classes`
    sha256: NDArray[np.uint8]  # [n, 32]


class _Keys(Sequence[str]):
    """Keys without a string a sample in memory: they are the beginnings of the digests."""

    def __init__(self, sha256: NDArray[np.uint8]) -> None:
        self._sha256 = sha256

    def __len__(self) -> int:
        return len(self._sha256)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Keys(self._sha256[i])
        return self._sha256[i].tobytes().hex()[:KEY_CHARS]


@dataclass(frozen=True)
class Photos:
    """One split, opened. A value of three strings: the index is loaded once per process, when it is first needed."""

    uri: str
    split: str
    digest: str  # of the manifest; a dataset that is another one by now is refused

    @property
    def _index(self) -> _Index:
        with _loading:
            return _load(self.uri, self.split, self.digest)

    @property
    def manifest(self) -> Manifest:
        return self._index.manifest

    @property
    def keys(self) -> Sequence[str]:
        return _Keys(self._index.sha256)

    @property
    def widths(self) -> NDArray[np.int32]:
        return self._index.width

    @property
    def heights(self) -> NDArray[np.int32]:
        return self._index.height

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels of the whole dataset, sorted: the same for each of its splits."""
        return self._index.classes

    @property
    def labels(self) -> NDArray[np.object_]:
        """One name a sample; a copy of 8 bytes each."""
        return np.array(self.classes, dtype=object)[self._index.label]

    def __len__(self) -> int:
        return len(self._index.size)

    def read(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[bytes]:
        """The encoded photos at `indices`, in their order, each verified by its sha256.

        Raises: IndexError, MissingError (a shard is gone), UnavailableError, IntegrityError.
        """
        found = self.read_each(indices)
        for photo in found:
            if isinstance(photo, RayscaleError):
                raise photo
        return found  # type: ignore[return-value]

    def read_each(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[bytes | RayscaleError]:
        """`read`, with an IntegrityError in the place of each photo whose bytes are not what its sha256 says.

        Raises: IndexError, MissingError (a shard is gone), UnavailableError: what substituting a photo does not mend.
        """
        wanted = np.asarray(indices, np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise IndexError(f"photo {outside[0]} of {len(self)}")
        index, store = self._index, open_store(self.uri)
        runs = list(plan_reads(np.unique(wanted), index.shard, index.offset, index.size))
        work = functools.partial(_read_run, store, index)
        parts = _readers(os.getpid()).map(work, runs) if store.remote and len(runs) > 1 else map(work, runs)
        found = {row: photo for part in parts for row, photo in part}
        return [found[int(row)] for row in wanted]


def plan_reads(
    rows: NDArray[np.int64], shard: NDArray[np.int32], offset: NDArray[np.int64], size: NDArray[np.int64]
) -> Iterator[list[int]]:
    """Group rows into reads: neighbours in a shard at most GAP_BYTES apart, at most RUN_BYTES in all. Pure."""
    run: list[int] = []
    for row in (int(r) for r in rows[np.lexsort((offset[rows], shard[rows]))]):
        if run:
            gap = offset[row] - (offset[run[-1]] + size[run[-1]])
            length = offset[row] + size[row] - offset[run[0]]
            if shard[row] != shard[run[0]] or gap > GAP_BYTES or length > RUN_BYTES:
                yield run
                run = []
        run.append(row)
    if run:
        yield run


def _read_run(store: Store, index: _Index, run: Sequence[int]) -> list[tuple[int, bytes | RayscaleError]]:
    """One coalesced read, then each photo of it verified; a photo that does not match is read again by itself."""
    first, last = run[0], run[-1]
    shard, start = index.shards[index.shard[first]], int(index.offset[first])
    data = store.read(shard, start=start, length=int(index.offset[last] + index.size[last]) - start)
    found: list[tuple[int, bytes | RayscaleError]] = []
    for row in run:
        at, size = int(index.offset[row]), int(index.size[row])
        photo = data[at - start : at - start + size]
        for _ in range(TRIES - 1):
            if _matches(photo, index, row):
                break
            log.warning("%s/%s: bytes at %d are not what the index says; reading again", store.uri, shard, at)
            photo = store.read(shard, start=at, length=size)
        found.append((row, photo if _matches(photo, index, row) else _damaged(store, index, row)))
    return found


def _damaged(store: Store, index: _Index, row: int) -> IntegrityError:
    at, shard = int(index.offset[row]), index.shards[index.shard[row]]
    rule = f"photo {_Keys(index.sha256)[row]} at byte {at} is not what its sha256 says, read {TRIES} times"
    return IntegrityError("shard", join(store.uri, shard), rule, "restore the file, or pack the photos again")


def _matches(photo: bytes, index: _Index, row: int) -> bool:
    return hashlib.sha256(photo).digest() == bytes(index.sha256[row])


_loading = threading.Lock()


@functools.lru_cache(maxsize=6)
def _load(uri: str, split: str, digest: str) -> _Index:
    """The index of one split, verified."""
    store = open_store(uri)
    manifest = read_manifest(store)
    if manifest is None or manifest.digest != digest:
        now = manifest.digest[:12] if manifest else "none"
        raise ConflictError(
            "data", uri, f"is no longer the dataset {digest[:12]} (now: {now})", "start a new run on it"
        )
    data = store.read(manifest.index_name)
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        rule = "is not what the manifest says"
        raise IntegrityError(
            "index", join(uri, manifest.index_name), rule, "restore the file, or pack the photos again"
        )
    return _read_index(manifest, data, split)


def _read_index(manifest: Manifest, data: bytes, split: str) -> _Index:
    labels = pq.read_table(pa.BufferReader(data), columns=["label"], use_threads=False)["label"]
    classes = tuple(sorted(labels.unique().to_pylist()))
    columns = ["shard", "offset", "size", "width", "height", "label", "sha256"]
    table = pq.read_table(pa.BufferReader(data), columns=columns, filters=[("split", "=", split)], use_threads=False)
    names = tuple(shard.name for shard in manifest.shards)

    def numbers(column: str) -> Any:
        return table[column].to_numpy()

    def codes(column: str, known: Sequence[str]) -> NDArray[np.int32]:
        found = pa.compute.index_in(table[column], value_set=pa.array(known, pa.string()))
        return found.to_numpy().astype(np.int32)  # type: ignore[no-any-return]

    digests = table["sha256"].combine_chunks()
    return _Index(
        manifest=manifest,
        shards=names,
        shard=codes("shard", names),
        offset=numbers("offset"),
        size=numbers("size"),
        width=numbers("width"),
        height=numbers("height"),
        classes=classes,
        label=codes("label", classes),
        sha256=np.frombuffer(digests.buffers()[1], np.uint8)[digests.offset * 32 :].reshape(-1, 32)[: len(digests)],
    )


@functools.lru_cache(maxsize=1)
def _readers(_pid: int) -> ThreadPoolExecutor:
    """Threads for range reads, of this process: they do not survive a fork."""
    return ThreadPoolExecutor(READERS, "photos")
