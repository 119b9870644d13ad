"""Shared blocks. Families copy what they need to change; they never subclass each other."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
