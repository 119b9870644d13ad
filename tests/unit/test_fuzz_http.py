"""Whatever is sent, the answer is a picture, numbers or a problem of the client's; never a failure of ours."""

from __future__ import annotations

import base64
import io
import json
import runpy
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rayscale.imaging import Limits

TESTS = Path(__file__).parents[1]
small, kinds = runpy.run_path(str(TESTS / "small_onnx.py")), runpy.run_path(str(TESTS / "small_kinds.py"))
served = runpy.run_path(str(TESTS / "service.py"))
photo, png, is_problem = served["photo"], served["png"], served["is_problem"]

ROUTES = (
    "/v1/upscale",
    "/v1/burst",
    "/v1/restore",
    "/v1/generate",
    "/v1/embed",
    "/v1/similarity",
    "/v1/models/x",
    "/v1/none",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("kinds")
    limits = Limits(max_bytes=300_000, max_pixels=40_000)
    service = served["Service"](root / "p", small["write"](root / "p"), limits=limits, max_items=3)
    for name in ("negative", "filler", "generator", "embedder"):
        kinds[name](root / name)
    service.serve(**{name: root / name for name in ("negative", "filler", "generator", "embedder")})
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
def damaged(draw: st.DrawFn) -> bytes:
    """A picture, or most of one."""
    data = bytearray(draw(st.sampled_from(list(PICTURES.values()))))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


names = st.sampled_from(["image", "mask", "a", "b", "pairs", "x", ""])
texts = st.one_of(damaged().map(lambda d: base64.b64encode(d).decode()), st.text(max_size=20))
values = st.one_of(
    texts, st.none(), st.integers(), st.lists(texts, max_size=4), st.lists(st.dictionaries(names, texts), max_size=3)
)
settings_of = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.one_of(st.integers(), st.text(max_size=3)),
        "to_seed": st.integers(0, 9),
        "n": st.integers(-1, 5),
        "first": st.integers(-1, 9),
        "class": st.one_of(st.integers(-1, 4), st.sampled_from(["daisy", "x"])),
        "truncation": st.floats(),
        "output_format": st.sampled_from(["png", "webp", "gif"]),
        "model": st.sampled_from(["generator", "generator:1", "photos", ""]),
    },
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, str]:
    """(bytes, Content-Type)"""
    kind = draw(st.sampled_from(["raw", "form", "json", "settings"]))
    if kind == "raw":
        return draw(damaged()), draw(st.sampled_from(["", "image/png", "multipart/form-data", "application/json"]))
    if kind == "form":
        form = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + data + b"\r\n"
            for name, data in draw(st.lists(st.tuples(names, damaged()), max_size=4))
        )
        form += b"--x--\r\n" * draw(st.booleans())
        return form, "multipart/form-data; boundary=" + draw(st.sampled_from(["x", "y", "", '"x"', "x" * 300]))
    value = draw(settings_of) if kind == "settings" else draw(st.dictionaries(names, values, max_size=3))
    return json.dumps(value).encode(), "application/json"


queries = st.lists(
    st.tuples(
        st.sampled_from(["model", "method", "scale", "contrast", "sharpen", "side_px", "measure", "x"]),
        st.sampled_from(["photos", "negative", "filler:1", "@", ":", "median", "telea", "lanczos", "2", "0", "-1",
                         "1e9", "nan", "ssim", "cosine", "sift", "\0", "é" * 9]),
    ),
    max_size=3,
)  # fmt: skip
accepts = st.sampled_from(
    ["*/*", "image/png", "image/webp", "application/json", "image/jpeg;q=0.5", "text/html", ";q="]
)


def check(service: Any, route: str, body: tuple[bytes, str], query: Any, accept: str) -> int:
    headers = {"Content-Type": body[1], "Accept": accept}
    response = service.ask("POST", route, content=body[0], params=query, headers=headers)
    assert response.status_code != 500, (route, body, query)
    if response.status_code >= 400:
        is_problem(response, response.status_code)
    elif response.headers["content-type"].startswith("image/"):
        Image.open(io.BytesIO(response.content)).load()
    else:
        json.loads(response.content)
    return int(response.status_code)


def fuzz(service: Any, examples: int) -> set[int]:
    seen: set[int] = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(ROUTES), bodies(), queries, accepts)
    def one(route: str, body: tuple[bytes, str], query: Any, accept: str) -> None:
        seen.add(check(service, route, body, query, accept))

    one()
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF
def test_nothing_that_is_sent_is_a_failure_of_ours(service: Any) -> None:
    assert {200, 404, 422} <= fuzz(service, 80)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_that_is_sent_is_a_failure_of_ours_for_long(service: Any) -> None:
    assert {200, 400, 404, 405, 406, 415, 422} <= fuzz(service, 4000)


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
