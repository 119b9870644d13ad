"""An encoder-decoder: strided convolutions down, transposed ones up, skips between; residual blocks on every level.

The shape of U-Net (Ronneberger et al., arXiv:1505.04597) with the blocks of DRUNet (Zhang et al., arXiv:2008.13751):
no norm, no bias towards a size. Works at the input's resolution and enlarges at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayscale.errors import ConfigError
from rayscale.nn import zeroed
from rayscale.upscaler import Upscaler


class Block(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(features, features, 3, padding=1)
        self.leave = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(torch.relu(self.enter(x)))  # type: ignore[no-any-return]


class Up(nn.Sequential):
    """A transposed convolution of side 2 and stride 2, written as the 1x1 convolution and shuffle that it is.

    ONNX Runtime multiplies matrices for the other form, in pieces that depend on the picture's size: from 129 channels
    on a tile would differ from the whole in the last bit.
    """

    def __init__(self, channels: int, new_channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 4 * new_channels, 1), nn.PixelShuffle(2))


class Level(nn.Module):
    """Blocks, what a level of half the resolution makes of them, and blocks again; the coarsest has one set only."""

    def __init__(self, features: int, blocks: int, below: int) -> None:
        super().__init__()
        self.before = nn.Sequential(*(Block(features) for _ in range(blocks)))
        self.below = Level(2 * features, blocks, below - 1) if below else None
        if below:
            self.down = nn.Conv2d(features, 2 * features, 2, stride=2)
            self.up = Up(2 * features, features)
            self.after = nn.Sequential(*(Block(features) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.below is not None:
            x = self.after(x + self.up(self.below(self.down(x))))
        return x


class UnetNet(nn.Module):
    """f32[n, 3, h, w] (and a mask f32[n, 1, h, w], 1 = missing) -> f32[n, 3, h * scale, w * scale].

    The nearest-neighbour picture plus what it lacks; with a mask, in missing pixels only.
    """

    def __init__(self, features: int, blocks: int, levels: int, scale: int, needs_mask: bool) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(4 if needs_mask else 3, features, 3, padding=1)
        self.body = Level(features, blocks, levels)
        self.last = zeroed(nn.Conv2d(features, 3 * scale**2, 3, padding=1))

    def forward(self, lr: Tensor, mask: Tensor | None = None) -> Tensor:
        base = nn.functional.interpolate(lr, scale_factor=float(self.scale), mode="nearest") if self.scale > 1 else lr
        first = self.first(lr if mask is None else torch.cat([lr, mask], 1))
        detail = nn.functional.pixel_shuffle(self.last(first + self.body(first)), self.scale)
        return base + (detail if mask is None else detail * mask)


class Clamped(nn.Module):
    """The net with its output in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.net(image, mask)
        return found.clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Unet(Upscaler):
    """Scale 1 restores; with `needs_mask` it fills what the mask calls missing and leaves the rest as it is."""

    features: int = 32  # at full resolution, doubled on each level below
    blocks: int = 1  # on each level, before and after
    levels: int = 2  # below the full resolution
    needs_mask: bool = False

    family = "unet"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("features", "blocks", "levels")
        if self.needs_mask and self.scale != 1:
            raise ConfigError("task.needs_mask", True, f"fills at scale 1, not {self.scale}", "set task.scale=1")

    def net(self) -> nn.Module:
        return UnetNet(self.features, self.blocks, self.levels, self.scale, self.needs_mask)

    @property
    def align(self) -> int:
        return int(2**self.levels)

    @property
    def halo_px(self) -> int:
        """Exact receptive radius of the input pixel that sees furthest, by its place in a cell of `align`."""
        each, worst = 2 * self.blocks, 0
        for place in range(self.align):
            low, high = place - 1, place + 1  # last
            for _ in range(self.levels):
                low, high = (low - each) // 2, (high + each) // 2  # after, up
            low, high = low - each, high + each
            for _ in range(self.levels):
                low, high = 2 * low - each, 2 * high + 1 + each  # down, before
            worst = max(worst, place - (low - 1), high + 1 - place)  # first
        return worst

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": Clamped(nets["ema"])} if self.needs_mask else super().shipped(nets)
