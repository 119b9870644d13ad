"""Generative adversarial nets: noise (and a class) in, a square picture out; two nets that learn in turns.

Two architectures on one task. `Dcgan`: transposed and strided convolutions (Radford et al., arXiv:1511.06434), with
group norm in the generator where the paper has batch norm and nothing in the critic, so that a batch equals its
samples and R1 is the gradient of one picture. `Residual`: the nets of R3GAN (Huang et al., arXiv:2501.05441), without
any norm, made for the relativistic loss with R1 and R2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu, one_hot

from rayscale.augment_torch import DiffPolicy, diff_augment
from rayscale.contract import Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.latents import Z_MAX
from rayscale.losses import Adversarial, critic_loss, generator_loss, gradient_penalty
from rayscale.nn import ema_of, unwrap
from rayscale.observe import log
from rayscale.task import Batch, Ema, Losses, Optimizer, Turn

SLOPE = 0.2  # of every leaky ReLU
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # keeps the variance through one


class Generator(nn.Module):
    """(z f32[n, latent], label f32[n, classes] or None) -> f32[n, 3, side, side], about [-1, 1]."""

    def __init__(self, body: nn.Module, latent: int) -> None:
        super().__init__()
        self.body = body
        self.label_scale = math.sqrt(latent)  # a class is as long a vector as the noise: it is not overheard

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        given = z if label is None else torch.cat([z, label * self.label_scale], 1)
        return self.body(given)  # type: ignore[no-any-return]


class Critic(nn.Module):
    """(f32[n, 3, side, side], f32[n, classes] or None) -> f32[n]: higher for what it takes for real.

    Of as many scores as classes, the class's own counts: a projection critic (Miyato & Koyama, arXiv:1802.05637)
    whose class vectors are the rows of the last layer.
    """

    def __init__(self, body: nn.Module, width: int, start: int, classes: int) -> None:
        super().__init__()
        self.body = body  # down to `start` px
        self.gather = nn.Conv2d(width, width, start, groups=width)
        self.score = nn.Linear(width, max(1, classes))

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        scores: Tensor = self.score(self.gather(self.body(image)).flatten(1))
        return scores[:, 0] if label is None else (scores * label).sum(1)


class Picture(nn.Module):
    """What is shipped: the generator's picture in [0, 1]."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        picture: Tensor = self.generator(z, label)
        return (picture * 0.5 + 0.5).clamp(0.0, 1.0)


def _at_least_one(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"task.architecture.{name}", getattr(settings, name), "must be at least 1", "raise it")


@dataclass(frozen=True, kw_only=True)
class Dcgan:
    """4x4 convolutions of stride 2. Channels at half the side, doubled at each halving up to `max_features`."""

    features: int = 64
    max_features: int = 512
    groups: int = 8  # of the generator's group norm

    family = "dcgan"

    def __post_init__(self) -> None:
        _at_least_one(self, "features", "max_features", "groups")
        if self.features % self.groups or self.max_features % self.groups:
            raise ConfigError("task.architecture.groups", self.groups, "must divide features and max_features",
                              "lower it")  # fmt: skip

    def generator(self, given: int, start: int, halvings: int) -> nn.Module:
        widths = self._widths(halvings)[::-1]
        layers: list[nn.Module] = [
            nn.Linear(given, widths[0] * start**2),
            nn.Unflatten(1, (widths[0], start, start)),
        ]
        for width, narrower in zip(widths, [*widths[1:], 3], strict=True):
            layers += [nn.GroupNorm(self.groups, width), nn.ReLU()]
            layers += [nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1)]
        return nn.Sequential(*layers, nn.Tanh())

    def critic(self, start: int, halvings: int, classes: int) -> nn.Module:
        widths = self._widths(halvings)
        layers: list[nn.Module] = []
        for narrower, width in zip([3, *widths], widths, strict=False):
            conv = nn.Conv2d(narrower, width, 4, stride=2, padding=1)
            nn.init.kaiming_normal_(conv.weight, SLOPE)  # no norm keeps the scale: torch's own start would fade out
            layers += [conv, nn.LeakyReLU(SLOPE)]
        return Critic(nn.Sequential(*layers), widths[-1], start, classes)

    def _widths(self, halvings: int) -> list[int]:
        """Fine to coarse: at side / 2, side / 4, ..."""
        return [min(self.features * 2**level, self.max_features) for level in range(halvings)]


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Bottleneck blocks with grouped convolutions. Channels at the full side, doubled as in `Dcgan`."""

    features: int = 64
    max_features: int = 512
    blocks: int = 2  # a resolution, in each net
    expansion: int = 2  # channels within a block / outside
    group_width: int = 16  # channels of one group of a block's 3x3 convolution

    family = "r3gan"

    def __post_init__(self) -> None:
        _at_least_one(self, "features", "max_features", "blocks", "expansion", "group_width")
        for name in ("features", "max_features"):
            if getattr(self, name) * self.expansion % self.group_width:
                rule = f"times expansion={self.expansion} must be a multiple of group_width={self.group_width}"
                raise ConfigError(f"task.architecture.{name}", getattr(self, name), rule, "lower group_width")

    def generator(self, given: int, start: int, halvings: int) -> nn.Module:
        widths = self._widths(halvings)[::-1]
        layers: list[nn.Module] = [Basis(given, widths[0], start), *self._stage(widths[0], halvings)]
        for wider, width in pairwise(widths):
            layers += [Resample(wider, width, 2.0), *self._stage(width, halvings)]
        return nn.Sequential(*layers, _conv(widths[-1], 3, 1))

    def critic(self, start: int, halvings: int, classes: int) -> nn.Module:
        widths = self._widths(halvings)
        layers: list[nn.Module] = [_conv(3, widths[0], 1), *self._stage(widths[0], halvings)]
        for narrower, width in pairwise(widths):
            layers += [Resample(narrower, width, 0.5), *self._stage(width, halvings)]
        return Critic(nn.Sequential(*layers), widths[-1], start, classes)

    def _stage(self, width: int, halvings: int) -> list[nn.Module]:
        depth = self.blocks * (halvings + 1)
        return [Block(width, width * self.expansion, self.group_width, depth) for _ in range(self.blocks)]

    def _widths(self, halvings: int) -> list[int]:
        return [min(self.features * 2**level, self.max_features) for level in range(halvings + 1)]


class Basis(nn.Module):
    """A learnt picture of start x start for each channel, weighted by the latent vector."""

    def __init__(self, given: int, width: int, start: int) -> None:
        super().__init__()
        self.pictures = nn.Parameter(torch.randn(width, start, start))
        self.weights = nn.Linear(given, width, bias=False)
        nn.init.normal_(self.weights.weight, std=given**-0.5)

    def forward(self, given: Tensor) -> Tensor:
        return self.weights(given)[:, :, None, None] * self.pictures  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + 1x1(grouped 3x3(1x1(x))). Starts as the identity, scaled for `depth` of them (Fixup, arXiv:1901.09321)."""

    def __init__(self, width: int, inner: int, group_width: int, depth: int) -> None:
        super().__init__()
        gain = GAIN * depth**-0.25
        self.enter = _conv(width, inner, 1, gain=gain, bias=True)
        self.mix = _conv(inner, inner, 3, gain=gain, bias=True, groups=inner // group_width)
        self.leave = _conv(inner, width, 1, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        inner = leaky_relu(self.mix(leaky_relu(self.enter(x), SLOPE)), SLOPE)
        return x + self.leave(inner)  # type: ignore[no-any-return]


class Resample(nn.Module):
    """Twice or half the side, bilinear (halving: the mean of 2x2), with a 1x1 convolution where channels change."""

    def __init__(self, width: int, new_width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.change = _conv(width, new_width, 1) if width != new_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.scale < 1:
            return self.change(nn.functional.avg_pool2d(x, 2))  # type: ignore[no-any-return]
        return interpolate(self.change(x), scale_factor=self.scale, mode="bilinear")


def _conv(width: int, new_width: int, side: int, gain: float = 1.0, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(width, new_width, side, padding=side // 2, groups=groups, bias=bias)
    nn.init.normal_(conv.weight, std=gain * (width // groups * side**2) ** -0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


@dataclass(frozen=True, kw_only=True)
class Gan:
    """Hyperparameters of both families. Sides 28, 32, 64, 128: any of 4 .. 7 times a power of two."""

    architecture: Dcgan | Residual = Residual()
    side: int = 32  # pixels of a generated picture: hr_crop_px of the data
    latent: int = 64
    num_classes: int = 0  # of the data's labels; 0 = unconditional
    adversarial: Adversarial = "non_saturating"
    r1_gamma: float = 0.0  # weight / 2 of the critic's squared gradient on real pictures, in units of [-1, 1]
    r2_gamma: float = 0.0  # the same on generated ones
    penalty_share: float = (
        1.0  # of a micro-batch's pictures that the penalties are taken on; they cost most of the time
    )
    augment: tuple[DiffPolicy, ...] = ("colour", "translation", "cutout")
    optimizer: Optimizer = Optimizer(learning_rate=2e-4, betas=(0.0, 0.99))  # of the generator
    critic_optimizer: Optimizer = Optimizer(learning_rate=2e-4, betas=(0.0, 0.99))
    ema_halflife_images: float = 10_000.0

    def __post_init__(self) -> None:
        if self.side < 8 or self._start << self._halvings != self.side:
            raise ConfigError("task.side", self.side, "must be 4, 5, 6 or 7 times a power of two, 8 or more", "try 64")
        if self.latent < 1:
            raise ConfigError("task.latent", self.latent, "must be at least 1", "try 64")
        if self.num_classes < 0 or self.num_classes == 1:
            raise ConfigError("task.num_classes", self.num_classes, "must be 0 (unconditional) or at least 2", "set 0")
        for name in ("r1_gamma", "r2_gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"task.{name}", getattr(self, name), "must not be negative", "0 turns it off")
        if not 0 < self.penalty_share <= 1:
            raise ConfigError("task.penalty_share", self.penalty_share, "must be within 0 and 1", "try 0.25")
        if self.penalty_share < 1 and not (self.r1_gamma or self.r2_gamma):
            raise ConfigError("task.penalty_share", self.penalty_share, "has no effect without r1_gamma or r2_gamma",
                              "set one of them")  # fmt: skip
        for policy in self.augment:
            if policy not in get_args(DiffPolicy):
                raise ConfigError("task.augment", policy, f"must be of {get_args(DiffPolicy)}", "[] turns it off")

    @property
    def family(self) -> str:
        return self.architecture.family

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hr", "label") if self.num_classes else ("hr",)

    @property
    def specs(self) -> Mapping[str, Spec]:
        label = TensorSpec(name="label", shape=("n", self.num_classes))  # one-hot
        return {
            "": Spec(
                kind="generate",
                inputs=(
                    TensorSpec(name="z", shape=("n", self.latent), low=-Z_MAX, high=Z_MAX),
                    *([label] if self.num_classes else []),
                ),
                outputs=(TensorSpec(name="image_out", shape=("n", 3, self.side, self.side)),),
            )
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="g", target="ema", halflife_images=self.ema_halflife_images)
        return (
            Turn(name="d", nets=("d",), optimizer=self.critic_optimizer),
            Turn(name="g", nets=("g",), optimizer=self.optimizer, ema=(ema,)),
        )

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        if self.adversarial == "minmax":
            log.warning("task.adversarial=minmax: the generator stops learning where the critic is sure; "
                        "non_saturating is the loss people train with")  # fmt: skip
        body = self.architecture.generator(self.latent + self.num_classes, self._start, self._halvings)
        critic = self.architecture.critic(self._start, self._halvings, self.num_classes)
        g = Generator(body, self.latent).to(device)
        return {"g": g, "d": critic.to(device), "ema": ema_of(g)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        real = self._augmented(batch.tensors["hr"] * 2 - 1)
        label = one_hot(batch.tensors["label"], self.num_classes).float() if self.num_classes else None
        z = torch.randn(len(real), self.latent, device=real.device).clamp(-Z_MAX, Z_MAX)
        return (self._critic_loss if turn == "d" else self._generator_loss)(nets, real, z, label)

    def _critic_loss(self, nets: Mapping[str, nn.Module], real: Tensor, z: Tensor, label: Tensor | None) -> Losses:
        with torch.no_grad():
            fake = self._augmented(nets["g"](z, label).float())
        labels = None if label is None else torch.cat([label, label])
        on_real, on_fake = nets["d"](torch.cat([real, fake]), labels).float().chunk(2)
        total = adversarial = critic_loss(self.adversarial, on_real, on_fake)
        terms = {
            "loss/d": adversarial,
            "balance/d_right": (on_real > on_fake).float().mean(),  # of pairs; 0.5: the critic cannot tell them apart
            "balance/d_real": on_real.mean(),
            "balance/d_fake": on_fake.mean(),
        }
        count = math.ceil(len(real) * self.penalty_share)
        critic = partial(unwrap(nets["d"]), label=None if label is None else label[:count])
        for name, gamma, images in (("r1", self.r1_gamma, real), ("r2", self.r2_gamma, fake)):
            if gamma:
                penalty = gradient_penalty(critic, images[:count])
                total = total + gamma / 2 * penalty
                terms[f"penalty/{name}"] = penalty
        return Losses(total, terms)

    def _generator_loss(self, nets: Mapping[str, nn.Module], real: Tensor, z: Tensor, label: Tensor | None) -> Losses:
        on_fake = nets["d"](self._augmented(nets["g"](z, label).float()), label).float()
        on_real = on_fake
        if self.adversarial == "relativistic":  # the only one whose generator looks at real pictures
            with torch.no_grad():
                on_real = nets["d"](real, label).float()
        total = generator_loss(self.adversarial, on_real, on_fake)
        return Losses(total, {"loss/g": total})

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": Picture(nets["ema"])}

    def _augmented(self, images: Tensor) -> Tensor:
        return diff_augment(images, self.augment, low=-1.0, high=1.0)

    @property
    def _halvings(self) -> int:
        return self.side.bit_length() - 3

    @property
    def _start(self) -> int:
        """Side of the coarsest features, pixels: 4 .. 7."""
        return self.side >> self._halvings
