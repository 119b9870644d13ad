"""Pictures' and vectors' distances: equal to scikit-image's and SciPy's, and to what papers print for classic sets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate
from scipy.signal import convolve2d
from scipy.spatial.distance import cdist
from skimage.feature import match_descriptors
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rayscale import metrics
from rayscale.data.degrade import resize_bicubic
from rayscale.errors import ConfigError
from rayscale.imaging import U8, decode_rgb
from rayscale.metrics import (
    F64,
    _mutual_matches,
    euclidean,
    luma,
    mahalanobis,
    ms_ssim,
    perceptual,
    psnr,
    sift_match_ratio,
    ssim,
)


def pair(height: int = 70, width: int = 90, noise: float = 12.0) -> tuple[U8, U8]:
    """A real photo and a noisy copy."""
    photo = np.ascontiguousarray(skimage.data.chelsea()[100 : 100 + height, 150 : 150 + width])
    noisy = photo + np.random.default_rng(3).normal(0, noise, photo.shape)
    return photo, np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def skimage_ssim(a: U8 | F64, b: U8 | F64) -> float:
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(structural_similarity(a, b, channel_axis=2 if a.ndim == 3 else None, **how))


@pytest.mark.parametrize("border", [0, 1, 4])
@pytest.mark.parametrize("noise", [1.0, 12.0, 80.0])
def test_equal_to_scikit_image(border: int, noise: float) -> None:
    a, b = pair(noise=noise)
    inner = slice(border, -border or None)
    x, y = a[inner, inner], b[inner, inner]
    assert psnr(a, b, border_px=border) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-9)
    assert psnr(a, b, border_px=border, luma_only=True) == pytest.approx(
        peak_signal_noise_ratio(luma(x), luma(y), data_range=255), abs=1e-9
    )
    assert ssim(a, b, border_px=border) == pytest.approx(skimage_ssim(x, y), abs=1e-9)
    assert ssim(a, b, border_px=border, luma_only=True) == pytest.approx(skimage_ssim(luma(x), luma(y)), abs=1e-9)


def test_another_window_is_not_equal() -> None:
    a, b = pair()
    assert abs(ssim(a, b) - structural_similarity(a, b, data_range=255, channel_axis=2)) > 1e-3  # 7 px, uniform


def test_the_smallest_picture_of_ssim() -> None:
    a, b = pair(11, 11)
    assert ssim(a, b) == pytest.approx(skimage_ssim(a, b), abs=1e-9)


def test_luma_is_bt_601_with_its_offset() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-9)


def test_equal_pictures() -> None:
    a, b = pair()
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == 1.0
    assert ssim(a, a, luma_only=True) == 1.0
    assert psnr(a, b) < 40
    assert ssim(a, b) < 0.95


def test_the_border_is_cut() -> None:
    a, _ = pair()
    framed = a.copy()
    framed[:3], framed[-3:], framed[:, :3], framed[:, -3:] = 0, 0, 0, 0
    assert psnr(a, framed, border_px=3) == math.inf
    assert ssim(a, framed, border_px=3) == 1.0
    assert psnr(a, framed, border_px=2) < 40


def test_mistakes_are_named() -> None:
    a, b = pair()
    with pytest.raises(ConfigError, match=r"pictures=.*both must be"):
        psnr(a, b[:-1])
    with pytest.raises(ConfigError, match=r"border_px=35: leaves 0 px of a side, 1 are needed"):
        psnr(a, b, border_px=35)
    with pytest.raises(ConfigError, match=r"border_px=30: leaves 10 px of a side, 11 are needed"):
        ssim(a, b, border_px=30)
    with pytest.raises(ConfigError, match="border_px=-1"):
        psnr(a, b, border_px=-1)


@pytest.mark.parametrize(
    ("suite", "scale", "expected_db"),
    [("Set5", 2, 33.68), ("Set5", 3, 30.40), ("Set5", 4, 28.43), ("Set14", 2, 30.33), ("Set14", 4, 26.09)],
)
def test_bicubic_on_the_classic_sets(eval_data: Path, suite: str, scale: int, expected_db: float) -> None:
    ours, rounded = [], []
    for hr_path in sorted(eval_data.glob(f"{suite}/x{scale}/*_HR.png")):
        hr = decode_rgb(hr_path.read_bytes())
        lr = decode_rgb(hr_path.with_name(hr_path.name.replace("_HR", "_LR")).read_bytes())
        upscaled = resize_bicubic(lr, *hr.shape[:2], border="replicate")
        ours.append(psnr(upscaled, hr, border_px=scale, luma_only=True))
        inner = slice(scale, -scale)
        x, y = (np.rint(luma(p))[inner, inner] for p in (upscaled, hr))
        rounded.append(peak_signal_noise_ratio(y, x, data_range=255))
    # the figures were made by an upscaler that rounds once, not after each pass: worth up to 0.005 dB
    assert float(np.mean(ours)) == pytest.approx(expected_db, abs=0.01)
    assert float(np.mean(rounded)) < float(np.mean(ours)) - 0.003  # a rounded luma is another metric


def wangs_ms_ssim(x: F64, y: F64) -> float:
    """His ssim_mscale_new.m, line for line: 2-D window, 2x2 mean with mirrored border, every second pixel."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mu1, mu2 = (convolve2d(p, window, "valid") for p in (x, y))
        s1, s2, s12 = (
            convolve2d(p, window, "valid") - m for p, m in ((x * x, mu1**2), (y * y, mu2**2), (x * y, mu1 * mu2))
        )
        cs = (2 * s12 + c2) / (s1 + s2 + c2)
        value *= np.mean(cs if scale < 4 else cs * (2 * mu1 * mu2 + c1) / (mu1**2 + mu2**2 + c1)) ** weight
        x, y = (correlate(p, np.full((2, 2), 0.25), mode="reflect", origin=-1)[::2, ::2] for p in (x, y))
    return float(value)


@pytest.mark.parametrize(("height", "width"), [(176, 192), (161, 163), (201, 230)])
def test_ms_ssim_equals_a_direct_implementation(height: int, width: int) -> None:
    photo = np.ascontiguousarray(skimage.data.chelsea()[:height, 100 : 100 + width])
    noisy = np.clip(photo + np.random.default_rng(1).normal(0, 40, photo.shape), 0, 255).astype(np.uint8)
    x, y = photo.astype(np.float64), noisy.astype(np.float64)
    channels = [wangs_ms_ssim(x[..., c], y[..., c]) for c in range(3)]
    assert ms_ssim(photo, noisy) == pytest.approx(np.mean(channels), abs=1e-9)
    assert ms_ssim(photo, noisy, luma_only=True) == pytest.approx(wangs_ms_ssim(luma(photo), luma(noisy)), abs=1e-9)
    assert ms_ssim(photo, photo) == 1.0
    assert abs(ms_ssim(photo, noisy) - ssim(photo, noisy)) > 0.1  # another metric


def test_ms_ssim_of_flat_pictures_is_the_luminance_of_the_coarsest_scale() -> None:
    dark, light = (np.full((161, 170, 3), v, np.uint8) for v in (60, 180))
    c1 = 2.55**2
    luminance = (2 * 60 * 180 + c1) / (60**2 + 180**2 + c1)
    assert ms_ssim(dark, light) == pytest.approx(luminance**0.1333, abs=1e-12)
    assert ssim(dark, light) == pytest.approx(luminance, abs=1e-12)


def test_ms_ssim_of_opposite_structure_is_nought_and_of_small_pictures_refused() -> None:
    photo = np.ascontiguousarray(skimage.data.camera()[:176, :176, None].repeat(3, 2))
    assert ms_ssim(photo, 255 - photo) == 0.0
    with pytest.raises(ConfigError, match=r"leaves 160 px of a side, 161 are needed"):
        ms_ssim(photo[:160], photo[:160])


def test_euclidean_and_mahalanobis_equal_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(100, 3, (40, 17)), rng.normal(101, 2, (55, 17))
    np.testing.assert_allclose(euclidean(a, b), cdist(a, b), rtol=1e-9)
    covariance = np.cov(b, rowvar=False)
    expected = cdist(a, b.mean(0)[None], "mahalanobis", VI=np.linalg.inv(covariance))[:, 0]
    np.testing.assert_allclose(mahalanobis(a, b.mean(0), covariance), expected, rtol=1e-9)
    np.testing.assert_allclose(mahalanobis(a, b.mean(0), np.eye(17)), cdist(a, b.mean(0)[None])[:, 0], rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), d=st.integers(1, 12), far=st.floats(0, 1e4))
def test_euclidean_is_a_distance(seed: int, n: int, d: int, far: float) -> None:
    x = np.random.default_rng(seed).normal(far, 1, (n, d))
    found = euclidean(x, x)
    assert np.array_equal(np.diag(found), np.zeros(n))  # a copy is no distance away, whatever rounding says
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    assert (found[:, :, None] <= found[:, None, :] + found[None, :, :].transpose(0, 2, 1) + 1e-5).all()


def test_mahalanobis_does_not_move_with_the_units() -> None:
    x = np.random.default_rng(2).normal(size=(50, 4))
    units = np.diag([1.0, 10.0, 0.1, 1000.0])
    one, other = (mahalanobis(v, v.mean(0), np.cov(v, rowvar=False)) for v in (x, x @ units))
    np.testing.assert_allclose(one, other, rtol=1e-9)
    assert not np.allclose(euclidean(x, x), euclidean(x @ units, x @ units))  # negative control
    # tr of the identity: squared distances of a set from its own fit sum to (n - 1) d
    assert np.square(one).sum() == pytest.approx(49 * 4, rel=1e-9)


def test_sift_finds_a_turned_picture_and_no_other() -> None:
    cat, astronaut = skimage.data.chelsea(), skimage.data.astronaut()
    assert sift_match_ratio(cat, cat) == 1.0
    assert sift_match_ratio(np.ascontiguousarray(np.rot90(cat)), cat) > 0.9
    assert sift_match_ratio(np.ascontiguousarray(cat[::2, ::2]), cat) > 0.1
    assert sift_match_ratio(astronaut, cat) < 0.05
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert sift_match_ratio(flat, cat) == 0.0
    assert math.isnan(sift_match_ratio(cat, flat))


def test_sift_ratio_falls_with_the_blur() -> None:
    cat = skimage.data.chelsea()
    blurred = [resize_bicubic(resize_bicubic(cat, 300 // s, 450 // s, border="replicate"), 300, 450, border="replicate")
               for s in (2, 3, 6)]  # fmt: skip
    ratios = [sift_match_ratio(picture, cat) for picture in blurred]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3


def test_matching_equals_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    a = rng.random((60, 16), np.float32)
    b = np.concatenate([a[:40] + rng.normal(0, 0.05, (40, 16)), rng.random((30, 16))]).astype(np.float32)
    expected = match_descriptors(a, b, cross_check=True, max_ratio=0.8)
    assert _mutual_matches(a, b, 0.8) == [tuple(pair) for pair in expected.tolist()]
    assert 30 < len(expected) < 60
    monkeypatch.setattr(metrics, "_ROWS", 7)  # blocks are a matter of memory only
    assert _mutual_matches(a, b, 0.8) == [tuple(pair) for pair in expected.tolist()]
    assert len(_mutual_matches(a, b, 0.1)) < len(expected)


def test_perceptual_distance_is_of_directions() -> None:
    rng = np.random.default_rng(6)
    a, b = ([rng.random((2, c, 5, 6), np.float32) for c in (3, 8)] for _ in range(2))
    unit = [[m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps] for maps in (a, b)]
    # |u - v|^2 = 2 - 2 cos
    cosines = [2 - 2 * np.einsum("nchw,nchw->nhw", x, y).mean((1, 2)) for x, y in zip(*unit, strict=True)]
    np.testing.assert_allclose(perceptual(a, b), np.sum(cosines, axis=0), rtol=1e-5)
    np.testing.assert_allclose(perceptual(a, [7 * m for m in a]), 0, atol=1e-9)
    assert perceptual(a, b).shape == (2,)
    with pytest.raises(ConfigError, match=r"maps=.*must be alike"):
        perceptual(a, b[:1])


def test_mistakes_with_vectors_are_named() -> None:
    x = np.zeros((3, 4))
    with pytest.raises(ConfigError, match=r"vectors=\(3, 4\) and \(3, 3\)"):
        euclidean(x, x[:, :3])
    with pytest.raises(ConfigError, match=r"covariance=\(4, 4\): must be positive definite"):
        mahalanobis(x, x[0], np.zeros((4, 4)))
