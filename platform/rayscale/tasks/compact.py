"""A compact residual upscaler: plain 3x3 convolutions at low resolution, one pixel shuffle at the end.

The shape of SRVGGNetCompact (Real-ESRGAN, arXiv:2107.10833): fast, exactly tileable, a batch equals its samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rayscale import losses
from rayscale.contract import Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.nn import Clamp01, ema_of
from rayscale.task import Batch, Ema, Losses, Optimizer, Turn


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
class Compact:
    """Hyperparameters of the family; it is its own config."""

    scale: int = 2
    features: int = 32
    blocks: int = 6
    loss_kind: Literal["l1", "charbonnier"] = "l1"
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = 1.0
    ema_halflife_images: float = 2000.0

    def __post_init__(self) -> None:
        if self.scale not in (1, 2, 3, 4):
            raise ConfigError("task.scale", self.scale, "must be 1, 2, 3 or 4", "set one of them")
        for name in ("features", "blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}", getattr(self, name), "must be at least 1", "raise it")

    family = "compact"
    needs = ("lr", "hr")

    @property
    def specs(self) -> Mapping[str, Spec]:
        # `blocks` + first + last convolution, one pixel of radius each; nearest and shuffle add none.
        side = f"{self.scale}*" if self.scale > 1 else ""
        return {
            "": Spec(
                kind="transform",
                inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")),),
                outputs=(TensorSpec(name="image_out", shape=("n", 3, f"{side}h", f"{side}w")),),
                scale=self.scale,
                halo_px=self.blocks + 2,
            )
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="net", target="ema", halflife_images=self.ema_halflife_images)
        return (Turn(name="g", nets=("net",), optimizer=self.optimizer, clip_norm=self.clip_norm, ema=(ema,)),)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        net = CompactNet(self.features, self.blocks, self.scale).to(device)
        return {"net": net, "ema": ema_of(net)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        output = nets["net"](batch.tensors["lr"])
        pixel = getattr(losses, self.loss_kind)(output.float(), batch.tensors["hr"])
        return Losses(pixel, {f"loss/{self.loss_kind}": pixel})

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": nn.Sequential(nets["ema"], Clamp01())}
