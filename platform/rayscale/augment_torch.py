"""Augmentations of whole batches on the training device: functions of f32[n, c, h, w], differentiable, random only
through torch's generator, each sample with draws of its own.

They run inside a loss, where a picture is needed twice (contrastive views) or where the gradient must pass (the
generated pictures of a GAN). What is done to a photo before training is `data/augment.py`'s.

Everything that moves pixels is two small matrix products, rows and columns apart: exact for shifts, antialiased for
crops, differentiable any number of times (R1 and R2 need it twice), and without the atomic additions that make
`grid_sample`'s gradient differ from run to run on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rayscale.errors import ConfigError

DiffPolicy = Literal["colour", "translation", "cutout"]

LUMA = (0.299, 0.587, 0.114)  # BT.601


def random_resized_crop(
    x: Tensor, side_px: int, *, area: tuple[float, float] = (0.25, 1.0), aspect: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """A window of a share `area` of the picture, drawn to `side_px` squared; a triangle filter, antialiased.

    `aspect` is width / height, drawn on a logarithmic scale (Szegedy et al., arXiv:1409.4842).
    """
    height, width = x.shape[-2:]
    share = _uniform(x, *area)
    ratio = _uniform(x, math.log(aspect[0]), math.log(aspect[1])).exp()
    high = (share / ratio).sqrt().clamp(max=1.0)  # of the picture's height; a too long side is cut, not drawn again
    wide = (share * ratio).sqrt().clamp(max=1.0)
    rows = _window(height, side_px, (1 - high) * _uniform(x, 0, 1), high)
    columns = _window(width, side_px, (1 - wide) * _uniform(x, 0, 1), wide)
    return _separable(x, rows, columns)


def random_flip(x: Tensor, chance: float = 0.5) -> Tensor:
    """Left and right exchanged."""
    return torch.where(_taken(x, chance), x.flip(-1), x)


def colour_jitter(
    x: Tensor, *, brightness: float, contrast: float, saturation: float, hue: float, chance: float = 1.0
) -> Tensor:
    """RGB in [0, 1]: factors of 1 +- each, and colours turned about the gray axis by +- `hue` turns; clamped.

    The order is fixed. SimCLR's at strength s: 0.8 s, 0.8 s, 0.8 s, 0.2 s with chance 0.8 (arXiv:2002.05709).
    """
    y = x * _picture(_uniform(x, max(0.0, 1 - brightness), 1 + brightness))
    middle = _gray(y).mean((2, 3), keepdim=True)
    y = middle + (y - middle) * _picture(_uniform(x, max(0.0, 1 - contrast), 1 + contrast))
    gray = _gray(y)
    y = gray + (y - gray) * _picture(_uniform(x, max(0.0, 1 - saturation), 1 + saturation))
    y = _turned(y, _uniform(x, -hue, hue) * 2 * math.pi)
    return torch.where(_taken(x, chance), y.clamp(0.0, 1.0), x)


def random_gray(x: Tensor, chance: float = 0.2) -> Tensor:
    """All three channels the picture's luma."""
    return torch.where(_taken(x, chance), _gray(x).expand_as(x), x)


def gaussian_blur(x: Tensor, *, sigma: tuple[float, float] = (0.1, 2.0), chance: float = 0.5) -> Tensor:
    """A Gaussian of a drawn sigma, in pixels; at the border over what is there."""
    spread = _uniform(x, *sigma)[:, None, None]

    def weights(side: int) -> Tensor:
        at = torch.arange(side, device=x.device, dtype=torch.float32)
        return _normalised(torch.exp(-0.5 * ((at[:, None] - at) / spread).square()))

    blurred = _separable(x, weights(x.shape[-2]), weights(x.shape[-1]))
    return torch.where(_taken(x, chance), blurred, x)


def contrastive_view(
    x: Tensor,
    *,
    area: tuple[float, float] = (0.25, 1.0),
    jitter: float = 0.5,
    gray_chance: float = 0.2,
    blur_chance: float = 0.0,
) -> Tensor:
    """One view of each picture (RGB in [0, 1], square, same side): SimCLR's chain at strength `jitter`.

    The paper blurs large pictures only; below 64 px it costs more than it teaches (arXiv:2002.05709, B.9).
    """
    x = random_flip(random_resized_crop(x, x.shape[-1], area=area))
    wide = 0.8 * jitter
    x = colour_jitter(x, brightness=wide, contrast=wide, saturation=wide, hue=0.2 * jitter, chance=0.8)
    x = random_gray(x, gray_chance)
    return gaussian_blur(x, chance=blur_chance) if blur_chance else x


def diff_augment(
    x: Tensor,
    policy: Sequence[DiffPolicy] = ("colour", "translation", "cutout"),
    *,
    low: float = 0.0,
    high: float = 1.0,
    shift: float = 0.125,
    hole: float = 0.5,
) -> Tensor:
    """DiffAugment (Zhao et al., arXiv:2006.10738): what a critic sees of real and of generated pictures alike.

    Pictures lie in [low, high]; nothing is clamped, so that the gradient passes everywhere. Translation goes up to
    a share `shift` of a side, cutout takes a square of a share `hole`; both fill with the middle of the range.

    Raises: ConfigError for an unknown policy.
    """
    for name in policy:
        if name == "colour":
            x = _diff_colour(x, high - low)
        elif name == "translation":
            x = _diff_translation(x, (low + high) / 2, shift)
        elif name == "cutout":
            x = _diff_cutout(x, (low + high) / 2, hole)
        else:
            raise ConfigError("policy", name, "must be colour, translation or cutout", "name some of them")
    return x


def _diff_colour(x: Tensor, width: float) -> Tensor:
    """Brightness by a quarter of the range each way, then saturation x 0..2, then contrast x 0.5..1.5."""
    x = x + _picture(_uniform(x, -0.25, 0.25)) * width
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * _picture(_uniform(x, 0.0, 2.0))
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * _picture(_uniform(x, 0.5, 1.5))


def _diff_translation(x: Tensor, fill: float, share: float) -> Tensor:
    """Whole pixels, each axis on its own."""

    def shifts(side: int) -> Tensor:
        most = int(side * share + 0.5)
        by = torch.randint(-most, most + 1, (len(x), 1, 1), device=x.device)
        at = torch.arange(side, device=x.device)
        return (at[:, None] - at == by).float()  # a row without a one: outside

    return _separable(x - fill, shifts(x.shape[-2]), shifts(x.shape[-1])) + fill


def _diff_cutout(x: Tensor, fill: float, share: float) -> Tensor:
    """One rectangle, its centre anywhere, so that it may lie partly outside."""

    def inside(side: int) -> Tensor:
        hole = int(side * share + 0.5)
        first = torch.randint(0, side + 1 - hole % 2, (len(x), 1), device=x.device) - hole // 2
        at = torch.arange(side, device=x.device)
        return (at >= first) & (at < first + hole)

    hidden = inside(x.shape[-2])[:, None, :, None] & inside(x.shape[-1])[:, None, None, :]
    return torch.where(hidden, fill, x)


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """f32[n]: one draw a sample."""
    return low + (high - low) * torch.rand(len(x), device=x.device)


def _picture(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1], to act on pictures."""
    return values[:, None, None, None]


def _taken(x: Tensor, chance: float) -> Tensor:
    return _picture(torch.rand(len(x), device=x.device) < chance)


def _gray(x: Tensor) -> Tensor:
    """[n, 3, h, w] -> [n, 1, h, w]."""
    return (x * torch.tensor(LUMA, device=x.device)[:, None, None]).sum(1, keepdim=True)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rodrigues' rotation of every pixel about (1, 1, 1) by its sample's angle."""
    cos, sin = _picture(angle.cos()), _picture(angle.sin())
    gray = x.mean(1, keepdim=True)
    red, green, blue = x.unbind(1)
    cross = torch.stack([blue - green, red - blue, green - red], 1) / math.sqrt(3)
    return gray + (x - gray) * cos + cross * sin


def _window(side: int, out: int, start: Tensor, share: Tensor) -> Tensor:
    """f32[n, out, side]: weights that draw [start, start + share) of an axis, as shares of it, to `out` pixels."""
    step = share * side / out
    at = start[:, None] * side + (torch.arange(out, device=start.device) + 0.5) * step[:, None] - 0.5
    distance = (at.clamp(0, side - 1)[:, :, None] - torch.arange(side, device=start.device)).abs()
    return _normalised((1 - distance / step.clamp(min=1.0)[:, None, None]).clamp(min=0.0))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows[n, H, h] @ x[n, c, h, w] @ columns[n, W, w]^T in float32: bfloat16 has fewer steps than a pixel."""
    with torch.autocast(x.device.type, enabled=False):
        return rows[:, None] @ x.float() @ columns[:, None].transpose(-1, -2)
