"""Photos read back from a dataset by byte range, each verified."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscale.data.cache import open_cache
from rayscale.data.index import Index, load_index
from rayscale.data.manifest import KEY_CHARS, SPLITS, TRIES, Manifest, read_manifest
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError, RayscaleError, nearest
from rayscale.observe import log
from rayscale.storage import Store, join, open_store

GAP_BYTES = 64 << 10  # neighbours no further apart are read together
# The same where the store is remote: a request takes as much CPU as a MiB of body, and 20 to 60 ms.
GAP_REMOTE_BYTES = 512 << 10
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
    def _index(self) -> Index:
        with _loading:
            return _load(self.uri, self.split, self.digest)

    @property
    def manifest(self) -> Manifest:
        return self._index.manifest

    @property
    def keys(self) -> Sequence[str]:
        return _Keys(self._index.sha256)

    @property
    def sha256(self) -> NDArray[np.uint8]:
        """Digests of the photos' bytes, [n, 32]: keys are their beginnings."""
        return self._index.sha256

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

    def label(self, index: int) -> str:
        """Of one sample; "" for none."""
        return str(self.classes[self._index.label[index]])

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
        reader = _Reader(open_store(self.uri), self._index)
        rows = np.unique(wanted)
        found = dict(reader.kept(rows))
        left = [row for row in rows.tolist() if row not in found]
        index, gap_bytes = reader.index, GAP_REMOTE_BYTES if reader.store.remote else GAP_BYTES
        runs = list(plan_reads(np.array(left, np.int64), index.shard, index.offset, index.size, gap_bytes))
        many = reader.store.remote and len(runs) > 1
        for part in (_readers(os.getpid()).map if many else map)(reader.read, runs):
            found.update(part)
        return [found[int(row)] for row in wanted]


def plan_reads(
    rows: NDArray[np.int64],
    shard: NDArray[np.int32],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    gap_bytes: int = GAP_BYTES,
) -> Iterator[list[int]]:
    """Group rows into reads: neighbours in a shard at most `gap_bytes` apart, at most RUN_BYTES in all. Pure."""
    run: list[int] = []
    for row in (int(r) for r in rows[np.lexsort((offset[rows], shard[rows]))]):
        if run:
            gap = offset[row] - (offset[run[-1]] + size[run[-1]])
            length = offset[row] + size[row] - offset[run[0]]
            if shard[row] != shard[run[0]] or gap > gap_bytes or length > RUN_BYTES:
                yield run
                run = []
        run.append(row)
    if run:
        yield run


class _Reader:
    """Reads of one split's photos from where they are, or from what this node kept of them."""

    def __init__(self, store: Store, index: Index) -> None:
        self.store, self.index = store, index
        self.cache = open_cache(index.manifest.digest) if store.remote else None

    def kept(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | RayscaleError]]:
        """Those of the rows that are in the cache, verified."""
        for row in rows.tolist() if self.cache else ():
            shard, at, size = self._place(row)
            photo = self.cache.get(shard, at, size) if self.cache else None
            if photo is None:
                continue
            if self._matches(row, photo):
                yield row, photo
            else:
                log.warning("cache: bytes of %s at %d are not what the index says; fetching them anew", shard, at)

    def read(self, run: Sequence[int]) -> list[tuple[int, bytes | RayscaleError]]:
        """One coalesced read, then each photo of it verified; a photo that does not match is read again by itself."""
        (shard, start, _), (_, last, size) = self._place(run[0]), self._place(run[-1])
        data = self._fetch(shard, start, last + size - start)
        found = []
        for row in run:
            _, at, size = self._place(row)
            found.append((row, self._verified(row, data[at - start : at - start + size])))
        return found

    def _verified(self, row: int, photo: bytes) -> bytes | RayscaleError:
        shard, at, size = self._place(row)
        for trial in range(TRIES):
            if trial:
                log.warning("%s/%s: bytes at %d are not what the index says; reading again", self.store.uri, shard, at)
                photo = self._fetch(shard, at, size)
            if self._matches(row, photo):
                if self.cache:
                    self.cache.put(shard, at, photo)
                return photo
        changed = ", and the file was overwritten meanwhile" if shard in self.index.overwritten else ""
        rule = f"photo {_Keys(self.index.sha256)[row]} at byte {at} is not what its sha256 says, read {TRIES} times"
        remedy = "restore the file, or pack the photos again"
        return IntegrityError("shard", join(self.store.uri, shard), rule + changed, remedy)

    def _fetch(self, shard: str, start: int, length: int) -> bytes:
        """Bytes of a shard. One that was overwritten since it was first read is told; its photos may be whole."""
        etags = self.index.etags
        try:
            data, etag = self.store.get(shard, start=start, length=length, etag=etags.get(shard, ""))
        except ConflictError as error:
            log.warning("%s; its photos are verified all the same", error)
            self.index.overwritten.add(shard)
            data, etag = self.store.get(shard, start=start, length=length)
        etags[shard] = etag
        return data

    def _place(self, row: int) -> tuple[str, int, int]:
        """(shard, offset, size) of a photo."""
        index = self.index
        return index.shards[index.shard[row]], int(index.offset[row]), int(index.size[row])

    def _matches(self, row: int, photo: bytes) -> bool:
        return hashlib.sha256(photo).digest() == bytes(self.index.sha256[row])


_loading = threading.Lock()


@functools.lru_cache(maxsize=64)
def _load(uri: str, split: str, digest: str) -> Index:
    """The index of one split, verified."""
    store = open_store(uri)
    manifest = read_manifest(store)
    if manifest is None or manifest.digest != digest:
        now = manifest.digest[:12] if manifest else "none"
        raise ConflictError(
            "data", uri, f"is no longer the dataset {digest[:12]} (now: {now})", "start a new run on it"
        )
    return load_index(store, manifest, split)


@functools.lru_cache(maxsize=1)
def _readers(_pid: int) -> ThreadPoolExecutor:
    """Threads for range reads, of this process: they do not survive a fork."""
    return ThreadPoolExecutor(READERS, "photos")
