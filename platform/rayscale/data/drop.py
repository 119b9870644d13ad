"""A dataset without some of its photos: their bytes are not in it, and its manifest names the one it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
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
from rayscale.storage import Store, join, open_store


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

    Shards that hold one are written anew without it. With an `out_uri` this makes a second dataset there, the first
    stays; with None the dataset itself changes: its old shards are deleted, and runs on it are refused from then on.

    Raises: MissingError (no dataset, none of the photos), ConfigError (none would be left), ConflictError (another
    dataset is at out_uri), IntegrityError (a photo that stays is damaged: repair first).
    """
    store, manifest = open_dataset(uri)
    out = store if out_uri is None else open_store(out_uri)
    if out_uri is not None and f"{out.uri}/".startswith(f"{store.uri}/"):
        raise ConfigError("out", out.uri, f"must lie outside of {store.uri}", "give a new place, or --rewrite")
    swept = sweep(store, manifest) if out_uri is None else 0  # of a run that was killed before it had deleted all
    shards = read_index(store, manifest)
    photos = [member.sample.photo for shard in shards for member in shard.members]
    wanted = set(unwanted)
    gone = {p.sha256 for p in photos if wanted.intersection(_keys(p))}
    unknown = sorted(wanted.difference(*(_keys(p) for p in photos if p.sha256 in gone)))
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
    out.write("quarantine.json", contract.dumps(_left_out(store, photos, gone)).encode())
    out.delete("origin.json")  # it is no longer what packing makes of the source
    out.write("manifest.json", contract.dumps(made).encode())
    sweep(out, made)
    return Dropped(made, names, unknown, sum(shard != kept for shard, kept in pairs))


def _keys(photo: Photo) -> tuple[str, ...]:
    """All that a photo may be called by."""
    return photo.sha256[:KEY_CHARS], photo.sha256, photo.source_key, photo.name


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


def _left_out(store: Store, photos: Sequence[Photo], gone: Collection[str]) -> dict[str, Any]:
    """quarantine.json without the names of what is gone, and of its copies."""
    names = {name for p in photos if p.sha256 in gone for name in (p.name, p.source_key)}
    left_out: dict[str, Any] = json.loads(store.read("quarantine.json"))
    left_out["duplicates"] = {k: v for k, v in left_out.get("duplicates", {}).items() if v not in names}
    left_out["near_duplicates"] = [
        kept for group in left_out.get("near_duplicates", []) if len(kept := [n for n in group if n not in names]) > 1
    ]
    left_out["unlabelled"] = [name for name in left_out.get("unlabelled", []) if name not in names]
    return left_out
