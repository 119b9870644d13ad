"""Every operator does what it is defined to: kernels, noise, codecs, resizing, masks."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayscale.data import kernels, noise, resize
from rayscale.data.degrade import Operator, apply, replay
from rayscale.data.draws import Chain
from rayscale.data.masks import mask_of
from rayscale.data.operators import (
    METHODS,
    ODD_SIZES,
    Decimate,
    Defocus,
    GaussianBlur,
    GaussianNoise,
    Jpeg,
    Mask,
    MaskKind,
    MotionBlur,
    PoissonNoise,
    RandomResize,
    Resize,
    SaltPepper,
    Shrink,
    Sinc,
    SpeckleNoise,
    Webp,
)
from rayscale.errors import ConfigError
from rayscale.imaging import U8

F64 = NDArray[np.float64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@cache
def whole() -> U8:
    import skimage.data

    return np.asarray(skimage.data.chelsea())


def photo(side: int = 64) -> U8:
    return np.ascontiguousarray(whole()[80 : 80 + side, 120 : 120 + side])


def flat(value: int, side: int = 256) -> U8:
    return np.full((side, side, 3), value, np.uint8)


def run(operator: Operator, picture: U8, seed: int = 0) -> tuple[U8, dict[str, Any]]:
    out, drawn = apply((operator,), picture, rng(seed))
    return out, drawn[0]


# Kernels


def literal(size: int, sigma_x: float, sigma_y: float, angle: float, beta: float, plateau: bool) -> F64:
    """BasicSR's definition, by the inverse of the rotated covariance."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    half = size // 2
    kernel = np.empty((size, size))
    for y in range(-half, half + 1):
        for x in range(-half, half + 1):
            m = np.array([x, y]) @ inverse @ np.array([x, y])
            kernel[y + half, x + half] = 1 / (1 + m**beta) if plateau else math.exp(-0.5 * m**beta)
    return kernel / kernel.sum()


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(ODD_SIZES),
    sigma=st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)),
    angle=st.floats(-math.pi, math.pi),
    beta=st.floats(0.5, 4),
    plateau=st.booleans(),
)
def test_gaussians_are_as_defined(
    size: int, sigma: tuple[float, float], angle: float, beta: float, plateau: bool
) -> None:
    found = kernels.gaussian(size, *sigma, angle, beta=beta, plateau=plateau)
    np.testing.assert_allclose(found, literal(size, *sigma, angle, beta, plateau), atol=1e-12)
    assert found.min() >= 0
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-15)


def test_a_wrong_rotation_or_shape_is_told_from_the_definition() -> None:
    """Negative control of the test above."""
    found = kernels.gaussian(21, 3.0, 1.0, 0.4)
    others = [
        literal(21, 3.0, 1.0, -0.4, 1.0, False),
        literal(21, 3.0, 1.0, 0.4, 1.2, False),
        literal(21, 3.0, 1.0, 0.4, 1.0, True),
    ]
    assert min(np.abs(found - other).max() for other in others) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    sigma=st.floats(0, 8),
    size=st.sampled_from(ODD_SIZES),
    cutoff=st.floats(math.pi / 5, math.pi),
    length=st.floats(0, 40),
    radius=st.floats(0, 12),
    angle=st.floats(0, math.pi),
)
def test_kernels_sum_to_one(sigma: float, size: int, cutoff: float, length: float, radius: float, angle: float) -> None:
    weights = [kernels.gaussian(size, sigma, sigma, 0.0), kernels.line(length, angle), kernels.disc(radius)]
    for kernel in [*weights, kernels.low_pass(size, cutoff)]:
        assert kernel.shape[0] == kernel.shape[1]
        assert kernel.shape[0] % 2 == 1
        assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert min(kernel.min() for kernel in weights) >= 0


def test_a_low_pass_passes_below_its_cutoff_and_rings() -> None:
    kernel = kernels.low_pass(21, math.pi / 3)
    response = np.abs(np.fft.fft2(kernel, (240, 240)))[0]  # along x: index k is 2 pi k / 240
    assert np.all(np.abs(response[:20] - 1) < 0.25)
    assert np.all(response[60:120] < 0.1)
    assert kernel.min() < -1e-3, "ringing needs negative weights"
    known = {1.0: 0.4400505857449335, 10.0: 0.04347274616886144, 3.8317059702075125: 0.0}
    for x, value in known.items():
        assert kernels.bessel_j1(np.array([x]))[0] == pytest.approx(value, abs=1e-12)


def test_a_line_lies_along_its_angle_and_a_disc_is_as_large_as_its_radius() -> None:
    for angle in (0.0, 0.7, math.pi / 2, 2.5):
        kernel = kernels.line(15, angle)
        axis = np.arange(len(kernel)) - len(kernel) // 2
        xx, yy, xy = ((kernel * a * b).sum() for a, b in (
            (axis[None], axis[None]), (axis[:, None], axis[:, None]), (axis[None], axis[:, None])))  # fmt: skip
        assert math.sin(0.5 * math.atan2(2 * xy, xx - yy) - angle) == pytest.approx(0, abs=0.02)
        assert math.sqrt(12 * (xx + yy)) == pytest.approx(14, rel=0.05)
    disc = kernels.disc(6)
    assert 1 / disc.max() == pytest.approx(math.pi * 36, rel=0.03)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(ODD_SIZES),
    sigma=st.tuples(st.floats(0.2, 4), st.floats(0.2, 4)),
    angle=st.floats(-math.pi, math.pi),
    kind=st.sampled_from(["gaussian", "peaked", "plateau", "sinc", "line", "disc"]),
)
def test_fast_filtering_is_the_plain_sum(size: int, sigma: tuple[float, float], angle: float, kind: str) -> None:
    kernel = {
        "gaussian": lambda: kernels.gaussian(size, *sigma, angle),
        "peaked": lambda: kernels.gaussian(size, *sigma, angle, beta=0.6),
        "plateau": lambda: kernels.gaussian(size, *sigma, angle, beta=2, plateau=True),
        "sinc": lambda: kernels.low_pass(size, abs(angle) / math.pi * 2 + 1),
        "line": lambda: kernels.line(5 * sigma[0], angle),
        "disc": lambda: kernels.disc(sigma[0]),
    }[kind]()
    picture = photo(48)
    exact = cv2.filter2D(picture.astype(np.float64), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    error = np.abs(kernels.convolve(picture, kernel) - np.clip(exact, 0, 255))
    assert error.max() < 0.75  # of which 0.5 is the rounding
    assert error.mean() < 0.26


def test_blurs_draw_what_they_are_told_to() -> None:
    chain = GaussianBlur(sigma=(0.5, 2.0), sizes=(9,), isotropic=False, shape="generalised", beta=(0.5, 4.0))
    drawn = [run(chain, photo(16), seed)[1] for seed in range(400)]
    sigmas = np.array([(d["sigma_x"], d["sigma_y"]) for d in drawn])
    assert 0.5 <= sigmas.min() < 0.51 < 1.99 < sigmas.max() <= 2
    assert abs(np.corrcoef(sigmas.T)[0, 1]) < 0.15
    betas = np.array([d["beta"] for d in drawn])
    assert 0.4 < (betas < 1).mean() < 0.6  # not uniform over (0.5, 4): that would be 0.14
    variance = GaussianBlur(sigma=(0.0, 3.0), isotropic=True, uniform_in="variance")
    squares = [run(variance, photo(16), seed)[1]["variance_x"] for seed in range(400)]
    assert np.mean(squares) == pytest.approx(4.5, rel=0.1)


# Noise


@pytest.mark.parametrize("sigma", [1.0, 8.0, 25.0])
@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_gaussian_noise_has_its_variance(sigma: float, gray: float) -> None:
    out, drawn = run(GaussianNoise(sigma=(sigma, sigma), gray=gray), flat(128))
    error = out.astype(np.float64) - 128
    assert error.var() == pytest.approx(sigma**2 + 1 / 12, rel=0.02)  # 1/12: rounding to uint8
    assert error.var() != pytest.approx((1.05 * sigma) ** 2 + 1 / 12, rel=0.02)  # the check tells 5 % apart
    assert abs(error.mean()) < 5 * sigma / 256
    assert (out[..., 0] == out[..., 1]).all() == (gray == 1.0)
    assert drawn["kind"] == (0 if gray else 2)
    spectrum = np.abs(np.fft.fft2(error[..., 0])) ** 2
    low = spectrum[:16, :16].mean() / spectrum.mean()
    assert low == pytest.approx(1, abs=0.3), "white"


def test_correlated_noise_mixes_channels() -> None:
    for seed in range(5):
        out, _ = run(GaussianNoise(sigma=(2, 20), correlated=1.0), flat(128), seed)
        covariance = np.cov(out.reshape(-1, 3).T)
        assert covariance.max() < 21**2
        assert covariance.min() > 0
        assert covariance[0, 1] > 5


@pytest.mark.parametrize(("gray", "value", "scale"), [(0.0, 200, 0.8), (1.0, 200, 0.8), (0.0, 60, 0.5), (0.0, 4, 1.0)])
def test_poisson_noise_has_the_variance_of_counted_light(gray: float, value: int, scale: float) -> None:
    picture = flat(value)
    picture[:16] = np.arange(256, dtype=np.uint8)[None, :, None]  # all 256 values: counts of x * 256
    out, _ = run(PoissonNoise(scale=(scale, scale), gray=gray), picture)
    error = out[16:].astype(np.float64) - value
    counts = value * 256 / 255
    assert error.var() == pytest.approx(scale**2 * counts * (255 / 256) ** 2 + (scale < 1) / 12, rel=0.03)
    assert error.mean() == pytest.approx(0, abs=0.3)  # the counts are a grid of their own, rounded to uint8
    assert (out[16:, :, 0] == out[16:, :, 1]).all() == (gray == 1.0)


def test_fewer_values_count_less_light() -> None:
    out, _ = run(PoissonNoise(scale=(1, 1)), flat(128))  # one value: a count of x * 1, of mean 0.5
    error = out.astype(np.float64) - 128
    counts = 128 / 255
    zero = (out == 0).mean()
    assert zero == pytest.approx(math.exp(-counts), abs=0.01)
    assert set(np.unique(out)) == {0, 255}
    assert error.var() > 40**2


@pytest.mark.parametrize("mean", [0.3, 4.0, 9.9, 10.1, 40.0, 250.0])
def test_poisson_counts_follow_the_distribution(mean: float) -> None:
    counts = noise.poisson(np.full((1000, 1000), 200, np.uint8), mean / 200, rng()).astype(np.int64).ravel()
    support = np.arange(counts.max() + 2)
    logs = support * math.log(mean) - mean - np.array([math.lgamma(k + 1) for k in support])
    found = np.cumsum(np.bincount(counts, minlength=len(support))) / counts.size
    assert np.abs(found - np.cumsum(np.exp(logs))).max() < 3.5e-3  # 1.5e-3 of it for a million draws
    assert counts.mean() == pytest.approx(mean, rel=5e-3)
    assert counts.var() == pytest.approx(mean, rel=1e-2)
    plain = np.rint(mean + math.sqrt(mean) * rng().standard_normal(10**6))
    control = np.cumsum(np.bincount(np.maximum(plain, 0).astype(np.int64), minlength=len(support)))[: len(support)]
    if mean < 50:  # a plain normal number would not pass
        assert np.abs(control / 10**6 - np.cumsum(np.exp(logs))).max() > 6e-3


def test_speckle_grows_with_the_light() -> None:
    dark, _ = run(SpeckleNoise(sigma=(20, 20)), flat(40))
    light, _ = run(SpeckleNoise(sigma=(20, 20)), flat(160))
    assert light.std() == pytest.approx(160 * 20 / 255, rel=0.02)
    assert dark.std() == pytest.approx(40 * 20 / 255, rel=0.03)
    gray, _ = run(SpeckleNoise(sigma=(20, 20), gray=1.0), flat(160))
    assert (gray[..., 0] == gray[..., 2]).all()


@given(amount=st.floats(0, 1), salt=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_salt_and_pepper_hit_as_many_pixels_as_told(amount: float, salt: float) -> None:
    out, _ = run(SaltPepper(amount=(amount, amount), salt=salt), flat(128))
    assert (out == out[..., :1]).all()
    assert (out[..., 0] == 255).mean() == pytest.approx(amount * salt, abs=0.011)
    assert (out[..., 0] == 0).mean() == pytest.approx(amount * (1 - salt), abs=0.011)


# Codecs


def test_jpeg_is_the_real_codec() -> None:
    picture = photo()
    for quality, sampling, factor in ((30, "420", 0x221111), (30, "444", 0x111111), (90, "422", 0x211111)):
        found, drawn = run(Jpeg(quality=(quality, quality), sampling=(sampling,)), picture)  # type: ignore[arg-type]
        settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
        expected = cv2.imdecode(cv2.imencode(".jpg", picture[..., ::-1], settings)[1], cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(found, expected)
        assert drawn == {"name": "jpeg", "quality": quality, "sampling": sampling}
    fine, coarse = (run(Jpeg(quality=(30, 30), sampling=(s,)), picture)[0] for s in ("444", "420"))  # type: ignore[arg-type]
    assert not np.array_equal(fine, coarse)


@pytest.mark.parametrize("codec", [Jpeg(quality=(5, 95)), Webp(quality=(5, 95))])
def test_a_lower_quality_is_further_from_the_photo(codec: Jpeg | Webp) -> None:
    picture = photo().astype(np.float64)
    results = sorted((d["quality"], np.square(out - picture).mean()) for out, d in (
        run(codec, photo(), seed) for seed in range(30)))  # fmt: skip
    assert results[0][0] < 20 < 80 < results[-1][0]
    assert results[0][1] > 3 * results[-1][1]
    red = np.broadcast_to(np.array([220, 30, 40], np.uint8), (32, 32, 3))
    assert np.abs(run(codec, np.ascontiguousarray(red))[0].mean((0, 1)) - (220, 30, 40)).max() < 12  # no BGR


# Resizing


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    scale=st.integers(1, 4),
    method=st.sampled_from([*METHODS, "nearest", "lanczos"]),
    up=st.floats(1, 2),
    down=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_a_chain_ends_at_exactly_its_scale(
    height: int, width: int, scale: int, method: Any, up: float, down: float, seed: int
) -> None:
    picture = photo(96)[: height * scale, : width * scale]
    chain = (
        RandomResize(probabilities=(1, 1, 1), factor=(down, up)),
        RandomResize(probabilities=(1, 1, 1), factor=(down, up), scale=scale),
        Shrink(ratio=(1, 3)),
        Resize(scale=scale, methods=(method,)),
    )
    out, _ = apply(chain, picture, rng(seed))
    assert out.shape == (height, width, 3)
    assert out.dtype == np.uint8


def test_random_sizes_are_of_the_picture_given_or_of_the_last_one() -> None:
    own, last = (RandomResize(probabilities=(0, 1, 0), factor=(0.5, 1), scale=s) for s in (0, 4))
    sides = [[], []]
    for seed in range(50):
        for i, operator in enumerate((own, last)):
            chain = Chain(rng(seed))
            draws = chain.next("random_resize", (64, 64))
            sides[i].append(resize.random_resize(operator, photo(32), draws).shape[0])
    assert 16 <= min(sides[0]) < 18 < 30 < max(sides[0]) <= 32
    assert 8 <= min(sides[1]) < 9 < 14 < max(sides[1]) <= 16


def test_ups_and_downs_have_their_probabilities() -> None:
    operator = RandomResize(probabilities=(0.2, 0.7, 0.1), factor=(0.15, 1.5))
    chain = (operator, Resize(scale=1))
    factors = np.array([apply(chain, photo(8), rng(seed))[1][0]["factor"] for seed in range(3000)])
    found = (factors > 1).mean(), (factors < 1).mean(), (factors == 1).mean()
    np.testing.assert_allclose(found, (0.2, 0.7, 0.1), atol=0.04)
    assert factors.min() < 0.16
    assert factors.max() > 1.49


def test_decimation_keeps_the_grid_of_cells() -> None:
    """A ramp is sampled at the centre of each cell: no half-pixel shift."""
    ramp = np.ascontiguousarray(np.broadcast_to(np.arange(0, 240, 2, np.uint8)[None, :, None], (120, 120, 3)))
    out, _ = run(Decimate(scale=4, sigma=(1.0, 1.0)), ramp)
    np.testing.assert_allclose(out[15, 5:25, 0], np.arange(5, 25) * 8 + 3, atol=1)
    plain, _ = run(Decimate(scale=4, sigma=(0.0, 0.0)), ramp)
    assert plain.shape == (30, 30, 3)


def test_area_averages_and_nearest_takes_one() -> None:
    picture = photo(64)
    area, _ = run(Resize(scale=4, methods=("area",)), picture)
    np.testing.assert_allclose(area, picture.reshape(16, 4, 16, 4, 3).mean((1, 3)), atol=0.51)
    nearest, _ = run(Resize(scale=4, methods=("nearest",)), picture)
    np.testing.assert_array_equal(nearest, picture[::4, ::4])


# Masks


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    kind=st.sampled_from(["box", "strokes", "irregular"]),
    ratio=st.floats(0, 1),
    picture_px=st.sampled_from([0, 16, 40, 200]),
    seed=st.integers(0, 999),
)
def test_a_mask_misses_exactly_the_ratio(
    height: int, width: int, kind: MaskKind, ratio: float, picture_px: int, seed: int
) -> None:
    operator = Mask(kinds=(kind,), ratio=(ratio, ratio), picture_px=picture_px)
    mask = mask_of(operator, (height, width), Chain(rng(seed)).next("mask"))
    assert mask.shape == (height, width, 1)
    assert set(np.unique(mask)) <= {0, 255}
    assert np.count_nonzero(mask) == round(ratio * height * width)


def test_ratios_of_masks_fill_their_bounds_and_kinds_differ() -> None:
    operator, ratios, kinds = Mask(ratio=(0.2, 0.5)), [], set()
    for seed in range(150):
        draws = Chain(rng(seed)).next("mask")
        mask = mask_of(operator, (64, 64), draws)
        ratios.append((mask > 0).mean())
        kinds.add(draws.made["kind"])
    assert 0.199 <= min(ratios) < 0.22 < 0.48 < max(ratios) <= 0.501
    assert np.mean(ratios) == pytest.approx(0.35, abs=0.025)
    assert kinds == {"box", "strokes", "irregular"}
    straight, blobs = (
        mask_of(Mask(kinds=(kind,), ratio=(0.3, 0.3)), (64, 64), Chain(rng(1)).next("mask"))[..., 0] > 0
        for kind in ("box", "irregular")
    )
    edges = [np.count_nonzero(m[1:] != m[:-1]) + np.count_nonzero(m[:, 1:] != m[:, :-1]) for m in (straight, blobs)]
    assert edges[0] < edges[1]


def test_many_small_holes_cost_what_their_pixels_cost() -> None:
    for kind in ("box", "strokes"):
        operator = Mask(kinds=(kind,), ratio=(0.2, 0.2), picture_px=96)  # type: ignore[arg-type]
        spent = time.process_time()
        mask_of(operator, (1500, 2000), Chain(rng(1)).next("mask"))
        assert time.process_time() - spent < 5.0, "looking at the whole picture for every hole takes minutes"


@pytest.mark.parametrize("kind", ["box", "strokes", "irregular"])
def test_a_larger_picture_has_more_holes_not_larger_ones_where_that_is_asked_for(kind: MaskKind) -> None:
    def furthest(side: int, picture_px: int) -> float:
        """From the middle of a hole to what is known, px: mean over draws."""
        operator = Mask(kinds=(kind,), ratio=(0.2, 0.2), picture_px=picture_px)
        masks = [mask_of(operator, (side, side), Chain(rng(seed)).next("mask")) for seed in range(12)]
        return float(np.mean([cv2.distanceTransform(mask, cv2.DIST_L2, 5).max() for mask in masks]))

    crop = furthest(64, 64)
    assert furthest(64, 0) == crop
    assert furthest(256, 64) < 2.2 * crop  # of more holes the largest is a little larger
    assert furthest(256, 0) > 3 * crop  # negative control


# All of them


PLAIN: list[Operator] = [
    Decimate(scale=2, sigma=(0.2, 1.0)),
    GaussianBlur(sigma=(0.2, 3.0)),
    Sinc(),
    MotionBlur(length=(2.0, 9.0)),
    Defocus(radius=(1.0, 4.0)),
    GaussianNoise(sigma=(1.0, 30.0), gray=0.3, correlated=0.3),
    PoissonNoise(scale=(0.05, 3.0), gray=0.4),
    SpeckleNoise(sigma=(1.0, 30.0), gray=0.4),
    SaltPepper(amount=(0.01, 0.1)),
    Jpeg(quality=(30, 95), sampling=("420", "444")),
    Webp(quality=(30, 95)),
    Mask(),
]


@pytest.mark.parametrize("operator", PLAIN, ids=lambda o: o.name)
def test_one_generator_one_picture_and_its_record_replays_it(operator: Operator) -> None:
    picture = photo(40)
    before = picture.copy()
    first, drawn = apply((operator,), picture, rng(3))
    np.testing.assert_array_equal(first, apply((operator,), picture, rng(3))[0])
    np.testing.assert_array_equal(first, replay((operator,), picture, drawn))
    others = [apply((operator,), picture, rng(seed))[0] for seed in (4, 5, 6)]
    assert any(not np.array_equal(first, other) for other in others)
    np.testing.assert_array_equal(picture, before)  # what it is given stays as it is
    changed = [{**drawn[0], "seed": 1}] if "seed" in drawn[0] else []
    assert all(not np.array_equal(first, replay((operator,), picture, [record])) for record in changed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: GaussianBlur(sigma=(2, 1)), r"gaussian_blur\.sigma=\(2\.0, 1\.0\): must be \(low, high\)"),
        (lambda: GaussianBlur(sigma=(1, 2), sizes=(8,)), r"gaussian_blur\.sizes=\(8,\): must be odd"),
        (lambda: GaussianBlur(sigma=(1, 2), beta=(2, 4)), r"gaussian_blur\.beta"),
        (lambda: Sinc(cutoff=(1, 4)), r"sinc\.cutoff=\(1\.0, 4\.0\): .*<= 3\.14"),
        (lambda: GaussianNoise(sigma=(1, 2), gray=0.7, correlated=0.6), r"gaussian_noise\.correlated=0\.6"),
        (lambda: PoissonNoise(scale=(1, 2), gray=2), r"poisson_noise\.gray=2\.0: must be a probability"),
        (lambda: Jpeg(quality=(0, 90)), r"jpeg\.quality"),
        (lambda: RandomResize(probabilities=(0, 0, 0), factor=(0.5, 2)), r"random_resize\.probabilities"),
        (lambda: RandomResize(probabilities=(1, 1, 1), factor=(1.5, 2)), r"random_resize\.factor"),
        (lambda: Shrink(ratio=(0.5, 2)), r"shrink\.ratio"),
        (lambda: Resize(scale=0), r"resize\.scale=0"),
        (lambda: Mask(ratio=(0.2, 1.2)), r"mask\.ratio"),
        (lambda: SaltPepper(amount=(0, 2)), r"salt_pepper\.amount"),
    ],
)
def test_mistakes_are_one_line(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
