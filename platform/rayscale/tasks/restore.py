"""Restoration at the picture's own size: a plain stack of 3x3 convolutions that predicts what is wrong with it.

DnCNN (Zhang et al., TIP 2017, arXiv:1608.03981) without batch norm, so that a batch equals its samples; dilated as
IRCNN (Zhang et al., CVPR 2017, arXiv:1704.03929) and at a lower resolution as FFDNet (Zhang et al., TIP 2018,
arXiv:1710.04026) where it must see further. No pooling over the picture: tiles are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rayscale import losses
from rayscale.contract import Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.nn import ema_of
from rayscale.task import Batch, Ema, Losses, Optimizer, Turn


class RestoreNet(nn.Module):
    """f32[n, c, h, w] -> f32[n, 3, h, w], the correction; sides are multiples of `shuffle`."""

    def __init__(self, channels: int, features: int, dilations: tuple[int, ...], shuffle: int) -> None:
        super().__init__()
        widths = [channels * shuffle**2, *[features] * (len(dilations) - 1), 3 * shuffle**2]
        convolutions = [
            nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation)
            for (before, after), dilation in zip(itertools.pairwise(widths), dilations, strict=True)
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        nn.init.zeros_(convolutions[-1].weight)  # starts as the picture it is given
        layers: list[nn.Module] = [nn.PixelUnshuffle(shuffle)] if shuffle > 1 else []
        for convolution in convolutions[:-1]:
            layers += [convolution, nn.ReLU()]
        layers += [convolutions[-1], *([nn.PixelShuffle(shuffle)] if shuffle > 1 else [])]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        correction: Tensor = self.body(x)
        return correction


class Corrected(nn.Module):
    """f32[n, 3, h, w] -> the same plus its correction."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        correction: Tensor = self.net(image)
        return image + correction


class Filled(nn.Module):
    """f32[n, 3, h, w] and a mask f32[n, 1, h, w], 1 where pixels are missing -> the picture, filled there alone.

    What the net corrects is a first filling: the mean of what is known, in growing neighbourhoods, nearest first
    (normalised convolution: Knutsson and Westin, CVPR 1993), then `steps` of diffusion, each pixel the mean of its
    four neighbours. Whatever stands in missing pixels is not looked at.
    """

    kernel: Tensor
    cross: Tensor

    def __init__(self, net: nn.Module, levels: int, steps: int) -> None:
        super().__init__()
        self.net, self.levels, self.steps = net, levels, steps
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line).expand(4, 1, 3, 3).contiguous(), persistent=False)
        cross = torch.tensor([[0.0, 0.25, 0.0], [0.25, 0.0, 0.25], [0.0, 0.25, 0.0]])
        self.register_buffer("cross", cross.expand(3, 1, 3, 3).contiguous(), persistent=False)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        first = self.diffused(self.first_filling(image, mask), mask)
        found: Tensor = first + self.net(torch.cat([first, mask], 1))
        return image * (1 - mask) + found * mask

    def first_filling(self, image: Tensor, mask: Tensor) -> Tensor:
        """Wavelet-like smoothing with holes between the kernel's pixels (a trous): its reach doubles by the level."""
        known = 1 - mask
        weighted = torch.cat([image * known, known], 1)
        filled, missing = image * known, mask
        for level in range(self.levels):
            dilation = 2**level
            weighted = nn.functional.conv2d(weighted, self.kernel, padding=dilation, dilation=dilation, groups=4)
            weight = weighted[:, 3:]
            found = weighted[:, :3] / (weight + 1e-6)
            last = level == self.levels - 1
            trust = torch.ones_like(weight) if last else (weight * 16).clamp(0, 1)  # few are known: look wider first
            filled = filled + missing * trust * found
            missing = missing * (1 - trust)
        return filled

    def diffused(self, filled: Tensor, mask: Tensor) -> Tensor:
        """Towards the harmonic surface over the hole: most of the way near its rim, where filling is not guessing."""
        for _ in range(self.steps):
            around = nn.functional.pad(filled, (1, 1, 1, 1), mode="replicate")
            filled = filled * (1 - mask) + nn.functional.conv2d(around, self.cross, groups=3) * mask
        return filled


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Hyperparameters of the family; it is its own config."""

    features: int = 48
    depth: int = 12  # convolutions
    dilations: tuple[int, ...] = (1,)  # of the convolutions in turn, over and over
    shuffle: int = 1  # works at 1/shuffle of the resolution, on shuffle^2 times the channels
    masked: bool = False  # inpainting: a mask is the second input
    fill_levels: int = 6  # of the first filling of missing pixels: it sees 2^levels - 1 px far
    fill_steps: int = 16  # of diffusion after it, each of which sees one pixel further
    loss_kind: Literal["l1", "charbonnier", "mse"] = "l1"
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = 1.0
    ema_halflife_images: float = 2000.0

    def __post_init__(self) -> None:
        rules = {
            "features": (self.features >= 1, "must be at least 1"),
            "depth": (self.depth >= 2, "must be at least 2"),
            "dilations": (bool(self.dilations) and min(self.dilations) >= 1, "must name at least one, from 1 px"),
            "shuffle": (self.shuffle in (1, 2, 4), "must be 1, 2 or 4"),
            "fill_levels": (1 <= self.fill_levels <= 9, "must be in 1..9"),
            "fill_steps": (0 <= self.fill_steps <= 64, "must be in 0..64"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                default = getattr(Restore, name)
                raise ConfigError(f"task.{name}", getattr(self, name), rule, f"the default is {default}")

    family = "restore"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("lr", "mask", "hr") if self.masked else ("lr", "hr")

    @property
    def specs(self) -> Mapping[str, Spec]:
        image = TensorSpec(name="image", shape=("n", 3, "h", "w"))
        mask = TensorSpec(name="mask", shape=("n", 1, "h", "w"))
        return {
            "": Spec(
                kind="transform",
                inputs=(image, mask) if self.masked else (image,),
                outputs=(TensorSpec(name="image_out", shape=("n", 3, "h", "w")),),
                align=self.shuffle,
                halo_px=self.halo_px,
            )
        }

    @property
    def halo_px(self) -> int:
        """Exact receptive radius: of the pixel of a shuffled cell that sees furthest."""
        radius = sum(self._dilations) * self.shuffle + self.shuffle - 1
        return radius + (2**self.fill_levels - 1 + self.fill_steps if self.masked else 0)

    @property
    def _dilations(self) -> tuple[int, ...]:
        return tuple(self.dilations[i % len(self.dilations)] for i in range(self.depth))

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="net", target="ema", halflife_images=self.ema_halflife_images)
        return (Turn(name="g", nets=("net",), optimizer=self.optimizer, clip_norm=self.clip_norm, ema=(ema,)),)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        net = RestoreNet(4 if self.masked else 3, self.features, self._dilations, self.shuffle)
        whole = (Filled(net, self.fill_levels, self.fill_steps) if self.masked else Corrected(net)).to(device)
        return {"net": whole, "ema": ema_of(whole)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        inputs = [batch.tensors[name] for name in self.needs[:-1]]
        pixel = getattr(losses, self.loss_kind)(nets["net"](*inputs).float(), batch.tensors["hr"])
        return Losses(pixel, {f"loss/{self.loss_kind}": pixel})

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": Shipped(nets["ema"])}


class Shipped(nn.Module):
    """The net with its output in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        restored: Tensor = self.net(image) if mask is None else self.net(image, mask)
        return restored.clamp(0.0, 1.0)
