"""Shared blocks. Families copy what they need to change; they never subclass each other."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import register_parametrization


def unwrap(net: nn.Module) -> nn.Module:
    """The net inside a DDP wrapper and a compiled one; others as they are."""
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    original = getattr(inner, "_orig_mod", inner)  # of torch.compile
    assert isinstance(original, nn.Module)
    return original


def ema_of(net: nn.Module) -> nn.Module:
    """A frozen copy to follow `net`."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, *, halflife_images: float, images: int) -> None:
    """Move `target` toward `source` by the share that `images` are of the half-life. Buffers are copied."""
    weight = 1.0 - 0.5 ** (images / max(halflife_images, 1e-9))
    ours, theirs = list(target.parameters()), list(unwrap(source).parameters())
    torch._foreach_lerp_([p.data for p in ours], [p.data for p in theirs], weight)
    for mine, other in zip(target.buffers(), unwrap(source).buffers(), strict=True):
        mine.copy_(other)


class Clamp01(nn.Module):
    """Clamp to [0, 1]: the range every shipped picture has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0.0, 1.0)


def zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """The same with weights and bias 0: a net that ends with it starts as what it is added to."""
    nn.init.zeros_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


class PixelShuffles(nn.Sequential):
    """f32[n, c, h, w] -> f32[n, c, h * scale, w * scale] by learnt pixel shuffles: x4 is twice x2, x1 is nothing."""

    def __init__(self, features: int, scale: int) -> None:
        layers: list[nn.Module] = []
        for factor in {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]:
            layers += [nn.Conv2d(features, features * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        super().__init__(*layers)


def spectrally_normed(convolution: nn.Conv2d) -> nn.Conv2d:
    """The same, its weight divided by its largest singular value wherever it is used."""
    register_parametrization(convolution, "weight", SpectralNorm(convolution.weight))
    return convolution


class SpectralNorm(nn.Module):
    """Spectral norm (Miyato et al., arXiv:1802.05957), in float32 whatever the autocast around it.

    Unlike torch's, the singular vectors move only where the weight learns: a loss that is merely computed, or one of
    another net's turn, leaves no trace.
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("left", normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("right", normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(15):
            self._follow(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training and weight.requires_grad and torch.is_grad_enabled():
                self._follow(matrix)
            # Clones: the next call of the same turn moves the vectors that this one's gradient needs.
            return weight / (self.left.clone() @ (matrix @ self.right.clone()))

    @torch.no_grad()
    def _follow(self, matrix: Tensor) -> None:
        """One step of power iteration."""
        self.right.copy_(normalize(matrix.mT @ self.left, dim=0))
        self.left.copy_(normalize(matrix @ self.right, dim=0))
