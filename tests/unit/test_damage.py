"""Photos that are damaged for good: another one stands in, counts and order stay, and a budget ends it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rayscale.data import shards
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.pairs import pack, unpack
from rayscale.data.plan import DataSettings
from rayscale.data.sample import MicroBatch, render_window
from rayscale.errors import DamageError, IntegrityError
from rayscale.train.ledger import Ledger

SETTINGS = DataSettings(hr_crop_px=32, micro_batch=2, virtual_shards=2, window_images=4, crops=2)


def damage(dataset: Path, *images: int) -> Mixture:
    """Flip one bit of each of these photos where they lie."""
    photos = open_mixture((str(dataset),), "train")
    index = photos.parts[0]._index
    for image in images:
        path = dataset / index.shards[index.shard[image]]
        data = bytearray(path.read_bytes())
        data[index.offset[image] + index.size[image] // 2] ^= 16
        path.write_bytes(data)
    return photos


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    shards._load.cache_clear()
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def windows(photos: Mixture, count: int = 6) -> list[MicroBatch]:
    plan = photos.plan(SETTINGS)
    return [b for w in range(count) for v in range(2) for b in render_window(photos, plan, w, v, 0, plan.rows)]


def test_another_photo_stands_in_and_nothing_else_changes(dataset: str, copy: Path) -> None:
    sound = windows(open_mixture((dataset,), "train"))
    photos = damage(copy, 5)
    given = windows(photos)
    assert [(b.step, b.shard, b.ids.tolist()) for b in given] == [(b.step, b.shard, b.ids.tolist()) for b in sound]
    hit = [5 in b.ids[:, 1] for b in sound]
    assert any(hit)
    assert [bool(b.damaged) for b in given] == hit
    assert {b.damaged[0][0] for b in given if b.damaged} == {photos.key(5)}
    for ours, theirs, touched in zip(given, sound, hit, strict=True):
        same = [np.array_equal(a, b) for a, b in zip(ours.tensors["hr"], theirs.tensors["hr"], strict=True)]
        assert same == [not touched or image != 5 for image in ours.ids[:, 1].tolist()]
    assert [b.sha256 for b in windows(photos)] == [b.sha256 for b in given], "the same one, every time"


def test_a_part_of_a_window_has_the_same_substitutes(copy: Path) -> None:
    photos = damage(copy, 1, 5, 6)
    plan = photos.plan(SETTINGS)
    for w in range(3):
        whole = [b.sha256 for b in render_window(photos, plan, w, 0, 0, plan.rows)]
        for first in range(1, plan.rows):
            assert [b.sha256 for b in render_window(photos, plan, w, 0, first, plan.rows)] == whole[first:]


def test_where_no_photo_is_sound_the_first_damage_is_told(copy: Path) -> None:
    photos = damage(copy, *range(12))
    with pytest.raises(IntegrityError, match="is not what its sha256 says"):
        windows(photos)


def test_what_was_damaged_travels_with_the_block(copy: Path) -> None:
    photos = damage(copy, 5)
    plan = photos.plan(SETTINGS)
    given = [list(render_window(photos, plan, w, 0, 0, plan.rows)) for w in range(6)]
    for block in given:
        table = pack(block, ("lr", "hr"))
        assert [unpack(table, row).damaged for row in range(len(block))] == [b.damaged for b in block]


def test_the_ledger_outlives_a_start_and_ends_a_run_beyond_its_budget(tmp_path: Path) -> None:
    first = Ledger(str(tmp_path), num_images=1000, budget=0.002)
    first.add({"aa": "torn"})
    first.add({"bb": "torn"})
    with pytest.raises(DamageError, match=r"run\.damage_budget=0\.002: 3 of 1000 photos.*ledger\.json.*repair"):
        first.add({"cc": "torn"})
    again = Ledger(str(tmp_path), num_images=1000, budget=0.002)
    again.add({})  # mended in between: it goes on
    again.add({"dd": "torn"})
    assert set(json.loads((tmp_path / "ledger.json").read_text())) == {"aa", "bb", "cc", "dd"}


def test_a_dataset_of_one_window_has_stand_ins_too(copy: Path) -> None:
    photos = damage(copy, 3)
    plan = photos.plan(replace(SETTINGS, window_images=12))
    given = list(render_window(photos, plan, 0, 0, 0, plan.rows))
    assert any(batch.damaged for batch in given)
