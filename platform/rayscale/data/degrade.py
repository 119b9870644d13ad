"""How low resolution is made: pure functions of (high-resolution picture, generator).

A degradation is a tuple of operators (`operators.py`), applied in order to u8[h, w, 3]; between two of them the
picture is rounded to uint8. All that is random is drawn from the sample's generator and recorded (`draws.py`).
Results are equal to the bit on machines of one type; "bicubic" alone, on all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from rayscale.data import kernels, noise, resize
from rayscale.data.draws import Chain, Drawn, Draws, Sides
from rayscale.data.extent import check, margin_px, mask_in, scale_of
from rayscale.data.masks import mask_of
from rayscale.data.operators import (
    Bicubic,
    Border,
    Burst,
    Decimate,
    Defocus,
    GaussianBlur,
    GaussianNoise,
    Jpeg,
    MotionBlur,
    OneOf,
    Operator,
    PoissonNoise,
    RandomResize,
    Resize,
    SaltPepper,
    Shrink,
    Shuffled,
    Sinc,
    Sometimes,
    SpeckleNoise,
    Webp,
)
from rayscale.data.resize import resize_bicubic
from rayscale.errors import ConfigError
from rayscale.imaging import U8

__all__ = [
    "Bicubic",
    "Border",
    "Operator",
    "apply",
    "check",
    "degrade",
    "margin_px",
    "replay",
    "resize_bicubic",
    "scale_of",
]


def apply(operators: Sequence[Operator], hr_u8: U8, rng: np.random.Generator) -> tuple[U8, Drawn]:
    """Degrade u8[h, w, 3] to u8[h / scale, w / scale, 3] (a burst: u8[T, ...]); also what was drawn, in order.

    Raises: ConfigError where a side is no multiple of `scale_of(operators)`.
    """
    chain = Chain(rng)
    return degrade(operators, hr_u8, chain)["lr"], chain.drawn


def replay(operators: Sequence[Operator], hr_u8: U8, drawn: Sequence[Mapping[str, Any]]) -> U8:
    """What `apply` gave when it drew that. Raises: ConfigError where other operators drew it."""
    return degrade(operators, hr_u8, Chain(None, drawn))["lr"]


def degrade(
    operators: Sequence[Operator], hr_u8: U8, chain: Chain, keep: tuple[slice, slice] = (slice(None), slice(None))
) -> dict[str, U8]:
    """ "lr", and "mask" u8[h, w, 1] where the chain ends with one.

    keep: rows and columns of the low resolution that are wanted; the rest is margin, and gets no mask.
    Raises: as `apply`.
    """
    origin, scale = (hr_u8.shape[0], hr_u8.shape[1]), scale_of(operators)
    if origin[0] % scale or origin[1] % scale:
        size = f"{origin[1]}x{origin[0]}"
        raise ConfigError("hr", size, f"sides must be multiples of {scale}", "crop the picture first")
    mask = mask_in(operators)
    wide = _run(operators[:-1] if mask else operators, hr_u8, chain, origin)
    lr = wide[(..., *keep, slice(None))]
    if mask is None:
        return {"lr": lr}
    missing = mask_of(mask, (lr.shape[0], lr.shape[1]), chain.next(mask.name))
    return {"lr": np.where(missing > 0, np.uint8(mask.fill), lr), "mask": missing}


def _run(operators: Sequence[Operator], picture: U8, chain: Chain, origin: Sides) -> U8:
    for operator in operators:
        picture = FUNCTIONS[type(operator)](operator, picture, chain.next(operator.name, origin))
    return picture


def _sometimes(operator: Sometimes, picture: U8, draws: Draws) -> U8:
    if not draws.chance("taken", operator.probability):
        return picture
    return _run(operator.operators, picture, draws.chain("drawn"), draws.origin)


def _one_of(operator: OneOf, picture: U8, draws: Draws) -> U8:
    option = draws.weighted("option", operator.weights or [1.0] * len(operator.options))
    return _run(operator.options[option], picture, draws.chain("drawn"), draws.origin)


def _shuffled(operator: Shuffled, picture: U8, draws: Draws) -> U8:
    order = draws.order("order", len(operator.operators))
    kept = iter(operator.ordered)
    order = [next(kept) if i in operator.ordered else i for i in order]
    return _run([operator.operators[i] for i in order], picture, draws.chain("drawn"), draws.origin)


def _burst(operator: Burst, picture: U8, draws: Draws) -> U8:
    shifts, shared, each = draws.chain("shifts"), draws.chain("shared"), draws.chain("each")
    frames = []
    for number in range(operator.frames):
        moved = picture if number == 0 else _shift(operator, picture, shifts.next("shift"))
        alike = shared if number == 0 else Chain(None, shared.made)
        degraded = _run(operator.shared, moved, alike, draws.origin)
        frame = each.next("frame")
        frames.append(_run(operator.each, degraded, frame.chain("drawn"), draws.origin))
    return np.stack(frames)


def _shift(operator: Burst, picture: U8, draws: Draws) -> U8:
    """The frame's pixel (x, y) is the picture's at (x + dx, y + dy), turned about its centre."""
    dx, dy = (draws.uniform(key, -operator.shift_px, operator.shift_px) for key in ("dx", "dy"))
    degrees = draws.uniform("degrees", -operator.degrees, operator.degrees)
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    turn[:, 2] += dx, dy
    how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    moved: U8 = cv2.warpAffine(picture, turn, (width, height), flags=how, borderMode=cv2.BORDER_REFLECT_101)
    return moved


FUNCTIONS: dict[type, Callable[[Any, U8, Draws], U8]] = {
    Bicubic: resize.bicubic,
    Resize: resize.resize_exactly,
    RandomResize: resize.random_resize,
    Shrink: resize.shrink,
    Decimate: resize.decimate,
    GaussianBlur: kernels.gaussian_blur,
    Sinc: kernels.sinc,
    MotionBlur: kernels.motion_blur,
    Defocus: kernels.defocus,
    GaussianNoise: noise.gaussian_noise,
    PoissonNoise: noise.poisson_noise,
    SpeckleNoise: noise.speckle_noise,
    SaltPepper: noise.salt_pepper,
    Jpeg: noise.jpeg,
    Webp: noise.webp,
    Burst: _burst,
    Sometimes: _sometimes,
    OneOf: _one_of,
    Shuffled: _shuffled,
}
