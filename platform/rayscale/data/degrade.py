"""How low resolution is made: pure functions of (high-resolution picture, generator).

A degradation is a tuple of operators, applied in order. Each operator is a frozen dataclass that is its own
config; `name` tells two operators with equal fields apart in JSON and digests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayscale.errors import ConfigError
from rayscale.imaging import U8

Border = Literal["replicate", "mirror"]


@dataclass(frozen=True)
class Bicubic:
    """MATLAB's antialiased bicubic, `scale` times smaller. Draws nothing.

    border: "replicate" as the classic test sets were made, "mirror" as newer MATLAB and BasicSR do.
    """

    scale: int
    border: Border = "replicate"
    name: Literal["bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ConfigError("bicubic.scale", self.scale, "must be at least 1", "try 2")
        if self.border not in ("replicate", "mirror"):
            raise ConfigError("bicubic.border", self.border, "must be replicate or mirror", "choose one of them")


Operator = Bicubic
"""The closed union of all operators."""


def apply(operators: Sequence[Operator], hr_u8: U8, rng: np.random.Generator) -> tuple[U8, tuple[dict[str, Any], ...]]:
    """Degrade u8[h, w, 3] to u8[h / scale, w / scale, 3]; also what each operator drew from `rng`, in order.

    Raises: ConfigError where a side is no multiple of `scale_of(operators)`.
    """
    height, width = hr_u8.shape[:2]
    scale = scale_of(operators)
    if height % scale or width % scale:
        raise ConfigError("hr", f"{width}x{height}", f"sides must be multiples of {scale}", "crop the picture first")
    lr = hr_u8
    drawn: list[dict[str, Any]] = []
    for operator in operators:
        lr = resize_bicubic(lr, lr.shape[0] // operator.scale, lr.shape[1] // operator.scale, border=operator.border)
        drawn.append({"name": operator.name})
    return lr, tuple(drawn)


def scale_of(operators: Sequence[Operator]) -> int:
    """High-resolution side / low-resolution side of the whole chain."""
    return math.prod(operator.scale for operator in operators)


def margin_px(operators: Sequence[Operator]) -> int:
    """High-resolution pixels around a crop that its degradation reads; a multiple of `scale_of(operators)`."""
    margin, scale = 0, 1
    for operator in operators:
        if operator.scale > 1:
            margin += 2 * operator.scale * scale  # the kernel reaches 2 of the smaller picture's pixels
        scale *= operator.scale
    return -(-margin // scale) * scale


def resize_bicubic(hwc_u8: U8, height: int, width: int, *, border: Border) -> U8:
    """MATLAB's `imresize(x, [height width], "bicubic")` on u8[h, w, c], to the bit, smaller or larger.

    Keys' kernel (a = -0.5), stretched where the side shrinks; the side that shrinks most goes first (rows where
    they are equal), and MATLAB rounds to uint8 between the two passes. An exact half is rounded up whatever the
    order in which a CPU adds the products up, so results are the same on every machine.

    Raises: ConfigError for an empty target.
    """
    if height < 1 or width < 1:
        raise ConfigError("size", f"{width}x{height}", "sides must be at least 1 px", "ask for a larger picture")
    columns_first = width * hwc_u8.shape[0] < height * hwc_u8.shape[1]
    result = hwc_u8
    for axis in (1, 0) if columns_first else (0, 1):
        turned = np.ascontiguousarray(result.swapaxes(0, axis))
        result = _resize_rows(turned, (height, width)[axis], border).swapaxes(0, axis)
    return np.ascontiguousarray(result)


class _Block(NamedTuple):
    """Some neighbouring output rows as a product: out[first:last] = weights @ in[low:high]."""

    first: int
    last: int
    low: int
    high: int
    weights: NDArray[np.floating[Any]]  # [last - first, high - low]


_BLOCK_ROWS = 8  # mostly band, few zeros; and, for a crop, a product so small that BLAS starts no threads for it


def _resize_rows(x: U8, target: int, border: Border) -> U8:
    blocks = _blocks(x.shape[0], target, border)
    dtype = blocks[0].weights.dtype
    rows = x.reshape(x.shape[0], -1).astype(dtype)
    out = np.empty((target, rows.shape[1]), dtype)
    for block in blocks:
        np.matmul(block.weights, rows[block.low : block.high], out=out[block.first : block.last])
    out += dtype.type(0.5 + 1e-9)  # a half that came out as 0.49999999999997 is a half
    np.clip(out, 0, 255, out=out)
    return out.astype(np.uint8).reshape(target, *x.shape[1:])  # truncation: floor, as nothing is negative


@lru_cache(maxsize=256)
def _blocks(length: int, target: int, border: Border) -> tuple[_Block, ...]:
    weights, index = _taps(length, target, border)
    # float32 cannot go wrong at these ratios: for 2 and 4 all weights are multiples of 1/4096, so every sum is
    # exact; for 3 the true value is a multiple of 1/81, at least 1/162 away from a half.
    small, large = sorted((length, target))
    dtype = np.float32 if large in (small, 2 * small, 3 * small, 4 * small) else np.float64
    blocks = []
    for first in range(0, target, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, target)
        low, high = int(index[first:last].min()), int(index[first:last].max()) + 1
        dense = np.zeros((last - first, high - low))
        rows = np.arange(last - first)[:, None]
        np.add.at(dense, (rows, index[first:last] - low), weights[first:last])
        blocks.append(_Block(first, last, low, high, dense.astype(dtype)))
    return tuple(blocks)


def _taps(length: int, target: int, border: Border) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Weights and input rows of every output row, both [target, taps]; MATLAB's `contributions`, 0-based."""
    scale = target / length
    stretch = min(scale, 1.0)
    num_taps = math.ceil(4 / stretch) + 2
    centre = (np.arange(target) + 0.5) / scale - 0.5
    first = np.floor(centre - 2 / stretch).astype(np.intp)
    index = first[:, None] + np.arange(num_taps)
    weights = _keys_cubic((centre[:, None] - index) * stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    if border == "replicate":
        return weights, np.clip(index, 0, length - 1)
    folded = index % (2 * length)  # the picture, then itself reversed, and so on
    return weights, np.minimum(folded, 2 * length - 1 - folded)


def _keys_cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE TASSP 29, 1981)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
