"""Routes that FastAPI documents and does not run: to find one and what its endpoint takes costs it 0.2 ms a request."""

from __future__ import annotations

import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

import pydantic
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class LeanRoute(APIRoute):
    """Of an endpoint `(request, query, accept)`: `query` is a model of pydantic, `accept` the header.

    Its router's dependencies are for the page alone: they are not run. Endpoints without `query` run as ever.
    """

    handler: Handler | None = None  # where it is lean

    def get_route_handler(self) -> Handler:
        endpoint, hints = self.endpoint, typing.get_type_hints(self.endpoint)
        if "query" not in hints:
            return super().get_route_handler()
        query_type: type[pydantic.BaseModel] = hints["query"]
        nothing = query_type()

        async def handle(request: Request) -> Response:
            query = _read(query_type, request) if request.scope["query_string"] else nothing
            answer: Response = await endpoint(request, query, header(request.scope, b"accept") or "*/*")
            return answer

        self.handler = handle
        return handle


class Lane:
    """ASGI middleware: the lean routes of these routers by one look at a table, past what FastAPI puts around others.

    `errors`: what answers an exception, by its class, as FastAPI has them.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter], errors: Mapping[Any, Callable[..., Any]]) -> None:
        self.app, self._errors = app, errors
        self._routes: dict[tuple[str, str], tuple[APIRoute, Handler]] = {}
        for route in (route for router in routers for route in router.routes):
            if isinstance(route, LeanRoute) and route.handler is not None:
                self._routes |= {(method, route.path): (route, route.handler) for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get((scope["method"], route_path(scope))) if scope["type"] == "http" else None
        if found is None:
            await self.app(scope, receive, send)
            return
        scope["route"], handle = found
        request = Request(scope, receive, send)
        try:
            response = await handle(request)
        except Exception as error:
            told = next((self._errors[kind] for kind in type(error).__mro__ if kind in self._errors), None)
            if told is None:
                raise
            response = told(request, error)
        await response(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path as routes have it: behind the prefix where an application has one. As Starlette takes it off."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and (path == root or path.startswith(f"{root}/")) else path


def header(scope: Scope, name: bytes) -> str:
    """The first of that name, in lower case; "" where there is none."""
    found: dict[bytes, bytes] | None = scope.get("rayscale.headers")
    if found is None:
        found = scope["rayscale.headers"] = dict(reversed(scope["headers"]))
    return found.get(name, b"").decode("latin-1")


def _read(query_type: type[pydantic.BaseModel], request: Request) -> pydantic.BaseModel:
    """Of a parameter that comes twice the last counts. Raises: RequestValidationError, as FastAPI would."""
    try:
        return query_type.model_validate(dict(request.query_params))
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError([{**e, "loc": ("query", *e["loc"])} for e in found]) from None
