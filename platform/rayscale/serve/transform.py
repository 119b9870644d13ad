"""A picture in, a picture out: through a model in exact tiles, or through a classical method to compare it with."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayscale import imaging, picture
from rayscale.contract import Spec
from rayscale.errors import ConfigError, ImageError, TooLargeError
from rayscale.imaging import F32, U8, Header, Limits
from rayscale.picture import Picture, Samples
from rayscale.serve.answers import Answer, Format, pictures_json, timing_header
from rayscale.serve.batching import Timing, leads
from rayscale.serve.body import Body, only
from rayscale.serve.engine import Canvas, Plan, plan
from rayscale.serve.gateway import Gateway, Role
from rayscale.serve.methods import MASKED, filtered
from rayscale.serve.rollout import Release

MISSING_FROM = 128  # of a mask's gray; below this of a picture's alpha: pixels to be filled


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What becomes of the result."""

    format: Format = Format()
    contrast: float = 1.0
    sharpen: float = 0.0


@dataclass(frozen=True, eq=False)
class Work:
    """A decoded picture and its plan."""

    found: Picture
    mask: U8 | None  # [h, w], 255 where pixels are missing
    plan: Plan
    spec: Spec


async def by_model(gateway: Gateway, body: Body, release: Release, role: Role, finish: Finish) -> Answer:
    """The answer of a model, and the headers that tell how it came about."""
    deadline = gateway.deadline()
    work, decode_s = await gateway.codec(_prepare, gateway, body, release, role, deadline)
    if work.found.bits == 8:
        canvas = Canvas(work.plan, _stack(work))
        timing = await gateway.engine.run(release.digest, canvas.tiles, canvas.place, deadline=deadline)
        result: Any = canvas
    else:
        result, timing = await _run_deep(gateway, work, release, deadline)
    about = {**gateway.about(release), "tiling": work.plan.tiling}
    answer, encode_s = await gateway.codec(_finish, gateway, work, result, finish, about)
    gateway.meters.add("rayscale_tiles_total", len(work.plan.tiles), model=release.name)
    gateway.meters.add("rayscale_queue_seconds", timing.queue_s, model=release.name)
    spans = {"decode": decode_s, "queue": timing.queue_s, "infer": timing.run_s, "encode": encode_s}
    headers = {
        **answer.headers,
        **gateway.headers(release),
        "X-Rayscale-Tiling": work.plan.tiling,
        "Server-Timing": timing_header(spans),
    }
    return replace(answer, headers=headers)


async def by_method(gateway: Gateway, body: Body, method: str, scale: int, finish: Finish) -> Answer:
    """The answer of a classical method, with its default settings, on 8 bits."""
    answer, seconds = await gateway.slow(_filter, gateway, body, method, scale, finish)
    headers = {
        **answer.headers,
        "X-Rayscale-Model": f"classical:{method}",
        "X-Rayscale-Tiling": "whole",
        "X-Rayscale-Provider": "classical",
        "Server-Timing": timing_header({"filter": seconds}),
    }
    return replace(answer, headers=headers)


# In threads


def _prepare(gateway: Gateway, body: Body, release: Release, role: Role, deadline: float) -> Work:
    limits = gateway.settings.limits
    parts = body.parts({"image": 1, "mask": 1} if role == "restore" else {"image": 1})
    image, mask = only(parts, "image"), parts.get("mask", [None])[0]
    header = imaging.read_header(image, limits)
    picture.check_kept(header, "image")
    spec = gateway.card(release, role).spec
    masked = _takes_mask(spec)
    _check_mask(mask, header, limits, masked, str(release))
    pixels = header.width * header.height * spec.scale**2
    if pixels > gateway.settings.max_output_pixels:
        shown = f"{header.width * spec.scale}x{header.height * spec.scale}"
        rule = f"at most {gateway.settings.max_output_pixels} output pixels are made"
        raise TooLargeError("output", shown, rule, "send a smaller picture")
    planned = plan(spec, header.height, header.width, gateway.engine.settings)
    shown = f"{planned.width}x{planned.height}"
    gateway.admit(gateway.engine.cost_s(release.digest, planned.pixels), deadline, shown)
    found, missing = _decode(image, mask, limits, masked)
    if found.alpha is not None:
        found = replace(found, rgb=picture.without_ghosts(found.rgb, found.alpha))
    return Work(found, missing, planned, spec)


def _takes_mask(spec: Spec) -> bool:
    """Whether its second input is a mask. Raises: ConfigError for inputs that no request has."""
    channels = tuple(leads(spec).values())
    if channels not in (((3,),), ((3,), (1,))):
        names = ", ".join(t.name for t in spec.inputs)
        raise ConfigError("model", names, "has inputs that this route does not feed", "see /v1/models")
    return len(channels) == 2


def _check_mask(mask: bytes | None, header: Header, limits: Limits, masked: bool, model: str) -> None:
    """By its header. Raises: ConfigError, ImageError, TooLargeError."""
    if mask is not None:
        size = imaging.read_header(mask, limits, "mask")
        picture.check_kept(size, "mask")
        if not masked:
            raise ConfigError("mask", f"{size.width}x{size.height}", f"{model} takes none", "leave it out")
        if (size.width, size.height) != (header.width, header.height):
            rule = f"must be of the picture's size, {header.width}x{header.height}"
            raise ImageError("mask", f"{size.width}x{size.height}", rule, "resize it")
    elif masked and not header.alpha:
        raise ConfigError("mask", "(none)", f"{model} fills what a mask marks",
                          "send a second part named mask, or transparent pixels")  # fmt: skip


def _decode(image: bytes, mask: bytes | None, limits: Limits, masked: bool) -> tuple[Picture, U8 | None]:
    """The picture and, for who takes one, its mask; alpha that serves as the mask is gone from the answer."""
    found = picture.decode(image, limits)
    if not masked:
        return found, None
    if mask is not None:
        gray = imaging.decode_gray(mask, limits, "mask")[0]
        return found, np.where(gray >= MISSING_FROM, 255, 0).astype(np.uint8)
    assert found.alpha is not None  # the header said so
    missing = np.where(picture.to_u8(found.alpha) < MISSING_FROM, 255, 0).astype(np.uint8)
    return replace(found, alpha=None), missing


def _stack(work: Work) -> U8:
    """u8[h, w, 3 or 4]: what the model's tiles are cut from."""
    return work.found.rgb if work.mask is None else np.dstack([work.found.rgb, work.mask])


def _finish(gateway: Gateway, work: Work, result: Any, finish: Finish, about: dict[str, str]) -> Answer:
    rgb = result.result if isinstance(result, Canvas) else result
    return _answer(gateway, work.found, rgb, work.plan.scale, finish, about)


def _answer(
    gateway: Gateway, found: Picture, rgb: Samples, scale: int, finish: Finish, about: dict[str, str]
) -> Answer:
    """Encode a result together with what its picture had beside the colours."""
    rgb = picture.adjusted(rgb, contrast=finish.contrast, sharpen=finish.sharpen)
    alpha = None if found.alpha is None else picture.enlarged(found.alpha, scale)
    if alpha is not None and alpha.dtype != rgb.dtype:
        alpha = picture.to_u8(alpha)
    made, media = Picture(rgb, alpha, found.icc), finish.format.media
    encoded = picture.encode(made, media, gateway.settings.quality)
    headers = {"X-Rayscale-Bits": str(made.bits if media == "png" else 8)}
    if not finish.format.as_json:
        return Answer(body=encoded, media_type=finish.format.media_type, headers=headers)
    about = {**about, "size": f"{rgb.shape[1]}x{rgb.shape[0]}"}
    return Answer(body=pictures_json([encoded], media, about), media_type=finish.format.media_type, headers=headers)


def _filter(gateway: Gateway, body: Body, method: str, scale: int, finish: Finish) -> Answer:
    limits, settings = gateway.settings.limits, gateway.settings
    masked = method in MASKED
    parts = body.parts({"image": 1, "mask": 1})
    image, mask = only(parts, "image"), parts.get("mask", [None])[0]
    header = imaging.read_header(image, limits)
    picture.check_kept(header, "image")
    _check_mask(mask, header, limits, masked, method)
    if (pixels := header.width * header.height) > settings.max_method_pixels:
        rule = f"methods take at most {settings.max_method_pixels} pixels"
        raise TooLargeError("image", f"{header.width}x{header.height}", rule, "send a smaller picture, or use a model")
    if pixels * scale**2 > settings.max_output_pixels:
        rule = f"at most {settings.max_output_pixels} output pixels are made"
        raise TooLargeError("output", f"{header.width * scale}x{header.height * scale}", rule, "use a smaller scale")
    found, missing = _decode(image, mask, limits, masked)
    rgb = picture.to_u8(found.rgb if found.alpha is None else picture.without_ghosts(found.rgb, found.alpha))
    about = {"model": f"classical:{method}"}
    return _answer(gateway, found, filtered(rgb, missing, method, scale), scale, finish, about)


# 16 bits: in float32 from end to end, a tile at a time


async def _run_deep(gateway: Gateway, work: Work, release: Release, deadline: float) -> tuple[Samples, Timing]:
    """u16[h, w, 3] -> u16[h * scale, w * scale, 3]. The engine's own tiles are of 8 bits: these go as calls."""
    tall, wide, scale = work.plan.padded_height, work.plan.padded_width, work.plan.scale
    out = np.empty((tall * scale, wide * scale, 3), np.uint16)
    padding = ((0, tall - work.plan.height), (0, wide - work.plan.width))
    rgb = np.pad(work.found.rgb, (*padding, (0, 0)), mode="edge")
    mask = None if work.mask is None else np.pad(work.mask, padding, mode="edge")
    queue_s = run_s = 0.0
    owner = uuid.uuid4().hex  # of all these calls: they take one turn together
    for index in range(len(work.plan.tiles)):
        inputs, _ = await gateway.codec(_window, work, rgb, mask, index)
        outputs, timing = await gateway.engine.call(release.digest, inputs, deadline=deadline, owner=owner)
        await gateway.codec(_place, work, out, outputs[work.spec.outputs[0].name], index)
        queue_s, run_s = queue_s + timing.queue_s, run_s + timing.run_s
    return np.ascontiguousarray(out[: work.plan.height * scale, : work.plan.width * scale]), Timing(queue_s, run_s)


def _window(work: Work, rgb: Samples, mask: U8 | None, index: int) -> dict[str, F32]:
    """A tile as the model's inputs: samples / 65535, the mask / 255."""
    tile = work.plan.tiles[index]
    place = slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width)
    names = [t.name for t in work.spec.inputs]
    image = np.ascontiguousarray(rgb[place].transpose(2, 0, 1)[None], np.float32) / np.float32(65535)
    return {
        names[0]: image,
        **({names[1]: (mask[place] // 255).astype(np.float32)[None, None]} if mask is not None else {}),
    }


def _place(work: Work, out: Samples, result: F32, index: int) -> None:
    """Keep what a tile contributes, as `Canvas.place` does."""
    t, scale = work.plan.tiles[index], work.plan.scale
    kept = result[
        0, :, (t.keep_top - t.y) * scale : (t.keep_bottom - t.y) * scale,
        (t.keep_left - t.x) * scale : (t.keep_right - t.x) * scale,
    ]  # fmt: skip
    rows, columns = slice(t.keep_top * scale, t.keep_bottom * scale), slice(t.keep_left * scale, t.keep_right * scale)
    out[rows, columns] = picture.to_u16(kept).transpose(1, 2, 0)
