"""What is exported says what was trained, or it is not exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from rayscale import artifact, imaging
from rayscale.artifact import digest_of, load
from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError, ConflictError, ParityError, RayscaleError
from rayscale.export import PARITY_MAX_ABS, to_onnx
from rayscale.tasks.compact import Compact

SCALE, BLOCKS = 2, 2


def card_of(*, scale: int = 1, align: int = 1, halo_px: int | None = 0, out: str | None = None) -> ModelCard:
    side = f"{scale}*" if scale > 1 else ""
    image = TensorSpec(name="image", shape=("n", 3, "h", "w"))
    result = TensorSpec(name="image_out", shape=("n", 3, out or f"{side}h", f"{side}w"))
    why = "" if halo_px is not None else "looks at the whole picture"
    spec = Spec(kind="transform", inputs=(image,), outputs=(result,), scale=scale, align=align, halo_px=halo_px,
                halo_why_none=why)  # fmt: skip
    return ModelCard(family="test", licence="MIT", spec=spec)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    """The compact family with weights that use every one of its pixels, as training leaves them."""
    torch.manual_seed(0)
    task = Compact(scale=SCALE, features=8, blocks=BLOCKS)
    nets = task.build(torch.device("cpu"))
    for parameter in nets["ema"].parameters():
        nn.init.normal_(parameter, std=0.15)
    return task.shipped(nets)[""]


@pytest.fixture(scope="module")
def card() -> ModelCard:
    spec = Compact(scale=SCALE, features=8, blocks=BLOCKS).specs[""]
    return ModelCard(family="compact", licence="MIT", spec=spec)


@pytest.fixture(scope="module")
def exported(module: nn.Module, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    assert to_onnx(module, card, folder) == load(folder).card
    return folder


class Of(nn.Module):
    """A module of one function of one tensor."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(x)


class OfTwo(Of):
    def forward(self, x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        return self.function(x, y)


def refused(module: nn.Module, card: ModelCard, folder: Path, error: type[RayscaleError] = ParityError) -> str:
    """Export must fail in one line and leave nothing. Returns the line."""
    with pytest.raises(error) as caught:
        to_onnx(module, card, folder / "model")
    assert list(folder.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_anyone_can_run_it_and_gets_what_torch_gives(exported: Path, module: nn.Module) -> None:
    session = ort.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 1, 1), (2, 3, 19, 31), (5, 3, 64, 3)):  # none of them seen by the export
        picture = np.random.default_rng(7).random(shape, np.float32)
        (actual,) = session.run(None, {"image": picture})
        with torch.inference_mode():
            expected = module(torch.from_numpy(picture)).numpy()
        assert actual.shape == (shape[0], 3, 2 * shape[2], 2 * shape[3])
        assert np.abs(actual - expected).max() <= PARITY_MAX_ABS
        np.testing.assert_array_equal(load(exported).transform(picture), actual)
    assert expected.std() > 0.05, "a constant would prove nothing"


def test_the_file_is_one_plain_model_with_free_axes(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(w.external_data for w in model.graph.initializer)
    assert {o.domain for o in model.opset_import} == {""}, "standard operators only"
    axes = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim]
            for t in (model.graph.input[0], model.graph.output[0])]  # fmt: skip
    assert axes == [["n", 3, "h", "w"], ["n", 3, "2*h", "2*w"]]
    parity = load(exported).card.parity_max_abs
    assert parity is not None
    assert 0 < parity <= PARITY_MAX_ABS


def test_export_says_nothing_and_tells_no_paths(
    exported: Path, module: nn.Module, card: ModelCard, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    to_onnx(copy.deepcopy(module), card, tmp_path / "again")
    assert capfd.readouterr() == ("", "")
    data = (exported / "model.onnx").read_bytes()
    for path in (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), ".py"):
        assert path.encode() not in data
    assert digest_of(tmp_path / "again") == digest_of(exported), "equal weights, equal artifact"


def test_the_module_is_left_as_it_was(exported: Path, module: nn.Module, card: ModelCard, tmp_path: Path) -> None:
    training = copy.deepcopy(module).train().to(memory_format=torch.channels_last).double()
    before = {k: v.clone() for k, v in training.state_dict().items()}
    to_onnx(training, card, tmp_path / "model")
    assert training.training
    assert all(p.dtype == torch.float64 for p in training.parameters())
    assert all(torch.equal(v, before[k]) for k, v in training.state_dict().items())
    assert digest_of(tmp_path / "model") == digest_of(exported), "how weights lie in memory is not what they are"


def test_another_model_does_not_overwrite(exported: Path, module: nn.Module, card: ModelCard) -> None:
    digest = digest_of(exported)
    with pytest.raises(ConflictError):
        to_onnx(module, replace(card, licence="other"), exported)
    assert digest_of(exported) == digest


def test_a_halo_one_pixel_short_is_refused(module: nn.Module, card: ModelCard, tmp_path: Path) -> None:
    assert card.spec.halo_px == BLOCKS + 2  # with it, `exported` passed
    short = replace(card, spec=replace(card.spec, halo_px=BLOCKS + 1))
    assert f"spec.halo_px={BLOCKS + 1}" in refused(module, short, tmp_path)


def test_a_halo_that_is_not_exact_says_by_how_much(module: nn.Module, card: ModelCard, tmp_path: Path) -> None:
    short = replace(card, spec=replace(card.spec, halo_px=BLOCKS + 1, halo_error=1e-7))
    assert "the card allows 1e-07" in refused(module, short, tmp_path)
    near = replace(short, spec=replace(short.spec, halo_error=0.2))
    assert to_onnx(module, near, tmp_path / "near").spec.halo_error == 0.2


def masked(image: Tensor, mask: Tensor) -> Tensor:
    return (nn.functional.avg_pool2d(mask, 3, 1, 1) * image).clamp(0, 1)


def test_the_mask_is_cut_with_the_picture(tmp_path: Path) -> None:
    mask = TensorSpec(name="mask", shape=("n", 1, "h", "w"))
    base = card_of(halo_px=1)
    filling = replace(base, spec=replace(base.spec, inputs=(*base.spec.inputs, mask)))
    short = replace(filling, spec=replace(filling.spec, halo_px=0))
    assert "spec.halo_px=0" in refused(OfTwo(masked), short, tmp_path)
    to_onnx(OfTwo(masked), filling, tmp_path / "exact")


def test_tiles_equal_the_whole(exported: Path) -> None:
    transform, spec = load(exported).transform, load(exported).card.spec
    picture = np.random.default_rng(3).random((1, 3, 61, 83), np.float32)
    whole = transform(picture)

    def tiled(halo_px: int) -> np.ndarray:
        return imaging.run_tiled(transform, picture, scale=SCALE, tile_px=24, halo_px=halo_px, align=1)

    assert spec.halo_px is not None
    np.testing.assert_array_equal(tiled(spec.halo_px), whole)
    assert not np.array_equal(tiled(spec.halo_px - 1), whole)


def differs_when_exported(x: Tensor) -> Tensor:
    return (x * (0.999 if torch.onnx.is_in_onnx_export() else 1.0)).clamp(0, 1)


def channel_mean(x: Tensor) -> Tensor:
    wide = torch.cat([x * k for k in (0.11, 0.23, 0.37, 0.51, 0.7, 0.9)], dim=1)
    return (x - wide.mean(dim=1, keepdim=True)).clamp(0, 1)


def mirrored(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")[..., 2:-2, 2:-2].clone()  # not of a single pixel


NOT_A_NUMBER = float("nan")


@pytest.mark.parametrize(
    ("function", "card", "says"),
    [
        (differs_when_exported, card_of(), "within 0.0001 of torch"),
        (lambda x: x * NOT_A_NUMBER, card_of(), "within 0.0001 of torch"),
        (lambda x: (x - x.mean(dim=0, keepdim=True)).clamp(0, 1), card_of(), "must not depend on its batch"),
        (channel_mean, card_of(), "must not depend on its batch"),
        (lambda x: x * 1.5, card_of(), "clamp the output"),
        (lambda x: x - 0.1, card_of(), "clamp the output"),
        (lambda x: x.repeat(1, 1, 2, 2), card_of(scale=3, halo_px=None), "(1, 3, 3, 3)"),
        (lambda x: (x - x.mean(dim=(2, 3), keepdim=True)).clamp(0, 1), card_of(halo_px=8), "spec.halo_px=8"),
        (mirrored, card_of(), "raise spec.align"),
    ],
)  # fmt: skip
def test_what_the_card_does_not_say_is_refused(
    function: Callable[[Tensor], Tensor], card: ModelCard, says: str, tmp_path: Path
) -> None:
    assert says in refused(Of(function), card, tmp_path)


def test_the_same_functions_pass_under_a_card_that_is_true(tmp_path: Path) -> None:
    """Negative control of the test above: it is the card that was wrong there."""
    to_onnx(Of(lambda x: x.clamp(0, 1)), card_of(), tmp_path / "identity")
    to_onnx(Of(lambda x: x.repeat(1, 1, 2, 2)), card_of(scale=2, halo_px=None), tmp_path / "double")
    whole = Of(lambda x: (x - x.mean(dim=(2, 3), keepdim=True)).clamp(0, 1))
    to_onnx(whole, card_of(halo_px=None), tmp_path / "global")
    assert load(tmp_path / "global").card.spec.halo_why_none


def test_alignment_is_part_of_the_shapes(tmp_path: Path) -> None:
    def blocks(x: Tensor) -> Tensor:
        small = nn.functional.pixel_unshuffle(x, 4)
        return nn.functional.pixel_shuffle(small.flip(1), 4)

    line = refused(Of(blocks), card_of(align=1), tmp_path, ConfigError)
    assert "spec.align" in line
    to_onnx(Of(blocks), card_of(align=4), tmp_path / "model")
    session = load(tmp_path / "model")
    assert session.transform(np.zeros((1, 3, 8, 12), np.float32)).shape == (1, 3, 8, 12)
    with pytest.raises(ConfigError, match="multiple of 4"):
        session.transform(np.zeros((1, 3, 8, 10), np.float32))


def test_several_inputs_and_other_kinds(tmp_path: Path) -> None:
    image = TensorSpec(name="image", shape=("n", 3, "h", "w"))
    mask = TensorSpec(name="mask", shape=("n", 1, "h", "w"))
    out = TensorSpec(name="image_out", shape=("n", 3, "h", "w"))
    paint = Spec(kind="transform", inputs=(image, mask), outputs=(out, replace(mask, name="mask_out")), halo_px=0)
    to_onnx(OfTwo(lambda x, m: (x * m, 1 - m)), replace(card_of(), spec=paint), tmp_path / "paint")
    pixels = {"image": np.full((2, 3, 5, 4), 0.5, np.float32), "mask": np.full((2, 1, 5, 4), 0.25, np.float32)}
    found = load(tmp_path / "paint").run(pixels)
    assert {k: float(v.mean()) for k, v in found.items()} == {"image_out": 0.125, "mask_out": 0.75}

    noise = TensorSpec(name="noise", shape=("n", 48), low=-4.0, high=4.0)
    picture = TensorSpec(name="image", shape=("n", 3, 4, 4))
    generate = Spec(kind="generate", inputs=(noise,), outputs=(picture,))
    to_onnx(Of(lambda z: torch.sigmoid(z).reshape(-1, 3, 4, 4)), replace(card_of(), spec=generate), tmp_path / "gen")
    assert load(tmp_path / "gen").run({"noise": np.zeros((3, 48), np.float32)})["image"].mean() == 0.5

    line = refused_keys(replace(generate, outputs=(picture, replace(picture, name="second"))), tmp_path)
    assert "outputs" in line


def refused_keys(spec: Spec, folder: Path) -> str:
    (folder / "empty").mkdir()
    module = Of(lambda z: torch.sigmoid(z).reshape(-1, 3, 4, 4))
    with pytest.raises(ConfigError) as caught:
        to_onnx(module, replace(card_of(), spec=spec), folder / "empty" / "model")
    assert list((folder / "empty").iterdir()) == []
    return str(caught.value)


def test_an_output_axis_must_come_from_an_input(tmp_path: Path) -> None:
    assert "is no axis of an input" in refused(Of(lambda x: x), card_of(out="k"), tmp_path, ConfigError)


def test_the_probe_travels_with_the_model(exported: Path) -> None:
    with np.load(exported / "golden.npz") as golden:
        assert golden["in/image"].shape == (1, 3, 16, 12), "unequal sides: a transposed picture is noticed"
        assert golden["in/image"].std() > 0.2
        np.testing.assert_array_equal(artifact.load(exported).transform(golden["in/image"]), golden["out/image_out"])
