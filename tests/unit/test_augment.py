"""Augmentations act on the photo before it is degraded, so both pictures of a pair stay in step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale import recipes
from rayscale.contract import dumps, loads
from rayscale.data import augment
from rayscale.data.augment import (
    Augmentation,
    Brightness,
    ChannelGain,
    Contrast,
    Hue,
    Mirror,
    QuarterTurn,
    Rotate,
    Saturation,
    Translate,
    Zoom,
)
from rayscale.data.cut import cut, recut
from rayscale.data.degrade import Bicubic, apply
from rayscale.data.draws import Chain
from rayscale.data.operators import Mask
from rayscale.data.plan import DataSettings
from rayscale.errors import ConfigError
from rayscale.imaging import U8

SETTINGS = DataSettings(hr_crop_px=32, flips=False)
ALL: tuple[Augmentation, ...] = (
    Rotate(degrees=20),
    Translate(px=1.5),
    Zoom(factor=(0.6, 1.6)),
    Brightness(offset=(-30, 30)),
    Contrast(factor=(0.7, 1.3)),
    Saturation(factor=(0.0, 1.5)),
    Hue(degrees=30),
    ChannelGain(factor=(0.8, 1.2)),
    Mirror(),
    QuarterTurn(),
)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int = 80, width: int = 96) -> U8:
    return rng(0).integers(0, 256, (height, width, 3), np.uint8)


def smooth(x: Any, y: Any) -> Any:
    """A picture that is known between its pixels."""
    waves = (np.sin(0.11 * x + 0.05 * y), np.sin(0.07 * y - 0.03 * x + 1), np.cos(0.06 * (x + y)))
    return 127.5 + 100 * np.stack(waves, axis=-1)


def smooth_photo(height: int = 160, width: int = 176) -> U8:
    return np.rint(smooth(np.arange(width)[None, :], np.arange(height)[:, None])).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(chosen=st.lists(st.sampled_from(ALL), max_size=4, unique=True), seed=st.integers(0, 999), flips=st.booleans())
def test_the_pair_stays_in_step_and_is_cut_again_from_its_record(
    chosen: list[Augmentation], seed: int, flips: bool
) -> None:
    data = replace(SETTINGS, augment=tuple(chosen), flips=flips, degradation=(Bicubic(scale=2), Mask()))
    tensors, drawn = cut(noise(), data, rng(seed))
    hole, lr, hr = tensors["mask"], tensors["lr"], np.ascontiguousarray(tensors["hr"])
    bare, _ = apply((Bicubic(scale=2),), hr, rng(0))
    apart = np.where(hole > 0, np.uint8(0), bare).astype(int) - lr
    assert np.abs(apart[2:-2, 2:-2]).max() <= 8  # a turned picture is rounded in another order; borders are mirrored
    assert all(np.array_equal(tensor, recut(noise(), data, drawn)[name]) for name, tensor in tensors.items())


def test_turning_only_one_of_the_pair_would_be_noticed() -> None:
    """Negative control of the test above."""
    tensors, _ = cut(noise(), SETTINGS, rng(0))
    bare, _ = apply((Bicubic(scale=2),), np.ascontiguousarray(tensors["hr"][:, ::-1]), rng(0))
    assert np.abs(bare.astype(int) - tensors["lr"])[2:-2, 2:-2].max() > 50


@pytest.mark.parametrize("chosen", [Rotate(degrees=30), Translate(px=5), Zoom(factor=(1, 2)), Zoom(factor=(0.5, 1))])
def test_geometry_is_where_the_record_says(chosen: Augmentation) -> None:
    data = replace(SETTINGS, augment=(chosen,))
    for seed in range(8):
        tensors, (crop, move, _) = cut(smooth_photo(), data, rng(seed))
        top, left = 2 * crop["top"], 2 * crop["left"]
        middle = 15.5
        if min(top, left) < 32 or top > 96 or left > 112:
            continue  # the photo's border is mirrored
        x, y = np.meshgrid(np.arange(32) - middle, np.arange(32) - middle)
        angle, step = math.radians(move.get("degrees", 0)), math.exp(-move.get("log_factor", 0))
        from_x = step * (math.cos(angle) * x - math.sin(angle) * y) + move.get("dx", 0) + left + middle
        from_y = step * (math.sin(angle) * x + math.cos(angle) * y) + move.get("dy", 0) + top + middle
        error = np.abs(tensors["hr"] - smooth(from_x, from_y)).max()
        unmoved = np.abs(tensors["hr"] - smooth(x + left + middle, y + top + middle)).max()
        assert error < 2.5
        assert unmoved > 3 * error


def mirrored(photo: U8, x: slice, y: slice) -> U8:
    """Columns x and rows y of the plane that the photo and its mirror images fill."""

    def within(chosen: slice, side: int) -> Any:
        at = np.arange(chosen.start, chosen.stop) % (2 * side)
        return np.minimum(at, 2 * side - 1 - at)

    return photo[within(y, photo.shape[0])][:, within(x, photo.shape[1])]


def placed(degrees: float, factor: float, away: tuple[float, float]) -> augment.Affine:
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / factor
    return np.column_stack([turn, away])


@settings(max_examples=80, deadline=None)
@given(
    sides=st.tuples(st.integers(24, 90), st.integers(24, 90)),
    degrees=st.floats(-45, 45),
    away=st.tuples(st.floats(-400, 400), st.floats(-400, 400)),
    factor=st.floats(0.25, 4),
)
def test_a_window_anywhere_shows_the_mirrored_plane(
    sides: tuple[int, int], degrees: float, away: tuple[float, float], factor: float
) -> None:
    photo, reach = smooth_photo(*sides), 200
    low = [math.floor(a) - reach for a in away]
    plane = mirrored(photo, *(slice(start, start + 2 * reach) for start in low))
    expected = augment.window(plane, placed(degrees, factor, (away[0] - low[0], away[1] - low[1])), 0, 0, 24, 20)

    def apart(dx: float) -> float:
        found = augment.window(photo, placed(degrees, factor, (away[0] + dx, away[1])), 0, 0, 24, 20)
        return float(np.abs(found.astype(np.float64) - expected).mean())

    near, far = (0.2, 1) if factor >= 1 else (2, 2.5)  # 1/32 px of OpenCV's rounding; where shrunk, the grid's phase
    assert apart(0) < near
    assert apart(max(1, 1 / factor)) > far  # negative control: one pixel aside


@settings(max_examples=80, deadline=None)
@given(
    side=st.sampled_from([2, 16, 48]),
    more=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    px=st.floats(0, 256),
    factor=st.sampled_from([(0.125, 0.125), (0.125, 8.0), (1.0, 1.0), (8.0, 8.0)]),
    seed=st.integers(0, 99),
)
def test_every_crop_of_every_photo_is_given(
    side: int, more: tuple[int, int], px: float, factor: tuple[float, float], seed: int
) -> None:
    moves: tuple[Augmentation, ...] = (Translate(px=px), Rotate(degrees=45), Zoom(factor=factor), Translate(px=px))
    photo = noise(side + more[0], side + more[1])
    tensors, _ = cut(photo, replace(SETTINGS, hr_crop_px=side, augment=moves), rng(seed))
    assert tensors["hr"].shape == (side, side, 3)
    assert len(np.unique(tensors["hr"])) > 1


def test_zooming_out_is_antialiased() -> None:
    data = replace(SETTINGS, augment=(Zoom(factor=(0.25, 0.25)),))
    tensors, _ = cut(noise(400, 400), data, rng(0))
    assert tensors["hr"].std() < 0.4 * noise().std()  # sixteen pixels become one


def test_nothing_drawn_changes_nothing() -> None:
    still: tuple[Augmentation, ...] = (
        Brightness(offset=(0, 0)),
        Contrast(factor=(1, 1)),
        Saturation(factor=(1, 1)),
        Hue(degrees=0),
        ChannelGain(factor=(1, 1)),
        Rotate(degrees=0),
        Translate(px=0),
        Zoom(factor=(1, 1)),
    )
    expected, _ = cut(noise(), SETTINGS, rng(1))
    for chosen in (still, tuple(replace(a, probability=0.0) for a in ALL)):
        found, _ = cut(noise(), replace(SETTINGS, augment=chosen), rng(1))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_colours_do_what_they_say() -> None:
    picture = np.rint(smooth_photo() * 0.5 + 64).astype(np.uint8)

    def shown(chosen: Augmentation) -> tuple[U8, dict[str, Any]]:
        chain = Chain(rng(3))
        return augment.colour((chosen,), picture, chain), chain.made[0]

    plain = picture.astype(np.float64)
    out, drawn = shown(Brightness(offset=(-30, 30)))
    np.testing.assert_allclose(out, plain + drawn["offset"], atol=0.51)
    out, drawn = shown(Contrast(factor=(0.5, 1.4)))
    np.testing.assert_allclose(out, (plain - 127.5) * drawn["factor"] + 127.5, atol=0.51)
    out, drawn = shown(ChannelGain(factor=(0.7, 1.3)))
    np.testing.assert_allclose(out, plain * [drawn["red"], drawn["green"], drawn["blue"]], atol=0.51)
    gray, _ = shown(Saturation(factor=(0, 0)))
    luma = plain @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(gray, np.repeat(luma[..., None], 3, 2), atol=0.51)
    hue, drawn = shown(Hue(degrees=90))
    assert abs(drawn["degrees"]) > 5
    np.testing.assert_allclose(hue.sum(2), plain.sum(2), atol=2)  # about the gray axis
    assert np.abs(hue - plain).max() > 5
    ends, _ = shown(Brightness(offset=(255, 255)))
    assert ends.min() == 255


def test_probabilities_and_ranges_hold() -> None:
    chosen: tuple[Augmentation, ...] = (
        Rotate(degrees=5, probability=0.25),
        Mirror(),
        Zoom(factor=(0.5, 2)),
        QuarterTurn(),
    )
    records = [cut(noise(48, 48), replace(SETTINGS, augment=chosen), rng(seed))[1] for seed in range(500)]
    named = [{step["name"]: step for step in record} for record in records]
    assert np.mean([n["rotate"]["taken"] for n in named]) == pytest.approx(0.25, abs=0.06)
    assert np.mean([n["mirror"]["taken"] for n in named]) == pytest.approx(0.5, abs=0.07)
    factors = np.exp([n["zoom"]["log_factor"] for n in named])
    assert 0.5 <= factors.min() < 0.52 < 1.95 < factors.max() <= 2
    assert np.mean(factors < 1) == pytest.approx(0.5, abs=0.07)
    assert {n["quarter_turn"]["turns"] for n in named} == {0, 1, 2, 3}


def test_they_are_plain_values_on_the_command_line() -> None:
    data = replace(SETTINGS, augment=ALL)
    assert loads(DataSettings, dumps(data), "data") == data
    told = recipes.load(
        "rayscale.recipes.compact:tiny", ['data.augment=[{"name":"rotate","degrees":5},{"name":"mirror"}]']
    )
    assert told.data.augment == (Rotate(degrees=5.0), Mirror())
    with pytest.raises(ConfigError, match=r"data\.augment=.*: 0\.mirror\.chance: Unexpected keyword argument"):
        recipes.load("rayscale.recipes.compact:tiny", ['data.augment=[{"name":"mirror","chance":0.2}]'])
    with pytest.raises(ConfigError, match=r"zoom\.factor=\(2\.0, 1\.0\): must be \(low, high\)"):
        Zoom(factor=(2, 1))
    with pytest.raises(ConfigError, match=r"hue\.probability=1\.5: must be a probability"):
        Hue(degrees=5, probability=1.5)
