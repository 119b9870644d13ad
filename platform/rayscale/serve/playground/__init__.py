"""The page at `/`: static files of our own and the headers that keep it to them. It uses the public routes only."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FILES = {  # path -> (file, media type)
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/playground/widgets.js": ("widgets.js", "text/javascript; charset=utf-8"),
    "/playground/style.css": ("style.css", "text/css; charset=utf-8"),
    "/playground/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304
}


def install(app: FastAPI) -> None:
    """Add the page and its files to `app`; they are read once, here, and stand in no OpenAPI page."""
    for path, (name, media_type) in _FILES.items():
        _serve(app, path, Path(__file__).with_name(name).read_bytes(), media_type)


def _serve(app: FastAPI, path: str, body: bytes, media_type: str) -> None:
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"'}

    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)
