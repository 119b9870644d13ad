"""How samples lie in shards: pure arithmetic, then the bytes of a tar file and of the index."""

from __future__ import annotations

import hashlib
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayscale.data.assign import Sample
from rayscale.data.manifest import KEY_CHARS, SCHEMA, TRIES, Manifest, ShardInfo
from rayscale.data.scan import Photo
from rayscale.data.source import read, read_all
from rayscale.data.tile_photos import Box, crop
from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.imaging import Limits, decode_rgb
from rayscale.storage import LocalStore, Store, join, whole

EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "tiff": "tiff",
    "bmp": "bmp",
    "ppm": "ppm",
}
BLOCK = 512  # bytes, of tar; two empty ones end it
ROW_GROUP = 1 << 16  # rows, of one split: a reader of one split need not read the others
_UNLIMITED = Limits(max_bytes=1 << 40, max_pixels=1 << 40, max_side=1 << 30)  # it was accepted when it was scanned


class Member(NamedTuple):
    """One photo in a shard."""

    sample: Sample
    name: str
    offset: int  # of its bytes


class Shard(NamedTuple):
    """A tar file before it is written: names, sizes and offsets follow without a photo being read."""

    info: ShardInfo
    members: tuple[Member, ...]


def layout(samples: Sequence[Sample], shard_bytes: int) -> list[Shard]:
    """Cut samples, in their order, into shards of at most `shard_bytes` (or one photo), each of one split."""
    groups: list[list[Sample]] = []
    end = shard_bytes  # of the last group's members, bytes
    for sample in samples:
        length = BLOCK + -(-sample.photo.size // BLOCK) * BLOCK
        if not groups or groups[-1][0].split != sample.split or end + length + 2 * BLOCK > shard_bytes:
            groups.append([])
            end = 0
        groups[-1].append(sample)
        end += length
    numbers: Counter[str] = Counter()
    shards = []
    for group in groups:
        split = group[0].split
        shards.append(make_shard(f"{split}-{numbers[split]:06d}", group))
        numbers[split] += 1
    return shards


def make_shard(stem: str, samples: Sequence[Sample]) -> Shard:
    """These samples in one tar, named `stem` and a digest of what is in it."""
    members, end = [], 0
    for sample in samples:
        members.append(Member(sample, member_name(sample.photo), end + BLOCK))
        end += BLOCK + -(-sample.photo.size // BLOCK) * BLOCK
    content = "".join(f"{m.name} {m.sample.photo.sha256} {m.sample.photo.size}\n" for m in members)
    name = f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar"
    return Shard(ShardInfo(name=name, size=end + 2 * BLOCK, samples=len(members)), tuple(members))


def member_name(photo: Photo) -> str:
    """A photo's name in its tar: its key, then an extension for other tools."""
    return f"{photo.sha256[:KEY_CHARS]}.{EXTENSIONS[photo.format]}"


def header(member: Member) -> bytes:
    """The tar header of a member."""
    info = tarfile.TarInfo(member.name)  # no owner, time 0, mode 644: nothing that differs between two runs
    info.size = member.sample.photo.size
    return info.tobuf(tarfile.USTAR_FORMAT)


def tar_pieces(shard: Shard, photos: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a shard, piece by piece, given those of its members in order."""
    for member, data in zip(shard.members, photos, strict=True):
        yield header(member)
        yield data
        yield bytes(-len(data) % BLOCK)
    yield bytes(2 * BLOCK)


def write_shard(source: Store, out: Store, shard: Shard) -> None:
    """Read the photos of a shard and write it, whole or not at all.

    Raises: IntegrityError for a photo that is gone or changed since its scan.
    """
    put_shard(out, shard, fetch(source, [member.sample.photo for member in shard.members]))


def put_shard(out: Store, shard: Shard, photos: Iterable[bytes]) -> None:
    """Write a shard, given the bytes of its members in order; for a remote store it is held in memory."""
    pieces = tar_pieces(shard, photos)
    if not isinstance(out, LocalStore):
        out.write(shard.info.name, b"".join(pieces))
        return
    with whole(out.path(shard.info.name)) as temporary, temporary.open("wb") as file:
        file.writelines(pieces)


def fetch(source: Store, photos: Sequence[Photo]) -> Iterator[bytes]:
    """The bytes of photos and tiles in order, each verified. Raises: IntegrityError for one that is not what it was."""
    runs = [list(same) for _, same in itertools.groupby(photos, lambda photo: (photo.item, photo.whole))]
    for run, data in zip(runs, read_all(source, [run[0].item for run in runs]), strict=True):
        photo = _verified(source, run[0], data)
        if not run[0].box:
            yield photo
            continue
        pixels = decode_rgb(photo, _UNLIMITED)  # once for all tiles of a photo that lie side by side
        for tile in run:
            cut = crop(pixels, Box.parse(tile.box))
            if hashlib.sha256(cut).hexdigest() != tile.sha256:  # as an encoder of another version would make it
                raise _changed(tile)
            yield cut


def _verified(source: Store, photo: Photo, data: bytes | MissingError) -> bytes:
    """The whole photo as it was scanned; bytes that changed on the way are read again. Raises: IntegrityError.

    A local file that nobody wrote to since is not hashed a second time: that would be a tenth of writing a dataset.
    """
    if photo.stamp and photo.stamp == source.stamp(photo.item.file) and not isinstance(data, MissingError):
        return data
    for _ in range(TRIES):
        if isinstance(data, MissingError):
            break
        if hashlib.sha256(data).hexdigest() == (photo.whole or photo.sha256):
            return data
        data = read(source, photo.item)
    raise _changed(photo)


def _changed(photo: Photo) -> IntegrityError:
    rule = "is not what it was when it was scanned"
    return IntegrityError("photo", photo.name, rule, "let the source rest and run again")


# --------------------------------------------------------------------------------------------------- the index


def index_bytes(shards: Iterable[Shard]) -> bytes:
    """The index as a Parquet file, one row a sample, in the order of the dataset; a row group holds one split."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        for _, same in itertools.groupby(shards, lambda shard: shard.members[0].sample.split):
            rows = [(shard.info.name, member) for shard in same for member in shard.members]
            for start in range(0, len(rows), ROW_GROUP):
                writer.write_table(_table(rows[start : start + ROW_GROUP]))
    return bytes(sink.getvalue())


def _table(rows: Sequence[tuple[str, Member]]) -> pa.Table:
    samples = [member.sample for _, member in rows]
    photos = [sample.photo for sample in samples]
    columns: dict[str, list[Any]] = {
        "key": [p.sha256[:KEY_CHARS] for p in photos],
        "shard": [name for name, _ in rows],
        "offset": [member.offset for _, member in rows],
        "sha256": [bytes.fromhex(p.sha256) for p in photos],
        **{name: [getattr(s, name) for s in samples] for name in ("label", "split", "group")},
        **{name: [getattr(p, name) for p in photos] for name in _OF_PHOTO},
    }
    return pa.Table.from_arrays([_array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """`pa.array` without nulls; that one imports pandas (a third of a second) to ask whether it was given some."""
    if pa.types.is_integer(kind):
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, str(kind)))])
    data = [value.encode() for value in values] if pa.types.is_string(kind) else values
    buffers = [None, pa.py_buffer(b"".join(data))]
    if pa.types.is_string(kind):
        ends = np.cumsum([0, *map(len, data)], dtype=np.int64).astype(np.int32)  # of ROW_GROUP keys: far below 2 GiB
        buffers.insert(1, pa.py_buffer(ends))
    return pa.Array.from_buffers(kind, len(values), buffers)


_OF_PHOTO = ("size", "width", "height", "source_key", "format", "box")


def read_index(store: Store, manifest: Manifest) -> list[Shard]:
    """The shards of a dataset as they were laid out. A tile's `whole` and places in tars are not known here.

    Raises: MissingError, IntegrityError (not what the manifest says), ConfigError (an index without formats).
    """
    data, place = store.read(manifest.index_name), join(store.uri, manifest.index_name)
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        remedy = "restore the file, or run `rayscale data repair`"
        raise IntegrityError("index", place, "is not what the manifest says", remedy)
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    if missing := set(SCHEMA.names) - set(table.column_names):
        raise ConfigError("index", place, f"has no column {', '.join(sorted(missing))}", "pack the photos again")
    infos = {info.name: info for info in manifest.shards}
    members: dict[str, list[Member]] = {name: [] for name in infos}
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        for row in batch.to_pylist():
            sha256 = row["sha256"].hex()
            photo = Photo(sha256=sha256, **{name: row[name] for name in _OF_PHOTO})
            sample = Sample(photo, row["label"], row["split"], row["group"])
            if row["shard"] not in members:
                raise IntegrityError("index", place, f"names {row['shard']}, the manifest does not", "pack again")
            members[row["shard"]].append(Member(sample, member_name(photo), row["offset"]))
    return [Shard(info, tuple(members[name])) for name, info in infos.items()]
