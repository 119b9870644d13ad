"""Photos -> a dataset; published last, equal input gives equal bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayscale import contract
from rayscale.data.layout import Shard, build, index_bytes, layout
from rayscale.data.manifest import SPLITS, Manifest, read_manifest
from rayscale.data.scan import Assigned, OnProgress, PackSettings, assign, fingerprint, listing, num_cpus, scan
from rayscale.errors import ConfigError, ConflictError, ImageError, IntegrityError, MissingError, RayscaleError
from rayscale.observe import log
from rayscale.storage import Store, check_free, open_store

READERS = 16  # photos read at once, where the store is remote


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did."""

    manifest: Manifest
    quarantined: tuple[tuple[str, str], ...]  # (key, reason)
    duplicates: tuple[tuple[str, str], ...]  # (key left out, key of the equal photo that was kept)
    notes: tuple[str, ...] = ()  # about the splits, for a person
    existed: bool = False  # it was complete before


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
