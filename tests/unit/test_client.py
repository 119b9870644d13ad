"""The client over real connections: answers, typed errors, retries within a deadline, and load by a clock."""

from __future__ import annotations

import asyncio
import base64
import json
import runpy
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayscale import errors
from rayscale.client import AsyncClient, Client, Picture
from rayscale.client.exchange import Patience, Send, Sleep, exchange, retry_after_s
from rayscale.client.load import NOT_SENT, TIMED_OUT, Shot, arrivals, fire, spread_ms, summary
from rayscale.errors import (
    ConfigError,
    ImageError,
    IntegrityError,
    MissingError,
    RayscaleError,
    TooLargeError,
    UnavailableError,
    UserError,
)

scripted = runpy.run_path(str(Path(__file__).parents[1] / "scripted_server.py"))
Say, problem, MADE_BY = scripted["Say"], scripted["problem"], scripted["MADE_BY"]
BUSY = "engine=backlog 9 s: this request would miss its deadline; try again later"


@pytest.fixture
def server() -> Iterator[Any]:
    server = scripted["ScriptedServer"]()
    yield server
    server.close()


class Threaded:
    """`AsyncClient` behind the calls of `Client`: both pass the same tests."""

    def __init__(self, url: str, **options: Any) -> None:
        self._made = url, options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def ask(*args: Any, **kwargs: Any) -> Any:
            async with AsyncClient(self._made[0], **self._made[1]) as client:
                return await getattr(client, name)(*args, **kwargs)

        return lambda *args, **kwargs: asyncio.run(ask(*args, **kwargs))


@pytest.fixture(params=[Client, Threaded], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- what is sent and what comes back


def test_a_picture_comes_back_with_who_made_it(connect: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(b"the file")
    answer = connect(server.url + "/", key="secret", headers={"Traceparent": "00-1-2-01"}).upscale(
        tmp_path / "in.png", model="photos@champion", media="webp"
    )
    (asked,) = server.asked
    assert (asked.method, asked.path, asked.query) == ("POST", "/v1/upscale", {"model": "photos@champion"})
    assert asked.body == b"the file"
    assert asked.headers["authorization"] == "Bearer secret"
    assert asked.headers["traceparent"] == "00-1-2-01"
    assert asked.headers["accept"] == "image/webp"
    assert (answer.data, answer.media_type) == (b"\x89PNG of it", "image/png")
    assert (answer.model, answer.version, answer.digest) == ("photos", 3, "d" * 64)
    assert (answer.tiling, answer.bits) == ("tiled 9", 16)
    assert (answer.provider, answer.request_id) == ("CPUExecutionProvider", "r1")
    assert answer.timing_ms == {"decode": 1.5, "infer": 20.25}
    assert answer.attempts == 1
    answer.save(tmp_path / "new" / "out.png")
    assert (tmp_path / "new/out.png").read_bytes() == answer.data
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.png"]


def parts(asked: Any) -> list[tuple[str, bytes]]:
    """Of a form, in their order."""
    boundary = asked.headers["content-type"].partition("boundary=")[2].encode()
    found = [part.partition(b"\r\n\r\n") for part in asked.body.split(b"--" + boundary)[1:-1]]
    return [(head.split(b'name="')[1].split(b'"')[0].decode(), body.removesuffix(b"\r\n")) for head, _, body in found]


def as_json(value: Any, **headers: str) -> Any:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Say(body=json.dumps(value).encode(), headers={**MADE_BY, "Content-Type": "application/json", **named})


def test_pixels_travel_as_png(connect: Any, server: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    mask = np.where(pixels[:, :, 0] > 99, 255, 0).astype(np.uint8)
    server.default.body = bytes(cv2.imencode(".png", pixels[:, :, ::-1])[1])
    answer = connect(server.url).restore(pixels, mask)
    np.testing.assert_array_equal(answer.pixels, pixels)
    sent = dict(parts(server.asked[0]))
    assert set(sent) == {"image", "mask"}
    decoded = {k: cv2.imdecode(np.frombuffer(v, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1] for k, v in sent.items()}
    np.testing.assert_array_equal(decoded["image"], pixels)
    np.testing.assert_array_equal(decoded["mask"], np.repeat(mask[:, :, None], 3, axis=2))
    with pytest.raises(ConfigError, match=r"float64\[9, 7, 3\]"):
        connect(server.url).upscale(pixels / 255)
    with pytest.raises(MissingError, match="nowhere"):
        connect(server.url).upscale("nowhere.png")
    assert len(server.asked) == 1


def test_parameters_travel_and_defaults_do_not(connect: Any, server: Any) -> None:
    client = connect(server.url)
    client.upscale(b"x", scale=3, method="lanczos", contrast=1.1, sharpen=0.5)
    client.restore(b"x", model="m:2", method=None, contrast=1.0)
    client.burst([b"x", b"y"], method="shift_and_add", scale=2, media="jpeg")
    assert [asked.query for asked in server.asked] == [
        {"scale": "3", "method": "lanczos", "contrast": "1.1", "sharpen": "0.5"},
        {"model": "m:2"},
        {"method": "shift_and_add", "scale": "2"},
    ]
    burst = server.asked[2]
    assert (burst.path, burst.headers["accept"]) == ("/v1/burst", "image/jpeg")
    assert parts(burst) == [("image", b"x"), ("image", b"y")]


def test_a_parameter_that_does_not_exist_is_told_before_anything_is_sent(connect: Any, server: Any) -> None:
    client = connect(server.url)
    for ask in (
        lambda: client.upscale(b"x", no_such=1),
        lambda: client.restore(b"x", scale=2),
        lambda: client.generate(klass="rose"),
        lambda: client.embed(b"x", measure=["psnr"]),
        lambda: connect(server.url, keyy="secret").models(),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            ask()
    for wrong in (b"x", "a.png", Path("a.png")):
        with pytest.raises(ConfigError, match=r"^frames=\w+: must be a list, this is one"):
            client.burst(wrong)
    for none, named in ((client.embeddings, "images"), (client.similarities, "pairs"), (client.burst, "frames")):
        with pytest.raises(ConfigError, match=rf"^{named}=\(none\): must be at least one"):
            none([])
    with pytest.raises(ConfigError, match=r"^n=0: must be at least 1"):
        client.generate(n=0)
    with pytest.raises(ConfigError, match=r"^media=gif: must be png, jpeg or webp"):
        client.upscale(b"x", media="gif")
    with pytest.raises(ConfigError, match=r"^name=\(none\): must name a model"):
        client.model("")
    assert server.asked == []


def test_pictures_of_a_seed(connect: Any, server: Any) -> None:
    png = bytes(cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1])
    data = [{"b64_json": base64.b64encode(png).decode(), "index": i} for i in (4, 5)]
    server.script = [as_json({"created": 1, "data": data}, X_Rayscale_Seed="7"), Say(body=png, headers=MADE_BY),
                     Say(body=png, headers={**MADE_BY, "X-Rayscale-Seed": "9007199254740991"})]  # fmt: skip
    client = connect(server.url)
    two = client.generate(model="faces", seed=7, n=2, first=4, class_name="rose", truncation=0.5, media="webp")
    assert [(p.data, p.media_type, p.seed, p.index) for p in two] == [
        (png, "image/png", 7, 4), (png, "image/png", 7, 5)]  # fmt: skip
    assert json.loads(server.asked[0].body) == {
        "model": "faces",
        "seed": 7,
        "n": 2,
        "first": 4,
        "class": "rose",
        "truncation": 0.5,
        "output_format": "webp",
    }
    assert server.asked[0].headers["accept"] == "application/json"
    (one,) = client.generate(seed=1)
    assert (one.data, one.seed, one.index) == (png, 1, 0)
    assert json.loads(server.asked[1].body) == {"seed": 1}
    (drawn,) = client.generate()
    assert drawn.seed == 2**53 - 1, "what the server drew"
    assert json.loads(server.asked[2].body) == {}
    with pytest.raises(IntegrityError, match="does not tell its seed"):
        client.generate()


def test_vectors_and_comparisons(connect: Any, server: Any) -> None:
    server.script = [
        as_json({"data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8], "style": [1]}]}),
        as_json({"data": [{"index": 0, "embedding": [1, 0]}, {"index": 1, "embedding": [0, 1]}]}),
        as_json({"data": [{"index": 0, "ssim": 0.5, "psnr": None}]}),
        as_json({"data": [{"index": 0, "mse": 0.0}, {"index": 1, "mse": 4.5}]}),
    ]
    client = connect(server.url)
    one = client.embed(b"x", model="e", side_px=64)
    np.testing.assert_array_equal(one.vector, np.array([0.6, 0.8], np.float32))
    np.testing.assert_array_equal(one.others["style"], np.array([1], np.float32))
    assert (server.asked[0].query, server.asked[0].body) == ({"model": "e", "side_px": "64"}, b"x")
    several = client.embeddings([b"x", b"y"], model="e")
    np.testing.assert_array_equal([e.vector for e in several], np.eye(2, dtype=np.float32))
    assert [(e.model, e.version, e.request_id) for e in several] == [("photos", 3, "r1")] * 2
    assert parts(server.asked[1]) == [("image", b"x"), ("image", b"y")]

    assert client.similarity(b"a", b"b", measure=["ssim", "psnr"]).measures == {"ssim": 0.5, "psnr": None}
    assert parts(server.asked[2]) == [("a", b"a"), ("b", b"b")]
    pairs = client.similarities([(b"a", b"b"), (b"c", b"d")], measure=["mse"])
    assert [pair.measures for pair in pairs] == [{"mse": 0.0}, {"mse": 4.5}]
    assert server.asked[3].query == {"measure": "mse"}
    coded = {letter: base64.b64encode(letter.encode()).decode() for letter in "abcd"}
    assert json.loads(server.asked[3].body) == {
        "pairs": [{"a": coded["a"], "b": coded["b"]}, {"a": coded["c"], "b": coded["d"]}]}  # fmt: skip
    assert [a.path for a in server.asked] == ["/v1/embed"] * 2 + ["/v1/similarity"] * 2


def test_answers_of_another_length_are_told(connect: Any, server: Any) -> None:
    server.default = as_json({"data": [{"index": 0, "embedding": [1], "b64_json": "", "mse": 0.0}] * 2})
    client = connect(server.url)
    for ask in (
        lambda: client.embed(b"x"),
        lambda: client.embeddings([b"x"] * 3),
        lambda: client.similarity(b"a", b"b"),
        lambda: client.similarities([(b"a", b"b")]),
        lambda: client.generate(seed=1, n=3),
    ):
        with pytest.raises(IntegrityError, match=r"holds 2 results, [13] were asked for"):
            ask()
    assert len(client.embeddings([b"x"] * 2)) == 2  # negative control


def test_models_and_what_a_newer_server_says_of_them(connect: Any, server: Any) -> None:
    info = {"name": "a", "version": 3, "aliases": ["champion"], "digest": "d", "ready": True, "scale": 2, "newer": 1}
    held = {"b@x": "why"}
    server.script = [
        as_json({"generation": 4, "defaults": {"upscale": "a@champion"}, "held": held, "newer": 1, "models": [info]}),
        as_json({"name": "a", "routes": {"champion": {"a:3": 1.0}}, "held": {}, "newer": 1,
                 "versions": [{**info, "provider": "CPUExecutionProvider", "card": {"family": "compact"}}]}),
        as_json({"name": "a", "routes": {}, "held": {}, "versions": [{"version": 3}]}),
        problem(404, "missing", "model=a b/c: is not served here; did you mean 'a'?"),
    ]  # fmt: skip
    client = connect(server.url)
    found = client.models()
    assert (found.generation, found.defaults, found.held) == (4, {"upscale": "a@champion"}, held)
    assert (found.default, found.watched) == (None, {}), "an older server says nothing of them"
    assert (found.models[0].name, found.models[0].aliases, found.models[0].scale) == ("a", ("champion",), 2)
    one = client.model("a@champion")
    assert one.routes == {"champion": {"a:3": 1.0}}
    assert (one.versions[0].aliases, one.versions[0].provider) == (("champion",), "CPUExecutionProvider")
    assert one.versions[0].card == {"family": "compact"}
    with pytest.raises(IntegrityError, match=r"is no model \(.*'name'"):
        client.model("a:3")
    with pytest.raises(MissingError, match="did you mean 'a'"):
        client.model("a b/c")
    assert [(a.method, a.path) for a in server.asked] == [
        ("GET", "/v1/models"), ("GET", "/v1/models/a@champion"), ("GET", "/v1/models/a:3"),
        ("GET", "/v1/models/a%20b%2Fc")]  # fmt: skip


def test_the_readmes_lines_work(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = textwrap.dedent(readme[readme.index("   from rayscale.client") :].partition("   ```")[0])
    assert "http://127.0.0.1:8000" in block
    (tmp_path / "small.png").write_bytes(b"small")
    monkeypatch.chdir(tmp_path)
    exec(block.replace("http://127.0.0.1:8000", server.url), {})
    assert (tmp_path / "large.png").read_bytes() == server.default.body


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", ""])
def test_a_url_that_is_none_is_told_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="url="):
        Client(url)


# --- errors


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (413, "too-large", TooLargeError),
        (422, "image", ImageError),
        (404, "missing", MissingError),
        (422, "validation", ConfigError),
        (500, "internal", RayscaleError),
        (409, "of-a-newer-server", errors.ConflictError),
        (418, "of-a-newer-server", UserError),
    ],
)
def test_the_servers_error_is_raised_with_its_line(
    connect: Any, server: Any, status: int, kind: str, expected: type[RayscaleError]
) -> None:
    line = "image=4x4: rule: with a colon; and a semicolon; the remedy"
    server.default = problem(status, kind, line, X_Request_Id="r7")
    with pytest.raises(RayscaleError) as caught:
        connect(server.url).upscale(b"x")
    assert type(caught.value) is expected
    assert str(caught.value) == line
    assert caught.value.field == "image"
    cause = caught.value.__cause__
    assert isinstance(cause, httpx.HTTPStatusError)
    assert (cause.response.status_code, cause.response.headers["x-request-id"]) == (status, "r7")
    assert len(server.asked) == 1, "what is wrong is not sent again"


def test_a_line_without_a_field_stays_whole(server: Any) -> None:
    server.default = problem(404, "not-found", "there is nothing at /v1/upscale; the routes are at /docs")
    with pytest.raises(MissingError, match=r"^server=404: there is nothing at /v1/upscale; the routes are at /docs$"):
        Client(server.url).upscale(b"x")
    server.default = Say(status=405, body=b"<html>", headers={"Content-Type": "text/html"})
    with pytest.raises(UserError, match=r"^server=405: Method Not Allowed; ask whoever runs the server$"):
        Client(server.url).upscale(b"x")


@pytest.mark.parametrize("route", ["upscale", "embed", "models"])
def test_an_answer_of_another_server_is_told(connect: Any, server: Any, route: str) -> None:
    server.default = Say(body=b"<html>hello", headers={"Content-Type": "text/html"})
    with pytest.raises(IntegrityError, match="is this a rayscale server"):
        getattr(connect(server.url), route)(*([] if route == "models" else [b"x"]))


def test_headers_that_hold_no_number_are_left_out(connect: Any, server: Any) -> None:
    odd = {"Server-Timing": "cdn;dur=., a;dur=1.2.3, b;dur=1e9, c;dur=7, d;dur=0.5", "X-Rayscale-Model": "photos:²",
           "X-Rayscale-Bits": "³"}  # fmt: skip
    server.default = Say(headers={**MADE_BY, **odd})
    answer = connect(server.url).upscale(b"x")
    assert answer.timing_ms == {"c": 7.0, "d": 0.5}
    assert (answer.model, answer.version, answer.bits) == ("photos:²", None, None)


@pytest.mark.parametrize("body", [b"not json", b"[" * 100_000], ids=["text", "deep"])
def test_json_that_is_none_is_told(connect: Any, server: Any, body: bytes) -> None:
    as_said = {"Content-Type": "application/json"}
    server.script = [Say(body=body, headers=as_said), Say(status=404, body=body, headers=as_said)]
    with pytest.raises(IntegrityError, match="is no JSON object"):
        connect(server.url).models()
    with pytest.raises(MissingError, match=r"^server=404: Not Found; "):
        connect(server.url).models()


# --- retries


@pytest.mark.parametrize(
    "trouble",
    [
        problem(503, "busy", BUSY, Retry_After="0"),
        problem(429, "too-many-requests", "key=k: 5/s are allowed; slow down", Retry_After="0"),
        Say(status=502, body=b"Bad Gateway"),
        Say(then="drop"),
        Say(then="cut"),
        Say(body=b"no gzip", headers={**MADE_BY, "Content-Encoding": "gzip"}),
    ],
    ids=["503", "429", "502", "drop", "cut", "damaged"],
)
def test_what_passes_is_tried_again(connect: Any, server: Any, trouble: Any) -> None:
    server.script = [trouble] * (2 if trouble.headers else 1)
    tries = len(server.script) + 1
    answer = connect(server.url).upscale(b"the same body")
    assert answer.attempts == tries
    assert answer.data == b"\x89PNG of it"
    assert [asked.body for asked in server.asked] == [b"the same body"] * tries


def test_an_answer_that_stays_damaged_is_our_own_error(connect: Any, server: Any) -> None:
    server.default = Say(body=b"no gzip", headers={**MADE_BY, "Content-Encoding": "gzip"})
    with pytest.raises(UnavailableError, match=r"^url=\S+/v1/upscale: the answer is damaged \(.*\); check the address"):
        connect(server.url, retries=0).upscale(b"x")


def test_a_server_that_starts_late_is_reached(connect: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    servers: list[Any] = []

    async def late() -> Picture:
        async with AsyncClient(f"http://127.0.0.1:{port}") as client:
            asking = asyncio.create_task(client.upscale(b"x"))
            await asyncio.sleep(0.1)
            servers.append(scripted["ScriptedServer"](port))
            return await asking

    assert asyncio.run(late()).attempts > 1
    servers[0].close()
    with pytest.raises(UnavailableError, match="check the address") as refused:
        connect(f"http://user:pw@127.0.0.1:{port}", retries=0).upscale(b"x")
    assert "pw" not in str(refused.value)


def test_retry_after_is_honoured_on_the_wire(server: Any) -> None:
    server.script = [problem(503, "busy", BUSY, Retry_After="1")]
    Client(server.url).upscale(b"x")
    first, second = server.asked
    assert second.at_s - first.at_s >= 1.0


@pytest.mark.parametrize("then", ["", "drip"])
def test_a_slow_answer_ends_with_the_deadline(connect: Any, server: Any, then: str) -> None:
    slow = Say(body=b"." * 100, headers=MADE_BY, after_s=0.0 if then else 1.0, then=then)
    server.script = [slow]
    with pytest.raises(UnavailableError, match=r"no answer within 0.2 s"):
        connect(server.url, timeout_s=0.2).upscale(b"x")
    assert len(server.asked) == 1
    server.script = [Say(headers=MADE_BY, after_s=0.1)]  # negative control: slow, and in time
    assert connect(server.url, timeout_s=5.0).upscale(b"x").attempts == 1


def play(outcomes: list[httpx.Response], patience: Patience, draw: float) -> tuple[list[float], Any]:
    """(waits, result or error) of an exchange with these outcomes, each of which takes 10 ms, on a clock of its own."""
    now = [100.0]
    talk = exchange(patience, clock=lambda: now[0], draw=lambda: draw)
    waits, left = [], list(outcomes)
    step = next(talk)
    try:
        while True:
            if isinstance(step, Sleep):
                waits.append(step.seconds)
                now[0] += step.seconds
                step = talk.send(None)
            else:
                assert isinstance(step, Send)
                assert 0 < step.timeout_s <= patience.timeout_s + 1e-9
                now[0] += 0.01
                step = talk.send(left.pop(0))
    except StopIteration as done:
        return waits, done.value
    except RayscaleError as error:
        return waits, error


def busy(after: str | None = None) -> httpx.Response:
    headers = {} if after is None else {"Retry-After": after}
    return httpx.Response(503, headers=headers, request=httpx.Request("POST", "http://h/v1/upscale"))


GOOD = httpx.Response(200)


@given(after_s=st.integers(0, 300), timeout_s=st.floats(0.5, 400), draw=st.floats(0, 1), refusals=st.integers(1, 12))
def test_every_wait_is_at_least_what_the_server_asks_and_ends_before_the_deadline(
    after_s: int, timeout_s: float, draw: float, refusals: int
) -> None:
    patience = Patience(timeout_s=timeout_s)
    waits, end = play([*[busy(str(after_s))] * refusals, GOOD], patience, draw)
    assert all(after_s <= wait <= 1.1 * after_s + 0.05 for wait in waits)
    assert sum(waits) < timeout_s
    if isinstance(end, UnavailableError):  # no time, or no try, was left for another
        assert len(waits) == patience.retries or sum(waits) + after_s + 0.01 * len(waits) >= 0.85 * timeout_s - 0.1
    else:
        assert end[1].attempts == refusals + 1 == len(waits) + 1


def test_without_a_word_from_the_server_waits_double_up_to_a_bound() -> None:
    waits, end = play([busy()] * 11, Patience(timeout_s=1e6), 1.0)
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert isinstance(end, UnavailableError)
    apart = {tuple(play([busy(), GOOD], Patience(), draw / 10)[0]) for draw in range(10)}
    assert len(apart) == 10, "many clients do not come back at once"


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("7", 0.0) == 7.0
    assert retry_after_s(" 1.5 ", 0.0) == 1.5
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 50.0) == 10.0
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 500.0) == 0.0
    beyond = "Thu, 01 Jan 1970 00:01:99999999990 GMT", "Thu, 01 Jan 19999999999999999999990 00:01:00 GMT"
    for nothing in ("", "soon", "-1", "nan", *beyond):
        assert retry_after_s(nothing, 0.0) is None


# --- open-loop load


def load(server: Any, due: list[float], **options: Any) -> list[Shot]:
    from rayscale.client import calls

    async def main() -> list[Shot]:
        async with AsyncClient(server.url, retries=0, timeout_s=options.pop("timeout_s", 10.0)) as client:
            return await fire(client, [calls.upscale(b"a"), calls.upscale(b"b")], due,
                              **options)  # fmt: skip

    return asyncio.run(main())


def test_requests_leave_by_the_clock_whether_or_not_others_are_answered(server: Any) -> None:
    """Two answers wait until all requests have come: a load that waited for them would never send the others."""
    server.script = [Say(headers=MADE_BY), *[Say(headers=MADE_BY, until_asked=8)] * 2]
    shots = load(server, [0.02 * i for i in range(8)])
    found = summary(shots)
    assert (found["sent"], found["answered"], found["errors"]) == (8, 8, {})
    assert sorted(asked.body for asked in server.asked) == [b"a"] * 4 + [b"b"] * 4
    assert all(shot.sent_s >= shot.due_s for shot in shots)
    assert found["models"] == {"photos:3": 8}


def test_a_latency_counts_from_when_a_request_was_due() -> None:
    shots = [
        Shot(due_s=0.0, sent_s=0.001, done_s=0.1),
        Shot(due_s=1.0, sent_s=3.0, done_s=3.5, model="a:1"),
        Shot(due_s=2.0, sent_s=2.0, done_s=9.0, error="503 busy"),
        Shot(due_s=3.0, sent_s=3.0, done_s=3.6, model="a:1"),
    ]
    found = summary(shots)
    assert found["latency_ms"] == {"p50": 600, "p90": 2500, "p95": 2500, "p99": 2500, "max": 2500}
    assert found["sent_late_ms"]["max"] == 2000
    assert found["longest_gap_ms"] == 3400
    assert (found["answered"], found["errors"], found["models"]) == (3, {"503 busy": 1}, {"a:1": 2})


def test_errors_are_counted_by_kind_and_not_tried_again(server: Any) -> None:
    server.script = [
        problem(503, "busy", BUSY, Retry_After="0"),
        Say(then="drop"),
        Say(status=502, body=b"Bad Gateway"),
        Say(headers=MADE_BY, after_s=1.5),
        problem(503, "busy", BUSY, Retry_After="0"),
    ]
    shots = load(server, [0.15 * i for i in range(6)], timeout_s=1.0)
    assert [shot.error for shot in shots] == ["503 busy", "RemoteProtocolError", "502", TIMED_OUT, "503 busy", ""]
    assert summary(shots)["errors"] == {"503 busy": 2, "RemoteProtocolError": 1, "502": 1, TIMED_OUT: 1}
    assert shots[0].line == BUSY
    assert len(server.asked) == 6


def test_odd_answers_do_not_end_a_load(server: Any) -> None:
    from rayscale.client import calls

    def surprised(*_: object) -> None:
        raise KeyError("nobody thought of it")

    server.script = [
        Say(status=503, body=b"not json", headers={"Content-Type": "application/json"}),
        Say(body=b"no gzip", headers={**MADE_BY, "Content-Encoding": "gzip"}),
    ]

    async def main() -> list[Shot]:
        asked = [calls.upscale(b"a"), calls.upscale(b"b"), calls.Call(path="/", read=surprised), calls.upscale(b"c")]
        async with AsyncClient(server.url, retries=0) as client:
            return await fire(client, asked, [0.0, 0.15, 0.3, 0.45])

    shots = asyncio.run(main())
    assert [shot.error for shot in shots] == ["503", "DecodingError", "KeyError", ""]


def test_what_is_beyond_the_bound_is_not_sent_and_counts(server: Any) -> None:
    server.default = Say(headers=MADE_BY, after_s=0.5)
    shots = load(server, [0.01 * i for i in range(8)], max_in_flight=3)
    assert summary(shots)["errors"] == {NOT_SENT: 5}
    assert len(server.asked) == 3


@given(rate=st.floats(0.5, 500), seconds=st.floats(0.1, 4), seed=st.none() | st.integers(0, 2**32))
def test_arrivals_are_in_order_and_as_many_as_the_rate_says(rate: float, seconds: float, seed: int | None) -> None:
    due = arrivals(rate, seconds, seed)
    assert due == sorted(due)
    assert all(0 <= t < seconds for t in due)
    assert due == arrivals(rate, seconds, seed)
    expected = rate * seconds
    assert abs(len(due) - expected) <= (1 if seed is None else 8 * expected**0.5 + 8)


def test_percentiles_are_values_that_occurred() -> None:
    assert spread_ms([]) == {}
    assert spread_ms([0.001 * i for i in range(1, 101)]) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert spread_ms([0.002]) == dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 2.0)
