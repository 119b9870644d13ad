"""A sample is a pure function of its identity, and its lr is what cutting the degraded photo gives."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.data import pairs, presets
from rayscale.data.cut import check_sizes, cut, recut, sample_shapes
from rayscale.data.degrade import Bicubic, Operator, apply, scale_of
from rayscale.data.mixture import open_mixture
from rayscale.data.operators import GaussianBlur, Jpeg, Resize, Sampling
from rayscale.data.pack import pack
from rayscale.data.plan import DataSettings, sample_generator
from rayscale.data.sample import render_window
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError
from rayscale.imaging import U8, encode

SETTINGS = DataSettings(hr_crop_px=24, flips=False, micro_batch=2, virtual_shards=2, window_images=4, crops=2)


def pair(photo: U8, chosen: DataSettings, rng: np.random.Generator) -> tuple[U8, U8]:
    tensors, _ = cut(photo, chosen, rng)
    return tensors["lr"], tensors["hr"]


@given(
    scale=st.sampled_from([2, 3, 4]), height=st.integers(24, 60), width=st.integers(24, 60), seed=st.integers(0, 999)
)
@settings(max_examples=60, deadline=None)
def test_lr_equals_the_crop_of_the_degraded_photo(scale: int, height: int, width: int, seed: int) -> None:
    photo = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    chain = (Bicubic(scale=scale),)
    lr, hr = pair(photo, replace(SETTINGS, degradation=chain), sample_generator(1, 0, 0, seed))
    modulo = photo[: height // scale * scale, : width // scale * scale]
    whole, _ = apply(chain, modulo, np.random.default_rng(0))
    side = 24 // scale
    places = [
        (y, x)
        for y in range(whole.shape[0] - side + 1)
        for x in range(whole.shape[1] - side + 1)
        if np.array_equal(modulo[y * scale : y * scale + 24, x * scale : x * scale + 24], hr)
    ]
    assert len(places) == 1, "hr is a crop on the lr grid"
    y, x = places[0]
    assert np.array_equal(whole[y : y + side, x : x + side], lr)


def test_degrading_the_bare_crop_would_not_be_the_same() -> None:
    """Negative control of the test above: without the margin, borders differ."""
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    lr, hr = pair(photo, SETTINGS, sample_generator(1, 0, 0, 0))
    bare, _ = apply(SETTINGS.degradation, np.ascontiguousarray(hr), np.random.default_rng(0))
    assert not np.array_equal(bare, lr)
    assert np.array_equal(bare[2:-2, 2:-2], lr[2:-2, 2:-2])


def test_flips_turn_both_halves_of_the_pair_alike() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    seen = set()
    for crop in range(64):
        straight = pair(photo, SETTINGS, sample_generator(0, 0, 0, crop))
        turned = pair(photo, replace(SETTINGS, flips=True), sample_generator(0, 0, 0, crop))
        found = [
            (turns, mirror)
            for turns in range(4)
            for mirror in (1, -1)
            if all(np.array_equal(np.rot90(a[:, ::mirror], turns), b) for a, b in zip(straight, turned, strict=True))
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 8, "all quarter turns and mirrorings happen"


@pytest.mark.parametrize("sampling", ["420", "444"])
def test_jpeg_blocks_of_a_crop_are_those_of_the_photo(sampling: Sampling) -> None:
    """So they lie at every place in crops, and cutting the compressed photo gives lr."""
    photo = smooth_photo(150, 170)
    chain = (Jpeg(quality=(20, 20), sampling=(sampling,)),)
    whole, _ = apply(chain, photo, np.random.default_rng(0))
    rows = set()
    for crop in range(40):
        tensors, drawn = cut(photo, replace(SETTINGS, degradation=chain), sample_generator(1, 0, 0, crop))
        top, left = drawn[0]["top"], drawn[0]["left"]
        assert np.array_equal(tensors["lr"], whole[top : top + 24, left : left + 24])
        bare, _ = apply(chain, np.ascontiguousarray(tensors["hr"]), np.random.default_rng(0))
        assert np.array_equal(bare, tensors["lr"]) is False, "its own blocks would be others"
        rows.add(top % 16)
    assert len(rows) > 10


@pytest.mark.parametrize("chain", [(GaussianBlur(sigma=(2, 2), sizes=(9,)),), (Resize(scale=4, methods=("bicubic",)),)])
def test_plain_chains_give_what_cutting_the_degraded_photo_gives(chain: tuple[Operator, ...]) -> None:
    photo = smooth_photo(152, 168)
    settings, scale = replace(SETTINGS, degradation=chain), scale_of(chain)
    whole, _ = apply(chain, photo, np.random.default_rng(0))
    for crop in range(20):
        tensors, drawn = cut(photo, settings, sample_generator(1, 0, 0, crop))
        top, left, side = drawn[0]["top"], drawn[0]["left"], 24 // scale
        expected = whole[top : top + side, left : left + side].astype(int)
        assert np.abs(tensors["lr"] - expected).max() <= 1  # sums in another order


@pytest.mark.parametrize(
    "chain",
    [(), presets.bicubic(3), presets.real_esrgan(2), presets.bsrgan(4), presets.deblur(), presets.inpaint(),
     presets.burst(4, 5)],
)  # fmt: skip
@pytest.mark.parametrize("sides", [(48, 48), (49, 131), (200, 64)])
def test_shapes_are_known_before_a_sample_is_cut(chain: presets.Degradation, sides: tuple[int, int]) -> None:
    settings = replace(SETTINGS, hr_crop_px=48, degradation=chain, flips=True)
    photo = smooth_photo(*sides)
    tensors, drawn = cut(photo, settings, sample_generator(0, 0, 0, 0))
    assert {name: tensor.shape for name, tensor in tensors.items()} == sample_shapes(settings)
    assert all(tensor.dtype == np.uint8 for tensor in tensors.values())
    again = recut(photo, settings, json.loads(json.dumps(drawn)))
    assert all(np.array_equal(tensors[name], again[name]) for name in tensors)


def smooth_photo(height: int, width: int) -> U8:
    return cv2.resize(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8), (width, height))


def test_rows_of_a_window_do_not_depend_on_where_one_starts(dataset: str) -> None:
    photos = open_mixture((dataset,), "train")
    plan = photos.plan(SETTINGS)
    whole = list(render_window(photos, plan, 3, 1, 0, plan.rows))
    assert [b.step for b in whole] == list(range(3 * plan.rows, 4 * plan.rows))
    for first in range(plan.rows):
        for last in range(first + 1, plan.rows + 1):
            part = list(render_window(photos, plan, 3, 1, first, last))
            assert [b.sha256 for b in part] == [b.sha256 for b in whole[first:last]]
    assert len({b.sha256 for b in whole}) == plan.rows
    assert all(b.sha256 == b.checksum() for b in whole)


def test_a_seed_is_another_sequence(dataset: str) -> None:
    photos = open_mixture((dataset,), "train")
    first, other = (
        next(render_window(photos, photos.plan(replace(SETTINGS, seed=seed)), 0, 0, 0, 1)) for seed in (0, 1)
    )
    assert first.sha256 != other.sha256


def test_a_crop_larger_than_the_smallest_photo_is_refused(dataset: str) -> None:
    photos = open_split(dataset, "train")
    check_sizes(photos, replace(SETTINGS, hr_crop_px=96))
    with pytest.raises(ConfigError, match=r"data\.hr_crop_px=98: exceeds the smallest photo.*--min-side 98"):
        check_sizes(photos, replace(SETTINGS, hr_crop_px=98))


def test_labels_and_shrunk_photos_travel_where_they_are_asked_for(tmp_path: Path) -> None:
    for i in range(16):
        picture = np.full((40 + 4 * i, 96, 3), 16 * i, np.uint8)
        path = tmp_path / "photos" / "bca"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture, "png"))
    fractions = {"validation_fraction": 0.0, "test_fraction": 0.0}
    pack(str(tmp_path / "photos"), str(tmp_path / "out"), PackSettings(min_side=16, **fractions))  # type: ignore[arg-type]
    photos = open_mixture((str(tmp_path / "out"),), "train")
    assert photos.classes == ("a", "b", "c")
    settings = replace(SETTINGS, hr_crop_px=32, fit_px=32, degradation=(), tensors=("hr", "label"), window_images=8)
    plan = photos.plan(settings)
    seen = 0
    for batch in render_window(photos, plan, 0, 0, 0, plan.rows):
        assert {name: (t.dtype.str, t.shape) for name, t in batch.tensors.items()} == {
            "hr": ("|u1", (settings.micro_batch, 32, 32, 3)), "label": ("<i8", (settings.micro_batch,))}  # fmt: skip
        assert [photos.classes[k] for k in batch.tensors["label"]] == [
            photos.parts[0].label(i) for i in batch.ids[:, 1]
        ]
        level = [int(hr.mean()) // 16 for hr in batch.tensors["hr"]]  # tells which photo it is
        assert [photos.classes[k] for k in batch.tensors["label"]] == ["bca"[i % 3] for i in level]
        seen += 1
    assert seen == plan.rows
    again = pairs.unpack(pairs.pack([batch], ("hr", "label")), 0)
    assert again.checksum() == again.sha256 == batch.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": ("hr", "mask")}, r"data.tensors=mask: no such tensor"),
        ({"fit_px": 16}, r"data.fit_px=16: must be at least data.hr_crop_px=\d+; raise it"),
    ],
)
def test_tensors_and_sizes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **changes)
