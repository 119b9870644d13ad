"""The HTTP face over a real engine, in this process: what its tests share. `runpy.run_path` loads it."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayscale import imaging, latents
from rayscale.artifact import Session, digest_of
from rayscale.serve.api import create_app
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.gateway import Gateway, GatewaySettings, role_of
from rayscale.serve.table import Release, Table

U8 = NDArray[np.uint8]
SIZE = (37, 29)  # where sides are free


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
        self.watched: Mapping[str, str] = {}
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


# A function that some family ships, served by the route of its role: the answer is what its session says.


def check_served(service: Service, model: str, session: Session) -> str:
    """Its role."""
    role = role_of(session.card.spec)
    {"generate": check_generate, "embed": check_embed}.get(role, check_picture)(service, model, session, role)
    return role


def check_picture(service: Service, model: str, session: Session, role: str) -> None:
    spec = session.card.spec
    height, width = (a if isinstance(a, int) else b for a, b in zip(spec.inputs[0].shape[-2:], SIZE, strict=True))
    leads = {t.name: tuple(int(a) for a in t.shape[1:-2]) for t in spec.inputs}
    frames = [photo(height, width, seed=i) for i in range(math.prod(leads[spec.inputs[0].name]) // 3)]
    parts = [("image", ("x", png(frame))) for frame in frames]
    stack = frames
    if len(leads) > 1:
        mask = np.where(photo(height, width, seed=9)[..., :1] > 200, 255, 0).astype(np.uint8)
        parts.append(("mask", ("m", png(np.repeat(mask, 3, axis=2)))))
        stack = [*frames, mask]
    response = service.ask("POST", f"/v1/{role}?model={model}", files=parts)
    assert response.status_code == 200, response.text
    run = imaging.as_one(lambda inputs: session.run(inputs)[spec.outputs[0].name], leads)
    whole = imaging.run_tiled(
        run, imaging.to_nchw_f32(np.dstack(stack)), scale=spec.scale, tile_px=None, halo_px=None, align=spec.align
    )
    np.testing.assert_array_equal(decoded(response.content), imaging.to_hwc_u8(whole))


def check_generate(service: Service, model: str, session: Session, role: str) -> None:
    as_json = {"Accept": "application/json"}
    response = service.ask("POST", "/v1/generate", json={"model": model, "seed": 5, "n": 11}, headers=as_json)
    assert response.status_code == 200, response.text
    many = [decoded(base64.b64decode(entry["b64_json"])) for entry in response.json()["data"]]
    for index in (0, 7, 8, 10):  # alone, a picture is what it is among others
        ask = {"model": model, "seed": 5, "first": index}
        np.testing.assert_array_equal(decoded(service.ask("POST", "/v1/generate", json=ask).content), many[index])
    shapes = {t.name: t.shape for t in session.card.spec.inputs}
    inputs = {"z": latents.latents(5, 1, int(shapes["z"][1]))}
    if "label" in shapes:
        inputs["label"] = latents.one_hot([0], int(shapes["label"][1]))
    made = session.run(inputs)[session.card.spec.outputs[0].name]
    np.testing.assert_array_equal(many[0], imaging.to_hwc_u8(made))


def check_embed(service: Service, model: str, session: Session, role: str) -> None:
    tensor = session.card.spec.inputs[0]
    height, width = (a if isinstance(a, int) else b for a, b in zip(tensor.shape[-2:], SIZE, strict=True))
    sent = photo(height, width)
    buffer = io.BytesIO()
    Image.fromarray(sent).save(buffer, "PNG")
    response = service.ask("POST", f"/v1/embed?model={model}", content=buffer.getvalue())
    assert response.status_code == 200, response.text
    entry = response.json()["data"][0]
    for index, (name, value) in enumerate(session.run({tensor.name: imaging.to_nchw_f32(sent)}).items()):
        np.testing.assert_allclose(entry["embedding" if index == 0 else name], value[0], atol=1e-6)
