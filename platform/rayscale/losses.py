"""Losses: functions of tensors, each a mean over the batch."""

from __future__ import annotations

from torch import Tensor


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (output - target).abs().mean()


def charbonnier(output: Tensor, target: Tensor, epsilon: float = 1e-3) -> Tensor:
    """A smooth L1: sqrt(d^2 + epsilon^2) - epsilon, averaged (Lai et al., LapSRN, arXiv:1704.03915)."""
    return ((output - target).square().add(epsilon**2).sqrt() - epsilon).mean()
