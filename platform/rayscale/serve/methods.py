"""Classical methods behind the same routes, to compare models with, and the comparison of two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import cv2
import numpy as np

from rayscale import metrics
from rayscale.errors import ConfigError
from rayscale.imaging import U8

Upscaling = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Restoring = Literal[
    "unchanged", "mean", "median", "gaussian", "bilateral", "nonlocal_means",
    "unsharp", "wiener_gaussian", "wiener_disc", "telea", "navier_stokes",
]  # fmt: skip
Merging = Literal["bicubic", "shift_and_add"]
MASKED = frozenset({"telea", "navier_stokes"})  # they fill what a mask marks

_PROBLEMS: tuple[Literal["denoise", "deblur", "inpaint"], ...] = ("denoise", "deblur", "inpaint")


def load() -> None:
    """Import what methods need, before they are timed: 0.5 s with scikit-image; who never compares does not pay it."""
    from rayscale import classical  # noqa: F401


def filtered(rgb: U8, missing: U8 | None, method: str, scale: int) -> U8:
    """u8[h, w, 3] by a method's default settings: enlarged by `scale`, or of the same size. Seconds for megapixels."""
    from rayscale import classical

    if method in get_args(Upscaling):
        return classical.upscale(rgb, scale=scale, kind=method)  # type: ignore[arg-type]
    found = next(m for problem in _PROBLEMS for m in classical.methods(problem) if m.name == method)
    return found.default()(rgb) if missing is None else found.default()(rgb, missing[..., None])


def merged(frames: U8, method: str, scale: int) -> U8:
    """u8[h, w, 3 T] -> u8[h * scale, w * scale, 3], of which the first frame is the reference."""
    from rayscale import classical

    found = next(m for m in classical.methods("burst", scale) if m.name == method)
    height, width, channels = frames.shape
    return found.default()(np.ascontiguousarray(np.moveaxis(frames.reshape(height, width, channels // 3, 3), 2, 0)))


Measure = Literal["mse", "psnr", "euclidean", "ssim", "ms_ssim", "sift", "cosine"]
SIZED: tuple[Measure, ...] = ("mse", "psnr", "euclidean", "ssim", "ms_ssim")  # of two pictures of one size
LEAST_PX = {"ssim": 11, "ms_ssim": 161}  # a side
_SIFT_PX = 640  # the longer side: key points grow with the area, and their matches with its square


def applicable(a: tuple[int, int], b: tuple[int, int]) -> tuple[Measure, ...]:
    """What can be said of two pictures of such sides, all that need no model."""
    fitting = tuple(m for m in SIZED if a == b and min(a) >= LEAST_PX.get(m, 1))
    return (*fitting, "sift")


def compared(a: U8, b: U8, measures: Sequence[Measure]) -> dict[str, float | None]:
    """u8[h, w, 3] each, over all channels; None for what is infinite or not there. Raises: ConfigError."""
    found: dict[str, float | None] = {}
    for name in measures:
        if name in SIZED and a.shape != b.shape:
            shown = " and ".join(f"{p.shape[1]}x{p.shape[0]}" for p in (a, b))
            raise ConfigError(name, shown, "compares pictures of one size", "resize one, or ask for sift or cosine")
        if name in ("mse", "euclidean"):
            squares = float(np.square(a.astype(np.float64) - b).sum())
            value = squares / a.size if name == "mse" else squares**0.5
        elif name == "sift":
            value = metrics.sift_match_ratio(_at_most(b), _at_most(a))
        elif name != "cosine":
            value = getattr(metrics, name)(a, b)
        else:
            continue
        found[name] = value if np.isfinite(value) else None
    return found


def _at_most(picture: U8) -> U8:
    factor = _SIFT_PX / max(picture.shape[:2])
    if factor >= 1:
        return picture
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
