"""The ASGI application: every route over one gateway, errors as problems, the page that tells it all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from rayscale import __version__
from rayscale.serve import pages, problems, routes_models, routes_pictures, routes_vectors
from rayscale.serve.gateway import Gateway

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(gateway: Gateway, lifespan: Lifespan | None = None, *, behind_ray: bool = False) -> FastAPI:
    """The ASGI application around a gateway. `behind_ray`: Ray Serve's proxy is in front of it."""
    app = FastAPIOffline(  # its pages load nothing from elsewhere
        title="Rayscale", version=__version__, description=pages.DESCRIPTION, redoc_url=None, lifespan=lifespan
    )
    problems.install(app, gateway.meters, behind_ray=behind_ray)
    for routes in (routes_pictures, routes_vectors, routes_models):
        app.include_router(routes.routes(gateway))
    return app
