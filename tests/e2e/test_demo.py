"""`make demo`, whole, within its budgets; what it served is checked by a process that imports nothing of ours."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

UNTILED = """
import sys
import numpy as np
import onnxruntime as ort
from PIL import Image

model, sent, answer = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
x = np.asarray(Image.open(sent), np.float32).transpose(2, 0, 1)[None] / np.float32(255)
(y,) = session.run(None, {session.get_inputs()[0].name: x})
expected = np.rint(y[0].clip(0, 1) * np.float32(255)).astype(np.uint8).transpose(1, 2, 0)
print(int(np.abs(expected.astype(int) - np.asarray(Image.open(answer)).astype(int)).max()), *expected.shape)
assert not any(name.startswith("rayscale") for name in sys.modules)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ONLY_IN_TESTS = (
    "RAYSCALE_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "OMP_NUM_THREADS", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder it wrote, and the JSON object of its last line."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "infra/local/demo.py", "--out", str(out), "--port", str(free_port())]
    env = {k: v for k, v in os.environ.items() if k not in ONLY_IN_TESTS}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_served_pictures_are_better_and_it_keeps_its_budgets(demo: tuple[Path, dict[str, Any]]) -> None:
    out, result = demo
    print(json.dumps(result), (out / "state/memory.txt").read_text(), sep="\n")
    assert result["served_psnr_db"] >= result["bicubic_psnr_db"] + 1.0
    assert result["worst_gain_db"] >= 0.5
    assert result["served_ssim"] > result["bicubic_ssim"]
    assert result["parity_max_abs"] <= 1e-4
    assert result["first_step_s"] <= 60
    assert result["total_s"] <= 480
    assert 1.0 < result["peak_rss_gib"] <= 4.0, (out / "state/memory.txt").read_text()
    assert (result["model"], result["version"]) == ("demo-x2", 1)
    assert (out / "before_after.png").stat().st_size > 100_000


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_what_was_served_is_one_untiled_run_of_the_published_model(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    (model,) = (out / "state/home/mlartifacts").rglob("model.onnx")
    for photo in ("astronaut", "chelsea", "coffee"):
        pair = [str(out / f"served/{photo}_{half}.png") for half in ("sent", "answer")]
        done = subprocess.run([sys.executable, "-c", UNTILED, str(model), *pair], capture_output=True, text=True)
        assert done.stdout.startswith("0 "), done.stdout + done.stderr
    changed = out / "changed.png"  # negative control: one pixel off by one is noticed
    with Image.open(pair[1]) as picture:
        pixels = np.array(picture)
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    command = [sys.executable, "-c", UNTILED, str(model), pair[0], str(changed)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("1 ")
