"""A convolutional variational autoencoder with a true bound on the likelihood of the 8-bit picture.

Kingma and Welling, arXiv:1312.6114; the weight beta on the KL: Higgins et al., ICLR 2017, and its warm-up Sonderby
et al., arXiv:1602.02282. Reconstruction and KL are sums in nats over one picture, whatever beta is, so

    bound (nats per picture) = -log P(picture | z) + KL(q(z | picture) || N(0, 1)) >= -log P(picture)

and bound / (ln 2 x values) is bits/dim, to be held against `histogram_bits_per_dim` and against PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayscale import losses
from rayscale.contract import Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.nn import ema_of
from rayscale.task import Batch, Ema, Losses, Optimizer, Turn

U8 = NDArray[np.uint8]

IMPORTANCE_SAMPLES = 16

LATENT_MAX = 16.0  # |posterior mean|, and -log_variance; a trained posterior stays far within
LOG_SCALE = (-7.0, 1.0)  # of a pixel in [0, 1]: from a quarter of a step of 8 bits to more than the range
Z_MAX = 4.0  # what the shipped decoder takes: 1 in 16,000 normal draws lies beyond
SMALLEST_PX = 4  # side of the innermost maps


class Encoded(NamedTuple):
    """q(z | picture): f32[n, d] each."""

    mean: Tensor
    log_variance: Tensor


class Decoded(NamedTuple):
    """p(picture | z): f32[n, 3, side, side] each, independent over the values; `mean` is not clamped."""

    mean: Tensor
    log_scale: Tensor


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


class VaeNet(nn.Module):
    """Halves the side down to 4 px while it doubles the channels (up to 4 x features), and back."""

    def __init__(self, side_px: int, features: int, blocks: int, latent: int) -> None:
        super().__init__()
        levels = int(math.log2(side_px // SMALLEST_PX))
        widths = [features * min(2**i, 4) for i in range(levels)]
        # The outermost level is one strided convolution each way: at full side a block costs as much as all others.
        down: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1)]
        up: list[nn.Module] = []
        for width, wider in zip(widths, [*widths[1:], None], strict=True):
            down += [Block(width) for _ in range(blocks)]
            if wider:
                down.append(nn.Conv2d(width, wider, 4, stride=2, padding=1))
        for width, narrower in zip(widths[::-1], [*widths[-2::-1], None], strict=True):
            up += [Block(width) for _ in range(blocks)]
            if narrower:
                up += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, narrower, 3, padding=1)]
        inner = widths[-1] * SMALLEST_PX**2
        self.encoder = nn.Sequential(*down, _norm(widths[-1]), nn.SiLU(), nn.Flatten(), nn.Linear(inner, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, inner),
            nn.Unflatten(1, (widths[-1], SMALLEST_PX, SMALLEST_PX)),
            *up,
            _norm(widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], 4 * 6, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, picture: Tensor) -> Encoded:
        """f32[n, 3, side, side] -> the posterior, kept within what cards state."""
        mean, log_variance = self.encoder(picture).float().chunk(2, dim=1)
        return Encoded(LATENT_MAX * torch.tanh(mean / LATENT_MAX), log_variance.clamp(-LATENT_MAX, 4.0))

    def decode(self, z: Tensor) -> Decoded:
        """f32[n, d] -> the likelihood."""
        mean, log_scale = self.decoder(z).float().chunk(2, dim=1)
        return Decoded(mean + 0.5, (log_scale - 2.0).clamp(*LOG_SCALE))

    def forward(self, picture: Tensor) -> tuple[Encoded, Decoded]:
        """The posterior, and the likelihood at one draw of it."""
        posterior = self.encode(picture)
        return posterior, self.decode(draw(posterior))


def draw(posterior: Encoded) -> Tensor:
    """One z of each posterior, differentiable; random through torch's generator."""
    noise = torch.randn_like(posterior.mean)
    return posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise


class _Decode(nn.Module):
    """What is shipped as the model itself: z -> the mean picture."""

    def __init__(self, net: VaeNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        return self.net.decode(z).mean.clamp(0.0, 1.0)


class _Encode(_Decode):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return tuple(self.net.encode(image))  # type: ignore[return-value]


class _Reconstruct(_Decode):
    def forward(self, image: Tensor) -> Tensor:
        return self.net.decode(self.net.encode(image).mean).mean.clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Vae:
    """Hyperparameters of the family; it is its own config.

    `likelihood` of the 256 values of a pixel: "logistic" is a probability of the values themselves; "gaussian" a
    density of value + uniform noise, whose expectation bounds it (Theis et al., arXiv:1511.01844).
    """

    side_px: int = 32
    features: int = 48
    blocks: int = 1  # residual blocks a level
    latent: int = 64
    likelihood: Literal["logistic", "gaussian"] = "logistic"
    beta: float = 1.0
    beta_warmup_images: int = 0  # linear from 0; the bound that is logged has the whole KL at any time
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = 1.0
    ema_halflife_images: float = 4000.0

    def __post_init__(self) -> None:
        if self.side_px not in (8, 16, 32, 64, 128):
            raise ConfigError("task.side_px", self.side_px, "must be 8, 16, 32, 64 or 128", "set data.hr_crop_px alike")
        if self.features < 8 or self.features % 8:
            raise ConfigError("task.features", self.features, "must be a multiple of 8", "try 48")
        for name in ("blocks", "latent"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}", getattr(self, name), "must be at least 1", "raise it")
        if self.beta <= 0 or self.beta_warmup_images < 0:
            field = "beta" if self.beta <= 0 else "beta_warmup_images"
            raise ConfigError(f"task.{field}", getattr(self, field), "must be positive", "1 makes the loss the bound")

    family = "vae"
    needs = ("hr",)

    @property
    def specs(self) -> Mapping[str, Spec]:
        z = TensorSpec(name="z", shape=("n", self.latent), low=-Z_MAX, high=Z_MAX)
        mean = TensorSpec(name="mean", shape=("n", self.latent), low=-LATENT_MAX, high=LATENT_MAX)
        log_variance = TensorSpec(name="log_variance", shape=("n", self.latent), low=-LATENT_MAX, high=4.0)
        image = TensorSpec(name="image", shape=("n", 3, self.side_px, self.side_px))
        image_out = TensorSpec(name="image_out", shape=image.shape)
        return {
            "": Spec(kind="generate", inputs=(z,), outputs=(image_out,)),
            "encode": Spec(kind="embed", inputs=(image,), outputs=(mean, log_variance)),
            "reconstruct": Spec(
                kind="transform",
                inputs=(image,),
                outputs=(image_out,),
                halo_why_none=f"one code for the whole picture of {self.side_px} px",
            ),
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="net", target="ema", halflife_images=self.ema_halflife_images)
        return (Turn(name="vae", nets=("net",), optimizer=self.optimizer, clip_norm=self.clip_norm, ema=(ema,)),)

    @property
    def num_values(self) -> int:
        """Dimensions of a picture."""
        return 3 * self.side_px**2

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        net = VaeNet(self.side_px, self.features, self.blocks, self.latent).to(device)
        return {"net": net, "ema": ema_of(net)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """The bound with beta on the KL, per value of the picture: the learning rate then fits every side."""
        hr = batch.tensors["hr"]
        if hr.shape[-2:] != (self.side_px, self.side_px):
            raise ConfigError("task.side_px", self.side_px, f"pictures are {tuple(hr.shape[-2:])}",
                              "set data.hr_crop_px and task.side_px alike")  # fmt: skip
        posterior, likelihood = nets["net"](hr)
        reconstruction = self.nll(hr, likelihood).mean()
        kl = losses.kl_to_standard_normal(*posterior).mean()
        bound = (reconstruction + kl).detach()
        terms = {
            "loss/bound_nats": bound,
            "loss/reconstruction_nats": reconstruction,
            "loss/kl_nats": kl,
            "bits_per_dim": bits_per_dim(bound, self.num_values),
        }
        return Losses((reconstruction + self.beta_at(batch.images_seen) * kl) / self.num_values, terms)

    @torch.no_grad()
    def held_out(self, nets: Mapping[str, nn.Module], batch: Batch, train_u8: U8) -> dict[str, float]:
        """bits/dim of the bound with 1 and with 16 draws of z, and what histograms of the values need."""
        net, hr = nets["ema"], batch.tensors["hr"]
        assert isinstance(net, VaeNet)
        held_out_u8 = (hr * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
        with torch.random.fork_rng(devices=[hr.device] if hr.is_cuda else []):
            torch.manual_seed(0)
            bounds = [bound_nats(self, net, hr), importance_bound_nats(self, net, hr, IMPORTANCE_SAMPLES)]
        bits, tighter = (float(bits_per_dim(bound.mean(), self.num_values)) for bound in bounds)
        return {
            "bits_per_dim": bits,
            f"bits_per_dim_iw{IMPORTANCE_SAMPLES}": tighter,
            "bits_per_dim_histogram": histogram_bits_per_dim(train_u8, held_out_u8),
        }

    def beta_at(self, images_seen: int) -> float:
        """The weight of the KL after so many images."""
        return self.beta * min(1.0, (images_seen + 1) / (self.beta_warmup_images + 1))

    def nll(self, picture: Tensor, likelihood: Decoded) -> Tensor:
        """-log P(picture | z), or an estimate not below it on average: f32[n], nats. picture: k/255."""
        if self.likelihood == "logistic":
            return losses.discretised_logistic_nll(picture, *likelihood)
        smooth = (picture * 255 + torch.rand_like(picture)) / 256
        return losses.gaussian_nll(smooth, *likelihood) + math.log(256) * self.num_values

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        net = nets["ema"]
        assert isinstance(net, VaeNet)
        return {"": _Decode(net), "encode": _Encode(net), "reconstruct": _Reconstruct(net)}


@torch.no_grad()
def bound_nats(task: Vae, net: VaeNet, picture: Tensor) -> Tensor:
    """The bound on -log P of each picture with one draw of z: f32[n]; beta is 1 here whatever it was in training."""
    posterior, likelihood = net(picture)
    return task.nll(picture, likelihood) + losses.kl_to_standard_normal(*posterior)


@torch.no_grad()
def importance_bound_nats(task: Vae, net: VaeNet, picture: Tensor, samples: int) -> Tensor:
    """A tighter bound on -log P of each picture, f32[n]: -log mean_k p(picture | z_k) p(z_k) / q(z_k | picture).

    Never above the other on average, and falling toward -log P with `samples` (Burda et al., arXiv:1509.00519).
    """
    posterior = net.encode(picture)
    log_weights = []
    for _ in range(samples):
        z = draw(posterior)
        prior = -losses.gaussian_nll(z, torch.zeros_like(z), torch.zeros_like(z))
        proposal = -losses.gaussian_nll(z, posterior.mean, 0.5 * posterior.log_variance)
        log_weights.append(prior - proposal - task.nll(picture, net.decode(z)))
    return math.log(samples) - torch.logsumexp(torch.stack(log_weights), dim=0)


def bits_per_dim(nats: Tensor, num_values: int) -> Tensor:
    """Nats a picture -> bits a value."""
    return nats / (math.log(2) * num_values)


def histogram_bits_per_dim(train: U8, held_out: U8, *, by_place: bool = True, prior_count: float = 1.0) -> float:
    """What a model without any structure needs: a histogram of each value over the training pictures.

    u8[n, h, w, c] each. by_place: one histogram for every place and channel, else one for every channel. Every of
    the 256 values has `prior_count` / 256 observations beforehand, so that unseen ones cost a finite number of bits.
    """
    c = train.shape[-1]
    rows, others = (a.reshape(len(a), -1) if by_place else a.reshape(-1, c) for a in (train, held_out))
    nats = 0.0
    for column, other in zip(rows.T, others.T, strict=True):
        counts = np.bincount(column, minlength=256) + prior_count / 256
        nats -= float(np.log(counts / counts.sum())[other].sum())
    return nats / (math.log(2) * held_out.size)


def mean_image_psnr(train: U8, held_out: U8) -> float:
    """Mean PSNR in dB of the mean training picture as the reconstruction of each held-out one."""
    errors = held_out - np.rint(train.mean(0))
    return float((10 * np.log10(255**2 / np.square(errors).mean((1, 2, 3)))).mean())


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 8, channels)  # groups of 8 channels: of a map of one pixel, too
