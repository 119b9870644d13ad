"""PSNR and SSIM: equal to scikit-image's, and to what papers print for the classic sets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rayscale.data.degrade import resize_bicubic
from rayscale.errors import ConfigError
from rayscale.imaging import U8, decode_rgb
from rayscale.metrics import F64, luma, psnr, ssim


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
