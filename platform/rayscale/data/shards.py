"""Photos packed into shards, and read back by byte range.

A dataset is a folder: tar files of the encoded originals as they came (any tar or WebDataset tool reads them; a shard
holds one split), a Parquet index beside them, `quarantine.json` (what was left out, and why), `origin.json` (by which
a second run knows the photos again), and `manifest.json`, written last: without it there is no dataset. Shards and
index carry a digest of their content in their names, so two runs never write different bytes to one name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscale import contract
from rayscale.data.layout import KEY_CHARS, TRIES, Shard, ShardInfo, build, index_bytes, layout
from rayscale.data.scan import (
    SPLITS,
    Assigned,
    OnProgress,
    PackSettings,
    assign,
    fingerprint,
    listing,
    num_cpus,
    scan,
)
from rayscale.errors import ConfigError, ConflictError, ImageError, IntegrityError, MissingError, RayscaleError, nearest
from rayscale.observe import log
from rayscale.storage import Store, check_free, join, open_store

GAP_BYTES = 64 << 10  # neighbours no further apart are read together
RUN_BYTES = 8 << 20  # one read is at most this long, unless it holds one photo
READERS = 16  # range reads at once, where the store is remote


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset is. `digest` identifies its content, however it is cut into shards."""

    shards: tuple[ShardInfo, ...]
    counts: Mapping[str, int]  # train, validation, test -> samples
    source: str  # URI of the photos
    digest: str  # SHA-256 over the sorted (sha256, split, label) of all samples
    index_sha256: str
    parent: str = ""  # digest of the dataset this one was made from
    schema: int = contract.SCHEMA

    @property
    def index_name(self) -> str:
        return f"index-{self.index_sha256[:16]}.parquet"


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did."""

    manifest: Manifest
    quarantined: tuple[tuple[str, str], ...]  # (key, reason)
    duplicates: tuple[tuple[str, str], ...]  # (key left out, key of the equal photo that was kept)
    notes: tuple[str, ...] = ()  # about the splits, for a person
    existed: bool = False  # it was complete before


# ----------------------------------------------------------------------------------------------------- packing


def pack(
    source_uri: str,
    out_uri: str,
    settings: PackSettings | None = None,
    *,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    dry_run: bool = False,
) -> PackReport:
    """Pack all photos under `source_uri` into a dataset at `out_uri`; a run that was killed goes on where it was.

    Equal photos and settings give equal bytes, whatever the order of listing or number of workers. Memory: the
    listing, one shard, and one decoded photo per CPU. dry_run writes nothing.

    Raises: MissingError (no photos), ImageError (none usable), ConflictError (another dataset is there already),
    ResourceError (disk), ConfigError (settings, credentials), UnavailableError.
    """
    settings = settings or PackSettings()
    source, out = open_store(source_uri), open_store(out_uri)
    _check_apart(source, out)
    entries = listing(source)
    published = read_manifest(out)
    origin = {"listing": fingerprint(entries, settings), "settings": contract.digest(settings)}
    if published is not None and (finished := _finished(out, published, origin)):
        if not dry_run:
            _sweep(out, published)
        return finished
    cache = None if dry_run or published is not None else out
    workers = workers or (READERS if source.remote else num_cpus())
    with ThreadPoolExecutor(workers, "pack") as pool:
        found = list(scan(source, entries, settings, pool, cache=cache, on_progress=on_progress))
        assigned = assign(found, settings)
        left_out = {"quarantined": dict(assigned.rejected), "duplicates": dict(assigned.duplicates), "schema": 1}
        if not assigned.samples:
            if cache is not None:
                cache.write("quarantine.json", contract.dumps(left_out).encode())
            raise _none_usable(source, assigned)
        shards = layout(assigned.samples, settings.shard_bytes)
        index = index_bytes(shards)
        manifest = _manifest(source, shards, index)
        if published is not None:
            _check_same(out, published, manifest)
        for note in assigned.notes:
            log.warning("%s", note)
        if not dry_run:
            _write_shards(source, out, shards, pool, on_progress)
    if not dry_run:
        out.write(manifest.index_name, index)
        out.write("quarantine.json", contract.dumps(left_out).encode())
        out.write("origin.json", contract.dumps({**origin, "dataset": manifest.digest}).encode())
        _publish(out, manifest)
    notes = tuple(assigned.notes)
    return _report(published or manifest, left_out, notes=notes, existed=published is not None)


def _finished(out: Store, published: Manifest, origin: Mapping[str, str]) -> PackReport | None:
    """The report of a dataset that is whole and was made from these very photos; None where that must be looked at."""
    there = {entry.key: entry.size for entry in out.list()}
    whole = all(there.get(shard.name) == shard.size for shard in published.shards) and published.index_name in there
    left_out = _read_json(out, "quarantine.json")
    if not whole or not left_out or _read_json(out, "origin.json") != {**origin, "dataset": published.digest}:
        return None
    return _report(published, left_out, notes=(), existed=True)


def _manifest(source: Store, shards: Sequence[Shard], index: bytes) -> Manifest:
    samples = [sample for shard in shards for sample, _, _ in shard.members]
    lines = sorted(f"{s.photo.sha256} {s.split} {s.label}\n" for s in samples)
    return Manifest(
        shards=tuple(shard.info for shard in shards),
        counts={split: sum(s.split == split for s in samples) for split in SPLITS},
        source=source.uri,
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _write_shards(
    source: Store, out: Store, shards: Sequence[Shard], pool: Executor, on_progress: OnProgress | None
) -> None:
    """Write the shards that are not there yet, one in memory at a time."""
    there = {entry.key: entry.size for entry in out.list()}
    missing = [shard for shard in shards if there.get(shard.info.name) != shard.info.size]
    check_free(out.uri, sum(shard.info.size for shard in missing) + (1 << 20), "the dataset")
    total = sum(shard.info.samples for shard in shards)
    done = total - sum(shard.info.samples for shard in missing)

    def photo_done() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress("packing", done, total)

    for shard in missing:
        try:
            out.write(shard.info.name, build(shard, source, pool, photo_done))
        except IntegrityError:  # what was kept of the scan is no longer true
            for entry in out.list("scan/"):
                out.delete(entry.key)
            raise


def _publish(out: Store, manifest: Manifest) -> None:
    """From here on the dataset exists. Of two runs at once one is first; equal content is no conflict."""
    try:
        out.write("manifest.json", contract.dumps(manifest).encode(), if_absent=True)
    except ConflictError:
        published = read_manifest(out)
        if published is None:
            raise
        _check_same(out, published, manifest)
        manifest = published
    _sweep(out, manifest)


def _check_same(out: Store, published: Manifest, manifest: Manifest) -> None:
    if published.digest != manifest.digest:
        rule = "holds a dataset of other photos, splits or labels"
        raise ConflictError("out", out.uri, rule, "give a new place for this one")
    if published.shards != manifest.shards:
        rule = "holds these photos in shards of another size"
        raise ConflictError("out", out.uri, rule, "give a new place, or use it as it is")


def _check_apart(source: Store, out: Store) -> None:
    if f"{out.uri}/".startswith(f"{source.uri}/") or f"{source.uri}/".startswith(f"{out.uri}/"):
        raise ConfigError("out", out.uri, f"must lie outside the photos ({source.uri})", "give another place")


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a dataset, None where there is no (whole) one."""
    try:
        return contract.loads(Manifest, store.read("manifest.json"), join(store.uri, "manifest.json"))
    except MissingError as error:
        if error.field == "bucket":
            raise
        return None


def _read_json(out: Store, name: str) -> Any:
    try:
        return json.loads(out.read(name))
    except (MissingError, ValueError):
        return None


def _sweep(out: Store, manifest: Manifest) -> None:
    """Remove what earlier, unfinished runs left in a dataset that is now complete."""
    ours = re.compile(r"scan/.*|(train|validation|test)-\d{6,}-[0-9a-f]{16}\.tar|index-[0-9a-f]{16}\.parquet")
    keep = {shard.name for shard in manifest.shards} | {manifest.index_name}
    try:
        for entry in out.list():
            if ours.fullmatch(entry.key) and entry.key not in keep:
                out.delete(entry.key)
        out.sweep()
    except RayscaleError as error:  # the dataset is whole without it; many may write but not delete
        log.warning("leftovers of packing stay under %s: %s", out.uri, error)


def _report(manifest: Manifest, left_out: Mapping[str, Any], *, notes: tuple[str, ...], existed: bool) -> PackReport:
    pairs = {name: tuple(left_out[name].items()) for name in ("quarantined", "duplicates")}
    return PackReport(manifest=manifest, **pairs, notes=notes, existed=existed)


def _none_usable(source: Store, assigned: Assigned) -> ImageError:
    key, reason = assigned.rejected[0]
    rule = f"none of its {len(assigned.rejected)} files is a usable photo (the first, {key}: {reason})"
    return ImageError("source", source.uri, rule, "see quarantine.json, --min-side and the formats")


# ----------------------------------------------------------------------------------------------------- reading


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
        wanted = np.asarray(indices, np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise IndexError(f"photo {outside[0]} of {len(self)}")
        index, store = self._index, open_store(self.uri)
        runs = list(plan_reads(np.unique(wanted), index.shard, index.offset, index.size))
        work = functools.partial(_read_run, store, index)
        parts = _readers(os.getpid()).map(work, runs) if store.remote and len(runs) > 1 else map(work, runs)
        found = {row: data for part in parts for row, data in part}
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


def _read_run(store: Store, index: _Index, run: Sequence[int]) -> list[tuple[int, bytes]]:
    first, last = run[0], run[-1]
    shard, start = index.shards[index.shard[first]], int(index.offset[first])
    data = store.read(shard, start=start, length=int(index.offset[last] + index.size[last]) - start)
    found = []
    for row in run:
        at, size = int(index.offset[row]), int(index.size[row])
        photo = data[at - start : at - start + size]
        for _ in range(TRIES - 1):
            if _matches(photo, index, row):
                break
            log.warning("%s/%s: bytes at %d are not what the index says; reading again", store.uri, shard, at)
            photo = store.read(shard, start=at, length=size)
        if not _matches(photo, index, row):
            rule = f"photo {_Keys(index.sha256)[row]} at byte {at} is not what its sha256 says, read {TRIES} times"
            raise IntegrityError("shard", join(store.uri, shard), rule, "restore the file, or pack the photos again")
        found.append((row, photo))
    return found


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
    classes = tuple(
        sorted(
            set(
                pq.read_table(pa.BufferReader(data), columns=["label"], use_threads=False)["label"].unique().to_pylist()
            )
        )
    )
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
