"""/v1/upscale, /v1/restore, /v1/burst, /v1/generate: answers that are pictures."""

from __future__ import annotations

from typing import Annotated, get_args

import pydantic
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError

from rayscale.errors import ConfigError, MediaTypeError
from rayscale.serve import pages
from rayscale.serve.answers import Answer, negotiate, respond
from rayscale.serve.body import JSON, Body
from rayscale.serve.gateway import Gateway, Role, who_asks
from rayscale.serve.generate import GenerateRequest, check, generate
from rayscale.serve.lean import LeanRoute
from rayscale.serve.methods import Merging, Restoring, Upscaling
from rayscale.serve.transform import Finish, by_method, by_model

SETTINGS_BYTES = 32 << 10
ERRORS = (400, 401, 404, 406, 408, 413, 415, 422, 429, 503)

Accept = Annotated[str, Header(description="image/png, image/jpeg, image/webp or application/json, with q-values")]


class PictureQuery(pydantic.BaseModel, extra="forbid"):
    """A parameter that does not exist is refused: a setting without effect is an error."""

    model: str = pydantic.Field(
        default="",
        max_length=300,
        description="`name`, `name@alias` or `name:version`; without it, the default that /v1/models shows",
        examples=["photos-x2@champion"],
    )
    contrast: float = pydantic.Field(1.0, ge=0, le=4, description="of the result: 1 changes nothing", examples=[1.1])
    sharpen: float = pydantic.Field(0.0, ge=0, le=4, description="unsharp mask of the result, 1 px", examples=[0.3])


class UpscaleQuery(PictureQuery):
    """Of /v1/upscale."""

    scale: int | None = pydantic.Field(
        default=None, ge=1, le=8, description="chooses among models; how far a method enlarges", examples=[2]
    )
    method: Upscaling | None = pydantic.Field(default=None, description="a classical method instead of a model")


class BurstQuery(PictureQuery):
    """Of /v1/burst."""

    scale: int | None = pydantic.Field(
        default=None, ge=1, le=8, description="chooses among models; how far a method enlarges", examples=[2]
    )
    method: Merging | None = pydantic.Field(default=None, description="a classical method instead of a model")


class RestoreQuery(PictureQuery):
    """Of /v1/restore."""

    method: Restoring | None = pydantic.Field(default=None, description="a classical method instead of a model")


_IMAGE = "JPEG, PNG, WebP, TIFF, BMP or PPM; 1 .. 8 or 16 bits, one frame"
_MASK = "of the picture's size; white where pixels are missing. Without it, transparent pixels are"


def routes(gateway: Gateway) -> APIRouter:
    """The routes over one gateway."""
    router = APIRouter(tags=["pictures"], route_class=LeanRoute)
    answers = pages.picture_answers(
        pages.headers(**{k.replace("-", "_"): v for k, v in pages.OF_PICTURES.items()}),
        pages.pictures_json(tiling="tiled 9", size="2048x1536"),
        *ERRORS,
    )

    async def answer(
        request: Request, query: UpscaleQuery | BurstQuery | RestoreQuery, role: Role, accept: str
    ) -> Response:
        scale = None if isinstance(query, RestoreQuery) else query.scale
        finish = Finish(format=negotiate(accept), contrast=query.contrast, sharpen=query.sharpen)
        if query.method is not None:
            if query.model:
                raise ConfigError("method", query.method, "stands in for a model", "leave out one of them")
            gateway.check_ready()
            request.scope["rayscale.release"] = f"classical:{query.method}"
            factor = 1 if role == "restore" else scale or 2
            return await respond(
                gateway, request, lambda body: by_method(gateway, body, query.method or "", role, factor, finish)
            )
        release = gateway.resolve(query.model, role, scale, who=who_asks(request.scope))
        request.scope["rayscale.release"] = release
        return await respond(gateway, request, lambda body: by_model(gateway, body, release, role, finish))

    @router.post(
        "/v1/upscale",
        summary="A picture in, a larger one out",
        response_class=Response,
        responses=answers,
        openapi_extra=pages.body({"image": _IMAGE}),
    )
    async def upscale(request: Request, query: Annotated[UpscaleQuery, Query()], accept: Accept = "*/*") -> Response:
        return await answer(request, query, "upscale", accept)

    @router.post(
        "/v1/restore",
        summary="A picture in, the same without its noise, blocks, blur or holes out",
        description="What is mended depends on the model. One that fills holes takes them as a second part `mask`, or "
        "as the picture's transparency. Classical methods: " + ", ".join(get_args(Restoring)) + ".",
        response_class=Response,
        responses=answers,
        openapi_extra=pages.body({"image": _IMAGE, "mask": _MASK}),
    )
    async def restore(request: Request, query: Annotated[RestoreQuery, Query()], accept: Accept = "*/*") -> Response:
        return await answer(request, query, "restore", accept)

    @router.post(
        "/v1/burst",
        summary="Several shifted frames of one scene in, one larger picture out",
        description="Parts `image`, as many as the model takes; the first is what the others are laid upon. 8 bits, "
        "transparency is laid over white.",
        response_class=Response,
        responses=answers,
        openapi_extra=pages.body(
            {"image": "the frames, all of one size; several parts, or a list in JSON"}, raw=False, least=2
        ),
    )
    async def merged(request: Request, query: Annotated[BurstQuery, Query()], accept: Accept = "*/*") -> Response:
        return await answer(request, query, "burst", accept)

    @router.post(
        "/v1/generate",
        summary="Seeds in, pictures out",
        description="Picture `index` of a seed is the same alone and among others. An empty body is a request too.",
        response_class=Response,
        responses=pages.picture_answers(
            pages.headers(X_Rayscale_Seed="of the noise"), pages.pictures_json(model="flowers:1", seed=7), *ERRORS
        ),
        openapi_extra={"requestBody": {"content": {JSON: {
            "schema": GenerateRequest.model_json_schema(),
            "examples": {
                "one": {"value": {"seed": 7}},
                "four of a class": {"value": {"seed": 7, "n": 4, "class": "daisy", "truncation": 0.7}},
                "a walk": {"value": {"seed": 7, "to_seed": 8, "n": 9}},
            },
        }}}},
    )  # fmt: skip
    async def generated(request: Request, accept: Accept = "*/*") -> Response:
        gateway.check_ready()
        form = negotiate(accept)

        async def work(body: Body) -> Answer:
            ask = _asked(body)
            check(gateway, ask, form)
            release = gateway.resolve(ask.model, "generate", who=who_asks(request.scope))
            request.scope["rayscale.release"] = release
            return await generate(gateway, ask, release, form)

        return await respond(gateway, request, work, max_bytes=SETTINGS_BYTES)

    return router


def _asked(body: Body) -> GenerateRequest:
    """Raises: RequestValidationError, MediaTypeError."""
    if body.kind not in (JSON, "", "application/x-www-form-urlencoded"):  # the last: curl -d
        raise MediaTypeError("Content-Type", body.kind, "settings are JSON", f"send {JSON}")
    try:
        return GenerateRequest.model_validate_json(body.data or b"{}")
    except pydantic.ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None
