"""How much work a picture file may be before and beside its pixels.

Size limits do not bound this: half a megabyte of PNG text unpacks to 500 MB, a megabyte of empty JPEG segments fills
Pillow's lists with 25 MB, a JPEG of a few kilobytes has its decoder pass over all blocks a thousand times. So the
parts are counted first, at the speed of `bytes.find`, and what no reader here needs is left out.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import deflate

from rayscale.errors import ImageError

MAX_PARTS = 1000  # chunks, segments or tags; files of cameras and editors have a few dozen
MANY_PARTS = 8  # a PNG of so many chunks is not worth putting together
MAX_EXIF = 16  # segments; Pillow joins them, each time copying what it has
MAX_JUNK = 64 << 10  # bytes between JPEG segments
MAX_SCANS = 64  # of a JPEG; progressive ones have about ten
MAX_STRIPS = 1 << 16  # of a TIFF
MAX_SLOW = 1 << 20  # bytes of what Pillow decodes in Python: 0.4 us each
BYTES_PER_CHUNK = 256  # the least average of a PNG's chunks beyond MAX_PARTS
MAX_UNPACKED = 1 << 26  # bytes of a PNG's pixels that are unpacked at once, beside the picture itself
MAX_RATIO = 1032  # deflate packs no better

_PNG_NEEDED = frozenset(
    [
        b"IHDR",
        b"PLTE",
        b"IDAT",
        b"IEND",
        b"tRNS",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"iCCP",
        b"eXIf",
        b"acTL",
        b"fcTL",
        b"fdAT",
    ]
)
_PNG_ONCE = frozenset([b"iCCP", b"eXIf"])
_PNG_PLAIN = frozenset([b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB"])  # nobody here looks at the last three
_PNG_FILTERS = 5  # 0 .. 4
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset([0x01, *range(0xD0, 0xDA)])  # markers without a length
_JPEG_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_PPM_LEVELS = re.compile(rb"P([56])" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" * 3 + rb"\s")


class Lean(NamedTuple):
    """A file without the parts that nobody reads; itself where there are none."""

    data: bytes
    plain: bool = False  # a PNG of 8-bit RGB and nothing else, made here of pixels that are all there: no damage


def lean(kind: str, data: bytes, name: str, *, unpack: bool = False) -> Lean:
    """`kind` is an `imaging.Format`. unpack: inflate a PNG's pixels here, where that is quicker than in the decoder.

    Its size has been checked.
    Raises: ImageError where its structure alone would be the work. Damage is left for the decoder to find.
    """
    if kind == "png":
        return _png(data, name, unpack)
    if kind == "jpeg":
        _jpeg(data, name)
    elif kind == "tiff":
        _tiff(data, name)
    elif len(data) > MAX_SLOW and _decoded_in_python(kind, data):
        rule = f"at most {MAX_SLOW} bytes are read of a run-length BMP, or of a PPM whose maximum is not 255"
        raise ImageError(name, f"{kind.upper()} of {len(data)} bytes", rule, "send it as PNG")
    return Lean(data)


def _too_many(name: str, what: str, most: int) -> ImageError:
    return ImageError(name, what, f"at most {most} are read", "save the picture again, without metadata")


def _png(data: bytes, name: str, unpack: bool) -> Lean:
    """Without other chunks, and 8-bit pixels that come in many in one: Pillow decodes each by a call of its own."""
    view = memoryview(data)
    kept: list[bytes | memoryview] = [data[:8]]
    pixels: list[memoryview] = []
    once: set[bytes] = set()
    kinds: list[bytes] = []  # of what is kept, pixels once
    runs: list[tuple[bytearray, list[bytes]]] = []  # of pixels: inflated where that was possible, and as a chunk
    unpacked = _unpacked_size(data) if unpack else 0
    at, count, most, changed = 8, 0, MAX_PARTS + len(data) // BYTES_PER_CHUNK, False

    def put_pixels() -> None:
        nonlocal pixels, changed, unpacked
        if pixels:
            rows = _inflated(pixels, unpacked)
            runs.append((rows, [*_chunk(_stored(rows) if rows else pixels)]))
            kinds.append(b"IDAT")
            kept.extend(runs[-1][1])
            # Pixels are one run of chunks: what comes after another chunk is not looked at, however much it would be.
            changed, pixels, unpacked = changed or bool(rows), [], 0

    while at + 12 <= len(data):
        count += 1
        if count > most:
            raise _too_many(name, f"PNG of more than {most} chunks", most)
        kind = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        # OpenCV, which reads 16 bits, looks at the checksum of each chunk: those stay.
        if kind == b"IDAT" and end <= len(data) and data[24:25] <= b"\x08":
            pixels.append(view[at + 8 : end - 4])
        elif kind not in _PNG_NEEDED or kind in once:
            changed = True
        else:
            put_pixels()
            kinds.append(kind)
            kept.append(view[at:end])
            once |= {kind} & _PNG_ONCE
        at = end
        if kind == b"IEND":
            break
    put_pixels()
    if len(runs) == 1 and runs[0][0] and at == len(data) and _is_plain(data, kinds, runs[0][0]):
        return Lean(b"".join((data[:33], *runs[0][1], _IEND)), plain=True)
    kept.append(view[at:])
    return Lean(b"".join(kept) if changed or count > MANY_PARTS else data)


def _is_plain(data: bytes, kinds: Sequence[bytes], rows: bytearray) -> bool:
    """Of one run of pixels: whether they are all there is to see, and their rows are what a PNG may have."""
    if not (
        kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and kinds.count(b"IHDR") == 1 and _PNG_PLAIN.issuperset(kinds)
    ):
        return False
    width, _, bits, colour, packing, filtering, _ = struct.unpack_from(">IIBBBBB", data, 16)
    whole = data[8:12] == b"\0\0\0\x0d" and deflate.crc32(data[12:29]).to_bytes(4, "big") == data[29:33]
    if (bits, colour, packing, filtering) != (8, 2, 0, 0) or not whole:
        return False
    return max(rows[:: 1 + 3 * width]) < _PNG_FILTERS


def _chunk(pixels: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    body = b"".join((b"IDAT", *pixels))
    yield from ((len(body) - 4).to_bytes(4, "big"), body, deflate.crc32(body).to_bytes(4, "big"))


def _unpacked_size(data: bytes) -> int:
    """Bytes of a PNG's filtered rows; 0 where they are left to the decoder."""
    if len(data) < 33:
        return 0
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    size: int = height * (1 + (width * channels * bits + 7) // 8)
    return size if channels and bits <= 8 and not interlaced and size <= MAX_UNPACKED else 0


def _inflated(pixels: Sequence[memoryview], size: int) -> bytearray:
    """The filtered rows: libdeflate takes half the time of the decoder's inflate.

    Nothing where the stream is not exactly such rows: the decoder then says what is wrong, or forgives it.
    """
    packed = pixels[0] if len(pixels) == 1 else b"".join(pixels)
    if not 0 < size <= MAX_RATIO * len(packed):
        return bytearray()
    try:
        rows = deflate.zlib_decompress(packed, size)
    except deflate.DeflateError:
        return bytearray()
    return rows if len(rows) == size else bytearray()


def _stored(rows: bytearray) -> list[bytes | memoryview]:
    """In a zlib stream that is not compressed."""
    view, size = memoryview(rows), len(rows)
    stored: list[bytes | memoryview] = [b"\x78\x01"]
    for start in range(0, size, _STORED):
        block = view[start : start + _STORED]
        stored += [struct.pack("<BHH", start + _STORED >= size, len(block), len(block) ^ 0xFFFF), block]
    return [*stored, deflate.adler32(rows).to_bytes(4, "big")]


_STORED = 0xFFFF  # bytes of a block


def _jpeg(data: bytes, name: str) -> None:
    at, junk, scans, exif, components, progressive = 2, 0, 0, 0, 0, False
    for _ in range(MAX_PARTS):
        found = data.find(b"\xff", at)
        if found < 0 or found + 4 > len(data):
            return
        junk, at = junk + found - at, found
        if junk > MAX_JUNK:
            raise _too_many(name, f"JPEG with {junk} bytes between its segments", MAX_JUNK)
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # junk, padding
            at += 1 if marker else 2
            continue
        if marker in _JPEG_BARE:
            if marker == 0xD9 and scans:
                return
            at += 2
            continue
        if marker in _JPEG_FRAMES:
            components, progressive = int.from_bytes(data[at + 9 : at + 10], "big"), marker not in (0xC0, 0xC1)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            exif += 1
            if exif > MAX_EXIF:
                raise _too_many(name, f"JPEG with more than {MAX_EXIF} Exif segments", MAX_EXIF)
        length = max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise _too_many(name, f"JPEG with more than {MAX_SCANS} scans", MAX_SCANS)
            if not progressive and data[at + 4 : at + 5] == bytes([components]):
                return  # all components at once: the decoder takes no other scan
            after = _JPEG_AFTER_SCAN.search(data, at + 2 + length)
            if after is None:
                return
            at = after.start()
            continue
        at += 2 + length
    raise _too_many(name, f"JPEG of more than {MAX_PARTS} segments", MAX_PARTS)


def _tiff(data: bytes, name: str) -> None:
    """The first directory; others are not read."""
    order = "little" if data[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]

    at = number(4, 4)
    tags = number(at, 2)
    if tags > MAX_PARTS:
        raise _too_many(name, f"TIFF of {tags} tags", MAX_PARTS)
    for entry in range(at + 2, at + 2 + 12 * tags, 12):
        if (
            number(entry, 2) in (273, 324) and (strips := number(entry + 4, 4)) > MAX_STRIPS
        ):  # StripOffsets, TileOffsets
            raise _too_many(name, f"TIFF of {strips} strips", MAX_STRIPS)


def _decoded_in_python(kind: str, data: bytes) -> bool:
    if kind == "bmp":
        return data[14] >= 40 and data[30] in (1, 2)
    header = _PPM_LEVELS.match(data[:4096]) if kind == "ppm" else None
    return header is not None and header[4] not in ((b"255",) if header[1] == b"6" else (b"255", b"65535"))
