"""Alpha, 16 bits and profiles: what a file says is what comes out again, whichever codec reads the answer."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from rayscale import imaging, picture
from rayscale.errors import ImageError
from rayscale.imaging import U8, Media
from rayscale.picture import Picture

PHOTO: U8 = np.ascontiguousarray(skimage.data.astronaut()[20:61, 180:233])  # 41 x 53
DEEP = (PHOTO.astype(np.uint16) * 257) ^ np.arange(53, dtype=np.uint16)[None, :, None]  # what 8 bits would lose
ALPHA: U8 = np.ascontiguousarray(PHOTO[..., 1])
RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, codec: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, **more)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png16(samples: np.ndarray[Any, Any], colour: int, before: bytes = b"") -> bytes:
    """A 16-bit PNG by hand: colour 0 gray, 2 RGB, 4 gray with alpha, 6 RGBA."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Reading


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP"])
def test_an_opened_file_does_not_keep_its_pixels_once_they_are_decoded(codec: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4 if codec == "PNG" else 3), np.uint8)
    data = saved(Image.fromarray(pixels), codec)
    file = imaging.open_lazily(data, imaging.Limits(), "image")
    found = picture.decode_opened(file)
    np.testing.assert_array_equal(found.rgb, picture.decode(data).rgb)
    assert file.picture is not None
    with pytest.raises(ValueError, match="closed"):
        file.picture.getpixel((0, 0))


def test_alpha_is_kept_beside_colours_that_nobody_blended() -> None:
    for codec, more in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = picture.decode(saved(Image.fromarray(np.dstack([PHOTO, ALPHA])), codec, **more))
        np.testing.assert_array_equal(found.rgb, PHOTO)
        np.testing.assert_array_equal(found.alpha, ALPHA)
    opaque = picture.decode(saved(Image.fromarray(PHOTO), "PNG"))
    assert opaque.alpha is None


def test_a_transparent_palette_entry_is_alpha() -> None:
    paletted = Image.fromarray(PHOTO).convert("P")
    entry = int(np.asarray(paletted)[0, 0])
    found = picture.decode(saved(paletted, "PNG", transparency=entry))
    assert found.alpha is not None
    np.testing.assert_array_equal(found.alpha == 0, np.asarray(paletted) == entry)


def test_16_bits_are_read_to_the_last_one() -> None:
    deep_alpha = DEEP[..., 0] ^ 3
    tiff = cv2.imencode(".tiff", DEEP[..., ::-1])[1].tobytes()
    ppm = b"P6 53 41 # a comment\n65535\n" + DEEP.astype(">u2").tobytes()
    for data in (png16(DEEP, 2), tiff, ppm):
        found = picture.decode(data)
        assert (found.bits, found.alpha) == (16, None)
        np.testing.assert_array_equal(found.rgb, DEEP)
    found = picture.decode(png16(np.dstack([DEEP, deep_alpha]), 6))
    np.testing.assert_array_equal(found.rgb, DEEP)
    np.testing.assert_array_equal(found.alpha, deep_alpha)
    gray = picture.decode(png16(np.dstack([DEEP[..., 1], deep_alpha]), 4))
    np.testing.assert_array_equal(gray.rgb, np.repeat(DEEP[..., 1:2], 3, axis=2))
    np.testing.assert_array_equal(gray.alpha, deep_alpha)
    plain = picture.decode(saved(Image.fromarray(DEEP[..., 0]), "TIFF"))
    np.testing.assert_array_equal(plain.rgb[..., 2], DEEP[..., 0])


def test_a_level_that_stands_for_transparent_is_alpha_of_16_bits_too() -> None:
    level = int(DEEP[3, 4, 0])
    found = picture.decode(png16(DEEP[..., 0], 0, chunk(b"tRNS", struct.pack(">H", level))))
    assert found.alpha is not None
    np.testing.assert_array_equal(found.alpha, np.where(DEEP[..., 0] == level, 0, 65535))


def test_levels_of_a_pgm_are_stretched() -> None:
    found = picture.decode(b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes())
    assert found.rgb[0, :, 0].tolist() == [0, round(512 * 65535 / 1023), 65535]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_all_of_it_is_turned_upright(orientation: int, bits: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    if bits == 8:
        data = saved(Image.fromarray(np.dstack([PHOTO, ALPHA])), "PNG", exif=exif)
        want = np.dstack([PHOTO, ALPHA])
    else:
        data = png16(np.dstack([DEEP, DEEP[..., 0]]), 6, chunk(b"eXIf", exif.tobytes()[6:]))
        want = np.dstack([DEEP, DEEP[..., 0]])
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
             5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 3), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
             8: np.rot90}  # fmt: skip
    found = picture.decode(data)
    assert found.bits == bits
    np.testing.assert_array_equal(np.dstack([found.rgb, found.alpha]), turns[orientation](want))  # type: ignore[list-item]


def test_a_16_bit_tiff_is_turned_once() -> None:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, DEEP, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    np.testing.assert_array_equal(picture.decode(buffer.getvalue()).rgb, np.rot90(DEEP, 3))


def tiff(pixels: np.ndarray[Any, Any], **said: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **said)
    return buffer.getvalue()


@pytest.mark.parametrize("entry", ["as it should be", "as a long number", "twice"])
def test_planes_of_16_bits_are_refused_however_they_are_told(entry: str) -> None:
    """OpenCV fills a third of such a picture and leaves the rest as it finds the memory: others' pixels."""
    small = tiff(np.ascontiguousarray(PHOTO.transpose(2, 0, 1)), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(picture.decode(small).rgb, PHOTO)  # the control: of 8 bits they are read
    data = tiff(np.ascontiguousarray(DEEP.transpose(2, 0, 1)), photometric="rgb", planarconfig="separate")
    told = data.index(struct.pack("<HHI", 284, 3, 1))
    if entry == "as a long number":
        data = data[:told] + struct.pack("<HHII", 284, 4, 1, 2) + data[told + 12 :]
    if entry == "twice":
        software = data.index(struct.pack("<HH", 305, 2))
        data = data[:software] + struct.pack("<HHIHH", 284, 3, 1, 1, 0) + data[software + 12 :]
    for decode in (picture.decode, imaging.decode_rgb, imaging.read_header):
        with pytest.raises(ImageError, match="16 bits in planes: they are read interleaved"):
            decode(data)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_negative_is_turned(bits: int) -> None:
    gray = PHOTO[..., 0] if bits == 8 else DEEP[..., 0]
    data = tiff(gray, photometric="miniswhite")
    most = 2**bits - 1
    np.testing.assert_array_equal(picture.decode(data).rgb[..., 1], most - gray)
    np.testing.assert_array_equal(imaging.decode_rgb(data)[..., 1], (most - gray) >> (bits - 8))
    np.testing.assert_array_equal(picture.decode(tiff(gray, photometric="minisblack")).rgb[..., 1], gray)


@pytest.mark.parametrize("bits", [8, 16])
def test_what_the_fourth_channel_of_a_tiff_is(bits: int) -> None:
    most = 2**bits - 1
    seen = np.array([[most, most // 2, most // 5]], np.uint16).repeat(4, axis=0)
    straight = np.full((4, 3, 3), [most, most // 3, most // 7], np.float64)
    laid = np.dstack([np.rint(straight * seen[..., None] / most), seen]).astype(f"u{bits // 8}")
    found = picture.decode(tiff(laid, photometric="rgb", extrasamples=["assocalpha"]))
    np.testing.assert_array_equal(found.alpha, seen)
    np.testing.assert_allclose(found.rgb, straight, atol=3)
    found = picture.decode(tiff(laid, photometric="rgb", extrasamples=["unassalpha"]))
    np.testing.assert_array_equal(np.dstack([found.rgb, found.alpha]), laid)
    found = picture.decode(tiff(laid, photometric="rgb", extrasamples=["unspecified"]))
    np.testing.assert_array_equal(found.rgb, laid[..., :3])
    assert found.alpha is None


def test_what_cannot_be_kept_is_refused() -> None:
    frames = saved(Image.fromarray(PHOTO), "PNG", save_all=True, append_images=[Image.fromarray(ALPHA).convert("RGB")])
    with pytest.raises(ImageError, match="2 frames"):
        picture.decode(frames)
    whole = png16(DEEP, 2)
    for cut in (len(whole) // 2, len(whole) - 30):
        with pytest.raises(ImageError, match="truncated or damaged"):
            picture.decode(whole[:cut])


# Profiles


@pytest.mark.parametrize("codec", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("media", ["png", "jpeg", "webp"])
def test_an_rgb_profile_goes_from_the_file_into_the_answer(codec: str, media: Media) -> None:
    found = picture.decode(saved(Image.fromarray(PHOTO), codec, icc_profile=RGB_PROFILE))
    assert found.icc == RGB_PROFILE
    answer = Image.open(io.BytesIO(picture.encode(found, media)))
    answer.load()
    assert answer.info["icc_profile"] == RGB_PROFILE
    bare = Image.open(io.BytesIO(picture.encode(Picture(found.rgb), media)))  # negative control
    assert "icc_profile" not in bare.info


def test_a_profile_of_several_jpeg_segments_comes_back_whole() -> None:
    long = RGB_PROFILE + bytes(200_000)
    answer = Image.open(io.BytesIO(picture.encode(Picture(PHOTO, None, long), "jpeg")))
    assert answer.info["icc_profile"] == long


def gray_profile(gamma: float) -> bytes:
    """A gray ICC profile with that gamma, by hand: header, three tags."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(78)
    bodies, offset, table = [(b"desc", text), (b"wtpt", white), (b"kTRC", curve)], 128 + 4 + 36, b""
    for name, body in bodies:
        table += name + struct.pack(">II", offset, len(body))
        offset += len(body)
    header = struct.pack(">I", offset) + bytes(4) + b"\x02\x40\0\0" + b"mntrGRAYXYZ " + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 3) + table + b"".join(body for _, body in bodies)


def test_a_gray_profile_is_applied_and_not_passed_on() -> None:
    gray = Image.fromarray(ALPHA)
    plain = picture.decode(saved(gray, "PNG"))
    found = picture.decode(saved(gray, "PNG", icc_profile=gray_profile(1.0)))
    assert found.icc == b""
    assert found.rgb.mean() > plain.rgb.mean() + 20  # linear light looks brighter than its numbers do as sRGB
    np.testing.assert_array_equal(plain.rgb[..., 0], ALPHA)  # negative control
    hidden = np.dstack([ALPHA, ALPHA.T.reshape(ALPHA.shape)])
    beside = picture.decode(saved(Image.fromarray(hidden), "PNG", icc_profile=gray_profile(1.0)))
    np.testing.assert_array_equal(beside.rgb, found.rgb)
    np.testing.assert_array_equal(beside.alpha, hidden[..., 1])


@pytest.mark.parametrize("colour", [0, 4])
def test_a_gray_profile_of_16_bits_is_the_same_curve(colour: int) -> None:
    profile = chunk(b"iCCP", b"g\0\0" + zlib.compress(gray_profile(1.0)))
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    samples = ramp if colour == 0 else np.dstack([ramp, ramp.T])
    found = picture.decode(png16(samples, colour, profile))
    shallow = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = picture.decode(saved(shallow, "PNG", icc_profile=gray_profile(1.0))).rgb
    np.testing.assert_array_equal(found.rgb.reshape(1, -1, 3)[:, ::257], levels * np.uint16(257))
    assert (np.diff(found.rgb[..., 1].ravel().astype(int)) >= 0).all()
    assert found.alpha is None if colour == 0 else np.array_equal(found.alpha, ramp.T)  # type: ignore[arg-type]
    np.testing.assert_array_equal(picture.decode(png16(samples, colour)).rgb[..., 1], ramp)  # negative control


@pytest.mark.parametrize("profile", [b"x", b"\0" * 128, RGB_PROFILE[:16] + b"CMYK" + RGB_PROFILE[20:]])
def test_a_broken_or_unfitting_profile_does_not_matter(profile: bytes) -> None:
    found = picture.decode(saved(Image.fromarray(PHOTO), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(found.rgb, PHOTO)
    assert found.icc == b""
    cmyk = Image.fromarray(PHOTO).convert("CMYK")
    broken = picture.decode(saved(cmyk, "TIFF", icc_profile=profile))
    np.testing.assert_array_equal(broken.rgb, picture.decode(saved(cmyk, "TIFF")).rgb)


# Between and out


def test_hidden_colours_do_not_reach_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = np.zeros((40, 40), np.uint8)
    alpha[10:30, 10:30] = 255
    rgb = np.zeros((40, 40, 3), np.uint8)
    rgb[...] = (255, 0, 255)  # what an editor left behind
    rgb[10:30, 10:30] = (10, 200, 30)
    filled = picture.without_ghosts(rgb, alpha)
    np.testing.assert_array_equal(filled[10:30, 10:30], rgb[10:30, 10:30])
    assert np.abs(filled.astype(int) - (10, 200, 30)).max() <= 1
    monkeypatch.setattr(picture, "_STRIP_PX", 7)
    np.testing.assert_array_equal(picture.without_ghosts(rgb, alpha), filled)  # no seam between strips
    opaque = np.full((40, 40), 255, np.uint8)
    np.testing.assert_array_equal(picture.without_ghosts(rgb, opaque), rgb)  # nobody is hidden: nothing moves
    np.testing.assert_array_equal(picture.without_ghosts(rgb, np.zeros((40, 40), np.uint8)), rgb)


@settings(max_examples=25, deadline=None)
@given(
    level=st.integers(0, 65535), scale=st.integers(1, 4), deep=st.booleans(), h=st.integers(1, 9), w=st.integers(1, 9)
)
def test_an_even_plane_stays_what_it_is(level: int, scale: int, deep: bool, h: int, w: int) -> None:
    plane = np.full((h, w), level if deep else level >> 8, np.uint16 if deep else np.uint8)
    large = picture.enlarged(plane, scale)
    assert large.shape == (h * scale, w * scale)
    assert large.dtype == plane.dtype
    assert (large == plane[0, 0]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_png_gives_back_every_bit(seed: int, deep: bool, transparent: bool) -> None:
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 65536 if deep else 256, (5, 7, 4), np.uint16 if deep else np.uint8)
    made = Picture(samples[..., :3], samples[..., 3] if transparent else None, RGB_PROFILE)
    found = picture.decode(picture.encode(made, "png"))
    np.testing.assert_array_equal(found.rgb, made.rgb)
    assert found.icc == RGB_PROFILE
    if transparent:
        np.testing.assert_array_equal(found.alpha, made.alpha)
    else:
        assert found.alpha is None


def test_jpeg_and_webp_hold_what_they_can() -> None:
    made = Picture(DEEP, ALPHA.astype(np.uint16) * 257)
    jpeg = np.asarray(Image.open(io.BytesIO(picture.encode(made, "jpeg", 98)))).astype(int)
    over_white = np.asarray(Image.alpha_composite(
        Image.new("RGBA", (53, 41), "white"), Image.fromarray(np.dstack([picture.to_u8(DEEP), ALPHA]))
    ).convert("RGB")).astype(int)  # fmt: skip
    assert np.abs(jpeg - over_white).mean() < 2
    np.testing.assert_allclose(made.flat(), over_white, atol=1)
    webp = Image.open(io.BytesIO(picture.encode(made, "webp")))
    assert webp.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(webp)[..., 3], ALPHA)


def test_levels_are_rounded_not_cut() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(picture.to_u8(every), (every.astype(int) + 128) // 257)
    assert picture.to_u16(np.array([0.0, 0.5, 1.0, 1.1, -0.1], np.float32)).tolist() == [0, 32768, 65535, 65535, 0]


def test_contrast_and_sharpening_do_what_they_say_and_nothing_at_rest() -> None:
    for samples in (PHOTO, DEEP):
        np.testing.assert_array_equal(picture.adjusted(samples), samples)
        wide = picture.adjusted(samples, contrast=1.5)
        assert wide.dtype == samples.dtype
        assert wide.std() > samples.std() > picture.adjusted(samples, contrast=0.5).std() * 1.5
        sharp = picture.adjusted(samples, sharpen=1.0).astype(float)
        assert np.abs(np.diff(sharp, axis=1)).mean() > 1.3 * np.abs(np.diff(samples.astype(float), axis=1)).mean()
    flat = picture.adjusted(PHOTO, contrast=0.0)
    assert np.ptp(flat) == 0
    assert abs(int(flat[0, 0, 0]) - PHOTO.mean()) <= 1
