"""What a recipe is worth: trained here without Ray, exported, scored on held-out photos beside the classical methods.

python tests/benchmarks/quality.py rayscale.recipes.compact:demo DATASET [--test DATASET] [--out FOLDER]
                                   [--set path=value ...] [--threads 2] [--features model.onnx --features-px 64]

Of a generator with classes it is told how many of its samples a classifier of photos puts into theirs.

DATASET: as `rayscale data pack` makes them; scored is the test split. The artifact is scored, as publishing does. The
last line is one JSON object; FOLDER/NAME.png shows samples. Evaluation data is nobody's to pass on: nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rayscale import artifact, recipes
from rayscale.contract import ModelCard
from rayscale.data.cut import check_sizes
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.sample import MicroBatch, render_window
from rayscale.evaluate import compare, generated, score_baseline, score_model, session_model, show, suite_for
from rayscale.evaluate.model import Model
from rayscale.evaluate.suite import Suite, pairs
from rayscale.export import to_onnx
from rayscale.features import FeatureNet, open_features
from rayscale.imaging import U8, encode
from rayscale.metrics import psnr
from rayscale.observe import progress
from rayscale.recipes import Recipe
from rayscale.task import Batch, Judging
from rayscale.train.loop import State, build_state, fit

CLASSIFIER_EPOCHS = 15


class Watched:
    """Hooks that show where the run is."""

    def __init__(self, shown: Any) -> None:
        self.shown, self.note = shown, ""

    def stepped(self, images_seen: int) -> bool:
        self.shown.update(min(images_seen, self.shown.total), self.note)
        return False

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        self.note = " ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in metrics.items() if k.startswith("loss/"))

    def validate(self, images_seen: int, nets: Mapping[str, nn.Module]) -> dict[str, float]:
        return {}

    def checkpoint(self, state: State, images_seen: int, metrics: Mapping[str, float]) -> None: ...


def steps(photos: Mixture, recipe: Recipe) -> Iterator[list[MicroBatch]]:
    """The planned sequence; the next windows are made while this one trains."""
    plan, shards = photos.plan(recipe.data), recipe.data.virtual_shards

    def window(w: int) -> list[list[MicroBatch]]:
        made = [list(render_window(photos, plan, w, v, 0, plan.rows)) for v in range(shards)]
        return [list(row) for row in zip(*made, strict=True)]

    with ThreadPoolExecutor(1) as pool:
        w, coming = 0, pool.submit(window, 0)
        while True:
            rows, w = coming.result(), w + 1
            coming = pool.submit(window, w)
            yield from rows


def in_class(model: Model, suite: Suite) -> dict[str, float]:
    """Shares that a small classifier, trained on the training photos, puts into their class: samples, held-out photos.

    The samples' classes take turns.
    """
    train, held_out = (list(pairs(replace(suite, split=split))) for split in ("train", suite.split))
    classes = sorted({pair.label for pair in train})
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Dropout(0.3), nn.Flatten(), nn.LazyLinear(len(classes)))

    def tensor(pictures: Sequence[U8]) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def share(pictures: Sequence[U8], labels: Sequence[int]) -> float:
        with torch.no_grad():
            return round(float((net.eval()(tensor(pictures)).argmax(1) == torch.tensor(labels)).float().mean()), 4)

    x, y = tensor([pair.hr for pair in train]), torch.tensor([classes.index(pair.label) for pair in train])
    net(x[:2])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(CLASSIFIER_EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            batch = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, x[rows], x[rows].flip(3))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net.train()(batch), y[rows]).backward()
            optimizer.step()
    made = generated.samples(model, generated.LEAST_SAMPLES)
    return {
        "samples": share(made, [i % len(classes) for i in range(len(made))]),
        "photos": share([pair.hr for pair in held_out], [classes.index(pair.label) for pair in held_out]),
        "chance": round(1 / len(classes), 4),
    }


def held_out(task: Judging, nets: Mapping[str, nn.Module], suite: Suite) -> dict[str, float]:
    """What the family's nets say of held-out photos, and what the mean training photo is worth for each of them."""
    train, found = (np.stack([p.hr for p in pairs(replace(suite, split=split))]) for split in ("train", suite.split))
    batch = Batch({"hr": torch.from_numpy(found).movedim(-1, 1) / 255}, 0)
    mean = train.mean(axis=0).round().astype(np.uint8)
    told = {**task.held_out(nets, batch, train), "mean_photo_psnr_rgb": np.mean([psnr(mean, photo) for photo in found])}
    return {name: round(float(value), 4) for name, value in told.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("data")
    parser.add_argument("--test", default="")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--features", default="")
    parser.add_argument("--features-px", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = recipes.load(given.recipe, given.set)
    photos, cpu = open_mixture((given.data,), "train"), torch.device("cpu")
    check_sizes(photos.parts[0], recipe.data)
    start, start_cpu = time.perf_counter(), time.process_time()
    with progress("training", recipe.run.total_images, "images") as shown:
        state = fit(recipe.task, recipe.run, build_state(recipe.task, recipe.run, cpu), steps(photos, recipe),
                    global_batch=recipe.data.global_batch, shards=recipe.data.virtual_shards, device=cpu,
                    hooks=Watched(shown))  # fmt: skip
    result: dict[str, Any] = {
        "recipe": " ".join((given.recipe, *given.set)),
        "train_s": round(time.perf_counter() - start, 1),
        "train_cpu_s": round(time.process_time() - start_cpu, 1),
        "images": recipe.run.total_images,
    }
    if isinstance(recipe.task, Judging):
        whole = suite_for(recipe.task.specs[""], recipe.data, given.test or given.data, "test")
        result["held_out"] = held_out(recipe.task, state.nets, whole)
    for function, module in recipe.task.shipped(state.nets).items():
        spec = recipe.task.specs[function]
        suite = suite_for(spec, recipe.data, given.test or given.data, "test")
        if given.features:
            suite = replace(suite, features=FeatureNet(uri=given.features, side_px=given.features_px))
        with tempfile.TemporaryDirectory() as scratch:
            to_onnx(module, ModelCard(family=recipe.task.family, spec=spec, licence="-"), Path(scratch, "model"))
            model = session_model(artifact.load(Path(scratch, "model")))
            scores = {"classical": score_baseline(spec, suite), "model": score_model(model, suite, "model")}
            print(f"\n{function or 'model'}:\n{compare(scores)}", flush=True)
            figures = {
                metric: {name: round(one.mean(metric), 4) for name, one in scores.items()}
                for metric in scores["model"].metrics
                if metric in scores["classical"].metrics
            }
            result[function or "model"] = {"against": scores["classical"].subject, **figures}
            if spec.kind == "generate":
                result["features"] = open_features(suite.features).name
                if any(tensor.name == "label" for tensor in spec.inputs):
                    result["in_class"] = in_class(model, suite)
            given.out.mkdir(parents=True, exist_ok=True)
            name = given.recipe.rpartition(".")[2].replace(":", "-") + (f"-{function}" if function else "")
            Path(given.out, f"{name}.png").write_bytes(encode(show({"model": model}, suite), "png"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
