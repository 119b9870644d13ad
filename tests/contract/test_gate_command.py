"""`rayscale promote` on real artifacts: what it refuses and why, what it lets pass, what force may do; their costs.

Upscalers made by hand: interpolation, with or without something that ruins bright pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from mlflow.artifacts import download_artifacts
from onnx import TensorProto, helper, numpy_helper

from rayscale import artifact, contract
from rayscale.cli.compare import compare
from rayscale.cli.models import history, show
from rayscale.cli.promote import promote
from rayscale.cli.transfer import import_model
from rayscale.contract import Cost, Lineage, ModelCard, Spec, TensorSpec, dumps
from rayscale.data.operators import Bicubic
from rayscale.errors import ConfigError, GateError, IntegrityError
from rayscale.evaluate import Suite, pairs
from rayscale.registry import cost, moves
from rayscale.registry.gate import Gate, Report, default_for
from rayscale.registry.models import Registry, Version

KINDS = runpy.run_path(str(Path(__file__).parents[1] / "small_kinds.py"))
X2 = (Bicubic(scale=2),)
PICTURE = TensorSpec(name="image", shape=("n", 3, "h", "w"))
SUITE = functools.partial(Suite, split="train", degradation=X2, max_images=6, max_side_px=96)
CARD = ModelCard(
    family="interpolation",
    spec=Spec(kind="transform", inputs=(PICTURE,), outputs=(TensorSpec(name="made", shape=("n", 3, "2*h", "2*w")),),
              scale=2, halo_why_none="looks at the whole picture"),
    licence="MIT",
    lineage=Lineage(recipe="by hand", code_version="1"),
    parity_max_abs=0.0,
)  # fmt: skip
GATE = Gate(min_gain_db_over_baseline=-9.0, max_image_loss_db=9.0, also=(), resamples=50, max_latency_ratio=None)
"""Lax against the baseline; strict enough against the champion. Times of small networks on a busy machine are not
asserted here: the rule is, in test_gate.py."""
STRICT = dataclasses.replace(GATE, max_image_loss_db=2.0)


def upscaler(mode: str = "cubic", *, plus: float = 0.0, ruin: str = "", above: float = 0.0) -> bytes:
    """x2 by interpolation, `plus` added; pictures whose mean lies above `above` are ruined: `noisy` or `infinite`."""
    constants = {"sizes": [1, 1, 2, 2], "plus": plus, "above": above, "amount": 0.08, "one": 1.0, "zero": 0.0}
    nodes = [
        helper.make_node("Resize", ["image", "", "sizes"], ["resized"], mode=mode, cubic_coeff_a=-0.5),
        helper.make_node("Add", ["resized", "plus"], ["plain"]),
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"]),
        helper.make_node("Greater", ["mean", "above"], ["bright"]),
        helper.make_node("Where", ["bright", "one", "zero"], ["mark"]),
        {
            "": helper.make_node("Identity", ["plain"], ["made"]),
            "noisy": helper.make_node("Sum", ["plain", "shift"], ["made"]),
            "infinite": helper.make_node("Div", ["plain", "left"], ["made"]),
        }[ruin],
    ]
    before = [
        helper.make_node("Mul", ["mark", "amount"], ["shift"]),
        helper.make_node("Sub", ["one", "mark"], ["left"]),
    ]
    nodes[-1:-1] = before
    edges = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"]),
        helper.make_tensor_value_info("made", TensorProto.FLOAT, ["n", 3, "h2", "w2"]),
    ]
    weights = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    weights.append(numpy_helper.from_array(np.array([1, 2, 3]), "axes"))
    graph = helper.make_graph(nodes, "upscaler", edges[:1], edges[1:], weights)
    model = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


Publish = Callable[..., Version]


@pytest.fixture
def publish(mlflow_home: Path, dataset: str, tmp_path: Path) -> Publish:
    """(model, card, gate) -> the next version of `m`, as `rayscale publish` leaves it."""

    def make(model: bytes, card: ModelCard = CARD, gate: Gate = GATE, spoil: str = "") -> Version:
        registry, suite = Registry(), SUITE(dataset)
        folder = tmp_path / f"artifact{sum(1 for _ in tmp_path.iterdir())}"
        dark = 0.1 * np.random.default_rng(7).random((1, 3, 12, 16), np.float32)
        artifact.write(folder, model, card, {"image": dark})
        if spoil == "golden":  # it says another thing than it did when it was exported
            with np.load(folder / "golden.npz") as stored:
                arrays = {name: stored[name] for name in stored.files}
            arrays["out/made"] = arrays["out/made"] + np.float32(0.01)
            np.savez(folder / "golden.npz", **arrays)
        tags = {"suite": dumps(suite), "suite_digest": suite.digest, "gate": dumps(gate)}
        return registry.publish("m", folder, tags=tags)

    return make


def held(reference: str, **options: Any) -> str:
    """Every reason of a decision that changes nothing, in one line."""
    with pytest.raises(GateError) as refused:
        promote(reference, dry_run=True, **options)
    return str(refused.value.rule)


def report_of(run_id: str, folder: Path) -> tuple[Path, Report]:
    folder.mkdir()
    download_artifacts(run_id=run_id, dst_path=str(folder), tracking_uri=Registry().uri)
    return folder, contract.loads(Report, (folder / "report.json").read_bytes(), "report")


def champion_is(version: int | None) -> bool:
    return Registry().aliases("m").get("champion") == version


def test_what_the_gate_refuses_and_what_it_lets_pass(publish: Publish, dataset: str, tmp_path: Path) -> None:
    means = sorted(float(pair.lr.mean()) / 255 for pair in pairs(SUITE(dataset)))
    above = (means[-1] + means[-2]) / 2  # one of six is brighter
    publish(upscaler("linear"))
    assert promote("m")["promoted"]
    assert "gain over champion, lower 95% bound" in held(str(publish(upscaler("nearest"))))

    better, ruined = publish(upscaler()), publish(upscaler(ruin="noisy", above=above), gate=STRICT)
    assert promote(str(better), dry_run=True)["run_id"] == ""  # control: passes
    found = held(str(ruined))
    assert "gain over champion, worst image" in found
    assert "mean:" not in found  # on average it is better
    assert "is nan" in (never := held(str(publish(upscaler(ruin="infinite", above=above))))) or "is inf" in never
    assert "psnr_y of candidate" in never

    unlike = [dataclasses.replace(CARD, parity_max_abs=value) for value in (None, 1e-3)]
    assert "torch|: missing" in held(str(publish(upscaler(plus=1e-6), unlike[0])))
    assert "torch|: 0.001, must be <= 0.0001" in held(str(publish(upscaler(plus=2e-6), unlike[1])))
    assert "lpips of candidate: missing" in held(str(publish(upscaler(plus=3e-6), gate=Gate(metric="lpips"))))
    assert champion_is(1)

    moved = promote(str(better))
    assert (moved["promoted"], moved["before"]) == (True, 1)
    equal = publish(upscaler(plus=1e-5), gate=dataclasses.replace(GATE, margin_vs_champion=0.01))
    assert promote(str(equal))["before"] == better.version
    folder, decided = report_of(moved["run_id"], tmp_path / "report")
    assert {p.name for p in (folder / "published" / "scores").iterdir()} == {
        "baseline.json", "candidate.json", "champion.json"}  # fmt: skip
    costs = {p.stem: contract.loads(Cost, p.read_bytes(), "cost") for p in (folder / "cost").iterdir()}
    assert set(costs) == {"candidate", "champion"}
    assert costs["candidate"].subject == decided.candidate == better.digest
    assert decided.hardware == costs["candidate"].hardware
    assert contract.loads(Gate, (folder / "gate.json").read_bytes(), "gate") == GATE


@pytest.mark.parametrize("damage", ["golden", "store"])
def test_a_damaged_artifact_is_refused_on_record_and_cannot_be_forced(damage: str, publish: Publish) -> None:
    publish(upscaler("linear"))
    promote("m")
    version = publish(upscaler(), spoil=damage)
    if damage == "store":
        stored = Path(version.uri.removeprefix("file://")) / "model.onnx"
        data = bytearray(stored.read_bytes())
        data[len(data) // 2] ^= 1
        stored.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        promote(str(version), force="I insist")
    assert champion_is(1)
    last = moves.read(Registry(), "m")[-1]
    assert (last.decision, last.version, last.moved) == ("hold", 2, False)


def test_force_moves_with_a_reason_and_says_so(
    publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(upscaler("linear"))
    promote("m")
    worse = publish(upscaler("nearest"))
    for options, says in (
        ({"force": ""}, "--force=: must not be empty"),
        ({"force": " \n"}, "--force= : must not be empty"),
        ({"force": "so", "dry_run": True}, "beside --dry-run"),
    ):
        with pytest.raises(ConfigError) as refused:
            promote(str(worse), **options)
        assert says.replace("  ", " ") in str(refused.value)
    assert champion_is(1)
    forced = promote(str(worse), force="blocks are wanted")
    assert (forced["promoted"], forced["forced"]) == (True, "blocks are wanted")
    assert any("gain over champion" in reason for reason in forced["failed"])
    assert champion_is(2)
    folder, report = report_of(forced["run_id"], tmp_path / "report")
    assert report.forced == "blocks are wanted"
    assert any(not row.passed for row in report.rows)
    text = (folder / "report.md").read_text()
    assert "forced" in text.splitlines()[0]
    assert "**forced**: blocks are wanted" in text
    (last,) = history("m")["moves"][1:]
    assert (last["decision"], last["reason"], last["moved"]) == ("forced", "blocks are wanted", True)
    assert "forced 1 -> 2: blocks are wanted" in capsys.readouterr().out
    assert show("m:2")["decisions"][0]["decision"] == "forced"
    assert "forced" not in promote("m:1", force="not needed")  # control: it is better, nothing is forced


def test_a_first_challenger_is_held_against_the_champion_and_opens_no_other_alias(publish: Publish) -> None:
    publish(upscaler("linear"))
    worse, better = publish(upscaler("nearest")), publish(upscaler())
    assert promote(str(worse), alias="challenger", dry_run=True)["before"] is None  # control: there is no champion
    assert promote("m:1")["promoted"]
    assert "gain over champion, lower 95% bound" in held(str(worse), alias="challenger")
    assert promote(str(better), alias="challenger")["promoted"]
    client = Registry().client
    assert promote(str(worse), alias="scratch", force="demo")["promoted"]
    assert promote(str(worse), alias="scratch")["already"]  # forced, for this alias
    client.set_registered_model_alias("m", "champion", str(worse.version))  # by hand: it has not passed for this alias
    assert "gain over champion, lower 95% bound" in held(str(worse))
    client.set_registered_model_alias("m", "champion", str(better.version))
    assert promote(str(better))["promoted"]
    assert promote(str(better))["already"]  # control: now it has passed for this alias as well


def test_gates_and_suites_from_files(publish: Publish, dataset: str, tmp_path: Path) -> None:
    publish(upscaler("linear"), gate=Gate(metric="lpips"))
    assert "lpips" in held("m")
    lax = tmp_path / "lax.yaml"
    lax.write_text("min_gain_db_over_baseline: -9.0\nmax_image_loss_db: 9.0\nalso: []\nsuites: [published, small]\n")
    assert held("m", gate=str(lax)) == "suite small: missing, must be scored"
    small = tmp_path / "small.json"
    small.write_text(dumps(Suite(dataset, "train", X2, max_images=3, max_side_px=64)))
    moved = promote("m", gate=str(lax), suite=[str(small)])
    folder, report = report_of(moved["run_id"], tmp_path / "report")
    assert {row.suite for row in report.rows} == {"", "published", "small"}
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"published", "small", "cost"}
    assert Registry().client.get_run(moved["run_id"]).data.tags["gate"] == f"file {lax}"
    for content, says in (("metrics: psnr", "did you mean 'metric'"), ("a: [", "is no YAML")):
        lax.write_text(content)
        with pytest.raises(ConfigError, match=says):
            promote("m", gate=str(lax))
    (tmp_path / "published.json").write_text(small.read_text())
    with pytest.raises(ConfigError, match="own suite"):
        promote("m:1", alias="other", suite=[str(tmp_path / "published.json")])


@pytest.mark.parametrize(("kind", "metric"), [("generator", "neg_kid"), ("embedder", "same_photo_at_1")])
def test_other_kinds_are_judged_by_what_they_are_scored_by(
    kind: str, metric: str, mlflow_home: Path, dataset: str, tmp_path: Path
) -> None:
    """Brought in with a card alone: parity is measured, and the gate is that of the kind."""
    KINDS[kind](tmp_path / "made", **({"classes": False, "side_px": 16} if kind == "generator" else {}))
    suite = Suite(dataset, "train", X2, fit_px=16, side_px=16, num_samples=20)
    (tmp_path / "suite.json").write_text(dumps(suite))
    card = str(tmp_path / "made" / "card.json")
    import_model(str(tmp_path / "made" / "model.onnx"), "m", card=card, suite=str(tmp_path / "suite.json"))
    version = Registry().resolve("m:1")
    assert contract.loads(Gate, version.tags["gate"], "gate") == default_for(version.tags["kind"])  # type: ignore[arg-type]
    strict = dataclasses.replace(default_for(version.tags["kind"]), min_gain_db_over_baseline=1e5)  # type: ignore[arg-type]
    (tmp_path / "strict.json").write_text(dumps(strict))
    found = held("m", gate=str(tmp_path / "strict.json"))
    assert f"{metric} gain over baseline, mean" in found
    assert "missing" not in found
    lax = {"metric": metric, "min_gain_db_over_baseline": -1e6, "max_image_loss_db": 1e6, "also": []}
    if kind == "generator":
        lax |= {"metric": "neg_frechet", "also": ["precision", "recall"], "also_margin": 1.0}
    (tmp_path / "lax.json").write_text(json.dumps(lax))
    moved = promote("m", gate=str(tmp_path / "lax.json"))
    assert moved["promoted"]
    _, report = report_of(moved["run_id"], tmp_path / "report")
    assert any(row.rule.startswith(f"{lax['metric']} gain over baseline") for row in report.rows)


def test_what_two_models_cost_is_measured_in_turns(tmp_path: Path) -> None:
    """Figures are there, of the right artifacts, and memory grows with the network. No time is asserted."""
    digests = {}
    for name, width in (("narrow", 4), ("wide", 64)):
        rng = np.random.default_rng(0)
        layers = {"first": (width, 3, 3, 3), "last": (12, width, 3, 3)}
        weights = [numpy_helper.from_array(rng.random(s).astype(np.float32), k) for k, s in layers.items()]
        nodes = [
            helper.make_node("Conv", ["image", "first"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Tanh", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "last"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("DepthToSpace", ["c"], ["made"], blocksize=2),
        ]
        edges = [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"]),
            helper.make_tensor_value_info("made", TensorProto.FLOAT, ["n", 3, "h2", "w2"]),
        ]
        graph = helper.make_graph(nodes, "net", edges[:1], edges[1:], weights)
        model = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)])
        golden = {"image": rng.random((1, 3, 8, 8)).astype(np.float32)}
        digests[name] = artifact.write(tmp_path / name, model.SerializeToString(), CARD, golden)
    found = cost.measure({name: tmp_path / name for name in digests})
    assert {name: one.subject for name, one in found.items()} == digests
    assert len({one.hardware for one in found.values()}) == 1
    assert "CPU" in found["wide"].hardware
    rounds = {len(one.ms_per_megapixel) for one in found.values()}
    assert cost.LEAST_ROUNDS <= min(rounds) == max(rounds) <= cost.ROUNDS
    assert all(statistics.median(one.ms_per_megapixel) > 0 for one in found.values())
    if sys.platform == "linux":
        assert found["wide"].memory_mib > found["narrow"].memory_mib > 0  # type: ignore[operator]
        again = cost.measure({"wide": tmp_path / "wide"})
        assert again["wide"].memory_mib == pytest.approx(found["wide"].memory_mib, rel=0.25)


def test_two_models_side_by_side(
    publish: Publish, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(upscaler("nearest"))
    publish(upscaler(), dataclasses.replace(CARD, licence="Apache-2.0"))
    made = compare("m:1", "m:2", show=1)
    out = capsys.readouterr().out
    assert (made["a"], made["b"]) == ("m:1", "m:2")
    gain = made["differences"]["published"]["psnr_y"]
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    for line in (
        "m:2 against m:1 on suite published, 6 rows",
        "Cost",
        "Cards differ in",
        "licence  MIT",
        "Apache-2.0",
    ):
        assert line in out
    assert made["time_ratio"] > 0
    folder = tmp_path / "report"
    folder.mkdir()
    download_artifacts(run_id=made["run_id"], dst_path=str(folder), tracking_uri=Registry().uri)
    html = (folder / "report.html").read_text()
    for shown in ("m:2 against m:1", "Cards differ in", "memory of a session", "over bicubic", f"{gain['low']:.4f}"):
        assert shown in html
    with pytest.raises(ConfigError, match="the same artifact"):
        compare("m:1", "m:1")
    with pytest.raises(ConfigError, match="is a classical method"):
        compare("bicubic", "m:2")
