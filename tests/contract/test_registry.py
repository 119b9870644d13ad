"""Versions in a real MLflow registry on SQLite: immutable, idempotent, verified; mistakes suggest the nearest."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper

import rayscale
from rayscale import artifact, contract
from rayscale.contract import Lineage, ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.registry.models import Registry, Version, check_alias
from rayscale.serve.rollout import read_desired
from rayscale.tracking import default_uri


def doubled(weight: float) -> bytes:
    """One ONNX model: every pixel four times, scaled by `weight`."""
    weights = numpy_helper.from_array(np.array([weight], np.float32), "weight")
    sizes = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "sizes")
    nodes = [
        helper.make_node("Mul", ["image", "weight"], ["scaled"]),
        helper.make_node("Resize", ["scaled", "", "sizes"], ["image_out"], mode="nearest"),
    ]
    edges = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"]),
        helper.make_tensor_value_info("image_out", TensorProto.FLOAT, ["n", 3, "2*h", "2*w"]),
    ]
    graph = helper.make_graph(nodes, "doubled", edges[:1], edges[1:], [weights, sizes])
    return onnx.ModelProto(
        ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)]
    ).SerializeToString()  # fmt: skip


CARD = ModelCard(
    family="doubled",
    spec=Spec(
        kind="transform",
        inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")),),
        outputs=(TensorSpec(name="image_out", shape=("n", 3, "2*h", "2*w")),),
        scale=2,
        halo_px=0,
    ),
    licence="MIT",
    lineage=Lineage(recipe="recipes:tiny", recipe_digest="r" * 64, manifest_digest="m" * 64, code_version="1"),
    parity_max_abs=1.25e-6,
)


def make(folder: Path, weight: float) -> Path:
    artifact.write(folder, doubled(weight), CARD, {"image": np.full((1, 3, 4, 5), 0.25, np.float32)})
    return folder


@pytest.fixture
def registry(mlflow_home: Path) -> Registry:
    return Registry()


def test_publish_resolve_alias_fetch(registry: Registry, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", 1.0)
    first = registry.publish("photos-x2", folder, tags={"psnr_y": "30.5"}, texts={"scores.json": "{}"})
    assert (first.name, first.version, first.digest) == ("photos-x2", 1, artifact.digest_of(folder))
    expected = {"digest": first.digest, "kind": "transform", "family": "doubled", "scale": "2", "licence": "MIT",
                "parity_max_abs": "1.25e-06", "recipe": "recipes:tiny", "recipe_digest": "r" * 64,
                "manifest_digest": "m" * 64, "code_version": "1", "psnr_y": "30.5"}  # fmt: skip
    assert first.tags == expected
    second = registry.publish("photos-x2", make(tmp_path / "b", 0.5), run_id=first.run_id)
    assert (second.version, second.run_id) == (2, first.run_id)
    assert second.digest != first.digest

    registry.client.set_registered_model_alias("photos-x2", "champion", "1")
    for reference in ("photos-x2", "photos-x2@champion", "photos-x2:1"):
        assert registry.resolve(reference).digest == first.digest
    assert registry.resolve("photos-x2").aliases == ("champion",)
    registry.client.set_registered_model_alias("photos-x2", "champion", "2")
    assert registry.resolve("photos-x2").version == 2
    assert [(v.version, v.aliases) for v in registry.versions("photos-x2")] == [(2, ("champion",)), (1, ())]
    assert registry.names() == ("photos-x2",)

    fetched = registry.fetch(second, tmp_path / "cache")
    assert fetched == tmp_path / "cache" / second.digest
    output = artifact.load(fetched, expect_digest=second.digest).transform(np.ones((1, 3, 2, 2), np.float32))
    assert np.array_equal(output, np.full((1, 3, 4, 4), 0.5, np.float32))
    assert contract.loads(Version, contract.dumps(second), "version") == second
    assert "scores.json" in " ".join(f.path for f in registry.client.list_artifacts(first.run_id, "models"))


def test_an_equal_artifact_is_published_once(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish("m", make(tmp_path / "a", 1.0))
    again = registry.publish("m", make(tmp_path / "same bytes elsewhere", 1.0))
    assert (again.version, again.run_id) == (first.version, first.run_id)
    assert len(registry.versions("m")) == 1
    assert registry.publish("other", tmp_path / "a").version == 1  # by name: another model may hold the same
    assert registry.publish("m", make(tmp_path / "b", 0.5)).version == 2  # control: other bytes, a new version


def test_an_interrupted_publish_leaves_no_version_and_can_be_repeated(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "a", 1.0)

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.publish("m", folder)
    assert registry.versions("m") == ()
    assert registry.publish("m", folder).version == 1


@pytest.mark.parametrize(
    ("reference", "error", "says"),
    [
        ("phots-x2", MissingError, "did you mean 'photos-x2'?"),
        ("photos-x2@champoin", MissingError, "did you mean 'champion'?"),
        ("photos-x2:7", MissingError, "there are 1, 2"),
        ("photos-x2", None, ""),
        ("photos-x2@latest", ConfigError, "NAME@ALIAS"),
        ("photos-x2:one", ConfigError, "NAME:VERSION"),
        ("a/b:1", ConfigError, "NAME"),
        ("", ConfigError, "NAME"),
        ("made-elsewhere:1", ConfigError, "not published by rayscale"),
    ],
)
def test_references(
    registry: Registry, tmp_path: Path, reference: str, error: type[Exception] | None, says: str
) -> None:
    for i, weight in enumerate((1.0, 0.5)):
        registry.publish("photos-x2", make(tmp_path / str(i), weight))
    registry.client.set_registered_model_alias("photos-x2", "champion", "1")
    registry.client.create_registered_model("made-elsewhere")
    registry.client.create_model_version("made-elsewhere", source=str(tmp_path))
    if error is None:
        assert registry.resolve(reference).version == 1
        return
    with pytest.raises(error) as caught:
        registry.resolve(reference)
    assert says in str(caught.value)


def test_names_that_cannot_be_are_refused(registry: Registry, tmp_path: Path) -> None:
    registry.publish("m", make(tmp_path / "a", 1.0))
    for reserved in ("latest", "v2"):
        with pytest.raises(ConfigError):
            check_alias(reserved)
    assert registry.aliases("m") == {}
    with pytest.raises(MissingError):
        registry.versions("n")
    with pytest.raises(ConfigError, match="--name"):
        registry.publish("a/b", tmp_path / "a")
    with pytest.raises(MissingError):
        registry.publish("m", tmp_path / "nothing there")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def stored(version: Version) -> Path:
    return Path(version.uri.removeprefix("file://")) / "model.onnx"


def test_fetch_refuses_other_bytes_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    version = registry.publish("m", make(tmp_path / "a", 1.0))
    flip_a_bit(stored(version))
    with pytest.raises(IntegrityError, match="m:1"):
        registry.fetch(version, tmp_path / "cache")
    stored(version).unlink()
    with pytest.raises(IntegrityError, match="incomplete"):
        registry.fetch(version, tmp_path / "cache")
    shutil.rmtree(stored(version).parent)
    with pytest.raises(MissingError, match="m:1 has no artifact there any more"):
        registry.fetch(version, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_healed_and_a_sound_one_is_not_read_again(registry: Registry, tmp_path: Path) -> None:
    version = registry.publish("m", make(tmp_path / "a", 1.0))
    fetched = registry.fetch(version, tmp_path / "cache")
    flip_a_bit(fetched / "model.onnx")
    with pytest.raises(IntegrityError):
        artifact.load(fetched, expect_digest=version.digest)
    assert artifact.digest_of(registry.fetch(version, tmp_path / "cache")) == version.digest
    os.utime(fetched / "model.onnx")  # touched, not changed: hashed again and believed
    shutil.rmtree(stored(version).parent)  # so that nothing can be fetched any more
    assert registry.fetch(version, tmp_path / "cache") == fetched
    flip_a_bit(fetched / "model.onnx")
    with pytest.raises(MissingError):  # the control: a damaged one is not believed
        registry.fetch(version, tmp_path / "cache")


@pytest.mark.parametrize("tag", ["{victim}", "../victim", "..", "", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_digest_that_is_none_is_no_folder(registry: Registry, tmp_path: Path, tag: str) -> None:
    """Anybody may write tags: what one names outside the cache is not touched, and the version is not one of ours."""
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    for folder in (victim, cache):
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(b"precious")
    sound, other = (registry.publish("m", make(tmp_path / name, by)) for name, by in (("a", 1.0), ("b", 0.5)))
    digest = tag.format(victim=victim)
    registry.client.set_model_version_tag("m", "2", "digest", digest)
    registry.client.set_registered_model_alias("m", "champion", "2")
    for reference in ("m:2", "m@champion"):
        with pytest.raises(ConfigError, match="not published by rayscale"):
            registry.resolve(reference)
    with pytest.raises(ConfigError, match="must be 64 hex digits"):
        registry.fetch(dataclasses.replace(other, digest=digest), cache)
    assert [v.version for v in registry.versions("m")] == [1]
    assert [v.version for v in registry.overview()["m"]] == [1]
    assert (victim / "photo.jpg").read_bytes() == (cache / "photo.jpg").read_bytes() == b"precious"
    wanted = read_desired(registry, ("m@champion",))
    assert (wanted.routes, list(wanted.refused)) == ({}, ["m@champion"])

    registry.client.set_model_version_tag("m", "2", "digest", other.digest)  # control
    assert registry.fetch(registry.resolve("m:2"), cache) == cache / other.digest
    assert registry.fetch(sound, cache) == cache / sound.digest
    assert [v.version for v in registry.versions("m")] == [2, 1]


def test_many_fetch_at_once(registry: Registry, tmp_path: Path) -> None:
    version = registry.publish("m", make(tmp_path / "a", 1.0))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: registry.fetch(version, tmp_path / "cache"), range(8)))
    assert {artifact.digest_of(f) for f in folders} == {version.digest}
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [version.digest, f"{version.digest}.json"]


def test_the_registry_needs_no_torch(registry: Registry, tmp_path: Path) -> None:
    registry.publish("m", make(tmp_path / "a", 1.0))
    registry.client.set_registered_model_alias("m", "champion", "1")
    code = (
        "import sys; from rayscale.registry.models import Registry; print(Registry().resolve('m').version); "
        "print(sorted({'torch', 'ray', 'typer', 'rayscale.recipes', 'rayscale.task'} & set(sys.modules)))"
    )
    path = str(Path(rayscale.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": default_uri()})  # fmt: skip
    assert done.stdout.split() == ["1", "[]"]
