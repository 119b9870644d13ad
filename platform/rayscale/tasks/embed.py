"""Vectors whose angle says how alike two pictures are: SimCLR and VICReg without labels, SupCon with them.

Two random views of one picture shall meet, views of different pictures shall not (Chen et al., arXiv:2002.05709), or
the vectors shall vary and their features not repeat each other (Bardes et al., arXiv:2105.04906); or all views of one
label shall meet (Khosla et al., arXiv:2004.11362). All are functions of one micro-batch alone, its own pictures being
the negatives: the number of workers changes nothing, and `data.micro_batch` is a setting of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayscale import losses
from rayscale.augment_torch import contrastive_view
from rayscale.contract import Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.nn import ema_of
from rayscale.task import Batch, Ema, Losses, Optimizer, Turn


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, which is what a fresh block is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1), _norm(channels), nn.SiLU(), last
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """f32[n, 3, h, w] -> f32[n, d]: `levels` times half the side and twice the channels, then the mean over places.

    Any sides will do; like sizes of things are meant, so pictures are best shrunk to the side of training.
    """

    def __init__(self, features: int, levels: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, features, 3, stride=2, padding=1)]
        for level in range(levels):
            width = features << level
            layers += [Block(width) for _ in range(blocks)]
            if level < levels - 1:
                layers.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
        self.body = nn.Sequential(*layers, _norm(width), nn.SiLU())

    def forward(self, picture: Tensor) -> Tensor:
        return self.body(picture - 0.5).mean((2, 3))  # type: ignore[no-any-return]


class EmbedNet(nn.Module):
    """The backbone, and the head on which the loss is taken: what ships is the vector before it (SimCLR, 4.2)."""

    def __init__(self, features: int, levels: int, blocks: int, head: int) -> None:
        super().__init__()
        self.backbone = Backbone(features, levels, blocks)
        width = features << (levels - 1)
        self.head = nn.Sequential(nn.Linear(width, head), nn.SiLU(), nn.Linear(head, head))

    def forward(self, picture: Tensor) -> Tensor:
        return self.head(self.backbone(picture))  # type: ignore[no-any-return]


class _Unit(nn.Module):
    """What is shipped: the backbone's vector at unit length."""

    def __init__(self, backbone: nn.Module, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.ones = nn.Buffer(torch.ones(1, size))

    def forward(self, image: Tensor) -> Tensor:
        vector: Tensor = self.backbone(image)
        # The sum as a product with ones: a batch equals its samples to the bit, of a reduction that is not promised.
        length = functional.linear(vector.square(), self.ones).sqrt()
        return (vector / length.clamp(min=1e-12)).clamp(-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Hyperparameters of the family; it is its own config.

    The side of training is `data.hr_crop_px`; the model takes any, and knows things best at the size they had there.
    """

    features: int = 32
    levels: int = 4  # halvings; the vector has features * 2^(levels - 1) numbers
    blocks: int = 1  # residual blocks a level
    head: int = 128
    objective: Literal["simclr", "vicreg", "supcon"] = "simclr"  # supcon: like are photos of one label
    temperature: float = 0.2  # of simclr and supcon
    crop_area: tuple[float, float] = (0.25, 1.0)  # share of the picture that a view shows
    jitter: float = 0.5  # strength of the colour changes; 0 leaves colour to be told pictures by
    gray_chance: float = 0.2
    blur_chance: float = 0.0  # for 64 px and more
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = 1.0
    ema_halflife_images: float = 4000.0

    def __post_init__(self) -> None:
        if self.features < 8 or self.features % 8:
            raise ConfigError("task.features", self.features, "must be a multiple of 8", "try 32")
        for name in ("levels", "blocks", "head"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}", getattr(self, name), "must be at least 1", "raise it")
        if not self.temperature > 0:
            raise ConfigError("task.temperature", self.temperature, "must be above 0", "try 0.2")
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError("task.crop_area", self.crop_area, "must be two shares, 0 < low <= high <= 1",
                              "try [0.25,1.0]")  # fmt: skip
        if not 0 <= self.jitter <= 1:
            raise ConfigError("task.jitter", self.jitter, "must be in 0..1", "try 0.5")
        for name in ("gray_chance", "blur_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"task.{name}", getattr(self, name), "must be in 0..1", "try 0.2")

    family = "embed"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hr", "label") if self.objective == "supcon" else ("hr",)

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        return self.features << (self.levels - 1)

    @property
    def specs(self) -> Mapping[str, Spec]:
        image = TensorSpec(name="image", shape=("n", 3, "h", "w"))
        vector = TensorSpec(name="vector", shape=("n", self.size), low=-1.0, high=1.0)
        return {"": Spec(kind="embed", inputs=(image,), outputs=(vector,))}

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="net", target="ema", halflife_images=self.ema_halflife_images)
        return (Turn(name="embed", nets=("net",), optimizer=self.optimizer, clip_norm=self.clip_norm, ema=(ema,)),)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        net = EmbedNet(self.features, self.levels, self.blocks, self.head).to(device)
        return {"net": net, "ema": ema_of(net)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        hr = batch.tensors["hr"]
        if len(hr) < 2:
            raise ConfigError("data.micro_batch", len(hr), "a picture is told from others of its micro-batch",
                              "at least 2, better 128")  # fmt: skip
        views = torch.cat([self.view(hr), self.view(hr)])
        a, b = nets["net"](views).float().chunk(2)
        unit_a, unit_b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
        match self.objective:
            case "simclr":
                total = losses.nt_xent(unit_a, unit_b, self.temperature)
            case "vicreg":
                total = losses.vicreg(a, b)
            case "supcon":
                total = losses.supervised_contrast(unit_a, unit_b, batch.tensors["label"], self.temperature)
        cosines = (unit_a @ unit_b.T).detach()
        found = (cosines.argmax(1) == torch.arange(len(a), device=a.device)).float().mean()
        return Losses(total, {f"loss/{self.objective}": total, "partner_found": found})

    def view(self, picture: Tensor) -> Tensor:
        """One random view of each picture."""
        return contrastive_view(
            picture,
            area=self.crop_area,
            jitter=self.jitter,
            gray_chance=self.gray_chance,
            blur_chance=self.blur_chance,
        )

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        net = nets["ema"]
        assert isinstance(net, EmbedNet)
        return {"": _Unit(net.backbone, self.size)}


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 8, channels)  # groups of 8 channels: of a map of one pixel, too
