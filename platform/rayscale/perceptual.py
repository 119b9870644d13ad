"""Frozen feature nets whose layers a loss compares. Their weights come from a file, or are built in.

The file is ONNX, whose convolutions are taken in the order they are computed, or safetensors with torchvision's names
("features.0.weight"). ONNX Runtime has no gradient, so the nets are our own definitions. The built-in bank of filters
needs no file. A frozen net is one of a task's nets: checkpoints carry it, and a resumed run goes on with the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import onnx
import onnx.numpy_helper
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad

from rayscale.errors import ConfigError, IntegrityError
from rayscale.storage import open_store

Named = Literal["bank", "squeezenet11", "vgg16", "vgg19"]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
_CAFFE = (103.939, 116.779, 123.68)  # of BGR in [0, 255]
_VGG = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # convolutions of each stage


@dataclass(frozen=True, kw_only=True)
class PerceptualNet:
    """Which frozen net, and where its weights are."""

    net: Named = "bank"
    uri: str = ""  # of the weights: .onnx or .safetensors; none for the bank
    normalisation: Literal["imagenet", "caffe"] = "imagenet"  # what the weights were trained with

    def __post_init__(self) -> None:
        if self.net == "bank" and self.uri:
            raise ConfigError("task.perceptual.uri", self.uri, "the bank is built in, no file is read", "leave it out")
        if self.net != "bank" and not self.uri.endswith((".onnx", ".safetensors")):
            rule = f"{self.net} needs a file of weights, .onnx or .safetensors"
            raise ConfigError(
                "task.perceptual.uri", self.uri or "(none)", rule, "name one, or take perceptual.net=bank"
            )

    def build(self, device: torch.device) -> nn.Module:
        """f32[n, 3, h, w] in [0, 1] -> its layers, a list of f32[n, c, h', w'], fine to coarse. Frozen.

        Raises: MissingError; IntegrityError for a file that cannot be read; ConfigError for weights of another net.
        """
        if self.net == "bank":
            net: nn.Module = FilterBank()
        else:
            body = squeezenet11() if self.net == "squeezenet11" else vgg(_VGG[self.net])
            net = Layers(body, self.normalisation)
            load(net, self.uri)
        return net.to(device).eval().requires_grad_(False)


class Layers(nn.Module):
    """The outputs of a feature net at its taps, after normalising what goes in."""

    mean: Tensor
    scale: Tensor

    def __init__(self, body: tuple[nn.Sequential, tuple[int, ...]], normalisation: str) -> None:
        super().__init__()
        self.features, self.taps = body
        self.swapped = normalisation == "caffe"
        mean = torch.tensor(_CAFFE) / 255 if self.swapped else torch.tensor(_IMAGENET[0])
        scale = torch.full((3,), 255.0) if self.swapped else 1 / torch.tensor(_IMAGENET[1])
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = ((x.flip(1) if self.swapped else x) - self.mean) * self.scale
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found


class Fire(nn.Module):
    """Few channels, then two kinds of convolution side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


def squeezenet11() -> tuple[nn.Sequential, tuple[int, ...]]:
    """SqueezeNet 1.1 (Iandola et al., arXiv:1602.07360) and its taps: conv1, fire3, fire5, fire9."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()]
    channels, taps = 64, [1]
    for stage in (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256))):
        layers.append(nn.MaxPool2d(3, stride=2))
        for squeezed, expanded in stage:
            layers.append(Fire(channels, squeezed, expanded))
            channels = 2 * expanded
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taps)


def vgg(stages: tuple[int, ...]) -> tuple[nn.Sequential, tuple[int, ...]]:
    """VGG (Simonyan and Zisserman, arXiv:1409.1556) and its taps: each stage's last convolution.

    Before the activation, where features are denser and brightness is kept (ESRGAN, arXiv:1809.00219).
    """
    layers: list[nn.Module] = []
    channels, taps = 3, []
    for number, convolutions in enumerate(stages):
        for _ in range(convolutions):
            width = min(64 * 2**number, 512)
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(len(layers) - 2)
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[: taps[-1] + 1]), tuple(taps)


def load(net: nn.Module, uri: str) -> None:
    """The weights of a file into a net. Raises: as `PerceptualNet.build`."""
    folder, slash, file = uri.rpartition("/")
    data = open_store(folder or slash or ".").read(file)
    try:
        given = safetensors.torch.load(data) if file.endswith(".safetensors") else _by_order(net, data)
    except Exception as error:  # protobuf's and safetensors' classes share no base of their own
        raise IntegrityError("task.perceptual.uri", uri, "cannot be read", f"fetch it again ({error})") from None
    for name, parameter in net.named_parameters():
        found = given.get(name)
        if found is None or found.shape != parameter.shape:
            shown = "none" if found is None else tuple(found.shape)
            rule = f"{name} must be {tuple(parameter.shape)}, {uri} has {shown}"
            raise ConfigError("task.perceptual.net", type(net).__name__, rule, "name the net that these weights are of")
        parameter.data.copy_(found)


def _by_order(net: nn.Module, data: bytes) -> dict[str, Tensor]:
    """An ONNX file's convolutions, in the order they are computed, under the names of the net's."""
    graph = onnx.load_from_string(data).graph
    weights = {w.name: w for w in graph.initializer}
    values = [
        torch.from_numpy(onnx.numpy_helper.to_array(weights[name]).copy())
        for node in graph.node
        if node.op_type == "Conv"
        for name in node.input[1:]
        if name in weights
    ]
    return dict(zip((name for name, _ in net.named_parameters()), values, strict=False))


class FilterBank(nn.Module):
    """Oriented edges and bars of gray, edges of two colour differences, on three scales, without a file.

    As in the first stage of vision: both signs apart, and divided by what is around, so that an error in a quiet
    place weighs more than one in a busy place (normalised Laplacian pyramid, Laparra et al. 2016). All weights are
    fixed: they are parameters so that the net is moved and kept as any other.
    """

    SCALES, ORIENTATIONS, SIGMA_PX, RADIUS_PX = 3, 4, 1.0, 3
    QUIET = 0.02  # a response that counts as none, of a full step from black to white

    def __init__(self) -> None:
        super().__init__()
        opponents = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])
        self.opponents = nn.Parameter(opponents[:, :, None, None], requires_grad=False)
        edges, bars = self._kernels()
        self.gray = nn.Parameter(torch.cat([edges, bars])[:, None], requires_grad=False)
        self.colour = nn.Parameter(edges[:: self.ORIENTATIONS // 2].repeat(2, 1, 1)[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = conv2d(x.float(), self.opponents)
            found = []
            for scale in range(self.SCALES):
                x = avg_pool2d(x, 2) if scale else x
                around = pad(x, (self.RADIUS_PX,) * 4, mode="replicate")
                responses = torch.cat(
                    [conv2d(around[:, :1], self.gray), conv2d(around[:, 1:], self.colour, groups=2)], 1
                )
                local = avg_pool2d(responses.abs(), 5, stride=1, padding=2, count_include_pad=False)
                normal = responses / (local + self.QUIET)
                found.append(torch.cat([normal.relu(), (-normal).relu()], 1))
            return found

    def _kernels(self) -> tuple[Tensor, Tensor]:
        """First and second derivatives of a Gaussian by direction, each f32[orientations, side, side], sum 0."""
        axis = torch.arange(-self.RADIUS_PX, self.RADIUS_PX + 1, dtype=torch.float32)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        envelope = torch.exp(-(x**2 + y**2) / (2 * self.SIGMA_PX**2))
        edges, bars = [], []
        for i in range(self.ORIENTATIONS):
            angle = math.pi * i / self.ORIENTATIONS
            across = x * math.cos(angle) + y * math.sin(angle)
            edge, bar = across * envelope, (across**2 - self.SIGMA_PX**2) * envelope
            bar = bar - bar.mean()
            edges.append(edge / edge.abs().sum() * 2)  # a step of 1 answers with about 1
            bars.append(bar / bar.abs().sum() * 2)
        return torch.stack(edges), torch.stack(bars)
