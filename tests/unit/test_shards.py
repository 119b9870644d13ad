"""What is read back from a dataset is what was packed: by byte range, each photo verified."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayscale import contract
from rayscale.data import shards
from rayscale.data.index import parse_index
from rayscale.data.manifest import SCHEMA, Manifest, ShardInfo
from rayscale.data.pack import pack
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split, plan_reads
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError
from rayscale.storage import Got, LocalStore

SMALL = PackSettings(shard_bytes=40_000, min_side=32, validation_fraction=0.2, test_fraction=0.2)


def photo(seed: int, side: int = 48, suffix: str = ".png") -> bytes:
    """A small encoded picture, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), np.uint8)
    return bytes(cv2.imencode(suffix, pixels)[1])


def fill(folder: Path, num: int = 24) -> dict[str, bytes]:
    """Photos of three formats under two labels and none."""
    photos = {}
    for i in range(num):
        suffix = (".png", ".jpg", ".webp")[i % 3]
        photos[("cat/", "dog/deep/", "")[i % 3 if i % 4 else 0] + f"photo.{i:02}{suffix}"] = photo(i, 48 + i, suffix)
    for key in random.Random(0).sample(sorted(photos), num):  # the order on disk is not the order of names
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(photos[key])
    return photos


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "photos"
    fill(folder)
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Keys that were read from any local store, in order."""
    seen: list[str] = []
    real = LocalStore.get

    def get(self, key, **kwargs):
        seen.append(key)
        return real(self, key, **kwargs)

    monkeypatch.setattr(LocalStore, "get", get)
    return seen


@pytest.fixture
def packed(source, tmp_path):
    """One shard a split, so that neighbours can be read together."""
    settings = PackSettings(min_side=32, validation_fraction=0.2, test_fraction=0.2)
    pack(str(source), str(tmp_path / "out"), settings)
    return tmp_path / "out"


def test_read_keeps_the_order_that_was_asked_for(packed):
    photos = open_split(str(packed), "train")
    every = photos.read(range(len(photos)))
    assert len(set(every)) == len(photos) > 8
    order = [5, 0, 7, 5, 2]
    assert photos.read(order) == photos.read(np.array(order)) == [every[i] for i in order]
    assert photos.read([]) == photos.read(np.zeros(0, np.int64)) == []
    for wrong in (-1, len(photos)):
        with pytest.raises(IndexError):
            photos.read([0, wrong])


def test_neighbours_are_read_together(packed, reads):
    photos = open_split(str(packed), "train")
    len(photos)
    reads.clear()
    photos.read(range(len(photos)))
    assert len(reads) == 1


def test_reads_are_coalesced_within_their_bounds():
    size = np.full(6, 1 << 20)
    offset = np.array([0, 1, 2, 3, 4, 5]) * (1 << 20)
    shard = np.zeros(6, np.int32)
    rows = np.array([5, 0, 1, 3])

    def plan(rows=rows, shard=shard, offset=offset, size=size, **gap) -> list[list[int]]:
        return list(plan_reads(np.asarray(rows, np.int64), shard, offset, size, **gap))

    assert plan() == [[0, 1], [3], [5]]  # a gap of one MiB is not worth reading
    assert plan(range(6)) == [[0, 1, 2, 3, 4, 5]]
    assert plan(range(6), shard=np.array([0, 0, 1, 1, 0, 0])) == [[0, 1], [4, 5], [2, 3]]
    assert plan([0, 1], offset=offset + np.array([0, 64 << 10, 0, 0, 0, 0])) == [[0, 1]]
    assert plan([0, 1], offset=offset + np.array([0, (64 << 10) + 1, 0, 0, 0, 0])) == [[0], [1]]
    assert plan([0, 1], offset=offset + np.array([0, 512 << 10, 0, 0, 0, 0]), gap_bytes=512 << 10) == [[0, 1]]
    assert plan(range(6), offset=offset * 3, size=size * 3) == [[0, 1], [2, 3], [4, 5]]  # at most 8 MiB
    assert plan([0, 1], offset=offset * 20, size=size * 20) == [[0], [1]]  # a larger photo is read alone
    assert plan([]) == []


def damage(packed: Path, row: dict[str, object]) -> None:
    with (packed / str(row["shard"])).open("r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["size"]) // 2)  # type: ignore[call-overload]
        byte = tar.read(1)[0]
        tar.seek(-1, os.SEEK_CUR)
        tar.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_never_returned(packed, reads):
    photos = open_split(str(packed), "train")
    good = photos.read(range(len(photos)))
    index = pq.read_table(packed / photos.manifest.index_name).to_pylist()
    damage(packed, next(row for row in index if row["key"] == photos.keys[3]))
    reads.clear()
    told = f"photo {photos.keys[3]} at byte .* read 5 times, and the file was overwritten meanwhile"
    with pytest.raises(IntegrityError, match=told) as caught:
        photos.read(range(len(photos)))
    assert str(packed / photos._index.shards[0]) in str(caught.value)
    assert len(reads) == 6  # the first found another file than before
    others = [i for i in range(len(photos)) if i != 3]
    assert photos.read(others) == [good[i] for i in others]


def test_a_bit_that_flipped_on_the_way_is_read_again(packed, monkeypatch):
    photos = open_split(str(packed), "train")
    good = photos.read(range(len(photos)))
    left, real = [2], LocalStore.get

    def get(self, key, **kwargs):
        got = real(self, key, **kwargs)
        data = bytearray(got.data)
        if left[0]:
            left[0] -= 1
            data[len(data) // 2] ^= 1
            del data[-1:]  # and cut short
        return Got(bytes(data), got.etag)

    monkeypatch.setattr(LocalStore, "get", get)
    assert photos.read([4]) == [good[4]]
    assert left == [0]


def test_a_split_travels_as_three_strings_and_loads_once(packed, reads):
    photos = open_split(str(packed), "train")
    expected = photos.read([1])
    sent = pickle.dumps(photos)
    assert len(sent) < 400
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.loads(bytes.fromhex(sys.argv[1])).read([1])[0])"
    done = subprocess.run([sys.executable, "-c", code, sent.hex()], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, expected[0]), done.stderr.decode()
    reads.clear()
    again = pickle.loads(sent)
    assert (len(again), again.read([1])) == (len(photos), expected)
    assert [key for key in reads if not key.endswith(".tar")] == []


def test_a_dataset_that_was_replaced_or_damaged_is_refused(packed, source):
    sent = pickle.dumps(open_split(str(packed), "train"))
    index = packed / open_split(str(packed), "train").manifest.index_name
    whole = index.read_bytes()
    index.write_bytes(whole[:-1] + b"x")
    shards._load.cache_clear()
    with pytest.raises(IntegrityError, match="index="):
        len(pickle.loads(sent))
    index.write_bytes(whole)
    assert len(pickle.loads(sent)) > 0
    shutil.rmtree(packed)
    (source / "new.png").write_bytes(photo(77))
    pack(str(source), str(packed), SMALL)
    shards._load.cache_clear()
    with pytest.raises(ConflictError, match="is no longer the dataset"):
        len(pickle.loads(sent))


def test_open_split_refuses_what_is_no_dataset(packed, tmp_path):
    with pytest.raises(MissingError, match="rayscale ingest"):
        open_split(str(tmp_path / "none"), "train")
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        open_split(str(packed), "valid")
    newer = json.loads((packed / "manifest.json").read_text()) | {"schema": 99}
    (packed / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(ConfigError, match="upgrade rayscale"):
        open_split(str(packed), "train")


def test_an_empty_split_is_open_and_empty(source, tmp_path):
    pack(str(source), str(tmp_path / "out"), PackSettings(min_side=32, test_fraction=0))
    photos = open_split(str(tmp_path / "out"), "test")
    assert (len(photos), list(photos.keys), photos.labels.tolist(), photos.read([])) == (0, [], [], [])


def million(folder: Path) -> None:
    """Manifest and index of a million photos, laid out as packing does, 1 in 16 of them for tests."""
    num, rng = 1_000_000, np.random.default_rng(0)
    names = [f"{'train' if i else 'test'}-{i:06d}-{i:016x}.tar" for i in range(16)]
    fixed = {"source_key": "", "key": "", "format": "jpeg", "group": "", "box": ""}
    with pq.ParquetWriter(folder / "index", SCHEMA, compression="zstd") as writer:
        for i, name in enumerate(names):
            rows = num // len(names)
            size = pa.array(rng.integers(1000, 60_000, rows))
            digest = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), rows, [None, pa.py_buffer(rng.bytes(32 * rows))]
            )
            strings = {**fixed, "shard": name, "label": f"class {(7 * i) % 16:02}", "split": name.partition("-")[0]}
            columns = {key: pa.repeat(value, rows) for key, value in strings.items()} | {"sha256": digest}
            columns |= {key: size.cast(SCHEMA.field(key).type) for key in ("offset", "size", "width", "height")}
            writer.write_table(pa.table([columns[key] for key in SCHEMA.names], SCHEMA))
    data = (folder / "index").read_bytes()
    manifest = Manifest(
        shards=tuple(ShardInfo(name=name, size=1, samples=num // 16) for name in names),
        counts={"train": num - num // 16, "validation": 0, "test": num // 16},
        source="",
        digest="0" * 64,
        index_sha256=hashlib.sha256(data).hexdigest(),
    )
    (folder / "index").rename(folder / manifest.index_name)
    (folder / "manifest.json").write_text(contract.dumps(manifest))


OPENED = """
import json, sys, time
from pathlib import Path
from rayscale.data.shards import open_split
def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, began = memory("VmRSS"), time.process_time()
photos = open_split(sys.argv[1], sys.argv[2])
found = [len(photos), len(photos.manifest.shards), photos.classes[0], photos._index.label[[0, -1]].tolist()]
cpu_s = time.process_time() - began
after, peak = memory("VmRSS") - before, memory("VmHWM") - before
print(json.dumps({"found": found, "after": after, "peak": peak, "cpu_s": cpu_s}))
"""


def test_a_million_photos_cost_a_process_less_than_100_mb_and_a_second(tmp_path):
    """Wanted of a quiet machine: 80 MB, 100 at the peak, 0.5 s. The bounds leave room for a busy one."""
    million(tmp_path)
    told = {}
    for split in ("train", "test"):
        done = python(OPENED, tmp_path, split)
        assert done.returncode == 0, done.stderr
        told[split] = json.loads(done.stdout)
        print(split, told[split])
    assert told["train"]["found"] == [937_500, 16, "class 00", [7, 9]]
    assert told["test"]["found"] == [62_500, 16, "class 00", [0, 0]]
    assert told["train"]["after"] < 100e6
    assert told["train"]["peak"] < 130e6
    assert told["train"]["cpu_s"] < 1.0
    assert told["test"]["after"] < 0.5 * told["train"]["after"]  # negative control: the photos are what is measured


@pytest.mark.parametrize("wrong", ["counts", "shards"])
def test_an_index_that_the_manifest_does_not_mean_is_refused(packed, wrong):
    photos = open_split(str(packed), "train")
    manifest, path = photos.manifest, packed / photos.manifest.index_name
    other = {"counts": {**manifest.counts, "train": len(photos) + 1}, "shards": manifest.shards[1:]}
    assert len(parse_index(manifest, path, "train").size) == len(photos)
    with pytest.raises(IntegrityError, match="the manifest says"):
        parse_index(replace(manifest, **{wrong: other[wrong]}), path, "train")
