"""Photos that must go are gone, by whatever name they are asked for; nothing else goes with them."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from rayscale.data import drop as dropping
from rayscale.data.pack import pack as pack_anywhere
from rayscale.data.parallel import threads
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, MissingError
from rayscale.storage import LocalStore

SMALL = PackSettings(shard_bytes=40_000, min_side=32, validation_fraction=0, test_fraction=0)

pack = functools.partial(pack_anywhere, mapper=threads(2))
drop = functools.partial(dropping.drop, mapper=threads(2))


def photo(seed: int, height: int = 48, width: int = 56) -> bytes:
    """A small PNG, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def held(dataset: Path) -> set[str]:
    """Digests of all photos that are in a dataset, read back."""
    photos = open_split(str(dataset), "train")
    return {hashlib.sha256(data).hexdigest() for data in photos.read(range(len(photos)))}


def told(dataset: Path) -> str:
    return (dataset / "quarantine.json").read_text()


@pytest.fixture
def packed(tmp_path):
    """Eight photos and a copy of the first, of which the labels know none."""
    source = tmp_path / "photos"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.png").write_bytes(photo(i))
    (source / "z-copy.png").write_bytes(photo(0))
    (tmp_path / "labels.csv").write_text("key,label\nnone.png,cat\n")
    settings = PackSettings(**{**vars(SMALL), "labels": str(tmp_path / "labels.csv")})
    report = pack(str(source), str(tmp_path / "packed"), settings)
    assert report.duplicates == (("z-copy.png", "0.png"),)
    assert "z-copy.png" in report.unlabelled
    return tmp_path / "packed"


@pytest.mark.parametrize("rewrite", [True, False], ids=["rewrite", "out"])
@pytest.mark.parametrize("also", [(), ("5.png",)], ids=["alone", "with another"])
def test_a_duplicate_stands_for_the_photo_that_was_kept(packed, tmp_path, also, rewrite):
    before = held(packed)
    gone = {hashlib.sha256(photo(i)).hexdigest() for i in (0, 5)[: 1 + len(also)]}
    out = packed if rewrite else tmp_path / "out"
    done = drop(str(packed), {"z-copy.png", *also}, None if rewrite else str(out))
    assert (done.names, done.unknown) == (["0.png", *also], [])
    assert held(out) == before - gone
    assert not any(name in told(out) for name in ("z-copy.png", "0.png", *also))
    assert "1.png" in told(out)  # without a label as before
    if not rewrite:
        assert held(packed) == before
        assert "z-copy.png" in told(packed)


def test_of_another_photo_a_duplicate_stays_told_and_unknown_names_are_refused(packed, tmp_path):
    """Negative control of the test above."""
    done = drop(str(packed), {"5.png", "z-copy.PNG"}, str(tmp_path / "out"))
    assert (done.names, done.unknown) == (["5.png"], ["z-copy.PNG"])
    assert json.loads(told(tmp_path / "out"))["duplicates"] == {"z-copy.png": "0.png"}
    assert "z-copy.png" in json.loads(told(tmp_path / "out"))["unlabelled"]
    before = contents(packed)
    with pytest.raises(MissingError, match=r"key=z-copy: is not in"):
        drop(str(packed), {"z-copy"}, None)
    assert contents(packed) == before


def test_a_duplicate_that_was_cut_stands_for_all_of_its_tiles(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2), ("d.png", 2)):
        (source / name).write_bytes(photo(seed, 200, 210))
    settings = PackSettings(tile_px=128, min_side=32, validation_fraction=0, test_fraction=0)
    report = pack(str(source), str(tmp_path / "packed"), settings)
    assert len(report.duplicates) == 8
    done = drop(str(tmp_path / "packed"), {"b.png", "d.png[0,0,100,105]"}, None)
    assert done.unknown == []
    whole, one = [name for name in done.names if name[0] == "a"], [name for name in done.names if name[0] == "c"]
    assert (len(whole), one) == (4, ["c.png[0,0,100,105]"])
    assert len(held(tmp_path / "packed")) == 3
    assert "b.png" not in told(tmp_path / "packed")
    assert told(tmp_path / "packed").count("d.png") == 3


@pytest.mark.parametrize("where", ["manifest.json", "quarantine.json"])
def test_a_rewrite_that_was_killed_still_knows_the_names(packed, monkeypatch, where):
    before, gone = held(packed), hashlib.sha256(photo(0)).hexdigest()
    write = LocalStore.write

    def killed(self, key, *arguments, **options):
        if key == where:
            raise KeyboardInterrupt
        write(self, key, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            drop(str(packed), {"z-copy.png"}, None)
    drop(str(packed), {"z-copy.png"}, None)
    assert held(packed) == before - {gone}
    assert not any(name in told(packed) for name in ("z-copy.png", "0.png"))
    assert (
        len({*packed.glob("*.tar"), *packed.glob("*.parquet")})
        == len(open_split(str(packed), "train").manifest.shards) + 1
    )


@pytest.mark.parametrize("out", ["packed/new", ".", "link", "link/new", "link/.."])
def test_the_second_dataset_lies_apart_by_whatever_path(packed, tmp_path, out):
    (tmp_path / "link").symlink_to(packed)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="must lie outside"):
        drop(str(packed), {"5.png"}, f"{tmp_path}/{out}")
    with pytest.raises(ConfigError, match="must lie outside"):
        drop(f"{tmp_path}/link", {"5.png"}, str(packed))
    assert contents(tmp_path) == before
    drop(f"{tmp_path}/link", {"5.png"}, str(tmp_path / "packed-2"))  # control: a name that only begins alike
    assert len(held(tmp_path / "packed-2")) == 7


@pytest.mark.parametrize("rewrite", [True, False], ids=["rewrite", "out"])
def test_nothing_of_the_user_in_the_place_is_removed(packed, tmp_path, rewrite):
    out = packed if rewrite else tmp_path / "out"
    temporary = f".tmp-{'0' * 32}"
    mine = {"scan/old.png", "scan/notes.json", "notes.txt", ".tmp-mine", f"{temporary}-letter.png"}
    mine |= set() if rewrite else {"origin.json"}
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("of the user")
    (out / "empty").mkdir()
    left = [f"train-000000-{'1' * 16}.tar", f"{temporary}-manifest.json", f"scan/{'1' * 64}.json"]
    for name in left:  # control: of a killed run
        (out / name).write_bytes(b"left")
    drop(str(packed), {"5.png"}, None if rewrite else str(out))
    assert mine | {"empty"} <= contents(out).keys()
    assert not contents(out).keys() & set(left)
    assert {(out / name).read_text() for name in mine} == {"of the user"}
