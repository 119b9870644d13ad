"""One picture from a burst: frames are registered, laid on the finer grid where they belong, and a net does the rest.

Registration has no weights and is bounded: a cost volume over whole-pixel shifts (as in PWC-Net, Sun et al., CVPR
2018, arXiv:1709.02371), then steps of Lucas and Kanade (IJCAI 1981), each in a window around the pixel. The merge is
the kernel regression of handheld super-resolution (Wronski et al., SIGGRAPH 2019, arXiv:1905.03277) with a fixed
kernel. No pooling over the picture: tiles are exact.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayscale import losses
from rayscale.contract import Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.nn import Clamp01, ema_of
from rayscale.task import Batch, Ema, Losses, Optimizer, Turn

STEPS = 2  # of Lucas and Kanade
SHARPNESS = 12.0  # of the choice among whole-pixel shifts
LEAST_DETAIL = 1e-5  # squared gradient, of levels in [0, 1]: below, there is nothing to register
SUPPORT = 1.125  # low-resolution pixels to where the merging kernel ends
GAIN = 8.0  # brings detail, of levels in [0, 1], to about 1
GHOST_LEVEL = 0.06  # a frame that still differs by so much counts half


def align(fixed: Tensor, moved: Tensor, reach_px: int, window_px: int) -> tuple[Tensor, Tensor]:
    """How far `moved` is shifted against `fixed` around each pixel, and what differed before the last step.

    Both f32[n, 1, h, w] in [0, 1]. Returns (dx, dy) f32[n, 2, h, w], within reach_px, with moved[y, x] about
    fixed[y + dy, x + dx], and the mean squared difference f32[n, 1, h, w] in windows of 2 * window_px + 1.
    """
    fixed, moved = _mean(fixed, 1), _mean(moved, 1)  # less noise, and gradients that hold for half a pixel
    wide = functional.pad(fixed, (1, 1, 1, 1), mode="replicate")
    gx = 0.5 * (wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2])
    gy = 0.5 * (wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1])
    xx, xy, yy = _mean(torch.cat([gx * gx, gx * gy, gy * gy], 1), window_px).chunk(3, 1)
    xx, yy = xx + LEAST_DETAIL, yy + LEAST_DETAIL
    moved = functional.pad(moved, (reach_px + 1,) * 4, mode="replicate")

    side = 2 * reach_px + 1
    taps = torch.eye(side**2, device=moved.device).flip(0).view(-1, 1, side, side)  # each moves by a whole shift
    pieces = functional.conv2d(moved[:, :, 1:-1, 1:-1], taps)
    cost = SHARPNESS * _mean((fixed - pieces).square(), window_px) / (xx + yy)
    share = torch.exp(cost.amin(1, keepdim=True) - cost)
    along = torch.arange(-reach_px, reach_px + 1, device=moved.device).float()
    every = torch.stack([along.repeat(side), along.repeat_interleave(side), torch.ones_like(taps[:, 0, 0, 0])])
    dx, dy, total = functional.conv2d(share, every[:, :, None, None]).chunk(3, 1)  # a sum no batch can change
    shift = torch.cat([dx, dy], 1) / total

    determinant = xx * yy - xy * xy
    for _ in range(STEPS):
        error = _warped(moved, shift, reach_px) - fixed
        ex, ey = _mean(torch.cat([gx * error, gy * error], 1), window_px).chunk(2, 1)
        step = torch.cat([yy * ex - xy * ey, xx * ey - xy * ex], 1) / determinant
        shift = (shift + step.clamp(-1, 1)).clamp(-reach_px, reach_px)
    return shift, _mean(error.square(), window_px)


def lay(frames: Tensor, shift: Tensor, scale: int, reach_px: int, sigma_px: float) -> Tensor:
    """Every frame's pixels where they belong on the finer grid: sums under a Gaussian, still at low resolution.

    frames f32[n, 3, h, w], shift [n, 2, h, w] as `align` gives it, sigma_px in low resolution.
    Returns f32[n, 4, scale^2, h, w]: the weighted colours and their weight, for each pixel of a cell, row by row.
    """
    counted = torch.cat([frames, torch.ones_like(frames[:, :1])], 1)
    wide = functional.pad(counted, (reach_px + 1,) * 4)  # nothing lies outside
    whole = shift.round()
    near = _near(wide, whole, reach_px + 1, (-1, 0, 1))  # [n, 4, dy, dx, h, w]
    places = (torch.arange(scale, device=shift.device) + 0.5) / scale - 0.5
    centres = (torch.tensor([-1.0, 0.0, 1.0], device=shift.device)[:, None] + places)[:, :, None, None]
    distance = (shift - whole)[:, :, None, None] - centres  # [n, (x, y), neighbour, place, h, w]
    kernel = torch.exp(distance.square() * (-0.5 / sigma_px**2)) * (1 - (distance / SUPPORT).square()).relu()
    columns, rows = kernel.unbind(1)
    across = _sum(columns[:, j, None, None] * near[:, :, :, j, None] for j in range(3))  # [n, 4, dy, place, h, w]
    return _sum(rows[:, j, None, :, None] * across[:, :, j, None] for j in range(3)).flatten(2, 3)


def _warped(wide: Tensor, shift: Tensor, reach_px: int) -> Tensor:
    """x[y - dy, x - dx], bilinear, of one channel with a border of reach_px + 1."""
    whole = shift.floor()
    part = shift - whole
    near = _near(wide, whole, reach_px + 1, (0, 1))
    columns, rows = (torch.stack([1 - p, p], 1) for p in part.unbind(1))
    across = _sum(columns[:, j, None, None] * near[:, :, :, j] for j in range(2))
    return _sum(rows[:, j, None] * across[:, :, j] for j in range(2))


def _near(wide: Tensor, whole: Tensor, border_px: int, offsets: tuple[int, ...]) -> Tensor:
    """x[y - dy - j, x - dx - i] for all j, i of `offsets`: f32[n, c, j, i, h, w], of x with a border. By index, so that
    it is the very pixel whatever the picture's size.
    """
    (height, width), across = whole.shape[2:], wide.shape[3]
    x = torch.arange(width, device=wide.device) + border_px - whole[:, 0].long()
    y = torch.arange(height, device=wide.device)[:, None] + border_px - whole[:, 1].long()
    start = (y * across + x)[:, None].flatten(2)
    index = torch.cat([start - (j * across + i) for j in offsets for i in offsets], 2)
    found = wide.flatten(2).gather(2, index.expand(-1, wide.shape[1], -1))
    return found.reshape(-1, wide.shape[1], len(offsets), len(offsets), height, width)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """One after the other: an order that no batch changes."""
    return functools.reduce(torch.add, terms)


def detail(merged: Tensor, first: Tensor, scale: int) -> Tensor:
    """What both have that their surroundings in the first frame have not: f32[n, 3 * scale^2 + 3, h, w].

    All that is to be learnt is in here; without what it lies on, learning is several times as fast.
    """
    around = _mean(functional.pad(first, (2, 2, 2, 2), mode="replicate"), 2)[:, :, 2:-2, 2:-2]
    return torch.cat([merged - around.repeat_interleave(scale**2, 1), first - around], 1)


def _mean(x: Tensor, radius_px: int) -> Tensor:
    """Over squares of 2 * radius_px + 1, zero outside."""
    side = 2 * radius_px + 1
    x = x.contiguous(memory_format=torch.channels_last)  # four times as fast on a CPU
    rows = functional.avg_pool2d(x, (side, 1), stride=1, padding=(radius_px, 0))
    return functional.avg_pool2d(rows, (1, side), stride=1, padding=(0, radius_px))


class BurstNet(nn.Module):
    """f32[n, T, 3, h, w] -> f32[n, 3, h * scale, w * scale]: the merged frames plus what they lack."""

    def __init__(self, config: Burst) -> None:
        super().__init__()
        self.config = config
        features, cell = config.features, config.scale**2
        widths = [3 + 4 * cell, *[features] * (config.blocks + 1), 3 * cell]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.PReLU(after)]
        layers.pop()
        nn.init.zeros_(convolution.weight)  # starts as the merged frames
        self.body = nn.Sequential(*layers)

    def forward(self, frames: Tensor) -> Tensor:
        with torch.autocast(frames.device.type, enabled=False):
            merged, weight = self.merge(frames.float())
            given = torch.cat([GAIN * detail(merged, frames[:, 0].float(), self.config.scale), weight], 1)
        correction: Tensor = self.body(given) / GAIN
        return functional.pixel_shuffle(merged + correction, self.config.scale)

    def merge(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The burst on the finer grid, f32[n, 3 * scale^2, h, w], and how much lies near a pixel, [n, scale^2, h, w].

        Nothing here learns. Sums over frames are written out: their order never depends on the batch.
        """
        c = self.config
        first, others = frames[:, 0], frames[:, 1:].flatten(0, 1)
        shift, trust = torch.zeros_like(frames[:, :1, :2]), torch.ones_like(frames[:, :1, :1])
        if c.frames > 1:
            fixed = _gray(first)[:, None].expand(-1, c.frames - 1, -1, -1, -1).flatten(0, 1)
            found, left = align(fixed, _gray(others), c.reach_px, c.window_px)
            shift = torch.cat([shift, found.reshape(-1, c.frames - 1, *shift.shape[2:])], 1)
            alike = 1 / (1 + (left / GHOST_LEVEL**2).square())
            trust = torch.cat([trust, alike.reshape(-1, c.frames - 1, *trust.shape[2:])], 1)
        laid = lay(frames.flatten(0, 1), shift.flatten(0, 1), c.scale, c.reach_px, c.sigma_px / c.scale)
        total = _sum((laid.reshape(-1, c.frames, *laid.shape[1:]) * trust[:, :, None]).unbind(1))
        weight = total[:, 3:]
        little = 0.05  # of the first frame itself, where nothing lies near
        colours = (total[:, :3] + little * first[:, :, None]) / (weight + little)
        return colours.flatten(1, 2), weight[:, 0] / c.frames


def _gray(picture: Tensor) -> Tensor:
    red, green, blue = picture.chunk(3, 1)
    gray: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return gray


@dataclass(frozen=True, kw_only=True)
class Burst:
    """Hyperparameters of the family; it is its own config."""

    scale: int = 2
    frames: int = 8  # T; 1 makes it the single-picture net of the same size
    reach_px: int = 2  # largest shift between two frames, low resolution
    window_px: int = 10  # radius of the windows that are registered
    sigma_px: float = 0.4  # of the merging kernel, high resolution
    features: int = 32
    blocks: int = 6
    loss_kind: Literal["l1", "charbonnier", "mse"] = "l1"
    optimizer: Optimizer = Optimizer()
    clip_norm: float | None = 1.0
    ema_halflife_images: float = 2000.0

    def __post_init__(self) -> None:
        rules = {
            "scale": (self.scale in (1, 2, 3, 4), "must be 1, 2, 3 or 4"),
            "frames": (1 <= self.frames <= 64, "must be in 1..64"),
            "reach_px": (0 <= self.reach_px <= 8, "must be in 0..8: the work grows with its square"),
            "window_px": (self.window_px >= 1, "must be at least 1"),
            "sigma_px": (0.3 <= self.sigma_px <= 3, "must be in 0.3..3"),
            "features": (self.features >= 1, "must be at least 1"),
            "blocks": (self.blocks >= 0, "must not be negative"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                default = getattr(Burst, name)
                raise ConfigError(f"task.{name}", getattr(self, name), rule, f"the default is {default}")

    family = "burst"
    needs = ("lr", "hr")

    @property
    def specs(self) -> Mapping[str, Spec]:
        side = f"{self.scale}*" if self.scale > 1 else ""
        return {
            "": Spec(
                kind="burst",
                inputs=(TensorSpec(name="frames", shape=("n", self.frames, 3, "h", "w")),),
                outputs=(TensorSpec(name="image_out", shape=("n", 3, f"{side}h", f"{side}w")),),
                scale=self.scale,
                halo_px=self.halo_px,
            )
        }

    @property
    def halo_px(self) -> int:
        """Exact receptive radius, low resolution."""
        body = self.blocks + 2
        if self.frames == 1:
            return body + 2  # the surroundings of detail
        start = self.window_px + 1 + max(self.reach_px, 1)  # windows of shifted, smoothed luma and of its gradients
        return body + start + STEPS * self.window_px

    @property
    def turns(self) -> tuple[Turn, ...]:
        ema = Ema(source="net", target="ema", halflife_images=self.ema_halflife_images)
        return (Turn(name="g", nets=("net",), optimizer=self.optimizer, clip_norm=self.clip_norm, ema=(ema,)),)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        net = BurstNet(self).to(device)
        return {"net": net, "ema": ema_of(net)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        frames = batch.tensors["lr"]
        if frames.shape[1:2] != (self.frames,) or frames.dim() != 5:
            given = frames.shape[1] if frames.dim() == 5 else 0
            raise ConfigError("task.frames", self.frames, f"the data's degradation gives {given}", "make them equal")
        pixel = getattr(losses, self.loss_kind)(nets["net"](frames).float(), batch.tensors["hr"])
        return Losses(pixel, {f"loss/{self.loss_kind}": pixel})

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"": nn.Sequential(nets["ema"], Clamp01())}
