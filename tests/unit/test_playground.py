"""The page's files: served whole, kept to themselves by their headers, and nothing in them from elsewhere."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from rayscale.serve import playground

FOLDER = Path(playground.__file__).parent
FILES = sorted(f for f in FOLDER.iterdir() if f.suffix in (".html", ".js", ".css", ".svg"))


class Client:
    def __init__(self, app: FastAPI) -> None:
        self._transport = httpx.ASGITransport(app)

    def get(self, path: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def main() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://test") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(main())


@pytest.fixture(scope="module")
def client() -> Client:
    app = FastAPI()
    playground.install(app)
    return Client(app)


class Page(HTMLParser):
    """Its elements as (tag, attributes)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    page = Page()
    page.feed((FOLDER / "index.html").read_text())
    return page.elements


def test_every_file_is_served_with_the_strict_policy(client: Client) -> None:
    for file in FILES:
        path = "/" if file.name == "index.html" else f"/playground/{file.name}"
        answer = client.get(path)
        assert answer.content == file.read_bytes()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get(path, "HEAD").status_code == 200
    assert client.get("/playground/nothing.js").status_code == 404
    assert client.get("/openapi.json").json()["paths"] == {}


def test_an_unchanged_file_is_not_sent_again(client: Client) -> None:
    etag = client.get("/").headers["etag"]
    again = client.get("/", **{"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", **{"If-None-Match": '"other"'}).status_code == 200


def test_the_page_works_under_its_policy(client: Client, elements: list[tuple[str, dict[str, str | None]]]) -> None:
    """No inline script or style, and what it names is there, below whatever prefix it is served at."""
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag != "style"
        named = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
        if tag == "script":
            assert named
        if named:
            assert client.get(f"/{named}").status_code == 200
    for file in FILES:
        text = re.sub(r'xmlns="[^"]*"', "", file.read_text())
        assert not re.search(r"https?://|@import|innerHTML *=|insertAdjacentHTML|\beval\(", text), file.name


def test_every_control_has_a_name_and_every_reference_a_target(
    elements: list[tuple[str, dict[str, str | None]]],
) -> None:
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) in (None, *ids)
    assert [a.get("lang") for t, a in elements if t == "html"] == ["en"]
    assert all("alt" in a for t, a in elements if t == "img")


def test_every_route_that_takes_a_body_has_its_task(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    from rayscale.serve.routes_models import ROLES

    tasks = {(attributes.get("href") or "")[1:] for tag, attributes in elements if tag == "a"}
    assert {*ROLES} - {"embed"} <= tasks  # vectors are for programs; pictures are compared by them


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix == ".js"], ids=lambda f: f.name)
def test_the_scripts_parse(file: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to parse with")
    done = subprocess.run(
        [node, "--input-type=module", "--check"], input=file.read_text(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
