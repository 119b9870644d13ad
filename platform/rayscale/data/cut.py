"""One training sample, cut from a photo: a pure function of (photo, settings, generator)."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayscale.data.degrade import apply, margin_px
from rayscale.data.plan import DataSettings
from rayscale.data.shards import Photos
from rayscale.errors import ConfigError
from rayscale.imaging import U8


def check_sizes(photos: Photos, settings: DataSettings) -> None:
    """Raises: ConfigError where a photo of the split is smaller than a crop."""
    sides = np.minimum(np.asarray(photos.widths), np.asarray(photos.heights))
    scale = settings.scale
    if len(sides) and int(sides.min()) // scale * scale < settings.hr_crop_px:
        worst = int(sides.argmin())
        raise ConfigError(
            "data.hr_crop_px",
            settings.hr_crop_px,
            f"exceeds the smallest photo, {photos.keys[worst]} with {int(sides.min())} px",
            f"lower it, or pack again with --min-side {settings.hr_crop_px}",
        )


def cut(
    photo: U8, settings: DataSettings, rng: np.random.Generator
) -> tuple[dict[str, U8], tuple[dict[str, Any], ...]]:
    """One training sample of a decoded photo u8[h, w, 3]: its tensors by name, and what was drawn, in order.

    The crop is degraded with the photo's own pixels around it, so lr is what cutting the degraded photo gives,
    and no crop's border leaks into training.
    """
    scale, side = settings.scale, settings.hr_crop_px
    rows, columns = photo.shape[0] // scale, photo.shape[1] // scale  # the LR grid, anchored at the top left
    lr_side = side // scale
    top = int(rng.integers(0, rows - lr_side + 1))
    left = int(rng.integers(0, columns - lr_side + 1))
    margin = -(-margin_px(settings.degradation) // scale)  # in LR pixels
    y0, x0 = max(0, top - margin), max(0, left - margin)
    y1, x1 = min(rows, top + lr_side + margin), min(columns, left + lr_side + margin)
    wide, drawn = apply(settings.degradation, photo[y0 * scale : y1 * scale, x0 * scale : x1 * scale], rng)
    lr = wide[top - y0 : top - y0 + lr_side, left - x0 : left - x0 + lr_side]
    hr = photo[top * scale : (top + lr_side) * scale, left * scale : (left + lr_side) * scale]
    if settings.flips:
        turns, mirror = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
        lr, hr = (np.rot90(p[:, ::-1] if mirror else p, turns) for p in (lr, hr))
    return {"lr": lr, "hr": hr}, drawn
