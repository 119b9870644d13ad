"""What scores come from is not trained on, where several datasets come together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rayscale import recipes
from rayscale.cli.publish import publish
from rayscale.cli.train import train
from rayscale.contract import digest, dumps
from rayscale.data.mixture import check_held_out, open_mixture
from rayscale.data.pack import pack
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, MissingError
from rayscale.train.checkpoint import CheckpointInfo, save
from rayscale.train.record import RunRecord, write_run

TINY = "rayscale.recipes.compact:tiny"


def packed(photo_folder: Path, out: Path, *photos: str) -> str:
    """A dataset that trains on some photos of the folder."""
    for name in photos:
        (out / "photos/train").mkdir(parents=True, exist_ok=True)
        shutil.copy(next(photo_folder.glob(f"*/{name}.*")), out / "photos/train")
    pack(str(out / "photos"), str(out / "packed"), PackSettings(split="folder", min_side=64))
    return str(out / "packed")


@pytest.fixture
def clean(photo_folder: Path, tmp_path: Path) -> str:
    """Photos that `dataset` trains on too."""
    return packed(photo_folder, tmp_path / "clean", *(f"photo{i:02}" for i in range(4)))


@pytest.fixture
def leaking(photo_folder: Path, tmp_path: Path) -> str:
    """Two that `dataset` scores on while it trains, one that models of it are judged by."""
    return packed(photo_folder, tmp_path / "leaking", "photo00", "photo12", "photo13", "photo14")


def test_equal_bytes_are_counted_and_one_is_named(dataset: str, clean: str, leaking: str) -> None:
    photos, empty = open_mixture((dataset, clean, leaking), "train"), open_split(clean, "test")
    for split, num in (("validation", 2), ("test", 1)):
        held_out = open_split(dataset, split)
        with pytest.raises(
            ConfigError, match=rf"trains on {num} of the held-out photos.* split {split} of .*; mend it"
        ):
            check_held_out(photos.parts, [empty, held_out], "mend it")
        with pytest.raises(ConfigError) as told:
            check_held_out(photos.parts, [held_out], "mend it")
        assert told.value.value == leaking
        assert any(key in str(told.value) for key in held_out.keys)
        check_held_out(photos.parts[:2], [held_out, empty], "mend it")
    check_held_out(photos.parts, [empty], "mend it")


@pytest.mark.parametrize("leaking_first", [True, False])
def test_training_on_what_another_dataset_holds_out_is_refused_before_anything_starts(
    dataset: str, clean: str, leaking: str, leaking_first: bool, tmp_path: Path
) -> None:
    def begin(*data: str) -> None:
        settings = ["task.scale=3", f"data.weights={[1] * len(data)}"]  # a wrong scale, told after the data
        train(recipe=TINY, data=list(data), settings=settings, storage=str(tmp_path / "runs"))

    pair = [leaking, dataset] if leaking_first else [dataset, leaking]
    with pytest.raises(ConfigError, match=rf"data={leaking}: trains on 3 of the held-out photos: .*; pack the photos"):
        begin(*pair)
    assert not (tmp_path / "runs").exists()
    for others in ([dataset, clean], [dataset]):  # control
        with pytest.raises(ConfigError, match="the model's scale is 3"):
            begin(*others)


def run_of(datasets: tuple[str, ...], uri: Path) -> str:
    """A finished run as `train` leaves it, but untracked."""
    recipe = recipes.load(TINY, ())
    record = RunRecord(
        name=uri.name,
        uri=str(uri),
        recipe=TINY,
        overrides=(),
        recipe_digest=digest(recipes.resolved(recipe)),
        resolved=json.loads(dumps(recipes.resolved(recipe))),
        datasets=datasets,
        manifest_digest="",
        plan_digest="",
        tracking_uri="",
        mlflow_run_id="",
        code_version="1",
        status="finished",
    )
    info = CheckpointInfo(images_seen=8, position=1, plan_digest="", recipe_digest=record.recipe_digest,
                          code_version="1", chain="", metrics={"psnr_y": 1.0}, files={})  # fmt: skip
    (uri / "checkpoint_1").mkdir(parents=True)
    save(uri / "checkpoint_1", recipe.task.build(torch.device("cpu")), {}, info)
    write_run(record)
    return str(uri)


def test_a_model_is_not_published_with_scores_on_photos_that_it_was_trained_on(
    mlflow_home: Path, dataset: str, clean: str, leaking: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = run_of((dataset, leaking), tmp_path / "both")  # of a version that did not refuse to train it
    with pytest.raises(ConfigError, match=rf"data={leaking}: trains on 1 of the held-out photos: .* --photos"):
        publish(both, "m")
    with pytest.raises(ConfigError, match=r"trains on 1 of the held-out photos"):
        publish(run_of((leaking,), tmp_path / "other"), "m", photos=dataset)
    fine = run_of((dataset, clean), tmp_path / "fine")  # control
    assert publish(fine, "m")["images"] == 2
    assert "cannot be told" not in caplog.text
    shutil.rmtree(clean)
    assert publish(fine, "m", photos=dataset)["images"] == 2  # what it was trained on may be gone by now
    assert "cannot be told" in caplog.text
    with pytest.raises(MissingError):
        publish(fine, "m", photos=clean)
