"""`rayscale models import`: networks made elsewhere are measured, made RGB, or refused with the reason."""

from __future__ import annotations

import dataclasses
import io
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from torch import nn

from rayscale import artifact, halo, imaging
from rayscale.artifact import Session
from rayscale.cli.transfer import import_model
from rayscale.contract import ModelCard, Spec, dumps
from rayscale.errors import ConfigError, IntegrityError, MissingError, ParityError, RayscaleError
from rayscale.evaluate.model import picture_run, session_model
from rayscale.registry import foreign
from rayscale.registry.models import Registry
from rayscale.serve.batching import Model, TileJob, execute
from rayscale.serve.engine import Canvas, EngineSettings, plan

TESTS = Path(__file__).parents[1]
small, served = runpy.run_path(str(TESTS / "small_onnx.py")), runpy.run_path(str(TESTS / "service.py"))
photo = served["photo"]
RADIUS = 4  # of Elsewhere: 2 of the 5x5, 1 of each 3x3
RGB, GREY = ["n", 3, "h", "w"], ["n", 1, "h", "w"]


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


def plainly(module: nn.Module, *, free: bool = True, sides: tuple[int, int] = (24, 24)) -> bytes:
    """`torch.onnx.export` as anybody calls it."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    axes = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        module.eval(),
        (torch.rand(1, 3, *sides),),
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


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90))
def test_a_network_of_one_size_takes_pictures_of_every_size(
    one_size: tuple[Session, Session], height: int, width: int
) -> None:
    fixed, free = one_size
    spec = fixed.card.spec
    assert spec.fixed_px == FIXED_PX
    picture = photo(height, width)
    canvas = Canvas(plan(spec, height, width, EngineSettings()), picture)
    assert {tile.shape[:2] for tile in canvas.tiles} == {FIXED_PX}
    made = run_canvas(fixed, canvas)
    below, right = (max(0, least - side) for least, side in zip(FIXED_PX, (height, width), strict=True))
    padded = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
    whole = imaging.to_hwc_u8(free.transform(imaging.to_nchw_f32(padded)))  # its twin takes any size at once
    scale = spec.scale
    assert np.array_equal(made, whole[: height * scale, : width * scale])
    assert np.array_equal(made, picture_run(session_model(fixed))(picture))  # what is scored


@pytest.mark.parametrize("dropped", [1, 2])
def test_a_network_of_one_size_is_seen_to_have_seams_where_its_halo_is_short(
    one_size: tuple[Session, Session], dropped: int
) -> None:
    fixed, free = one_size
    spec = dataclasses.replace(fixed.card.spec, halo_px=(fixed.card.spec.halo_px or 0) - dropped)
    picture = photo(80, 70)
    made = run_canvas(fixed, Canvas(plan(spec, 80, 70, EngineSettings()), picture))
    assert not np.array_equal(made, imaging.to_hwc_u8(free.transform(imaging.to_nchw_f32(picture))))


FIXED_PX = (28, 32)


@pytest.fixture(scope="module", params=["rgb", "luma"])
def one_size(request: pytest.FixtureRequest) -> tuple[Session, Session]:
    """As imported: a network of FIXED_PX only, and the same one with free sides."""
    if request.param == "rgb":
        net = Elsewhere()
        halo_px, both = RADIUS, [plainly(net, free=free, sides=FIXED_PX) for free in (False, True)]
    else:
        halo_px, both = 3, [foreign.adapted(small["luma_bytes"](5, sides)) for sides in (FIXED_PX, None)]
    found = []
    for model in both:
        spec = foreign.probed(model)
        assert (spec.halo_px, spec.align) == (halo_px, 1)
        found.append(artifact.open_model(model, ModelCard(family="", spec=spec, licence=""), threads=1))
    return found[0], found[1]


def run_canvas(session: Session, canvas: Canvas) -> np.ndarray:
    for index, tile in enumerate(canvas.tiles):
        canvas.place(index, imaging.to_hwc_u8(session.transform(imaging.to_nchw_f32(tile))))
    return canvas.result


def test_a_network_of_one_size_has_its_grid_and_its_halo_measured() -> None:
    spec = foreign.probed(plainly(Down(), free=False))  # blocks of 4 px, each for itself
    assert (spec.fixed_px, spec.align, spec.halo_px) == ((24, 24), 4, 0)
    far = foreign.probed(plainly(Elsewhere(), free=False, sides=(15, 40)))  # 4 px are more than a quarter of 15
    assert far.halo_why_none.startswith("an output pixel sees further than 3 px")
    assert len(plan(far, 15, 40, EngineSettings()).tiles) == 1
    with pytest.raises(RayscaleError, match="40x15 px only"):
        plan(far, 15, 41, EngineSettings())
    model = plainly(Elsewhere(), free=False)
    assert foreign.probed(model, halo_px=RADIUS + 1).halo_px == RADIUS + 1
    with pytest.raises(ParityError, match=f"--halo={RADIUS - 1}: tiles differ"):
        foreign.probed(model, halo_px=RADIUS - 1)
    with pytest.raises(ParityError):
        foreign.checked(model, dataclasses.replace(foreign.probed(model), halo_px=RADIUS - 1))


# --- luma -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [10, 20])
@pytest.mark.parametrize("scale", [1, 3])
def test_luma_goes_through_the_network_and_colours_are_enlarged(opset: int, scale: int) -> None:
    inner = small["luma_bytes"](5, opset=opset) if scale == 3 else network("Relu", GREY, GREY)
    model = foreign.adapted(inner)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    spec = foreign.probed(model)
    assert (spec.scale, spec.inputs[0].shape) == (scale, ("n", 3, "h", "w"))
    assert (foreign.parity(model, spec) or 1.0) < 1e-5 or scale == 1
    picture = np.random.default_rng(0).uniform(0.3, 0.6, (40, 50, 3)).astype(np.float32)
    made = session_of(model, spec)(picture.transpose(2, 0, 1)[None])[0]

    y = picture @ np.float32([0.299, 0.587, 0.114])  # as its maker would
    cb, cr = ((picture[..., 2] - y) / 1.772, (picture[..., 0] - y) / 1.402)
    through = reference_of(inner)(y[None, None])[0, 0]
    size = (50 * scale, 40 * scale)
    cb, cr = (np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in (cb, cr))
    red, blue = through + 1.402 * cr, through + 1.772 * cb
    green = (through - 0.299 * red - 0.114 * blue) / 0.587
    inside = slice(3 * scale, -3 * scale)  # Pillow's border is its own
    theirs = np.stack([red, green, blue]).clip(0, 1)[:, inside, inside]
    assert np.abs(made[:, inside, inside] - theirs).max() < 1e-5
    assert np.abs(made[::-1, inside, inside] - theirs).max() > 0.05  # control


def reference_of(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    evaluator = ReferenceEvaluator(model)
    return lambda nchw: np.asarray(evaluator.run(None, {evaluator.input_names[0]: nchw})[0])


@pytest.mark.parametrize("kind", ["luma of one size", "RGB of free sides"])
def test_what_is_imported_is_served_in_exact_tiles(
    mlflow_home: Path, file: Path, elsewhere: bytes, tmp_path: Path, kind: str
) -> None:
    free, least = elsewhere, (1, 1)
    if kind.startswith("luma"):
        free, least = foreign.adapted(small["luma_bytes"](5)), FIXED_PX
        file = tmp_path / "luma.onnx"
        file.write_bytes(small["luma_bytes"](5, FIXED_PX))
    made = import_model(str(file), "m", "Apache-2.0")
    registry, scale = Registry(), made["scale"]
    folder = registry.fetch(registry.resolve("m:1"), mlflow_home / "cache")
    run = session_of(free, foreign.probed(free))
    service = served["Service"](folder, made["digest"])  # tiles of 48 px where sides are free
    try:
        for height, width, tiling in ((61, 77, "tiled"), (28, 32, "whole"), (27, 190, "tiled"), (5, 3, "whole")):
            picture = photo(height, width)
            response = service.upscale(served["png"](picture))
            assert response.status_code == 200, response.text
            assert response.headers["x-rayscale-tiling"].startswith(tiling)
            padding = [(0, max(0, side - have)) for side, have in zip(least, (height, width), strict=True)]
            padded = np.pad(picture, (*padding, (0, 0)), mode="edge")
            whole = imaging.to_hwc_u8(run(imaging.to_nchw_f32(padded)))[: height * scale, : width * scale]
            assert np.array_equal(served["decoded"](response.content), whole)
    finally:
        service.gateway.close()


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
    extra = {
        "Mul": ("by", np.float32(255)),
        "Reshape": ("by", np.array([0, -1])),
        "Conv": ("by", _identity()),
        "Tile": ("by", np.array([1, 3, 1, 1])),
    }
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


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (network("Relu", RGB, RGB), ""),  # control
        (network("Relu", GREY, GREY), ""),
        (network("Tile", GREY, RGB), "has 1 channels"),
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
        assert foreign.probed(foreign.adapted(model)).scale == 1
        return
    with pytest.raises(ConfigError, match=says) as refused:
        foreign.probed(foreign.adapted(model))
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
