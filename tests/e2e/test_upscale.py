"""Buckets of pictures through a pool of actors: the bytes of one process, killed workers and drivers survived."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rayscale import artifact, imaging
from rayscale.cli.upscale import upscale
from rayscale.registry.models import Registry

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
NUM = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(NUM):
        pixels = np.random.default_rng(i).integers(0, 256, (90 + 17 * i, 600, 3), np.uint8)
        (folder / f"{i % 3}").mkdir(exist_ok=True)
        (folder / f"{i % 3}/p{i:02d}.png").write_bytes(imaging.encode(pixels, "png"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    small["write"](folder)
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def expected(source: Path, model: Path) -> dict[str, bytes]:
    """Every picture in one run of the session, untiled."""
    session = artifact.load(model)
    found = {}
    for key, data in pictures(source).items():
        whole = session.transform(imaging.to_nchw_f32(imaging.decode_rgb(data)))
        found[key] = imaging.encode(imaging.to_hwc_u8(whole), "png")
    return found


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_makes_the_pictures_of_one_process_also_when_a_worker_is_killed(
    source: Path, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    version = Registry().publish("bulk", model)
    out, killed = tmp_path / "out", list[str]()

    def kill() -> None:
        until(lambda: len(pictures(out)) >= 2)
        mine = [p for p in psutil.process_iter(["cmdline"]) if "PoolMaker" in " ".join(p.info["cmdline"] or [])]
        ours = {p.pid for p in psutil.Process().children(recursive=True)}
        victim = next(p for p in mine if p.pid in ours)
        killed.append(" ".join(victim.cmdline()))
        victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result = upscale(str(source), str(out), model="bulk:1", on="ray", workers=2)
    killer.join()
    assert killed
    assert (result["made"], result["failed"], result["models"]) == (NUM, 0, {str(version): NUM})
    assert pictures(out) == expected
    again = upscale(str(source), str(out), model="bulk:1", on="ray", workers=2)
    assert (again["made"], again["skipped"]) == (0, NUM)


@pytest.mark.long
def test_a_killed_run_goes_on_where_it_was(
    source: Path, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL in the middle; the same command makes the rest, and the bytes are those of a run that was left alone."""
    code = "from rayscale.bulk import work; work.FLUSH_S = 0.05; from rayscale.cli import main; main()"
    command = [sys.executable, "-c", code, "upscale", str(source), str(tmp_path / "out"), "--model", str(model)]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        until(lambda: list((tmp_path / "out/.rayscale/ledger").glob("0*.json")))
        os.kill(driver.pid, signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    assert len(pictures(tmp_path / "out")) < NUM
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert 0 < result["skipped"] < NUM
    assert result["made"] == NUM - result["skipped"]
    assert pictures(tmp_path / "out") == expected
