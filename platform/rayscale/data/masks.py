"""Missing pixels for inpainting. Each kind covers exactly the part of the picture that it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from rayscale.data.draws import Draws
from rayscale.data.operators import Mask, MaskKind
from rayscale.imaging import F32, U8

Shape = tuple[slice, slice, U8]
"""Rows and columns of a window in the mask, and what is missing in it."""


def mask_of(operator: Mask, sides: tuple[int, int], draws: Draws) -> U8:
    """u8[h, w, 1], 255 where pixels are missing."""
    kind = draws.pick("kind", operator.kinds)
    missing = round(draws.uniform("ratio", *operator.ratio) * sides[0] * sides[1])
    shrink = min(1.0, operator.picture_px / max(sides)) if operator.picture_px else 1.0
    return _KINDS[kind](sides, missing, shrink, draws.field())[..., None]


def _boxes(sides: tuple[int, int], missing: int, shrink: float, rng: np.random.Generator) -> U8:
    return _fill(sides, missing, _box_shapes(sides, missing * shrink**2, rng))


def _box_shapes(sides: tuple[int, int], missing: float, rng: np.random.Generator) -> Iterator[Shape]:
    count = int(rng.integers(1, 5))
    while True:
        area = missing / count * rng.uniform(0.5, 1.5)
        aspect = math.exp(rng.uniform(-0.7, 0.7))
        height, width = (min(max(1, round(side)), most) for side, most in zip(
            (math.sqrt(area * aspect), math.sqrt(area / aspect)), sides, strict=True))  # fmt: skip
        top, left = int(rng.integers(0, sides[0] - height + 1)), int(rng.integers(0, sides[1] - width + 1))
        yield slice(top, top + height), slice(left, left + width), np.full((height, width), 255, np.uint8)


def _strokes(sides: tuple[int, int], missing: int, shrink: float, rng: np.random.Generator) -> U8:
    return _fill(sides, missing, _stroke_shapes(sides, max(sides) * shrink, rng))


def _stroke_shapes(sides: tuple[int, int], side: float, rng: np.random.Generator) -> Iterator[Shape]:
    """Free-form brush strokes: a few straight pieces with round joints, each turning away from the last."""
    while True:
        width = max(1, round(side * rng.uniform(0.03, 0.1)))
        x, y = rng.uniform(0, sides[1]), rng.uniform(0, sides[0])
        angle = rng.uniform(0, 2 * math.pi)
        for turn in rng.uniform(-1.2, 1.2, int(rng.integers(3, 9))):
            angle += turn
            length = side * rng.uniform(0.05, 0.2)
            end = np.clip(x + length * math.cos(angle), 0, sides[1]), np.clip(y + length * math.sin(angle), 0, sides[0])
            corners = np.round(((x, y), end)).astype(int)
            left, top = np.maximum(corners.min(0) - width, 0)
            right, bottom = np.minimum(corners.max(0) + width + 1, sides[::-1])
            shape = np.zeros((bottom - top, right - left), np.uint8)
            (x0, y0), (x1, y1) = (corners - (left, top)).tolist()
            cv2.line(shape, (x0, y0), (x1, y1), 255, width)
            cv2.circle(shape, (x1, y1), width // 2, 255, -1)
            x, y = end
            yield slice(top, bottom), slice(left, right), shape


def _irregular(sides: tuple[int, int], missing: int, shrink: float, rng: np.random.Generator) -> U8:
    """Blobs: the highest part of a smooth random field."""
    field: F32 = rng.standard_normal(sides, np.float32)
    smooth = cv2.GaussianBlur(field, (0, 0), max(1.0, shrink * max(sides) * float(rng.uniform(0.02, 0.08))))
    mask = np.zeros(sides, np.uint8)
    mask.flat[np.argsort(smooth, axis=None, kind="stable")[smooth.size - missing :]] = 255
    return mask


def _fill(sides: tuple[int, int], missing: int, shapes: Iterator[Shape]) -> U8:
    """Lay shapes over each other until `missing` pixels are covered; the last one is cut off where they are.

    Each is looked at in its own window: of small holes a large picture has thousands.
    """
    mask, covered = np.zeros(sides, np.uint8), 0
    while covered < missing:
        rows, columns, shape = next(shapes)
        window = mask[rows, columns]
        y, x = np.nonzero(shape & ~window)
        y, x = y[: missing - covered], x[: missing - covered]
        window[y, x] = 255
        covered += len(y)
    return mask


_KINDS: dict[MaskKind, Callable[[tuple[int, int], int, float, np.random.Generator], U8]] = {
    "box": _boxes,
    "strokes": _strokes,
    "irregular": _irregular,
}
