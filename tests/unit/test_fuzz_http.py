"""Whatever is sent, the answer is a picture, numbers or a problem of the client's; never a failure of ours."""

from __future__ import annotations

import base64
import io
import json
import runpy
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from fastapi import FastAPI, HTTPException, Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.engine import events, from_schema

from rayscale.imaging import Limits
from rayscale.serve.problems import MEDIA_TYPE, Problem

TESTS = Path(__file__).parents[1]
small, kinds = runpy.run_path(str(TESTS / "small_onnx.py")), runpy.run_path(str(TESTS / "small_kinds.py"))
served = runpy.run_path(str(TESTS / "service.py"))
photo, png, is_problem = served["photo"], served["png"], served["is_problem"]

MODELS = {"negative", "filler", "burst", "generator", "embedder"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("kinds")
    limits = Limits(max_bytes=300_000, max_pixels=40_000)
    service = served["Service"](root / "p", small["write"](root / "p"), limits=limits, max_items=3)
    for name in MODELS:
        kinds[name](root / name)
    service.serve(**{name: root / name for name in MODELS})
    yield service
    service.gateway.close()


def saved(image: Image.Image, codec: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, **more)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    rgb = Image.fromarray(photo(9, 11))
    return {
        "png": png(photo(9, 11)),
        "jpeg": saved(rgb, "JPEG"),
        "webp": saved(rgb, "WEBP"),
        "tiff": saved(rgb, "TIFF"),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "rgba": saved(rgb.convert("RGBA"), "PNG"),
        "deep": png(photo(9, 11).astype(np.uint16) * 257),
        "palette": saved(rgb.convert("P"), "PNG", transparency=3),
        "one bit": saved(rgb.convert("1"), "TIFF"),
    }


PICTURES = pictures()


@st.composite
def sent(draw: st.DrawFn) -> bytes:
    """A picture, half of the time; or most of one."""
    data = bytearray(draw(st.sampled_from(list(PICTURES.values()))))
    if draw(st.booleans()):
        return bytes(data)
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


# What the OpenAPI page promises, asked for and broken by schemathesis

for media in ("image/jpeg", "image/png", "image/webp", "image/*"):
    schemathesis.openapi.media_type(media, sent())
schemathesis.openapi.format("binary", sent())
schemathesis.openapi.format("byte", sent().map(lambda data: base64.b64encode(data).decode()))


@schemathesis.check
def refusals_are_problems(_: Any, response: Any, case: Any) -> None:
    if response.status_code >= 400:
        assert response.headers["content-type"] == [MEDIA_TYPE], response.text
        problem = Problem.model_validate_json(response.content)
        assert problem.status == response.status_code, response.text
        assert "\n" not in problem.detail, response.text


def explored(app: FastAPI, *phases: str, examples: int = 1) -> tuple[dict[str, set[int]], list[str]]:
    """By operation, the statuses that were answered; and what is wrong with answers, a line each."""
    model = {"dictionary": "models", "probability": 0.5}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config.from_dict({
        "seed": 0,
        "continue-on-failure": True,
        "suppress-health-check": ["all"],
        "generation": {"deterministic": True, "max-examples": examples, "database": "none"},
        "phases": {name: {"enabled": name in phases} for name in ("examples", "coverage", "fuzzing", "stateful")},
        # Which settings go together, and whether bytes are a picture, is beyond what a page can say.
        "checks": {
            "positive_data_acceptance": {"enabled": False},
            # Too many of what is wrong besides are refused by their number; 413 is on the page, not in the default.
            "negative_data_rejection": {"expected-statuses": [400, 401, 404, 405, 406, 408, 413, 415, 422, 429, 503]},
        },
        "dictionaries": {"models": {"values": sorted(MODELS)}},
        "parameters": {"query.model": model, "body.model": model, "path.name": model},
    }))  # fmt: skip
    statuses, wrong = defaultdict(set), []
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            wrong.append(str(event))
        if not isinstance(event, events.ScenarioFinished):
            continue
        for key, asked in event.recorder.interactions.items():
            operation = event.recorder.cases[key].value.operation.label
            statuses[operation].add(asked.response.status_code if asked.response else 0)
        for key, checks in event.recorder.checks.items():
            operation = event.recorder.cases[key].value.operation.label
            for check in checks:
                if check.failure_info is not None:
                    told = check.failure_info.failure.message, check.failure_info.code_sample[:400]
                    wrong.append(f"{operation}: {check.name}: {told}")
    return statuses, wrong


OPERATIONS = {
    "GET /livez",
    "GET /readyz",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/burst",
    "POST /v1/embed",
    "POST /v1/generate",
    "POST /v1/restore",
    "POST /v1/similarity",
    "POST /v1/upscale",
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF
def test_every_route_keeps_what_its_page_promises(service: Any) -> None:
    statuses, wrong = explored(service.app, "examples", "fuzzing", examples=8)
    assert wrong == []
    assert set(statuses) == OPERATIONS


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_route_keeps_what_its_page_promises_for_long(service: Any) -> None:
    statuses, wrong = explored(service.app, "examples", "coverage", "fuzzing", "stateful", examples=100)
    assert wrong == []
    assert [name for name in OPERATIONS if 200 not in statuses[name]] == []  # not refusals alone were looked at
    assert {400, 404, 405, 413, 415, 422} <= set().union(*statuses.values())


def test_a_broken_promise_is_found() -> None:
    """Negative control."""
    app = FastAPI()

    @app.get("/fails")
    async def fails(n: int) -> Response:
        return Response(status_code=500 if n < -9 else 200, media_type="application/json", content="1")

    @app.get("/lies", response_model=dict[str, int])
    async def lies(n: int) -> Response:
        return Response('{"n": "many"}' if n > 9 else '{"n": 1}', media_type="application/json")

    @app.get("/grumbles", responses={404: {}})
    async def grumbles(n: int) -> int:
        if n > 9:
            raise HTTPException(404)
        return n

    _, wrong = explored(app, "fuzzing", examples=15)
    found = {tuple(line.split(": ")[:2]) for line in wrong}
    assert found >= {
        ("GET /fails", "not_a_server_error"),
        ("GET /lies", "response_schema_conformance"),
        ("GET /grumbles", "refusals_are_problems"),
    }


def test_a_refusal_is_one_line_whatever_it_shows(service: Any) -> None:
    is_problem(service.ask("POST", "/v1/upscale", params={"a\nb": "\r\n\u2028"}), 422, "a b")


# What no page can say: forms that break off, bodies that are not of their type, any Accept

names = st.sampled_from(["image", "mask", "a", "b", "pairs", "x", ""])
accepts = st.sampled_from(
    ["*/*", "image/png", "image/webp", "application/json", "image/jpeg;q=0.5", "text/html", ";q="]
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, str]:
    """(bytes, Content-Type)"""
    if draw(st.booleans()):
        return draw(sent()), draw(st.sampled_from(["", "image/png", "multipart/form-data", "application/json"]))
    form = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + data + b"\r\n"
        for name, data in draw(st.lists(st.tuples(names, sent()), max_size=4))
    )
    form += b"--x--\r\n" * draw(st.booleans())
    return form, "multipart/form-data; boundary=" + draw(st.sampled_from(["x", "y", "", '"x"', "x" * 300]))


def check(service: Any, route: str, body: tuple[bytes, str], accept: str) -> int:
    headers = {"Content-Type": body[1], "Accept": accept}
    response = service.ask("POST", route, content=body[0], headers=headers)
    if response.status_code >= 400:
        assert response.status_code < 500, (route, body)
        is_problem(response, response.status_code)
    elif response.headers["content-type"].startswith("image/"):
        Image.open(io.BytesIO(response.content)).load()
    else:
        json.loads(response.content)
    return int(response.status_code)


def fuzz(service: Any, examples: int) -> set[int]:
    seen: set[int] = set()
    routes = st.sampled_from(["/v1/upscale", "/v1/burst?method=bicubic", "/v1/restore?method=median", "/v1/generate",
                              "/v1/embed", "/v1/similarity", "/v1/models/x", "/v1/none"])  # fmt: skip

    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(routes, bodies(), accepts)
    def one(route: str, body: tuple[bytes, str], accept: str) -> None:
        seen.add(check(service, route, body, accept))

    one()
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_body_is_a_failure_of_ours(service: Any) -> None:
    assert {400, 404, 415, 422} <= fuzz(service, 60)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_body_is_a_failure_of_ours_for_long(service: Any) -> None:
    assert {200, 400, 404, 405, 406, 415, 422} <= fuzz(service, 1000)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.binary(max_size=300)), min_size=1, max_size=5))
def test_a_form_gives_back_every_byte(parts: list[tuple[str, bytes]]) -> None:
    import httpx

    from rayscale.serve.body import Body

    request = httpx.Request("POST", "http://t", files=[(name, (name, data)) for name, data in parts])
    found = Body(request.read(), request.headers["content-type"]).parts({"a": 9, "b": 9})
    assert found == {n: [d for m, d in parts if m == n] for n in dict(parts)}


# Bombs: small files that claim to be, or unpack to, much


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *before: bytes, bits: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((3 * min(width, 1000) * bits // 8 + 1) * min(height, 64))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + chunk(b"IEND", b"")


def bombs() -> dict[str, tuple[bytes, int]]:
    """Name -> (file, the status that refuses it)."""
    zeros = zlib.compress(bytes(20 << 20))
    jpeg = PICTURES["jpeg"]
    frames = [Image.fromarray(photo(9, 11, seed=i)) for i in range(50)]
    return {
        "huge": (png_of(60_000, 60_000), 413),
        "huge 16 bits": (png_of(30_000, 30_000, bits=16), 413),
        "wide": (png_of(2**31 - 1, 1), 413),
        "many frames": (saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), 422),
        "iCCP": (png_of(9, 9, chunk(b"iCCP", b"a\0\0" + zeros)), 422),
        "gif": (saved(Image.fromarray(photo(9, 11)), "GIF"), 415),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>", 415),
        "html": (b"<!DOCTYPE html><script>alert(1)</script>", 415),
        "wrong magic": (b"\x89PNG\r\n\x1a\n" + jpeg, 422),
        "truncated": (jpeg[: len(jpeg) // 2], 422),
    }


BOMBS = bombs()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_wherever_they_lie(service: Any, name: str) -> None:
    data, status = BOMBS[name]
    text = base64.b64encode(data).decode()
    good = PICTURES["png"]
    answers = [
        service.ask("POST", "/v1/upscale", content=data),
        service.ask("POST", "/v1/upscale", json={"image": text}),
        service.ask("POST", "/v1/restore?model=filler", files={"image": good, "mask": data}),
        service.ask("POST", "/v1/restore?method=median", content=data),
        service.ask("POST", "/v1/embed", files=[("image", good), ("image", data)]),
        service.ask("POST", "/v1/similarity", files={"a": good, "b": data}),
    ]
    sized = {422} if name in ("truncated", "many frames") else set()  # a mask is compared in size first
    for response in answers:
        assert response.status_code in {status} | sized, (name, response.text)
        is_problem(response, response.status_code)


def test_odd_but_good_pictures_are_answered(service: Any) -> None:
    polyglot = PICTURES["jpeg"] + b"PK\3\4" + bytes(100)
    for data in [*PICTURES.values(), polyglot]:
        response = service.ask("POST", "/v1/upscale", content=data)
        assert response.status_code == 200, response.text
        assert Image.open(io.BytesIO(response.content)).size == (22, 18)
