"""Families that are not image -> image, through the whole line: Ray Train, validation, publishing, the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rayscale.cli.promote import promote
from rayscale.cli.publish import publish
from rayscale.cli.train import train
from rayscale.data.pack import pack
from rayscale.data.scan import PackSettings
from rayscale.errors import ConfigError, GateError
from rayscale.registry.models import Registry

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
KINDS = {  # recipe -> what it publishes, with the metric that decides on each
    "vae:tiny": {"": "neg_kid", "encode": "same_photo_at_1", "reconstruct": "psnr_y"},
    "embed:tiny": {"": "same_photo_at_1"},
    "r3gan:tiny": {"": "neg_kid"},
    "burst:tiny": {"": "psnr_y"},
    "inpaint:tiny": {"": "psnr_y"},
}


@pytest.mark.long
@pytest.mark.parametrize("recipe", KINDS)
def test_from_photos_to_a_decision(recipe: str, dataset: str, tmp_path: Path) -> None:
    name, expected = recipe.partition(":")[0], KINDS[recipe]
    run: dict[str, Any] = train(
        recipe=f"rayscale.recipes.{recipe}", data=[dataset], storage=str(tmp_path), workers=2, cpus_per_worker=0.5,
        threads=1,
    )  # fmt: skip
    client = MlflowClient(run["tracking_uri"])
    logged = client.get_run(run["mlflow_run_id"]).data.metrics
    for function, metric in expected.items():
        assert f"validation/{function}/{metric}".replace("//", "/") in logged
    if name == "vae":
        assert {"validation/bits_per_dim", "validation/bits_per_dim_histogram"} <= set(logged)
    assert [f.path for f in client.list_artifacts(run["mlflow_run_id"], "samples")], "pictures for people"

    published = publish(run["run_uri"], name, licence="MIT")
    found = {one["model"]: one for one in (published, *published["also"])}
    assert set(found) == {f"{name}.{function}" if function else name for function in expected}
    for function, metric in expected.items():
        one = found[f"{name}.{function}" if function else name]
        assert one["parity_max_abs"] < 1e-4
        assert {metric, f"baseline_{metric}"} <= set(one)
        decided: dict[str, Any] | GateError
        try:
            decided = promote(one["model"])
        except GateError as held:  # seconds of training need not beat anything
            decided = held
        if isinstance(decided, GateError):
            assert metric in str(decided)
            assert Registry().aliases(one["model"]) == {}
        else:
            assert decided[metric] == pytest.approx(one[metric], abs=1e-9)
            assert Registry().aliases(one["model"]) == {"champion": 1}


def test_classes_must_be_those_of_the_dataset(dataset: str, photo_folder: Path, tmp_path: Path) -> None:
    by_class = ["task.num_classes=2", 'data.tensors=["hr","label"]']
    with pytest.raises(ConfigError, match=r"data=.*: has photos without a label, and this model learns them by label"):
        train("rayscale.recipes.r3gan:tiny", [dataset], by_class, storage=str(tmp_path))
    pack(str(photo_folder), str(tmp_path / "labelled"), PackSettings(test_fraction=0.0))
    three = r"the dataset has 3 labels: test, train, validation; --set task\.num_classes=3"
    with pytest.raises(ConfigError, match=rf"task\.num_classes=2: {three}"):
        train("rayscale.recipes.r3gan:tiny", [str(tmp_path / "labelled")], by_class, storage=str(tmp_path))
