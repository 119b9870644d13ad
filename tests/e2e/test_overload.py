"""More than there is room for, through Ray Serve: what is refused is refused by us, with a time to come back."""

from __future__ import annotations

import copy
import runpy
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

E2E = runpy.run_path(str(Path(__file__).parent / "test_serve.py"))
served, Served = E2E["served"], E2E["Served"]
TIMEOUT_S, SECONDS = 4.0, 10.0

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture
def app(served: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """One gateway whose requests have three seconds, with other limits of Ray's where the test asks for them."""
    before = served.config
    served.config = copy.deepcopy(before)
    application = served.config["applications"][0]
    application["args"] |= {"timeout_s": TIMEOUT_S, "tile_px": 256}
    for deployment in application["deployments"]:
        if "autoscaling_config" in deployment:
            most = deployment["autoscaling_config"]["min_replicas"]
            deployment["autoscaling_config"] |= {"max_replicas": most, "initial_replicas": most}
        if deployment["name"] == "Gateway":
            deployment |= getattr(request, "param", {})
    served.promote(served.versions[0])
    served.deploy()
    E2E["until"](lambda: E2E["answers"](served.url), 120)
    time.sleep(3)  # what ran before has gone
    yield served
    served.config = before


def overload(app: Any) -> tuple[list[httpx.Response], float]:
    """An open loop of five times what one client gets, in three sizes; every good answer is right.

    Also what is answered, as a share of what that client would have got.
    """
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=app.url, timeout=60, limits=limits) as client:
        bodies = [E2E["png"](E2E["photo"](side, 900)) for side in (700, 800, 900)]
        ask = lambda body: client.post("/v1/upscale", content=body)  # noqa: E731
        alone = {body: ask(body).content for body in bodies}
        began = time.monotonic()
        for body in 2 * bodies:
            assert ask(body).content == alone[body]
        rate = 5 * 2 * len(bodies) / (time.monotonic() - began)
        asked, began = [], time.monotonic()
        with ThreadPoolExecutor(200) as pool:
            for index in range(round(SECONDS * rate)):
                time.sleep(max(0.0, began + index / rate - time.monotonic()))
                body = bodies[index % len(bodies)]
                asked.append((body, pool.submit(ask, body)))
        answers = [(body, answer.result()) for body, answer in asked]
        took_s = time.monotonic() - began
    assert all(answer.content == alone[body] for body, answer in answers if answer.status_code == 200)
    told = Counter(kind(answer) for _, answer in answers)
    share = told["answered"] / (took_s * rate / 5)
    print(f"\n{rate:.0f} requests a second, five times what one client gets: {dict(told)}, {share:.2f} of that")
    return [answer for _, answer in answers], share


def kind(answer: httpx.Response) -> str:
    if answer.status_code == 200:
        return "answered"
    return str(answer.json()["detail"].partition(" ")[0]) if refused_by_us(answer) else answer.text[:200]


def refused_by_us(answer: httpx.Response) -> bool:
    """A problem of RFC 9457 with whole seconds to wait, or, of what was let in, that its time ran out."""
    if answer.headers["content-type"] != "application/problem+json":
        return False
    problem = answer.json()
    return problem["type"] in ("urn:rayscale:problem:busy", "urn:rayscale:problem:unavailable") and (
        int(answer.headers["retry-after"]) >= 1
    )


def test_what_is_too_much_is_refused_with_a_time_to_come_back(app: Any) -> None:
    for _ in range(3):
        answers, share = overload(app)
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) > len(answers) / 4
        assert {answer.status_code for answer in refused} == {503}
        assert all(map(refused_by_us, refused))
        if share >= 0.9:  # seen: 1.4; 0.25 before codecs were counted and the first deadline came first
            return
    raise AssertionError(f"three times in a row {share:.2f} of what one client gets")


@pytest.mark.parametrize("app", [{"max_ongoing_requests": 4, "max_queued_requests": 4}], indirect=True)
def test_ray_alone_would_refuse_in_plain_text(app: Any) -> None:
    """The control: with limits of Ray's below ours."""
    answers, _ = overload(app)
    assert not all(refused_by_us(answer) for answer in answers if answer.status_code != 200)
