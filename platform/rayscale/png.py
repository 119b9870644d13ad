"""PNG files, written in half of zlib's time: every row less the one above it, packed by libdeflate."""

from __future__ import annotations

import struct
from typing import Any

import deflate
import numpy as np
from numpy.typing import NDArray

LEVEL = 1  # of 12: 2 takes half as long again for 1 % less
PART_BYTES = 1 << 30  # of a chunk, which has less than 2 GiB
_UP = 2  # what each row begins with: the filter "less the one above"
_COLOURS = {3: 2, 4: 6}  # channels -> colour type


def write(hwc: NDArray[Any]) -> bytes:
    """u8 or u16[h, w, 3 or 4] as a file; other threads run meanwhile."""
    height, width, channels = hwc.shape
    bits = 8 * hwc.itemsize
    samples = np.ascontiguousarray(hwc if bits == 8 else hwc.astype(">u2")).view(np.uint8).reshape(height, -1)
    rows = np.empty((height, 1 + samples.shape[1]), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = samples[0]
    np.subtract(samples[1:], samples[:-1], out=rows[1:, 1:])
    packed = memoryview(deflate.zlib_compress(rows, LEVEL))
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOURS[channels], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", *_chunk(b"IHDR", header)]
    for at in range(0, len(packed), PART_BYTES):
        parts += _chunk(b"IDAT", packed[at : at + PART_BYTES])
    return b"".join([*parts, *_chunk(b"IEND", b"")])


def _chunk(kind: bytes, body: bytes | memoryview) -> tuple[bytes, bytes | memoryview, bytes]:
    checksum = deflate.crc32(body, deflate.crc32(kind))
    return struct.pack(">I", len(body)) + kind, body, struct.pack(">I", checksum)
