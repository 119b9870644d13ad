"""Photos -> a dataset; published last, equal input gives equal bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rayscale import contract
from rayscale.data.assign import Assigned, assign
from rayscale.data.labels import read_labels
from rayscale.data.layout import Shard, index_bytes, layout, write_shard
from rayscale.data.manifest import SPLITS, Manifest, read_manifest
from rayscale.data.parallel import Mapper, local
from rayscale.data.scan import OnProgress, PackSettings, fingerprint, scan
from rayscale.data.source import Item, listing
from rayscale.errors import ConfigError, ConflictError, ImageError, IntegrityError, MissingError, RayscaleError
from rayscale.observe import log
from rayscale.storage import NAME_CHARS, Store, check_free, open_store, overlap


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did."""

    manifest: Manifest
    quarantined: tuple[tuple[str, str], ...]  # (key, reason)
    duplicates: tuple[tuple[str, str], ...]  # (key left out, key of the equal photo that was kept)
    near: tuple[tuple[str, ...], ...]  # keys that look alike and so share a split
    unlabelled: tuple[str, ...]  # keys that the table of labels does not know
    notes: tuple[str, ...] = ()  # about the splits, for a person
    existed: bool = False  # it was complete before


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A whole dataset before a shard of it is written."""

    shards: list[Shard]
    index: bytes
    manifest: Manifest
    left_out: Mapping[str, Any]  # what quarantine.json says
    notes: tuple[str, ...]


def pack(
    source_uri: str,
    out_uri: str,
    settings: PackSettings | None = None,
    *,
    mapper: Mapper | None = None,
    on_progress: OnProgress | None = None,
    dry_run: bool = False,
) -> PackReport:
    """Pack all photos under `source_uri` into a dataset at `out_uri`; a run that was killed goes on where it was.

    Equal photos and settings give equal bytes, whatever the order of listing or the mapper (by default all CPUs of
    this machine). Memory: about 1 KB a photo here; one shard or one decoded photo in each worker. dry_run writes
    nothing.

    Raises: MissingError (no photos), ImageError (none usable), ConflictError (another dataset is there already),
    ResourceError (disk), ConfigError (settings, credentials, labels), UnavailableError.
    """
    settings, mapper = settings or PackSettings(), mapper or local()
    source, out = open_store(source_uri), open_store(out_uri)
    _check_apart(source, out)
    items, origin = look_up(source, settings, mapper)
    published = read_manifest(out)
    if published is not None and (finished := _finished(out, published, origin)):
        if not dry_run:
            _sweep(out, published)
        return finished
    cache = None if dry_run or published is not None else out
    planned = plan(source, items, settings, mapper, cache=cache, on_progress=on_progress)
    if published is not None:
        _check_same(out, published, planned.manifest)
    for note in planned.notes:
        log.warning("%s", note)
    if not dry_run:
        _write_shards(source, out, planned.shards, mapper, on_progress)
        out.write(planned.manifest.index_name, planned.index)
        out.write("quarantine.json", contract.dumps(planned.left_out).encode())
        out.write("origin.json", contract.dumps({**origin, "dataset": planned.manifest.digest}).encode())
        _publish(out, planned.manifest)
    manifest = published or planned.manifest
    return _report(manifest, planned.left_out, notes=planned.notes, existed=published is not None)


def look_up(source: Store, settings: PackSettings, mapper: Mapper) -> tuple[list[Item], dict[str, Any]]:
    """What there is to pack, and all by which a later run knows that it is the same: what origin.json says."""
    items = listing(source, mapper, settings.label_column)
    origin: dict[str, Any] = {"listing": fingerprint(items, settings), "settings": contract.to_json(settings)}
    if settings.labels:
        _, table = read_labels(settings.labels, settings.label_column, settings.key_column)
        origin["labels"] = hashlib.sha256(table).hexdigest()
    return items, origin


def plan(
    source: Store,
    items: Sequence[Item],
    settings: PackSettings,
    mapper: Mapper,
    *,
    cache: Store | None = None,
    on_progress: OnProgress | None = None,
) -> Planned:
    """Scan the items and lay the dataset out. Raises: ImageError where none is usable (quarantine.json says why)."""
    table = None
    if settings.labels:
        table, _ = read_labels(settings.labels, settings.label_column, settings.key_column)
    found = list(scan(source, items, settings, mapper, cache=cache, on_progress=on_progress))
    assigned = assign(found, settings, table, {item.key: item.label for item in items if item.label})
    left_out = {
        "quarantined": dict(assigned.rejected),
        "duplicates": dict(assigned.duplicates),
        "near_duplicates": assigned.near,
        "unlabelled": assigned.unlabelled,
        "schema": 1,
    }
    if not assigned.samples:
        if cache is not None:
            cache.write("quarantine.json", contract.dumps(left_out).encode())
        raise _none_usable(source, assigned)
    shards = layout(assigned.samples, settings.shard_bytes)
    index = index_bytes(shards)
    return Planned(
        shards=shards,
        index=index,
        manifest=make_manifest(source.uri, shards, index),
        left_out=left_out,
        notes=tuple(assigned.notes),
    )


def _finished(out: Store, published: Manifest, origin: Mapping[str, Any]) -> PackReport | None:
    """The report of a dataset that is whole and was made from these very photos; None where that must be looked at."""
    there = {entry.key: entry.size for entry in out.list()}
    whole = all(there.get(shard.name) == shard.size for shard in published.shards) and published.index_name in there
    left_out = _read_json(out, "quarantine.json")
    if not whole or not left_out or _read_json(out, "origin.json") != {**origin, "dataset": published.digest}:
        return None
    return _report(published, left_out, notes=(), existed=True)


def make_manifest(source_uri: str, shards: Sequence[Shard], index: bytes, parent: str = "") -> Manifest:
    """The manifest of these shards."""
    samples = [member.sample for shard in shards for member in shard.members]
    lines = sorted(f"{s.photo.sha256} {s.split} {s.label}\n" for s in samples)
    return Manifest(
        shards=tuple(shard.info for shard in shards),
        counts={split: sum(s.split == split for s in samples) for split in SPLITS},
        source=source_uri,
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        parent=parent,
    )


def _write_shards(
    source: Store, out: Store, shards: Sequence[Shard], mapper: Mapper, on_progress: OnProgress | None
) -> None:
    """Write the shards that are not there yet, each by one worker."""
    missing = _missing(out, shards)
    check_free(out.uri, sum(shard.info.size for shard in missing) + (1 << 20), "the dataset")
    total = sum(shard.info.samples for shard in shards)
    done = total - sum(shard.info.samples for shard in missing)
    if on_progress is not None and missing:
        on_progress("packing", done, total)
    try:
        for shard, _ in zip(missing, mapper(partial(write_shard, source, out), missing), strict=True):
            done += shard.info.samples
            if on_progress is not None:
                on_progress("packing", done, total)
    except IntegrityError:  # what was kept of the scan is no longer true
        for entry in out.list("scan/"):
            if _SCANNED.fullmatch(entry.key):
                out.delete(entry.key)
        raise
    if (lost := _missing(out, shards)) and read_manifest(out) is None:  # else another run was first, and removed them
        rule = f"was written by a worker, and {out.uri} does not hold it"
        raise MissingError("shard", lost[0].info.name, rule, "give a folder that all nodes share, or s3://")


def _missing(out: Store, shards: Sequence[Shard]) -> list[Shard]:
    there = {entry.key: entry.size for entry in out.list()}
    return [shard for shard in shards if there.get(shard.info.name) != shard.info.size]


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
    if overlap(source, out):
        raise ConfigError("out", out.uri, f"must lie outside the photos ({source.uri})", "give another place")


def _read_json(out: Store, name: str) -> Any:
    try:
        return json.loads(out.read(name))
    except (MissingError, ValueError):
        return None


def _sweep(out: Store, manifest: Manifest) -> None:
    try:
        sweep(out, manifest)
    except RayscaleError as error:  # the dataset is whole without it; many may write but not delete
        log.warning("leftovers of packing stay under %s: %s", out.uri, error)


def sweep(out: Store, manifest: Manifest) -> int:
    """Remove what is ours and not of this dataset, as earlier runs left it; how many shards that were."""
    keep, shards = {shard.name for shard in manifest.shards} | {manifest.index_name}, 0
    for entry in out.list():
        if (_PUBLISHED.fullmatch(entry.key) or _SCANNED.fullmatch(entry.key)) and entry.key not in keep:
            out.delete(entry.key)
            shards += entry.key.endswith(".tar")
    out.sweep("", _WRITTEN)
    out.sweep("scan", _SCANNING)
    return shards


# Exact, as all else in the place may be the user's.
_PUBLISHED = re.compile(r"(train|validation|test)-\d{6,}-[0-9a-f]{16}\.tar|index-[0-9a-f]{16}\.parquet")
_SCANNED = re.compile(r"scan/[0-9a-f]{64}\.json")
_WRITTEN = re.compile(rf"{_PUBLISHED.pattern}|(manifest|quarantine|origin)\.json")
_SCANNING = re.compile(rf"[0-9a-f]{{{NAME_CHARS}}}")  # the digest in a name is longer than what is kept of it


def _report(manifest: Manifest, left_out: Mapping[str, Any], *, notes: tuple[str, ...], existed: bool) -> PackReport:
    return PackReport(
        manifest=manifest,
        quarantined=tuple(left_out["quarantined"].items()),
        duplicates=tuple(left_out["duplicates"].items()),
        near=tuple(map(tuple, left_out["near_duplicates"])),
        unlabelled=tuple(left_out["unlabelled"]),
        notes=notes,
        existed=existed,
    )


def _none_usable(source: Store, assigned: Assigned) -> ImageError:
    key, reason = assigned.rejected[0]
    rule = f"none of its {len(assigned.rejected)} files is a usable photo (the first, {key}: {reason})"
    return ImageError("source", source.uri, rule, "see quarantine.json, --min-side and the formats")
