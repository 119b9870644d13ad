"""Our share of a training step: worker CPU through Ray Train against the same loop in plain torch.

python tests/benchmarks/train.py [--rounds 5] [--recipe MODULE:FUNCTION]    # the last line is one JSON object

Both sides are clocked alike, from step `SKIP` to the end, in CPU-ms of the process that trains: plain runs the loop on
batches made before, the worker takes them from Ray Data (whose own processes are another matter: data.py). The sides
take turns, so that a busy machine is busy for both; `ray_over_plain` is the median of the rounds' ratios. Then images
a CPU second of every family's `tiny` recipe in the plain loop, clocked alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import cv2
import numpy as np
import ray
import skimage.data
import torch

from rayscale import recipes
from rayscale.cli import train as cli
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.pack import pack
from rayscale.data.sample import MicroBatch, render_window
from rayscale.data.scan import PackSettings
from rayscale.recipes import Recipe, discover
from rayscale.task import Batch, Losses
from rayscale.train.loop import RunSettings, build_state, fit

SKIP, STEPS = 40, 160  # steps before the clock starts, and in all


@dataclass(frozen=True)
class Clocked:
    """A task that writes the CPU time of its process down at step SKIP and at the last one."""

    task: Any
    out: str
    losses: int  # that one step asks for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "task" not in self.__dict__:  # half unpickled
            raise AttributeError(name)
        return getattr(self.task, name)

    def loss(self, turn: str, nets: Mapping[str, torch.nn.Module], batch: Batch) -> Losses:
        calls = self.__dict__.setdefault("calls", [0])
        if calls[0] in (SKIP * self.losses, (STEPS - 1) * self.losses):
            with Path(self.out).open("a") as file:
                file.write(f"{time.process_time()}\n")
        calls[0] += 1
        found: Losses = self.task.loss(turn, nets, batch)
        return found


def cpu_ms_a_step(out: str) -> float:
    first, last = map(float, Path(out).read_text().split())
    return (last - first) * 1e3 / (STEPS - 1 - SKIP)


class Silent:
    """Hooks of a run that nobody watches."""

    def stepped(self, images_seen: int) -> bool:
        return False

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None: ...

    def validate(self, images_seen: int, nets: Mapping[str, torch.nn.Module]) -> dict[str, float]:
        return {}

    def checkpoint(self, state: Any, images_seen: int, metrics: Mapping[str, float]) -> None: ...


def batches(photos: Mixture, recipe: Recipe, num_steps: int) -> Iterator[list[MicroBatch]]:
    """Of every step; at most 32 different ones, over and over."""
    plan, shards = photos.plan(recipe.data), range(recipe.data.virtual_shards)
    made: list[list[MicroBatch]] = []
    w = 0
    while len(made) < min(32, num_steps):
        rows = zip(*(render_window(photos, plan, w, v, 0, plan.rows) for v in shards), strict=True)
        made, w = made + [list(row) for row in rows], w + 1
    for step in range(num_steps):
        yield [replace(batch, step=step) for batch in made[step % len(made)]]


def plain(data: str, name: str, out: str) -> None:
    recipe = recipes.load(name)
    task: Any = Clocked(recipe.task, out, losses_a_step(recipe))
    run, cpu = settings(recipe), torch.device("cpu")
    torch.set_num_threads(1)
    given = list(batches(open_mixture((data,), "train"), recipe, STEPS))
    fit(task, run, build_state(task, run, cpu), iter(given), global_batch=recipe.data.global_batch,
        shards=recipe.data.virtual_shards, device=cpu, hooks=Silent())  # fmt: skip


def losses_a_step(recipe: Recipe) -> int:
    return recipe.data.virtual_shards * len(recipe.task.turns)


def settings(recipe: Recipe) -> RunSettings:
    """As the recipe has them; no upkeep within the clocked steps."""
    total = STEPS * recipe.data.global_batch
    return replace(recipe.run, total_images=total, validate_every_images=total, checkpoint_every_images=total,
                   ship="last", damage_budget=1.0)  # fmt: skip


def through_ray(data: str, name: str, out: str, storage: str) -> None:
    loaded = recipes.load(name)

    def clocked(*_: Any) -> Recipe:
        task = Clocked(loaded.task, out, losses_a_step(loaded))
        return replace(loaded, task=task, run=settings(loaded))

    job = cli._job(clocked(), cli._identify(name, (), loaded, open_mixture((data,), "train"), Path(out).stem, storage),
                   open_mixture((data,), "train"), cli.Placement(threads=1))  # fmt: skip
    job = replace(job, record=cli._tracked(job.record, job.tracking_uri, "benchmark", loaded, job.photos))
    cli.run_to_end(job)


def make_data(root: Path) -> str:
    sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    for i in range(64):
        source = sources[i % 4]
        y, x = (37 * i) % (source.shape[0] - 160), (53 * i) % (source.shape[1] - 160)
        path = root / "photos" / f"class{i % 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.ascontiguousarray(source[y : y + 160, x : x + 160, ::-1]))
    pack(str(root / "photos"), str(root / "data"), PackSettings(validation_fraction=0.0, test_fraction=0.0))
    return str(root / "data")


def in_a_process(function: Any, *arguments: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{arguments} ended with {process.exitcode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="rayscale.recipes.compact:demo")
    given = parser.parse_args()
    root, temp = Path(tempfile.mkdtemp(prefix="rayscale-train-")), tempfile.mkdtemp(prefix="rs", dir="/tmp")
    os.environ["RAYSCALE_HOME"], os.environ["MLFLOW_TRACKING_URI"] = str(root), f"sqlite:///{root}/mlflow.db"
    try:
        data = make_data(root)
        ray.init(num_cpus=3, object_store_memory=500 << 20, include_dashboard=False, logging_level="ERROR",
                 log_to_driver=False, _temp_dir=temp)  # fmt: skip
        sides: dict[str, list[float]] = {"plain": [], "ray": []}
        for number in range(given.rounds):
            outs = {side: str(root / f"{side}{number}") for side in sides}
            in_a_process(plain, data, given.recipe, outs["plain"])
            through_ray(data, given.recipe, outs["ray"], str(root / "runs"))
            for side, out in outs.items():
                sides[side].append(cpu_ms_a_step(out))
            print({side: round(values[-1], 2) for side, values in sides.items()}, flush=True)
        ray.shutdown()
        rates = {}
        for name in (name for name in discover() if name.endswith(":tiny")):
            family = name.removeprefix("rayscale.recipes.").removesuffix(":tiny")
            in_a_process(plain, data, name, out := str(root / f"rate-{family}"))
            rates[family] = round(recipes.load(name).data.global_batch / cpu_ms_a_step(out) * 1e3, 1)
        result = {
            "ray_over_plain": round(median(r / p for r, p in zip(sides["ray"], sides["plain"], strict=True)), 3),
            "plain_cpu_ms_a_step": round(median(sides["plain"]), 2),
            "ray_cpu_ms_a_step": round(median(sides["ray"]), 2),
            "images_per_cpu_s": rates,
        }
        print(json.dumps(result))
    finally:
        ray.shutdown()
        for folder in (root, Path(temp)):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
