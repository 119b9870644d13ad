"""Any upscaler as the generator of a GAN: pixel, perceptual, style and adversarial loss together.

SRGAN (Ledig et al., arXiv:1609.04802) with what came after: a critic with spectral norm that judges every pixel
(Real-ESRGAN, arXiv:2107.10833) or every patch, and pairs for the relativistic loss: each generated picture against
its own original. The generator's nets keep their names, so a run on the pixel loss is a warm start as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from rayscale.contract import Spec
from rayscale.errors import ConfigError
from rayscale.losses import Adversarial, critic_loss, generator_loss, perceptual, style
from rayscale.nn import spectrally_normed, unwrap
from rayscale.perceptual import PerceptualNet
from rayscale.task import Batch, Losses, Optimizer, Turn
from rayscale.upscaler import Upscaler

SLOPE = 0.2  # of every leaky ReLU
LEAST_PX = 16  # of a picture that a critic can judge


class UnetCritic(nn.Module):
    """f32[n, 3, h, w] -> f32[n, 1, h, w]: for every pixel, higher for what is taken for real."""

    def __init__(self, features: int) -> None:
        super().__init__()
        widths = [features * 2**level for level in range(4)]
        self.first = nn.Conv2d(3, features, 3, padding=1)
        self.down = nn.ModuleList(
            spectrally_normed(nn.Conv2d(w, 2 * w, 4, stride=2, padding=1, bias=False)) for w in widths[:-1]
        )
        self.up = nn.ModuleList(
            spectrally_normed(nn.Conv2d(2 * w, w, 3, padding=1, bias=False)) for w in reversed(widths[:-1])
        )  # fmt: skip
        self.fine = nn.ModuleList(
            spectrally_normed(nn.Conv2d(features, features, 3, padding=1, bias=False)) for _ in range(2)
        )
        self.last = nn.Conv2d(features, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky_relu(self.first(x), SLOPE)
        skips = []
        for convolution in self.down:
            skips.append(x)
            x = leaky_relu(convolution(x), SLOPE)
        for convolution, skip in zip(self.up, reversed(skips), strict=True):
            x = interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = leaky_relu(convolution(x), SLOPE) + skip
        for convolution in self.fine:
            x = leaky_relu(convolution(x), SLOPE)
        return self.last(x)  # type: ignore[no-any-return]


class PatchCritic(nn.Sequential):
    """f32[n, 3, h, w] -> f32[n, 1, h / 8, w / 8]: a judgement for every patch (pix2pix, arXiv:1611.07004)."""

    def __init__(self, features: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, features, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for width in (features, 2 * features):
            layers += [spectrally_normed(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)), nn.LeakyReLU(SLOPE)]
        layers += [spectrally_normed(nn.Conv2d(4 * features, 4 * features, 3, padding=1)), nn.LeakyReLU(SLOPE)]
        super().__init__(*layers, nn.Conv2d(4 * features, 1, 3, padding=1))


@dataclass(frozen=True, kw_only=True)
class Srgan:
    """Weights are of terms of about the same size: pixel L1, and feature differences relative to the features."""

    generator: Upscaler
    critic: Literal["unet", "patch"] = "unet"
    critic_features: int = 64
    critic_optimizer: Optimizer = Optimizer(learning_rate=1e-4, betas=(0.9, 0.99))
    adversarial: Adversarial = "relativistic"
    perceptual: PerceptualNet = PerceptualNet()
    pixel_weight: float = 1.0
    perceptual_weight: float = 0.1
    style_weight: float = 0.0
    adversarial_weight: float = 0.005
    ramp_images: int = 0  # all weights but the pixels' grow from 0 over so many: a warm start within the run

    family = "srgan"

    def __post_init__(self) -> None:
        for name in ("pixel_weight", "perceptual_weight", "style_weight", "ramp_images"):
            if getattr(self, name) < 0:
                raise ConfigError(f"task.{name}", getattr(self, name), "must not be negative", "0 leaves it out")
        if not self.adversarial_weight > 0:
            rule = "must be above 0: without it there is no game"
            raise ConfigError(
                "task.adversarial_weight", self.adversarial_weight, rule, "train the generator's own task"
            )
        if self.perceptual != PerceptualNet() and not (self.perceptual_weight or self.style_weight):
            rule = "has no effect without perceptual_weight or style_weight"
            raise ConfigError("task.perceptual.net", self.perceptual.net, rule, "set one of them")
        if self.critic_features < 1:
            raise ConfigError("task.critic_features", self.critic_features, "must be at least 1", "raise it")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.generator.needs

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.generator.specs

    @property
    def turns(self) -> tuple[Turn, ...]:
        (generator,) = self.generator.turns
        critic = Turn(name="d", nets=("critic",), optimizer=self.critic_optimizer)
        return (critic, replace(generator, name="g"))

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        nets = self.generator.build(device)
        critic = UnetCritic if self.critic == "unet" else PatchCritic
        nets["critic"] = critic(self.critic_features).to(device)
        if self.perceptual_weight or self.style_weight:
            nets["features"] = self.perceptual.build(device)
        return nets

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        # Nets that do not learn in a turn are taken out of DDP, which would wait for their gradients.
        real = batch.tensors["hr"]
        if turn == "d":
            with torch.no_grad():
                fake = self.generator.output(unwrap(nets["net"]), batch)
            return self._critic(nets["critic"], real, fake)
        return self._generator(nets, self.generator.output(nets["net"], batch), real, batch.images_seen)

    def _generator(self, nets: Mapping[str, nn.Module], output: Tensor, real: Tensor, images_seen: int) -> Losses:
        pixel = self.generator.pixel_loss(output, real)
        added = self._features(nets, output, real)
        added["adversarial"] = (self.adversarial_weight, self._adversarial(unwrap(nets["critic"]), output, real))
        ramp = min(1.0, images_seen / self.ramp_images) if self.ramp_images else 1.0
        total = self.pixel_weight * pixel.total
        terms = {"balance/pixel": total.detach(), **pixel.terms}
        for name, (weight, value) in added.items():
            terms |= {f"loss/{name}": value, f"balance/{name}": ramp * weight * value.detach()}
            total = total + ramp * weight * value
        return Losses(total, {"loss/g": total, **terms})

    def _adversarial(self, critic: nn.Module, output: Tensor, real: Tensor) -> Tensor:
        if self.adversarial != "relativistic":  # the only one whose generator looks at the originals
            return generator_loss(self.adversarial, output.new_zeros(()), critic(output).float())
        return generator_loss(self.adversarial, *critic(torch.cat([real, output])).float().chunk(2))

    def _critic(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Losses:
        if min(real.shape[-2:]) < LEAST_PX:
            raise ConfigError("data.hr_crop_px", min(real.shape[-2:]), f"a critic needs {LEAST_PX} px", "raise it")
        of_real, of_fake = critic(torch.cat([real, fake])).float().chunk(2)
        total = critic_loss(self.adversarial, of_real, of_fake)
        terms = {"loss/d": total, "balance/on_real": of_real.mean(), "balance/on_fake": of_fake.mean()}
        # Share of places where the original is taken for the more real one: 0.5 is a critic that is beaten, 1 one
        # that the generator cannot follow.
        terms["balance/told_apart"] = (of_real > of_fake).float().mean()
        return Losses(total, terms)

    def _features(self, nets: Mapping[str, nn.Module], output: Tensor, real: Tensor) -> dict[str, tuple[float, Tensor]]:
        if "features" not in nets:
            return {}
        with torch.no_grad():
            wanted = nets["features"](real)
        found = nets["features"](output)
        terms = {}
        if self.perceptual_weight:
            terms["perceptual"] = (self.perceptual_weight, perceptual(found, wanted))
        if self.style_weight:
            terms["style"] = (self.style_weight, style(found, wanted))
        return terms

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return self.generator.shipped(nets)
