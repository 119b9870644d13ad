"""The HTTP face over a real engine, in this process: what its tests share. `runpy.run_path` loads it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayscale.artifact import digest_of
from rayscale.serve.api import create_app
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.gateway import Gateway, GatewaySettings
from rayscale.serve.rollout import Release, Table

U8 = NDArray[np.uint8]


class FakeMeters:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        self.seen.append((name, value, labels))


class FakeRouting:
    """A table that was adopted already."""

    def __init__(self, *releases: Release) -> None:
        self.table = Table(
            generation=1,
            routes={f"{r.name}@champion": ((r.digest, 1.0),) for r in releases},
            versions={r.digest: r for r in releases},
        )
        self.held: Mapping[str, str] = {}
        self.reason = ""


class Service:
    """A gateway over a real engine and a real artifact, and a client of it."""

    def __init__(self, folder: Path, digest: str, **settings: Any) -> None:
        self.release = Release(name="photos", version=3, digest=digest, uri=str(folder))
        self.engine = Engine(EngineSettings(threads=1, tile_px=48, whole_max_px=64 * 64))
        self.engine.prepare(digest, folder)
        self.routing, self.meters = FakeRouting(self.release), FakeMeters()
        self.gateway = Gateway(GatewaySettings(**settings), self.engine, self.routing, self.meters)
        self.app = create_app(self.gateway)

    def serve(self, **folders: Path) -> None:
        """These artifacts beside the first one, by their models' names."""
        releases = [self.release]
        for name, folder in folders.items():
            releases.append(Release(name=name, version=1, digest=digest_of(folder), uri=str(folder)))
            self.engine.prepare(releases[-1].digest, folder)
        self.routing.table = FakeRouting(*releases).table

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(main())

    def upscale(self, content: Any, model: str = "", **headers: str) -> httpx.Response:
        params = {"model": model} if model else {}
        return self.ask("POST", "/v1/upscale", content=content, params=params, headers=headers)


def photo(height: int = 40, width: int = 52, seed: int = 0) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: NDArray[Any]) -> bytes:
    order = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels
    return bytes(cv2.imencode(".png", order)[1])


def decoded(data: bytes) -> U8:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def is_problem(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The response is a complete problem of this status, in one line that says these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["type"].startswith("urn:rayscale:problem:")
    assert body["title"]
    assert body["instance"].startswith("/")
    assert body["request_id"] == response.headers["x-request-id"]
    assert "\n" not in body["detail"]
    assert "Traceback" not in response.text
    for word in words:
        assert word in body["detail"], body["detail"]
    return body
