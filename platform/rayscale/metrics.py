"""Quality of one picture against another, as papers report it. Pictures are u8[h, w, 3], RGB."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from rayscale.errors import ConfigError
from rayscale.imaging import U8

F64 = NDArray[np.float64]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(hwc_u8: U8) -> F64:
    """BT.601 luma with its offset, f64[h, w] in [16, 235], not rounded (MATLAB's rgb2ycbcr on doubles)."""
    return hwc_u8 @ (np.array([65.481, 128.553, 24.966]) / 255) + 16.0


def psnr(a: U8, b: U8, *, border_px: int = 0, luma_only: bool = False) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255; infinite for equal pictures.

    border_px: cut off every side first. luma_only: of `luma`, else over all three channels.
    Raises: ConfigError for unlike sizes, or where the border leaves nothing.
    """
    x, y = _planes(a, b, border_px, luma_only, least_px=1)
    error = float(np.mean(np.square(x - y)))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(a: U8, b: U8, *, border_px: int = 0, luma_only: bool = False) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window 11 px, sigma 1.5, mean over where it fits whole.

    border_px, luma_only and Raises: as `psnr`; without luma_only, the mean over the channels.
    """
    x, y = _planes(a, b, border_px, luma_only, least_px=_WINDOW)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return float(np.mean(luminance * structure))


def _planes(a: U8, b: U8, border_px: int, luma_only: bool, least_px: int) -> tuple[F64, F64]:
    if a.shape != b.shape or a.ndim != 3:
        raise ConfigError(
            "pictures", f"{a.shape} and {b.shape}", "both must be [h, w, 3] and alike", "crop or resize one"
        )
    left = min(a.shape[:2]) - 2 * border_px
    if border_px < 0 or left < least_px:
        raise ConfigError("border_px", border_px, f"leaves {left} px of a side, {least_px} are needed", "lower it")
    inner = slice(border_px, -border_px or None)
    x, y = (luma(p) if luma_only else p.astype(np.float64) for p in (a[inner, inner], b[inner, inner]))
    return x, y


def _blur(plane: F64) -> F64:
    """Gaussian window over f64[h, w(, c)], only where it lies inside."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    blurred: F64 = cv2.sepFilter2D(plane, cv2.CV_64F, kernel, kernel)
    inner = slice(_WINDOW // 2, -(_WINDOW // 2))
    return blurred[inner, inner]
