"""The ASGI application: every route over one gateway, errors as problems, the page that tells it all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import Depends, FastAPI, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from rayscale import __version__
from rayscale.serve import pages, playground, problems, routes_models, routes_pictures, routes_vectors
from rayscale.serve.gateway import Gateway
from rayscale.serve.keys import Guard
from rayscale.serve.lean import Lane
from rayscale.serve.problems import Envelope

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(gateway: Gateway, lifespan: Lifespan | None = None, *, behind_ray: bool = False) -> FastAPI:
    """The ASGI application around a gateway. `behind_ray`: Ray Serve's proxy is in front of it."""
    traced = any(name.startswith("OTEL_") for name in os.environ)  # else it asks anew at each request: 20 us
    app = FastAPIOffline(  # its pages load nothing from elsewhere
        title="Rayscale", version=__version__, description=pages.DESCRIPTION, redoc_url=None, lifespan=lifespan,
        telemetry=dict.fromkeys(("tracing", "metrics", "logs"), traced),
    )  # fmt: skip
    keys, routers = gateway.settings.keys, [r.routes(gateway) for r in (routes_pictures, routes_vectors, routes_models)]
    problems.install(app)
    stack = app.build_middleware_stack

    def around() -> ASGIApp:
        inner: ASGIApp = Lane(stack(), routers, app.exception_handlers)
        if keys:
            inner = Guard(inner, keys)  # within what follows: a refusal is a problem, and counted
        return Envelope(inner, gateway.meters, gateway.access, behind_ray)

    app.build_middleware_stack = around  # type: ignore[method-assign]  # `add_middleware` goes within Starlette's own
    pages_of_it = app.router.routes.copy()
    locked = [Depends(HTTPBearer(auto_error=False))] if keys else []  # for the page: the guard has looked already
    for router in routers:
        app.include_router(router, dependencies=locked)
    playground.install(app)

    @app.get("/livez", tags=["health"], summary="The process answers", response_class=Response)
    async def livez() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz", tags=["health"], summary="A model is ready to answer", response_class=Response,
             responses=problems.responses(503))  # fmt: skip
    async def readyz() -> Response:
        gateway.check_ready()
        return Response("ok\n", media_type="text/plain")

    app.router.routes[:] = [*app.router.routes[len(pages_of_it) :], *pages_of_it]  # Ray looks names up in this order
    return app
