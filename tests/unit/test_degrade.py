"""Degradation: MATLAB's bicubic to the bit, against a literal transcription in exact rational numbers.

`golden/bicubic.npz` holds pictures of 12..36 px and what `imresize_literal` makes of them.
"""

from __future__ import annotations

import math
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayscale.contract import digest, dumps, loads
from rayscale.data.degrade import Bicubic, Border, apply, margin_px, resize_bicubic, scale_of
from rayscale.errors import ConfigError
from rayscale.imaging import U8, decode_rgb

GOLDEN = Path(__file__).parents[1] / "golden" / "bicubic.npz"
HALF = Fraction(1, 2)


def noise(height: int, width: int, seed: int = 0) -> U8:
    """Hard noise: half of the values are 0 or 255, so that sums overshoot both ends."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-128, 384, (height, width, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


@cache
def contributions_literal(in_length: int, out_length: int, border: str) -> list[list[tuple[int, Fraction]]]:
    """MATLAB's `contributions(in_length, out_length, scale, @cubic, 4, true)`: (1-based index, weight) per output."""

    def cubic(x: Fraction) -> Fraction:
        x = abs(x)
        if x <= 1:
            return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
        return -HALF * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2 if x <= 2 else Fraction(0)

    scale = Fraction(out_length, in_length)
    kernel_width = Fraction(4) / scale if scale < 1 else Fraction(4)
    rows = []
    for x in range(1, out_length + 1):
        u = x / scale + HALF * (1 - 1 / scale)
        left = math.floor(u - kernel_width / 2)
        indices = [left + k for k in range(math.ceil(kernel_width) + 2)]
        weights = [scale * cubic(scale * (u - i)) if scale < 1 else cubic(u - i) for i in indices]
        if border == "replicate":
            indices = [min(max(i, 1), in_length) for i in indices]
        else:
            mirrored = [*range(1, in_length + 1), *range(in_length, 0, -1)]
            indices = [mirrored[(i - 1) % len(mirrored)] for i in indices]
        rows.append([(i, w / sum(weights)) for i, w in zip(indices, weights, strict=True)])
    return rows


def imresize_literal(picture: U8, height: int, width: int, border: str, half: Fraction = HALF) -> U8:
    """MATLAB's `imresize` on uint8: one pass per dimension, smallest scale first, each rounded to uint8."""
    result = picture.tolist()
    order = sorted((0, 1), key=lambda d: Fraction((height, width)[d], picture.shape[d]))
    for dimension in order:
        columns = result if dimension == 0 else [list(c) for c in zip(*result, strict=True)]
        resized = []
        for row in contributions_literal(len(columns), (height, width)[dimension], border):
            line = []
            for across in range(len(columns[0])):
                sums = [sum(w * columns[i - 1][across][c] for i, w in row) for c in range(3)]
                line.append([min(max(math.floor(s + half), 0), 255) for s in sums])
            resized.append(line)
        result = resized if dimension == 0 else [list(c) for c in zip(*resized, strict=True)]
    return np.array(result, np.uint8)


def test_golden_vectors() -> None:
    with np.load(GOLDEN) as stored:
        assert len(stored.files) == 14
        for name in stored.files:
            if name.startswith("in"):
                continue
            source, _, border = name.split(".")
            expected = stored[name]
            np.testing.assert_array_equal(resize_bicubic(stored[source], *expected.shape[:2], border=border), expected)


@pytest.mark.parametrize("border", ["replicate", "mirror"])
@pytest.mark.parametrize(("sides", "target"), [((24, 16), (12, 8)), ((18, 27), (6, 9)), ((32, 24), (8, 6))])
def test_shrinking_by_2_3_and_4_equals_the_literal_one(
    sides: tuple[int, int], target: tuple[int, int], border: Border
) -> None:
    picture = noise(*sides)
    result = resize_bicubic(picture, *target, border=border)
    np.testing.assert_array_equal(result, imresize_literal(picture, *target, border))


def test_exact_halves_occur_and_go_up() -> None:
    for side, target, has_halves in ((32, 16, True), (36, 12, False), (32, 8, True), (36, 6, True), (20, 18, True)):
        picture = noise(side, side) // 128 * 128  # makes halves common where they are possible
        result = resize_bicubic(picture, target, target, border="replicate")
        np.testing.assert_array_equal(result, imresize_literal(picture, target, target, "replicate"))
        halves_down = imresize_literal(picture, target, target, "replicate", half=HALF - Fraction(1, 10**12))
        assert np.array_equal(result, halves_down) is not has_halves, f"{side} -> {target}"


@settings(max_examples=60, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    target=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    border=st.sampled_from(["replicate", "mirror"]),
    seed=st.integers(0, 1000),
)
@example(sides=(24, 24), target=(4, 4), border="replicate", seed=0)  # weights that float64 does not hold, and halves
@example(sides=(10, 12), target=(20, 24), border="mirror", seed=1)
@example(sides=(9, 9), target=(8, 27), border="replicate", seed=2)  # columns first
def test_any_size_equals_the_literal_one(
    sides: tuple[int, int], target: tuple[int, int], border: Border, seed: int
) -> None:
    picture = noise(*sides, seed)
    result = resize_bicubic(picture, *target, border=border)
    np.testing.assert_array_equal(result, imresize_literal(picture, *target, border))


@pytest.mark.parametrize(("length", "target"), [(300, 150), (303, 101), (520, 130), (70, 140), (200, 133)])
def test_sides_longer_than_a_block(length: int, target: int) -> None:
    picture = noise(length, 3)
    expected = imresize_literal(picture, target, 3, "replicate")
    np.testing.assert_array_equal(resize_bicubic(picture, target, 3, border="replicate"), expected)
    turned = picture.swapaxes(0, 1)  # neither contiguous
    np.testing.assert_array_equal(resize_bicubic(turned, 3, target, border="replicate"), expected.swapaxes(0, 1))


def test_other_resizers_do_not_pass() -> None:
    picture = noise(48, 48)
    expected = imresize_literal(picture, 24, 24, "replicate")
    for how in (cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_LANCZOS4):
        assert (cv2.resize(picture, (24, 24), interpolation=how) != expected).any()
    assert (imresize_literal(picture, 24, 24, "mirror") != expected).any()


def test_classic_test_sets_to_the_bit(eval_data: Path) -> None:
    exact = {"replicate": 0, "mirror": 0}
    pairs = sorted(eval_data.glob("Set*/x?/*_HR.png"))
    for hr_path in pairs:
        hr = decode_rgb(hr_path.read_bytes())
        lr = decode_rgb(hr_path.with_name(hr_path.name.replace("_HR", "_LR")).read_bytes())
        for border in exact:
            exact[border] += np.array_equal(resize_bicubic(hr, *lr.shape[:2], border=border), lr)  # type: ignore[arg-type]
    assert len(pairs) == 57
    assert exact == {"replicate": 57, "mirror": 0}


@pytest.mark.parametrize(
    "operators",
    [
        (Bicubic(scale=2),),
        (Bicubic(scale=3),),
        (Bicubic(scale=4, border="mirror"),),
        (Bicubic(scale=2), Bicubic(scale=2)),
    ],
)
def test_a_crop_with_its_margin_is_cut_from_the_degraded_photo(operators: tuple[Bicubic, ...]) -> None:
    photo, scale = noise(96, 96), scale_of(operators)
    whole, _ = apply(operators, photo, np.random.default_rng(0))
    side, top, margin = 24, 36, margin_px(operators)
    expected = whole[top // scale : (top + side) // scale, top // scale : (top + side) // scale]

    def cut(margin: int) -> U8:
        wide = photo[top - margin : top + side + margin, top - margin : top + side + margin]
        lr, _ = apply(operators, wide, np.random.default_rng(0))
        inner = slice(margin // scale, (margin + side) // scale)
        return lr[inner, inner]

    assert margin % scale == 0
    np.testing.assert_array_equal(cut(margin), expected)
    assert (cut(margin - scale) != expected).any()


def test_apply_reports_what_was_done_and_draws_nothing() -> None:
    rng = np.random.default_rng(7)
    lr, drawn = apply((Bicubic(scale=2), Bicubic(scale=3)), noise(12, 18), rng)
    assert lr.shape == (2, 3, 3)
    assert drawn == ({"name": "bicubic"}, {"name": "bicubic"})
    assert rng.bit_generator.state == np.random.default_rng(7).bit_generator.state


def test_scale_one_changes_nothing() -> None:
    picture = noise(9, 7)
    lr, _ = apply((Bicubic(scale=1),), picture, np.random.default_rng(0))
    np.testing.assert_array_equal(lr, picture)
    assert margin_px((Bicubic(scale=1),)) == 0
    assert margin_px(()) == 0


def test_operators_survive_json() -> None:
    assert loads(Bicubic, dumps(Bicubic(scale=3, border="mirror")), "operator") == Bicubic(scale=3, border="mirror")
    assert digest((Bicubic(scale=2),)) != digest((Bicubic(scale=2, border="mirror"),))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"bicubic.scale=0: must be at least 1"):
        Bicubic(scale=0)
    with pytest.raises(ConfigError, match=r"bicubic.border=reflect"):
        Bicubic(scale=2, border="reflect")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"hr=9x8: sides must be multiples of 2"):
        apply((Bicubic(scale=2),), noise(8, 9), np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"size=4x0"):
        resize_bicubic(noise(8, 8), 0, 4, border="replicate")


def test_a_training_sample_costs_well_under_a_millisecond() -> None:
    picture, best_s = noise(128, 128), math.inf
    for _ in range(20):
        start = time.perf_counter()
        resize_bicubic(picture, 64, 64, border="replicate")
        best_s = min(best_s, time.perf_counter() - start)
    assert best_s < 1e-3  # 0.12 ms on an idle core
