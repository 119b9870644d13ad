"""Checkpoints: one that does not verify is none, aloud; the one before is taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayscale import contract
from rayscale.data.plan import DataSettings
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError, UnavailableError
from rayscale.task import Optimizer
from rayscale.tasks.compact import Compact
from rayscale.train import checkpoint
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.identity import claim, default_name, run_uri
from rayscale.train.job import Job, Placement, check_steps_left
from rayscale.train.loop import RunSettings, build_state
from rayscale.train.record import RunRecord, Start, open_run, read_position, write_position, write_run

TASK = Compact(scale=2, features=4, blocks=1, optimizer=Optimizer())
INFO = CheckpointInfo(
    images_seen=0, position=0, plan_digest="", recipe_digest="", code_version="", chain="", metrics={}, files={}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with checkpoints at 100 (25 dB), 200 (27 dB) and 300 (26 dB) images."""
    for images, db in ((100, 25.0), (200, 27.0), (300, 26.0)):
        path = tmp_path / f"checkpoint_{images}"
        path.mkdir()
        state = build_state(TASK, RunSettings(seed=images), torch.device("cpu"))
        info = replace(INFO, images_seen=images, metrics={"psnr_y": db})
        checkpoint.save(path, state.nets, state.optimizers, info)
    return tmp_path


def test_best_and_last(folder: Path) -> None:
    assert checkpoint.select(str(folder), "last").images_seen == 300
    assert checkpoint.select(str(folder), "best").images_seen == 200
    with pytest.raises(MissingError, match=r"run\.best_metric=ssim_y: the checkpoints have scores by \['psnr_y'\]"):
        checkpoint.select(str(folder), "best", metric="ssim_y")


@pytest.mark.parametrize("order", [(100, 200, 300), (300, 100, 200), (200, 300, 100)])
def test_a_score_that_is_not_finite_is_never_the_best(folder: Path, order: tuple[int, ...]) -> None:
    for images, db in zip(order, (25.0, float("nan"), 27.0), strict=True):
        rewrite(folder, images, metrics={"psnr_y": db})
    assert checkpoint.select(str(folder), "best").images_seen == order[2]


def test_scores_from_before_a_rebase_do_not_count(folder: Path) -> None:
    rewrite(folder, 300, recipe_digest="new", plan_digest="p")
    found = checkpoint.select(str(folder), "best", recipe_digest="new", plan_digest="p")
    assert found.images_seen == 300
    said = "the run has none since its recipe or data were edited, at 300 images; .*run.total_images above"
    with pytest.raises(MissingError, match=said):
        checkpoint.select(str(folder), "last", recipe_digest="newer")


def rewrite(folder: Path, images: int, **changes: object) -> None:
    """Edit a checkpoint's metadata; its files and their checksums stay as they are."""
    path = folder / f"checkpoint_{images}/checkpoint.json"
    info = contract.loads(CheckpointInfo, path.read_text(), "test")
    path.write_text(contract.dumps(replace(info, **changes)))  # type: ignore[arg-type]


def test_an_outage_is_not_taken_for_damage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would begin at image 0 because its storage was away for a minute."""

    def away(*_: object) -> None:
        raise UnavailableError("s3://bucket", 503, "does not answer", "try again")

    monkeypatch.setattr(checkpoint, "download_dir", away)
    with pytest.raises(UnavailableError):
        checkpoint.newest(str(folder), tmp_path / "scratch")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder: Path, tmp_path: Path) -> None:
    for nets in folder.glob("*/nets.safetensors"):
        nets.write_bytes(nets.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="3 checkpoints: none of them verifies"):
        checkpoint.newest(str(folder), tmp_path / "scratch")


def test_hyperparameters_are_the_recipes_not_the_checkpoints(folder: Path) -> None:
    edited = replace(TASK, optimizer=Optimizer(weight_decay=0.1, betas=(0.5, 0.5)))
    state = build_state(edited, RunSettings(), torch.device("cpu"))
    checkpoint.restore(folder / "checkpoint_300", state.nets, state.optimizers)
    group = state.optimizers["g"].param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.1, (0.5, 0.5))


@pytest.mark.parametrize("damage", ["flip", "truncate", "no file", "no checkpoint.json", "half a checkpoint.json"])
def test_the_checkpoint_before_a_damaged_one_is_taken_aloud(
    folder: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.log, "propagate", True)
    newest = folder / "checkpoint_300"
    nets = newest / "nets.safetensors"
    if damage == "flip":
        data = bytearray(nets.read_bytes())
        data[-3] ^= 1
        nets.write_bytes(data)
    elif damage == "truncate":
        nets.write_bytes(nets.read_bytes()[:-10])
    elif damage == "no file":
        nets.unlink()
    elif damage == "no checkpoint.json":
        (newest / "checkpoint.json").unlink()
    else:
        text = (newest / "checkpoint.json").read_text()
        (newest / "checkpoint.json").write_text(text[: len(text) // 2])
    found = checkpoint.newest(str(folder), tmp_path / "scratch")
    assert found is not None
    assert found.images_seen == 200
    if damage != "no checkpoint.json":  # that one was never finished: nothing to warn of
        assert "skipping a damaged checkpoint" in caplog.text


def test_an_undamaged_newest_one_is_taken(folder: Path, tmp_path: Path) -> None:
    """Negative control of the test above."""
    found = checkpoint.newest(str(folder), tmp_path / "scratch")
    assert found is not None
    assert found.images_seen == 300


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path), tmp_path / "scratch") is None
    with pytest.raises(MissingError, match="the run has none"):
        checkpoint.select(str(tmp_path), "last")


def test_nets_of_another_recipe_are_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(IntegrityError, match=r"net net=.*does not fit this recipe") as caught:
        checkpoint.load_nets(checkpoint.select(str(folder), "last"), replace(TASK, features=5))
    assert "\n" not in str(caught.value)


def test_every_start_is_kept(tmp_path: Path) -> None:
    assert read_position(str(tmp_path)).starts == ()
    starts = tuple(Start(step=s, checkpoint="", world_size=2, unix=float(s)) for s in (0, 5))
    for start in starts:
        write_position(str(tmp_path), start)
    assert read_position(str(tmp_path)).starts == starts


def record(tmp_path: Path, **changes: object) -> RunRecord:
    base = RunRecord(
        name="mine", uri=str(tmp_path / "mine"), recipe="m:f", overrides=(), recipe_digest="a",
        resolved={"task": {"features": 8}, "run": {"seed": 0}}, datasets=("/data",), manifest_digest="d",
        plan_digest="p", tracking_uri="sqlite:///x", mlflow_run_id="", code_version="1",
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def test_the_same_command_goes_on_with_its_run(tmp_path: Path) -> None:
    fresh = record(tmp_path)
    assert claim(fresh) == fresh
    write_run(replace(fresh, mlflow_run_id="r1"))
    assert claim(fresh).mlflow_run_id == "r1"
    assert open_run(fresh.uri) == replace(fresh, mlflow_run_id="r1")


def test_an_edited_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    write_run(record(tmp_path, mlflow_run_id="r1"))
    edited = record(tmp_path, resolved={"task": {"features": 16}, "run": {"seed": 0}}, recipe_digest="b")
    with pytest.raises(ConfigError, match=r"task\.features: 8 -> 16.*--new.*--rebase"):
        claim(edited)
    assert claim(edited, new=True).uri.endswith("mine-2")
    write_run(replace(edited, name="mine-2", uri=str(tmp_path / "mine-2")))
    assert claim(edited, new=True).name == "mine-2", "the same command goes on with the run it began"
    assert claim(replace(edited, recipe_digest="c"), new=True).name == "mine-3"
    write_run(replace(edited, name="mine-2", uri=str(tmp_path / "mine-2"), status="finished"))
    assert claim(edited, new=True).name == "mine-3"
    rebased = claim(edited, rebase=True)
    assert (rebased.mlflow_run_id, rebased.recipe_digest) == ("r1", "b")
    with pytest.raises(ConfigError, match="data: d -> e"):
        claim(record(tmp_path, manifest_digest="e"))


def test_another_order_of_the_same_data_is_refused(tmp_path: Path) -> None:
    write_run(record(tmp_path))
    with pytest.raises(ConfigError, match="the order of the data"):
        claim(record(tmp_path, plan_digest="q"))


def test_rebase_needs_a_run_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such run yet; name the run with --name"):
        claim(record(tmp_path), rebase=True)
    with pytest.raises(ConfigError, match="a new run has no weights"):
        claim(record(tmp_path), rebase=True, new=True)


def test_another_tracking_server_is_refused(tmp_path: Path) -> None:
    write_run(record(tmp_path))
    with pytest.raises(ConflictError, match="MLFLOW_TRACKING_URI=sqlite:///y"):
        claim(record(tmp_path, tracking_uri="sqlite:///y"))


def test_a_user_that_was_recorded_once_is_shown_no_more(tmp_path: Path) -> None:
    """Former versions left the user in the record; the run goes on, without."""
    write_run(record(tmp_path, tracking_uri="https://TOKEN@host"))
    assert claim(record(tmp_path, tracking_uri="https://host")).tracking_uri == "https://host"
    write_run(record(tmp_path, name="mine-2", uri=str(tmp_path / "mine-2"), tracking_uri="https://TOKEN@host"))
    assert claim(record(tmp_path), new=True).tracking_uri == "https://host"
    with pytest.raises(ConflictError, match="tracked in https://host;") as caught:
        claim(record(tmp_path, tracking_uri="https://other"))
    assert "TOKEN" not in str(caught.value)


@pytest.mark.parametrize(
    ("total_images", "changes", "left"),
    [
        (300, {"recipe_digest": "new"}, False),
        (200, {"recipe_digest": "new"}, False),
        (300, {"plan_digest": "new"}, False),
        (301, {"recipe_digest": "new"}, True),
        (300, {}, True),  # the same recipe: all but the word of it was done
    ],
)
def test_an_edited_recipe_needs_images_that_are_left(
    folder: Path, tmp_path: Path, total_images: int, changes: dict[str, str], left: bool
) -> None:
    """Without, no checkpoint of it would be written, and the run would be finished with nothing to publish."""
    rewrite(folder, 300, recipe_digest="a", plan_digest="p")
    nothing: Any = None
    job = Job(task=TASK, data=DataSettings(micro_batch=4, virtual_shards=1), run=RunSettings(total_images=total_images),
              record=record(tmp_path, **changes), photos=nothing, placement=Placement(), validate=None,
              tracking_uri="")  # fmt: skip
    newest = checkpoint.checkpoints(str(folder))[0]
    if left:
        check_steps_left(job, newest)
        return
    with pytest.raises(ConfigError, match=rf"run\.total_images={total_images}: .*raise it above 300; .*gate"):
        check_steps_left(job, newest)


def test_names(tmp_path: Path) -> None:
    name = default_name("rayscale.recipes.compact:demo", "a", "b")
    assert name.startswith("compact-demo-")
    assert name != default_name("rayscale.recipes.compact:demo", "a", "c")
    assert run_uri(str(tmp_path), name).endswith(name)
    assert Path(run_uri("runs", name)).is_absolute(), "workers have other working directories"
    for bad in ("", "a/b", "a b", "../x", ".", "..", "-x", "a\n"):
        with pytest.raises(ConfigError, match="--name"):
            run_uri(str(tmp_path), bad)


def test_a_damaged_folder_is_not_resurrected_by_copying_parts(folder: Path, tmp_path: Path) -> None:
    """Files of two checkpoints mixed in one folder do not verify."""
    shutil.copy(folder / "checkpoint_100/nets.safetensors", folder / "checkpoint_300/nets.safetensors")
    found = checkpoint.newest(str(folder), tmp_path / "scratch")
    assert found is not None
    assert found.images_seen == 200


def test_a_run_may_begin_with_the_weights_of_another(folder: Path, tmp_path: Path) -> None:
    theirs = build_state(TASK, RunSettings(seed=300), torch.device("cpu")).nets
    nets = TASK.build(torch.device("cpu")) | {"critic": torch.nn.Conv2d(3, 1, 3)}
    critic = nets["critic"].weight.clone()
    assert not torch.equal(parameters(nets["net"]), parameters(theirs["net"]))
    assert checkpoint.warm_start(str(folder), nets) == ["ema", "net"]
    assert torch.equal(parameters(nets["net"]), parameters(theirs["net"])), "of the newest checkpoint"
    assert torch.equal(nets["critic"].weight, critic), "what it does not have stays as it is"
    with pytest.raises(ConfigError, match=r"run\.warm_start=.*: its nets are ema, net, those of this recipe g; give"):
        checkpoint.warm_start(str(folder), {"g": nets["net"]})
    with pytest.raises(IntegrityError, match="net net"):
        checkpoint.warm_start(str(folder), replace(TASK, features=6).build(torch.device("cpu")))
    with pytest.raises(MissingError, match=r"run\.warm_start=.*: holds no checkpoint"):
        checkpoint.warm_start(str(tmp_path / "nothing"), nets)


def parameters(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])
