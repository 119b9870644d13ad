"""What an answer is made of: its format by `Accept`, its bytes, and the headers that tell how it came about."""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from rayscale.imaging import Media
from rayscale.observe import log
from rayscale.serve import problems
from rayscale.serve.body import JSON, Body, ClientGone, read_body, while_connected
from rayscale.serve.gateway import Gateway

MEDIA: dict[str, Media] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}  # in our preference


@dataclass(frozen=True, kw_only=True)
class Format:
    """How pictures are written. In JSON they are base64 of `media`."""

    media: Media = "png"
    as_json: bool = False

    @property
    def media_type(self) -> str:
        return JSON if self.as_json else f"image/{self.media}"


@functools.lru_cache(maxsize=64)  # of headers as long as a server takes them
def negotiate(accept: str) -> Format:
    """What an Accept header likes best; PNG, JPEG, WebP, JSON among equals.

    Raises: HTTPException 406 when it likes none.
    """
    wishes: dict[str, float] = {}
    for part in (accept or "*/*").split(","):
        kind, *parameters = (p.strip().lower() for p in part.split(";"))
        q = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            wishes[kind] = float(q)
        except ValueError:
            continue  # of a broken element nothing is known

    def weight(kind: str) -> float:
        wide = f"{kind.partition('/')[0]}/*"
        return next((wishes[w] for w in (kind, wide, "*/*") if w in wishes), 0.0)

    best = max([*MEDIA, JSON], key=weight)  # the first of equals
    if not weight(best) > 0:
        offers = ", ".join([*MEDIA, JSON])
        raise HTTPException(406, f"Accept={accept[:200]}: this route writes {offers}; ask for one of them")
    return Format(as_json=True) if best == JSON else Format(media=MEDIA[best])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer."""

    body: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


def pictures_json(pictures: Sequence[bytes], media: Media, about: Mapping[str, Any], each: Sequence[Any] = ()) -> bytes:
    """As OpenAI's image API has it, `about` the model beside, `each` picture's own facts in its entry."""
    entries = [{"b64_json": base64.b64encode(p).decode()} for p in pictures]
    data = [{**entry, **facts} for entry, facts in zip(entries, each or [{}] * len(entries), strict=True)]
    return json.dumps({"created": int(time.time()), "output_format": media, **about, "data": data}).encode()


def timing_header(spans: Mapping[str, float]) -> str:
    """`Server-Timing` of seconds by name."""
    return ", ".join(f"{name};dur={1e3 * span:.1f}" for name, span in spans.items())


Work = Callable[[Body], Coroutine[Any, Any, Answer]]


async def respond(gateway: Gateway, request: Request, work: Work, *, max_bytes: int = 0) -> Response:
    """Have `work` answer the body, read within the limits; stop when the client hangs up.

    `max_bytes` of the body; 0: as many as a picture may have.
    """
    settings, held = gateway.settings, gateway.held
    body = await read_body(request, max_bytes or settings.limits.max_bytes, settings.timeout_s, held)
    try:
        watched = request.scope.get(problems.WATCHED, False)
        answer = await (work(body) if watched else while_connected(request, work(body)))
    except ClientGone:
        log.info("request %s: the client hung up", request.scope["rayscale.request_id"])
        return Response(status_code=problems.CLIENT_GONE)
    finally:
        held.bytes -= len(body.data)
    request.scope["rayscale.timing"] = answer.headers.get("Server-Timing")
    return Response(answer.body, media_type=answer.media_type, headers={**answer.headers, "Vary": "Accept"})
