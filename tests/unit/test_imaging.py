"""Pictures at the boundary: what is read, what is refused before a pixel is allocated, and how it is written."""

from __future__ import annotations

import dataclasses
import io
import resource
import struct
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import skimage.data
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rayscale import containers
from rayscale.errors import ConfigError, ImageError, MediaTypeError, RayscaleError, TooLargeError, UserError
from rayscale.imaging import (
    U8,
    Header,
    Limits,
    Media,
    decode_gray,
    decode_rgb,
    encode,
    open_lazily,
    panel,
    read_header,
    to_hwc_u8,
    to_nchw_f32,
)

PHOTO: U8 = np.ascontiguousarray(skimage.data.astronaut()[20:61, 180:233])  # 41 x 53
FORMATS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP", "ppm": "PPM"}


def saved(picture: Image.Image, codec: str, **settings: Any) -> bytes:
    """A file made by Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, codec, **settings)
    return buffer.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PHOTO).convert(mode)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A valid PNG header and almost no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def png_16_bit_rgb(samples: np.ndarray[Any, np.dtype[np.uint16]]) -> bytes:
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind: str) -> None:
    data = saved(photo(), FORMATS[kind], **({"lossless": True} if kind == "webp" else {}))
    header = read_header(data)
    assert header == Header(format=kind, width=53, height=41, mode="RGB", frames=1, bits=8, alpha=False)  # type: ignore[arg-type]
    pixels = decode_rgb(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    worst = np.abs(pixels.astype(int) - PHOTO).max()
    assert worst == 0 if kind != "jpeg" else 0 < worst < 100


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    settings: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    data = saved(photo(), FORMATS[kind], exif=exif, **settings)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    header, pixels = read_header(data), decode_rgb(data)
    assert (header.width, header.height) == upright.size == ((53, 41) if orientation < 5 else (41, 53))
    np.testing.assert_array_equal(pixels, np.asarray(upright))
    if orientation > 1 and kind != "jpeg":
        assert pixels.shape != PHOTO.shape or (pixels != PHOTO).any()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"junk" * 9])
def test_a_broken_exif_block_does_not_matter(exif: bytes) -> None:
    np.testing.assert_array_equal(decode_rgb(saved(photo(), "PNG", exif=exif)), PHOTO)


def test_orientation_out_of_range_is_upright() -> None:
    exif = Image.Exif()
    exif[274] = 77
    np.testing.assert_array_equal(decode_rgb(saved(photo(), "PNG", exif=exif)), PHOTO)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
@pytest.mark.parametrize("codec", ["PNG", "TIFF", "BMP"])
def test_gray_and_palette_become_rgb(mode: str, codec: str) -> None:
    picture = photo(mode)
    np.testing.assert_array_equal(decode_rgb(saved(picture, codec)), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = saved(photo("CMYK"), "JPEG", quality=98, subsampling=0)
    assert read_header(data).mode == "CMYK"
    difference = decode_rgb(data).astype(int) - PHOTO
    assert np.abs(difference).mean() < 3  # inverted inks would be about 100 away


def test_gray_jpeg_has_equal_channels() -> None:
    pixels = decode_rgb(saved(photo("L"), "JPEG"))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def animation(codec: str) -> bytes:
    return saved(photo(), codec, save_all=True, append_images=[photo("L").convert("RGB")], lossless=True)


def one_transparent_entry() -> Image.Image:
    picture = Image.new("P", (6, 5), 3)
    picture.putpalette([i // 3 for i in range(768)])
    return picture


LOSSY: dict[str, tuple[Callable[[], bytes], str, U8]] = {
    "16-bit gray": (
        lambda: saved(Image.fromarray(np.full((5, 6), 0x80FF, np.uint16)), "PNG"),
        np.full((5, 6, 3), 0x80, np.uint8),
    ),
    "16-bit gray TIFF": (
        lambda: saved(Image.fromarray(np.full((5, 6), 0x1234, np.uint16)), "TIFF"),
        np.full((5, 6, 3), 0x12, np.uint8),
    ),
    "16-bit gray PGM": (
        lambda: b"P5 6 5 # a comment\n65535\n" + bytes([0x80, 0xFF]) * 30,
        np.full((5, 6, 3), 0x80, np.uint8),
    ),
    "16-bit RGB": (
        lambda: png_16_bit_rgb(np.full((5, 6, 3), 0x80FF, np.uint16)),
        np.full((5, 6, 3), 0x80, np.uint8),
    ),
    "alpha": (
        lambda: saved(Image.new("RGBA", (6, 5), (200, 0, 0, 0)), "PNG"),
        np.full((5, 6, 3), 255, np.uint8),
    ),
    "half transparent WebP": (
        lambda: saved(Image.new("RGBA", (6, 5), (0, 0, 0, 128)), "WEBP", lossless=True),
        np.full((5, 6, 3), 127, np.uint8),
    ),
    "gray with alpha": (
        lambda: saved(Image.new("LA", (6, 5), (9, 255)), "PNG"),
        np.full((5, 6, 3), 9, np.uint8),
    ),
    "transparent palette entry": (
        lambda: saved(one_transparent_entry(), "PNG", transparency=3),
        np.full((5, 6, 3), 255, np.uint8),
    ),
    "animated PNG": (lambda: animation("PNG"), PHOTO),
    "animated WebP": (lambda: animation("WEBP"), PHOTO),
    "TIFF of two pages": (lambda: animation("TIFF"), PHOTO),
}


@hypothesis.given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
    sides=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    level=st.integers(1, 9),
    noise=st.integers(0, 255),
)
def test_pixels_that_are_unpacked_before_the_decoder_are_the_same(
    mode: str, sides: tuple[int, int], level: int, noise: int
) -> None:
    rng = np.random.default_rng(noise)
    picture = Image.fromarray(rng.integers(0, noise + 1, (*sides, 3), np.uint8)).convert(mode)
    data = saved(picture, "PNG", compress_level=level)
    unpacked = containers.lean("png", data, "image", unpack=True).data
    assert len(unpacked) > len(picture.tobytes())  # the path is taken
    for read in (data, unpacked):
        again = Image.open(io.BytesIO(read))
        assert again.mode == mode
        assert again.tobytes() == picture.tobytes()
    Image.open(io.BytesIO(unpacked)).verify()  # checksums too
    np.testing.assert_array_equal(decode_rgb(data), decode_rgb(saved(Image.fromarray(decode_rgb(data)), "BMP")))


def test_pixels_that_stand_in_a_file_many_times_are_unpacked_once() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1000, 1000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000 * 3001), 9))
    data = b"\x89PNG\r\n\x1a\n" + header + (pixels + chunk(b"sRGB", b"\0")) * 50 + chunk(b"IEND", b"")
    lean = containers.lean("png", data, "image", unpack=True).data
    assert 3_001_000 < len(lean) < 3_001_000 + len(data) + 1000
    assert not decode_rgb(data).any()


@pytest.mark.parametrize("case", ["interlaced", "16 bits", "short", "long", "damaged", "beyond the ratio"])
def test_pixels_that_are_not_plain_rows_are_left_to_the_decoder(case: str) -> None:
    rows = zlib.compress(bytes(25 * 24))  # 8 px of RGB and a filter byte, 24 rows
    bits, interlaced, height = 16 if case == "16 bits" else 8, int(case == "interlaced"), 24
    if case == "short":
        rows = zlib.compress(bytes(25 * 23))
    elif case == "long":
        rows = zlib.compress(bytes(25 * 24 + 1))
    elif case == "damaged":
        rows = rows[:-4] + b"abcd"
    elif case == "beyond the ratio":
        height = 10_000
    header = struct.pack(">IIBBBBB", 8, height, bits, 2, 0, 0, interlaced)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert containers.lean("png", data, "image", unpack=True).data == data


@hypothesis.given(
    sides=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    filters=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    beside=st.sampled_from([b"", chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100_000))]),
)
def test_a_plain_png_is_what_pillow_makes_of_it(
    sides: tuple[int, int], filters: list[int], seed: int, beside: bytes
) -> None:
    """Whatever its rows hold: each byte string is some picture under each filter."""
    height, width = sides
    rows = np.random.default_rng(seed).integers(0, 256, (height, 1 + 3 * width), np.uint8)
    rows[:, 0] = np.resize(filters, height)
    data = png_of(width, height, zlib.compress(rows.tobytes()), beside=beside)
    assert containers.lean("png", data, "image", unpack=True).plain
    expected = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(expected))
    np.testing.assert_array_equal(decode_gray(data)[0], np.asarray(expected.convert("L")))
    assert open_lazily(data, Limits(), "image").header == read_header(data)
    assert decode_gray(data)[1] == read_header(data)


def png_of(width: int, height: int, pixels: bytes, kind: bytes = b"\x08\2\0\0\0", beside: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">II", width, height) + kind)
    return b"\x89PNG\r\n\x1a\n" + header + beside + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


_ROWS = zlib.compress(bytes(24 * 25))
_PLAIN = png_of(8, 24, _ROWS)
NOT_PLAIN = {  # and whether Pillow takes them
    "an unknown filter": (png_of(8, 24, zlib.compress(bytes(23 * 25) + b"\5" + bytes(24))), False),
    "a colour that is seen through": (png_of(8, 24, _ROWS, beside=chunk(b"tRNS", bytes(6))), True),
    "a direction": (png_of(8, 24, _ROWS, beside=chunk(b"eXIf", b"MM\0\x2a\0\0\0\x08" + bytes(6))), True),
    "a profile": (png_of(8, 24, _ROWS, beside=chunk(b"iCCP", b"p\0\0" + zlib.compress(b"x" * 200))), True),
    "gray": (png_of(24, 24, _ROWS, b"\x08\0\0\0\0"), True),
    "another packing": (png_of(8, 24, _ROWS, b"\x08\2\1\0\0"), True),
    "another filtering": (png_of(8, 24, _ROWS, b"\x08\2\0\1\0"), False),
    "bytes behind its end": (_PLAIN + b"PK", True),
    "no end": (_PLAIN[:-12], True),
    "two headers": (png_of(8, 24, _ROWS, beside=_PLAIN[8:33]), True),
    "two runs of pixels": (_PLAIN[:-12] + chunk(b"sRGB", b"\0") + _PLAIN[33:], True),
    "a wrong checksum of its header": (_PLAIN[:29] + b"abcd" + _PLAIN[33:], False),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_a_png_with_more_to_it_is_left_to_pillow(case: str) -> None:
    assert containers.lean("png", _PLAIN, "image", unpack=True).plain  # negative control
    data, fine = NOT_PLAIN[case]
    assert not containers.lean("png", data, "image", unpack=True).plain
    if fine:
        assert decode_rgb(data).shape == (*Image.open(io.BytesIO(data)).convert("RGB").size[::-1], 3)
    else:
        with pytest.raises(ImageError):
            decode_rgb(data)


@pytest.mark.parametrize("case", LOSSY)
def test_what_eight_bits_of_rgb_cannot_hold_is_converted(case: str) -> None:
    make, expected = LOSSY[case]
    np.testing.assert_array_equal(decode_rgb(make()), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on TIFF
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(kind: str) -> None:
    data = saved(photo(), FORMATS[kind])
    decode_rgb(data)
    for length in {*range(1, 16), 20, 24, 30, 54, *(len(data) * k // 16 for k in range(1, 16)), len(data) - 200}:
        with pytest.raises((ImageError, MediaTypeError)) as caught:
            decode_rgb(data[:length], name="cut")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("cut=")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_never_escape_as_something_else(kind: str) -> None:
    data, rng, refused = saved(photo(), FORMATS[kind]), np.random.default_rng(1), 0
    limits = Limits(max_pixels=1_000_000)
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 200 if rng.integers(2) else len(data)), 4):
            damaged[at] = rng.integers(0, 256)
        try:
            header = read_header(bytes(damaged), limits)
            assert decode_rgb(bytes(damaged), limits).shape == (header.height, header.width, 3)
        except UserError:
            refused += 1
    assert refused > 10  # most of a PPM is pixels that may be anything


def huge() -> dict[str, bytes]:
    """Files of a few hundred bytes whose headers claim gigapixels."""
    jpeg = saved(photo(), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5  # height and width of SOF0
    bmp = saved(photo(), "BMP")
    tiff = saved(photo(), "TIFF")
    lossless, lossy = saved(photo(), "WEBP", lossless=True), saved(photo(), "WEBP")
    extended = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2
    width_tag, height_tag = (tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8 for tag in (256, 257))
    return {
        "PNG": png_claiming(100_000, 100_000),
        "PNG, wide": png_claiming(2**31 - 1, 1),
        "PNG, 20000 x 20000": png_claiming(20_000, 20_000),
        "JPEG": patched(jpeg, frame, b"\xff\xdc\xff\xdc"),
        "BMP": patched(bmp, 18, struct.pack("<ii", 100_000, 100_000)),
        "TIFF": patched(patched(tiff, width_tag, struct.pack("<I", 10**6)), height_tag, struct.pack("<I", 10**6)),
        "PPM": b"P6\n100000 100000\n255\n" + bytes(100),
        "WebP, lossless": patched(lossless, 21, b"\xff\xff\xff\x0f"),
        "WebP, lossy": patched(lossy, 26, b"\xff\x3f\xff\x3f"),
        "WebP, extended": extended,
    }


@pytest.mark.parametrize("case", huge())
def test_a_huge_declared_size_is_refused_without_allocating(case: str) -> None:
    data = huge()[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_header, decode_rgb):
        with pytest.raises(TooLargeError, match=r"photo=\d+x\d+: .*at most"):
            read(data, name="photo")
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 20  # the smallest of them would take 800 MB
    if case == "PNG, 20000 x 20000":  # the limits decide, not the codec
        assert read_header(data, Limits(max_pixels=400_000_000)).width == 20_000


NOT_OURS = {
    "nothing like a picture": b"hello, I am no picture at all",
    "zeros": bytes(1000),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "SVG with a prolog": b'<?xml version="1.0"?><svg/>',
    "GIF": saved(photo("P"), "GIF"),
    "animated GIF": saved(photo("P"), "GIF", save_all=True, append_images=[photo("P").rotate(90)]),
    "PDF": b"%PDF-1.7 ",
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(20),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0",
    "one byte": b"\x89",
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_other_formats_are_refused_by_name(case: str) -> None:
    for read in (read_header, decode_rgb):
        with pytest.raises(MediaTypeError, match=r"upload=.*send a JPEG, PNG, WebP, TIFF, BMP or PPM"):
            read(NOT_OURS[case], name="upload")


def test_a_wrong_name_does_not_help() -> None:
    data = saved(photo("P"), "GIF")
    with pytest.raises(ImageError, match="PNG"):
        decode_rgb(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(ImageError, match="JPEG"):
        decode_rgb(b"\xff\xd8\xff" + data)


def test_a_ppm_with_an_endless_comment_is_refused_at_once() -> None:
    with pytest.raises(ImageError, match="no PPM header"):
        read_header(b"P6\n#" + b"x" * 10_000_000 + b"\n4 4\n255\n" + bytes(48))


def test_a_tiff_of_floats_is_refused() -> None:
    data = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="32 bits"):
        decode_rgb(data)


def test_limits_name_the_picture_and_the_rule() -> None:
    data = saved(photo(), "PNG")
    cases: list[tuple[Limits, type[RayscaleError], str]] = [
        (Limits(max_bytes=len(data) - 1), TooLargeError, f"image={len(data)} bytes: at most {len(data) - 1} bytes"),
        (Limits(max_pixels=53 * 41 - 1), TooLargeError, "image=53x41: at most 2172 pixels"),
        (Limits(max_side=52), TooLargeError, "image=53x41: sides have at most 52 px"),
        (Limits(min_side=42), ImageError, "image=53x41: sides have at least 42 px"),
    ]
    for limits, error, message in cases:
        with pytest.raises(error, match=message):
            read_header(data, limits)
    read_header(data, Limits(max_bytes=len(data), max_pixels=53 * 41, max_side=53, min_side=41))
    with pytest.raises(ImageError, match="image=0 bytes"):
        read_header(b"")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().max_side = 3  # type: ignore[misc]


def test_the_header_is_read_without_the_pixels() -> None:
    data = saved(photo(), "PNG")
    assert read_header(data[:100]).width == 53
    with pytest.raises(ImageError):
        decode_rgb(data[:100])


@pytest.mark.parametrize("media", ["png", "jpeg", "webp"])
def test_encode_is_read_back(media: Media) -> None:
    turned = np.rot90(PHOTO)[:, ::-1]  # negative strides
    for picture in (PHOTO, turned):
        data = encode(picture, media)
        assert read_header(data).format == media
        difference = np.abs(decode_rgb(data).astype(int) - picture)
        assert difference.max() == 0 if media == "png" else 0 < difference.mean() < 3


def test_quality_matters_and_saturated_colours_survive() -> None:
    assert len(encode(PHOTO, "jpeg", 30)) < len(encode(PHOTO, "jpeg", 85)) < len(encode(PHOTO, "jpeg", 95))
    assert len(encode(PHOTO, "webp", 30)) < len(encode(PHOTO, "webp", 95))
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    error = {q: np.abs(decode_rgb(encode(stripes, "jpeg", q)).astype(int) - stripes).mean() for q in (89, 90)}
    assert error[90] < 10 < error[89]  # 4:4:4 against 4:2:0


def test_encode_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="media=gif: must be png, jpeg or webp"):
        encode(PHOTO, "gif")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="quality=0"):
        encode(PHOTO, "jpeg", 0)
    with pytest.raises(TooLargeError, match="webp holds at most 16383 px a side; ask for png"):
        encode(np.zeros((1, 16_384, 3), np.uint8), "webp")
    encode(np.zeros((1, 16_384, 3), np.uint8), "png")


def test_float_and_back_loses_nothing() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = np.stack([values, values[::-1], values.T], axis=2)
    tensor = to_nchw_f32(picture)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    np.testing.assert_array_equal(tensor[0, 2], (picture[..., 2] / 255).astype(np.float32))
    np.testing.assert_array_equal(to_hwc_u8(tensor), picture)


@hypothesis.given(
    st.integers(1, 20), st.integers(1, 20), st.sampled_from((1, 3, 4, 9)), st.integers(0, 2**32 - 1), st.booleans()
)
def test_floats_and_bytes_are_by_definition(height: int, width: int, channels: int, seed: int, cut: bool) -> None:
    """Also of windows, mirrored and read-only pictures, and on both sides of every half."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, 256, (height + 3, width + 2, channels), np.uint8)
    picture = whole[2 : 2 + height, 1 : 1 + width] if cut else whole[:height, :width][::-1, ::-1]
    picture.flags.writeable = False
    expected = picture.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(to_nchw_f32(picture), expected)

    halves = (rng.integers(-2, 258, expected.shape) + np.float32(0.5)).astype(np.float32) / np.float32(255)
    near = np.nextafter(halves, rng.choice(np.array([-9, 9], np.float32), halves.shape))
    far = rng.choice(np.array([-np.inf, -1e30, -3e9, 3e9, 1e30, np.inf], np.float32), halves.shape)
    for tensor in (expected, halves, near, far):
        rounded = np.clip(np.rint(tensor[0] * np.float32(255)), 0, 255).astype(np.uint8)
        made = to_hwc_u8(tensor)
        np.testing.assert_array_equal(made, rounded.transpose(1, 2, 0))
        assert made.flags.c_contiguous


def test_to_u8_rounds_and_clips() -> None:
    values = np.array([-1.0, 0.0019, 0.0020, 0.5, 0.9979, 0.9981, 7.0], np.float32)
    given = np.broadcast_to(values, (1, 3, 1, 7))
    np.testing.assert_array_equal(to_hwc_u8(given)[0, :, 0], [0, 0, 1, 128, 254, 255, 255])
    assert given[0, 0, 0, 0] == -1.0  # the input is left alone


def test_panel_keeps_pixels_and_aligns_cells() -> None:
    small = np.ascontiguousarray(PHOTO[:20, :20])
    grid = panel([("lr", small), ("bicubic 28.41 dB", PHOTO), ("truth", PHOTO)], columns=2, cell_px=80)
    flat = panel([("lr", small), ("x", small)], columns=9, cell_px=80)
    assert grid.shape == (2 * (80 + 26 + 10) + 10, 2 * (80 + 10) + 10, 3)
    assert flat.shape == (80 + 26 + 10 + 10, 2 * (80 + 10) + 10, 3)
    cell = flat[36:116, 10:90]
    np.testing.assert_array_equal(cell, small.repeat(4, axis=0).repeat(4, axis=1))
    np.testing.assert_array_equal(panel([("", PHOTO)], columns=1, cell_px=53)[36:77, 10:63], PHOTO)
    assert panel([("", PHOTO)], columns=1).shape[1] == 192 + 20  # small pictures are enlarged to be seen


def test_captions_stay_in_their_cell() -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    background = panel([("", black)], columns=1, cell_px=64)
    assert (panel([("naïve ✓", black)], columns=1, cell_px=64)[10:36, 10:74] != background[10:36, 10:74]).any()
    long = panel([("a caption much too long for such a small cell", black), ("", black)], columns=2, cell_px=64)
    np.testing.assert_array_equal(long[:36, 74:84], np.broadcast_to(background[0, 0], (36, 10, 3)))


def test_panel_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="0 pictures in 2 columns"):
        panel([], columns=2)
    with pytest.raises(ConfigError, match="1 pictures in 0 columns"):
        panel([("", PHOTO)], columns=0)
