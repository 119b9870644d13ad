"""Distances of one picture, or one vector, from another, as papers report them. Pictures are u8[h, w, 3], RGB."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from rayscale.errors import ConfigError
from rayscale.imaging import F32, U8

F64 = NDArray[np.float64]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # MS-SSIM's exponents, finest first (they sum to 1.0001, as printed)
_LEAST_MS_SSIM_PX = (_WINDOW - 1) * 2 ** (len(_SCALES) - 1) + 1  # the window still fits into the coarsest scale
_ROWS = 2048  # of descriptors at once
_SAME = 1e-13  # of the squared lengths: less is the rounding of a matrix product, not a distance


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
    luminance, structure = _similarity(*_planes(a, b, border_px, luma_only, least_px=_WINDOW))
    return float(np.mean(luminance * structure))


def ms_ssim(a: U8, b: U8, *, border_px: int = 0, luma_only: bool = False) -> float:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik 2003): five scales, halved by 2x2 means; sides of 161 px or more.

    An odd side repeats its last pixel before it is halved, a negative mean structure counts as 0; channels are
    averaged last. border_px, luma_only and Raises: as `ssim`.
    """
    x, y = _planes(a, b, border_px, luma_only, least_px=_LEAST_MS_SSIM_PX)
    value = np.float64(1.0)
    for i, exponent in enumerate(_SCALES):
        luminance, structure = _similarity(x, y)
        seen = structure if i + 1 < len(_SCALES) else luminance * structure
        value = value * np.maximum(np.mean(seen, axis=(0, 1)), 0.0) ** exponent  # one value a channel
        x, y = _halve(x), _halve(y)
    return float(np.mean(value))


def perceptual(a: Sequence[F32], b: Sequence[F32]) -> F64:
    """Distance of pictures by the maps of a feature net, f32[n, c, h, w] a layer: f64[n], 0 for equal pictures.

    LPIPS (Zhang et al. 2018, arXiv 1801.03924) with all weights 1: vectors of length 1 at every position, squared
    differences, mean over positions, sum over layers. No learnt weights, so its values are not LPIPS's.

    Raises: ConfigError for unlike or no maps.
    """
    if not a or [x.shape for x in a] != [y.shape for y in b]:
        raise ConfigError("maps", f"{[x.shape for x in a]} and {[y.shape for y in b]}", "must be alike", "use one net")
    layers = [np.square(_unit(x) - _unit(y)).sum(axis=1).mean(axis=(1, 2)) for x, y in zip(a, b, strict=True)]
    return np.asarray(np.sum(layers, axis=0))


def euclidean(a: F64, b: F64) -> F64:
    """Distance of every row of f64[n, d] from every row of f64[m, d]: f64[n, m], to 3e-7 of the rows' spread.

    Raises: ConfigError for unlike widths.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ConfigError("vectors", f"{a.shape} and {b.shape}", "must be [n, d] and [m, d]", "use one feature net")
    centre = b.mean(axis=0, dtype=np.float64)  # the nearer the origin, the less the products below round off
    x, y = a - centre, b - centre
    lengths = np.square(x).sum(1)[:, None] + np.square(y).sum(1)
    squared = lengths - 2 * (x @ y.T)
    squared[squared < _SAME * lengths] = 0.0
    return np.asarray(np.sqrt(squared))


def mahalanobis(vectors: F64, mean: F64, covariance: F64) -> F64:
    """Distance of each row of f64[n, d] from a Gaussian, in its standard deviations: f64[n] (Mahalanobis 1936).

    Raises: ConfigError where the covariance is not positive definite (fewer samples than dimensions, say).
    """
    try:
        root = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        rule = "must be positive definite"
        raise ConfigError("covariance", f"{covariance.shape}", rule, "fit it to more samples than dimensions") from None
    return np.asarray(np.linalg.norm(np.linalg.solve(root, (vectors - mean).T), axis=0))


def sift_match_ratio(picture: U8, truth: U8, *, ratio: float = 0.8) -> float:
    """Share of truth's SIFT key points (Lowe 2004) found again in `picture`, wherever they lie; NaN if it has none.

    Found again: nearest neighbours of each other, and nearer than `ratio` times truth's second nearest. The two may
    be of different sizes.
    """
    sift = cv2.SIFT.create()
    found, wanted = (sift.detectAndCompute(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), None)[1] for p in (picture, truth))
    if wanted is None:
        return float("nan")
    return 0.0 if found is None else len(_mutual_matches(wanted, found, ratio)) / len(wanted)


def _mutual_matches(a: F32, b: F32, ratio: float) -> list[tuple[int, int]]:
    """(row of a, row of b). In blocks: a large photo has so many key points that all distances fill the memory."""
    back, back_distance = np.zeros(len(b), np.intp), np.full(len(b), np.inf)
    forth: list[tuple[int, int]] = []
    for start in range(0, len(a), _ROWS):
        distances = euclidean(a[start : start + _ROWS].astype(np.float64), b.astype(np.float64))
        rows, columns = (np.arange(size) for size in distances.shape)
        best = distances.argmin(axis=0)
        nearer = distances[best, columns] < back_distance
        back[nearer], back_distance[nearer] = start + best[nearer], distances[best, columns][nearer]
        chosen = distances.argmin(axis=1)
        nearest = distances[rows, chosen]
        distances[rows, chosen] = np.inf
        clear = nearest < ratio * distances.min(axis=1)
        forth += [(start + int(i), int(chosen[i])) for i in np.flatnonzero(clear)]
    return [(i, j) for i, j in forth if back[j] == i]


def _similarity(x: F64, y: F64) -> tuple[F64, F64]:
    """SSIM's luminance and contrast-structure maps, where the window lies inside."""
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return luminance, structure


def _halve(plane: F64) -> F64:
    """Means of 2x2 pixels, f64[h, w(, c)] to half its sides, rounded up."""
    odd = [(0, side % 2) for side in plane.shape[:2]] + [(0, 0)] * (plane.ndim - 2)
    x = np.pad(plane, odd, mode="edge")
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def _unit(maps: F32) -> F64:
    """f32[n, c, h, w] with vectors of length 1 over the channels; zero stays zero."""
    x = maps.astype(np.float64)
    return np.asarray(x / (np.sqrt(np.square(x).sum(axis=1, keepdims=True)) + 1e-10))


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
