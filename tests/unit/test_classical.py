"""Classical methods: shapes, what each is good for, and what it is not."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import get_args

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale import classical, metrics
from rayscale.data.degrade import Operator, degrade
from rayscale.data.draws import Chain
from rayscale.data.operators import Burst, GaussianBlur, GaussianNoise, Jpeg, Resize
from rayscale.errors import ConfigError
from rayscale.imaging import F32, U8

PROBLEMS: tuple[classical.Problem, ...] = get_args(classical.Problem)


@cache
def photo() -> U8:
    return np.ascontiguousarray(skimage.data.astronaut()[0:160, 128:288])


def degraded(*operators: Operator) -> U8:
    return degrade(operators, photo(), Chain(np.random.default_rng(0)))["lr"]


def psnr(picture: U8) -> float:
    return metrics.psnr(picture, photo())


def given_to(problem: classical.Problem, height: int, width: int, seed: int = 0) -> tuple[U8, ...]:
    rng = np.random.default_rng(seed)
    shape = (3, height, width, 3) if problem == "burst" else (height, width, 3)
    picture = rng.integers(0, 256, shape, np.uint8)
    return (
        (picture, rng.choice(np.array([0, 255], np.uint8), (height, width, 1))) if problem == "inpaint" else (picture,)
    )


@pytest.mark.parametrize("problem", PROBLEMS)
@settings(max_examples=10, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), scale=st.integers(1, 4))
def test_any_size_gives_its_own_or_scale_times_it(
    problem: classical.Problem, height: int, width: int, scale: int
) -> None:
    if problem not in ("upscale", "burst"):
        scale = 1
    inputs = given_to(problem, height, width)
    before = [array.copy() for array in inputs]
    for method in classical.methods(problem, scale):
        if method.name == "bm3d":  # seconds
            continue
        found = method.default()(*inputs)
        assert found.dtype == np.uint8, method.name
        assert found.shape == (height * scale, width * scale, 3), method.name
    assert all(np.array_equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_flat_picture_stays_flat(problem: classical.Problem) -> None:
    picture, *mask = given_to(problem, 24, 20)
    picture[:] = (30, 120, 200)
    for method in classical.methods(problem, 2):
        for label, run in method.runs().items():
            found = run(picture, *mask).astype(int)
            assert np.abs(found - (30, 120, 200)).max() <= 4, label  # Telea rounds on its way inward


def test_labels_name_the_settings_and_the_first_is_the_default() -> None:
    method = next(m for m in classical.methods("denoise") if m.name == "bilateral")
    labels = list(method.runs())
    assert labels[0] == "bilateral sigma_px=2 sigma_level=90"
    assert len(set(labels)) == len(labels) == 12
    noisy = degraded(GaussianNoise(sigma=(25, 25)))
    assert np.array_equal(method.default()(noisy), classical.bilateral(noisy, sigma_px=2, sigma_level=90))


def test_the_best_settings_are_found_and_the_best_method_comes_first() -> None:
    noisy = degraded(GaussianNoise(sigma=(25, 25)))
    found = classical.best(classical.methods("denoise"), lambda run: psnr(run(noisy)))
    scores = [score for _, score in found.values()]
    assert scores == sorted(scores, reverse=True)
    assert found["unchanged"] == ("unchanged", psnr(noisy))
    assert next(iter(found)) in ("bilateral", "bm3d")
    assert scores[0] > psnr(noisy) + 5
    for method in classical.methods("denoise"):
        assert found[method.name][1] >= psnr(method.default()(noisy))


def test_smoothing_a_clean_picture_gains_nothing() -> None:
    """Negative control."""
    slightly = degraded(Jpeg(quality=(98, 98), sampling=("444",)))
    names = [m for m in classical.methods("deblock") if m.name in ("unchanged", "mean", "median", "nonlocal_means")]
    assert next(iter(classical.best(tuple(names), lambda run: psnr(run(slightly))))) == "unchanged"


def test_wiener_undoes_the_blur_that_it_assumes() -> None:
    blurred = degraded(GaussianBlur(sigma=(1.5, 1.5), sizes=(21,)))
    right = classical.wiener(blurred, radius_px=1.5, noise=0.003)
    assert psnr(right) > psnr(blurred) + 2
    assert psnr(classical.wiener(blurred, radius_px=4.0, noise=0.003)) < psnr(blurred)  # negative control


@pytest.mark.parametrize("name", ["telea", "navier_stokes"])
def test_inpainting_touches_only_what_is_missing(name: str) -> None:
    mask = np.zeros((*photo().shape[:2], 1), np.uint8)
    mask[40:60, 50:120] = 255
    holed = np.where(mask > 0, np.uint8(0), photo())
    method = next(m for m in classical.methods("inpaint") if m.name == name)
    for label, run in method.runs().items():
        filled = run(holed, mask)
        assert np.array_equal(filled[mask[..., 0] == 0], photo()[mask[..., 0] == 0]), label
        assert psnr(filled) > psnr(holed) + 3, label


def gray(picture: U8) -> F32:
    found: F32 = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return found


@settings(max_examples=20, deadline=None)
@given(dx=st.floats(-4, 4), dy=st.floats(-4, 4))
def test_shifts_are_registered_by_parts_of_a_pixel(dx: float, dy: float) -> None:
    by = np.array([[1, 0, dx], [0, 1, dy]])
    moved = cv2.warpAffine(
        photo(), by, photo().shape[1::-1], flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=2
    )
    found = classical.register(gray(photo()), gray(moved))
    assert found is not None
    assert np.hypot(found[0] - dx, found[1] - dy) < 0.1


def test_unlike_pictures_have_no_shift() -> None:
    """Negative control."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 64, 64)).astype(np.float32)
    assert classical.register(noise[0], noise[1]) is None


def frames(shift_px: float) -> U8:
    shared = (Resize(scale=2, methods=("area",)),)
    return degraded(Burst(frames=6, shift_px=shift_px, shared=shared, each=(GaussianNoise(sigma=(3, 3)),)))


def test_a_burst_shows_more_than_its_first_frame() -> None:
    first, added = (m.default() for m in classical.methods("burst", 2))
    burst = frames(4.0)
    assert psnr(added(burst)) > psnr(first(burst)) + 1
    alone = burst[:1]
    assert psnr(added(alone)) < psnr(added(burst)) - 1  # negative control: it is the other frames that help


def test_a_frame_of_something_else_is_left_out() -> None:
    burst = frames(4.0)
    other = np.random.default_rng(0).integers(0, 256, burst[:1].shape, np.uint8)
    assert np.array_equal(
        classical.shift_and_add(np.concatenate([burst, other]), scale=2), classical.shift_and_add(burst, scale=2)
    )


def test_an_unknown_problem_is_refused() -> None:
    with pytest.raises(ConfigError, match="denoise"):
        classical.methods("denois")  # type: ignore[arg-type]


def test_bm3d_is_there_where_its_library_is_and_missed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rayscale"):
        names = [m.name for m in classical.methods("denoise")]
    installed = importlib.util.find_spec("bm3d") is not None
    assert ("bm3d" in names) == installed
    assert ("bm3d" in caplog.text) != installed
