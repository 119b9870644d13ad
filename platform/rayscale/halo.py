"""How far a function of a picture sees, and whether its tiles stitch to the whole: measured, not believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from rayscale import imaging
from rayscale.contract import Spec
from rayscale.imaging import F32

Run = Callable[[F32], F32]
"""f32[n, c, h, w] in [0, 1] -> f32[n, c', h * scale, w * scale]."""

LONGEST_PX = 2048  # of the strips that `reach` looks along
_AMPLITUDES = (1.0, 1e6)  # of what is changed: a far pixel's weight may be too small to show on a plain picture


def error_of(forward: Callable[[Mapping[str, F32]], Mapping[str, F32]], spec: Spec) -> float:
    """`stitched_error` of a function of pictures as its spec declares it; 0 where it declares no halo."""
    if spec.kind not in ("transform", "burst") or spec.halo_px is None:
        return 0.0
    leads = {t.name: tuple(a if isinstance(a, int) else 2 for a in t.shape[1:-2]) for t in spec.inputs}
    run = imaging.as_one(lambda given: forward(given)[spec.outputs[0].name], leads)
    channels = sum(map(math.prod, leads.values()))
    if spec.fixed_px is not None:
        return shifted_error(run, channels, spec.fixed_px, scale=spec.scale, halo_px=spec.halo_px, align=spec.align)
    return stitched_error(run, channels, scale=spec.scale, halo_px=spec.halo_px, align=spec.align)


def stitched_error(run: Run, channels: int, *, scale: int, halo_px: int, align: int, short_px: int = 16) -> float:
    """max |tiles - whole| of noise cut with this halo, along both sides of long strips of `short_px`."""
    tile_px = _up(2 * halo_px + 16, align) + align
    long, short = 2 * tile_px + tile_px // 2 + 1, _up(short_px, align)
    rng = np.random.default_rng(1)
    worst = 0.0
    for height, width in ((long, short), (short, long)):
        picture = rng.random((1, channels, height, width)).astype(np.float32)
        whole = imaging.run_tiled(run, picture, scale=scale, tile_px=None, halo_px=halo_px, align=align)
        tiled = imaging.run_tiled(run, picture, scale=scale, tile_px=tile_px, halo_px=halo_px, align=align)
        worst = float(np.maximum(worst, np.abs(tiled - whole).max()))  # NaN stays NaN
    return worst


def shifted_error(run: Run, channels: int, fixed_px: tuple[int, int], *, scale: int, halo_px: int, align: int) -> float:
    """max |window - window| where windows of the only size that `run` takes lie over each other, their halos apart.

    Where it is 0, a pixel is the same whichever window it is taken from. Windows stand at multiples of align.
    """
    rng = np.random.default_rng(1)
    worst = 0.0
    for axis, side in enumerate(fixed_px, 2):
        room = (side - 2 * halo_px - 1) // align * align  # the furthest that two windows share a pixel at
        if room < align:
            return math.inf
        for shift in {align, min(3 * align, room), room}:
            sides = [px + shift if i == axis else px for i, px in enumerate(fixed_px, 2)]
            picture = np.moveaxis(rng.random((1, channels, *sides)).astype(np.float32), axis, 0)
            first, second = (
                np.moveaxis(run(np.ascontiguousarray(np.moveaxis(picture[start : start + side], 0, axis))), axis, 0)
                for start in (0, shift)
            )
            ours = first[(shift + halo_px) * scale : (side - halo_px) * scale]
            theirs = second[halo_px * scale : (side - shift - halo_px) * scale]
            worst = float(np.maximum(worst, np.abs(ours - theirs).max()))  # NaN stays NaN
    return worst


def reach(
    run: Run, channels: int, *, scale: int, align: int, short_px: int = 16, fixed_px: tuple[int, int] | None = None
) -> int | None:
    """How many pixels beyond its own place an output pixel sees, by changing all on one side of a line.

    The line stands at multiples of align, as the borders of tiles do. None: further than strips of LONGEST_PX show,
    or than a quarter of the only size that `run` takes.
    """
    if fixed_px is not None:
        seen = max(_reach_along(run, channels, axis, fixed_px, scale, align) for axis in (2, 3))
        return seen if 4 * seen <= min(fixed_px) else None
    length, short = _up(128, align), _up(short_px, align)
    while length <= LONGEST_PX:
        found = [
            _reach_along(run, channels, axis, (length, short) if axis == 2 else (short, length), scale, align)
            for axis in (2, 3)
        ]
        if max(found) < length // 4:
            return max(found)
        length *= 4
    return None


def _reach_along(run: Run, channels: int, axis: int, sides: tuple[int, int], scale: int, align: int) -> int:
    """Furthest changed output beyond the changed input along one axis, input pixels rounded up."""
    rng = np.random.default_rng(2)
    picture = rng.random((1, channels, *sides)).astype(np.float32)
    whole = run(picture)
    middle = sides[axis - 2] // 2 // align * align
    furthest = 0
    for line in (middle, middle + align):
        for before in (True, False):
            part = [slice(None)] * 4
            part[axis] = slice(None, line) if before else slice(line, None)
            for amplitude in _AMPLITUDES:
                changed = picture.copy()
                changed[tuple(part)] = (rng.random(changed[tuple(part)].shape) * amplitude).astype(np.float32)
                moved = run(changed) != whole  # NaN differs too
                at = np.flatnonzero(moved.any(axis=tuple(i for i in range(4) if i != axis)))
                if at.size:
                    beyond = at[-1] + 1 - line * scale if before else line * scale - at[0]
                    furthest = max(furthest, -(-int(beyond) // scale))
    return furthest


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
