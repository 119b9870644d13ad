"""A real Ray Serve application from the YAML that is shipped, over a real registry: exact, and swapped seamlessly."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from rayscale.errors import ConfigError
from rayscale.registry import canary
from rayscale.registry.journal import PROMOTE, Journal
from rayscale.registry.models import Registry, Version

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "serve_configs").glob("*.yaml"))
small = runpy.run_path(str(ROOT / "tests" / "small_onnx.py"))
U8 = NDArray[np.uint8]

# Every answer again, by nothing of ours: argv = model, then pairs of sent and served PNGs; prints one bool a pair.
INDEPENDENT = """
import sys, numpy as np, onnxruntime as ort
from PIL import Image
model, *pairs = sys.argv[1:]
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
for sent, served in zip(pairs[::2], pairs[1::2]):
    x = np.asarray(Image.open(sent)).astype(np.float32) / np.float32(255)
    y = session.run(None, {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None]})[0][0].transpose(1, 2, 0)
    print(np.array_equal(np.rint(np.clip(y, 0, 1) * np.float32(255)).astype(np.uint8), np.asarray(Image.open(served))))
assert not any(name.startswith("rayscale") for name in sys.modules)
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_one_that_serve_takes(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from rayscale.serve.app import AppArgs, GatewayDeployment, RolloutDeployment
    from rayscale.serve.pools import deployment_of

    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for application in config.applications:
        assert application.import_path == "rayscale.serve.app:build"
        args = AppArgs.model_validate(application.args)
        assert (args.poll_s, args.sync_s) == (1.0, 0.5)  # a rollback within 5 s: `tests/unit/test_canary.py`
        named = {d.name for d in application.deployments}
        engines = map(deployment_of, ("", *args.engines.pools) if args.engines.tiers == "two" else ())
        assert named == {GatewayDeployment.name, RolloutDeployment.name, *engines}
        assert args.require_gate == bool(args.engines.pools) == (path.stem == "production")
        for deployment in application.deployments:  # what is in flight may end
            assert deployment.name == "Rollout" or deployment.graceful_shutdown_timeout_s >= args.timeout_s


def test_a_wrong_argument_is_one_line() -> None:
    from rayscale.serve.app import AppArgs

    with pytest.raises(ConfigError) as unknown:
        AppArgs.model_validate({"modles": ["x"]})
    assert str(unknown.value) == "args.modles=['x']: no such argument; did you mean 'models'?"
    with pytest.raises(ConfigError, match=r"args.engines.windw=2: no such argument; did you mean 'window'\?"):
        AppArgs.model_validate({"engines": {"tiers": "two", "windw": 2}})
    with pytest.raises(ConfigError, match="no effect with one tier"):
        AppArgs.model_validate({"engines": {"window": 2}})
    with pytest.raises(ConfigError, match=r"args.max_held_bytes=100: must be at least twice max_bytes \(99\)"):
        AppArgs.model_validate({"max_bytes": 99, "max_held_bytes": 100})
    for wrong in ({"timeout_s": 0}, {"device": "tpu"}, {"models": []}, {"max_bytes": "many"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))) as error:
            AppArgs.model_validate(wrong)
        assert "\n" not in str(error.value)


# --- one application for the tests below


@dataclasses.dataclass
class Served:
    """The running application, its registry and the two versions that were published before it started."""

    url: str
    registry: Registry
    folder: Path
    versions: list[Version]
    config: dict[str, Any]
    address: str  # of Ray

    def deploy(self, **changes: dict[str, Any]) -> None:
        """Start it, or bring what runs to the config with `changes` of its deployments, by Ray's own command."""
        config = copy.deepcopy(self.config)
        for deployment in config["applications"][0]["deployments"]:
            for key, value in changes.get(deployment["name"], {}).items():
                deployment[key] = {**deployment[key], **value}
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", self.address,
                   "serve.yaml"]  # fmt: skip
        with (self.folder / "serve.log").open("ab") as log:
            subprocess.run(command, cwd=self.folder, env=os.environ, check=True, timeout=120, stdout=log, stderr=log)

    def publish(self, seed: int, **kind: Any) -> Version:
        artifact = self.folder / f"artifact-{seed}"
        small["write"](artifact, seed, **kind)
        return self.registry.publish("photos", artifact)

    def promote(self, version: Version) -> None:
        self.registry.client.set_registered_model_alias("photos", "champion", str(version.version))

    def upscale(self, pixels: U8) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/upscale", content=png(pixels), timeout=30)

    def wait_for(self, digest: str) -> None:
        until(lambda: self.upscale(photo(16, 16)).headers.get("x-rayscale-digest") == digest)


def photo(height: int, width: int, seed: int = 0) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: U8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> float:
    """How many seconds it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() < began_s + timeout_s, "it did not happen in time"
        time.sleep(0.1)
    return time.monotonic() - began_s


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


class Shot(NamedTuple):
    """One answer of an open loop."""

    due_s: float
    done_s: float
    which: int
    digest: str
    content: bytes


def latency_and_gap_s(shots: list[Shot]) -> tuple[float, float]:
    """The 99th percentile of the seconds since each was due, and the longest time without an answer."""
    done_s = sorted(shot.done_s for shot in shots)
    latencies = sorted(shot.done_s - shot.due_s for shot in shots)
    return latencies[math.ceil(0.99 * len(shots)) - 1], max(b - a for a, b in pairwise(done_s))


@contextlib.contextmanager
def open_loop(served: Served, pictures: list[U8], per_s: float) -> Iterator[list[Shot]]:
    """So many requests a second in turn, however long answers take; gives those so far. All are answered with 200."""
    bodies = [png(p) for p in pictures]
    shots: list[Shot] = []
    stop = threading.Event()
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=60, limits=limits) as client, ThreadPoolExecutor(256) as pool:

        def one(which: int, due_s: float) -> None:
            answer = client.post(f"{served.url}/v1/upscale", content=bodies[which])
            assert answer.status_code == 200, answer.text
            digest = answer.headers["x-rayscale-digest"]
            shots.append(Shot(due_s, time.monotonic(), which, digest, answer.content))

        def load() -> list[Future[None]]:
            asked: list[Future[None]] = []
            due_s = time.monotonic()
            while not stop.wait(max(0.0, due_s - time.monotonic())):
                asked.append(pool.submit(one, len(asked) % len(bodies), due_s))
                due_s += 1 / per_s
            return asked

        load_is_over = pool.submit(load)
        try:
            yield shots
        finally:
            stop.set()
        for asked in load_is_over.result():
            asked.result()  # none was lost on its way


def add_rare_pool(application: dict[str, Any]) -> None:
    """A pool that sleeps soon, and CPUs for all engines."""
    application["args"]["engines"]["pools"] = {"rare": ["rare-*"]}
    by_name = {d["name"]: d for d in application["deployments"]}
    rare = copy.deepcopy(by_name["Engine"]) | {"name": "Engine-rare"}
    rare["autoscaling_config"] |= {"min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0, "downscale_delay_s": 1}
    application["deployments"].append(rare)
    for deployment in (by_name["Gateway"], by_name["Engine"], rare):
        deployment["ray_actor_options"] = {"num_cpus": 0.5}


@pytest.fixture(scope="module", params=["local", pytest.param("staging", marks=pytest.mark.long)])
def served(
    request: pytest.FixtureRequest, ray_cluster: str, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A shipped config with a port, a registry and folders of its own, started by Ray's own command."""
    from ray import serve

    folder = tmp_path_factory.mktemp("serve")
    tracking_uri = f"sqlite:///{shutil.copy(mlflow_template, folder)}"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    file = "staging" if request.param == "two pools" else request.param
    config = yaml.safe_load((ROOT / "serve_configs" / f"{file}.yaml").read_text())
    if request.param == "two pools":
        add_rare_pool(config["applications"][0])
    config["http_options"] |= {"port": port, "host": "127.0.0.1"}
    config["applications"][0]["args"] |= {
        "tracking_uri": tracking_uri,
        "state_uri": str(folder / "state"),
        "cache_dir": str(folder / "cache"),
        "whole_max_px": 64 * 64,
        "tile_px": 48,
    }
    app = Served(f"http://127.0.0.1:{port}", Registry(tracking_uri), folder, [], config, ray_cluster)
    app.versions = [app.publish(0), app.publish(1)]
    app.promote(app.versions[0])
    try:
        app.deploy()
        until(lambda: answers(app.url), 120)
        yield app
    finally:
        serve.shutdown()


@pytest.mark.ray
def test_what_is_served_is_what_the_model_says(served: Served, tmp_path: Path) -> None:
    served.promote(served.versions[0])
    served.wait_for(served.versions[0].digest)
    arguments = []
    for index, (height, width, tiling) in enumerate([(33, 57, "whole"), (150, 97, "tiled 12"), (1, 300, "whole")]):
        sent, got = tmp_path / f"sent{index}.png", tmp_path / f"got{index}.png"
        pixels = photo(height, width, index)
        sent.write_bytes(png(pixels))
        response = served.upscale(pixels)
        assert response.status_code == 200, response.text
        assert response.headers.get_list("x-rayscale-tiling") == [tiling]
        assert len(response.headers.get_list("x-request-id")) == 1
        got.write_bytes(response.content)
        arguments += [str(sent), str(got)]

    def judge(seed: int) -> list[str]:
        model = served.folder / f"artifact-{seed}" / "model.onnx"
        command = [sys.executable, "-c", INDEPENDENT, str(model), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()

    assert judge(0) == ["True"] * 3
    assert judge(1) == ["False"] * 3  # the other version's answers would be seen


@pytest.mark.ray
def test_errors_are_problems_through_ray_serve_too(served: Served) -> None:
    for method, path, body, status in (
        ("POST", "/v1/upscale", b"no picture", 415),
        ("POST", "/v1/upscale?model=other", b"", 404),
        ("GET", "/nowhere", b"", 404),
        ("DELETE", "/v1/models", b"", 405),
    ):
        response = httpx.request(method, served.url + path, content=body, headers={"X-Request-Id": "mine"})
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers.get_list("x-request-id") == ["mine"]
        assert response.json()["request_id"] == "mine"


def is_smooth(shots: list[Shot], swap_s: float) -> bool:
    """Whether p99 from `swap_s` on is at most twice that before it, and no gap over 500 ms, then and before."""
    p99s_s, gaps_s = [], []
    for some in ([shot for shot in shots if shot.done_s < swap_s], [shot for shot in shots if shot.done_s >= swap_s]):
        assert len(some) > 50
        p99_s, gap_s = latency_and_gap_s(some)
        print(f"\n{len(some)} answers, p99 {1e3 * p99_s:.0f} ms, longest gap {1e3 * gap_s:.0f} ms")
        p99s_s.append(p99_s)
        gaps_s.append(gap_s)
    return p99s_s[1] <= 2 * p99s_s[0] and max(gaps_s) <= 0.5


@pytest.mark.ray
def test_a_moved_alias_costs_no_request_and_no_answer_is_of_two_versions(served: Served) -> None:
    """Times are measured up to three times, others use this machine too; an error or a wrong answer ends it at once."""
    old = served.versions[0]
    served.promote(old)
    served.wait_for(old.digest)

    def swap(new: Version) -> bool:
        took_s: list[float] = []
        with open_loop(served, [photo(90, 70)], 20.0) as shots:
            time.sleep(1.0)
            for _ in range(10):  # until others on this machine leave six seconds to compare with
                shots.clear()  # first of the time in which connections are made
                time.sleep(6.0)
                if latency_and_gap_s(shots)[1] <= 0.5:
                    break
            swap_s = time.monotonic()
            for version in (new, old, new, old):  # promotions and rollbacks
                served.promote(version)
                took_s.append(until(lambda digest=version.digest: shots[-1].digest == digest))  # type: ignore[misc]
                time.sleep(0.5)
        pictures = {(shot.digest, shot.content) for shot in shots}
        assert len(pictures) == 2  # one picture per version, whenever it was asked for
        assert {digest for digest, _ in pictures} == {old.digest, new.digest}
        print("\nmoved within", ", ".join(f"{s:.1f} s" for s in took_s))
        assert min(took_s[1:]) < 5  # both are warm; the bound itself is held on a clock of its own: test_canary.py
        return is_smooth(shots, swap_s)

    assert any(swap(served.publish(seed)) for seed in (10, 11, 12))  # each is new: engines load it under the load


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["local"], indirect=True)
def test_a_redeployed_gateway_is_not_smooth(served: Served) -> None:
    """The control of the one above."""
    served.promote(served.versions[0])
    served.wait_for(served.versions[0].digest)
    with open_loop(served, [photo(90, 70)], 20.0) as shots:
        time.sleep(6.0)
        swap_s = time.monotonic()
        served.deploy(Gateway={"ray_actor_options": {"num_cpus": 0.9}})
        until(lambda: replicas("Gateway") == {"RUNNING": 1})
        count = len(shots)
        until(lambda: len(shots) > count + 50)
    assert not is_smooth(shots, swap_s)
    served.deploy()
    until(lambda: replicas("Gateway") == {"RUNNING": 1} and answers(served.url))


def flipped_bit(served: Served) -> Version:
    """A version that was damaged in its store."""
    version = served.publish(2)
    model = Path(version.uri.removeprefix("file://")) / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    return version


def wrong_golden(served: Served) -> Version:
    """A version whose golden output is another model's; its digest is right."""
    artifact, other = (served.folder / name for name in ("artifact-wrong", "artifact-other"))
    small["write"](artifact, 5)
    small["write"](other, 6)
    shutil.copy(other / "golden.npz", artifact / "golden.npz")
    return served.registry.publish("photos", artifact)


@pytest.mark.ray
@pytest.mark.parametrize(("damaged", "why"), [(flipped_bit, "digest of"), (wrong_golden, "of golden.npz")])
def test_a_corrupt_artifact_is_refused_while_the_old_version_serves(
    served: Served, damaged: Callable[[Served], Version], why: str
) -> None:
    good = served.versions[1]
    served.promote(good)
    served.wait_for(good.digest)
    bad = damaged(served)
    served.promote(bad)

    def held() -> str:
        found: dict[str, str] = httpx.get(f"{served.url}/v1/models").json()["held"]
        return found.get("photos@champion", "")

    until(lambda: f"{bad} is refused: " in held())
    assert why in held()
    assert served.upscale(photo(16, 16)).headers["x-rayscale-digest"] == good.digest
    served.promote(served.versions[0])  # the way out: move the alias on
    served.wait_for(served.versions[0].digest)
    until(lambda: held() == "")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["local"], indirect=True)
def test_an_alias_that_was_moved_past_the_gate_is_reported_and_not_followed(served: Served) -> None:
    """Two applications of one registry: the one with require_gate stays, the other one, the control, follows."""
    from ray import serve

    from rayscale.serve.app import AppArgs, build

    gated, by_hand = served.versions
    served.promote(by_hand)  # `move` is told where the alias stood
    book = Journal(served.registry, "photos")
    book.move("champion", gated, before=by_hand.version, decision=PROMOTE)
    args = served.config["applications"][0]["args"] | {"state_uri": str(served.folder / "strict"), "require_gate": True}
    url = f"{served.url}/strict"

    def digest() -> str | None:
        return httpx.post(f"{url}/v1/upscale", content=png(photo(16, 16)), timeout=30).headers.get("x-rayscale-digest")

    def held(page: str) -> str:
        found: dict[str, str] = httpx.get(url + page).json()["held"]
        return found.get("photos@champion", "")

    try:
        serve.run(build(AppArgs.model_validate(args)), name="strict", route_prefix="/strict")
        until(lambda: digest() == gated.digest)
        assert held("/v1/models") == ""
        served.promote(by_hand)  # in MLflow, as anybody may
        served.wait_for(by_hand.digest)
        until(lambda: held("/v1/models") != "")  # it has seen the move
        assert (
            held("/v1/models/photos")
            == held("/v1/models")
            == (
                f"{by_hand} passed no gate for champion, and require_gate is set; "
                f"`rayscale promote {by_hand} --alias champion`"
            )
        )
        for _ in range(5):
            assert digest() == gated.digest
        _, stands = book.heal("champion")
        book.move("champion", by_hand, before=stands, decision=PROMOTE)  # the way out: it passes the gate
        until(lambda: digest() == by_hand.digest)
        until(lambda: held("/v1/models") == "")
    finally:
        serve.delete("strict")


@pytest.mark.ray
@pytest.mark.long
def test_a_canary_that_fails_now_and_then_is_rolled_back_by_itself(served: Served) -> None:
    good, healthy = served.versions
    served.promote(good)
    served.wait_for(good.digest)
    bad = served.publish(3, fails_at=0.99)
    dark, bright = (photo(16, 16) for _ in range(2))
    dark[0, 0], bright[0, 0] = 0, 255  # which fails
    bodies, http = (png(bright), png(dark)), httpx.Client(timeout=30)

    def start(version: Version) -> None:
        share = canary.start(served.registry, version, "champion", weight=50)
        until(lambda: shares().get(f"photos:{version.version}") == 0.5)
        assert share.champion == good.version

    def shares() -> dict[str, float]:
        found: dict[str, float] = httpx.get(f"{served.url}/v1/models/photos").json()["routes"]["champion"]
        return found

    def ask(client: int) -> httpx.Response:
        """A fifth of the clients has a bright picture."""
        headers = {"X-Request-Id": f"client-{client}"}
        return http.post(f"{served.url}/v1/upscale", content=bodies[client % 5 > 0], headers=headers)

    start(healthy)  # control
    answers = [ask(client) for client in range(100)]
    assert {answer.status_code for answer in answers} == {200}
    met = [answer.headers["x-rayscale-digest"] for answer in answers]
    assert {good.digest, healthy.digest} == set(met)
    assert [ask(client).headers["x-rayscale-digest"] for client in range(30)] == met[:30]
    assert shares() == {str(good): 0.5, str(healthy): 0.5}
    start(bad)
    clients = itertools.count()
    statuses = [ask(next(clients)).status_code]
    while shares() != {str(good): 1.0}:
        assert len(statuses) < 600
        statuses.append(ask(next(clients)).status_code)
    failed = statuses.count(500)
    print(f"\nrolled back after {len(statuses)} requests, {failed} of which failed")
    assert set(statuses) == {200, 500}
    until(lambda: "champion-canary" not in served.registry.aliases("photos"))
    assert {ask(client).status_code for client in range(20)} == {200}
    held = httpx.get(f"{served.url}/v1/models").json()["held"]["photos@champion"]
    assert f"canary {bad} was rolled back" in held
    entry = Journal(served.registry, "photos").last("champion-canary")
    assert entry is not None
    assert (entry.before, entry.to, entry.decision) == (bad.version, None, canary.ROLLED_BACK)


@pytest.mark.long
@pytest.mark.ray
def test_serving_goes_on_without_the_rollout_and_follows_again(served: Served) -> None:
    import ray

    old, new = served.versions
    for version in (new, old):  # a rollback that another test left is over when the alias moves: a table of its own
        served.promote(version)
        served.wait_for(version.digest)

    def generation() -> int:
        """The newest: of two gateways one may be behind for a moment."""
        return max(int(httpx.get(f"{served.url}/v1/models").json()["generation"]) for _ in range(20))

    before = generation()
    name = next(a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "#Rollout#" in a["name"])
    ray.kill(ray.get_actor(name, namespace="serve"))
    assert served.upscale(photo(16, 16)).headers["x-rayscale-digest"] == old.digest
    served.promote(new)
    served.wait_for(new.digest)
    assert generation() == before + 1  # the kept table went on


# --- two tiers under fire


ONE = {"min_replicas": 1, "max_replicas": 1}


def pids_of(deployment: str) -> set[int]:
    """Of its replicas that this cluster runs now."""
    import ray

    found = set()
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if f"#{deployment}#" in actor["name"]:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it is dying
                replica = ray.get_actor(actor["name"], namespace="serve")
                found.add(ray.get(replica.__ray_call__.remote(lambda _: os.getpid()), timeout=5))
    return found


@contextlib.contextmanager
def under_load(served: Served) -> Iterator[list[int]]:
    """About 20 requests a second of 1 KB, 36 KB and 8 MB; gives what was answered so far, and checks all of it."""
    served.promote(served.versions[0])
    served.wait_for(served.versions[0].digest)
    pictures = [photo(*size) for size in ((16, 16), (60, 200), (1700, 1600))]
    bodies = [png(p) for p in pictures]
    assert len(bodies[-1]) > 8_000_000
    first = [served.upscale(p) for p in pictures]
    assert [answer.status_code for answer in first] == [200] * 3
    wanted = [answer.content for answer in first]
    seen: list[int] = []
    wrong: list[str] = []
    stop = threading.Event()

    def load(which: int, pause_s: float) -> None:
        with httpx.Client(timeout=90) as client:
            while not stop.is_set():
                try:
                    answer = client.post(f"{served.url}/v1/upscale", content=bodies[which])
                    if (answer.status_code, answer.content) != (200, wanted[which]):
                        wrong.append(f"{which}: {answer.status_code} {answer.text[:300]}")
                except httpx.HTTPError as error:
                    wrong.append(f"{which}: {error!r}")
                seen.append(which)
                stop.wait(pause_s)

    threads = [threading.Thread(target=load, args=args) for args in [(0, 0.1)] * 3 + [(1, 0.2), (2, 0.5)]]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert set(seen) == {0, 1, 2}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["staging"], indirect=True)
def test_killed_engines_cost_no_request(served: Served) -> None:
    with under_load(served) as seen:
        for _ in range(3):
            before = pids_of("Engine")
            os.kill(min(before), signal.SIGKILL)
            until(lambda before=before: len(pids_of("Engine") - before) >= 1)  # type: ignore[misc]
            time.sleep(1.0)
        for pid in pids_of("Engine"):  # and all of them at once
            os.kill(pid, signal.SIGKILL)
        count = len(seen)
        until(lambda: len(seen) > count + 20)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["staging"], indirect=True)
def test_redeployed_and_fewer_engines_cost_no_request(served: Served) -> None:
    with under_load(served) as seen:
        before = pids_of("Engine")
        served.deploy(Engine={"ray_actor_options": {"num_cpus": 0.9}})
        until(lambda: len(pids_of("Engine") - before) == 2 and not pids_of("Engine") & before, 120)
        served.deploy(Engine={"ray_actor_options": {"num_cpus": 0.9}, "autoscaling_config": ONE})
        until(lambda: len(pids_of("Engine")) == 1, 120)
        count = len(seen)
        until(lambda: len(seen) > count + 20)
        last = pids_of("Engine")
        served.deploy()
        until(lambda: len(pids_of("Engine") - last) == 2 and not pids_of("Engine") & last, 120)


# --- as many as there is work for: by Serve's own policy, with delays that a test can wait for


QUICK = {"target_ongoing_requests": 1, "upscale_delay_s": 1, "downscale_delay_s": 3, "metrics_interval_s": 1,
         "look_back_period_s": 2}  # fmt: skip


def replicas(deployment: str) -> dict[str, int]:
    """How many of them are STARTING, RUNNING, STOPPING."""
    from ray import serve

    return dict(serve.status().applications["rayscale"].deployments[deployment].replica_states)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["staging"], indirect=True)
def test_engines_follow_a_step_load_up_and_down_and_lose_nothing(served: Served) -> None:
    slow = served.publish(4, depth=3)
    served.promote(slow)
    served.deploy(Engine={"autoscaling_config": QUICK | ONE})
    until(lambda: replicas("Engine") == {"RUNNING": 1})
    served.wait_for(slow.digest)
    pictures = [photo(64, 64, seed) for seed in range(8)]
    began_s = time.monotonic()
    wanted = [served.upscale(picture).content for picture in pictures]
    per_s = 1.6 * len(pictures) / (time.monotonic() - began_s)  # more than one engine can do, on any machine

    def check(shots: list[Shot]) -> None:
        assert all((shot.digest, shot.content) == (slow.digest, wanted[shot.which]) for shot in shots)

    served.deploy(Engine={"autoscaling_config": QUICK | {"min_replicas": 1, "max_replicas": 3}})
    with open_loop(served, pictures, per_s) as heavy:
        up_s = until(lambda: replicas("Engine").get("RUNNING", 0) >= 2)
        time.sleep(3.0)
    with open_loop(served, pictures, 1.0) as light:
        down_s = until(lambda: replicas("Engine") == {"RUNNING": 1}, 120)
    check(heavy + light)
    print(f"\n{per_s:.1f} requests/s: the second engine answers after {up_s:.1f} s; 1 request/s: the last one is alone "
          f"after {down_s:.1f} s; {len(heavy)} and {len(light)} answers")  # fmt: skip

    served.deploy(Engine={"autoscaling_config": QUICK | ONE})  # control
    alone = pids_of("Engine")
    with open_loop(served, pictures, per_s) as shots:
        end_s = time.monotonic() + up_s + 3.0
        while time.monotonic() < end_s:
            assert replicas("Engine") == {"RUNNING": 1}
            time.sleep(0.2)
    check(shots)
    assert pids_of("Engine") == alone
    served.promote(served.versions[0])
    served.deploy()


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["staging"], indirect=True)
def test_engines_sleep_while_nobody_asks_and_wake_for_the_next_request(served: Served) -> None:
    served.promote(served.versions[0])
    served.wait_for(served.versions[0].digest)
    pictures = [photo(60, 200, seed) for seed in range(6)]
    wanted = [served.upscale(picture).content for picture in pictures]
    until(lambda: replicas("Engine") == {"RUNNING": 2})  # control: with the staging config they wait for work
    served.deploy(Engine={"autoscaling_config": QUICK | {"min_replicas": 0, "max_replicas": 1}})
    for together in (1, 6):
        asleep_s = until(lambda: replicas("Engine") == {})
        assert httpx.get(f"{served.url}/readyz").status_code == 200
        began_s = time.monotonic()
        with ThreadPoolExecutor(together) as pool:
            answers = list(pool.map(served.upscale, pictures[:together]))
        woken_s = time.monotonic() - began_s
        print(f"\nasleep after {asleep_s:.1f} s; woken and {together} answered after {woken_s:.1f} s")
        assert [answer.status_code for answer in answers] == [200] * together
        assert [answer.content for answer in answers] == wanted[:together]
    served.deploy()
    until(lambda: replicas("Engine") == {"RUNNING": 2})


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["local"], indirect=True)
def test_a_gateway_that_leaves_costs_no_request(served: Served) -> None:
    two = {"initial_replicas": 2, "min_replicas": 2, "max_replicas": 2}
    served.deploy(Gateway={"autoscaling_config": two})
    until(lambda: replicas("Gateway") == {"RUNNING": 2})

    def kill_both() -> None:
        with under_load(served) as seen:
            until(lambda: len(seen) > 10)
            for pid in pids_of("Gateway"):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(AssertionError, match=r"== \[\]"):
        kill_both()  # control: they cannot drain
    until(lambda: replicas("Gateway") == {"RUNNING": 2} and answers(served.url))
    with under_load(served) as seen:
        until(lambda: len(seen) > 20)
        count, began_s = len(seen), time.monotonic()
        served.deploy(Gateway={"autoscaling_config": ONE})
        until(lambda: replicas("Gateway") == {"RUNNING": 1}, 120)
        print(f"\none of two gateways left within {time.monotonic() - began_s:.1f} s; {len(seen) - count} answers")
        count = len(seen)
        until(lambda: len(seen) > count + 20)
    served.deploy()


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["staging"], indirect=True)
def test_engines_drop_what_nobody_waits_for(served: Served) -> None:
    served.upscale(photo(16, 16))
    pids = pids_of("Engine")

    def busy_s() -> float:
        """CPU seconds of the engines so far."""
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")

    huge = png(np.zeros((5000, 5000, 3), np.uint8))  # 13,000 tiles: 5 s and more for both
    idle = busy_s()
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        head = f"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: {len(huge)}\r\n\r\n"
        connection.sendall(head.encode() + huge)
        until(lambda: busy_s() > idle + 0.5)
    time.sleep(1.0)  # the news travels, the running chunks end
    settled = busy_s()
    time.sleep(2.0)
    assert busy_s() - settled < 0.4


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("served", ["two pools"], indirect=True)
def test_a_pool_sleeps_until_its_model_is_asked_for_and_outlives_the_other_one(served: Served) -> None:
    def publish(seed: int) -> Version:
        small["write"](served.folder / f"rare-{seed}", seed)
        version = served.registry.publish("rare-x", served.folder / f"rare-{seed}")
        served.registry.client.set_registered_model_alias("rare-x", "champion", str(version.version))
        return version

    def ask(model: str) -> tuple[int, str | None]:
        url, content = f"{served.url}/v1/upscale?model={model}", png(photo(16, 16))
        answer = httpx.post(url, content=content, timeout=90)
        return answer.status_code, answer.headers.get("x-rayscale-digest")

    def asleep() -> bool:
        return not pids_of("Engine-rare")

    common = 200, served.versions[0].digest
    assert ask("photos") == common
    until(asleep)
    first = publish(7)
    until(lambda: ask("rare-x") == (200, first.digest))  # it was woken to prepare it
    until(asleep, 120)
    others = pids_of("Engine")
    began_s = time.monotonic()
    assert ask("rare-x") == (200, first.digest)
    print(f"\nan answer of a pool that slept took {time.monotonic() - began_s:.1f} s")
    assert (len(pids_of("Engine-rare")), pids_of("Engine")) == (1, others)  # it was that pool that woke
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    assert ask("rare-x") == (200, first.digest)  # none of those had to answer
    until(lambda: ask("photos") == common)
    until(asleep, 120)
    second = publish(8)
    assert ask("photos") == common
    until(lambda: ask("rare-x") == (200, second.digest))
    until(asleep, 120)
