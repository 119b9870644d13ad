"""A gateway over the model of `small_onnx.py`, in this process. For `runpy.run_path`: test folders are no packages."""

from __future__ import annotations

import asyncio
import io
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.gateway import Gateway, GatewaySettings, create_app
from rayscale.serve.rollout import Release, Table

small = runpy.run_path(str(Path(__file__).with_name("small_onnx.py")))


class Routing:
    """A table that was adopted already."""

    held: Mapping[str, str] = {}
    reason = ""

    def __init__(self, release: Release) -> None:
        routes = {f"{release.name}@champion": ((release.digest, 1.0),)}
        self.table = Table(generation=1, routes=routes, versions={release.digest: release})


class Meters:
    def add(self, *_: object, **__: str) -> None:
        pass


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Service:
    """`app` is the ASGI application; `await ask(...)` calls it with nothing in between."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        digest = small["write"](folder)
        release = Release(name="photos", version=3, digest=digest, uri=str(folder))
        self.engine = Engine(EngineSettings(threads=1, tile_px=48, whole_max_px=64 * 64))
        self.engine.prepare(digest, folder)
        self.gateway = Gateway(GatewaySettings(**settings), self.engine, Routing(release), Meters())
        self.app = create_app(self.gateway)

    def close(self) -> None:
        self.gateway.close()

    async def ask(self, body: bytes, path: str = "/v1/upscale", method: str = "POST", **headers: str) -> Answer:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("t", 1),
            "server": ("t", 80),
            "headers": [(k.lower().replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
        }  # fmt: skip
        sent: list[dict[str, Any]] = []
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await forever.wait()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        forever = asyncio.Event()
        await self.app(scope, receive, send)  # type: ignore[arg-type]
        start = next(m for m in sent if m["type"] == "http.response.start")
        answered = {k.decode(): v.decode() for k, v in start["headers"]}
        return Answer(start["status"], answered, b"".join(m.get("body", b"") for m in sent))


def photo(height: int = 24, width: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(picture: Image.Image, codec: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, codec, **settings)
    return buffer.getvalue()
