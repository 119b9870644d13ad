"""A picture with what its file says beside the colours: transparency, 16 bits, a colour profile; in and out.

`imaging` reads and writes what nets see, u8[h, w, 3]. Who answers with a picture keeps the rest too.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from rayscale import containers, imaging
from rayscale.errors import ImageError
from rayscale.imaging import F32, U8, Header, Lazy, Limits, Media

Samples = NDArray[Any]  # u8 or u16

_LIMITS = Limits()
_DEEP_MODES = ("RGB", "RGBA", "L", "LA", "I;16", "I;16B", "I")  # of Pillow, that hold 16 bits in the file
_GHOST_PX = (2, 8, 32)  # how far the colour of a hidden pixel is looked for, in turn
_STRIP_PX = 512


@dataclass(frozen=True, eq=False)
class Picture:
    """Samples of one type, uint8 or uint16, upright."""

    rgb: Samples  # [h, w, 3]
    alpha: Samples | None = None  # [h, w], 0 where nothing is seen
    icc: bytes = b""  # a profile of the RGB samples; none: they are sRGB

    @property
    def bits(self) -> int:
        return 8 * int(self.rgb.dtype.itemsize)

    def flat(self) -> U8:
        """u8[h, w, 3] for who sees no more: rounded to 8 bits, laid over white."""
        rgb = to_u8(self.rgb)
        if self.alpha is None:
            return rgb
        white = Image.new("RGB", (rgb.shape[1], rgb.shape[0]), "white")
        return np.array(Image.composite(Image.fromarray(rgb), white, Image.fromarray(to_u8(self.alpha))))


def to_u8(samples: Samples) -> U8:
    """u16 rounded to the nearest of the 256 levels; u8 as it is."""
    if samples.dtype == np.uint8:
        return samples
    return np.asarray(cv2.convertScaleAbs(samples, alpha=1 / 257), np.uint8)


def to_u16(unit_f32: F32) -> Samples:
    """[0, 1] -> uint16, rounded half to even, clipped."""
    samples: Samples = np.clip(np.rint(unit_f32 * np.float32(65535)), 0, 65535).astype(np.uint16)
    return samples


# Reading


def decode(data: bytes, limits: Limits = _LIMITS, name: str = "image") -> Picture:
    """All of it: 16 bits stay, alpha stays, an RGB profile is kept, one of gray or CMYK applied. Upright by EXIF.

    A profile of 16-bit gray is applied as a curve through its 256 levels of 8 bits. CMYK and other rare 16-bit
    pictures become 8 bits. Raises: as `imaging.decode_rgb`; ImageError for animations, pages, and depths other than
    1 .. 8 and 16 bits.
    """
    return decode_opened(imaging.open_lazily(data, limits, name))


def decode_opened(file: Lazy) -> Picture:
    """As `decode`, what was opened before, once: Pillow's copy of the pixels goes. Raises: as it."""
    file = file.opened()
    picture, header, name = file.picture, file.header, file.name
    if picture is None:
        return Picture(imaging.plain_rgb(file))
    check_kept(header, name)
    with imaging.hostile(name, header.format):
        picture.load()  # damage is found here, before the other codec prints about it
        deep = header.bits == 16 and picture.mode in _DEEP_MODES
        found = _deep(file.data, picture, header) if deep else _shallow(picture)
        turn = imaging.UPRIGHT[file.orientation]
        rgb = np.ascontiguousarray(turn(found.rgb))
        alpha = None if found.alpha is None else np.ascontiguousarray(turn(found.alpha))
        if rgb.shape != (header.height, header.width, 3):
            raise ValueError("pixels do not match the header")
    picture.close()
    return replace(found, rgb=rgb, alpha=alpha)


def check_kept(header: Header, name: str) -> None:
    """Refuse, by the header, what an answer could not keep. Raises: ImageError."""
    if header.frames > 1:
        raise ImageError(name, f"{header.frames} frames", "one picture is kept", "send one frame")
    if header.bits > 8 and header.bits != 16:
        raise ImageError(name, f"{header.bits} bits per sample", "8 and 16 are kept", "convert it to 16 bits")


def _shallow(picture: ImageFile) -> Picture:
    flat: Image.Image = picture
    profile = picture.info.get("icc_profile") or b""
    alpha = None
    if picture.has_transparency_data and picture.mode in ("L", "LA"):
        flat, hidden = picture.convert("LA").split()
        alpha = np.array(hidden)
    elif picture.has_transparency_data:
        rgba = np.asarray(picture.convert("RGBA"))
        flat, alpha = Image.fromarray(rgba[..., :3]), rgba[..., 3]
    if profile[16:20] != b"RGB ":
        flat, profile = _to_srgb(flat, profile), b""
    return Picture(np.array(flat if flat.mode == "RGB" else flat.convert("RGB")), alpha, profile)


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Apply a profile of gray or CMYK; a broken or unfitting one does not make the picture unusable."""
    if {"CMYK": b"CMYK", "L": b"GRAY"}.get(picture.mode) != profile[16:20]:
        return picture
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        srgb = ImageCms.createProfile("sRGB")
        turned = ImageCms.profileToProfile(picture, io.BytesIO(profile), srgb, outputMode="RGB")
        return turned or picture
    return picture


def _deep(data: bytes, picture: ImageFile, header: Header) -> Picture:
    """16 bits, which Pillow would halve."""
    if header.format == "ppm":
        found: Any = _ppm(data, picture)
    else:
        lean = containers.lean(header.format, data, "image").data  # OpenCV unpacks texts too
        found = cv2.imdecode(np.frombuffer(lean, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise ValueError("its 16 bits could not be read")
    found = found.reshape(*found.shape[:2], -1)
    alpha = None
    if found.shape[2] == 4:
        rgb = cv2.cvtColor(found, cv2.COLOR_BGRA2RGB)
        if header.alpha:  # else nobody says what the fourth channel is
            alpha = found[..., 3]
        if _is_premultiplied(picture):
            _divide(rgb, found[..., 3])
    elif found.shape[2] == 3:
        rgb = cv2.cvtColor(found, cv2.COLOR_BGR2RGB)
    else:
        rgb = np.repeat(found[..., :1], 3, axis=2)
        hidden = picture.info.get("transparency")  # one level of gray, which OpenCV does not look at
        if isinstance(hidden, int):
            alpha = np.where(found[..., 0] == hidden, 0, 65535).astype(np.uint16)
        if imaging.is_negative(picture):
            rgb = 65535 - rgb
    profile = picture.info.get("icc_profile") or b""
    if profile[16:20] == b"GRAY" and (rgb == rgb[..., :1]).all():  # Pillow calls gray with alpha RGBA
        rgb = _by_curve(rgb, profile)
    return Picture(rgb, alpha, profile if profile[16:20] == b"RGB " else b"")


def _is_premultiplied(picture: ImageFile) -> bool:
    extra = picture.tag_v2.get(338, ()) if isinstance(picture, TiffImageFile) else ()
    return tuple(np.atleast_1d(extra)) == (1,)


def _divide(rgb: Samples, alpha: Samples) -> None:
    """Colours that were multiplied by alpha, as they were; in place."""
    for y in range(0, len(rgb), _STRIP_PX):  # quotients are float32
        rows = slice(y, y + _STRIP_PX)
        share = np.float32(65535) / np.maximum(alpha[rows], 1)[..., None].astype(np.float32)
        rgb[rows] = np.minimum(np.rint(rgb[rows] * share), 65535)


def _by_curve(rgb: Samples, profile: bytes) -> Samples:
    """Gray u16[h, w, 3] by its profile, of which Pillow knows 256 levels."""
    levels = _to_srgb(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), profile).convert("RGB")
    known = np.asarray(levels, np.float64)[0] * 257
    curves = [np.rint(np.interp(np.arange(65536), np.arange(256) * 257, known[:, c])) for c in range(3)]
    return np.stack([curve.astype(np.uint16)[rgb[..., c]] for c, curve in enumerate(curves)], axis=2)


def _ppm(data: bytes, picture: ImageFile) -> Samples:
    """Big-endian samples of 0 .. maxval behind the header, as BGR or gray."""
    start, most = imaging.ppm_header(data)
    width, height = picture.size
    channels = 3 if picture.mode == "RGB" else 1
    samples = np.frombuffer(data, ">u2", width * height * channels, start).reshape(height, width, channels)
    return np.asarray(np.rint(samples[..., ::-1] * (65535 / most)).clip(0, 65535), np.uint16)


# Between


def without_ghosts(rgb: Samples, alpha: Samples) -> Samples:
    """Pixels that nobody sees get the colour of the seen ones around: a net would smear theirs into what is seen."""
    if alpha.all() or not alpha.any():
        return rgb
    filled, far = np.empty_like(rgb), max(_GHOST_PX)
    for y in range(0, len(rgb), _STRIP_PX):  # in strips: sums are float32
        above = min(y, far)
        rows = slice(y - above, y + _STRIP_PX + far)
        filled[y : y + _STRIP_PX] = _coloured(rgb[rows], alpha[rows])[above : above + _STRIP_PX]
    return filled


def _coloured(rgb: Samples, alpha: Samples) -> Samples:
    hidden, filled = alpha == 0, rgb.copy()
    weight = alpha.astype(np.float32)
    weighted = rgb.astype(np.float32) * weight[..., None]
    for radius in _GHOST_PX:
        size = (2 * radius + 1, 2 * radius + 1)
        total = cv2.blur(weight, size)
        found = hidden & (total > 1e-3)
        colour = cv2.blur(weighted, size)[found] / total[found][:, None]
        filled[found] = np.rint(colour).clip(0, np.iinfo(rgb.dtype).max)
        hidden &= ~found
    return filled


def enlarged(plane: Samples, scale: int) -> Samples:
    """[h, w] -> [h * scale, w * scale] of its type, bicubic as Pillow has it."""
    if scale == 1:
        return plane
    height, width = plane.shape
    given = plane if plane.dtype == np.uint8 else plane.astype(np.float32)  # Pillow has no bicubic of 16 bits
    wide = Image.fromarray(given).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    if plane.dtype == np.uint8:
        return np.array(wide)
    found: Samples = np.rint(np.asarray(wide)).clip(0, np.iinfo(plane.dtype).max).astype(plane.dtype)
    return found


def adjusted(rgb: Samples, *, contrast: float = 1.0, sharpen: float = 0.0) -> Samples:
    """[h, w, 3] -> the same: distances from the mean times `contrast`, then plus `sharpen` of what a blur takes away.

    The mean is that of the picture's samples; the blur a Gaussian of 1 px. 1 and 0 change nothing.
    """
    if contrast != 1:
        rgb = cv2.addWeighted(rgb, contrast, rgb, 0.0, (1 - contrast) * float(rgb.mean()))
    if sharpen:
        rgb = cv2.addWeighted(rgb, 1 + sharpen, cv2.GaussianBlur(rgb, (0, 0), 1.0), -sharpen, 0.0)
    return rgb


# Writing


def encode(picture: Picture, media: Media, quality: int = 95) -> bytes:
    """PNG keeps all, WebP 8 bits with alpha, JPEG 8 bits laid over white; all of them the profile.

    Raises: as `imaging.encode`.
    """
    if media == "jpeg":
        return _with_jpeg_profile(imaging.encode(picture.flat(), media, quality), picture.icc)
    samples = picture.rgb if picture.alpha is None else np.dstack([picture.rgb, picture.alpha])
    if media == "png":
        return _with_png_profile(imaging.encode(samples, media, quality), picture.icc)
    if not picture.icc:
        return imaging.encode(to_u8(samples), media, quality)
    imaging.check_side(samples.shape[0], samples.shape[1], media)
    buffer = io.BytesIO()
    Image.fromarray(to_u8(samples)).save(buffer, "WEBP", quality=quality, icc_profile=picture.icc)
    return buffer.getvalue()


def _with_png_profile(data: bytes, icc: bytes) -> bytes:
    if not icc:
        return data
    body = b"iCCP" + b"profile\0\0" + zlib.compress(icc)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]  # behind the signature and IHDR


def _with_jpeg_profile(data: bytes, icc: bytes) -> bytes:
    if not icc or len(icc) > 255 * 65_519:  # it holds no more
        return data
    room = 65_519  # of a segment, beside its own 16 bytes
    parts = [icc[i : i + room] for i in range(0, len(icc), room)]
    segments = [
        b"\xff\xe2" + struct.pack(">H", len(part) + 16) + b"ICC_PROFILE\0" + bytes((number, len(parts))) + part
        for number, part in enumerate(parts, 1)
    ]
    start = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2  # behind SOI and JFIF
    return data[:start] + b"".join(segments) + data[start:]
