"""What follows from a chain of operators without running it: its scale, its margin, what it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rayscale.data.operators import (
    Bicubic,
    Burst,
    Decimate,
    Defocus,
    GaussianBlur,
    Jpeg,
    Mask,
    MotionBlur,
    OneOf,
    Operator,
    RandomResize,
    Resize,
    Shrink,
    Shuffled,
    Sinc,
    Sometimes,
    Webp,
    inner,
    walk,
)
from rayscale.data.resize import DECIMATE_SIZE
from rayscale.errors import ConfigError

BLOCK_PX = 16  # JPEG's and WebP's unit with subsampled chroma
_MARGIN_PX = 16  # most pixels of high resolution around a crop that a random chain is given


def mask_in(operators: Sequence[Operator]) -> Mask | None:
    """The mask that ends a chain."""
    last = operators[-1] if operators else None
    return last if isinstance(last, Mask) else None


def frames_of(operators: Sequence[Operator]) -> int:
    """Frames of the burst that a chain ends with; 0 without one."""
    last = operators[-1] if operators else None
    return last.frames if isinstance(last, Burst) else 0


def has_codec(operators: Sequence[Operator]) -> bool:
    """Whether blocks are coded anywhere in the chain."""
    return any(isinstance(operator, Jpeg | Webp) for operator in walk(operators))


def check(operators: Sequence[Operator]) -> None:
    """Raises: ConfigError where a mask or a burst is not the last operator, or the chain ends at a random size."""
    nested = [operator for last in operators[-1:] for chain in inner(last) for operator in walk(chain)]
    for operator in (*walk(operators[:-1]), *nested):
        if isinstance(operator, Mask | Burst):
            raise ConfigError("degradation", operator.name, "must be the last operator of the chain", "move it there")
    scale_of(operators)


def scale_of(operators: Sequence[Operator]) -> int:
    """High-resolution side / low-resolution side of the whole chain.

    Raises: ConfigError where the chain ends at a random size.
    """
    scale = _scale_after(operators, 1)
    if scale is None:
        names = ", ".join(operator.name for operator in operators)
        raise ConfigError("degradation", names, "ends at a random size", 'end it with {"name": "resize", "scale": ...}')
    return scale


def _scale_after(operators: Sequence[Operator], scale: int | None) -> int | None:
    """Scale behind the operators where it was `scale` before them; None: random."""
    for operator in operators:
        scale = _scale_step(operator, scale)
    return scale


def _scale_step(operator: Any, scale: int | None) -> int | None:
    match operator:
        case Bicubic() | Decimate():
            return None if scale is None else scale * operator.scale
        case Resize():
            return operator.scale
        case RandomResize() | Shrink():
            return None
        case Burst():
            return _scale_after((*operator.shared, *operator.each), scale)
        case Sometimes():
            return scale if _scale_after(operator.operators, scale) == scale else None
        case OneOf():
            ends = {_scale_after(option, scale) for option in operator.options}
            return ends.pop() if len(ends) == 1 else None
        case Shuffled():
            free = [o for i, o in enumerate(operator.operators) if i not in operator.ordered]
            fixed = all(_scale_step(o, s) == s for o in free for s in (scale, None, 1))
            return _scale_after([operator.operators[i] for i in operator.ordered], scale) if fixed else None
    return scale


def margin_px(operators: Sequence[Operator]) -> int:
    """High-resolution pixels around a crop that are degraded with it; a multiple of `scale_of(operators)`.

    All that is read, for a chain of plain sizes and short kernels: then cutting the degraded picture gives the same.
    At most 16 px, 4 of the low resolution and a burst's shift: beyond that the picture goes on mirrored.
    """
    scale = scale_of(operators)
    shift = max((math.ceil(o.shift_px) for o in operators if isinstance(o, Burst)), default=0)
    most = max(_MARGIN_PX, 4 * scale)
    return -(-(min(_reach(operators, 1), most) + shift) // scale) * scale


def _reach(operators: Sequence[Operator], scale: int | None) -> int:
    """Pixels of high resolution that the operators look aside from a picture `scale` times smaller."""
    total = 0
    for operator in operators:
        if scale is None:
            return total + _MARGIN_PX
        if isinstance(operator, OneOf):
            total += max(_reach(option, scale) for option in operator.options)
        else:
            total += _reach([o for chain in inner(operator) for o in chain], scale)
        total += scale * _reach_of(operator, scale)
        scale = _scale_step(operator, scale)
    return total


def _reach_of(operator: Any, scale: int) -> int:
    match operator:
        case Bicubic(scale=1):
            return 0
        case Bicubic():
            return 2 * operator.scale  # the kernel reaches 2 of the smaller picture's pixels
        case Resize():
            return 0 if operator.scale == scale else max(4, -(-operator.scale // scale))
        case RandomResize() | Shrink():
            return 4
        case Decimate():
            return DECIMATE_SIZE // 2
        case GaussianBlur() | Sinc():
            return max(operator.sizes) // 2
        case MotionBlur():
            return math.ceil(operator.length[1] / 2) + 1
        case Defocus():
            return math.ceil(operator.radius[1])
        case Jpeg() | Webp():
            return BLOCK_PX
    return 0
