"""How samples lie in shards: pure arithmetic, then the bytes of a tar file and of the index."""

from __future__ import annotations

import hashlib
import itertools
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rayscale.data.manifest import KEY_CHARS, SCHEMA, TRIES, ShardInfo
from rayscale.data.scan import Sample
from rayscale.errors import IntegrityError
from rayscale.storage import Store

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "tiff": "tiff", "bmp": "bmp", "ppm": "ppm"}
BLOCK = 512  # bytes, of tar; two empty ones end it


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
    groups: list[list[Member]] = []
    end = shard_bytes  # of the last group's members, bytes
    for sample in samples:
        length = BLOCK + -(-sample.photo.size // BLOCK) * BLOCK
        if not groups or groups[-1][0].sample.split != sample.split or end + length + 2 * BLOCK > shard_bytes:
            groups.append([])
            end = 0
        name = f"{sample.photo.sha256[:KEY_CHARS]}.{EXTENSIONS[sample.photo.format]}"
        groups[-1].append(Member(sample, name, end + BLOCK))
        end += length
    numbers: Counter[str] = Counter()
    shards = []
    for members in groups:
        split, last = members[0].sample.split, members[-1]
        content = "".join(f"{m.name} {m.sample.photo.sha256} {m.sample.photo.size}\n" for m in members)
        name = f"{split}-{numbers[split]:06d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar"
        size = last.offset + -(-last.sample.photo.size // BLOCK) * BLOCK + 2 * BLOCK
        shards.append(Shard(ShardInfo(name=name, size=size, samples=len(members)), tuple(members)))
        numbers[split] += 1
    return shards


def build(shard: Shard, source: Store, pool: Executor, on_photo: Callable[[], None]) -> bytearray:
    """The bytes of a shard, its photos read by the pool. Raises: IntegrityError for one that changed since its scan."""
    tar = bytearray(shard.info.size)

    def place(member: Member) -> None:
        photo = member.sample.photo
        header = tarfile.TarInfo(member.name)  # no owner, time 0, mode 644: nothing that differs between two runs
        header.size = photo.size
        tar[member.offset - BLOCK : member.offset] = header.tobuf(tarfile.USTAR_FORMAT)
        for _ in range(TRIES):
            data = source.read(photo.source_key)
            if hashlib.sha256(data).hexdigest() == photo.sha256:
                tar[member.offset : member.offset + len(data)] = data
                return
        rule = "is not what it was when it was scanned"
        raise IntegrityError("photo", photo.source_key, rule, "let the source rest and run again")

    for _ in pool.map(place, shard.members):
        on_photo()
    return tar


def index_bytes(shards: Iterable[Shard]) -> bytes:
    """The index as a Parquet file, one row a sample, in the order of the dataset."""
    rows = list(itertools.chain.from_iterable(((s.info.name, m) for m in s.members) for s in shards))
    photos = [member.sample.photo for _, member in rows]
    columns = {
        "key": [p.sha256[:KEY_CHARS] for p in photos],
        "shard": [name for name, _ in rows],
        "offset": [member.offset for _, member in rows],
        "label": [member.sample.label for _, member in rows],
        "sha256": [bytes.fromhex(p.sha256) for p in photos],
        "split": [member.sample.split for _, member in rows],
        **{name: [getattr(p, name) for p in photos] for name in ("size", "width", "height", "source_key")},
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, SCHEMA), sink, compression="zstd", row_group_size=1 << 16)
    return bytes(sink.getvalue())
