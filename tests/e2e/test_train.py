"""Training through Ray: the same global batches on any number of workers, and through a SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from rayscale.cli.train import train
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, DamageError, DivergedError, IntegrityError, ResourceError
from rayscale.train import checkpoint
from rayscale.train.record import read_position

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RECIPE = "rayscale.recipes.compact:tiny"
SLOWER = [  # time to be killed in, and steps so small that rounding does not grow into another run
    "run.keep_checkpoints=99", "task.features=24", "data.hr_crop_px=96", "task.optimizer.learning_rate=0.0003",
]  # fmt: skip
TOTAL, EVERY = 1024, 256  # images, and images from checkpoint to checkpoint


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(dataset: str, storage: Path, workers: int, name: str, *settings: str) -> dict[str, Any]:
    return train(
        recipe=RECIPE, data=[dataset], settings=[*SLOWER, *settings], name=name, storage=str(storage),
        workers=workers, cpus_per_worker=0.5, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(dataset: str, storage: Path) -> dict[str, Any]:
    return run(dataset, storage, 2, "undisturbed")


def nets_of(run_uri: str) -> dict[str, torch.Tensor]:
    return load_file(Path(checkpoint.select(run_uri, "last").uri) / "nets.safetensors")


def gradient_norms(result: dict[str, Any]) -> dict[int, float]:
    """Images seen -> mean norm of the gradient, as MLflow has it."""
    history = MlflowClient(result["tracking_uri"]).get_metric_history(result["mlflow_run_id"], "grad_norm/g")
    return {m.step: m.value for m in history}


@pytest.fixture(scope="module")
def chains(planned_chains: Callable[[str, Sequence[str]], dict[int, str]]) -> dict[int, str]:
    """Images seen -> the chain."""
    return planned_chains(RECIPE, SLOWER)


def test_two_workers_consume_the_planned_sequence(undisturbed: dict[str, Any], chains: dict[int, str]) -> None:
    assert undisturbed["images_seen"] == TOTAL
    found = {c.images_seen: c.chain for c in checkpoint.checkpoints(undisturbed["run_uri"])}
    assert found == {i: chains[i] for i in range(EVERY, TOTAL + 1, EVERY)}


@pytest.mark.parametrize("workers", [pytest.param(n, marks=pytest.mark.long) for n in (1, 3)])
def test_other_numbers_of_workers_consume_the_same_one(
    dataset: str, storage: Path, undisturbed: dict[str, Any], workers: int
) -> None:
    """3 does not divide the 4 micro-batches: spare ones of weight 0 fill up, and the weights stay right."""
    other = run(dataset, storage, workers, f"on-{workers}")
    assert other["chain"] == undisturbed["chain"]
    # Equal but for the order of the sums in all-reduce; a spare one that weighed anything would scale the gradient.
    assert gradient_norms(other)[128] == pytest.approx(gradient_norms(undisturbed)[128], rel=1e-4)
    ours, theirs = (torch.cat([t.flatten() for t in nets_of(r["run_uri"]).values()]) for r in (other, undisturbed))
    # the sign of L1 lets rounding grow over 128 steps; stepping once per micro-batch instead would make this 0.2
    assert torch.linalg.norm(ours - theirs) < 0.02 * torch.linalg.norm(theirs)


def train_workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def killed(dataset: str, storage: Path, ray_cluster: str) -> dict[str, Any]:
    """A run of which one worker meets SIGKILL once two checkpoints are committed, between two of them."""
    pids: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not pids:
            committed = list((storage / "killed").glob("checkpoint_*/checkpoint.json"))
            if len(committed) == 2 and (workers := train_workers()):
                time.sleep(0.3)  # into the steps after it
                pids.append(workers[-1].pid)
                os.kill(workers[-1].pid, signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    result = run(dataset, storage, 2, "killed")
    thread.join()
    assert len(pids) == 1
    return result


def test_a_killed_worker_costs_nothing(
    killed: dict[str, Any], undisturbed: dict[str, Any], chains: dict[int, str]
) -> None:
    starts = read_position(killed["run_uri"]).starts
    assert len(starts) == 2, "two attempts"
    assert (starts[0].step, starts[1].world_size) == (0, 2)
    assert starts[1].step == 2 * EVERY // 8, "it went on from the second checkpoint, not from the beginning"
    assert killed["chain"] == undisturbed["chain"] == chains[TOTAL]  # each (step, micro-batch) once, in order
    ours, theirs = nets_of(killed["run_uri"]), nets_of(undisturbed["run_uri"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "bitwise where the undisturbed run ended"
    images = [c.images_seen for c in checkpoint.checkpoints(killed["run_uri"])]
    assert sorted(images) == [EVERY, 2 * EVERY, 3 * EVERY, TOTAL]


def test_metrics_of_a_replayed_step_are_logged_once(killed: dict[str, Any]) -> None:
    client = MlflowClient(killed["tracking_uri"])
    steps = [m.step for m in client.get_metric_history(killed["mlflow_run_id"], "loss/l1")]
    assert steps == list(range(128, TOTAL + 1, 128))
    mlflow_run = client.get_run(killed["mlflow_run_id"])
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["task.features"] == "24"
    assert mlflow_run.inputs.dataset_inputs
    files = {f.path for f in client.list_artifacts(killed["mlflow_run_id"])}
    assert {"recipe.json", "samples", "data_sheet.png"} <= files
    known = {"validation/psnr_y", "progress/images_per_s", "progress/eta_s", "learning_rate/g", "grad_norm/g"}
    assert known | {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= set(
        mlflow_run.data.metrics
    )
    assert mlflow_run.data.metrics["progress/eta_s"] == 0.0


def test_a_task_that_cannot_take_its_batch_is_refused_before_anything_starts(dataset: str, storage: Path) -> None:
    """Two steps down and up again: 48 px are no multiple of 32."""
    wrong = ["data.hr_crop_px=48", "task.levels=5"]
    with pytest.raises(ConfigError, match=r"task=.*turn 'g' must take lr \(2, 3, \d+, \d+\), hr"):
        train(recipe="rayscale.recipes.unet:tiny", data=[dataset], settings=wrong, name="wrong", storage=str(storage))


def test_a_finished_run_says_so_and_an_edited_one_is_refused(
    dataset: str, storage: Path, undisturbed: dict[str, Any]
) -> None:
    again = run(dataset, storage, 2, "undisturbed")
    assert again["mlflow_run_id"] == undisturbed["mlflow_run_id"]
    assert (again["images_seen"], again["chain"]) == (TOTAL, undisturbed["chain"])
    assert len(read_position(undisturbed["run_uri"]).starts) == 1
    with pytest.raises(ConfigError, match=r"task\.features: 24 -> 9.*--rebase"):
        run(dataset, storage, 2, "undisturbed", "task.features=9")


@pytest.mark.long
def test_a_diverging_run_ends_at_once_and_names_the_remedy(dataset: str, storage: Path) -> None:
    with pytest.raises(DivergedError, match=r"--rebase with a lower task\.optimizer\.learning_rate"):
        run(dataset, storage, 1, "diverged", "task.optimizer.learning_rate=1e30", "task.clip_norm=none")
    assert len(read_position(str(storage / "diverged")).starts) == 1, "not tried again"


def test_a_group_that_leaves_ray_data_no_cpu_is_refused_with_the_sum(dataset: str, storage: Path) -> None:
    said = r"--workers=4: x 1 CPUs = 4, and Ray Data needs 1 more: the cluster has 4 on 1 node"
    with pytest.raises(ResourceError, match=said):
        train(recipe=RECIPE, data=[dataset], storage=str(storage), name="greedy", workers=4, cpus_per_worker=1.0)
    assert not (storage / "greedy").exists()


def test_a_worker_larger_than_any_node_is_refused(dataset: str, storage: Path) -> None:
    with pytest.raises(ResourceError, match=r"--cpus-per-worker=9.*the largest has 4"):
        train(recipe=RECIPE, data=[dataset], storage=str(storage), name="giant", cpus_per_worker=9.0)


def test_a_rebase_to_weights_that_do_not_fit_changes_nothing(
    dataset: str, storage: Path, undisturbed: dict[str, Any]
) -> None:
    before = (storage / "undisturbed/run.json").read_bytes()
    with pytest.raises(IntegrityError, match="does not fit this recipe"):
        train(recipe=RECIPE, data=[dataset], settings=[*SLOWER, "task.features=9"], name="undisturbed",
              storage=str(storage), rebase=True)  # fmt: skip
    assert (storage / "undisturbed/run.json").read_bytes() == before


def test_best_by_an_unknown_metric_is_refused(dataset: str, storage: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.best_metric=psnr: no such metric of this model; did you mean 'psnr_[a-z]+'"
    ):
        run(dataset, storage, 1, "metric", "run.best_metric=psnr")


def test_too_many_workers_and_a_wrong_scale_are_refused_before_anything_starts(dataset: str, storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"--workers=5: .*data\.virtual_shards=4"):
        run(dataset, storage, 5, "crowd")
    with pytest.raises(ConfigError, match=r"data\.degradation=scale 2: the model's scale is 3"):
        run(dataset, storage, 1, "scale", "task.scale=3")
    assert not (storage / "crowd").exists()
    assert not (storage / "scale").exists()


def test_best_needs_something_to_be_scored_on(photo_folder: Path, tmp_path: Path) -> None:
    from rayscale.data.pack import pack
    from rayscale.data.scan import PackSettings

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/train").symlink_to(photo_folder / "train")
    pack(str(tmp_path / "photos"), str(tmp_path / "out"), PackSettings(split="folder", min_side=64))
    with pytest.raises(ConfigError, match=r"run\.ship=best: needs a validation split"):
        train(recipe=RECIPE, data=[str(tmp_path / "out")], storage=str(tmp_path / "runs"))


@pytest.mark.long
def test_damaged_photos_are_replaced_within_a_budget_and_stop_the_run_beyond_it(
    dataset: str, storage: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    photos = open_split(str(copy), "train")
    index = photos._index
    for image in (2, 7):
        shard = copy / index.shards[index.shard[image]]
        data = bytearray(shard.read_bytes())
        data[index.offset[image] + 200] ^= 1
        shard.write_bytes(data)
    short = ("run.total_images=256", "run.log_every_images=128")
    with pytest.raises(DamageError, match=r"run\.damage_budget=0\.001: [12] of 12 photos are damaged.*repair"):
        run(str(copy), storage, 2, "spoiled", *short)
    assert len(read_position(str(storage / "spoiled")).starts) == 1, "not tried again"
    assert not checkpoint.checkpoints(str(storage / "spoiled"))
    result = run(str(copy), storage, 2, "mended", *short, "run.damage_budget=0.2")
    assert result["images_seen"] == 256
    ledger = json.loads((storage / "mended/ledger.json").read_text())
    assert set(ledger) == {photos.keys[2], photos.keys[7]}
