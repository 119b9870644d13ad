"""/v1/embed and /v1/similarity: answers that are numbers."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Query, Request, Response

from rayscale.errors import ConfigError
from rayscale.serve import pages, problems
from rayscale.serve.answers import respond
from rayscale.serve.gateway import Gateway, who_asks
from rayscale.serve.methods import Measure
from rayscale.serve.vectors import embed, similarity

ERRORS = (400, 401, 404, 408, 413, 415, 422, 429, 503)


class EmbedQuery(pydantic.BaseModel, extra="forbid"):
    """Of /v1/embed."""

    model: str = pydantic.Field(
        default="", max_length=300, description="`name`, `name@alias` or `name:version`", examples=["photos-embed"]
    )
    side_px: int = pydantic.Field(
        default=0,
        ge=0,
        le=1024,
        description="pictures are shown to the model at this square size; 0: at their own, at most 512 px",
        examples=[64],
    )


class SimilarityQuery(EmbedQuery):
    """Of /v1/similarity."""

    measure: list[Measure] = pydantic.Field(
        default_factory=list,
        description="by default all that apply: those of pixels need pictures of one size, `cosine` a served model",
        examples=[["psnr", "cosine"]],
    )


class Embedding(pydantic.BaseModel, extra="allow"):
    """Of one picture; further outputs of the model stand beside it by their names."""

    object: str = pydantic.Field(examples=["embedding"])
    index: int
    embedding: list[float]


class Embeddings(pydantic.BaseModel):
    """In the order of the pictures."""

    model_config = pydantic.ConfigDict(json_schema_extra={"example": {
        "object": "list", "model": "photos-embed:3", "digest": "4e07408562be...",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.12, -0.03, 0.99]}],
    }})  # fmt: skip

    object: str = pydantic.Field(examples=["list"])
    model: str = pydantic.Field(examples=["photos-embed:3"])
    digest: str
    data: list[Embedding]


class Likeness(pydantic.BaseModel):
    """Of one pair. null: infinite (psnr of equal pictures), or nothing to go by (sift without key points)."""

    index: int
    mse: float | None = pydantic.Field(None, description="mean squared difference of samples, 0 .. 65025")
    psnr: float | None = pydantic.Field(None, description="dB, over all channels")
    euclidean: float | None = pydantic.Field(None, description="root of the sum of squared differences of samples")
    ssim: float | None = pydantic.Field(None, description="structural similarity, mean over the channels")
    ms_ssim: float | None = pydantic.Field(None, description="over five scales; sides of 161 px or more")
    sift: float | None = pydantic.Field(
        None, description="share of a's SIFT key points found in b, both at most 640 px; sizes may differ"
    )
    cosine: float | None = pydantic.Field(None, description="of the model's vectors, -1 .. 1")


class Likenesses(pydantic.BaseModel):
    """In the order of the pairs; model and digest are of the cosine."""

    model_config = pydantic.ConfigDict(json_schema_extra={"example": {
        "object": "list", "model": "photos-embed:3", "digest": "4e07408562be...",
        "data": [{"index": 0, "mse": 14.2, "psnr": 36.6, "euclidean": 1307.1, "ssim": 0.95, "ms_ssim": 0.99,
                  "sift": 0.71, "cosine": 0.98}],
    }})  # fmt: skip

    object: str = pydantic.Field(examples=["list"])
    model: str | None = None
    digest: str | None = None
    data: list[Likeness]


def routes(gateway: Gateway) -> APIRouter:
    """The routes over one gateway."""
    router = APIRouter(tags=["vectors"])

    def answers(model: type[pydantic.BaseModel]) -> dict[int | str, Any]:
        return {200: {"model": model, "headers": pages.headers()}, **problems.responses(*ERRORS)}

    @router.post(
        "/v1/embed",
        summary="Pictures in, vectors out",
        description="As OpenAI's embeddings. Alpha is laid over white, samples are rounded to 8 bits.",
        response_class=Response,
        responses=answers(Embeddings),
        openapi_extra=pages.body({"image": "the picture; several parts, or a list in JSON, for several"}, least=1),
    )
    async def embedded(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
        release = gateway.resolve(query.model, "embed", who=who_asks(request.scope))
        request.scope["rayscale.release"] = release
        return await respond(gateway, request, lambda body: embed(gateway, body, release, query.side_px))

    @router.post(
        "/v1/similarity",
        summary="How alike two pictures are: by pixels, structure, key points and meaning",
        description="Two parts `a` and `b`, or in JSON a list `pairs` of objects with both. Alpha is laid over white.",
        response_class=Response,
        responses=answers(Likenesses),
        openapi_extra=pages.body(
            {"a": "a picture", "b": "the one it is compared with"}, raw=False, required=("a", "b"), pairs=True
        ),
    )
    async def likeness(request: Request, query: Annotated[SimilarityQuery, Query()]) -> Response:
        gateway.check_ready()
        model, wanted = query.model, query.measure
        if wanted and "cosine" not in wanted and (model or query.side_px):
            raise ConfigError(
                "model", model or query.side_px, "is of the measure cosine", "ask for it, or leave it out"
            )
        if not model and not wanted:  # as much as can be said
            model = gateway.default("embed") or ""
        release = gateway.resolve(model, "embed", who=who_asks(request.scope)) if model or "cosine" in wanted else None
        if release is None and query.side_px:
            raise ConfigError("side_px", query.side_px, "has no effect without a model that embeds", "leave it out")
        if release is not None:
            request.scope["rayscale.release"] = release
        return await respond(gateway, request, lambda body: similarity(gateway, body, release, wanted, query.side_px))

    return router
