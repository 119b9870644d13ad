"""Residual blocks without norm, upscaled at the end by pixel shuffles: EDSR (Lim et al., arXiv:1707.02921)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayscale.errors import ConfigError
from rayscale.nn import PixelShuffles, zeroed
from rayscale.upscaler import Upscaler


class Block(nn.Module):
    """x + share * conv(relu(conv(x)))."""

    def __init__(self, features: int, share: float) -> None:
        super().__init__()
        self.enter = nn.Conv2d(features, features, 3, padding=1)
        self.leave = nn.Conv2d(features, features, 3, padding=1)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * self.leave(torch.relu(self.enter(x)))  # type: ignore[no-any-return]


class EdsrNet(nn.Module):
    """f32[n, 3, h, w] -> f32[n, 3, h * scale, w * scale]: the nearest-neighbour picture plus what it lacks."""

    def __init__(self, features: int, blocks: int, share: float, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(3, features, 3, padding=1)
        last = nn.Conv2d(features, features, 3, padding=1)
        self.body = nn.Sequential(*(Block(features, share) for _ in range(blocks)), last)
        self.up = PixelShuffles(features, scale)
        self.last = zeroed(nn.Conv2d(features, 3, 3, padding=1))

    def forward(self, lr: Tensor) -> Tensor:
        base = nn.functional.interpolate(lr, scale_factor=float(self.scale), mode="nearest")
        first = self.first(lr)
        return base + self.last(self.up(first + self.body(first)))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Edsr(Upscaler):
    """64 features and 16 blocks are the paper's baseline; 256, 32 and residual_share 0.1 its EDSR."""

    features: int = 64
    blocks: int = 16
    residual_share: float = 1.0  # of what a block adds; below 1 where blocks are wide

    family = "edsr"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("features", "blocks")
        if not 0 < self.residual_share <= 1:
            raise ConfigError("task.residual_share", self.residual_share, "must be above 0, at most 1", "try 0.1")

    def net(self) -> nn.Module:
        return EdsrNet(self.features, self.blocks, self.residual_share, self.scale)

    @property
    def halo_px(self) -> int:
        """First, two a block, the body's last; the upscaling's and the last, which is finer than a pixel of input."""
        return 1 + 2 * self.blocks + 1 + (1 if self.scale > 1 else 0) + 1
