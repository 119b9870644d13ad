"""The one interface between a model family and the platform. Torch starts here.

A family is a frozen dataclass of hyperparameters that implements `Task`: pure torch, no Ray, MLflow, files,
ranks or clocks. `train/loop.py` owns the optimization; the family says what learns, from which loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayscale.contract import Spec
from rayscale.errors import ConfigError


class Batch(NamedTuple):
    """One micro-batch on the training device. `tensors` has the names in `Task.needs`, e.g.

    lr: f32[n, c, h, w], hr: f32[n, c, h * scale, w * scale], both in [0, 1].
    """

    tensors: Mapping[str, Tensor]
    images_seen: int  # images of the whole run before this step: what schedules inside a loss count in


class Losses(NamedTuple):
    """What a turn minimises (a scalar, the mean over the micro-batch) and the named terms worth logging."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam (or AdamW, where weight_decay > 0) with a learning rate that is a pure function of images seen."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_images: int = 0  # linear from 0
    decay: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.01  # of learning_rate, where a cosine ends

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError("optimizer.learning_rate", self.learning_rate, "must be above 0", "try 1e-3")


@dataclass(frozen=True, kw_only=True)
class Ema:
    """`target` follows `source` (both keys of `Task.build`) after each of the turn's steps.

    The half-life grows with the run up to `halflife_images`, so the random start is soon forgotten
    (Karras et al., EDM2, arXiv:2312.02696).
    """

    source: str
    target: str
    halflife_images: float = 4000.0
    rampup: float = 0.05  # half-life / images seen, while that is below halflife_images


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One backward and step: the nets that learn in it, how, and which averages follow them."""

    name: str
    nets: tuple[str, ...]
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = None  # of the gradient over all nets of the turn
    ema: tuple[Ema, ...] = ()


class Task(Protocol):
    """A model family. See the module's docstring; `tests/contract` holds what every family must pass."""

    @property
    def family(self) -> str:
        """Name of the family, as cards carry it."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the batch tensors that `loss` reads."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """What is shipped: function name -> spec. "" is the model itself; "encode" ships as NAME.encode."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """SR has one; a GAN has d and g, in that order."""

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        """Fresh nets. Keys are checkpoint keys: renaming one is a migration.

        Batch norm's running buffers follow rank 0's share of the data; prefer norms without such state.
        """

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """The loss of one micro-batch. Pure: no backward, no optimizer; random only through torch's generator."""

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """What is validated AND exported, by the names of `specs`: one place on purpose (EMA or raw)."""


@runtime_checkable
class Judging(Protocol):
    """A family whose nets can say more of held-out pictures than what they ship can."""

    def held_out(self, nets: Mapping[str, nn.Module], batch: Batch, train_u8: NDArray[np.uint8]) -> Mapping[str, float]:
        """Metrics, with trivial baselines beside them; `train_u8`: u8[n, h, w, 3], pictures it learned from."""
