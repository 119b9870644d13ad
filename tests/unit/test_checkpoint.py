"""Checkpoints: one that does not verify is none, aloud; the one before is taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError
from rayscale.task import Optimizer
from rayscale.tasks.compact import Compact
from rayscale.train import checkpoint
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.identity import claim, default_name, run_uri
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
    assert checkpoint.select(str(folder), "best", metric="ssim_y").images_seen == 300


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
        resolved={"task": {"features": 8}, "run": {"seed": 0}}, manifest="/data", manifest_digest="d", plan_digest="p",
        tracking_uri="sqlite:///x", mlflow_run_id="", code_version="1",
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
    write_run(replace(edited, uri=str(tmp_path / "mine-2")))
    assert claim(edited, new=True).name == "mine-3"
    rebased = claim(edited, rebase=True)
    assert (rebased.mlflow_run_id, rebased.recipe_digest) == ("r1", "b")
    with pytest.raises(ConfigError, match="data: d -> e"):
        claim(record(tmp_path, manifest_digest="e"))


def test_another_tracking_server_is_refused(tmp_path: Path) -> None:
    write_run(record(tmp_path))
    with pytest.raises(ConflictError, match="MLFLOW_TRACKING_URI=sqlite:///y"):
        claim(record(tmp_path, tracking_uri="sqlite:///y"))


def test_names(tmp_path: Path) -> None:
    name = default_name("rayscale.recipes.compact:demo", (), "a", "b")
    assert name.startswith("compact-demo-")
    assert name != default_name("rayscale.recipes.compact:demo", (), "a", "c")
    assert run_uri(str(tmp_path), name).endswith(name)
    for bad in ("", "a/b", "a b", "../x"):
        with pytest.raises(ConfigError, match="--name"):
            run_uri(str(tmp_path), bad)


def test_a_damaged_folder_is_not_resurrected_by_copying_parts(folder: Path, tmp_path: Path) -> None:
    """Files of two checkpoints mixed in one folder do not verify."""
    shutil.copy(folder / "checkpoint_100/nets.safetensors", folder / "checkpoint_300/nets.safetensors")
    found = checkpoint.newest(str(folder), tmp_path / "scratch")
    assert found is not None
    assert found.images_seen == 200
