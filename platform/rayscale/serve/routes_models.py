"""/v1/models: what is served, what is held back, and what a version is."""

from __future__ import annotations

from typing import Any

import pydantic
from fastapi import APIRouter

from rayscale import contract
from rayscale.contract import ModelCard
from rayscale.errors import MissingError, nearest
from rayscale.serve import problems
from rayscale.serve.gateway import Gateway, Role, role_of
from rayscale.serve.table import Release, Table, route_of

HELD = "aliases that are not followed yet, versions that were rolled back by themselves, and why"
ROLES: tuple[Role, ...] = ("upscale", "restore", "burst", "generate", "embed")


class ModelInfo(pydantic.BaseModel):
    """One version that this replica knows of."""

    name: str = pydantic.Field(examples=["photos-x2"])
    version: int = pydantic.Field(examples=[3])
    aliases: list[str] = pydantic.Field(
        description="empty: kept warm for a rollback, or a canary", examples=[["champion"]]
    )
    canary: dict[str, float] = pydantic.Field(
        description="alias -> share of its requests, of a version that is tried out beside it", examples=[{}]
    )
    digest: str = pydantic.Field(description="SHA-256 of the artifact")
    ready: bool
    kind: str | None = pydantic.Field(default=None, examples=["transform"])
    role: str | None = pydantic.Field(default=None, description="the route that takes it", examples=["upscale"])
    family: str | None = pydantic.Field(default=None, examples=["compact"])
    scale: int | None = pydantic.Field(default=None, examples=[2])
    classes: list[str] | None = pydantic.Field(default=None, description="of a generator", examples=[["daisy"]])
    licence: str | None = None


class ModelList(pydantic.BaseModel):
    """The routing table of this replica."""

    generation: int = pydantic.Field(description="grows with every change of the routing table")
    default: str | None = pydantic.Field(
        description="what an upscaling request without `model` gets", examples=["photos-x2@champion"]
    )
    defaults: dict[str, str] = pydantic.Field(
        description="the same for every route that has one", examples=[{"upscale": "photos-x2@champion"}]
    )
    models: list[ModelInfo]
    held: dict[str, str] = pydantic.Field(description=HELD)
    watched: dict[str, str] = pydantic.Field(
        description="canaries, and new champions on probation, and how they do",
        examples=[{"photos-x2:4": "canary: 210 runs, 0 failed, 1.02 times the time"}],
    )


class Version(ModelInfo):
    """One version with its card."""

    provider: str | None = pydantic.Field(default=None, examples=["CPUExecutionProvider"])
    card: dict[str, Any] | None = pydantic.Field(
        default=None, description="inputs, outputs, tiling and lineage, where the version is loaded here"
    )


class ModelDetail(pydantic.BaseModel):
    """One model: where its aliases lead, and its versions, newest first."""

    name: str
    routes: dict[str, dict[str, float]] = pydantic.Field(
        description="alias -> share of the requests by version", examples=[{"champion": {"photos-x2:3": 1.0}}]
    )
    versions: list[Version]
    held: dict[str, str] = pydantic.Field(description=HELD)


def listed(gateway: Gateway) -> ModelList:
    """What this replica serves and keeps warm."""
    table = gateway.routing.table
    defaults: dict[str, str] = {role: route for role in ROLES if (route := gateway.default(role)) is not None}
    return ModelList(
        generation=table.generation,
        default=defaults.get("upscale"),
        defaults=defaults,
        models=[ModelInfo(**_facts(gateway, table, release)) for release in _ordered(table)],
        held=dict(gateway.routing.held),
        watched=dict(gateway.routing.watched),
    )


def detail(gateway: Gateway, wanted: str) -> ModelDetail:
    """`name`, `name@alias` or `name:version`. Raises: MissingError."""
    table, name = gateway.routing.table, wanted.partition("@")[0].partition(":")[0]
    releases = [r for r in _ordered(table) if r.name == name]
    routes = {route: shares for route, shares in table.routes.items() if route.partition("@")[0] == name}
    if "@" in wanted:
        routes = {route: shares for route, shares in routes.items() if route == route_of(wanted)}
        digests = {digest for shares in routes.values() for digest, _ in shares}
        releases = [r for r in releases if r.digest in digests]
    elif ":" in wanted:
        releases = [r for r in releases if str(r) == wanted]
    if not releases:
        known = {r.name for r in table.versions.values()} | {str(r) for r in table.versions.values()}
        raise MissingError("model", wanted, "is not served here", nearest(wanted, known | set(table.routes)))
    versions = []
    for release in releases:
        facts = _facts(gateway, table, release)
        if facts["ready"]:
            session = gateway.engine.session(release.digest)
            facts |= {"provider": session.provider, "card": _public(session.card)}
        versions.append(Version(**facts))
    held = {route: why for route, why in gateway.routing.held.items() if route.partition("@")[0] == name}
    shares = {
        route.partition("@")[2]: {str(table.versions[digest]): share for digest, share in parts}
        for route, parts in routes.items()
    }
    return ModelDetail(name=name, routes=shares, versions=versions, held=held)


def _ordered(table: Table) -> list[Release]:
    return sorted(table.versions.values(), key=lambda r: (r.name, -r.version))


def _facts(gateway: Gateway, table: Table, release: Release) -> dict[str, Any]:
    routes = [route for route, shares in table.routes.items() if release.digest == shares[0][0]]
    canary = {
        route: share
        for route, (_, *others) in table.routes.items()
        for digest, share in others
        if digest == release.digest
    }
    facts: dict[str, Any] = {
        "name": release.name,
        "version": release.version,
        "digest": release.digest,
        "aliases": sorted(route.partition("@")[2] for route in routes),
        "canary": {route.partition("@")[2]: share for route, share in canary.items()},
        "ready": release.digest in gateway.engine.digests,
    }
    if facts["ready"]:
        card = gateway.engine.session(release.digest).card
        facts |= {"kind": card.spec.kind, "role": role_of(card.spec), "scale": card.spec.scale}
        facts |= {"family": card.family, "licence": card.licence, "classes": list(card.classes) or None}
    return facts


def _public(card: ModelCard) -> dict[str, Any]:
    """Without where things lie: buckets and tracking servers are nobody's business."""
    shown: dict[str, Any] = contract.to_json(card)
    shown["lineage"] = {k: v for k, v in shown["lineage"].items() if k not in ("manifest", "run_id")}
    return shown


def routes(gateway: Gateway) -> APIRouter:
    """The routes over one gateway."""
    router = APIRouter()

    @router.get("/v1/models", tags=["models"], summary="What is served, and what is held back",
                responses=problems.responses(401, 429))  # fmt: skip
    async def models() -> ModelList:
        return listed(gateway)

    @router.get("/v1/models/{name}", tags=["models"], summary="One model, its aliases, versions and cards",
                responses=problems.responses(401, 404, 422, 429))  # fmt: skip
    async def model(name: str) -> ModelDetail:
        return detail(gateway, name)

    return router
