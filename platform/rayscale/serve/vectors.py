"""Pictures as vectors, and how alike two pictures are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rayscale import imaging, picture
from rayscale.contract import Spec
from rayscale.errors import ConfigError, TooLargeError
from rayscale.imaging import F32, U8
from rayscale.serve import calls
from rayscale.serve.answers import Answer, timing_header
from rayscale.serve.batching import Timing, too_late
from rayscale.serve.body import JSON, Body, json_parts, only
from rayscale.serve.calls import Ask
from rayscale.serve.gateway import Gateway
from rayscale.serve.intake import check_total, opened, opened_all
from rayscale.serve.methods import Measure, applicable, compared
from rayscale.serve.remote import CHUNK_BYTES
from rayscale.serve.table import Release

EMBED_PX = 512  # the longer side that a model of any size is shown, unless `side_px` says another


async def embed(gateway: Gateway, body: Body, release: Release, side_px: int) -> Answer:
    """A vector a picture, in their order."""
    deadline = gateway.deadline()
    pictures, decode_s = await gateway.codec(deadline, _decode_all, gateway, body, release, side_px)
    names = [t.name for t in gateway.card(release, "embed").spec.outputs]
    found, timing = await _vectors(gateway, release, pictures, deadline)
    gateway.meters.add("rayscale_queue_seconds", timing.queue_s, model=release.name)
    spans = {"decode": decode_s, "queue": timing.queue_s, "infer": timing.run_s}
    headers = {**gateway.headers(release), "Server-Timing": timing_header(spans)}
    text, _ = await gateway.codec(deadline, _embeddings_json, gateway.about(release), names, found)
    return Answer(body=text, media_type=JSON, headers=headers)


def _embeddings_json(about: Mapping[str, str], names: Sequence[str], found: Sequence[Mapping[str, F32]]) -> bytes:
    """As OpenAI has it: the first output is the embedding, others stand beside it."""
    first, *others = names
    rows = [
        {"object": "embedding", "index": index, "embedding": outputs[first][0].tolist()}
        | {name: outputs[name][0].tolist() for name in others}
        for index, outputs in enumerate(found)
    ]
    return json.dumps({"object": "list", **about, "data": rows}).encode()


async def _vectors(
    gateway: Gateway, release: Release, pictures: Sequence[F32], deadline: float
) -> tuple[list[dict[str, F32]], Timing]:
    """All outputs of each picture f32[1, 3, h, w], in their order."""
    engine, digest = gateway.engine, release.digest
    name = gateway.card(release, "embed").spec.inputs[0].name
    groups = grouped(pictures, engine.settings.max_batch if engine.session(digest).shares else 1)
    found: dict[int, dict[str, F32]] = {}

    async def some(ask: Ask, index: int) -> None:
        group = groups[index]
        gateway.admit(digest, len(group), deadline, f"{len(group)} of {len(pictures)} pictures")
        nchw = np.concatenate([pictures[i] for i in group]) if len(group) > 1 else pictures[group[0]]
        outputs = await ask({name: nchw})
        for position, i in enumerate(group):
            found[i] = {output: value[position : position + 1] for output, value in outputs.items()}

    timing = await calls.run(engine, digest, some, len(groups), deadline)
    return [found[i] for i in range(len(pictures))], timing


def grouped(pictures: Sequence[F32], most: int) -> list[list[int]]:
    """Which of them go in one call: of one shape, at most so many, no more than a chunk holds."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, nchw in enumerate(pictures):
        by_shape.setdefault(nchw.shape, []).append(index)
    groups = []
    for alike in by_shape.values():
        count = max(1, min(most, CHUNK_BYTES // pictures[alike[0]].nbytes))
        groups += [alike[i : i + count] for i in range(0, len(alike), count)]
    return groups


def _decode_all(gateway: Gateway, body: Body, release: Release, side_px: int) -> list[F32]:
    """All headers before the first pixel."""
    limits, spec = gateway.settings.limits, gateway.card(release, "embed").spec
    parts = body.parts({"image": gateway.settings.max_items})
    only(parts, "image")
    files = opened_all(parts["image"], limits)
    return [shown(spec, picture.decode_opened(file).flat(), side_px) for file in files]


def shown(spec: Spec, rgb: U8, side_px: int) -> F32:
    """u8[h, w, 3] -> f32[1, 3, h', w'] at a size that the model takes, bicubic: its own, or side_px square.

    Without either, the picture's own, shrunk to `EMBED_PX`. Raises: ConfigError for a side that cannot be.
    """
    only_height, only_width = spec.inputs[0].shape[-2:]
    height, width = rgb.shape[:2]
    if isinstance(only_height, int) and isinstance(only_width, int):
        if side_px:
            rule = f"this model takes {only_width}x{only_height} px"
            raise ConfigError("side_px", side_px, rule, "leave it out: pictures are brought there")
        height, width = only_height, only_width
    elif side_px:
        if side_px % spec.align:
            raise ConfigError("side_px", side_px, f"must be a multiple of {spec.align}", "round it")
        height = width = side_px
    else:
        factor = min(1.0, EMBED_PX / max(height, width))
        height, width = (max(1, round(s * factor / spec.align)) * spec.align for s in (height, width))
    if rgb.shape[:2] != (height, width):
        rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
    return imaging.to_nchw_f32(rgb)


# Two pictures


async def similarity(
    gateway: Gateway, body: Body, release: Release | None, measures: Sequence[Measure], side_px: int
) -> Answer:
    """What each pair has in common. `measures`: none stands for all that apply; cosine is there with a `release`."""
    deadline = gateway.deadline()
    pairs, read_s = await gateway.codec(deadline, _read_pairs, gateway, body)
    rows: list[dict[str, Any]] = []
    spans = {"decode": read_s, "compare": 0.0, "queue": 0.0, "infer": 0.0}
    for index, pair in enumerate(pairs):
        if time.monotonic() >= deadline:
            raise too_late()
        kind = " ".join(sorted({*measures})) or ("all" if pair.alike else "sift")
        (a, b, found), seconds = await gateway.slow(kind, pair.pixels, deadline, _compare, gateway, pair, measures)
        spans["compare"] += seconds
        if release is not None:
            spec = gateway.card(release, "embed").spec
            pictures = [(await gateway.codec(deadline, shown, spec, rgb, side_px))[0] for rgb in (a, b)]
            vectors, timing = await _vectors(gateway, release, pictures, deadline)
            found["cosine"] = cosine(*(v[spec.outputs[0].name][0].astype(np.float64) for v in vectors))
            spans["queue"], spans["infer"] = spans["queue"] + timing.queue_s, spans["infer"] + timing.run_s
        rows.append({"index": index, **found})
    headers = {"Server-Timing": timing_header(spans)}
    value: dict[str, Any] = {"object": "list", "data": rows}
    if release is not None:
        headers, value = headers | gateway.headers(release), value | gateway.about(release)
    return Answer(body=json.dumps(value).encode(), media_type=JSON, headers=headers)


def cosine(a: Any, b: Any) -> float | None:
    """Of the angle between two vectors, -1 .. 1; None where one has no direction."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / length, -1, 1)) if length else None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures, as they were sent."""

    a: bytes
    b: bytes
    alike: bool  # of one size
    pixels: int  # of both


def _read_pairs(gateway: Gateway, body: Body) -> list[Pair]:
    """`a` and `b` of a form or an object, or the object's list `pairs`; their headers are within the limits."""
    most, names = gateway.settings.max_items, {"a": 1, "b": 1}
    if body.kind == JSON and "pairs" in (value := body.json(2 * most)):
        entries = value["pairs"] if isinstance(value["pairs"], list) and len(value) == 1 else []
        if not entries or not all(isinstance(e, dict) for e in entries):
            raise ConfigError("pairs", str(value["pairs"])[:80], "must be a list of objects with a and b, alone",
                              '{"pairs": [{"a": "...", "b": "..."}]}')  # fmt: skip
        if len(entries) > most:
            raise TooLargeError("pairs", len(entries), f"at most {most} at once", "send fewer")
        read = [json_parts(entry, names) for entry in entries]
    else:
        read = [body.parts(names)]
    pairs, headers = [], []
    for parts in read:
        data = only(parts, "a"), only(parts, "b")
        both = [opened(each, gateway.settings.limits, name).header for name, each in zip("ab", data, strict=True)]
        for name, header in zip("ab", both, strict=True):
            if header.width * header.height > gateway.settings.max_method_pixels:
                rule = f"at most {gateway.settings.max_method_pixels} pixels are compared"
                raise TooLargeError(name, f"{header.width}x{header.height}", rule, "send a smaller picture")
        sizes = [(header.width, header.height) for header in both]
        pairs.append(Pair(a=data[0], b=data[1], alike=sizes[0] == sizes[1], pixels=sum(w * h for w, h in sizes)))
        headers += both
    check_total(headers, gateway.settings.limits)
    return pairs


def _compare(gateway: Gateway, pair: Pair, measures: Sequence[Measure]) -> tuple[U8, U8, dict[str, float | None]]:
    limits = gateway.settings.limits
    a, b = (picture.decode(data, limits, name).flat() for name, data in zip("ab", (pair.a, pair.b), strict=True))
    return a, b, compared(a, b, measures or applicable(a.shape[:2], b.shape[:2]))
