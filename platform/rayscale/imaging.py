"""Pictures at the platform's boundary: header-first limits, codecs, uint8 <-> float32, the tile plan, panels.

Bytes from outside are hostile until decoded: the format is sniffed, the header is read and limits apply before
any pixel is allocated. A picture is u8[h, w, 3], RGB; a tensor is f32[n, 3, h, w] in [0, 1].
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from rayscale import containers, png
from rayscale.errors import ConfigError, ImageError, MediaTypeError, TooLargeError

# What Pillow warns of stands in files from outside, and Python keeps every distinct text for good.
warnings.filterwarnings("ignore", module=r"PIL\.")

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

Format = Literal["jpeg", "png", "webp", "tiff", "bmp", "ppm"]
Media = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is accepted from outside. The defaults keep one decoded picture under 200 MB."""

    max_bytes: int = 64 << 20  # encoded
    max_pixels: int = 64_000_000
    max_side: int = 32_768  # pixels
    min_side: int = 1  # pixels


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself. width and height are after EXIF orientation."""

    format: Format
    width: int
    height: int
    mode: str  # Pillow's
    frames: int  # 2 stands for "several" in TIFF, whose pages are not counted
    bits: int  # per sample
    alpha: bool


_LIMITS = Limits()
_BLOCK = 1 << 24  # bytes that a decoder is given at once; Pillow holds its lock between blocks

# Pillow's readers, called directly: `Image.open` would try every format it knows and apply its own, global limit.
_READERS: dict[Format, type[ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "ppm": PpmImagePlugin.PpmImageFile,
}
_MAGIC: dict[Format, re.Pattern[bytes]] = {
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "tiff": re.compile(rb"II\*\0|MM\0\*"),
    "bmp": re.compile(rb"BM"),
    "ppm": re.compile(rb"P[56]\s"),
}
_FOREIGN = {  # refused by name, as people do send them
    "GIF": re.compile(rb"GIF8"),
    "SVG": re.compile(rb"\s*(<\?xml|<svg|<!--)", re.IGNORECASE),
    "HEIF or AVIF": re.compile(rb".{4}ftyp", re.DOTALL),
    "PDF": re.compile(rb"%PDF"),
}
_PPM_HEADER = re.compile(rb"P[56]" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" * 3 + rb"\s")
_SEND = "send a JPEG, PNG, WebP, TIFF, BMP or PPM"


def read_header(data: bytes, limits: Limits = _LIMITS, name: str = "image") -> Header:
    """Read the header only; no pixel is decoded. `name` names the picture in errors.

    Raises: ImageError (empty, broken, too small), MediaTypeError (unknown format), TooLargeError.
    """
    return open_lazily(data, limits, name, unpack_px=0).header


def decode_rgb(data: bytes, limits: Limits = _LIMITS, name: str = "image") -> U8:
    """Decode to u8[h, w, 3], upright by its EXIF orientation; gray, palette and CMYK are converted.

    Lossy conversions: 16 bits keep the high byte, alpha is laid over white, of an animation or a multi-page file
    the first picture counts. Colour profiles are ignored: samples count as sRGB.

    Raises: as `read_header`; ImageError for truncated or damaged pixels too.
    """
    found = open_lazily(data, limits, name)
    header = found.header
    if found.picture is None:
        return plain_rgb(found)
    _check_bits(header, name)
    with hostile(name, header.format):
        pixels = np.ascontiguousarray(UPRIGHT[found.orientation](_to_rgb(found.picture)))
        if pixels.shape != (header.height, header.width, 3):
            raise ValueError("pixels do not match the header")
    return pixels


def decode_gray(data: bytes, limits: Limits = _LIMITS, name: str = "image") -> tuple[U8, Header]:
    """All of a picture read, as `decode_rgb` does and refusing what it refuses, for its luma u8[h, w] alone, upright.

    For JPEG half the work: no chroma is transformed. Raises: as `decode_rgb`.
    """
    found = open_lazily(data, limits, name)
    header = found.header
    if found.picture is None:
        return np.array(Image.fromarray(plain_rgb(found)).convert("L")), header
    _check_bits(header, name)
    with hostile(name, header.format):
        if header.mode == "RGB" and not header.alpha:
            found.picture.draft("L", None)
            gray = np.asarray(found.picture.convert("L"))
        else:
            gray = cv2.cvtColor(_to_rgb(found.picture), cv2.COLOR_RGB2GRAY)
        gray = np.ascontiguousarray(UPRIGHT[found.orientation](gray))
        if gray.shape != (header.height, header.width):
            raise ValueError("pixels do not match the header")
    return gray, header


def _check_bits(header: Header, name: str) -> None:
    if header.bits > 16:
        raise ImageError(name, f"{header.bits} bits", "at most 16 bits per sample are read", "convert it to 8 bits")


@dataclass(frozen=True, eq=False, kw_only=True)
class Lazy:
    """A file within the limits whose header was read and whose pixels were not. Of one thread at a time."""

    data: bytes
    name: str
    limits: Limits
    header: Header
    orientation: int  # EXIF's, 1..8
    picture: ImageFile | None  # Pillow's; None of a plain PNG
    ready: bool  # its pixels may be read, of `picture` or `plain`
    plain: bytes = b""  # a plain PNG, as `containers.Lean` has it

    def opened(self) -> Lazy:
        """Itself, ready."""
        return self if self.ready else open_lazily(self.data, self.limits, self.name)


def open_lazily(data: bytes, limits: Limits, name: str, *, unpack_px: int | None = None) -> Lazy:
    """unpack_px: a larger PNG is opened for its header's sake alone; else its pixels are inflated here, fast.

    Raises: as `read_header`.
    """
    if not data:
        raise ImageError(name, "0 bytes", "there is nothing in it", _SEND)
    if len(data) > limits.max_bytes:
        rule = f"at most {limits.max_bytes} bytes are read"
        raise TooLargeError(name, f"{len(data)} bytes", rule, "send a smaller file")
    kind, ready = _sniff(data, name), True
    if kind == "png" and len(data) >= 24:
        sides = struct.unpack_from(">II", data, 16)
        ready = math.prod(sides) <= (limits.max_pixels if unpack_px is None else unpack_px)
        ready = ready and max(sides) <= limits.max_side
    lean, plain = containers.lean(kind, data, name, unpack=ready)
    if plain:
        height, width = sides[::-1]
        _check_size(width, height, limits, name)
        header = Header(format=kind, width=width, height=height, mode="RGB", frames=1, bits=8, alpha=False)
        return Lazy(
            data=data, name=name, limits=limits, header=header, orientation=1, picture=None, ready=True, plain=lean
        )
    if kind == "webp":  # its reader allocates the canvas at once
        _check_size(*_webp_size(lean), limits, name)
    with hostile(name, kind):
        bits = _bits(kind, lean)  # first, as Pillow reads a PPM's comments however long they are
        picture = _READERS[kind](io.BytesIO(lean))
        picture.decodermaxblock = _BLOCK
        frames, orientation = _frames(picture), _orientation(picture)
        apart = False
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            bits = int(max(picture.tag_v2.get(258, (1,))))
            apart = bits > 8 and not _interleaved(lean)
        alpha = picture.has_transparency_data
    if apart:  # OpenCV would leave two thirds of the pixels as it finds the memory, Pillow takes the wrong bytes
        raise ImageError(name, f"TIFF, {bits} bits in planes", "they are read interleaved", "save it so, or as PNG")
    width, height = picture.size if orientation < 5 else picture.size[::-1]
    _check_size(width, height, limits, name)
    header = Header(format=kind, width=width, height=height, mode=picture.mode, frames=frames, bits=bits, alpha=alpha)
    return Lazy(
        data=data, name=name, limits=limits, header=header, orientation=orientation, picture=picture, ready=ready
    )


def plain_rgb(file: Lazy) -> U8:
    """u8[h, w, 3] of a plain PNG: by OpenCV, which takes half of Pillow's time and, of small ones, of its calls."""
    pixels = cv2.imdecode(np.frombuffer(file.plain, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None, "a plain PNG has no damage"
    return np.asarray(pixels, np.uint8)


@contextmanager
def hostile(name: str, kind: Format) -> Iterator[None]:
    """Turns what codecs raise on damaged bytes, which can be anything, into ImageError."""
    try:
        yield
    except MemoryError:  # of this machine: the limits leave no picture that needs so much
        raise
    except Exception as error:
        why = str(error) or type(error).__name__
        raise ImageError(name, f"{kind.upper()}, {why}", "is truncated or damaged", "send the whole file") from None


def _sniff(data: bytes, name: str) -> Format:
    for kind, magic in _MAGIC.items():
        if magic.match(data):
            return kind
    found = next((foreign for foreign, magic in _FOREIGN.items() if magic.match(data)), None)
    raise MediaTypeError(name, found or f"bytes {data[:8].hex(' ')}", "this format is not read", _SEND)


def _check_size(width: int, height: int, limits: Limits, name: str) -> None:
    size = f"{width}x{height}"
    if max(width, height) > limits.max_side:
        raise TooLargeError(name, size, f"sides have at most {limits.max_side} px", "send it in parts or smaller")
    if width * height > limits.max_pixels:
        raise TooLargeError(name, size, f"at most {limits.max_pixels} pixels are read", "send it in parts or smaller")
    if min(width, height) < max(limits.min_side, 1):
        raise ImageError(name, size, f"sides have at least {max(limits.min_side, 1)} px", "send a larger picture")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas of a WebP file from its first chunk; (1, 1) where there is none, which the reader then refuses."""
    chunk, head = data[12:16], data[:30].ljust(30, b"\0")
    if chunk == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if chunk == b"VP8L":
        packed = int.from_bytes(head[21:25], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 1, 1


def _bits(kind: Format, data: bytes) -> int:
    if kind == "png":
        return data[24]  # IHDR
    if kind == "ppm":
        return 16 if ppm_header(data)[1] > 255 else 8
    return 8


def ppm_header(data: bytes) -> tuple[int, int]:
    """(where the samples start, the highest level). Raises: ValueError."""
    header = _PPM_HEADER.match(data[:4096])
    if not header:
        raise ValueError("no PPM header in the first 4096 bytes")
    return header.end(), int(header[3])


def _interleaved(tiff: bytes) -> bool:
    """Whether nothing in the first directory says otherwise, however oddly. Pillow has read it, so it is there."""
    order = "<" if tiff[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = (tiff[at : at + 10] for at in range(start + 2, start + 2 + 12 * count, 12))
    tag, interleaved = struct.pack(order + "H", 284), struct.pack(order + "HHIH", 284, 3, 1, 1)
    return all(entry == interleaved for entry in entries if entry[:2] == tag)


def is_negative(picture: ImageFile) -> bool:
    """Whether 0 is white, which Pillow turns at 8 bits only."""
    return isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.tag_v2.get(262) == 0


def _frames(picture: ImageFile) -> int:
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 2 if picture.tag_v2.next else 1  # a hostile file chains millions of pages: not counted
    return int(getattr(picture, "n_frames", 1))


def _orientation(picture: ImageFile) -> int:
    """EXIF orientation (1..8) as the header has it: `getexif()` would decode a PNG to look behind its pixels."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns it upright by itself
    exif = Image.Exif()
    try:
        exif.load(picture.info.get("exif", b""))
        value = int(exif.get(274, 1))
    except Exception:  # a broken EXIF block does not make the picture unusable
        return 1
    return value if value in UPRIGHT else 1


UPRIGHT: dict[
    int, Callable[[NDArray[Any]], NDArray[Any]]
] = {  # EXIF orientation -> what turns the stored picture upright
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def _to_rgb(picture: ImageFile) -> U8:
    if picture.mode.startswith("I"):  # 16-bit gray: Pillow would clip at 255 instead of scaling
        gray = np.clip(np.asarray(picture).astype(np.int32) >> 8, 0, 255).astype(np.uint8)
        gray = 255 - gray if is_negative(picture) else gray
        return np.repeat(gray[:, :, None], 3, axis=2)
    picture.load()
    flat: Image.Image = picture
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(flat if flat.mode == "RGB" else flat.convert("RGB"))


_LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383, "png": 2**31 - 1}  # what the formats can hold


def encode(hwc: NDArray[Any], media: Media, quality: int = 95) -> bytes:
    """Encode u8[h, w, 3]. quality 1..100 is for JPEG (4:4:4 from 90 on) and WebP; PNG is lossless.

    PNG and WebP also take alpha, u8[h, w, 4], and PNG u16.

    Raises: ConfigError (media, quality), TooLargeError where the format cannot hold such a side.
    """
    if media not in _LONGEST_SIDE:
        raise ConfigError("media", media, "must be png, jpeg or webp", "choose one of them")
    if not 1 <= quality <= 100:
        raise ConfigError("quality", quality, "must be in 1..100", "try 95")
    height, width, channels = hwc.shape
    check_side(height, width, media)
    if media == "png":
        return png.write(hwc)
    settings: list[int] = []
    if media == "jpeg":
        sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444 if quality >= 90 else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
        settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    else:
        settings = [cv2.IMWRITE_WEBP_QUALITY, quality]
    order = cv2.COLOR_RGBA2BGRA if channels == 4 else cv2.COLOR_RGB2BGR
    done, encoded = cv2.imencode(f".{media}", cv2.cvtColor(hwc, order), settings)
    if not done:
        raise ImageError("media", f"{media}, {width}x{height}", "the encoder refused it", "ask for png")
    return bytes(encoded.data)


def check_side(height: int, width: int, media: Media) -> None:
    """Raises: TooLargeError where the format cannot hold such a side."""
    if max(height, width) > _LONGEST_SIDE[media]:
        rule = f"{media} holds at most {_LONGEST_SIDE[media]} px a side"
        raise TooLargeError("media", f"{media}, {width}x{height}", rule, "ask for png")


def to_nchw_f32(hwc_u8: U8) -> F32:
    """u8[h, w, c] -> f32[1, c, h, w] in [0, 1]: x / 255, correctly rounded."""
    height, width, channels = hwc_u8.shape
    planes = np.empty((channels, height, width), np.uint8)
    cv2.split(hwc_u8, [*planes])
    tensor: F32 = planes[None].astype(np.float32)
    tensor /= np.float32(255)
    return tensor


def to_hwc_u8(nchw_f32: F32) -> U8:
    """f32[1, c, h, w] in [0, 1] -> u8[h, w, c]: x * 255, rounded half to even, clipped."""
    unit = nchw_f32[0].clip(np.float32(0), np.float32(1))  # what is beyond int32 would wrap around
    channels, height, width = unit.shape
    planes = cv2.convertScaleAbs(unit.reshape(-1, width), alpha=255).reshape(unit.shape)
    merged: U8 = cv2.merge([*planes])
    return merged.reshape(height, width, channels)  # OpenCV drops an axis of one channel


@dataclass(frozen=True)
class Tile:
    """A window of the input and the half-open part of it that this tile contributes; absolute input pixels."""

    y: int
    x: int
    height: int
    width: int
    keep_top: int
    keep_bottom: int
    keep_left: int
    keep_right: int


def padded_sides(height: int, width: int, *, align: int, fixed_px: tuple[int, int] | None = None) -> tuple[int, int]:
    """What a picture's sides are padded to: multiples of align, no less than the only size that a network takes."""
    tall, wide = (-(-side // align) * align for side in (height, width))
    return (tall, wide) if fixed_px is None else (max(tall, fixed_px[0]), max(wide, fixed_px[1]))


def plan_tiles(
    height: int, width: int, *, tile_px: int | tuple[int, int], halo_px: int, align: int = 1
) -> tuple[Tile, ...]:
    """Cut an image into equal windows, row by row, whose kept parts cover it once.

    Every kept pixel has halo_px of real context in its window, or the window ends at the image's own border, where
    the network pads as it would on the whole: so with halo_px = the receptive radius the stitched result is the
    untiled one, to the bit. Windows start at multiples of align; the last one is moved inward instead of shrunk,
    so all have one shape: tile_px a side (or height and width), or the image's where that is smaller.

    Raises: ConfigError where halos leave a tile nothing of its own, or a side is no multiple of align.
    """
    tall, wide = (tile_px, tile_px) if isinstance(tile_px, int) else tile_px
    for side in (tall, wide):
        if align < 1 or side % align:
            raise ConfigError("tile_px", side, f"must be a multiple of align, {align}", "round it up")
        if halo_px < 0 or (side - 2 * halo_px) // align < 1:
            least = -(-(2 * halo_px + align) // align) * align
            rule = f"must exceed two halos of {halo_px} px by {align}"
            raise ConfigError("tile_px", side, rule, f"use {least} or more")
    if min(height, width) < 1 or height % align or width % align:
        raise ConfigError("image", f"{width}x{height}", f"sides must be multiples of align, {align}", "pad it first")
    rows, columns = _spans(height, tall, halo_px, align), _spans(width, wide, halo_px, align)
    return tuple(
        Tile(y, x, min(tall, height), min(wide, width), top, bottom, left, right)
        for y, top, bottom in rows
        for x, left, right in columns
    )


def fitted_side(length: int, *, tile_px: int, halo_px: int, align: int) -> int:
    """The smallest window that cuts a length into as few as tile_px does: the last one then overlaps the least.

    On a grid of 16 px, for the sake of what remembers shapes; tile_px is the largest.
    """

    def count(side: int) -> int:
        return 1 + max(0, -(-(length - side) // ((side - 2 * halo_px) // align * align)))

    fewest, grid = count(tile_px), math.lcm(align, 16)
    least = max(-(-length // fewest), 2 * halo_px + align)
    sides = range(-(-least // grid) * grid, tile_px, grid)
    return next((side for side in sides if count(side) <= fewest), tile_px)


def _spans(side: int, tile_px: int, halo_px: int, align: int) -> list[tuple[int, int, int]]:
    """(start, first kept, end of kept) of the windows along one axis."""
    step = (tile_px - 2 * halo_px) // align * align
    spans, start, kept = [], 0, 0
    while start + tile_px < side:
        spans.append((start, kept, start + tile_px - halo_px))
        kept = start + tile_px - halo_px
        start = min(start + step, side - tile_px)
    return [*spans, (start, kept, side)]


def place(out_nchw: F32, result_nchw: F32, tile: Tile, scale: int) -> None:
    """Copy the kept part of a tile's result to where it belongs in `out_nchw`; both are `scale` times the input.

    Raises: ConfigError for a result of another size.
    """
    if result_nchw.shape[2:] != (tile.height * scale, tile.width * scale):
        raise ConfigError("scale", scale, f"a tile of {tile.width}x{tile.height} px came back as "
                          f"{result_nchw.shape[3]}x{result_nchw.shape[2]}", "correct the model's card")  # fmt: skip
    rows = slice(tile.keep_top * scale, tile.keep_bottom * scale)
    columns = slice(tile.keep_left * scale, tile.keep_right * scale)
    top, left = tile.y * scale, tile.x * scale
    out_nchw[:, :, rows, columns] = result_nchw[
        :, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]


def run_tiled(
    run: Callable[[F32], F32],
    nchw: F32,
    *,
    scale: int,
    tile_px: int | None,
    halo_px: int | None,
    align: int,
    fixed_px: tuple[int, int] | None = None,
) -> F32:
    """run(f32[n, c, h, w]) over an image of any size: in tiles, or whole where it fits or no halo is exact.

    Sides are padded to what `padded_sides` says with the border's pixels, and the result is cropped: f32[n, c,
    h * scale, w * scale]. fixed_px: the only size that `run` takes, and so the tiles'.
    Raises: ConfigError as `plan_tiles` and `place`.
    """
    height, width = nchw.shape[2:]
    sides = padded_sides(height, width, align=align, fixed_px=fixed_px)
    down, right = sides[0] - height, sides[1] - width
    padded = np.pad(nchw, ((0, 0), (0, 0), (0, down), (0, right)), mode="edge") if down or right else nchw
    if halo_px is not None and fixed_px is not None:
        tiles = plan_tiles(*sides, tile_px=fixed_px, halo_px=halo_px, align=align)
    elif tile_px is None or halo_px is None:
        tiles = (Tile(0, 0, *sides, 0, sides[0], 0, sides[1]),)
    else:
        tiles = plan_tiles(*sides, tile_px=tile_px, halo_px=halo_px, align=align)
    out: F32 | None = None
    for tile in tiles:
        window = padded[:, :, tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
        result = run(np.ascontiguousarray(window))
        if out is None:
            out = np.empty((*result.shape[:2], sides[0] * scale, sides[1] * scale), np.float32)
        place(out, result, tile, scale)
    assert out is not None  # a plan has at least one tile
    return out[:, :, : height * scale, : width * scale]


def as_one(run: Callable[[Mapping[str, F32]], F32], leads: Mapping[str, tuple[int, ...]]) -> Callable[[F32], F32]:
    """A function of several inputs as one of all their channels, so that a tile cuts them alike: for `run_tiled`.

    leads: by name the axes between batch and sides, (3,) of a picture, (T, 3) of a burst; in the order of the channels.
    """
    if len(leads) == 1:
        ((name, lead),) = leads.items()
        return lambda nchw: run({name: np.ascontiguousarray(nchw.reshape(len(nchw), *lead, *nchw.shape[2:]))})
    ends = np.cumsum([math.prod(lead) for lead in leads.values()])[:-1]

    def of_all(nchw: F32) -> F32:
        parts = zip(leads.items(), np.split(nchw, ends, axis=1), strict=True)
        shape = nchw.shape
        return run({n: np.ascontiguousarray(p.reshape(shape[0], *lead, *shape[2:])) for (n, lead), p in parts})

    return of_all


_BACKGROUND, _TEXT = (24, 26, 30), (228, 230, 235)
_GAP_PX, _CAPTION_PX, _LEAST_CELL_PX = 10, 26, 192


def panel(pictures: Sequence[tuple[str, U8]], *, columns: int, cell_px: int | None = None) -> U8:
    """(caption, u8[h, w, 3]) in a labelled grid for people; captions in ASCII, shortened where they do not fit.

    Every picture is brought to cell_px on its longer side, smaller ones by nearest neighbour so that their pixels
    stay visible. cell_px: by default the longest side there is, at least 192. Raises: ConfigError.
    """
    if not pictures or columns < 1:
        raise ConfigError(
            "panel", f"{len(pictures)} pictures in {columns} columns", "both must be at least 1", "add some"
        )
    longest = cell_px or max(_LEAST_CELL_PX, *(max(p.shape[:2]) for _, p in pictures))
    fitted = [_fit(p, longest) for _, p in pictures]
    cell_h, cell_w = (max(p.shape[axis] for p in fitted) for axis in (0, 1))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    pitch_h, pitch_w = cell_h + _CAPTION_PX + _GAP_PX, cell_w + _GAP_PX
    canvas = np.full((rows * pitch_h + _GAP_PX, columns * pitch_w + _GAP_PX, 3), _BACKGROUND, np.uint8)
    for i, ((caption, _), picture) in enumerate(zip(pictures, fitted, strict=True)):
        y, x = _GAP_PX + i // columns * pitch_h, _GAP_PX + i % columns * pitch_w
        _write(canvas[y : y + _CAPTION_PX, x : x + cell_w], caption)
        top = y + _CAPTION_PX + (cell_h - picture.shape[0]) // 2
        left = x + (cell_w - picture.shape[1]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _fit(picture: U8, longest: int) -> U8:
    factor = longest / max(picture.shape[:2])
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    how = cv2.INTER_NEAREST_EXACT if factor > 1 else cv2.INTER_AREA
    fitted: U8 = cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=how)
    return fitted


def _write(strip: U8, caption: str) -> None:
    """Write one line into a strip of the canvas, in place."""
    font, size, room = cv2.FONT_HERSHEY_SIMPLEX, 0.5, strip.shape[1] - 2
    text = caption.encode("ascii", "replace").decode()
    while text and cv2.getTextSize(text, font, size, 1)[0][0] > room:
        if size > 0.4:
            size -= 0.025
        else:
            text = text.rstrip(".")[:-1] + ".." if len(text) > 3 else ""
    line = np.ascontiguousarray(strip)
    cv2.putText(line, text, (1, strip.shape[0] - 9), font, size, _TEXT, 1, cv2.LINE_AA)
    strip[:] = line
