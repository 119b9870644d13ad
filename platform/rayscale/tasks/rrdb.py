"""Residual in residual dense blocks: ESRGAN's generator (Wang et al., arXiv:1809.00219)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from rayscale.nn import zeroed
from rayscale.upscaler import Upscaler

SHARE = 0.2  # of what a block adds
SLOPE = 0.2  # of the leaky ReLUs
HALF_LEVEL = 0.5 / 255  # of 8 bits
CONVOLUTIONS = 5  # of a dense block; three dense blocks are a group


class DenseBlock(nn.Module):
    """Each convolution sees what all before it made."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        widths = [features + growth * i for i in range(CONVOLUTIONS)]
        made = [growth] * (CONVOLUTIONS - 1) + [features]
        self.convolutions = nn.ModuleList(nn.Conv2d(w, m, 3, padding=1) for w, m in zip(widths, made, strict=True))
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # type: ignore[arg-type]
            convolution.weight.data.mul_(0.1)  # type: ignore[operator]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.convolutions
        found = [x]
        for convolution in inner:
            found.append(leaky_relu(convolution(torch.cat(found, 1)), SLOPE))
        return x + SHARE * last(torch.cat(found, 1))  # type: ignore[no-any-return]


class Group(nn.Module):
    """Three dense blocks and a skip around them."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(*(DenseBlock(features, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + SHARE * self.dense(x)  # type: ignore[no-any-return]


class RrdbNet(nn.Module):
    """f32[n, 3, h, w] -> f32[n, 3, h * scale, w * scale]: the nearest-neighbour picture plus what it lacks."""

    def __init__(self, features: int, blocks: int, growth: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(3, features, 3, padding=1)
        last = nn.Conv2d(features, features, 3, padding=1)
        self.body = nn.Sequential(*(Group(features, growth) for _ in range(blocks)), last)
        self.factors = factors(scale)
        self.up = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in self.factors)
        self.fine = nn.Conv2d(features, features, 3, padding=1)
        self.last = zeroed(nn.Conv2d(features, 3, 3, padding=1))

    def forward(self, lr: Tensor) -> Tensor:
        first = self.first(lr)
        x = first + self.body(first)
        for factor, convolution in zip(self.factors, self.up, strict=True):
            x = leaky_relu(convolution(interpolate(x, scale_factor=float(factor), mode="nearest")), SLOPE)
        base = interpolate(lr, scale_factor=float(self.scale), mode="nearest")
        return base + self.last(leaky_relu(self.fine(x), SLOPE))  # type: ignore[no-any-return]


def factors(scale: int) -> tuple[int, ...]:
    """Each upscaling by nearest neighbour has a convolution of its own."""
    return {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]


@dataclass(frozen=True, kw_only=True)
class Rrdb(Upscaler):
    """64 features, 23 blocks and a growth of 32 are ESRGAN's 16.7 M parameters."""

    features: int = 64
    blocks: int = 6
    growth: int = 32  # channels that a convolution of a dense block adds
    max_halo_px: int = 96  # of a larger radius only so much is taken, else tiles would be mostly margin

    family = "rrdb"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("features", "blocks", "growth", "max_halo_px")

    def net(self) -> nn.Module:
        return RrdbNet(self.features, self.blocks, self.growth, self.scale)

    @property
    def radius_px(self) -> int:
        """Exact receptive radius, input pixels: one for each convolution of the body, then those that are finer."""
        low, high = 0, 0  # of one output pixel, at the finest resolution; the worst of its cell
        worst = 0
        for offset in range(self.scale):
            low, high = offset - 2, offset + 2  # last, fine
            for factor in reversed(factors(self.scale)):
                low, high = (low - 1) // factor, (high + 1) // factor
            worst = max(worst, -low, high)
        return worst + 1 + 3 * CONVOLUTIONS * self.blocks + 1

    @property
    def halo_px(self) -> int:
        return min(self.radius_px, self.max_halo_px)

    @property
    def halo_error(self) -> float:
        return 0.0 if self.halo_px == self.radius_px else HALF_LEVEL
