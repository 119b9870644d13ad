"""Bearer keys: hashed, limited by rate and by how many at once, and never in an error."""

from __future__ import annotations

import asyncio
import hashlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayscale.errors import ConfigError, MissingError
from rayscale.serve import keys
from rayscale.serve.keys import Guard, Key, load, parse

TESTS = Path(__file__).parents[1]
small, served = runpy.run_path(str(TESTS / "small_onnx.py")), runpy.run_path(str(TESTS / "service.py"))
photo, png, is_problem = served["photo"], served["png"], served["is_problem"]
SECRET, OTHER = "correct-horse", "battery-staple"


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def key(**limits: Any) -> Key:
    return Key(name="app", sha256=hashed(SECRET), **limits)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    digest = small["write"](tmp_path / "a")
    service = served["Service"](tmp_path / "a", digest, keys=(key(), Key(name="x", sha256=hashed(OTHER), per_s=0.001)))
    yield service
    service.gateway.close()


def bearer(secret: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {secret}"}


def test_lines_are_keys() -> None:
    text = f"# who\n\napp {hashed(SECRET)}  # a comment\nslow {hashed(OTHER)} per_s=0.5 at_once=2\n"
    assert parse(text) == (key(), Key(name="slow", sha256=hashed(OTHER), per_s=0.5, at_once=2))


@pytest.mark.parametrize(
    "line",
    [
        "app", "app topsecret", f"app {hashed(SECRET).upper()}", f"app {hashed(SECRET)} rate=1",
        f"app {hashed(SECRET)} per_s=x", f"app {hashed(SECRET)} per_s=-1", f"app {hashed(SECRET)} per_s=nan",
        f"app {hashed(SECRET)} at_once=1.5",
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_and_not_shown(line: str) -> None:
    with pytest.raises(ConfigError, match="line 2") as error:
        parse(f"# keys\n{line}")
    assert "topsecret" not in str(error.value)


def test_names_and_hashes_differ() -> None:
    for line in (f"app {hashed(OTHER)}", f"b {hashed(SECRET)}"):
        with pytest.raises(ConfigError, match="must differ"):
            parse(f"app {hashed(SECRET)}\n{line}")


def test_keys_are_read_by_uri_or_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    assert load("") == ()
    monkeypatch.setenv(keys.ENVIRONMENT, f"app {hashed(SECRET)}")
    assert load("") == (key(),)
    (tmp_path / "keys.txt").write_text(f"slow {hashed(OTHER)}\n")
    assert [k.name for k in load(str(tmp_path / "keys.txt"))] == ["slow"]
    (tmp_path / "empty.txt").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="names no key"):  # not: everyone
        load(str(tmp_path / "empty.txt"))
    with pytest.raises(MissingError):
        load(str(tmp_path / "gone.txt"))


def test_only_a_known_key_is_answered(service: Any) -> None:
    body = png(photo())
    assert service.upscale(body, **bearer(SECRET)).status_code == 200
    assert service.upscale(body, **bearer(SECRET, "bearer")).status_code == 200
    for headers in ({}, bearer("wrong-horse"), bearer(SECRET, "Basic"), bearer(hashed(SECRET)), bearer("")):
        response = service.upscale(body, **headers)
        is_problem(response, 401, "Bearer")
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert "wrong-horse" not in response.text
    is_problem(service.ask("GET", "/v1/models"), 401)
    for path in ("/livez", "/readyz", "/openapi.json", "/docs"):
        assert service.ask("GET", path).status_code == 200
    page = service.ask("GET", "/openapi.json").json()
    assert page["paths"]["/v1/upscale"]["post"]["security"]
    assert "security" not in page["paths"]["/livez"]["get"]
    statuses = [labels["status"] for name, _, labels in service.meters.seen if name == "rayscale_requests_total"]
    assert statuses.count("401") == 6


def test_behind_a_route_prefix_keys_are_asked_for_as_well(service: Any) -> None:
    """Ray Serve tells the prefix of an application as `root_path` and leaves it in the path."""

    async def main() -> list[int]:
        transport = httpx.ASGITransport(service.app, root_path="/photos")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = png(photo())
            answers = [
                await client.post("/photos/v1/upscale", content=body),
                await client.get("/photos/v1/models"),
                await client.post("/v1/upscale", content=body),  # as a proxy in front may have it
                await client.post("/photos/v1/upscale", content=body, headers=bearer(SECRET)),
                await client.get("/photos/livez"),
                await client.get("/photosv1/upscale"),
            ]
            return [answer.status_code for answer in answers]

    assert asyncio.run(main()) == [401, 401, 401, 200, 200, 404]


def test_a_key_over_its_rate_is_told_when_to_come_back(service: Any) -> None:
    assert service.upscale(png(photo()), **bearer(OTHER)).status_code == 200
    response = service.upscale(png(photo()), **bearer(OTHER))
    is_problem(response, 429, "key=x", "0.001 requests a second")
    assert 900 < int(response.headers["retry-after"]) <= 1000
    assert service.upscale(png(photo()), **bearer(SECRET)).status_code == 200  # another key's limit is not its own


class Server:
    """A guard over an application that answers when it is told to, and a clock."""

    def __init__(self, key: Key) -> None:
        self.now, self.open = 0.0, asyncio.Event()
        self.guard = Guard(self.app, [key], lambda: self.now)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(self) -> tuple[int, int]:
        """Status and Retry-After."""
        found: list[Any] = []
        scope = {"type": "http", "path": "/v1/x", "headers": [(b"authorization", f"Bearer {SECRET}".encode())]}

        async def send(message: Any) -> None:
            found.append(message)

        await self.guard(scope | {"method": "GET", "server": ("t", 80), "scheme": "http", "query_string": b""},
                         None, send)  # type: ignore[arg-type]  # fmt: skip
        headers = dict(found[0]["headers"])
        return found[0]["status"], int(headers.get(b"retry-after", 0))


def test_the_rate_is_an_average_with_a_burst() -> None:
    async def main() -> None:
        server = Server(key(per_s=2.0))
        server.open.set()
        assert [await server.ask() for _ in range(3)] == [(200, 0), (200, 0), (429, 1)]
        server.now = 0.5  # one more has grown
        assert [(await server.ask())[0] for _ in range(2)] == [200, 429]
        server.now = 100.0  # no more than the burst is saved
        assert [(await server.ask())[0] for _ in range(3)] == [200, 200, 429]

    asyncio.run(main())


def test_so_many_at_once_and_the_place_is_given_back() -> None:
    async def main() -> None:
        server = Server(key(at_once=2))
        running = [asyncio.create_task(server.ask()) for _ in range(2)]
        await asyncio.sleep(0)
        assert await server.ask() == (429, 1)
        running[0].cancel()  # a client that hung up
        await asyncio.sleep(0)
        third = asyncio.create_task(server.ask())
        await asyncio.sleep(0)
        assert await server.ask() == (429, 1)
        server.open.set()
        assert await running[1] == await third == (200, 0)
        assert (await server.ask())[0] == 200

    asyncio.run(main())
