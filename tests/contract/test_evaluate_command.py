"""`rayscale evaluate`: models by folder and by version, classical methods, every kind; a report in MLflow."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from mlflow.artifacts import download_artifacts
from onnx import TensorProto, helper, numpy_helper

from rayscale import artifact, contract
from rayscale.cli.evaluate import evaluate
from rayscale.contract import ModelCard, Scores, Spec, TensorSpec, dumps
from rayscale.data.operators import Bicubic, Burst, GaussianNoise, Mask, Operator
from rayscale.errors import ConfigError, MissingError
from rayscale.evaluate import Suite
from rayscale.features import FeatureNet
from rayscale.imaging import decode_rgb
from rayscale.registry.models import Registry
from rayscale.tracking import Tracker

SMALL = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
X2 = (Bicubic(scale=2),)
NOISE = (GaussianNoise(sigma=(25.0, 25.0)),)


def suite_file(path: Path, dataset: str, degradation: tuple[Operator, ...] = X2, **limits: Any) -> str:
    path.write_text(dumps(Suite(dataset, "train", degradation, **{"max_images": 5, **limits})))
    return str(path)


def report_of(result: dict[str, Any], folder: Path) -> tuple[Path, str]:
    folder.mkdir()
    download_artifacts(run_id=result["run_id"], dst_path=str(folder), tracking_uri=Registry().uri)
    return folder, (folder / "report.html").read_text()


def write_model(
    folder: Path, kind: str, inputs: TensorSpec, outputs: TensorSpec, nodes: list[Any], **weights: Any
) -> str:
    edges = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.shape)) for t in (inputs, outputs)]
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, kind, edges[:1], edges[1:], constants)
    model = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)])
    spec = Spec(kind=kind, inputs=(inputs,), outputs=(outputs,))  # type: ignore[arg-type]
    sizes = [axis if isinstance(axis, int) else 1 if axis == "n" else 16 for axis in inputs.shape]
    golden = {inputs.name: np.random.default_rng(0).random(sizes, np.float32)}
    return artifact.write(folder, model.SerializeToString(), ModelCard(family=kind, spec=spec, licence="MIT"), golden)


def test_a_model_beside_classical_methods(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    digest = SMALL["write"](tmp_path / "small")
    suite = suite_file(tmp_path / "x2.json", dataset)
    result = evaluate(str(tmp_path / "small"), suite=[suite], show=2, out=str(tmp_path / "copy"), self_ensemble=True)
    assert (result["subject"], result["digest"]) == ("small", digest)
    folder, html = report_of(result, tmp_path / "mlflow")
    kept = contract.loads(Suite, (folder / "x2" / "suite.json").read_bytes(), "suite")
    assert dumps(kept) == Path(suite).read_text()
    scores = {
        path.stem: contract.loads(Scores, path.read_bytes(), path.name) for path in (folder / "x2/scores").iterdir()
    }
    assert set(scores) == {"small", "small-8", "bicubic"}
    assert result["suites"]["x2"] == {m: scores["small"].mean(m) for m in scores["small"].metrics}
    assert scores["bicubic"].mean("psnr_y") > scores["small"].mean("psnr_y") + 1  # its weights are random
    for shown in (digest, kept.digest, "over bicubic", *scores["small"].keys):
        assert shown in html
    for one in scores.values():
        assert f"{one.mean('psnr_y'):.2f}" in html
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>', html.partition("<details>")[2])
    values = dict(zip(scores["small"].keys, scores["small"].metrics["psnr_y"], strict=True))
    assert rows == sorted(values, key=values.__getitem__)  # the worst first
    assert decode_rgb((folder / "x2/pictures.png").read_bytes()).shape[2] == 3
    copy = {
        str(p.relative_to(tmp_path / "copy")): p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()
    }
    assert copy == {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    run = Registry().client.get_run(result["run_id"])
    assert run.data.metrics["x2/psnr_y"] == pytest.approx(scores["small"].mean("psnr_y"))
    assert run.data.tags["digest"] == digest
    assert run.info.status == "FINISHED"


def test_a_version_on_its_own_suite_and_on_two_others(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        SMALL["write"](tmp_path / f"small{seed}", seed)
    registry = Registry()
    suite = Suite(dataset, "train", X2, max_images=3)
    trained = Tracker.start("training", "run 1")
    for step in (64, 128, 192):
        trained.metrics({"validation/psnr_y": 20.0 + step / 64}, step)
    trained.finish()
    tags = {"suite": dumps(suite)}
    for seed, run_id in ((0, None), (1, trained.run_id)):
        registry.publish("photos-x2", tmp_path / f"small{seed}", tags=tags, run_id=run_id)
    registry.client.set_registered_model_alias("photos-x2", "champion", "1")
    result = evaluate("photos-x2:2", against=["photos-x2", "lanczos"])  # a bare name is its champion
    assert set(result["suites"]) == {"published"}
    _, html = report_of(result, tmp_path / "one")
    assert result["report"].endswith("/report.html")
    drawn = html.partition("Validation while it trained")[2].partition("</section>")[0]
    assert drawn.count("<circle") == 3
    assert "photos-x2:2</li>" in drawn
    assert "photos-x2:1</li>" not in drawn  # its run logged none
    assert "over photos-x2:1" in html
    assert "over lanczos" in html
    assert "over bicubic" not in html  # only what was asked for
    files = [suite_file(tmp_path / f"{name}.json", dataset, max_images=n) for name, n in (("few", 2), ("more", 4))]
    both = evaluate("photos-x2@champion", suite=files)
    assert both["subject"] == "photos-x2:1"
    assert {name: len(v) for name, v in both["suites"].items()} == {"few": 4, "more": 4}
    with pytest.raises(MissingError):
        evaluate("photos-x2:2", photos=str(tmp_path / "nowhere"))


def test_folders_of_one_name_are_told_apart(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    digests = [SMALL["write"](tmp_path / str(seed) / "small", seed) for seed in (0, 1)]
    suite = suite_file(tmp_path / "any name (1).json", dataset, max_images=2)
    first, second = (str(tmp_path / str(seed) / "small") for seed in (0, 1))
    result = evaluate(first, against=[second, first], suite=[suite])
    assert result["subject"] == f"small {digests[0][:8]}"
    assert set(result["suites"]) == {"any-name--1-"}
    folder, html = report_of(result, tmp_path / "report")
    assert f"over small {digests[1][:8]}" in html
    assert len(list((folder / "any-name--1-" / "scores").iterdir())) == 2


def test_a_classical_method_with_its_best_settings(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    suite = suite_file(tmp_path / "noise.json", dataset, NOISE, max_images=2, max_side_px=64)
    result = evaluate("gaussian", against=["unchanged", "median"], suite=[suite])
    _, html = report_of(result, tmp_path / "report")
    assert "over median" in html
    assert "gaussian sigma_px=" in html  # the settings that did best
    plain = evaluate("unchanged", against=["median"], suite=[suite])
    assert result["suites"]["noise"]["psnr_y"] > plain["suites"]["noise"]["psnr_y"] + 3
    with pytest.raises(MissingError, match="no classical method; did you mean 'median'"):
        evaluate("meedian", against=["mean"], suite=[suite])
    with pytest.raises(MissingError, match=r"lanczos: .*no classical method for this suite"):
        evaluate("mean", against=["lanczos"], suite=[suite])


def test_masks_and_bursts(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    masks = suite_file(tmp_path / "mask.json", dataset, (Mask(),), max_images=2)
    bursts = suite_file(tmp_path / "burst.json", dataset, (Burst(frames=3, shift_px=2.0, shared=X2),), max_images=2)
    inpainted = evaluate("telea", against=["navier_stokes"], suite=[masks], also=["sift_ratio"])
    assert inpainted["suites"]["mask"]["psnr_y"] > 20
    _, html = report_of(inpainted, tmp_path / "report")
    assert "over navier_stokes" in html
    merged, single = (evaluate(name, suite=[bursts])["suites"]["burst"] for name in ("shift_and_add", "bicubic"))
    assert merged["psnr_y"] > single["psnr_y"]
    with pytest.raises(MissingError, match="no classical method for this suite"):
        evaluate("telea", suite=[bursts])


def test_measures_that_cost_more(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    image = TensorSpec(name="image", shape=("n", 3, "h", "w"))
    layer = TensorSpec(name="layer", shape=("n", 4, "h", "w"))
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["layer"]),
    ]
    weights = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    write_model(tmp_path / "net", "embed", image, layer, nodes, w=weights)
    features = FeatureNet(uri=str(tmp_path / "net" / "model.onnx"))
    suite = suite_file(tmp_path / "x2.json", dataset, max_images=2, features=features)
    result = evaluate("bicubic", against=["nearest"], suite=[suite], also=["sift_ratio", "neg_perceptual"])
    folder, html = report_of(result, tmp_path / "report")
    assert "SIFT key points found again" in html
    nearest = json.loads((folder / "x2/scores/nearest.json").read_text())["metrics"]
    assert np.mean(nearest["neg_perceptual"]) < result["suites"]["x2"]["neg_perceptual"] < 0
    with pytest.raises(ConfigError, match="did you mean 'sift_ratio'"):
        evaluate("bicubic", suite=[suite], also=["sift"])
    with pytest.raises(ConfigError, match="161 are needed"):
        evaluate("bicubic", suite=[suite], also=["ms_ssim_y"])
    builtin = suite_file(tmp_path / "builtin.json", dataset)
    with pytest.raises(ConfigError, match="has no layers to compare in"):
        evaluate("bicubic", suite=[builtin], also=["neg_perceptual"])


def test_a_generator_and_an_embedding(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_model(
        tmp_path / "maker", "generate",
        TensorSpec(name="latent", shape=("n", 8), low=-4, high=4),
        TensorSpec(name="image", shape=("n", 3, 16, 16)),
        [helper.make_node("MatMul", ["latent", "w"], ["a"]), helper.make_node("Sigmoid", ["a"], ["b"]),
         helper.make_node("Reshape", ["b", "shape"], ["image"])],
        w=rng.normal(size=(8, 768)).astype(np.float32), shape=np.array([-1, 3, 16, 16]),
    )  # fmt: skip
    sizes = {"max_images": 0, "fit_px": 16, "side_px": 16, "num_samples": 40}
    suite = suite_file(tmp_path / "small.json", dataset, **sizes)
    write_model(
        tmp_path / "judge", "embed",
        TensorSpec(name="image", shape=("n", 3, "h", "w")),
        TensorSpec(name="classes", shape=("n", 3)),
        [helper.make_node("GlobalAveragePool", ["image"], ["a"]), helper.make_node("Flatten", ["a"], ["b"]),
         helper.make_node("Softmax", ["b"], ["classes"])],
    )  # fmt: skip
    judge = str(tmp_path / "judge" / "model.onnx")
    result = evaluate(str(tmp_path / "maker"), suite=[suite], show=1, classifier=judge)
    folder, html = report_of(result, tmp_path / "generated")
    gaussian = json.loads((folder / "small/scores/gaussian.json").read_text())
    assert np.mean(gaussian["metrics"]["neg_frechet"]) > result["suites"]["small"]["neg_frechet"]
    assert "builtin:colour-texture as is" in html
    assert "40, beside 12 photos" in html
    assert re.search(r"Inception-style score over model.onnx@[0-9a-f]{12} classes as is", html)
    write_model(
        tmp_path / "eye", "embed",
        TensorSpec(name="image", shape=("n", 3, "h", "w")),
        TensorSpec(name="vector", shape=("n", 24)),
        [helper.make_node("Conv", ["image", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
         helper.make_node("GlobalAveragePool", ["b"], ["c"]), helper.make_node("Flatten", ["c"], ["vector"])],
        w=rng.normal(size=(24, 3, 3, 3)).astype(np.float32),
    )  # fmt: skip
    result = evaluate(str(tmp_path / "eye"), suite=[suite])
    assert 0 < result["suites"]["small"]["same_photo_at_1"] <= 1
    with pytest.raises(ConfigError, match=r"--against=maker: is generate, eye is embed"):
        evaluate(str(tmp_path / "eye"), against=[str(tmp_path / "maker")], suite=[suite])
    for option, given in (("self-ensemble", True), ("also", ["sift_ratio"]), ("classifier", judge)):
        with pytest.raises(ConfigError, match=f"--{option}=eye: has no meaning for a model of kind embed"):
            evaluate(str(tmp_path / "eye"), suite=[suite], **{option.replace("-", "_"): given})  # type: ignore[arg-type]


def test_mistakes_are_told_before_the_work(mlflow_home: Path, dataset: str, tmp_path: Path) -> None:
    SMALL["write"](tmp_path / "small")
    folder = str(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"--suite=\(none\): .* names no suite"):
        evaluate(folder)
    with pytest.raises(ConfigError, match="only an x3 model can be scored on this suite"):
        evaluate(folder, suite=[suite_file(tmp_path / "x3.json", dataset, (Bicubic(scale=3),))])
    (tmp_path / "other").mkdir()
    files = [suite_file(tmp_path / d / "x2.json", dataset) for d in ("", "other")]
    with pytest.raises(ConfigError, match="two of one name"):
        evaluate(folder, suite=files)
    (tmp_path / "bad.json").write_text('{"photos_uri": "x", "splitt": "test"}')
    with pytest.raises(ConfigError, match=r"bad\.json\.splitt.*did you mean 'split'"):
        evaluate(folder, suite=[str(tmp_path / "bad.json")])
    with pytest.raises(MissingError):
        evaluate(folder, suite=[str(tmp_path / "none.json")])
    with pytest.raises(ConfigError, match="--device"):
        evaluate(folder, device="gpu")
    assert Registry().client.get_experiment_by_name("evaluations") is None  # nothing half-done
