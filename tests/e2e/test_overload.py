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
TIMEOUT_S, SECONDS = 4.0, 16.0

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


def overload(app: Any) -> list[httpx.Response]:
    """An open loop of five times what one client gets, in other sizes of one picture; every good answer is right."""
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=app.url, timeout=60, limits=limits) as client:
        bodies = [E2E["png"](E2E["photo"](side, 900)) for side in (700, 800, 900)]
        ask = lambda body: client.post("/v1/upscale", content=body)  # noqa: E731
        alone = {body: ask(body).content for body in bodies}
        began = time.monotonic()
        for body in bodies:
            assert ask(body).content == alone[body]
        print("alone_s", (time.monotonic() - began) / 3)
        rate = 5 * len(bodies) / (time.monotonic() - began)
        answers = []
        with ThreadPoolExecutor(200) as pool:
            client_s = time.monotonic()
            for index in range(round(SECONDS * rate)):
                time.sleep(max(0.0, client_s + index / rate - time.monotonic()))
                body = bodies[index % len(bodies)]
                answers.append((body, pool.submit(ask, body)))
        found = [(body, answer.result()) for body, answer in answers]
    assert all(answer.content == alone[body] for body, answer in found if answer.status_code == 200)
    told = Counter(
        "answered" if a.status_code == 200 else a.json()["detail"].split()[0] if refused_by_us(a) else a.text
        for _, a in found
    )
    print(f"\n{rate:.0f} requests a second for {SECONDS:.0f} s, five times what one client gets: {dict(told)}")
    return [answer for _, answer in found]


def refused_by_us(answer: httpx.Response) -> bool:
    """A problem of RFC 9457 with whole seconds to wait, or, of what was let in, that its time ran out."""
    if answer.headers["content-type"] != "application/problem+json":
        return False
    problem = answer.json()
    return problem["type"] in ("urn:rayscale:problem:busy", "urn:rayscale:problem:unavailable") and (
        int(answer.headers["retry-after"]) >= 1
    )


def test_what_is_too_much_is_refused_with_a_time_to_come_back(app: Any) -> None:
    answers = overload(app)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) > len(answers) / 4
    assert len(answers) - len(refused) > 5
    assert {answer.status_code for answer in refused} == {503}
    assert all(map(refused_by_us, refused)), [answer.text[:200] for answer in refused if not refused_by_us(answer)][:3]


@pytest.mark.parametrize("app", [{"max_ongoing_requests": 4, "max_queued_requests": 4}], indirect=True)
def test_ray_alone_would_refuse_in_plain_text(app: Any) -> None:
    """The control: with limits of Ray's below ours."""
    assert not all(refused_by_us(answer) for answer in overload(app) if answer.status_code != 200)
