"""Very large photos as lossless crops, so that training does not decode a hundred megapixels for one small crop."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from rayscale.imaging import U8, encode


class Box(NamedTuple):
    """Part of an upright photo, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Box:
        """The inverse of str()."""
        return cls(*map(int, text.split(",")))


def boxes(height: int, width: int, tile_px: int) -> list[Box]:
    """A grid of nearly equal tiles without overlap, row by row, none longer than tile_px; one for a photo that fits."""

    def edges(side: int) -> list[int]:
        num = -(-side // tile_px)
        return [side * i // num for i in range(num + 1)]

    rows, columns = edges(height), edges(width)
    return [
        Box(top, left, bottom - top, right - left)
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]


def crop(photo: U8, box: Box) -> bytes:
    """A tile of u8[h, w, 3] as PNG: the pixels that `decode_rgb` gives of the whole, bit for bit."""
    return encode(photo[box.top : box.top + box.height, box.left : box.left + box.width], "png")
