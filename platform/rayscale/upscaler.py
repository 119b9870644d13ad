"""What image-to-image families trained on a pixel loss share: settings, one turn, the loss, what ships.

A family adds its fields, its net and its receptive radius, and overrides what it does otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


@dataclass(frozen=True, kw_only=True)
class Upscaler(ABC):
    """A `Task` whose nets are "net", f32[n, 3, h, w] -> f32[n, 3, h * scale, w * scale], and its average "ema"."""

    scale: int = 2
    loss_kind: Literal["l1", "charbonnier", "mse"] = "l1"
    fft_weight: float = 0.0  # of the spectra's L1, beside loss_kind
    ssim_weight: float = 0.0  # of 1 - SSIM
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = 1.0
    ema_halflife_images: float = 2000.0

    needs_mask = False

    def __post_init__(self) -> None:
        if self.scale not in (1, 2, 3, 4):
            raise ConfigError("task.scale", self.scale, "must be 1, 2, 3 or 4", "set one of them")
        for name in ("fft_weight", "ssim_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"task.{name}", getattr(self, name), "must not be negative", "0 leaves it out")

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}", getattr(self, name), "must be at least 1", "raise it")

    @property
    @abstractmethod
    def family(self) -> str: ...

    @abstractmethod
    def net(self) -> nn.Module:
        """Fresh, on the CPU."""

    @property
    @abstractmethod
    def halo_px(self) -> int | None:
        """Exact receptive radius, input pixels; None with `halo_why_none`."""

    @property
    def halo_error(self) -> float:
        """How far tiles with a halo that is not exact may be from the whole picture; export tries it."""
        return 0.0

    @property
    def halo_why_none(self) -> str:
        return ""

    @property
    def align(self) -> int:
        """Input sides are multiples of this, pixels."""
        return 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("lr", "mask", "hr") if self.needs_mask else ("lr", "hr")

    @property
    def specs(self) -> Mapping[str, Spec]:
        side = f"{self.scale}*" if self.scale > 1 else ""
        mask = TensorSpec(name="mask", shape=("n", 1, "h", "w"))
        return {
            "": Spec(
                kind="transform",
                inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")), *([mask] if self.needs_mask else [])),
                outputs=(TensorSpec(name="image_out", shape=("n", 3, f"{side}h", f"{side}w")),),
                scale=self.scale,
                align=self.align,
                halo_px=self.halo_px,
                halo_error=self.halo_error,
                halo_why_none=self.halo_why_none,
            )
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="net", target="ema", halflife_images=self.ema_halflife_images)
        return (Turn(name="g", nets=("net",), optimizer=self.optimizer, clip_norm=self.clip_norm, ema=(ema,)),)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        net = self.net().to(device)
        return {"net": net, "ema": ema_of(net)}

    def output(self, net: nn.Module, batch: Batch) -> Tensor:
        """What `net` makes of the batch, float32, not clamped."""
        found: Tensor = net(*(batch.tensors[name] for name in self.needs[:-1]))
        return found.float()

    def pixel_loss(self, output: Tensor, target: Tensor) -> Losses:
        """loss_kind and the weighted terms beside it."""
        terms = {f"loss/{self.loss_kind}": getattr(losses, self.loss_kind)(output, target)}
        total = terms[f"loss/{self.loss_kind}"]
        for name, weight in (("fft", self.fft_weight), ("ssim", self.ssim_weight)):
            if weight:
                terms[f"loss/{name}"] = getattr(losses, name)(output, target)
                total = total + weight * terms[f"loss/{name}"]
        return Losses(total, terms)

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        return self.pixel_loss(self.output(nets["net"], batch), batch.tensors["hr"])

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": nn.Sequential(nets["ema"], Clamp01())}
