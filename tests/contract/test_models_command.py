"""`rayscale models`: foreign networks measured and refused, versions looked at, moved back, deleted."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rayscale import artifact, contract, halo, imaging
from rayscale.cli.models import gc, history, list_models, rollback, show
from rayscale.cli.transfer import export_model, import_model
from rayscale.contract import Lineage, ModelCard, Scores, Spec, TensorSpec, dumps
from rayscale.errors import ConfigError, ConflictError, IntegrityError, MissingError, ParityError, RayscaleError
from rayscale.registry import foreign, moves
from rayscale.registry.gate import Gate, Hold, decide
from rayscale.registry.journal import PROMOTE, Journal
from rayscale.registry.models import Registry, Version
from rayscale.registry.moves import Move
from rayscale.serve.batching import Model, TileJob, execute
from rayscale.serve.engine import EngineSettings, plan
from rayscale.tracking import Tracker

RADIUS = 4  # of Elsewhere: 2 of the 5x5, 1 of each 3x3


class Elsewhere(nn.Module):
    """x2, nothing of ours: what a toolkit makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.second(nn.functional.leaky_relu(self.first(x), 0.1)))
        return nn.functional.pixel_shuffle(self.last(found), 2).sigmoid()


class Down(nn.Module):
    """Halves and doubles its sides twice: they must be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU())
        self.up = nn.ConvTranspose2d(6, 3, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.up(self.down(x))).clamp(0, 1)


class Pooled(nn.Module):
    """Every pixel depends on all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + x.mean((2, 3), keepdim=True)) / 2


def plainly(module: nn.Module, *, free: bool = True, side: int = 24) -> bytes:
    """`torch.onnx.export` as anybody calls it."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    axes = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        module.eval(),
        (torch.rand(1, 3, side, side),),
        buffer,
        dynamo=False,
        input_names=["in"],
        output_names=["out"],
        dynamic_axes={"in": axes, "out": axes} if free else None,
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def elsewhere() -> bytes:
    torch.manual_seed(0)
    return plainly(Elsewhere())


@pytest.fixture
def file(elsewhere: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere.onnx"
    path.write_bytes(elsewhere)
    return path


def session_of(model: bytes, spec: Spec) -> Callable[[np.ndarray], np.ndarray]:
    return artifact.open_model(model, ModelCard(family="", spec=spec, licence="")).transform


# --- import -----------------------------------------------------------------------------------------------------


def test_a_foreign_network_is_measured_and_its_tiles_equal_the_whole(mlflow_home: Path, file: Path) -> None:
    made = import_model(str(file), "elsewhere", "BSD-3-Clause")
    assert {key: made[key] for key in ("version", "kind", "scale", "align", "halo_px")} == {
        "version": 1, "kind": "transform", "scale": 2, "align": 1, "halo_px": RADIUS}  # fmt: skip
    registry = Registry()
    version = registry.resolve("elsewhere:1")
    folder = registry.fetch(version, mlflow_home / "cache")
    session = artifact.load(folder, expect_digest=version.digest)
    assert (folder / "model.onnx").read_bytes() == file.read_bytes()
    assert session.card.licence == "BSD-3-Clause"
    assert session.card.parity_max_abs is not None
    assert 0 < session.card.parity_max_abs < 1e-5

    picture = np.random.default_rng(3).random((1, 3, 70, 83)).astype(np.float32)
    whole = session.transform(picture)
    tiling = {"scale": 2, "tile_px": 24, "align": 1}
    assert np.array_equal(imaging.run_tiled(session.transform, picture, halo_px=RADIUS, **tiling), whole)
    short = imaging.run_tiled(session.transform, picture, halo_px=RADIUS - 1, **tiling)
    assert not np.array_equal(short, whole)  # control
    assert import_model(str(file), "elsewhere", "BSD-3-Clause")["version"] == 1  # again: the same version


def test_a_declared_halo_is_believed_only_where_tiles_are_exact(elsewhere: bytes) -> None:
    with pytest.raises(ParityError, match=rf"--halo={RADIUS - 1}: tiles differ .* measured to see {RADIUS} px"):
        foreign.probed(elsewhere, halo_px=RADIUS - 1)
    assert foreign.probed(elsewhere, halo_px=RADIUS).halo_px == RADIUS
    assert foreign.probed(elsewhere, halo_px=RADIUS + 3).halo_px == RADIUS + 3
    none = foreign.probed(elsewhere, why_untiled="its maker asks for it")
    assert (none.halo_px, none.halo_why_none) == (None, "its maker asks for it")


def test_sides_in_steps_are_found(elsewhere: bytes) -> None:
    model = plainly(Down())
    spec = foreign.probed(model)
    assert (spec.scale, spec.align, spec.halo_px) == (1, 4, 0)  # 4 px in, the same 4 px out
    picture = np.random.default_rng(3).random((1, 3, 70, 83)).astype(np.float32)
    run, tiling = session_of(model, spec), {"scale": 1, "halo_px": 0, "align": 4}
    tiled, whole = (imaging.run_tiled(run, picture, tile_px=px, **tiling) for px in (16, None))
    assert np.array_equal(tiled, whole)
    assert foreign.probed(elsewhere).align == 1  # control


def test_a_network_that_sees_everything_is_not_tiled() -> None:
    spec = foreign.probed(plainly(Pooled()))
    assert spec.halo_px is None
    assert "perhaps the whole picture" in spec.halo_why_none


def test_fixed_sides_are_served_as_they_are_and_no_others() -> None:
    spec = foreign.probed(plainly(Elsewhere(), free=False))
    assert (spec.inputs[0].shape, spec.outputs[0].shape) == ((1, 3, 24, 24), (1, 3, 48, 48))
    assert spec.halo_why_none == "the network takes 24x24 px only"
    assert len(plan(spec, 24, 24, EngineSettings()).tiles) == 1
    with pytest.raises(RayscaleError, match="24x24 px only"):
        plan(spec, 24, 25, EngineSettings())


def test_a_network_of_one_picture_at_a_time_is_given_one_at_a_time() -> None:
    model = network("Conv", [1, *RGB[1:]], [1, *RGB[1:]], pads=[1, 1, 1, 1])
    spec = foreign.probed(model)
    assert spec.inputs[0].shape == (1, 3, "h", "w")
    session = artifact.open_model(model, ModelCard(family="", spec=spec, licence=""))
    tiles, made = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8), {}
    job = TileJob(model=Model(session), deadline=1.0, tiles=list(tiles), place=made.__setitem__)
    execute([(job, index) for index in range(3)])
    assert all(np.array_equal(made[index], tiles[index]) for index in range(3))  # the kernel is the identity
    with pytest.raises(ConfigError):  # control: together it takes none
        session.transform(np.zeros((3, 3, 8, 8), np.float32))


@settings(max_examples=12, deadline=None)
@given(radius=st.integers(0, 6), weight=st.sampled_from([1.0, 1e-3, 1e-12]), scale=st.sampled_from([1, 2, 3]))
def test_reach_is_the_radius_however_little_the_last_pixel_weighs(radius: int, weight: float, scale: int) -> None:
    def run(nchw: np.ndarray) -> np.ndarray:
        around = np.pad(nchw, ((0, 0), (0, 0), (0, 0), (radius, radius)))
        width = nchw.shape[3]
        seen = nchw + np.float32(weight) * (around[..., :width] + around[..., 2 * radius : 2 * radius + width])
        return seen.repeat(scale, axis=2).repeat(scale, axis=3)

    assert halo.reach(run, 3, scale=scale, align=1) == radius


def network(node: str, given: list[Any], made: list[Any], *, kind: int = TensorProto.FLOAT, **attributes: Any) -> bytes:
    """One operator, its input `x` (and what else it needs) -> `y`."""
    extra = {"Mul": ("by", np.float32(255)), "Reshape": ("by", np.array([0, -1])), "Conv": ("by", _identity())}
    named = [numpy_helper.from_array(np.asarray(extra[node][1]), "by")] if node in extra else []
    edges = [helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", given), ("y", made))]
    inputs = ["x", *(t.name for t in named)]
    graph = helper.make_graph([helper.make_node(node, inputs, ["y"], **attributes)], "g", edges[:1], edges[1:], named)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


def _identity() -> np.ndarray:
    weight = np.zeros((3, 3, 3, 3), np.float32)
    weight[range(3), range(3), 1, 1] = 1.0
    return weight


RGB = ["n", 3, "h", "w"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (network("Relu", RGB, RGB), ""),  # control
        (network("Relu", ["n", 1, "h", "w"], ["n", 1, "h", "w"]), "has one channel, luma"),
        (network("Relu", ["n", "h", "w", 3], ["n", "h", "w", 3]), "channels last"),
        (network("Relu", ["n", 4, "h", "w"], ["n", 4, "h", "w"]), "has 4 channels"),
        (network("Relu", [4, 3, "h", "w"], [4, 3, "h", "w"]), "batch is fixed at 4"),
        (network("Relu", ["n", 3, 32, "w"], ["n", 3, 32, "w"]), "one side is fixed"),
        (network("Relu", RGB, RGB, kind=TensorProto.FLOAT16), "must be float32"),
        (network("Reshape", RGB, ["n", "d"]), "is no picture"),
        (network("Mul", RGB, RGB), r"must give one in \[0, 1\]"),
        (network("Conv", RGB, ["n", 3, "a", "b"]), r"at 49x48 px=gave \[1, 3, 46, 47\]"),
        (network("Conv", RGB, RGB, pads=[1, 1, 1, 1]), ""),  # control
        (network("Relu", RGB, ["n", 3, 48, 48]), "stated as fixed"),
    ],
)
def test_what_is_no_function_of_pictures_is_refused_with_the_reason(model: bytes, says: str) -> None:
    if not says:
        assert foreign.probed(model).scale == 1
        return
    with pytest.raises(ConfigError, match=says) as refused:
        foreign.probed(model)
    assert "\n" not in str(refused.value)


def test_what_is_refused_registers_nothing(mlflow_home: Path, file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(file.read_bytes()[:-2000])
    for arguments, error in (
        ({"file": str(broken), "licence": "MIT"}, IntegrityError),
        ({"file": str(tmp_path / "none.onnx"), "licence": "MIT"}, MissingError),
        ({"file": str(file)}, ConfigError),  # no licence
        ({"file": str(file), "licence": "MIT", "halo": 3, "untiled": "so"}, ConfigError),
        ({"file": str(file), "licence": "MIT", "halo": RADIUS - 1}, ParityError),
    ):
        with pytest.raises(error):
            import_model(name="m", **arguments)  # type: ignore[arg-type]
    assert import_model(str(file), "m", "MIT", dry_run=True)["version"] is None
    assert Registry().names() == ()


def test_a_card_is_taken_as_declared_and_held_against_the_network(
    mlflow_home: Path, elsewhere: bytes, file: Path, tmp_path: Path
) -> None:
    spec = foreign.probed(elsewhere)

    def declared(halo_px: int) -> str:
        path = tmp_path / f"card-{halo_px}.json"
        changed = Spec(**{**vars(spec), "halo_px": halo_px})
        path.write_text(dumps(ModelCard(family="theirs", spec=changed, licence="MIT")))
        return str(path)

    with pytest.raises(ParityError, match=f"halo_px={RADIUS - 1}"):
        import_model(str(file), "m", card=declared(RADIUS - 1))
    with pytest.raises(ConfigError, match="no effect beside --card"):
        import_model(str(file), "m", "MIT", card=declared(RADIUS))
    import_model(str(file), "m", card=declared(RADIUS))
    assert Registry().resolve("m:1").tags["family"] == "theirs"


# --- looking, moving back, deleting -----------------------------------------------------------------------------


def constant(weight: float) -> bytes:
    by = numpy_helper.from_array(np.float32(weight), "by")
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, RGB) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "by"], ["y"])], "g", edges[:1], edges[1:], [by])
    return bytes(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )


SPEC = Spec(kind="transform", inputs=(TensorSpec(name="x", shape=("n", 3, "h", "w")),),
            outputs=(TensorSpec(name="y", shape=("n", 3, "h", "w")),), halo_px=0)  # fmt: skip
CARD = ModelCard(family="scaled", spec=SPEC, licence="MIT", lineage=Lineage(recipe="recipes:tiny", images_seen=7))


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

    found = decide(scores(version.digest, 31.0), None, scores("bicubic", 29.5), Gate(), CARD)
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
    three.alias("m", "champion", 2)
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
    three.alias("m", "canary", 3)
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
