"""A picture in, a picture out: through a model in exact tiles, or through a classical method to compare it with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayscale import picture
from rayscale.errors import TooLargeError
from rayscale.picture import Picture, Samples
from rayscale.serve import deep
from rayscale.serve.admission import CodecShare
from rayscale.serve.answers import Answer, Format, pictures_json, timing_header
from rayscale.serve.body import Body
from rayscale.serve.deep import DeepCanvas
from rayscale.serve.engine import Canvas
from rayscale.serve.gateway import Gateway, Role
from rayscale.serve.intake import Files, Looked, Work, burst, check_output, cut, decode, decode_burst, look, single
from rayscale.serve.methods import MASKED, filtered, load, merged
from rayscale.serve.table import Release


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What becomes of the result."""

    format: Format = Format()
    contrast: float = 1.0
    sharpen: float = 0.0


async def by_model(gateway: Gateway, body: Body, release: Release, role: Role, finish: Finish) -> Answer:
    """The answer of a model, and the headers that tell how it came about."""
    deadline, spans = gateway.deadline(), dict[str, float]()
    looked: list[Looked] = []
    begun: list[Work] = []
    share, codec_px = CodecShare(gateway.codec_load), 0

    def first() -> bool:
        nonlocal codec_px
        looked.append(look(gateway, body, release, role, deadline))
        if codec_px := looked[0].codec_px:
            share.enter(codec_px, gateway.engine.of(release.digest), looked[0].engine_s)
        return not codec_px

    def begin() -> Canvas | None:
        work = cut(looked.pop(), gateway.settings.limits)
        begun.append(work)
        if not isinstance(work.canvas, Canvas):
            return None  # of 16 bits: the engine gets some tiles at a time
        share.decoded()
        return work.canvas

    def end() -> Answer:
        return _finish(gateway, begun[0], finish, {**gateway.about(release), "tiling": begun[0].plan.tiling})

    try:
        made = await gateway.made(release.digest, len(body.data), first, begin, end, spans, deadline)
        (work,) = begun
        if made is not None:
            answer = made
        else:
            assert isinstance(work.canvas, DeepCanvas)
            timing = await deep.run(gateway, work.canvas, release.digest, work.spec.outputs[0].name, deadline)
            spans["queue"], spans["infer"] = timing
            answer, spans["encode"] = await gateway.codec(deadline, end)
    finally:
        share.end()
    if codec_px:
        gateway.codec_load.learn(codec_px, spans["decode"] + spans["encode"])
    gateway.meters.add("rayscale_queue_seconds", spans["queue"], model=release.name)
    headers = {
        **answer.headers,
        **gateway.headers(release),
        "X-Rayscale-Tiling": work.plan.tiling,
        "Server-Timing": timing_header(spans),
    }
    return Answer(body=answer.body, media_type=answer.media_type, headers=headers)


async def by_method(gateway: Gateway, body: Body, method: str, role: Role, scale: int, finish: Finish) -> Answer:
    """The answer of a classical method, with its default settings, on 8 bits."""
    deadline = gateway.deadline()
    (files, pixels), _ = await gateway.codec(deadline, _looked, gateway, body, method, role, scale)
    kind = f"{method} {finish.format.media}"
    answer, seconds = await gateway.slow(
        kind, pixels * scale**2, deadline, _filter, gateway, files, method, role, scale, finish
    )
    headers = {
        **answer.headers,
        "X-Rayscale-Model": f"classical:{method}",
        "X-Rayscale-Tiling": "whole",
        "X-Rayscale-Provider": "classical",
        "Server-Timing": timing_header({"filter": seconds}),
    }
    return replace(answer, headers=headers)


# In threads


def _finish(gateway: Gateway, work: Work, finish: Finish, about: dict[str, str]) -> Answer:
    return _answer(gateway, work.found, work.canvas.result, work.plan.scale, finish, about)


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
    body = encoded
    if finish.format.as_json:
        body = pictures_json([encoded], media, {**about, "size": f"{rgb.shape[1]}x{rgb.shape[0]}"})
    return Answer(body=body, media_type=finish.format.media_type, headers=headers)


def _looked(gateway: Gateway, body: Body, method: str, role: Role, scale: int) -> tuple[Files, int]:
    """The parts of a request that a method may work on, by their headers, and all their pixels."""
    limits, settings = gateway.settings.limits, gateway.settings
    if role == "burst":
        files = burst(body, limits, method, None)
    else:
        files = single(body, limits, method, masked=method in MASKED, may_mask=role == "restore")
    pixels = files.header.width * files.header.height * len(files.frames)
    if pixels > settings.max_method_pixels:
        rule = f"methods take at most {settings.max_method_pixels} pixels"
        raise TooLargeError("image", f"{pixels} pixels", rule, "send less, or use a model")
    check_output(gateway, files.header, scale)
    load()
    return files, pixels


def _filter(gateway: Gateway, files: Files, method: str, role: Role, scale: int, finish: Finish) -> Answer:
    if role == "burst":
        found, stack = decode_burst(files)
        rgb = merged(stack, method, scale)
    else:
        found, missing = decode(files, gateway.settings.limits, masked=method in MASKED)
        rgb = filtered(picture.to_u8(found.rgb), missing, method, scale)
    return _answer(gateway, found, rgb, scale, finish, {"model": f"classical:{method}"})
