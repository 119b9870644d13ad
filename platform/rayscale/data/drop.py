"""A dataset without some of its photos: their bytes are not in it, and its manifest names the one it came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from rayscale import contract
from rayscale.data.layout import Shard, index_bytes, make_shard, put_shard, read_index
from rayscale.data.manifest import KEY_CHARS, TRIES, Manifest, read_manifest
from rayscale.data.pack import make_manifest, sweep
from rayscale.data.parallel import Mapper, local
from rayscale.data.scan import OnProgress, Photo
from rayscale.data.verify import open_dataset
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError
from rayscale.storage import Store, join, open_store, overlap


class Dropped(NamedTuple):
    """What `drop` did."""

    manifest: Manifest  # of the dataset without them
    names: list[str]  # photos and tiles that are gone
    unknown: list[str]  # what was asked for and is not in the dataset
    shards: int  # that were written anew


def drop(
    uri: str,
    unwanted: Collection[str],
    out_uri: str | None,
    *,
    mapper: Mapper | None = None,
    on_progress: OnProgress | None = None,
) -> Dropped:
    """Leave out the photos with these keys or source keys (a photo's name stands for all of its tiles).

    A duplicate that packing left out stands for the equal photo that was kept: its bytes are what must go.
    Shards that hold one are written anew without it. With an `out_uri` this makes a second dataset there, the first
    stays; with None the dataset itself changes: its old shards are deleted, and runs on it are refused from then on.

    Raises: MissingError (no dataset, none of the photos), ConfigError (none would be left), ConflictError (another
    dataset is at out_uri), IntegrityError (a photo that stays is damaged: repair first).
    """
    store, manifest = open_dataset(uri)
    out = store if out_uri is None else open_store(out_uri)
    if out_uri is not None and overlap(out, store):
        raise ConfigError("out", out.uri, f"must lie outside of {store.uri}", "give a new place, or --rewrite")
    swept = sweep(store, manifest) if out_uri is None else 0  # of a run that was killed before it had deleted all
    shards = read_index(store, manifest)
    photos = [member.sample.photo for shard in shards for member in shard.members]
    told: dict[str, Any] = json.loads(store.read("quarantine.json"))
    copies, wanted = _copies(told), set(unwanted)
    gone = {p.sha256 for p in photos if wanted.intersection(_keys(p, copies))}
    unknown = sorted(wanted.difference(*(_keys(p, copies) for p in photos if p.sha256 in gone)))
    if out_uri is None and (now := _left_out(told, photos)) != told:  # by a run that was killed before it wrote this
        store.write("quarantine.json", contract.dumps(now).encode())
    if not gone and swept:
        return Dropped(manifest, [], unknown, 0)
    if not gone:
        raise MissingError("key", unknown[0] if unknown else "(none)", f"is not in {store.uri}", "see its index")
    if len(gone) == len(photos):
        raise ConfigError("key", f"{len(gone)} photos", "leave nothing in the dataset", "delete the folder instead")
    pairs = [(shard, kept) for shard in shards if (kept := _without(shard, gone)) is not None]
    index = index_bytes([kept for _, kept in pairs])
    made = make_manifest(manifest.source, [kept for _, kept in pairs], index, parent=manifest.digest)
    there = None if out_uri is None else read_manifest(out)
    if there is not None and there != made:
        raise ConflictError("out", out.uri, "holds another dataset", "give a new place")
    _copy(store, out, pairs, mapper or local(), on_progress)
    out.write(made.index_name, index)
    names = sorted(p.name for p in photos if p.sha256 in gone)
    left_out = contract.dumps(_left_out(told, [p for p in photos if p.sha256 not in gone])).encode()
    if out_uri is None:
        out.delete("origin.json")  # it is no longer what packing makes of the source
    else:
        out.write("quarantine.json", left_out)
    out.write("manifest.json", contract.dumps(made).encode())
    if out_uri is None:  # not before: killed in between, the same names could not be resolved again
        out.write("quarantine.json", left_out)
    sweep(out, made)
    return Dropped(made, names, unknown, sum(shard != kept for shard, kept in pairs))


def _copies(told: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of a photo -> those of the equal ones that were left out; of a tile its whole photo's too."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, kept in told.get("duplicates", {}).items():
        found[kept] += [name, _BOX.sub("", name)]
    return found


_BOX = re.compile(r"\[\d+,\d+,\d+,\d+\]\Z")  # what `Photo.name` adds for a tile


def _keys(photo: Photo, copies: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """All that a photo may be called by."""
    return photo.sha256[:KEY_CHARS], photo.sha256, photo.source_key, photo.name, *copies.get(photo.name, ())


def _without(shard: Shard, gone: Collection[str]) -> Shard | None:
    """The same shard where it holds none of them, None where nothing is left of it."""
    samples = [member.sample for member in shard.members if member.sample.photo.sha256 not in gone]
    if len(samples) == len(shard.members):
        return shard
    return make_shard(shard.info.name.rpartition("-")[0], samples) if samples else None


def _copy(
    store: Store, out: Store, pairs: Sequence[tuple[Shard, Shard]], mapper: Mapper, on_progress: OnProgress | None
) -> None:
    there = {entry.key: entry.size for entry in out.list()}
    missing = [pair for pair in pairs if there.get(pair[1].info.name) != pair[1].info.size]
    done, total, told = 0, sum(kept.info.samples for _, kept in missing), on_progress or (lambda *_: None)
    told("rewriting", 0, total)
    for (_, kept), _ in zip(missing, mapper(partial(_copy_shard, store, out), missing), strict=True):
        done += kept.info.samples
        told("rewriting", done, total)


def _copy_shard(store: Store, out: Store, pair: tuple[Shard, Shard]) -> None:
    old, new = pair
    put_shard(out, new, _photos(store, old, {member.sample.photo.sha256 for member in new.members}))


def _photos(store: Store, shard: Shard, wanted: Collection[str]) -> Iterator[bytes]:
    """Bytes of a shard's photos, each verified."""
    data = store.read(shard.info.name)
    for member in shard.members:
        photo = member.sample.photo
        if photo.sha256 not in wanted:
            continue
        found = data[member.offset : member.offset + photo.size]
        for _ in range(TRIES):
            if hashlib.sha256(found).hexdigest() == photo.sha256:
                break
            found = store.read(shard.info.name, start=member.offset, length=photo.size)
        else:
            place, rule = join(store.uri, shard.info.name), f"photo {photo.sha256[:KEY_CHARS]} is damaged"
            raise IntegrityError("shard", place, rule, "run `rayscale data repair` first")
        yield found


def _left_out(told: Mapping[str, Any], photos: Sequence[Photo]) -> dict[str, Any]:
    """What quarantine.json says of a dataset of these photos: without the names of others, and of their copies."""
    names, sources = {p.name for p in photos}, {p.source_key for p in photos}
    copies = {name: kept for name, kept in told.get("duplicates", {}).items() if kept in names}
    near = [[name for name in group if name in sources] for group in told.get("near_duplicates", [])]
    return {
        **told,
        "duplicates": copies,
        "near_duplicates": [group for group in near if len(group) > 1],
        "unlabelled": [name for name in told.get("unlabelled", []) if name in names or name in copies],
    }
