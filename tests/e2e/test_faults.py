"""A dataset on S3 behind a proxy that damages 40 % of all answers: what trains is what was packed, or it is told."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest

from rayscale import storage_s3
from rayscale.data import shards
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.pack import pack
from rayscale.data.plan import DataSettings
from rayscale.data.sample import render_window
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split
from rayscale.errors import IntegrityError, UnavailableError
from rayscale.storage import join, open_store, upload_dir

SETTINGS = DataSettings(hr_crop_px=32, micro_batch=4, virtual_shards=2, window_images=8, crops=2)
SHARE = 0.4


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Photos by their sha256."""
    found = {}
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + i, 3), np.uint8)
        data = cv2.imencode(".png", pixels)[1].tobytes()
        found[hashlib.sha256(data).hexdigest()] = data
    return found


@pytest.fixture(scope="module")
def local(originals: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packed photos in a folder, about 10 a shard."""
    photos, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("packed") / "set"
    for digest, data in originals.items():
        (photos / f"{digest[:8]}.png").write_bytes(data)
    pack(str(photos), str(out), PackSettings(shard_bytes=100_000, min_side=32))
    return str(out)


@pytest.fixture
def remote(local: str, s3: str, moto: str, faults, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on S3; afterwards all ways lead through the proxy, which is still sound."""
    with monkeypatch.context() as direct:
        direct.setenv("AWS_ENDPOINT_URL", moto)
        upload_dir(local, join(s3, "packed"))
    shards._load.cache_clear()
    return join(s3, "packed")


def chain(photos: Mixture, windows: int) -> str:
    """SHA-256 over every block of the first windows, in order."""
    plan, total = photos.plan(SETTINGS), hashlib.sha256()
    for w in range(windows):
        for v in range(SETTINGS.virtual_shards):
            for batch in render_window(photos, plan, w, v, 0, plan.rows):
                assert batch.damaged == ()
                assert batch.sha256 == batch.checksum()
                total.update(batch.sha256)
    return total.hexdigest()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 9))])
def test_nothing_damaged_is_delivered(originals, local, remote, faults, seed):
    faults.share, faults.seed = SHARE, seed
    photos = open_split(remote, "train")
    order = np.random.default_rng(seed)
    for _ in range(16):
        wanted = order.permutation(len(photos))[: len(photos) // 8]
        for i, data in zip(wanted.tolist(), photos.read(wanted), strict=True):
            digest = hashlib.sha256(data).hexdigest()
            assert digest.startswith(photos.keys[i])
            assert data == originals[digest]
    assert chain(open_mixture((remote,), "train"), 6) == chain(open_mixture((local,), "train"), 6)
    seen = Counter(kind for kind in faults.seen if kind.startswith("GET"))
    print(seen)
    assert set(seen) == {"GET", *(f"GET {kind}" for kind in faults.kinds)}  # every kind came
    assert abs(1 - seen["GET"] / seen.total() - SHARE) < 0.1


def test_who_does_not_check_is_given_corrupt_bytes(originals, remote, faults, monkeypatch):
    """Negative control: boto3 as it comes, and our own store without what a dataset knows of its photos."""
    faults.share, faults.kinds = SHARE, ("flip", "other", "page", "cut")
    index, store = open_split(remote, "train")._index, open_store(remote)
    client = boto3.client("s3")
    corrupt, failed = Counter[str](), 0
    for row in range(len(index.size)):
        shard, start, size = index.shards[index.shard[row]], int(index.offset[row]), int(index.size[row])
        bucket, _, key = join(remote, shard).removeprefix("s3://").partition("/")
        digest = bytes(index.sha256[row])
        corrupt["store"] += hashlib.sha256(store.read(shard, start=start, length=size)).digest() != digest
        try:
            reply = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + size - 1}")
            corrupt["boto3"] += hashlib.sha256(reply["Body"].read()).digest() != digest
        except Exception:
            failed += 1
    print(corrupt, failed)
    assert corrupt["store"] > 2
    assert corrupt["boto3"] > 2
    assert failed > 0


def test_manifest_and_index_come_whole_even_without_checksums_of_the_server(local, remote, s3, faults):
    """Objects that other tools uploaded have none: the manifest is compared with itself, the index with it."""
    bare = boto3.client("s3", config=boto3.session.Config(request_checksum_calculation="when_required"))
    for name in [p.name for p in Path(local).iterdir() if not p.name.endswith(".tar")]:
        bare.put_object(Bucket="photos", Key=f"set/packed/{name}", Body=Path(local, name).read_bytes())
    expected = open_split(local, "train")
    faults.share, faults.kinds = SHARE, ("flip", "cut")
    for _ in range(3):
        shards._load.cache_clear()
        photos = open_split(remote, "train")
        assert photos.manifest == expected.manifest
        assert np.array_equal(photos._index.sha256, expected._index.sha256)
    read = [open_store(remote).read("manifest.json") for _ in range(12)]
    assert len(set(read)) > 1  # negative control: read once, it is damaged now and then


def test_a_shard_that_was_overwritten_is_told_and_its_whole_photos_still_come(originals, remote, faults, caplog):
    photos = open_split(remote, "train")
    store, name = open_store(remote), photos._index.shards[0]
    mine = np.flatnonzero(photos._index.shard == 0)
    good = photos.read(mine)
    data = bytearray(store.read(name))
    first = mine[np.argmin(photos._index.offset[mine])]
    data[photos._index.offset[first] + 50] ^= 1
    store.write(name, data)
    each = photos.read_each(mine)
    assert f"{name}: was overwritten since it was first read" in caplog.text
    for row, got, before in zip(mine, each, good, strict=True):
        if row == first:
            assert isinstance(got, IntegrityError)
            assert f"{name}: photo" in str(got)
            assert "and the file was overwritten meanwhile" in str(got)
        else:
            assert got == before
    caplog.clear()
    photos.read(mine[mine != first])  # told once
    assert "overwritten" not in caplog.text


def test_an_outage_is_no_damage(remote, faults, monkeypatch):
    monkeypatch.setattr(storage_s3, "TRIES", 2)
    photos = open_split(remote, "train")
    photos.read([0])
    faults.share, faults.kinds = 1.0, ("reset",)
    with pytest.raises(UnavailableError, match="failed 2 times"):
        photos.read_each([0, 1])


def test_the_second_epoch_of_a_node_with_a_cache_asks_nobody(local, remote, faults, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSCALE_CACHE_GB", "0.1")
    monkeypatch.setenv("RAYSCALE_CACHE_DIR", str(tmp_path / "cache"))
    faults.share = SHARE
    expected = chain(open_mixture((local,), "train"), 8)
    photos = open_split(remote, "train")
    photos.read(range(len(photos)))
    faults.asked.clear()
    assert chain(open_mixture((remote,), "train"), 8) == expected
    order = random.Random(1).sample(range(len(photos)), len(photos))
    assert [hashlib.sha256(p).hexdigest()[:24] for p in photos.read(order)] == [photos.keys[i] for i in order]
    assert [what for what in faults.asked if ".tar" in what] == []
    kept = next((tmp_path / "cache").rglob(photos._index.shards[photos._index.shard[7]]))
    with kept.open("r+b") as file:  # rot on this node's disk
        file.seek(int(photos._index.offset[7]) + 100)
        file.write(b"rotten")
    faults.share = 0.0
    for asks in (1, 0):
        faults.asked.clear()
        assert hashlib.sha256(photos.read(order)[order.index(7)]).hexdigest().startswith(photos.keys[7])
        assert len([what for what in faults.asked if ".tar" in what]) == asks
    monkeypatch.setenv("RAYSCALE_CACHE_GB", "0")  # negative control
    monkeypatch.delenv("RAYSCALE_CACHE_DIR")
    photos.read(order)
    assert len([what for what in faults.asked if ".tar" in what]) > 3
