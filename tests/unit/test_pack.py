"""Datasets: the same photos give the same bytes, nothing half-made exists, kills included."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from rayscale import storage
from rayscale.cli.data import pack as ingest
from rayscale.data import scan as scan_module
from rayscale.data.assign import Sample, assign, hash_splits
from rayscale.data.layout import fetch, layout
from rayscale.data.pack import pack as pack_anywhere
from rayscale.data.parallel import local, threads
from rayscale.data.scan import PackSettings, Photo, Rejected
from rayscale.data.shards import open_split
from rayscale.data.source import listing
from rayscale.errors import ConfigError, ConflictError, ImageError, IntegrityError, MissingError
from rayscale.imaging import Limits
from rayscale.storage import LocalStore, open_store

SMALL = PackSettings(shard_bytes=40_000, min_side=32, validation_fraction=0.2, test_fraction=0.2)

pack = functools.partial(pack_anywhere, mapper=threads(2))  # in this process, where `reads` sees it


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


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "photos"
    fill(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, hidden ones too, with its digest."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# ----------------------------------------------------------------------------------------------- what is packed


def test_what_is_read_is_what_was_given(source, tmp_path):
    given = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in source.rglob("*") if p.is_file()}
    manifest = pack(str(source), str(tmp_path / "out"), SMALL).manifest
    assert sum(manifest.counts.values()) == len(given) == 24
    seen = set()
    for split in ("train", "validation", "test"):
        photos = open_split(str(tmp_path / "out/manifest.json"), split)
        assert len(photos) == len(photos.keys) == manifest.counts[split] > 0
        for i, data in enumerate(photos.read(range(len(photos)))):
            digest = hashlib.sha256(data).hexdigest()
            seen.add(digest)
            original = given[digest]
            assert data == original.read_bytes()
            assert photos.keys[i] == digest[:24]
            height, width = cv2.imread(str(original)).shape[:2]
            assert (photos.heights[i], photos.widths[i]) == (height, width)
            label = original.relative_to(source).parts
            assert photos.labels[i] == (label[0] if len(label) > 1 else "")
        assert photos.classes == ("", "cat", "dog")
        assert photos.digest == photos.manifest.digest == manifest.digest
    assert seen == set(given)


def test_any_tar_tool_reads_the_shards_and_the_index_points_into_them(source, tmp_path):
    out = tmp_path / "out"
    manifest = pack(str(source), str(out), SMALL).manifest
    index = pq.read_table(out / manifest.index_name).to_pylist()
    assert len(manifest.shards) > 5
    rows = {(row["shard"], row["key"]): row for row in index}
    for info in manifest.shards:
        assert (out / info.name).stat().st_size == info.size
        with tarfile.open(out / info.name) as tar:
            members = tar.getmembers()
            assert len(members) == info.samples
            for member in members:
                key, extension = member.name.split(".")  # WebDataset's key ends at the first dot
                row = rows.pop((info.name, key))
                data = tar.extractfile(member).read()
                assert (row["offset"], row["size"]) == (member.offset_data, member.size)
                assert row["sha256"] == hashlib.sha256(data).digest()
                assert extension in ("png", "jpg", "webp")
                assert row["source_key"].endswith(extension)
                assert (member.mtime, member.uid, member.gname, member.mode) == (0, 0, "", 0o644)
                assert row["split"] == info.name.split("-")[0]  # a shard holds one split
    assert rows == {}
    if shutil.which("tar"):
        listed = subprocess.run(
            ["tar", "tf", out / manifest.shards[0].name], capture_output=True, text=True, check=True
        )
        assert len(listed.stdout.split()) == manifest.shards[0].samples
        assert listed.stderr == ""


def test_equal_photos_and_settings_give_equal_bytes(source, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere/photos"
    for path in sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.name[::-1]):
        (other / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, other / path.relative_to(source))
    pack(str(source), str(tmp_path / "a"), SMALL, mapper=threads(1))
    listed = LocalStore.list
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix="": reversed(list(listed(self, prefix))))
    monkeypatch.setattr(scan_module, "SCAN_CHUNK", 5)
    pack(str(other), str(tmp_path / "b"), SMALL, mapper=threads(7))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} == {
        "manifest.json",
        "origin.json",
    }  # the source's URI, its mtimes
    of_a, of_b = (json.loads((tmp_path / d / "manifest.json").read_text()) for d in "ab")
    assert of_a.pop("source") != of_b.pop("source")
    assert of_a == of_b
    (other / "cat/one more.png").write_bytes(photo(99))  # negative control
    assert pack(str(other), str(tmp_path / "c"), SMALL).manifest.digest != of_a["digest"]


def test_the_digest_is_of_the_content_not_of_the_shards(source, tmp_path):
    a = pack(str(source), str(tmp_path / "a"), SMALL).manifest
    larger = PackSettings(min_side=32, validation_fraction=0.2, test_fraction=0.2)
    b = pack(str(source), str(tmp_path / "b"), larger).manifest
    assert len(b.shards) == 3 < len(a.shards)
    assert a.digest == b.digest
    no_test = PackSettings(min_side=32, validation_fraction=0.2, test_fraction=0)
    assert pack(str(source), str(tmp_path / "c"), no_test).manifest.digest != a.digest


def test_layout_is_arithmetic():
    def sample(i: int, size: int, split: str) -> Sample:
        return Sample(Photo(f"k{i}", size, f"{i:064x}", 1, 1, "jpeg"), "", split)

    given = [sample(1, 512, "train"), sample(2, 513, "train"), sample(3, 9999, "train"), sample(4, 1, "test")]
    got = layout(given, 4096)
    assert [[m.offset for m in s.members] for s in got] == [[512, 1536], [512], [512]]
    assert [s.info.size for s in got] == [512 * (2 + 3 + 2), 512 * (1 + 20 + 2), 512 * (2 + 2)]
    names = [s.info.name.rpartition("-") for s in got]
    assert [n[0] for n in names] == ["train-000000", "train-000001", "test-000000"]
    assert len({n[2] for n in names}) == 3
    assert [s.info.size for s in layout(given[:2], 512 * 7)] == [512 * 7]  # exactly full
    assert len(layout(given[:2], 512 * 7 - 1)) == 2


# --------------------------------------------------------------------------------------------------- left out


def test_what_is_no_usable_photo_is_quarantined_with_a_reason(source, tmp_path):
    whole = photo(500, 64, ".jpg")
    bad = {
        "empty.jpg": b"",
        "truncated.jpg": whole[: len(whole) // 2],
        "text.png": b"not a picture",
        "tiny.png": photo(501, 16),
        "wide.png": photo(502, 400),
        "long.png": bytes(200_001),
    }
    for name, data in bad.items():
        (source / "cat" / name).write_bytes(data)
    (source / "cat/.DS_Store").write_bytes(b"hidden")
    (source / ".git").mkdir()
    (source / ".git/x.png").write_bytes(photo(503))
    odd = os.fsencode(source) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(photo(504))
    (source / "again.png").write_bytes((source / "cat/photo.00.png").read_bytes())
    limits = Limits(max_bytes=200_000, max_side=300)
    settings = PackSettings(min_side=32, limits=limits)
    report = pack(str(source), str(tmp_path / "out"), settings)
    assert sum(report.manifest.counts.values()) == 24
    reasons = dict(report.quarantined)
    assert set(reasons) == {*(f"cat/{name}" for name in bad), "caf\\udce9.png"}
    assert "200001 bytes" in reasons["cat/long.png"]
    assert "UTF-8" in reasons["caf\\udce9.png"]
    assert report.duplicates == (("cat/photo.00.png", "again.png"),)
    written = json.loads((tmp_path / "out/quarantine.json").read_text())
    assert written["quarantined"] == reasons
    assert written["duplicates"] == {"cat/photo.00.png": "again.png"}


def test_a_folder_without_a_usable_photo(tmp_path):
    source, out = tmp_path / "photos", tmp_path / "out"
    with pytest.raises(MissingError, match="holds no files"):
        pack(str(source), str(out))
    source.mkdir()
    with pytest.raises(MissingError, match="holds no files"):
        pack(str(source), str(out))
    assert not out.exists()
    (source / "a.txt").write_text("hello")
    (source / "b.png").write_bytes(photo(1, 20))
    with pytest.raises(ImageError, match=r"none of its 2 files is a usable photo \(the first, a.txt: ") as caught:
        pack(str(source), str(out))
    assert "\n" not in str(caught.value)
    assert set(json.loads((out / "quarantine.json").read_text())["quarantined"]) == {"a.txt", "b.png"}
    assert not (out / "manifest.json").exists()
    (source / "c.png").write_bytes(photo(1, 80))  # the same command, once there is one
    assert pack(str(source), str(out)).manifest.counts == {"train": 1, "validation": 0, "test": 0}


def test_photos_and_dataset_must_not_overlap(source):
    for out in (source, source / "shards", source.parent):
        with pytest.raises(ConfigError, match="must lie outside"):
            pack(str(source), str(out))
    pack(str(source), f"{source}-shards", SMALL)  # a name that only begins alike


@pytest.mark.parametrize(("photos", "out"), [("link", "photos"), ("photos", "link"), ("photos", "link/new"),
                                             ("calm/../photos", "photos"), ("link/cat", "photos")])  # fmt: skip
def test_photos_and_dataset_are_held_apart_by_whatever_path(source, tmp_path, photos, out):
    """A path of another spelling, or a symbolic link, is the same place; a link to another one is not."""
    (source / "scan").mkdir()
    (source / "scan/old.png").write_bytes(photo(300))
    (tmp_path / "calm").mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "apart").symlink_to(tmp_path / "calm")
    before = contents(source)
    with pytest.raises(ConfigError, match="must lie outside"):
        pack(f"{tmp_path}/{photos}", f"{tmp_path}/{out}", SMALL)
    assert contents(source) == before
    assert sum(pack(f"{tmp_path}/link", f"{tmp_path}/apart", SMALL).manifest.counts.values()) == 25
    assert contents(source) == before


def of_a_user(out: Path) -> dict[str, str]:
    """What somebody keeps in a folder that becomes a dataset, much of it named nearly as ours."""
    digest, temporary = "0" * 64, f".tmp-{'0' * 32}"
    for name in ("scan/old.png", "scan/notes.json", f"scan/{digest}.png", f"scan/{digest[1:]}.json",
                 f"scan/more/{digest}.json", f"more/scan/{digest}.json", "train-1.tar", "index.parquet",
                 ".tmp-mine", f"{temporary}-letter.png", "scan/.tmp-mine", f"scan/{temporary}-old.png",
                 f"more/{temporary}-train-000000-{digest[:16]}.tar"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"of the user: {name}")
    for name in ("empty", "scan/empty"):
        (out / name).mkdir()
    return contents(out)


def test_nothing_of_the_user_in_the_place_is_removed(source, tmp_path):
    """Negative control: what a killed run left under our names goes, from between the user's own."""
    out, digest, temporary = tmp_path / "out", "1" * 64, f".tmp-{'1' * 32}"
    kept = of_a_user(out)
    shard = f"train-000000-{digest[:16]}.tar"
    ours = [f"scan/{digest}.json", f"scan/{temporary}-{digest[:40]}", shard, f"{temporary}-{shard}",
            f"index-{digest[:16]}.parquet", f"{temporary}-manifest.json"]  # fmt: skip
    for name in ours:
        (out / name).write_bytes(b"left")
    pack(str(source), str(out), SMALL)
    calm = pack(str(source), str(tmp_path / "calm"), SMALL)
    assert contents(out).keys() == kept.keys() | contents(tmp_path / "calm").keys()
    assert kept.items() <= contents(out).items()
    (out / ours[0]).write_bytes(b"left")
    assert pack(str(source), str(out), SMALL).manifest == calm.manifest  # complete: it only tidies up
    assert contents(out).keys() == kept.keys() | contents(tmp_path / "calm").keys()
    assert kept.items() <= contents(out).items()


def test_nothing_of_the_user_is_removed_as_a_scan_proves_wrong(source, tmp_path):
    out = tmp_path / "out"
    kept = of_a_user(out)

    def change(phase: str, done: int, total: int) -> None:
        if phase == "scanning" and done == total:
            (source / "cat/photo.00.png").write_bytes(photo(300))

    with pytest.raises(IntegrityError, match="is not what it was when it was scanned"):
        pack(str(source), str(out), SMALL, on_progress=change)
    assert kept.items() <= contents(out).items()
    left = {path.relative_to(out).as_posix() for path in out.glob("scan/*.json")}
    assert left == {name for name in kept if name.startswith("scan/") and name.count("/") == 1 and "json" in name}


@pytest.mark.parametrize(
    "wrong",
    [{"shard_bytes": 0}, {"min_side": 0}, {"split": "random"}, {"validation_fraction": 1.0}, {"test_fraction": -0.1},
     {"validation_fraction": 0.5, "test_fraction": 0.5}, {"split": "folder", "test_fraction": 0.1}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        PackSettings(**wrong)


# ----------------------------------------------------------------------------------------------------- splits


def digests(num: int) -> list[str]:
    return [hashlib.sha256(b"%d" % i).hexdigest() for i in range(num)]


def test_a_photo_keeps_its_split_as_others_come_and_go():
    all_of_them, notes = hash_splits(digests(4000), 0.1, 0.2)
    assert notes == []
    shares = [sum(s == split for s in all_of_them.values()) / 4000 for split in ("validation", "test", "train")]
    assert np.allclose(shares, [0.1, 0.2, 0.7], atol=0.02)
    some, _ = hash_splits(digests(4000)[::-3], 0.1, 0.2)
    assert all(all_of_them[d] == split for d, split in some.items())
    assert set(hash_splits(digests(50), 0, 0)[0].values()) == {"train"}


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8])
def test_a_wanted_split_is_not_left_empty_and_train_never_is(num):
    for start in range(60):
        given = [hashlib.sha256(b"%d-%d" % (start, i)).hexdigest() for i in range(num)]
        splits, notes = hash_splits(given, 0.05, 0.05)
        used = set(splits.values())
        assert "train" in used
        assert len(used) == min(num, 3)
        assert len(notes) >= 3 - len(used)
        assert hash_splits(given[::-1], 0.05, 0.05) == (splits, notes)


def test_the_nearest_photo_is_the_one_that_moves():
    def split_at(*fractions: float) -> tuple[list[str], int]:
        given = [f"{int(x * 16**13):013x}".ljust(64, "0") for x in fractions]
        splits, notes = hash_splits(given, 0.05, 0.05)
        assert all("came out empty" in note for note in notes)
        return [splits[d] for d in given], len(notes)

    assert split_at(0.94, 0.2, 0.5, 0.3) == (["train", "validation", "train", "test"], 2)
    assert split_at(0.06, 0.2, 0.5, 0.3) == (["test", "validation", "train", "train"], 1)  # test keeps its only one
    assert split_at(0.01, 0.02, 0.03) == (["validation", "test", "train"], 2)
    assert split_at(0.01, 0.06, 0.5) == (["validation", "test", "train"], 0)


def test_folders_decide_where_they_are_asked_to(tmp_path):
    source = tmp_path / "photos"
    keys = ["train/cat/1.png", "train/dog/2.png", "train/3.png", "val/cat/4.png", "validation/5.png", "test/x/y/6.png"]
    for i, key in enumerate([*keys, "misc/7.png", "8.png"]):
        (source / key).parent.mkdir(parents=True, exist_ok=True)
        (source / key).write_bytes(photo(i))
    (source / "train/cat/leak.png").write_bytes((source / "test/x/y/6.png").read_bytes())
    report = pack(str(source), str(tmp_path / "out"), PackSettings(split="folder", min_side=32))
    assert report.manifest.counts == {"train": 3, "validation": 2, "test": 1}
    assert dict(report.duplicates) == {"train/cat/leak.png": "test/x/y/6.png"}  # the held-out one stays
    assert {key for key, _ in report.quarantined} == {"misc/7.png", "8.png"}
    assert "train, validation (val) or test" in report.quarantined[0][1]
    assert sorted(open_split(str(tmp_path / "out"), "train").labels) == ["", "cat", "dog"]
    assert open_split(str(tmp_path / "out"), "test").labels.tolist() == ["x"]


def test_assign_does_not_depend_on_order():
    found = [Photo(f"{'ab'[i % 2]}/{i}", 9, digests(12)[i % 9], 1, 1, "png") for i in range(12)]
    found_too = [*found, Rejected("z", "why"), Rejected("y", "why")]
    expected = assign(found_too, SMALL)
    assert len(expected.samples) == 9
    for seed in range(5):
        assert assign(random.Random(seed).sample(found_too, len(found_too)), SMALL) == expected


# ------------------------------------------------------------------------------------------ again, and after a kill


@pytest.fixture
def reads(monkeypatch):
    """Keys that were read from any local store, in order."""
    seen: list[str] = []
    real = LocalStore.read

    def read(self, key, **kwargs):
        seen.append(key)
        return real(self, key, **kwargs)

    monkeypatch.setattr(LocalStore, "read", read)
    return seen


def test_a_second_run_says_so_and_reads_no_photo(source, tmp_path, reads):
    out = tmp_path / "out"
    first = pack(str(source), str(out), SMALL)
    assert not first.existed
    before = contents(out)
    reads.clear()
    second = pack(str(source), str(out), SMALL)
    assert (second.existed, second.manifest, second.quarantined) == (True, first.manifest, first.quarantined)
    assert set(reads) == {"manifest.json", "quarantine.json", "origin.json"}
    assert contents(out) == before
    os.utime(source / "cat/photo.00.png")  # not known to be equal any more: looked at, found equal
    assert pack(str(source), str(out), SMALL).existed
    assert "cat/photo.00.png" in reads
    reads.clear()
    pack(str(source), str(out), SMALL)
    assert "cat/photo.00.png" not in reads


def test_another_dataset_is_not_overwritten(source, tmp_path):
    out = tmp_path / "out"
    pack(str(source), str(out), SMALL)
    before = contents(out)
    larger = PackSettings(min_side=32, validation_fraction=0.2, test_fraction=0.2)
    with pytest.raises(ConflictError, match="shards of another size"):
        pack(str(source), str(out), larger)
    (source / "new.png").write_bytes(photo(77))
    for dry_run in (True, False):
        with pytest.raises(ConflictError, match="other photos, splits or labels; give a new place"):
            pack(str(source), str(out), SMALL, dry_run=dry_run)
    assert contents(out) == before
    assert not pack(str(source), str(tmp_path / "new"), SMALL).existed


def test_a_lost_shard_is_made_again(source, tmp_path):
    out = tmp_path / "out"
    manifest = pack(str(source), str(out), SMALL).manifest
    before = contents(out)
    (out / manifest.shards[1].name).unlink()
    lost = open_split(str(out), manifest.shards[1].name.split("-")[0])
    with pytest.raises(MissingError, match=manifest.shards[1].name):
        lost.read(range(len(lost)))
    pack(str(source), str(out), SMALL)
    assert contents(out) == before


def test_a_dry_run_writes_nothing(source, tmp_path):
    report = pack(str(source), str(tmp_path / "out"), SMALL, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert pack(str(source), str(tmp_path / "out"), SMALL).manifest == report.manifest


KILLED = """
import os, signal, sys
from rayscale import storage
from rayscale.data import scan
from rayscale.data.pack import pack
from rayscale.data.parallel import local, threads
source, out, where, count = sys.argv[1:]
left, flush = [int(count)], storage._flush
def die(here):
    if here == where:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
def flushing(path):  # a file is written, but not yet renamed
    die("flush " + str(path).rpartition("-")[2].rpartition(".")[2] if path.is_file() else "folder")
    flush(path)
storage._flush, scan.SCAN_CHUNK = flushing, 5
settings = scan.PackSettings(shard_bytes=40_000, min_side=32, validation_fraction=0.2, test_fraction=0.2)
pack(source, out, settings, mapper=threads(2), on_progress=lambda phase, done, total: die(phase))
"""


@pytest.mark.parametrize(
    ("where", "count"),
    [("scanning", 3), ("scanning", 13), ("packing", 4), ("flush tar", 4), ("flush parquet", 1), ("flush json", 3)],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source, tmp_path, reads, monkeypatch, where, count):
    monkeypatch.setattr(scan_module, "SCAN_CHUNK", 5)
    expected = pack(str(source), str(tmp_path / "calm"), SMALL).manifest
    out = tmp_path / "out"
    assert python(KILLED, source, out, where, count).returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(MissingError, match="holds no manifest"):
        open_split(str(out), "train")
    finished = {p: p.stat().st_ino for p in out.glob("[!.]*.tar")}
    scanned = 5 * len(list(out.glob("scan/*.json")))
    reads.clear()
    report = pack(str(source), str(out), SMALL)
    assert report.manifest == expected
    assert contents(out) == contents(tmp_path / "calm")
    assert all(path.stat().st_ino == inode for path, inode in finished.items())  # not written a second time
    packed = sum(info.samples for info in expected.shards if out / info.name in finished)
    photos_read = sum(key.endswith(("png", "jpg", "webp")) for key in reads)
    assert photos_read == (24 - min(scanned, 24)) + (24 - packed)
    if where == "packing":
        assert finished
        assert scanned >= 24


def test_the_kill_is_what_stops_it(source, tmp_path):
    """Negative control of the test above: with a count that is never reached, the same script finishes."""
    done = python(KILLED, source, tmp_path / "out", "packing", 1000)
    assert done.returncode == 0, done.stderr
    assert len(open_split(str(tmp_path / "out"), "train")) > 0


def test_a_write_that_fails_publishes_nothing_and_the_next_run_completes_it(source, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); " + INGEST
    options = (source, tmp_path / "out", "--min-side", "32")
    done = python(limited, *options)
    assert done.returncode == 2
    assert "error: disk=" in done.stderr
    assert "Traceback" not in done.stderr
    left = {p.name for p in (tmp_path / "out").iterdir()} - {"scan"}
    assert all(name.endswith(".tar") for name in left)  # whole ones, of those short enough
    done = python(INGEST, *options)
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "packed"


def test_leftovers_that_may_not_be_deleted_are_no_failure(source, tmp_path, monkeypatch):
    def denied(self, key):
        raise MissingError("path", key, "cannot be used (Permission denied)", "ask for it")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", denied)
        pack(str(source), str(tmp_path / "out"), SMALL)
    assert len(open_split(str(tmp_path / "out"), "train")) > 0
    assert (tmp_path / "out/scan").exists()
    assert pack(str(source), str(tmp_path / "out"), SMALL).existed  # and the next run tidies up
    assert not (tmp_path / "out/scan").exists()


def test_what_a_run_with_other_photos_left_behind_is_removed(source, tmp_path):
    out = tmp_path / "out"
    assert python(KILLED, source, out, "packing", 6).returncode == -signal.SIGKILL
    (out / "notes.txt").write_text("of the user")
    for left in list(source.rglob("*.webp")):
        left.unlink()
    expected = pack(str(source), str(tmp_path / "calm"), SMALL).manifest
    assert pack(str(source), str(out), SMALL).manifest == expected
    assert set(contents(out)) == {*contents(tmp_path / "calm"), "notes.txt"}


@pytest.mark.parametrize("clock_step_s", [storage.CLOCK_STEP_S, -1.0])  # young: hashed twice
def test_a_photo_that_changes_while_it_is_packed_is_told_and_the_next_run_is_right(
    source, tmp_path, monkeypatch, clock_step_s
):
    monkeypatch.setattr(storage, "CLOCK_STEP_S", clock_step_s)
    out, changed = tmp_path / "out", source / "cat/photo.00.png"

    def change(phase: str, done: int, total: int) -> None:
        if phase == "scanning" and done == total:  # between the two readings, keeping time and size
            before, data = changed.stat(), bytearray(changed.read_bytes())
            data[-20] ^= 1
            changed.write_bytes(data)
            os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(IntegrityError, match=r"photo.00.png: is not what it was when it was scanned"):
        pack(str(source), str(out), SMALL, on_progress=change)
    assert not (out / "manifest.json").exists()
    expected = pack(str(source), str(tmp_path / "calm"), SMALL).manifest
    assert pack(str(source), str(out), SMALL).manifest == expected


@pytest.mark.parametrize(("clock_step_s", "hashed"), [(storage.CLOCK_STEP_S, True), (-1.0, False)])
def test_a_photo_that_nobody_wrote_to_is_hashed_once(source, tmp_path, monkeypatch, clock_step_s, hashed):
    """Shown by a scan that is made to say something else: it is noticed where photos are young, or on another disk."""
    monkeypatch.setattr(storage, "CLOCK_STEP_S", clock_step_s)
    store = open_store(str(source))
    items = listing(store, local(1))
    photo = next(p for p in scan_module.scan(store, items, SMALL, local(1)) if isinstance(p, Photo))
    wrong = photo._replace(sha256="0" * 64)
    if hashed:
        with pytest.raises(IntegrityError, match="is not what it was"):
            list(fetch(store, [wrong]))
    else:
        assert list(fetch(store, [wrong])) == [store.read(photo.source_key)]
    with pytest.raises(IntegrityError, match="is not what it was"):
        list(fetch(store, [wrong._replace(stamp="of another file")]))


def test_of_two_runs_at_once_with_other_photos_one_is_told(source, tmp_path):
    out = tmp_path / "out"

    def other_run(phase: str, done: int, total: int) -> None:
        if phase == "packing" and done == total:
            fill(tmp_path / "photos2", 9)
            pack(str(tmp_path / "photos2"), str(out), SMALL)

    with pytest.raises(ConflictError, match="other photos"):
        pack(str(source), str(out), SMALL, on_progress=other_run)
    assert pack(str(tmp_path / "photos2"), str(out), SMALL).existed
    photos = open_split(str(out), "train")
    assert len(photos.read(range(len(photos)))) == len(photos)


# --------------------------------------------------------------------------------------------------- the command


def test_ingest_reports_what_it_made(source, tmp_path):
    out = str(tmp_path / "out")
    (source / "bad.jpg").write_bytes(b"no")
    dry = ingest(str(source), out, min_side=32, dry_run=True)
    assert not Path(out).exists()
    made = ingest(str(source), out, min_side=32)
    again = ingest(str(source), out, min_side=32)
    assert [r.pop("status") for r in (dry, made, again)] == ["dry-run", "packed", "complete"]
    assert dry == made == again
    assert made["manifest"] == f"{out}/manifest.json"
    assert made["train"] + made["validation"] + made["test"] == 24
    assert (made["quarantined"], made["duplicates"]) == (1, 0)


INGEST = "from rayscale.cli import run_one; from rayscale.cli.data import pack; run_one(pack)"


def test_the_command_says_a_mistake_in_one_line(source, tmp_path):
    done = python(INGEST, source, tmp_path / "out", "--split", "folder", "--test-fraction", "0.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: test_fraction=0.1: has no effect where folders decide")
    assert done.stderr.count("\n") == 1
    done = python(INGEST, source, tmp_path / "out", "--min-side", "32", "--shard-mb", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "packed"


def test_a_disk_too_small_is_told_before_anything_is_packed(source, tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no private mount namespaces here")
    for i in range(60):
        (source / f"more{i}.png").write_bytes(photo(1000 + i, 100))
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs -o size=1m none {tmp_path}/disk && "$0" "$@"; code=$?; ls {tmp_path}/disk/out; exit $code'
    command = ["unshare", "-rm", "sh", "-c", script, sys.executable, "-c", INGEST, source, tmp_path / "disk/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: disk=" in done.stderr
    assert "the dataset needs" in done.stderr
    assert done.stdout.split() == ["scan"]
