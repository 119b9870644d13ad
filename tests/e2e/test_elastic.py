"""A node lost in the middle of a run, with and without notice: fewer workers go on with the same sequence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

RECIPE = "rayscale.recipes.compact:tiny"
TOTAL = 2048  # images
SETTINGS = ["run.keep_checkpoints=99", "task.features=24", "data.hr_crop_px=96", "task.optimizer.learning_rate=0.0003"]
EVERY = 256  # images from checkpoint to checkpoint

# Its steps take long while a node is being taken away: however fast the machine, that is heard before the run is over.
HELD = """
import os, time
from dataclasses import dataclass, fields, replace

from rayscale.recipes import Recipe
from rayscale.recipes.compact import tiny
from rayscale.tasks.compact import Compact

@dataclass(frozen=True, kw_only=True)
class Held(Compact):
    def loss(self, *given):
        if os.path.exists(os.environ["HOLD"]):
            time.sleep(0.1)
        return super().loss(*given)

def held() -> Recipe:
    return replace(tiny(), task=Held(**{field.name: getattr(tiny().task, field.name) for field in fields(Compact)}))
"""

# A cluster of two raylets, in a process of its own: two clusters in one process do not work.
PROGRAM = """
import json, os, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

dataset, storage, how, *settings = sys.argv[1:]
hold = Path(os.environ["HOLD"])
EVERY = 256
health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "_system_config": health})
lost = cluster.add_node(num_cpus=3, object_store_memory=200 << 20)
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
found = {}

def committed():
    files = Path(storage).glob("*/checkpoint_*/checkpoint.json")
    return sorted(json.loads(file.read_text())["images_seen"] for file in files)

def watch():
    while len(committed()) < 2:
        time.sleep(0.05)
    time.sleep(0.3)  # into the steps after it
    if how == "notice":
        hold.touch()
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int(time.time() * 1000) + 60_000
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        GcsClient(address=cluster.address).drain_node(lost.node_id, reason, "", deadline)
        asked = time.monotonic()
        while not [images for images in committed() if images % EVERY]:
            time.sleep(0.05)
        found["seconds_to_checkpoint"] = time.monotonic() - asked
        hold.unlink()
    found["saved"] = committed()
    cluster.remove_node(lost, allow_graceful=False)  # SIGKILL

threading.Thread(target=watch, daemon=True).start()
from rayscale.cli.train import train
from rayscale.train import checkpoint
from rayscale.train.record import read_position

result = train(recipe="held:held", data=[dataset], settings=settings, name="run", storage=storage,
               workers=2, min_workers=1, cpus_per_worker=2, threads=1)
Path(storage, "found.json").write_text(json.dumps(found | {
    "chain": result["chain"],
    "starts": [(start.step, start.world_size) for start in read_position(result["run_uri"]).starts],
    "checkpoints": sorted((c.images_seen, c.chain) for c in checkpoint.checkpoints(result["run_uri"])),
}))
ray.shutdown()
cluster.shutdown()
"""


def run(how: str, dataset: str, storage: Path, *settings: str) -> dict[str, Any]:
    (storage / "held.py").write_text(HELD)
    command = [sys.executable, "-c", PROGRAM, dataset, str(storage), how, *settings]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"HOLD": str(storage / "hold")}
    env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # Ray first tries as many workers as before, for a minute
    env["PYTHONPATH"] = os.pathsep.join([str(storage), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads((storage / "found.json").read_text()))


@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.parametrize("how", ["killed", "notice"])
def test_fewer_workers_go_on_where_a_node_is_lost(
    how: str, dataset: str, tmp_path: Path, planned_chains: Callable[[str, Sequence[str]], dict[int, str]]
) -> None:
    settings = [*SETTINGS, f"run.total_images={TOTAL}"]
    found = run(how, dataset, tmp_path, *settings)
    planned = planned_chains(RECIPE, settings)
    assert found["chain"] == planned[TOTAL]
    starts = [tuple(start) for start in found["starts"]]
    assert starts[0] == (0, 2)
    assert starts[-1][1] == 1, "one worker went on"
    for images, chain in found["checkpoints"]:  # each committed (step, micro-batch) once, in order
        assert chain == planned[images]
    assert starts[-1][0] == found["saved"][-1] // 8, "from the newest checkpoint"
    if how == "notice":
        assert [images % EVERY > 0 for images in found["saved"]].count(True) == 1, "made on the notice, out of turn"
        assert found["seconds_to_checkpoint"] < 30


LABELLED = """
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

dataset, out, label = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
chosen = cluster.add_node(num_cpus=2, object_store_memory=200 << 20, labels={"role": "data"})
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.pairs import DataPlacement, Render, training_data
from rayscale.data.plan import DataSettings

class Telling(Mixture):
    def read_each(self, images):
        Path(out, ray.get_runtime_context().get_node_id()).touch()
        return Mixture.read_each(self, images)

photos = open_mixture((dataset,), "train")
plan = photos.plan(DataSettings(hr_crop_px=48, micro_batch=2, virtual_shards=4, window_images=4, crops=1))
placement = DataPlacement(node_labels={"role": label} if label else {})
blocks = training_data(Render(Telling(photos.parts), plan, 0, 24, 1), placement)
assert blocks.count() == 96
Path(out, "chosen").write_text(chosen.node_id)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
@pytest.mark.parametrize("label", ["data", ""])
def test_data_work_keeps_to_the_nodes_with_a_label(label: str, dataset: str, tmp_path: Path) -> None:
    """Without a label (the negative control) it goes wherever there is a CPU."""
    done = subprocess.run(
        [sys.executable, "-c", LABELLED, dataset, str(tmp_path), label], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = (tmp_path / "chosen").read_text()
    nodes = {path.name for path in tmp_path.iterdir()} - {"chosen"}
    assert (nodes == {chosen}) == (label == "data")
