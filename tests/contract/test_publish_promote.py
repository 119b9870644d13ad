"""From a run's folder to a moved alias, on real photos, ONNX and MLflow; and every way in which it must not move."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.artifacts import download_artifacts
from torch import nn

from rayscale import recipes
from rayscale.cli import reported
from rayscale.cli.models import rollback
from rayscale.cli.promote import promote
from rayscale.cli.publish import publish
from rayscale.cli.recipes import recipes as list_recipes
from rayscale.cli.train import train
from rayscale.contract import digest, dumps
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, GateError, IntegrityError, MissingError
from rayscale.registry import moves
from rayscale.registry.models import Registry
from rayscale.tracking import Tracker
from rayscale.train.checkpoint import CheckpointInfo, save
from rayscale.train.record import RunRecord, open_run, write_run

TINY = "rayscale.recipes.compact:tiny"
LAX = ("gate.min_gain_db_over_baseline=-20", "gate.max_image_loss_db=20", "gate.also_margin=1",
       "gate.max_latency_ratio=none")  # fmt: skip


def nearest_neighbour(net: nn.Module) -> None:
    """A fresh net of the family repeats pixels: worse than bicubic."""


def better(net: nn.Module) -> None:
    """Bilinear interpolation by hand: what nearest neighbour lacks, as the net's residual."""
    with torch.no_grad():
        for layer in net.body:
            if isinstance(layer, nn.Conv2d):
                layer.weight.zero_()
                layer.bias.zero_()
        first, last = net.body[0], net.body[-2]
        for colour in range(3):
            first.weight[colour, colour, 1, 1] = 1.0  # values are positive: PReLU leaves them alone
            for layer in net.body[2:-2:2]:
                layer.weight[colour, colour, 1, 1] = 1.0
            for dy in (0, 1):
                for dx in (0, 1):
                    kernel = last.weight[4 * colour + 2 * dy + dx, colour]
                    kernel[1, 1] = 9 / 16 - 1
                    kernel[2 * dy, 1] = kernel[1, 2 * dx] = 3 / 16
                    kernel[2 * dy, 2 * dx] = 1 / 16


@pytest.fixture
def make_run(mlflow_home: Path, dataset: str, tmp_path: Path) -> Callable[..., str]:
    """A finished run as `train` leaves it, its weights set by hand."""

    def make(name: str, weights: Callable[[Any], None], overrides: tuple[str, ...] = LAX) -> str:
        recipe = recipes.load(TINY, overrides)
        uri, photos = tmp_path / "runs" / name, open_split(dataset, "train")
        tracker = Tracker.start("training", name)
        tracker.finish()
        record = RunRecord(
            name=name,
            uri=str(uri),
            recipe=TINY,
            overrides=overrides,
            recipe_digest=digest(recipes.resolved(recipe)),
            resolved=json.loads(dumps(recipes.resolved(recipe))),
            datasets=(dataset,),
            manifest_digest=photos.manifest.digest,
            plan_digest="",
            tracking_uri=tracker.uri,
            mlflow_run_id=tracker.run_id,
            code_version="1",
            status="finished",
        )
        torch.manual_seed(0)
        nets = recipe.task.build(torch.device("cpu"))
        for net in nets.values():
            weights(net)
        folder = uri / "checkpoint_1"
        folder.mkdir(parents=True)
        info = CheckpointInfo(images_seen=8, position=1, plan_digest="", recipe_digest=record.recipe_digest,
                              code_version="1", chain="", metrics={"psnr_y": 1.0}, files={})  # fmt: skip
        save(folder, nets, {}, info)
        write_run(record)
        return str(uri)

    return make


def promotions(registry: Registry) -> list[Any]:
    experiment = registry.client.get_experiment_by_name("promotions")
    return [] if experiment is None else list(registry.client.search_runs([experiment.experiment_id]))


def test_a_first_champion_then_a_better_one_but_never_a_worse_one(
    make_run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = publish(make_run("old", nearest_neighbour), "photos-x2", licence="MIT")
    assert (old["model"], old["version"], old["also"]) == ("photos-x2", 1, [])
    assert old["parity_max_abs"] < 1e-5
    assert old["images"] == 2
    assert old["psnr_y"] < old["baseline_psnr_y"] - 0.5  # nearest neighbour is that much worse than bicubic
    registry = Registry()
    assert registry.resolve("photos-x2:1").run_id == old["run_id"]
    files = {f.path for f in registry.client.list_artifacts(old["run_id"], "models")}
    assert sum("scores-" in f for f in files) == 2

    first = promote("photos-x2")
    assert (first["promoted"], first["before"], first["version"]) == (True, None, 1)
    assert first["psnr_y"] == pytest.approx(old["psnr_y"], abs=1e-9)  # scored anew on what was published

    new = publish(make_run("new", better), "photos-x2", licence="MIT")
    assert new["version"] == 2
    assert new["psnr_y"] > old["psnr_y"] + 0.1
    dry = promote("photos-x2:2", dry_run=True)
    assert (dry["promoted"], dry["run_id"]) == (False, "")
    assert registry.aliases("photos-x2") == {"champion": 1}
    assert len(promotions(registry)) == 1
    moved = promote("photos-x2:2")
    assert (moved["promoted"], moved["before"]) == (True, 1)
    assert registry.aliases("photos-x2") == {"champion": 2}
    assert promote("photos-x2")["already"]

    with pytest.raises(GateError) as held:
        promote("photos-x2:1")
    assert held.value.exit_code == 3
    for rule in ("psnr_y gain over champion, lower 95% bound", "photos-x2:1 -> champion", "report is MLflow run"):
        assert rule in str(held.value)
    assert "\n" not in str(held.value)
    assert registry.aliases("photos-x2") == {"champion": 2}

    assert [(m.decision, m.moved, m.before, m.version) for m in moves.read(registry, "photos-x2")] == [
        ("promote", True, None, 1), ("promote", True, 1, 2), ("hold", False, 2, 1)]  # fmt: skip
    assert rollback("photos-x2", "colours")["version"] == 1
    registry.client.set_registered_model_alias("photos-x2", "champion", "2")
    runs = [run for run in promotions(registry) if run.data.tags["decision"] != "rollback"]
    assert sorted((r.data.tags["decision"], r.data.tags.get("moved", "no")) for r in runs) == [
        ("hold", "no"), ("promote", "yes"), ("promote", "yes")]  # fmt: skip
    (tmp_path / "report").mkdir()
    download_artifacts(run_id=runs[0].info.run_id, dst_path=str(tmp_path / "report"), tracking_uri=registry.uri)
    report = tmp_path / "report"
    text = (report / "report.md").read_text()
    assert "| published | psnr_y gain over champion, lower 95% bound |" in text
    rows = json.loads((report / "report.json").read_text())["rows"]
    assert sum(not row["passed"] for row in rows) == text.count("**NO**") > 0
    assert {p.name for p in report.iterdir()} == {
        "report.md", "report.json", "gate.json", "samples.png", "published", "cost"}  # fmt: skip
    assert {p.stem for p in (report / "published/scores").iterdir()} == {"baseline", "candidate", "champion"}

    with pytest.raises(BaseException) as exit_of_command:  # as the command line sees it
        reported(promote)("photos-x2:1")
    assert getattr(exit_of_command.value, "exit_code", None) == 3
    assert capsys.readouterr().err.count("error: promote=photos-x2:1 -> champion") == 1


def test_publishing_again_makes_no_second_version(make_run: Callable[..., str]) -> None:
    uri = make_run("r", better)
    first, again = publish(uri, "m", licence="MIT"), publish(uri, "m", licence="MIT")
    assert (again["version"], again["digest"]) == (first["version"], first["digest"])
    assert publish(uri, "m", licence="Apache-2.0")["version"] == 2  # control: another card is another version


def test_the_recipes_own_gate_decides(make_run: Callable[..., str]) -> None:
    """Without the lax overrides the same weights are held against bicubic; without a licence too."""
    publish(make_run("strict", nearest_neighbour, ()), "m")
    with pytest.raises(GateError) as held:
        promote("m")
    assert "gain over baseline, mean" in str(held.value)
    assert "licence: missing" in str(held.value)
    assert Registry().aliases("m") == {}


def test_what_cannot_be_published(make_run: Callable[..., str], tmp_path: Path) -> None:
    uri = make_run("r", better)
    record_file = Path(uri) / "run.json"
    good = record_file.read_text()
    edited = json.loads(good) | {"overrides": [*LAX, "task.features=9"]}
    record_file.write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"edited since the run.*task\.features"):
        publish(uri, "m")
    record_file.write_text(good)
    with pytest.raises(ConfigError, match="did you mean 'best'"):
        publish(uri, "m", which="bets")
    with pytest.raises(MissingError, match=r"run\.json"):
        publish(str(tmp_path / "nowhere"), "m")
    with pytest.raises(MissingError):
        publish(uri, "m", photos=str(tmp_path / "no dataset"))
    nets = Path(uri) / "checkpoint_1" / "nets.safetensors"
    data = bytearray(nets.read_bytes())
    data[-1] ^= 1
    nets.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        publish(uri, "m")
    assert Registry().names() == ()  # nothing half-published


def test_an_edited_gate_needs_no_training(make_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make_run("r", better)
    recipe = recipes.load(TINY, LAX)

    def edit(**changes: Any) -> None:
        monkeypatch.setattr(recipes, "load", lambda *_: dataclasses.replace(recipe, **changes))

    gate = dataclasses.replace(recipe.gate, margin_vs_champion=0.123)
    edit(gate=gate)
    version = Registry().resolve(f"m:{publish(uri, 'm', licence='MIT')['version']}")
    assert json.loads(version.tags["gate"])["margin_vs_champion"] == 0.123

    edit(gate=gate, run=dataclasses.replace(recipe.run, seed=5))  # control: by this it would be trained otherwise
    said = rf"run\.seed: .* -> 5; .*train --name r --rebase` and run\.total_images above {recipe.run.total_images}"
    with pytest.raises(ConfigError, match=said):
        publish(uri, "m")
    write_run(dataclasses.replace(open_run(uri), status="running"))
    with pytest.raises(ConfigError, match=r"train --name r --rebase`$"):
        publish(uri, "m")


def test_a_rebase_that_would_train_nothing_changes_nothing(
    make_run: Callable[..., str], dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_run("r", better)  # has seen 8 images
    before = (Path(uri) / "run.json").read_bytes()

    def rebase(total_images: int) -> None:
        settings = [*LAX, f"run.total_images={total_images}", "run.seed=5"]
        train(recipe=TINY, data=[dataset], settings=settings, name="r", storage=str(tmp_path / "runs"), rebase=True)

    def reached(*_: object) -> None:
        raise RuntimeError("would train")

    monkeypatch.setattr("rayscale.cli.train.check_disk", reached)
    with pytest.raises(ConfigError, match=r"run\.total_images=8: the run has seen 8 images, .*raise it above 8"):
        rebase(8)
    with pytest.raises(RuntimeError, match="would train"):  # control: with images left it goes on
        rebase(9)
    assert (Path(uri) / "run.json").read_bytes() == before


def test_what_cannot_be_promoted(make_run: Callable[..., str]) -> None:
    made = publish(make_run("r", better), "photos-x2", licence="MIT")
    for reference, says in (("phots-x2", "did you mean 'photos-x2'"), ("photos-x2:9", "there are 1")):
        with pytest.raises(MissingError, match=says):
            promote(reference)
    with pytest.raises(ConfigError, match="--alias"):
        promote("photos-x2", alias="latest")
    with pytest.raises(ConfigError, match="--device"):
        promote("photos-x2", device="gpu")
    stored = Path(made["uri"].removeprefix("file://")) / "model.onnx"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x00")
    registry = Registry()
    with pytest.raises(IntegrityError):
        promote("photos-x2")
    assert registry.aliases("photos-x2") == {}


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = list_recipes()["recipes"]
    assert found[TINY].startswith("Seconds on one core")
    assert all(found.values()), "a recipe without a docstring says nothing in the list"
    assert f"{TINY}" in capsys.readouterr().out
    assert dataclasses.is_dataclass(recipes.load(TINY))
