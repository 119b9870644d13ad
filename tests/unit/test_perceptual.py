"""Frozen feature nets: their definitions, their weights from files, and the one that needs none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.losses import perceptual, style
from rayscale.perceptual import FilterBank, Layers, PerceptualNet, squeezenet11, vgg

CPU = torch.device("cpu")


def photo(px: int = 64) -> Tensor:
    import skimage.data

    return torch.from_numpy(skimage.data.astronaut()[100 : 100 + px, 180 : 180 + px]).permute(2, 0, 1)[None] / 255


def blurred(x: Tensor, px: int) -> Tensor:
    return avg_pool2d(x, px, stride=1, padding=px // 2, count_include_pad=False)


# --- the bank ---


def test_the_bank_needs_no_file_and_is_frozen() -> None:
    net = PerceptualNet().build(CPU)
    assert [tuple(m.shape) for m in net(photo())] == [(1, 24, 64, 64), (1, 24, 32, 32), (1, 24, 16, 16)]
    assert not any(p.requires_grad for p in net.parameters())
    assert list(net.parameters()), "a net without parameters has no norm to check"
    again = PerceptualNet().build(CPU)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_the_bank_sees_edges_and_not_brightness() -> None:
    net = FilterBank()
    assert max(m.max().item() for m in net(torch.full((1, 3, 32, 32), 0.7))) < 1e-4
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1.0
    across, along = (net(x)[0].amax((0, 2, 3)) for x in (edge, edge.mT))
    assert across.argmax() != along.argmax(), "directions are told apart"


def test_worse_pictures_are_further_away() -> None:
    net, x = FilterBank(), photo()
    for distance in (perceptual, style):
        found = [distance(net(blurred(x, px)), net(x)).item() for px in (1, 3, 5, 9)]
        assert found == sorted(found)
        assert found[0] == pytest.approx(0.0, abs=1e-6)
        assert found[1] > 0.05


def test_an_error_in_a_quiet_place_weighs_more() -> None:
    """Unlike in L1: the masking of human vision."""
    net, noise = FilterBank(), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quiet = torch.full((1, 3, 32, 32), 0.5)
    busy = quiet + 0.3 * noise.roll(5, 2)
    distances = [sum((a - b).abs().mean() for a, b in zip(net(x + 0.02 * noise), net(x), strict=True)).item()  # type: ignore[union-attr]
                 for x in (quiet, busy)]  # fmt: skip
    assert distances[0] > 3 * distances[1]


def test_its_gradient_restores_detail() -> None:
    net, target = FilterBank(), photo(32)
    wanted = net(target)
    x = nn.Parameter(blurred(target, 5))
    before = (x - target).abs().mean().item()
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        perceptual(net(x), wanted).backward()
        optimizer.step()
    assert (x - target).abs().mean().item() < 0.7 * before


# --- weights from files ---


def randomised() -> Layers:
    torch.manual_seed(0)
    net = Layers(squeezenet11(), "imagenet")
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def onnx_of(net: nn.Module, path: Path) -> None:
    """Its convolutions as an ONNX file has them: in order, under names that mean nothing."""
    weights, nodes = [], []
    for i, conv in enumerate(m for m in net.modules() if isinstance(m, nn.Conv2d)):
        names = [f"w{100 - i}", f"b{100 - i}"]
        assert conv.bias is not None
        for name, value in zip(names, (conv.weight, conv.bias), strict=True):
            weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        nodes.append(helper.make_node("Conv", [f"x{i}", *names], [f"x{i + 1}"]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x0", f"x{len(nodes)}")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "net", values[:1], values[1:], weights)), path)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_weights_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    net, path = randomised(), tmp_path / f"weights{suffix}"
    if suffix == ".onnx":
        onnx_of(net, path)
    else:
        save_file({**net.state_dict(), "classifier.1.weight": torch.zeros(3)}, path)
    found = PerceptualNet(net="squeezenet11", uri=str(path)).build(CPU)
    assert all(torch.equal(a, b) for a, b in zip(found(photo()), net(photo()), strict=True))
    assert not any(p.requires_grad for p in found.parameters())


def test_a_file_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.onnx"
    onnx_of(randomised(), path)
    with pytest.raises(ConfigError, match=r"features\.0\.weight must be \(64, 3, 3, 3\)|features\.2\.weight must be"):
        PerceptualNet(net="vgg16", uri=str(path)).build(CPU)
    with pytest.raises(MissingError):
        PerceptualNet(net="vgg16", uri=str(tmp_path / "none.onnx")).build(CPU)
    for name in ("broken.onnx", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"\x01broken")
        with pytest.raises(IntegrityError, match="cannot be read"):
            PerceptualNet(net="squeezenet11", uri=str(tmp_path / name)).build(CPU)


def test_a_setting_without_effect_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the bank is built in"):
        PerceptualNet(uri="weights.onnx")
    with pytest.raises(ConfigError, match="vgg19 needs a file of weights"):
        PerceptualNet(net="vgg19")


def test_vggs_taps_are_before_the_activation() -> None:
    for stages, convolutions in (((2, 2, 3, 3, 3), 13), ((2, 2, 4, 4, 4), 16)):
        body, taps = vgg(stages)
        assert [type(body[i]) for i in taps] == [nn.Conv2d] * 5
        assert sum(isinstance(m, nn.Conv2d) for m in body) == convolutions
        assert taps[-1] == len(body) - 1, "nothing is computed that no tap needs"


def test_what_the_weights_were_trained_with() -> None:
    """torchvision: RGB by mean and deviation; Caffe: BGR of 0..255 less a mean."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
    found = {kind: Layers((nn.Sequential(Same()), (0,)), kind)(red)[0].flatten() for kind in ("imagenet", "caffe")}
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found["imagenet"], expected)
    torch.testing.assert_close(found["caffe"], torch.tensor([-103.939, -116.779, 255 - 123.68]))


def test_squeezenet_is_the_one_in_the_file(eval_data: Path) -> None:
    """Every layer, against the file's own graph in ONNX's reference evaluator; colour order and mean included."""
    path = eval_data.parent / "models" / "squeezenet11_features.onnx"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the evaluation data")
    from onnx.reference import ReferenceEvaluator

    x = photo(63)
    ours = PerceptualNet(net="squeezenet11", uri=str(path), normalisation="caffe").build(CPU)(x)
    evaluator = ReferenceEvaluator(onnx.load(path))
    taps = ("conv1", "fire3", "fire5", "fire9")
    theirs = dict(zip(evaluator.output_names, evaluator.run(None, {"rgb255": 255 * x.numpy()}), strict=True))
    for tap, found in zip(taps, ours, strict=True):
        np.testing.assert_allclose(found.numpy(), theirs[tap], rtol=1e-3, atol=1e-3 * np.abs(theirs[tap]).max())
    wrong = PerceptualNet(net="squeezenet11", uri=str(path)).build(CPU)(x)[0].numpy()
    assert np.abs(wrong - theirs["conv1"]).max() > 0.1 * np.abs(theirs["conv1"]).max(), "negative control"
