"""One training sample, cut from a photo: a pure function of (photo, settings, generator)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from rayscale.data import augment
from rayscale.data.degrade import degrade
from rayscale.data.draws import Chain, Drawn
from rayscale.data.extent import BLOCK_PX, frames_of, has_codec, margin_px, mask_in
from rayscale.data.plan import DataSettings
from rayscale.data.shards import Photos
from rayscale.errors import ConfigError
from rayscale.imaging import U8


def check_sizes(photos: Photos, settings: DataSettings) -> None:
    """Raises: ConfigError where a photo of the split is smaller than a crop."""
    sides = np.minimum(np.asarray(photos.widths), np.asarray(photos.heights))
    scale = settings.scale
    name, least = ("fit_px", settings.fit_px) if settings.fit_px else ("hr_crop_px", settings.hr_crop_px)
    if len(sides) and int(sides.min()) // scale * scale < least:
        worst = int(sides.argmin())
        raise ConfigError(
            f"data.{name}",
            least,
            f"exceeds the smallest photo, {photos.keys[worst]} with {int(sides.min())} px",
            f"lower it, or pack again with --min-side {least}",
        )


def fit(photo: U8, fit_px: int) -> U8:
    """The photo, shrunk (pixel areas averaged) so that its shorter side is `fit_px`; 0 leaves it as it is."""
    height, width = photo.shape[:2]
    if not fit_px or min(height, width) == fit_px:
        return photo
    ratio = fit_px / min(height, width)
    size = max(fit_px, round(width * ratio)), max(fit_px, round(height * ratio))
    return np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), np.uint8)


def sample_shapes(settings: DataSettings) -> dict[str, tuple[int, ...]]:
    """The tensors of one sample: u8, and "label" an i64."""
    side, frames = settings.hr_crop_px // settings.scale, frames_of(settings.degradation)
    lr: tuple[int, ...] = (frames, side, side, 3) if frames else (side, side, 3)
    mask: dict[str, tuple[int, ...]] = {"mask": (side, side, 1)} if mask_in(settings.degradation) else {}
    found: dict[str, tuple[int, ...]] = {"lr": lr, **mask, "hr": (settings.hr_crop_px, settings.hr_crop_px, 3)}
    return {name: {**found, "label": ()}[name] for name in settings.tensors or found}


def dtype_of(name: str) -> type[np.uint8] | type[np.int64]:
    """Of the tensor with this name."""
    return np.int64 if name == "label" else np.uint8


def cut(photo: U8, settings: DataSettings, rng: np.random.Generator) -> tuple[dict[str, U8], Drawn]:
    """One training sample of a decoded photo u8[h, w, 3]: its pictures by name, and what was drawn, in order.

    The crop is degraded with the photo's own pixels around it, so no crop's border leaks into training; where the
    degradation reads no further than its margin, lr is what cutting the degraded photo gives.
    """
    chain = Chain(rng)
    return _cut(photo, settings, chain), chain.drawn


def recut(photo: U8, settings: DataSettings, drawn: Sequence[Mapping[str, Any]]) -> dict[str, U8]:
    """The tensors that `cut` gave when it drew that. Raises: ConfigError where other settings drew it."""
    return _cut(photo, settings, Chain(None, drawn))


def _cut(photo: U8, settings: DataSettings, chain: Chain) -> dict[str, U8]:
    scale, side = settings.scale, settings.hr_crop_px
    rows, columns = photo.shape[0] // scale, photo.shape[1] // scale  # the LR grid, anchored at the top left
    lr_side = side // scale
    draws = chain.next("crop")
    top, left = draws.integer("top", 0, rows - lr_side), draws.integer("left", 0, columns - lr_side)
    margin = margin_px(settings.degradation) // scale  # in LR pixels
    y0, x0 = max(0, top - margin), max(0, left - margin)
    if has_codec(settings.degradation):  # blocks as the photo has them, so at every place in a crop
        y0, x0 = y0 // BLOCK_PX * BLOCK_PX, x0 // BLOCK_PX * BLOCK_PX
    y1, x1 = min(rows, top + lr_side + margin), min(columns, left + lr_side + margin)
    centre = (left + lr_side / 2) * scale - 0.5, (top + lr_side / 2) * scale - 0.5  # x, y in the photo
    wide = _window(photo, settings, chain, (y0 * scale, x0 * scale, y1 * scale, x1 * scale), centre)
    keep = slice(top - y0, top - y0 + lr_side), slice(left - x0, left - x0 + lr_side)
    tensors = degrade(settings.degradation, wide, chain, keep)
    rows_hr, columns_hr = (slice(s.start * scale, s.stop * scale) for s in keep)
    turned = augment.turn(settings.augment, settings.flips, {**tensors, "hr": wide[rows_hr, columns_hr]}, chain)
    return {name: turned[name] for name in settings.tensors or turned if name in turned}


def _window(
    photo: U8, settings: DataSettings, chain: Chain, box: tuple[int, int, int, int], centre: tuple[float, float]
) -> U8:
    """The crop with its margin, augmented. box: top, left, bottom, right in the photo."""
    top, left, bottom, right = box
    wide = photo[top:bottom, left:right]
    if any(augment.is_geometry(a) for a in settings.augment):
        affine = augment.place(settings.augment, chain, centre)
        if not np.array_equal(affine, np.eye(2, 3)):
            wide = augment.window(photo, affine, left, top, right - left, bottom - top)
    return augment.colour(settings.augment, wide, chain)
