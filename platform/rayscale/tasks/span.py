"""Swift parameter-free attention: plain 3x3 convolutions whose own output, squashed, weighs what they found.

SPAN (Wan et al., arXiv:2311.12770), with a weight that passes things on by default, so that deep nets train. A
convolution is trained as the sum of two branches, 1x1-3x3-1x1 through more channels and 1x1 (ECBSR, Zhang et al., ACM
MM 2021), and always computes with the one 3x3 kernel that they are equal to: what ships is what was trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, silu

from rayscale.errors import ConfigError
from rayscale.nn import Clamp01, zeroed
from rayscale.upscaler import Upscaler


class BranchedConv(nn.Module):
    """A 3x3 convolution over-parameterised by `gain` times the channels within; zero padding.

    One bias only: those of the branches would add up to one, because padding comes before all of them.
    """

    def __init__(self, channels: int, new_channels: int, gain: int) -> None:
        super().__init__()
        inner, new_inner = gain * channels, gain * new_channels
        half = math.sqrt(0.5)  # two branches: together they keep the variance
        self.enter = nn.Parameter(torch.randn(inner, channels) * channels**-0.5)
        self.mix = nn.Parameter(torch.randn(new_inner, inner, 3, 3) * half * (9 * inner) ** -0.5)
        self.leave = nn.Parameter(torch.randn(new_channels, new_inner) * new_inner**-0.5)
        self.skip = nn.Parameter(torch.randn(new_channels, channels) * half * channels**-0.5)
        self.bias = nn.Parameter(torch.zeros(new_channels))

    def kernel(self) -> Tensor:
        """f32[new_channels, channels, 3, 3]: what the branches are together. In float32 under autocast too."""
        with torch.autocast(self.mix.device.type, enabled=False):
            through = torch.einsum("on,nixy,ic->ocxy", self.leave, self.mix, self.enter)
            return through + nn.functional.pad(self.skip[:, :, None, None], (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.kernel(), self.bias, padding=1)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The same function as a plain convolution."""
        channels, new_channels = self.enter.shape[1], self.leave.shape[0]
        plain = nn.Conv2d(channels, new_channels, 3, padding=1, device=self.mix.device)
        plain.weight.copy_(self.kernel())
        plain.bias.copy_(self.bias)  # type: ignore[union-attr]
        return plain.requires_grad_(False)


class Block(nn.Module):
    """Three convolutions on top of what came in; the last one's output weighs the sum, by 1 where it found nothing.

    The paper's weight is 0 there, and a signal that passes eight such blocks is gone.
    """

    def __init__(self, features: int, gain: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(BranchedConv(features, features, gain) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second, third = self.convolutions
        inner: Tensor = first(x)
        found: Tensor = third(silu(second(silu(inner))))
        return (found + x) * (2 * torch.sigmoid(found)), inner


class SpanNet(nn.Module):
    """f32[n, 3, h, w] -> f32[n, 3, h * scale, w * scale]: the nearest-neighbour picture plus what it lacks."""

    def __init__(self, features: int, blocks: int, scale: int, gain: int) -> None:
        super().__init__()
        self.scale = scale
        self.first = BranchedConv(3, features, gain)
        self.blocks = nn.ModuleList(Block(features, gain) for _ in range(blocks))
        self.body = BranchedConv(features, features, gain)
        self.gather = nn.Conv2d(4 * features, features, 1)
        self.last = zeroed(nn.Conv2d(features, 3 * scale**2, 3, padding=1))

    def forward(self, lr: Tensor) -> Tensor:
        base = nn.functional.interpolate(lr, scale_factor=float(self.scale), mode="nearest")
        first: Tensor = self.first(lr)
        x, inner = first, first
        early = first
        for i, block in enumerate(self.blocks):
            x, inner = block(x)
            early = x if i == 0 else early
        gathered = self.gather(torch.cat([first, self.body(x), early, inner], 1))
        return base + nn.functional.pixel_shuffle(self.last(gathered), self.scale)


def merge(net: nn.Module) -> nn.Module:
    """A copy with a plain convolution in place of each branched one."""
    if isinstance(net, BranchedConv):
        return net.merged()
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, BranchedConv):
            net.set_submodule(name, module.merged())
    return net


@dataclass(frozen=True, kw_only=True)
class Span(Upscaler):
    """64 features and 8 blocks ship as less than a million parameters at any scale."""

    features: int = 64
    blocks: int = 8
    gain: int = 2  # channels within a convolution's branches / outside, while training

    family = "span"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("features", "blocks", "gain")
        if self.gain > 8:
            raise ConfigError("task.gain", self.gain, "must be at most 8", "2 is the paper's")

    def net(self) -> nn.Module:
        return SpanNet(self.features, self.blocks, self.scale, self.gain)

    @property
    def halo_px(self) -> int:
        """First, three a block, the body's and the last convolution; attention and shuffle look at one pixel."""
        return 3 * self.blocks + 3

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": nn.Sequential(merge(nets["ema"]).eval(), Clamp01())}
