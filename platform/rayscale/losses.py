"""Losses: functions of tensors, each a mean over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import softplus

from rayscale.errors import ConfigError

Adversarial = Literal["non_saturating", "relativistic", "hinge", "minmax"]
"""Non-saturating (Goodfellow et al., arXiv:1406.2661, section 3) | relativistic pairing (arXiv:2501.05441) | hinge |
the literal min-max game, whose generator learns nothing from a critic that is sure."""


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (output - target).abs().mean()


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: what PSNR measures."""
    return (output - target).square().mean()


def charbonnier(output: Tensor, target: Tensor, epsilon: float = 1e-3) -> Tensor:
    """A smooth L1: sqrt(d^2 + epsilon^2) - epsilon, averaged (Lai et al., LapSRN, arXiv:1704.03915)."""
    return ((output - target).square().add(epsilon**2).sqrt() - epsilon).mean()


def fft(output: Tensor, target: Tensor) -> Tensor:
    """L1 between the spectra (real and imaginary parts, orthonormal), which weighs every frequency alike.

    Cho et al., MIMO-UNet, arXiv:2108.05054.
    """
    difference = torch.fft.rfft2((output - target).float(), norm="ortho")
    found: Tensor = torch.view_as_real(difference).abs().mean()
    return found


SSIM_PX, SSIM_SIGMA = 11, 1.5  # of the Gaussian window, as papers use it


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM, for f32[n, c, h, w] in [0, 1], each channel alone, where the window lies within the picture.

    Wang et al. 2004. In float32 whatever the autocast around it. Raises: ConfigError for sides below the window's.
    """
    if min(output.shape[-2:]) < SSIM_PX:
        raise ConfigError("task.ssim_weight", tuple(output.shape[-2:]), f"SSIM needs sides of {SSIM_PX} px or more",
                          "raise data.hr_crop_px")  # fmt: skip
    n, channels = output.shape[:2]
    with torch.autocast(output.device.type, enabled=False):
        a, b = output.float(), target.float()
        means = _windowed(torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None])
        mean_a, mean_b, aa, bb, ab = means.reshape(5, n, channels, *means.shape[-2:])
        c1, c2 = 0.01**2, 0.03**2
        similar = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
        alike = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a.square() + bb - mean_b.square() + c2)
    dissimilar: Tensor = 1 - (similar * alike).mean()
    return dissimilar


def _windowed(planes: Tensor) -> Tensor:
    """f32[n, 1, h, w] -> the Gaussian mean around every pixel whose window lies within."""
    offsets = torch.arange(SSIM_PX, device=planes.device, dtype=planes.dtype) - SSIM_PX // 2
    line = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    rows = functional.conv2d(planes, line[None, None, :, None])
    return functional.conv2d(rows, line[None, None, None, :])


def perceptual(output_maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
    """L1 between the layers of a feature net, each relative to the target's own mean: layers and nets compare.

    After Johnson et al., arXiv:1603.08155; each sample is measured against its own target.
    """
    return torch.stack([_relative(a.float(), b.float()) for a, b in zip(output_maps, target_maps, strict=True)]).mean()


def style(output_maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
    """As `perceptual`, between Gram matrices: which features come together, wherever they are (arXiv:1508.06576)."""
    return perceptual([gram(a) for a in output_maps], [gram(b) for b in target_maps])


def gram(maps: Tensor) -> Tensor:
    """f32[n, c, h, w] -> f32[n, c, c], the mean products of channels, in float32 whatever the autocast around it."""
    with torch.autocast(maps.device.type, enabled=False):
        flat = maps.float().flatten(2)
        return flat @ flat.mT / flat.shape[2]


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs().flatten(1).mean(1) / (b.abs().flatten(1).mean(1) + 1e-6)).mean()


def critic_loss(kind: Adversarial, real: Tensor, fake: Tensor) -> Tensor:
    """Of the critic's logits on real and on generated pictures, the same shape."""
    if kind == "relativistic":
        return softplus(fake - real).mean()
    if kind == "hinge":
        return (1 - real).relu().mean() + (1 + fake).relu().mean()
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(kind: Adversarial, real: Tensor, fake: Tensor) -> Tensor:
    """As `critic_loss`; only the relativistic one looks at the real pictures."""
    if kind == "relativistic":
        return softplus(real - fake).mean()
    if kind == "hinge":
        return -fake.mean()
    return -softplus(fake).mean() if kind == "minmax" else softplus(-fake).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Mean over the pictures of |d critic / d picture|^2: R1 on real ones, R2 on generated (arXiv:1801.04406).

    In float32 whatever the autocast around it; `critic` must not be compiled (it is differentiated twice).
    """
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        images = images.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over all axes but the first: f32[n].

    Kingma and Welling, arXiv:1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def discretised_logistic_nll(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log P(pixels) in nats, summed over all axes but the first: f32[n]. A probability of the 256 values themselves.

    `pixels` are k/255; P(k) is the mass of a logistic (mean and scale in the same unit) over the bin about k/255, and
    the bins of 0 and 1 reach to infinity (Salimans et al., PixelCNN++, arXiv:1701.05517, 2.1). No epsilon and no
    special case for small masses: s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)) is exact for a > b.
    """
    inverse, half = torch.exp(-log_scale), 0.5 / 255
    upper = (pixels - mean + half) * inverse
    lower = (pixels - mean - half) * inverse
    last, first = pixels > 1 - half, pixels < half
    log_mass = torch.where(last, 0.0, functional.logsigmoid(upper)) + torch.where(
        first, 0.0, functional.logsigmoid(-lower)
    )
    inside = torch.log(-torch.expm1(-2 * half * inverse))
    return -(log_mass + torch.where(first | last, 0.0, inside)).flatten(1).sum(1)


def gaussian_nll(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log density of `values` under N(mean, exp(log_scale)^2) in nats, summed over all axes but the first: f32[n]."""
    distance = (values - mean) * torch.exp(-log_scale)
    return (0.5 * (distance.square() + math.log(2 * math.pi)) + log_scale).flatten(1).sum(1)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Of 2n unit vectors each must find its partner: a cross-entropy over the 2n - 1 others.

    SimCLR (Chen et al., arXiv:2002.05709).
    a, b: f32[n, d], two views of the same n pictures in the same order, L2-normalised.
    """
    n = len(a)
    both = torch.cat([a, b])
    logits = both @ both.T / temperature
    itself = torch.eye(2 * n, dtype=torch.bool, device=a.device)
    partner = torch.arange(2 * n, device=a.device).roll(n)
    return functional.cross_entropy(logits.masked_fill(itself, -torch.inf), partner)


def supervised_contrast(a: Tensor, b: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`nt_xent` where all views of one label are partners: the mean of their cross-entropies, L_out of the paper.

    SupCon (Khosla et al., arXiv:2004.11362). a, b: as `nt_xent`; labels: i64[n]. Of unlike labels all, it is `nt_xent`.
    """
    both, label = torch.cat([a, b]), labels.repeat(2)
    itself = torch.eye(len(both), dtype=torch.bool, device=a.device)
    logits = (both @ both.T / temperature).masked_fill(itself, -torch.inf)
    partners = (label[:, None] == label) & ~itself
    surprise = -functional.log_softmax(logits, dim=1).masked_fill(~partners, 0.0).sum(1)
    return (surprise / partners.sum(1)).mean()


def vicreg(
    a: Tensor, b: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """Views agree, every feature varies (a deviation of 1), no two say the same (Bardes et al., arXiv:2105.04906).

    a, b: f32[n, d], two views of the same n > 1 pictures in the same order, not normalised.
    """
    n, d = a.shape
    total = invariance * functional.mse_loss(a, b)
    for views in (a, b):
        centred = views - views.mean(0)
        deviation = (centred.square().sum(0) / (n - 1) + 1e-4).sqrt()
        products = centred.T @ centred / (n - 1)
        crossed = products.square().sum() - products.diagonal().square().sum()
        total = total + variance * 0.5 * functional.relu(1 - deviation).mean() + covariance * crossed / d
    return total
