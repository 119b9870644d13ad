"""The HTTP face: bytes in, limits, decode, tiles, the engine, encode, bytes out. No Ray here.

The order of a request is the order of its cost: the declared length before the body, the body's size while it
streams, the header before the pixels, the engine's backlog before the decoding.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import pydantic
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from rayscale import __version__, imaging
from rayscale.errors import ConfigError, MediaTypeError, MissingError, TooLargeError, nearest
from rayscale.imaging import Limits, Media
from rayscale.observe import log
from rayscale.serve import problems
from rayscale.serve.engine import Canvas, Plan, Runner, plan
from rayscale.serve.meters import Meters
from rayscale.serve.problems import BusyError
from rayscale.serve.rollout import Release, Table, route_of

T = TypeVar("T")

MEDIA: dict[str, Media] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}  # in our preference


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """What is accepted and how long it may take."""

    limits: Limits = Limits()
    max_output_pixels: int = 128_000_000  # 200 megapixels are 600 MB and 6 s of PNG
    default_model: str = ""  # "": the only route there is
    timeout_s: float = 60.0
    codec_threads: int = 2
    quality: int = 95  # JPEG and WebP, 1..100


class Routing(Protocol):
    """What the gateway asks of `follower.Follower`."""

    @property
    def table(self) -> Table: ...
    @property
    def held(self) -> Any: ...
    @property
    def reason(self) -> str: ...


class ModelInfo(pydantic.BaseModel):
    """One version that this replica knows of."""

    name: str = pydantic.Field(examples=["photos-x2"])
    version: int = pydantic.Field(examples=[3])
    aliases: list[str] = pydantic.Field(description="empty: kept warm for a rollback", examples=[["champion"]])
    digest: str = pydantic.Field(description="SHA-256 of the artifact")
    ready: bool
    kind: str | None = pydantic.Field(default=None, examples=["transform"])
    family: str | None = pydantic.Field(default=None, examples=["compact"])
    scale: int | None = pydantic.Field(default=None, examples=[2])
    licence: str | None = None


class ModelList(pydantic.BaseModel):
    """The routing table of this replica."""

    generation: int = pydantic.Field(description="grows with every change of the routing table")
    default: str | None = pydantic.Field(
        description="what a request without `model` gets", examples=["photos-x2@champion"]
    )
    models: list[ModelInfo]
    held: dict[str, str] = pydantic.Field(description="aliases that are not followed yet, and why")


class Gateway:
    """Answers requests with an engine, here or behind a handle, following a routing table."""

    def __init__(self, settings: GatewaySettings, engine: Runner, routing: Routing, meters: Meters) -> None:
        self.settings, self.engine, self.routing, self.meters = settings, engine, routing, meters
        self._codecs = ThreadPoolExecutor(settings.codec_threads, thread_name_prefix="codec")

    def resolve(self, model: str) -> Release:
        """Which version answers, decided once per request. Raises: MissingError, BusyError."""
        table = self.routing.table
        if self.routing.reason:
            raise BusyError("replica", "not ready", self.routing.reason, "try again", retry_after_s=2.0)
        return table.pick(self._route(model, table), random.random())

    def _route(self, model: str, table: Table) -> str:
        if wanted := model or self.settings.default_model:
            return route_of(wanted)
        if len(table.routes) != 1:
            raise ConfigError("model", "(none)", "several models are served and none is the default",
                              nearest("", table.routes))  # fmt: skip
        return next(iter(table.routes))

    async def upscale(self, data: bytes, release: Release, media: Media) -> tuple[bytes, dict[str, str]]:
        """Encoded picture in, encoded picture and the headers that tell how out."""
        loop, started = asyncio.get_running_loop(), time.monotonic()
        deadline = started + self.settings.timeout_s
        canvas, decode_s = await loop.run_in_executor(self._codecs, self._decode, data, release, deadline)
        timing = await self.engine.run(release.digest, canvas.tiles, canvas.place, deadline=deadline)
        body, encode_s = await loop.run_in_executor(self._codecs, self._encode, canvas, media)
        self.meters.add("rayscale_tiles_total", len(canvas.tiles), model=release.name)
        self.meters.add("rayscale_queue_seconds", timing.queue_s, model=release.name)
        spans = {"decode": decode_s, "queue": timing.queue_s, "infer": timing.run_s, "encode": encode_s}
        return body, {
            "X-Rayscale-Model": str(release),
            "X-Rayscale-Digest": release.digest,
            "X-Rayscale-Tiling": canvas.plan.tiling,
            "X-Rayscale-Provider": self.engine.session(release.digest).provider,
            "Server-Timing": ", ".join(f"{name};dur={1e3 * span:.1f}" for name, span in spans.items()),
        }

    def _decode(self, data: bytes, release: Release, deadline: float) -> tuple[Canvas, float]:
        started, limits = time.monotonic(), self.settings.limits
        header = imaging.read_header(data, limits)
        spec = self.engine.session(release.digest).card.spec
        if spec.kind != "transform":
            raise MissingError(
                "model", release, f"is of kind {spec.kind}, this route serves transform", "see /v1/models"
            )
        out_pixels = header.width * header.height * spec.scale**2
        if out_pixels > self.settings.max_output_pixels:
            shown = f"{header.width * spec.scale}x{header.height * spec.scale}"
            rule = f"at most {self.settings.max_output_pixels} output pixels are made"
            raise TooLargeError("output", shown, rule, "send a smaller picture")
        planned = plan(spec, header.height, header.width, self.engine.settings)
        self._admit(planned, release, deadline - started)
        pixels = imaging.decode_rgb(data, limits, allow_lossy=False)
        return Canvas(planned, pixels), time.monotonic() - started

    def _admit(self, planned: Plan, release: Release, left_s: float) -> None:
        """Refuse now what would miss its deadline anyway."""
        cost_s = self.engine.cost_s(release.digest, planned.pixels)
        if cost_s > self.settings.timeout_s:
            rule = f"takes about {cost_s:.0f} s here, requests have {self.settings.timeout_s:.0f} s"
            raise TooLargeError("image", f"{planned.width}x{planned.height}", rule, "send a smaller picture")
        backlog_s = self.engine.backlog_s()
        if backlog_s + cost_s > left_s:
            raise BusyError("engine", f"backlog {backlog_s:.1f} s", "this request would miss its deadline",
                            "try again later", retry_after_s=backlog_s + cost_s - left_s)  # fmt: skip

    def _encode(self, canvas: Canvas, media: Media) -> tuple[bytes, float]:
        started = time.monotonic()
        return imaging.encode(canvas.result, media, self.settings.quality), time.monotonic() - started

    def models(self) -> ModelList:
        """What this replica serves and keeps warm."""
        table, loaded = self.routing.table, self.engine.digests
        models = []
        for digest, release in sorted(table.versions.items(), key=lambda kv: (kv[1].name, -kv[1].version)):
            aliases = sorted(r.partition("@")[2] for r, shares in table.routes.items() if digest in dict(shares))
            info = ModelInfo(**vars(release) | {"aliases": aliases, "ready": digest in loaded})
            if info.ready:
                card = self.engine.session(digest).card
                info.kind, info.scale = card.spec.kind, card.spec.scale
                info.family, info.licence = card.family, card.licence
            models.append(info)
        only = next(iter(table.routes)) if len(table.routes) == 1 else None
        default = route_of(self.settings.default_model) if self.settings.default_model else only
        return ModelList(generation=table.generation, default=default, models=models, held=dict(self.routing.held))

    def close(self) -> None:
        self.engine.close()
        self._codecs.shutdown(wait=False, cancel_futures=True)


# --- HTTP -------------------------------------------------------------------------------------------------------


def negotiate(accept: str) -> Media:
    """The format that an Accept header likes best; ours (PNG, JPEG, WebP) among equals.

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
        return next((wishes[w] for w in (kind, "image/*", "*/*") if w in wishes), 0.0)

    best = max(MEDIA, key=weight)  # the first of equals
    if weight(best) <= 0:
        raise HTTPException(406, f"Accept={accept}: this route writes {', '.join(MEDIA)}; ask for one of them")
    return MEDIA[best]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The raw body. Raises: TooLargeError, before reading it where its length is declared; MediaTypeError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") or kind == "application/json":
        raise MediaTypeError("Content-Type", kind, "the body is the picture itself",
                             "e.g. curl --data-binary @photo.jpg")  # fmt: skip
    if encoding := request.headers.get("content-encoding"):
        raise MediaTypeError("Content-Encoding", encoding, "bodies are not compressed", "send the picture as it is")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_long(int(declared), max_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_long(size, max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_long(size: int, max_bytes: int) -> TooLargeError:
    return TooLargeError("body", f"{size} bytes", f"at most {max_bytes} bytes are read", "send a smaller file")


class ClientGone(Exception):  # noqa: N818 - no error of ours
    """Nobody waits for the answer any more."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled when the client hangs up. The body must have been read. Raises: ClientGone."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()


class UpscaleQuery(pydantic.BaseModel, extra="forbid"):
    """A parameter that does not exist is refused: a setting without effect is an error."""

    model: str = pydantic.Field(
        default="",
        max_length=300,
        description="`name` or `name@alias`; without it, the default that /v1/models shows",
        examples=["photos-x2@champion"],
    )


DESCRIPTION = """\
Upscales photos with quality-gated models. What is served is what was scored: a large picture is cut into tiles
that give exactly the bytes of the untiled one, and an answer comes from one model version.

    curl --data-binary @photo.jpg -H 'Accept: image/png' 'http://localhost:8000/v1/upscale' -o photo-x2.png

Errors are `application/problem+json` (RFC 9457), with a request id; a 503 says when to come back.
"""

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_HEADERS = {
    "X-Request-Id": "the request's own id, or one that was made for it",
    "X-Rayscale-Model": "name:version that answered",
    "X-Rayscale-Digest": "SHA-256 of its artifact",
    "X-Rayscale-Tiling": "`whole`, or `tiled` and the number of tiles: the bytes are the same",
    "X-Rayscale-Provider": "ONNX Runtime's execution provider",
    "Server-Timing": "decode, queue, infer and encode, in ms",
}


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(gateway: Gateway, lifespan: Lifespan | None = None, *, behind_ray: bool = False) -> FastAPI:
    """The ASGI application around a gateway. `behind_ray`: Ray Serve's proxy is in front of it."""
    app = FastAPIOffline(  # its pages load nothing from elsewhere
        title="Rayscale", version=__version__, description=DESCRIPTION, redoc_url=None, lifespan=lifespan
    )
    problems.install(app, gateway.meters, behind_ray=behind_ray)

    @app.post(
        "/v1/upscale",
        tags=["pictures"],
        summary="A picture in, a larger one out",
        response_class=Response,
        responses={
            200: {
                "description": "The picture, in the format that `Accept` likes best (PNG by default)",
                "content": dict.fromkeys(MEDIA, _BINARY),
                "headers": {k: {"description": v, "schema": {"type": "string"}} for k, v in _HEADERS.items()},
            },
            **problems.responses(400, 404, 406, 408, 413, 415, 422, 503),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": "The encoded picture: JPEG, PNG, WebP, TIFF, BMP or PPM; 8 bits, opaque, one frame",
                "content": dict.fromkeys(("image/jpeg", "image/png", "image/webp", "image/*"), _BINARY),
            }
        },
    )
    async def upscale(
        request: Request,
        query: Annotated[UpscaleQuery, Query()],
        accept: Annotated[str, Header(description="image/png, image/jpeg or image/webp, with q-values")] = "*/*",
    ) -> Response:
        release = gateway.resolve(query.model)
        request.scope["rayscale.model"] = release.name
        media = negotiate(accept)
        try:
            async with asyncio.timeout(gateway.settings.timeout_s):
                data = await read_body(request, gateway.settings.limits.max_bytes)
        except TimeoutError:
            rule = f"the body did not arrive within {gateway.settings.timeout_s:.0f} s"
            raise HTTPException(408, f"body: {rule}; send a smaller file") from None
        try:
            body, headers = await while_connected(request, gateway.upscale(data, release, media))
        except ClientGone:
            log.info("request %s: the client hung up", request.scope["rayscale.request_id"])
            return Response(status_code=problems.CLIENT_GONE)
        return Response(body, media_type=f"image/{media}", headers={**headers, "Vary": "Accept"})

    @app.get("/v1/models", tags=["models"], summary="What is served, and what is held back")
    async def models() -> ModelList:
        return gateway.models()

    @app.get("/livez", tags=["health"], summary="The process answers", response_class=Response)
    async def livez() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz", tags=["health"], summary="A model is ready to answer", response_class=Response,
             responses=problems.responses(503))  # fmt: skip
    async def readyz() -> Response:
        if gateway.routing.reason:
            raise BusyError("replica", "not ready", gateway.routing.reason, "try again", retry_after_s=2.0)
        return Response("ok\n", media_type="text/plain")

    return app
