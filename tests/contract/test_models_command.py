"""`rayscale models`: versions looked at, moved back, deleted, exported."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rayscale import artifact, contract
from rayscale.cli.models import gc, history, list_models, rollback, show
from rayscale.cli.transfer import export_model
from rayscale.contract import Lineage, ModelCard, Scores, Spec, TensorSpec, dumps
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError
from rayscale.registry import foreign, moves
from rayscale.registry.gate import Contest, Gate, Hold, decide
from rayscale.registry.journal import PROMOTE, Journal
from rayscale.registry.models import Registry, Version
from rayscale.registry.moves import Move
from rayscale.tracking import Tracker

RGB = ["n", 3, "h", "w"]


def constant(weight: float) -> bytes:
    by = numpy_helper.from_array(np.float32(weight), "by")
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, RGB) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "by"], ["y"])], "g", edges[:1], edges[1:], [by])
    return bytes(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )


SPEC = Spec(kind="transform", inputs=(TensorSpec(name="x", shape=("n", 3, "h", "w")),),
            outputs=(TensorSpec(name="y", shape=("n", 3, "h", "w")),), halo_px=0)  # fmt: skip
CARD = ModelCard(family="scaled", spec=SPEC, licence="MIT",
                 lineage=Lineage(recipe="recipes:tiny", code_version="1", images_seen=7))  # fmt: skip


@pytest.fixture
def three(mlflow_home: Path, tmp_path: Path) -> Registry:
    """m:1, m:2, m:3, never promoted."""
    registry = Registry()
    for number in (1, 2, 3):
        folder = tmp_path / f"artifact-{number}"
        foreign.write(folder, constant(number / 4), CARD)
        scores = {"psnr_y": f"{30 + number:.4f}", "baseline_psnr_y": "29.5000", "gate": dumps(Gate())}
        registry.publish("m", folder, tags=scores)
    return registry


def promoted(registry: Registry, number: int, *, held: bool = False) -> None:
    """What `promote` leaves, without the photos."""
    version = registry.resolve(f"m:{number}")
    before = registry.aliases("m").get("champion")
    verdict = moves.HOLD if held else PROMOTE
    tags = moves.tags("m", number, version.digest, "champion", verdict, before)
    tracker = Tracker.start(moves.EXPERIMENT, f"{version} -> champion", tags=tags, uri=registry.uri)
    tracker.text(dumps(report(version)), "report.json")
    tracker.picture(np.zeros((4, 4, 3), np.uint8), "samples.png")
    if not held:
        Journal(registry, "m").move("champion", version, before=before, decision=PROMOTE, run_id=tracker.run_id)
    tracker.finish()


def report(version: Version) -> Any:
    def scores(subject: str, value: float) -> Scores:
        values = {"psnr_y": (value, value), "ssim_y": (0.9, 0.9)}
        return Scores(subject=subject, suite="s", keys=("a", "b"), metrics=values)

    contest = Contest(candidate=scores(version.digest, 31.0), baseline=scores("bicubic", 29.5))
    found = decide({"published": contest}, Gate(), CARD)
    assert isinstance(found, Hold)  # this card states no parity
    return found.report


def test_an_empty_registry_lists_nothing(mlflow_home: Path) -> None:
    assert list_models() == {"models": {}}


def test_list_and_show(three: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    promoted(three, 2)
    promoted(three, 3, held=True)
    listed = list_models()["models"]["m"]
    assert {key: listed[key] for key in ("newest", "versions", "aliases", "scored", "score", "baseline")} == {
        "newest": 3, "versions": 3, "aliases": {"champion": 2}, "scored": 2, "score": 32.0,
        "baseline": 29.5}  # fmt: skip
    assert "psnr_y 32.000 (29.500)" in capsys.readouterr().out

    seen = show("m")  # the champion
    assert (seen["version"], seen["aliases"], seen["verified"]) == (2, ["champion"], True)
    assert seen["card"]["lineage"]["images_seen"] == 7
    assert seen["scores"] == {"psnr_y": 32.0, "baseline_psnr_y": 29.5}
    assert [d["decision"] for d in seen["decisions"]] == ["promote"]
    assert [Path(uri).name for uri in seen["pictures"]] == ["samples.png"]
    held = show("m:3")
    assert [d["decision"] for d in held["decisions"]] == ["hold"]
    assert held["failed_rules"] == ["parity, max |ONNX Runtime - torch|"]
    assert "| parity" in capsys.readouterr().out.replace("\\", "")
    assert show("m:1")["decisions"] == []

    with pytest.raises(MissingError, match="did you mean 'm'"):
        show("mm")


def test_a_damaged_artifact_is_shown_as_such(three: Registry) -> None:
    stored = Path(three.resolve("m:1").uri.removeprefix("file://")) / "model.onnx"
    stored.write_bytes(b"other bytes")
    seen = show("m:1")
    assert (seen["verified"], seen["card"]) == (False, None)
    assert show("m:2")["verified"]  # control


def test_rollback_goes_back_step_by_step_and_is_recorded(three: Registry) -> None:
    for number in (1, 2, 3):
        promoted(three, number)
    back = rollback("m", "skies turn green")
    assert (back["before"], back["version"], three.aliases("m")) == (3, 2, {"champion": 2})
    assert rollback("m", "still green")["version"] == 1
    with pytest.raises(MissingError, match="no version is recorded before 1"):
        rollback("m", "further")
    assert rollback("m", "found it", to=3)["version"] == 3
    with pytest.raises(ConfigError, match="points there already"):
        rollback("m", "again", to=3)
    with pytest.raises(ConfigError, match="--reason"):
        rollback("m", " ")
    told = history("m")
    assert [(m["decision"], m["before"], m["version"], m["reason"]) for m in told["moves"]][3:] == [
        ("rollback", 3, 2, "skies turn green"), ("rollback", 2, 1, "still green"),
        ("rollback", 1, 3, "found it")]  # fmt: skip
    assert told["moved_by_hand"] == {}


def test_an_alias_moved_by_hand_is_told_and_a_damaged_version_is_not_rolled_back_to(three: Registry) -> None:
    promoted(three, 1)
    three.client.set_registered_model_alias("m", "champion", "2")
    assert history("m")["moved_by_hand"] == {"champion": 2}
    stored = Path(three.resolve("m:1").uri.removeprefix("file://")) / "model.onnx"
    good = stored.read_bytes()
    stored.write_bytes(b"other bytes")
    with pytest.raises(IntegrityError):
        rollback("m", "green")
    assert three.aliases("m") == {"champion": 2}
    stored.write_bytes(good)
    assert rollback("m", "green")["version"] == 1
    assert history("m")["moved_by_hand"] == {}


def test_gc_deletes_only_what_nobody_can_want(three: Registry, tmp_path: Path) -> None:
    for number in (4, 5):
        foreign.write(tmp_path / f"artifact-{number}", constant(number / 4), CARD)
        three.publish("m", tmp_path / f"artifact-{number}")
    promoted(three, 1)
    promoted(three, 2)
    three.client.set_registered_model_alias("m", "canary", "3")
    assert gc("m", keep=1)["versions"] == [4]
    assert len(three.versions("m")) == 5  # control: a dry run
    gone = Path(three.resolve("m:4").uri.removeprefix("file://"))
    assert gone.is_dir()
    assert gc("m", keep=1, yes=True) == {"model": "m", "kept": [1, 2, 3, 5], "versions": [4], "deleted": True}
    assert [v.version for v in three.versions("m")] == [5, 3, 2, 1]
    assert not gone.exists()
    assert rollback("m", "green")["version"] == 1


@given(
    st.lists(st.tuples(st.sampled_from(["promote", "rollback", "hold"]), st.integers(1, 4)), max_size=8),
    st.integers(1, 4),
)
def test_the_last_holder_is_where_the_alias_stands(steps: list[tuple[str, int]], now: int) -> None:
    made = [Move(at="", alias="a", decision=what, moved=what != "hold", version=to) for what, to in steps]
    stood = moves.holders(made, "a", now)
    assert stood[-1] == now
    assert all(one != other for one, other in pairwise(stood))
    assert set(stood) <= {to for what, to in steps if what != "hold"} | {now}
    assert moves.holders(made, "other", None) == ()


def test_export_is_the_artifact_and_overwrites_nothing(three: Registry, tmp_path: Path) -> None:
    version = three.resolve("m:2")
    made = export_model("m:2", tmp_path / "out" / "m")
    assert made["digest"] == version.digest == artifact.digest_of(tmp_path / "out" / "m")
    assert contract.loads(ModelCard, (tmp_path / "out/m/card.json").read_bytes(), "card") == CARD
    assert export_model("m:2", tmp_path / "out" / "m") == made
    with pytest.raises(ConflictError):
        export_model("m:1", tmp_path / "out" / "m")
    assert artifact.digest_of(tmp_path / "out" / "m") == version.digest
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m"]
    assert onnx.load(tmp_path / "out/m/model.onnx").graph.name == "g"
