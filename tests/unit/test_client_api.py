"""The client says what the HTTP API says: routes, parts, parameters, types, defaults, choices, answers' fields."""

from __future__ import annotations

import copy
import inspect
import runpy
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import pytest

from rayscale import artifact
from rayscale.client import AsyncClient, Client, answers, calls

ROOT = Path(__file__).parents[2]
small, service = (runpy.run_path(str(ROOT / f"tests/{name}.py")) for name in ("small_onnx", "service"))

BUILT = {  # every call, with all that it can carry
    calls.upscale: (b"x",),
    calls.restore: (b"x", b"m"),
    calls.burst: ([b"x", b"y"],),
    calls.generate: (),
    calls.embed: (b"x",),
    calls.embeddings: ([b"x", b"y"],),
    calls.similarity: (b"x", b"y"),
    calls.similarities: ([(b"x", b"y")],),
    calls.models: (),
    calls.model: ("{name}",),
}
ANSWERS = {
    "ModelList": answers.Models,
    "ModelInfo": answers.ModelInfo,
    "ModelDetail": answers.ModelDetail,
    "Version": answers.ModelVersion,
}
ELSEWHERE = {"class_name": "class", "media": "output_format"}  # a word of Python's; for one picture the Accept header
BARE = "type", "enum", "items", "anyOf", "additionalProperties"  # of a schema: not its bounds and texts
JSON = "application/json"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("artifact") / "photos"
    small["write"](folder)
    made = service["Service"](folder, artifact.digest_of(folder))
    yield made.app.openapi()
    made.gateway.close()


def bare(schema: Any) -> Any:
    """What type a JSON schema stands for."""
    if isinstance(schema, list):
        return [bare(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: bare(schema[name]) for name in BARE if name in schema} or "(another)"


def of_client(build: Any) -> dict[str, Any]:
    """{parameter: (type, default)} of what is no picture."""
    hints = typing.get_type_hints(build)
    keywords = [p for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: (bare(pydantic.TypeAdapter(hints[p.name]).json_schema()), p.default) for p in keywords}


def of_page(operation: Mapping[str, Any]) -> dict[str, Any]:
    """The same, and what stands for it in the body of a request that is no picture."""
    schemas = {p["name"]: p["schema"] for p in operation.get("parameters", ()) if p["in"] == "query"}
    schemas |= parts(operation) if "seed" in parts(operation) else {}
    found = {}
    for name, schema in schemas.items():
        unset = () if schema.get("type") == "array" else None
        found[name] = (bare(schema), schema.get("default", unset))
    return found


def parts(operation: Mapping[str, Any]) -> dict[str, Any]:
    """{name: schema} of a body's JSON, whichever form it takes."""
    schema = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema", {})
    forms = schema.get("oneOf", [schema])
    return {name: part for form in forms for name, part in form.get("properties", {}).items()}


def sent(call: calls.Call[Any]) -> set[str]:
    """The names of the parts that a call sends; a raw body is the picture."""
    files = call.body.get("files", {})
    if call.headers.get("Content-Type") == JSON:
        return {"pairs"}
    return {"image"} if "content" in call.body else {name for name, _ in files} if isinstance(files, list) else {*files}


def differences(page: Mapping[str, Any]) -> list[str]:
    """Where the client says other than this page."""
    found = []
    served = {
        (method.upper(), path): operation
        for path, operations in page["paths"].items()
        for method, operation in operations.items()
        if path.startswith("/v1/")
    }
    reached: dict[tuple[str, str], set[str]] = {}
    for build, pictures in BUILT.items():
        call = build(*pictures)
        route = call.method, call.path.replace("%7B", "{").replace("%7D", "}")
        if route not in served:
            found.append(f"{build.__name__}: there is no {route}")
            continue
        here, there = of_client(build), of_page(served[route])
        kinds = served[route]["responses"]["200"]["content"]
        if media := [kind.removeprefix("image/") for kind in kinds if kind.startswith("image/")]:
            there.setdefault("output_format", ({"type": "string", "enum": media}, media[0]))
        here = {ELSEWHERE.get(name, name): value for name, value in here.items()}
        found += [
            f"{build.__name__}: {name} is {here.get(name)} here, {there.get(name)} there"
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]
        reached.setdefault(route, set()).update(sent(call))
    for route, operation in served.items():
        if route not in reached:
            found.append(f"nothing asks for {route}")
        elif "seed" not in parts(operation) and reached[route] != set(parts(operation)):
            found.append(f"{route}: {reached[route]} is sent, {set(parts(operation))} is taken")
        read = inspect.getsource(answers)
        headers = operation["responses"]["200"].get("headers", {})
        found += [f"{route}: {name} is not read" for name in headers if f'"{name}"' not in read]
    for name, cls in ANSWERS.items():
        there = {k: bare(v) for k, v in page["components"]["schemas"][name]["properties"].items()}
        here = {k: bare(v) for k, v in pydantic.TypeAdapter(cls).json_schema()["properties"].items()}
        found += [f"{name}: {k} is {here.get(k)} here, {there.get(k)} there"
                  for k in sorted({*here, *there}) if here.get(k) != there.get(k)]  # fmt: skip
    measures = set(page["components"]["schemas"]["Likeness"]["properties"]) - {"index"}
    if measures != set(typing.get_args(calls.Measure)):
        found.append(f"measures are {measures}")
    return found


def test_the_client_says_what_the_page_says(page: dict[str, Any]) -> None:
    assert differences(page) == []


def test_what_differs_is_told(page: dict[str, Any]) -> None:
    """Negative control: one thing on the page is another, each time."""

    def changed(change: Any) -> list[str]:
        other = copy.deepcopy(page)
        change(other)
        return differences(other)

    def query(page: Any, route: str, name: str) -> Any:
        return next(p for p in page["paths"][route]["post"]["parameters"] if p["name"] == name)

    def body(page: Any, route: str) -> Any:
        return page["paths"][route]["post"]["requestBody"]["content"][JSON]["schema"]["properties"]

    def answer(page: Any, route: str) -> Any:
        return page["paths"][route]["post"]["responses"]["200"]

    def added(page: Any) -> None:
        new = {"name": "gamma", "in": "query", "schema": {"type": "number", "default": 1.0}}
        page["paths"]["/v1/upscale"]["post"]["parameters"].append(new)

    for words, change in (
        ("upscale: gamma is None here", added),
        ("burst: scale is ", lambda p: query(p, "/v1/burst", "scale").update(name="factor")),
        ("restore: contrast is ", lambda p: query(p, "/v1/restore", "contrast")["schema"].update(default=1.5)),
        ("embed: side_px is ", lambda p: query(p, "/v1/embed", "side_px")["schema"].update(type="number")),
        ("embeddings: side_px is ", lambda p: query(p, "/v1/embed", "side_px")["schema"].update(type="number")),
        ("similarities: measure is ", lambda p: query(p, "/v1/similarity", "measure")["schema"]["items"]["enum"].pop()),
        ("generate: class is ", lambda p: body(p, "/v1/generate").pop("class")),
        ("generate: output_format is ", lambda p: body(p, "/v1/generate")["output_format"]["enum"].append("avif")),
        ("upscale: output_format is ", lambda p: answer(p, "/v1/upscale")["content"].update({"image/avif": {}})),
        ("'/v1/restore'): ", lambda p: body(p, "/v1/restore").update(depth={"type": "string"})),
        ("nothing asks for ('POST', '/v1/segment')", lambda p: p["paths"].update({"/v1/segment": {"post": {
            "responses": {"200": {}}}}})),
        ("models: there is no ('GET', '/v1/models')", lambda p: p["paths"].pop("/v1/models")),
        ("X-Rayscale-Queue is not read", lambda p: answer(p, "/v1/embed")["headers"].update({"X-Rayscale-Queue": {}})),
        ("Version: card is ", lambda p: p["components"]["schemas"]["Version"]["properties"].pop("card")),
        ("ModelList: default is ", lambda p: p["components"]["schemas"]["ModelList"]["properties"].update(default={})),
        ("measures are ", lambda p: p["components"]["schemas"]["Likeness"]["properties"].pop("sift")),
    ):  # fmt: skip
        told = changed(change)
        assert any(words in line for line in told), (words, told)
    assert changed(lambda p: None) == []


def test_both_clients_have_every_call() -> None:
    for build in BUILT:
        name = build.__name__
        for client in (Client, AsyncClient):
            method = getattr(client, name)
            assert [*inspect.signature(method).parameters][1:] == [*inspect.signature(build).parameters]
            assert method.__doc__ == build.__doc__
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name))
    public = {name for name, value in vars(calls).items() if inspect.isfunction(value) and value.__module__ ==
              calls.__name__ and not name.startswith("_")}  # fmt: skip
    assert public - {"encoded"} == {build.__name__ for build in BUILT}
    assert str(inspect.signature(Client("http://x").embed)) == (
        "(image: 'Image', *, model: 'str' = '', side_px: 'int' = 0) -> 'Embedding'"
    )


TYPED = """\
from rayscale.client import AsyncClient, Client, Embedding, Generated, Picture, Similarity
def sync(c: Client) -> None:
    picture: Picture = c.upscale("a.png", model="m", scale=2, method="lanczos", contrast=1.1, sharpen=1, media="webp")
    made: tuple[Generated, ...] = c.generate(seed=1, n=2, class_name="rose", truncation=0.5)
    alike: tuple[Similarity, ...] = c.similarities([("a.png", b"b")], measure=["psnr"])
    c.burst(["a.png", b"b"], method="shift_and_add")
async def other(c: AsyncClient) -> None:
    vector: Embedding = await c.embed("a.png", side_px=64)
    vectors: tuple[Embedding, ...] = await c.embeddings(["a.png", b"b"])
"""
WRONG = """\
    c.upscale("a.png", no_such=1)
    c.upscale("a.png", scale="2")
    c.upscale("a.png", method="telea")
    c.restore("a.png", None, "model")
    c.similarity("a.png", "b.png", measure=["mae"])
    c.upscale("a.png", media="gif")
    number: int = c.upscale("a.png")
    Client("http://x", keyy="secret")
"""


def test_types_are_checked_where_the_client_is_used(tmp_path: Path) -> None:
    """Each wrong line is one error of mypy, and none of the right ones is."""
    lines = TYPED.splitlines()
    source = "\n".join([*lines[:6], *WRONG.splitlines(), *lines[6:]])
    (tmp_path / "user.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "user.py")],
        cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "platform"), "PATH": ""},
    )  # fmt: skip
    told = [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line]
    assert told == [*range(7, 7 + len(WRONG.splitlines()))], done.stdout + done.stderr
