"""Is a dataset what its manifest says, to the byte? And what is not, made so again from the photos it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from rayscale import contract
from rayscale.data.layout import BLOCK, Member, Shard, header, put_shard, read_index
from rayscale.data.manifest import KEY_CHARS, TRIES, Manifest, read_manifest
from rayscale.data.pack import look_up, make_manifest, plan
from rayscale.data.parallel import Mapper, local
from rayscale.data.scan import OnProgress, PackSettings, Photo
from rayscale.data.source import locate, read
from rayscale.data.tile_photos import Box, crop
from rayscale.errors import ConfigError, ImageError, IntegrityError, MissingError, UserError
from rayscale.imaging import Limits, decode_rgb
from rayscale.storage import Store, open_store


class Damage(NamedTuple):
    """Something that is not as it was packed."""

    file: str
    key: str  # of the photo, "" where it is not one photo
    problem: str


def open_dataset(uri: str) -> tuple[Store, Manifest]:
    """A dataset's place and manifest. Raises: MissingError where there is none."""
    store = open_store(uri.removesuffix("/manifest.json"))
    manifest = read_manifest(store)
    if manifest is None:
        raise MissingError("data", store.uri, "holds no manifest.json", "pack photos there with `rayscale data pack`")
    return store, manifest


def verify(uri: str, *, mapper: Mapper | None = None, on_progress: OnProgress | None = None) -> list[Damage]:
    """Every checksum of every shard, the tars around the photos, the index and the manifest; empty is sound.

    Reads all bytes; what looks damaged is read again before it is told. Raises: MissingError (no dataset),
    ConfigError (an index of an older version), UnavailableError.
    """
    store, manifest = open_dataset(uri)
    try:
        shards = read_index(store, manifest)
    except (MissingError, IntegrityError) as error:
        return [Damage(manifest.index_name, "", error.rule), *_sizes(store, manifest)]
    found = _against(manifest, shards)
    done, told = 0, on_progress or (lambda *_: None)
    told("verifying", 0, sum(manifest.counts.values()))
    for shard, damage in zip(shards, (mapper or local())(partial(check_shard, store), shards), strict=True):
        found += damage
        done += shard.info.samples
        told("verifying", done, sum(manifest.counts.values()))
    return found


def _sizes(store: Store, manifest: Manifest) -> list[Damage]:
    """What can be said without an index."""
    there = {entry.key: entry.size for entry in store.list()}
    return [_size(s.name, there.get(s.name), s.size) for s in manifest.shards if there.get(s.name) != s.size]


def _size(name: str, found: int | None, wanted: int) -> Damage:
    return Damage(name, "", "is missing" if found is None else f"is {found} bytes long instead of {wanted}")


def _against(manifest: Manifest, shards: Sequence[Shard]) -> list[Damage]:
    """Does the manifest say what follows from the index?"""
    made = make_manifest(manifest.source, shards, b"", manifest.parent)
    found = [
        Damage("manifest.json", "", f"says {name}={getattr(manifest, name)}, the index {getattr(made, name)}")
        for name in ("digest", "counts")
        if getattr(manifest, name) != getattr(made, name)
    ]
    wrong = [s.info.name for s in shards if s.info.samples != len(s.members)]
    return found + [Damage("manifest.json", "", f"has another number of photos in {name}") for name in wrong]


def check_shard(store: Store, shard: Shard) -> list[Damage]:
    """What is wrong with one shard."""
    found: list[Damage] = []
    for _ in range(TRIES):
        try:
            data = store.read(shard.info.name)
        except MissingError:
            return [_size(shard.info.name, None, shard.info.size)]
        if not (found := _compare(shard, data)):
            break
    return found


def _compare(shard: Shard, data: bytes) -> list[Damage]:
    name = shard.info.name
    found = [] if len(data) == shard.info.size else [_size(name, len(data), shard.info.size)]
    for member in shard.members:
        if not _sound(member, data):
            problem = f"bytes at {member.offset} are not what the sha256 says"
            found.append(Damage(name, member.sample.photo.sha256[:KEY_CHARS], problem))
    if not found:
        end = 0
        for member in shard.members:
            start, end = end, member.offset + member.sample.photo.size
            padded = end + -end % BLOCK
            if data[start : member.offset] != header(member) or any(data[end:padded]):
                return [Damage(name, "", f"the tar around the photo at {member.offset} is damaged")]
            end = padded
        if any(data[end:]):
            found.append(Damage(name, "", "the end of the tar is damaged"))
    return found


def _sound(member: Member, data: bytes) -> bool:
    photo = member.sample.photo
    return hashlib.sha256(data[member.offset : member.offset + photo.size]).hexdigest() == photo.sha256


# ------------------------------------------------------------------------------------------------------ repair


class Repaired(NamedTuple):
    """What `repair` did."""

    mended: list[str]  # names of files that are sound again
    left: list[Damage]  # what it could not mend


def repair(
    uri: str, source_uri: str = "", *, mapper: Mapper | None = None, on_progress: OnProgress | None = None
) -> Repaired:
    """Damaged and missing shards, or a lost index, as they were to the byte; what cannot be is left alone and told.

    Photos that are still sound come from the shard itself, the others from the source that the manifest names, or
    `source_uri` where it moved. Raises: as `verify`.
    """
    mapper = mapper or local()
    store, manifest = open_dataset(uri)
    source = open_store(source_uri or manifest.source)
    mended: list[str] = []
    try:
        shards = read_index(store, manifest)
    except (MissingError, IntegrityError) as error:
        try:
            store.write(manifest.index_name, _index_again(store, manifest, source, mapper))
        except (UserError, IntegrityError) as reason:
            return Repaired([], [Damage(manifest.index_name, "", f"{error.rule}, and {reason}")])
        mended.append(manifest.index_name)
        shards = read_index(store, manifest)
    damaged = verify(uri, mapper=mapper, on_progress=on_progress)
    bad = [shard for shard in shards if shard.info.name in {d.file for d in damaged}]
    left = [d for d in damaged if d.file == "manifest.json"]
    for shard, missing in zip(bad, mapper(partial(_mend, store, source), bad), strict=True):
        left += missing
        if not missing:
            mended.append(shard.info.name)
    return Repaired(mended, left)


def _index_again(store: Store, manifest: Manifest, source: Store, mapper: Mapper) -> bytes:
    """The index of the same photos packed with the same settings. Raises: IntegrityError where it is another one."""
    origin = json.loads(store.read("origin.json"))
    try:
        settings = contract.loads(PackSettings, json.dumps(origin["settings"]), "origin.json")
    except (KeyError, ConfigError):
        rule = "does not say how it was packed"
        raise MissingError("origin.json", store.uri, rule, "pack the photos again") from None
    items, _ = look_up(source, settings, mapper)
    index = plan(source, items, settings, mapper).index
    if hashlib.sha256(index).hexdigest() != manifest.index_sha256:
        raise IntegrityError("source", source.uri, "holds other photos by now", "name the right place with --source")
    return index


def _mend(store: Store, source: Store, shard: Shard) -> list[Damage]:
    """Write one shard anew; nothing is written where a photo cannot be had any more: those are returned."""
    try:
        data = store.read(shard.info.name)
    except MissingError:
        data = b""
    photos, missing = [], []
    for member in shard.members:
        photo = member.sample.photo
        kept = data[member.offset : member.offset + photo.size]
        found = kept if _sound(member, data) else _from_source(source, photo)
        if found is None:
            problem = f"{photo.name} in {source.uri} is gone or not what was packed"
            missing.append(Damage(shard.info.name, photo.sha256[:KEY_CHARS], problem))
        else:
            photos.append(found)
    if not missing:
        put_shard(store, shard, photos)
        missing = check_shard(store, shard)
    return missing


def _from_source(source: Store, photo: Photo) -> bytes | None:
    """A photo or tile as it was packed, None where the source has no such bytes any more."""
    item = locate(source, photo.source_key)
    for _ in range(TRIES if item is not None else 0):
        try:
            data = read(source, item)  # type: ignore[arg-type]
            if photo.box:
                data = crop(decode_rgb(data, _UNLIMITED), Box.parse(photo.box))
        except (MissingError, ImageError):
            return None
        if hashlib.sha256(data).hexdigest() == photo.sha256:
            return data
    return None


_UNLIMITED = Limits(max_bytes=1 << 40, max_pixels=1 << 40, max_side=1 << 30)  # it was accepted when it was packed
