"""Resizing: MATLAB's bicubic to the bit, and OpenCV's methods."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from rayscale.data.draws import Draws
from rayscale.data.kernels import convolve, gaussian
from rayscale.data.operators import Bicubic, Border, Decimate, Method, RandomResize, Resize, Shrink
from rayscale.errors import ConfigError
from rayscale.imaging import U8

_CV2: dict[Method, int] = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}


def resize(hwc_u8: U8, height: int, width: int, method: Method) -> U8:
    """u8[h, w, 3] to height x width, each at least 1."""
    sides = max(1, height), max(1, width)
    if hwc_u8.shape[:2] == sides:
        return hwc_u8
    resized: U8 = cv2.resize(np.ascontiguousarray(hwc_u8), sides[::-1], interpolation=_CV2[method])
    return resized


def bicubic(operator: Bicubic, picture: U8, draws: Draws) -> U8:
    """See `Bicubic`."""
    height, width = (max(1, side // operator.scale) for side in picture.shape[:2])
    return resize_bicubic(picture, height, width, border=operator.border)


def resize_exactly(operator: Resize, picture: U8, draws: Draws) -> U8:
    """See `Resize`."""
    method = draws.pick("method", operator.methods)
    return resize(picture, draws.origin[0] // operator.scale, draws.origin[1] // operator.scale, method)


def random_resize(operator: RandomResize, picture: U8, draws: Draws) -> U8:
    """See `RandomResize`."""
    way = draws.weighted("way", operator.probabilities)  # up, down, keep
    low, high = ((1.0, operator.factor[1]), (operator.factor[0], 1.0), (1.0, 1.0))[way]
    factor = draws.uniform("factor", low, high)
    method = draws.pick("method", operator.methods)
    height, width = (side / operator.scale for side in draws.origin) if operator.scale else picture.shape[:2]
    return resize(picture, int(height * factor), int(width * factor), method)


def shrink(operator: Shrink, picture: U8, draws: Draws) -> U8:
    """See `Shrink`."""
    ratio = draws.uniform("ratio", *operator.ratio)
    method = draws.pick("method", operator.methods)
    return resize(picture, int(picture.shape[0] / ratio), int(picture.shape[1] / ratio), method)


def decimate(operator: Decimate, picture: U8, draws: Draws) -> U8:
    """See `Decimate`."""
    sigma, scale = draws.uniform("sigma", *operator.sigma), operator.scale
    centre = (scale - 1) / 2  # of a cell, from its first pixel
    blurred = convolve(picture, gaussian(DECIMATE_SIZE, sigma, sigma, 0.0, centre=centre))
    height, width = (side // scale * scale for side in picture.shape[:2])
    return np.ascontiguousarray(blurred[:height:scale, :width:scale]) if min(height, width) else blurred[:1, :1]


DECIMATE_SIZE = 25  # as BSRGAN's


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
