"""From a body to what an engine or a filter takes: every header before the first pixel; masks, alpha, bursts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayscale import imaging, picture
from rayscale.contract import Spec
from rayscale.errors import ConfigError, ImageError, TooLargeError
from rayscale.imaging import U8, Header, Lazy, Limits
from rayscale.picture import Picture
from rayscale.serve.body import Body, only
from rayscale.serve.deep import DeepCanvas
from rayscale.serve.engine import Canvas, Plan, plan
from rayscale.serve.gateway import Gateway, Role
from rayscale.serve.table import Release

MISSING_FROM = 128  # of a mask's gray; below this of a picture's alpha: pixels to be filled
MOST_FRAMES = 32
SMALL_PX = 1 << 14  # a PNG of at most so many is inflated when it is opened: that takes as long as to open it again


@dataclass(frozen=True)
class Files:
    """The parts of a request, whose headers are within the limits and fit each other."""

    frames: Sequence[Lazy]  # one, or those of a burst
    mask: bytes | None

    @property
    def header(self) -> Header:
        """Of the first."""
        return self.frames[0].header


@dataclass(frozen=True, eq=False, kw_only=True)
class Looked:
    """A request that is let in by its headers; no pixel was decoded yet."""

    files: Files
    role: Role
    masked: bool
    plan: Plan
    spec: Spec
    engine_s: float  # estimated

    @property
    def codec_px(self) -> int:
        """Pixels to be read and written; 0: its codecs take a millisecond or two."""
        header = self.files.header
        area = header.width * header.height
        read, written = area * len(self.files.frames), area * self.spec.scale**2
        return 0 if read <= SMALL_PX and written <= 4 * SMALL_PX else read + written


@dataclass(frozen=True, eq=False)
class Work:
    """A decoded picture, cut by its plan."""

    found: Picture
    plan: Plan
    spec: Spec
    canvas: Canvas | DeepCanvas


def look(gateway: Gateway, body: Body, release: Release, role: Role, deadline: float) -> Looked:
    """Every header, the plan and its price. Raises: what refuses a request, the cheapest first."""
    spec, limits = gateway.card(release, role).spec, gateway.settings.limits
    channels = tuple(map(math.prod, gateway.engine.session(release.digest).leads.values()))
    if role == "burst":
        count, masked = channels[0] // 3, False
        files = burst(body, limits, str(release), count)
    elif channels in ((3,), (3, 1)):
        masked = len(channels) == 2
        files = single(body, limits, str(release), masked=masked, may_mask=role == "restore")
    else:
        names = ", ".join(t.name for t in spec.inputs)
        raise ConfigError("model", names, "has inputs that this route does not feed", "see /v1/models")
    header = files.header
    check_output(gateway, header, spec.scale)
    planned = plan(spec, header.height, header.width, gateway.engine.settings)
    engine_s = gateway.engine.cost_s(release.digest, planned.pixels)
    looked = Looked(files=files, role=role, masked=masked, plan=planned, spec=spec, engine_s=engine_s)
    gateway.admit(
        release.digest, planned.pixels, deadline, f"{planned.width}x{planned.height}", codec_px=looked.codec_px
    )
    return looked


def cut(looked: Looked, limits: Limits) -> Work:
    """What the model's tiles are cut from. Raises: as `decode`."""
    planned, spec = looked.plan, looked.spec
    if looked.role == "burst":
        found, stack = decode_burst(looked.files)
        return Work(found, planned, spec, Canvas(planned, stack))
    found, mask = decode(looked.files, limits, masked=looked.masked)
    if found.bits == 16:
        return Work(found, planned, spec, DeepCanvas(planned, spec, found.rgb, mask))
    return Work(found, planned, spec, Canvas(planned, found.rgb if mask is None else np.dstack([found.rgb, mask])))


def check_output(gateway: Gateway, header: Header, scale: int) -> None:
    """Raises: TooLargeError."""
    if header.width * header.height * scale**2 > gateway.settings.max_output_pixels:
        rule = f"at most {gateway.settings.max_output_pixels} output pixels are made"
        raise TooLargeError("output", f"{header.width * scale}x{header.height * scale}", rule, "send a smaller picture")


def single(body: Body, limits: Limits, model: str, *, masked: bool, may_mask: bool) -> Files:
    """One picture and, for who takes one, its mask. Raises: as `Body.parts`, `imaging.read_header`; ConfigError."""
    parts = body.parts({"image": 1, "mask": 1} if may_mask else {"image": 1})
    image, mask = only(parts, "image"), parts.get("mask", [None])[0]
    file = opened(image, limits, "image")
    header = file.header
    if mask is not None:
        size = opened(mask, limits, "mask").header
        if not masked:
            raise ConfigError("mask", f"{size.width}x{size.height}", f"{model} takes none", "leave it out")
        _check_alike(size, header, "mask")
    elif masked and not header.alpha:
        raise ConfigError("mask", "(none)", f"{model} fills what a mask marks",
                          "send a second part named mask, or transparent pixels")  # fmt: skip
    return Files([file], mask)


def burst(body: Body, limits: Limits, model: str, count: int | None) -> Files:
    """`count` frames of one size, or any number from 2. Raises: as `single`."""
    parts = body.parts({"image": MOST_FRAMES})
    only(parts, "image")
    frames = parts["image"]
    if len(frames) != (count or max(2, len(frames))):
        rule = f"{model} takes {count or 'at least 2'}"
        raise ConfigError("image", f"{len(frames)} frames", rule, "send as many parts named image")
    files = Files(opened_all(frames, limits), None)
    for frame in files.frames:
        _check_alike(frame.header, files.header, "image")
    return files


def opened_all(images: Sequence[bytes], limits: Limits) -> list[Lazy]:
    """Raises: as `opened`, and `check_total` before the next is opened: a WebP's canvas is allocated then."""
    files: list[Lazy] = []
    for image in images:
        files.append(opened(image, limits, "image"))
        check_total([file.header for file in files], limits)
    return files


def check_total(headers: Sequence[Header], limits: Limits) -> None:
    """The limit of one picture is that of all of a request too. Raises: TooLargeError."""
    if (pixels := sum(h.width * h.height for h in headers)) > limits.max_pixels:
        rule = f"a request has at most {limits.max_pixels} pixels"
        raise TooLargeError("image", f"{pixels} pixels in {len(headers)}", rule, "send fewer at once")


def opened(data: bytes, limits: Limits, name: str) -> Lazy:
    """Raises: as `imaging.read_header`; ImageError for what an answer could not keep."""
    file = imaging.open_lazily(data, limits, name, unpack_px=SMALL_PX)
    picture.check_kept(file.header, name)
    return file


def _check_alike(header: Header, first: Header, name: str) -> None:
    if (header.width, header.height) != (first.width, first.height):
        rule = f"must be of the picture's size, {first.width}x{first.height}"
        raise ImageError(name, f"{header.width}x{header.height}", rule, "resize it")


def decode(files: Files, limits: Limits, *, masked: bool) -> tuple[Picture, U8 | None]:
    """The picture, without the colours of hidden pixels, and the mask u8[h, w], 255 where pixels are missing.

    Alpha that serves as the mask is gone from the answer.
    """
    found = picture.decode_opened(files.frames[0])
    if masked and files.mask is None:
        if found.alpha is None:
            raise ImageError("image", f"{found.bits} bits", "its transparency could not be read", "send a mask")
        missing = np.where(picture.to_u8(found.alpha) < MISSING_FROM, 255, 0).astype(np.uint8)
        return replace(found, alpha=None), missing
    if found.alpha is not None:
        found = replace(found, rgb=picture.without_ghosts(found.rgb, found.alpha))
    if files.mask is None:
        return found, None
    gray = imaging.decode_gray(files.mask, limits, "mask")[0]
    return found, np.where(gray >= MISSING_FROM, 255, 0).astype(np.uint8)


def decode_burst(files: Files) -> tuple[Picture, U8]:
    """What the first frame has beside its colours, in 8 bits, and all frames u8[h, w, 3 T], laid over white."""
    found = [picture.decode_opened(frame) for frame in files.frames]
    return Picture(found[0].flat(), None, found[0].icc), np.dstack([frame.flat() for frame in found])
