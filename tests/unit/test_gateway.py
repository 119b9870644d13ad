"""The HTTP face in-process: exact bytes, limits before cost, one shape for every error, and no torch anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import runpy
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from rayscale import imaging
from rayscale.errors import ConfigError, IntegrityError
from rayscale.imaging import Limits
from rayscale.observe import Json, log
from rayscale.serve import access
from rayscale.serve.access import AccessLog
from rayscale.serve.admission import CodecShare
from rayscale.serve.answers import Format, negotiate
from rayscale.serve.api import create_app
from rayscale.serve.table import Release, Table

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
served = runpy.run_path(str(Path(__file__).parents[1] / "service.py"))
Service, FakeRouting = served["Service"], served["FakeRouting"]
photo, png, decoded, is_problem = served["photo"], served["png"], served["decoded"], served["is_problem"]
U8 = NDArray[np.uint8]
ROUTE = "photos@champion"

# Reads a PNG and an artifact's model with nothing of ours, and prints whether the other PNG is what the model says.
INDEPENDENT = """
import sys, numpy as np, onnxruntime as ort
from PIL import Image
model, sent, served = sys.argv[1:]
x = np.asarray(Image.open(sent)).astype(np.float32) / np.float32(255)
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
y = session.run(None, {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None]})[0][0].transpose(1, 2, 0)
want = np.rint(np.clip(y, 0, 1) * np.float32(255)).astype(np.uint8)
assert not any(name.startswith("rayscale") for name in sys.modules)
print(np.array_equal(want, np.asarray(Image.open(served))))
"""


@pytest.fixture(scope="module")
def artifact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "a"
    small["write"](folder)
    return folder


@pytest.fixture
def make(artifact_folder: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def begin(folder: Path = artifact_folder, **settings: Any) -> Service:
        from rayscale.artifact import digest_of

        made.append(Service(folder, digest_of(folder), **settings))
        return made[-1]

    yield begin
    for service in made:
        service.gateway.close()


@pytest.fixture
def service(make: Callable[..., Service]) -> Service:
    return make()


# --- pictures


@pytest.mark.parametrize(("height", "width", "tiling"), [(40, 52, "whole"), (131, 97, "tiled 9")])
def test_the_png_is_what_an_untiled_run_of_the_model_says(
    service: Service, artifact_folder: Path, tmp_path: Path, height: int, width: int, tiling: str
) -> None:
    sent, served = tmp_path / "sent.png", tmp_path / "served.png"
    sent.write_bytes(png(photo(height, width)))
    response = service.upscale(sent.read_bytes())
    assert response.status_code == 200, response.text
    assert response.headers["x-rayscale-tiling"] == tiling
    served.write_bytes(response.content)

    def judge(model: Path) -> str:
        command = [sys.executable, "-c", INDEPENDENT, str(model), str(sent), str(served)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()

    assert judge(artifact_folder / "model.onnx") == "True"
    (tmp_path / "other.onnx").write_bytes(small["model_bytes"](1))
    assert judge(tmp_path / "other.onnx") == "False"  # the judge can tell


def test_the_answer_says_how_it_was_made(service: Service) -> None:
    response = service.upscale(png(photo()), model="photos", **{"X-Request-Id": "mine-7"})
    headers = response.headers
    assert headers["content-type"] == "image/png"
    assert headers["x-request-id"] == "mine-7"
    assert headers["x-rayscale-model"] == "photos:3"
    assert headers["x-rayscale-digest"] == service.release.digest
    assert headers["x-rayscale-provider"] == "CPUExecutionProvider"
    spans = dict(part.strip().split(";dur=") for part in headers["server-timing"].split(","))
    assert set(spans) == {"decode", "queue", "infer", "encode"}
    assert all(float(ms) >= 0 for ms in spans.values())


def test_jpeg_and_webp_in_and_out_and_exif_orientation(service: Service) -> None:
    picture = Image.fromarray(cv2.resize(photo(5, 8), (64, 40), interpolation=cv2.INTER_CUBIC))
    exif = Image.Exif()
    exif[274] = 6  # turned: 64x40 as stored, 40x64 as seen
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=95, exif=exif)
    upright = np.asarray(Image.open(stored).transpose(Image.Transpose.ROTATE_270))
    reference = decoded(service.upscale(stored.getvalue()).content)
    assert reference.shape == (128, 80, 3)
    np.testing.assert_array_equal(reference, decoded(service.upscale(png(upright)).content))
    for media, magic in (("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")):
        response = service.upscale(stored.getvalue(), Accept=f"image/{media}")
        assert response.headers["content-type"] == f"image/{media}"
        assert response.content.startswith(magic)
        assert response.content == imaging.encode(reference, media, 95)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "png"), ("*/*", "png"), ("image/*", "png"), ("image/webp", "webp"), ("IMAGE/JPEG", "jpeg"),
        ("image/jpeg, image/png", "png"), ("image/png;q=0.5, image/jpeg", "jpeg"),
        ("image/png;q=0.1, image/*;q=0.2", "jpeg"), ("image/webp;q=0.9, */*;q=0.1", "webp"),
        ("image/png;q=0, */*", "jpeg"), ("image/jpeg;q=x, image/webp;q=0.3", "webp"),
        ("application/json", "json"), ("application/*, image/png;q=0.9", "json"),
        ("application/json, image/png", "png"),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "png"),
    ],
)  # fmt: skip
def test_the_format_is_negotiated(accept: str, media: Any) -> None:
    assert negotiate(accept) == (Format(as_json=True) if media == "json" else Format(media=media))


@pytest.mark.parametrize(
    "accept", ["text/html", "image/avif", "image/png;q=0", "image/*;q=0, text/*", "image/png;q=nan"]
)
def test_a_format_that_is_not_written_is_refused(service: Service, accept: str) -> None:
    with pytest.raises(HTTPException):
        negotiate(accept)
    is_problem(service.upscale(png(photo()), Accept=accept), 406, "image/png", "image/webp")


def test_a_hundred_requests_at_once_get_their_own_pictures(service: Service) -> None:
    bodies = [png(photo(20 + i % 60, 70 - i % 50, seed=i)) for i in range(40)]
    serial = [service.upscale(body).content for body in bodies]

    async def all_at_once() -> list[bytes]:
        async with service.client() as client:

            async def one(index: int) -> bytes:
                task = asyncio.ensure_future(client.post("/v1/upscale", content=bodies[index % 40]))
                if index % 5 == 4:  # a client that hangs up
                    await asyncio.sleep(0.01)
                    task.cancel()
                    return b""
                return (await task).content

            return await asyncio.gather(*(one(i) for i in range(100)), return_exceptions=True)  # type: ignore[return-value]

    answers = asyncio.run(all_at_once())
    kept = [(i, a) for i, a in enumerate(answers) if i % 5 != 4]
    assert len(kept) == 80
    assert all(answer == serial[i % 40] for i, answer in kept)
    assert len(set(serial)) == 40  # distinct pictures: a mix-up would be seen


# --- refusals


def huge_png(width: int, height: int) -> bytes:
    """A header that declares a huge picture, and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_unusable_bodies_are_refused_by_name(service: Service) -> None:
    whole = png(photo())
    gif = io.BytesIO()
    Image.fromarray(photo()).save(gif, "GIF")
    animated = io.BytesIO()
    frames = [Image.fromarray(photo(seed=i)) for i in range(3)]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    is_problem(service.upscale(b""), 422, "0 bytes")
    is_problem(service.upscale(b"hello, I am no picture"), 415, "not read")
    is_problem(service.upscale(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415, "SVG")
    is_problem(service.upscale(gif.getvalue()), 415, "GIF")
    is_problem(service.upscale(whole[: len(whole) // 2]), 422, "truncated or damaged")
    is_problem(service.upscale(animated.getvalue()), 422, "3 frames")
    is_problem(service.upscale(whole, **{"Content-Encoding": "gzip"}), 415, "Content-Encoding")
    assert service.upscale(whole, **{"Content-Type": "application/x-www-form-urlencoded"}).status_code == 200  # curl


def test_a_huge_declared_picture_costs_nothing(service: Service) -> None:
    started = time.process_time()
    is_problem(service.upscale(huge_png(60_000, 1_000)), 413, "60000x1000")
    is_problem(service.upscale(huge_png(30_000, 30_000)), 413, "30000x30000")
    assert time.process_time() - started < 0.2


def test_a_declared_length_is_refused_before_the_body_is_read(make: Callable[..., Service]) -> None:
    service = make(limits=Limits(max_bytes=1000))
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x" * 100

    declared = {"Content-Length": "123456789"}
    is_problem(service.ask("POST", "/v1/upscale", content=body(), headers=declared), 413, "123456789 bytes")
    assert read == 0
    is_problem(service.ask("POST", "/v1/upscale", content=body()), 413, "1100 bytes")  # endless, not declared
    assert read == 11


def test_bodies_of_all_requests_together_are_limited(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four clients stall with 1,000 bytes each; the fifth is told, and has room once they left."""
    service = make(limits=Limits(max_bytes=2000), max_held_bytes=4999)

    async def main() -> None:
        stalled = 0

        async def stalls() -> AsyncIterator[bytes]:
            nonlocal stalled
            yield b"x" * 1000
            stalled += 1
            await asyncio.Event().wait()

        async with service.client() as client:
            clients = [asyncio.create_task(client.post("/v1/upscale", content=stalls())) for _ in range(4)]
            while stalled < 4:
                await asyncio.sleep(0.01)
            assert service.gateway.held.bytes == 4000
            refused = await client.post("/v1/upscale", content=b"x" * 1000)  # declared: before it is read
            body = is_problem(refused, 503, "5000 bytes", "at most 4999 bytes")
            assert (body["field"], int(refused.headers["retry-after"])) == ("bodies", 1)
            with monkeypatch.context() as others:  # who decodes and encodes will free the room
                others.setattr(service.gateway.codec_load, "backlog_s", lambda: 7.0)
                refused = await client.post("/v1/upscale", content=b"x" * 1000)
                assert int(refused.headers["retry-after"]) == 7
            async with asyncio.timeout(10):
                is_problem(await client.post("/v1/upscale", content=stalls()), 503, "5000 bytes")  # and not declared
            is_problem(await client.post("/v1/upscale", content=b"x" * 999), 415)  # the control: that is taken
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            assert service.gateway.held.bytes == 0
            is_problem(await client.post("/v1/upscale", content=b"x" * 1001), 415)

    asyncio.run(main())
    assert service.upscale(png(photo(8, 8))).status_code == 200
    assert service.gateway.held.bytes == 0


def test_output_and_time_are_limited_too(make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service = make(max_output_pixels=4 * 40 * 52 - 1, timeout_s=30.0)
    is_problem(service.upscale(png(photo())), 413, "104x80", "output")
    assert service.upscale(png(photo(40, 51))).status_code == 200
    for cost_s, status in ((45.0, 413), (26.0, 200)):
        monkeypatch.setattr(service.engine, "cost_s", lambda digest, units, cost_s=cost_s: cost_s)
        answer = service.upscale(png(photo(40, 51)))
        assert answer.status_code == status
        if status == 413:
            is_problem(answer, 413, "takes about 45 s here", "requests have 30 s", "rayscale upscale IN OUT --model")


def test_what_would_miss_its_deadline_is_refused_with_a_time_to_come_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.engine, "backlog_s", lambda: 75.4)
    response = service.upscale(png(photo()))
    is_problem(response, 503, "backlog 75.4 s")
    assert int(response.headers["retry-after"]) == 21  # 75.4 s of work; of 60 s a tenth is kept back


def test_codecs_can_be_where_a_request_would_wait(service: Service) -> None:
    load, whole = service.gateway.codec_load, png(photo(200, 300))
    answer = service.upscale(whole)
    spans = {
        name: float(ms) for name, _, ms in (s.partition(";dur=") for s in answer.headers["server-timing"].split(", "))
    }
    pixels = 200 * 300 * 5  # read, and four times as many written
    assert load.cost_s(pixels) == pytest.approx((spans["decode"] + spans["encode"]) / 1e3, abs=2e-4)
    assert (load.codec_s, load.engine_s) == ({}, {})  # it is done
    others, minute = [CodecShare(load) for _ in range(3)], round(60.0 / load.cost_s(1))
    for other in others:
        other.enter(minute, service.engine, 0.0)
    assert load.backlog_s() == pytest.approx(90.0, rel=1e-3)  # two threads
    is_problem(service.upscale(whole), 503, "codecs=backlog", "try again later")
    assert service.upscale(png(photo(20, 20))).status_code == 200  # a small picture has a thread of its own
    for other in others:
        other.end()
    assert service.upscale(whole).status_code == 200


def test_what_is_being_decoded_counts_as_the_engines(service: Service) -> None:
    share = CodecShare(service.gateway.codec_load)
    share.enter(1, service.engine, 75.4)
    is_problem(service.upscale(png(photo())), 503, "engine=backlog 75.4 s")
    share.decoded()
    assert service.upscale(png(photo())).status_code == 200


def test_a_price_of_codecs_alone_refuses_nobody(service: Service) -> None:
    """After one slow moment nobody would be let in, and nothing better be learnt."""
    service.gateway.codec_load.learn(1, 10.0)
    assert service.upscale(png(photo(200, 300))).status_code == 200


def test_a_thread_that_is_late_enters_nothing_for_a_request_that_is_over(service: Service) -> None:
    share = CodecShare(service.gateway.codec_load)
    share.end()
    share.enter(100, service.engine, 1.0)
    assert service.gateway.codec_load.coming_s(service.engine) == 0.0
    assert not service.gateway.codec_load.codec_s


def test_models_and_parameters_that_do_not_exist(service: Service) -> None:
    body = is_problem(service.upscale(b"x", model="photo"), 404, "did you mean 'photos@champion'?")
    assert body["field"] == "model"
    is_problem(service.upscale(b"x", model="photos@beta"), 404)
    is_problem(service.ask("POST", "/v1/upscale?modle=photos", content=b"x"), 422, "modle", "/docs")
    is_problem(service.ask("GET", "/nowhere"), 404, "/docs")
    wrong = service.ask("GET", "/v1/upscale")
    is_problem(wrong, 405, "GET")
    assert wrong.headers["allow"] == "POST"


def test_several_models_need_a_name_or_a_default(make: Callable[..., Service]) -> None:
    service = make()
    other = Release(name="faces", version=1, digest=service.release.digest, uri="")
    service.routing.table = FakeRouting(service.release, other).table
    is_problem(service.upscale(png(photo())), 400, "faces@champion", "photos@champion")
    service = make(default_model="photos")
    service.routing.table = FakeRouting(service.release, other).table
    assert service.upscale(png(photo())).status_code == 200
    service = make(default_model="dusk")
    assert service.upscale(png(photo())).status_code == 200  # not promoted, and another is the only one
    is_problem(
        service.ask("POST", "/v1/upscale?scale=4", content=b"x"),
        404,
        "by 4",
        "dusk@champion, the default, is not promoted",
    )
    service.routing.table = FakeRouting(service.release, other).table
    is_problem(service.upscale(png(photo())), 400, "faces@champion", "dusk@champion, the default, is not promoted")


def test_a_model_of_another_kind_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    known = service.engine.session(service.release.digest)
    monkeypatch.setattr(known, "card", small["card"](kind="embed"))
    is_problem(service.upscale(b"x", model="photos"), 404, "embed", "upscale", "/v1/models")
    is_problem(service.upscale(b"x"), 404, "no model", "upscale")


@pytest.mark.parametrize("error", [RuntimeError("secret /path"), IntegrityError("digest", "secret", "x", "y")])
def test_what_is_ours_to_mend_tells_an_id_and_no_more(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(service.engine, "cost_s", fail)
    response = service.upscale(png(photo()), **{"X-Request-Id": "abc"})
    is_problem(response, 500, "abc")
    assert "secret" not in response.text


def test_hostile_request_ids_are_replaced(service: Service) -> None:
    for given in ("a b", "x" * 129, "<script>"):
        made = service.ask("GET", "/livez", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert made != given
        assert len(made) == 32


# --- readiness, models, metrics, pages


def test_not_ready_says_why(service: Service) -> None:
    assert service.ask("GET", "/readyz").status_code == 200
    service.routing.reason = "preparing photos:3"
    for response in (service.ask("GET", "/readyz"), service.upscale(png(photo()))):
        is_problem(response, 503, "preparing photos:3")
        assert int(response.headers["retry-after"]) >= 1
    assert service.ask("GET", "/livez").status_code == 200


def test_models_lists_what_serves_what_is_warm_and_what_is_held(service: Service) -> None:
    warm = Release(name="photos", version=2, digest="w" * 64, uri="")
    table = service.routing.table
    service.routing.table = Table(generation=4, routes=table.routes, versions={**table.versions, warm.digest: warm})
    service.routing.held = {ROUTE: "photos:4 is refused: golden is off"}
    answer = service.ask("GET", "/v1/models").json()
    assert answer["generation"] == 4
    assert answer["default"] == ROUTE
    assert answer["held"] == {ROUTE: "photos:4 is refused: golden is off"}
    first, second = answer["models"]
    assert (first["version"], first["aliases"], first["ready"]) == (3, ["champion"], True)
    assert (first["scale"], first["kind"], first["family"], first["digest"]) == (
        2, "transform", "small", service.release.digest,
    )  # fmt: skip
    assert (second["version"], second["aliases"], second["ready"]) == (2, [], False)


@pytest.mark.parametrize("where", ["FastAPI's", "ours", "half of an answer"])
def test_what_nobody_expected_is_answered_and_told_once(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield b"half"
        raise OSError("a cable")

    async def route() -> Response:
        if where == "half of an answer":
            return StreamingResponse(stream())
        raise OSError("a cable")

    def broken(*_: object, **__: object) -> None:
        raise OSError("a cable")

    service.app.add_api_route("/odd", route)
    if where == "half of an answer":  # there is no taking it back: the server cuts the connection
        with pytest.raises(OSError, match="a cable"):
            service.ask("GET", "/odd")
        status = "200"
    else:
        monkeypatch.setattr(service.gateway, "resolve", broken)
        answer = service.ask("GET", "/odd") if where == "FastAPI's" else service.upscale(png(photo()))
        is_problem(answer, 500, answer.headers["x-request-id"])
        assert [r.exc_info is not None for r in caplog.records if "a cable" in r.getMessage()] == [True]
        status = "500"
    counted = [labels["status"] for name, _, labels in service.meters.seen if name == "rayscale_requests_total"]
    assert counted == [status]


def test_of_a_header_that_comes_twice_the_first_counts(service: Service) -> None:
    twice = [("Accept", "image/jpeg"), ("Accept", "image/webp")]
    answer = service.ask("POST", "/v1/upscale", content=png(photo()), headers=twice)
    assert answer.headers["content-type"] == "image/jpeg"


def test_requests_are_counted_by_route_model_and_status(service: Service) -> None:
    service.upscale(png(photo(131, 97)))
    service.upscale(b"no picture")
    service.ask("GET", "/nowhere")
    counted = [labels for name, _, labels in service.meters.seen if name == "rayscale_requests_total"]
    assert counted == [
        {"route": "/v1/upscale", "model": "photos", "status": "200"},
        {"route": "/v1/upscale", "model": "photos", "status": "415"},
        {"route": "(none)", "model": "", "status": "404"},
    ]
    batches = service.engine.take_batches()
    assert batches == {(service.release.digest, "CPUExecutionProvider", 1): 9}  # `follower.py` counts them
    assert not service.engine.take_batches()


def lines_of(service: Service, monkeypatch: pytest.MonkeyPatch, form: str, flush_s: float) -> list[str]:
    """What the access log says of an answer, a refusal, a classical method and a look at health."""
    monkeypatch.setenv("RAYSCALE_LOG_FORMAT", form)
    monkeypatch.setattr(access, "FLUSH_S", flush_s)
    written: list[str] = []
    service.gateway.access = AccessLog(written.append)
    app = create_app(service.gateway)

    async def main() -> None:
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Request-Id": "abc"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/v1/upscale", content=png(photo()), headers=trace)).status_code == 200
            await client.post("/v1/upscale", content=b"x", headers={"traceparent": "00-zz-1-01", "X-Request-Id": "d"})
            await client.post("/v1/upscale?method=bicubic", content=png(photo()), headers={"X-Request-Id": "e"})
            await client.get("/readyz")
        if flush_s > 1:  # all of them together
            assert not written
            service.gateway.access.flush()
            assert len(written) == 1
        async with asyncio.timeout(10):
            while "".join(written).count("\n") < 3:
                await asyncio.sleep(0.01)

    with caught_log():
        asyncio.run(main())
    return "".join(written).splitlines()


@contextlib.contextmanager
def caught_log() -> Iterator[None]:
    before = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(before)


def test_every_request_is_a_line_of_the_access_log(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, refused, method = [json.loads(line) for line in lines_of(service, monkeypatch, "json", 60.0)]
    assert datetime.fromisoformat(answered.pop("time")).tzinfo is not None
    assert answered.pop("ms") > 0
    assert re.fullmatch(
        r"decode;dur=[\d.]+, queue;dur=[\d.]+, infer;dur=[\d.]+, encode;dur=[\d.]+", answered.pop("timing")
    )
    assert answered == {
        "level": "INFO", "message": "POST /v1/upscale", "status": 200, "model": "photos:3", "request_id": "abc",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }  # fmt: skip
    assert (refused["status"], refused["request_id"], "trace_id" in refused) == (415, "d", False)
    assert (method["status"], method["model"]) == (200, "classical:bicubic")


def test_the_access_log_can_be_text(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, *_ = lines_of(service, monkeypatch, "text", 0.01)
    assert re.match(
        r"\d\d:\d\d:\d\d INFO    POST /v1/upscale status=200 ms=[\d.]+ model=photos:3 timing=decode", answered
    )
    assert answered.endswith("request_id=abc trace_id=0af7651916cd43dd8448eb211c80319c")


def test_where_the_log_is_quiet_so_is_the_access_log(service: Service) -> None:
    written: list[str] = []
    service.gateway.access = AccessLog(written.append)
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        service.app = create_app(service.gateway)
        service.upscale(png(photo()))
    finally:
        log.setLevel(before)
    service.gateway.access.flush()
    assert not written


def test_what_is_logged_on_the_way_names_its_request(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def broken(*args: object, **kwargs: object) -> None:
        told.append(Json().format(logging.makeLogRecord({"msg": "here", "levelname": "INFO"})))
        raise KeyError

    monkeypatch.setattr(service.gateway, "resolve", broken)
    service.upscale(png(photo()), **{"X-Request-Id": "abc"})
    assert json.loads(told[0])["request_id"] == "abc"
    assert "request_id" not in Json().format(logging.makeLogRecord({"msg": "elsewhere", "levelname": "INFO"}))


def test_a_format_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSCALE_LOG_FORMAT", "yaml")
    with pytest.raises(ConfigError, match="RAYSCALE_LOG_FORMAT=yaml: is no format of log lines; one of text, json"):
        AccessLog()


def test_a_client_that_hangs_up_stops_its_work(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []

    async def slow(*_: object, **__: object) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(service.engine, "run_between", slow)
    messages = [{"type": "http.request", "body": png(photo())}, {"type": "http.disconnect"}]

    async def main() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01 if len(messages) > 1 else 0.3)
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": "/v1/upscale", "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "server": ("t", 80), "root_path": "",
        }  # fmt: skip
        async with asyncio.timeout(5):
            await service.app(scope, receive, send)  # type: ignore[arg-type]
            while not cancelled:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert service.meters.seen[-2][2]["status"] == "499"


def test_the_openapi_page_tells_the_whole_route(service: Service) -> None:
    page = service.ask("GET", "/openapi.json").json()
    route = page["paths"]["/v1/upscale"]["post"]
    assert set(route["responses"]["200"]["content"]) == {"image/png", "image/jpeg", "image/webp", "application/json"}
    assert "X-Rayscale-Digest" in route["responses"]["200"]["headers"]
    assert "image/jpeg" in route["requestBody"]["content"]
    sent = set(is_problem(service.upscale(b""), 422))
    for status in ("404", "406", "413", "415", "422", "503"):
        answer = route["responses"][status]["content"]
        assert list(answer) == ["application/problem+json"]
        example = answer["application/problem+json"]["example"]
        assert set(example) | {"field"} == sent
        assert example["status"] == int(status)
    settings = {"model", "method", "scale", "contrast", "sharpen"}
    assert {p["name"] for p in route["parameters"]} == {*settings, "accept"}
    assert "curl" in page["info"]["description"]
    page = service.ask("GET", "/docs")
    assert page.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) >= 2
    for asset in assets:  # the page loads nothing from elsewhere
        assert asset.startswith("/")
        assert service.ask("GET", asset).status_code == 200


# --- what serving must not import

BLOCKED = ("torch", "rayscale.tasks", "rayscale.recipes", "rayscale.train", "ray.train", "rayscale.data", "mlflow")

FRESH_PROCESS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
            raise ImportError("blocked: " + name)
        return None

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError as error:
    print("control:", error)  # the blocker works

import asyncio, io, json
from pathlib import Path
import httpx, numpy as np
from PIL import Image
import rayscale.serve.app  # the whole of serving, Ray Serve's shell included
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.api import create_app
from rayscale.serve.gateway import Gateway, GatewaySettings
from rayscale.serve.table import Release, Table

folder, digest = sys.argv[1:]
release = Release(name="photos", version=1, digest=digest, uri=folder)

class Routing:
    table = Table(generation=1, routes={{"photos@champion": ((digest, 1.0),)}}, versions={{digest: release}})
    held, watched, reason = {{}}, {{}}, ""

class Meters:
    def add(self, *args, **labels): pass

async def main():
    engine = Engine(EngineSettings())
    engine.prepare(digest, Path(folder))
    app = create_app(Gateway(GatewaySettings(), engine, Routing(), Meters()))
    body = io.BytesIO()
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(body, "PNG")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        response = await client.post("/v1/upscale", content=body.getvalue())
    print("answer:", response.status_code, Image.open(io.BytesIO(response.content)).size)
    print("imported:", [b for b in {blocked!r} if b in sys.modules])

asyncio.run(main())
"""


def test_serving_answers_where_torch_tasks_and_training_are_absent(artifact_folder: Path) -> None:
    from rayscale.artifact import digest_of

    source = Path(__file__).parents[2] / "platform"
    program = f"import sys; sys.path.insert(0, {str(source)!r})\n" + FRESH_PROCESS.format(blocked=BLOCKED)
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact_folder), digest_of(artifact_folder)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["control: blocked: torch", "answer: 200 (40, 60)", "imported: []"]
