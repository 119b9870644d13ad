"""A compact residual upscaler: plain 3x3 convolutions at low resolution, one pixel shuffle at the end.

The shape of SRVGGNetCompact (Real-ESRGAN, arXiv:2107.10833): fast, exactly tileable, a batch equals its samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rayscale.upscaler import Upscaler


class CompactNet(nn.Module):
    """f32[n, 3, h, w] -> f32[n, 3, h * scale, w * scale]: the nearest-neighbour picture plus what it lacks."""

    def __init__(self, features: int, blocks: int, scale: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(blocks):
            layers += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        layers += [nn.Conv2d(features, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)]
        self.body = nn.Sequential(*layers)
        self.scale = scale
        last = layers[-2]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)  # starts as nearest-neighbour: the first gradients are about detail
        assert last.bias is not None
        nn.init.zeros_(last.bias)

    def forward(self, lr: Tensor) -> Tensor:
        base = nn.functional.interpolate(lr, scale_factor=float(self.scale), mode="nearest")
        return base + self.body(lr)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Compact(Upscaler):
    """Hyperparameters of the family; it is its own config."""

    features: int = 32
    blocks: int = 6

    family = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("features", "blocks")

    def net(self) -> nn.Module:
        return CompactNet(self.features, self.blocks, self.scale)

    @property
    def halo_px(self) -> int:
        """`blocks` + first + last convolution, one pixel of radius each; nearest and shuffle add none."""
        return self.blocks + 2
