"""Recipes of burst super-resolution: hand-held frames whose pixels fall between each other's.

python jobs/train.py --recipe rayscale.recipes.burst:x2_demo --data s3://bucket/photos
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.operators import Burst as Frames
from rayscale.data.operators import GaussianNoise, Resize
from rayscale.data.plan import DataSettings
from rayscale.data.presets import Degradation
from rayscale.recipes import Recipe
from rayscale.task import Optimizer
from rayscale.tasks.burst import Burst
from rayscale.train.loop import RunSettings


def steady_burst(scale: int, frames: int, reach_px: int) -> Degradation:
    """Frames taken at once by a hand that is held still: shifts of up to `reach_px` of low resolution each way, by any
    part of a pixel; a sensor whose pixels are squares that touch, and its noise. Another shift, longer, is
    `presets.burst`.
    """
    noise = GaussianNoise(sigma=(2.0, 8.0))
    shared = (Resize(scale=scale, methods=("area",)),)
    return (Frames(frames=frames, shift_px=float(reach_px * scale), shared=shared, each=(noise,)),)


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    return Recipe(
        task=Burst(
            frames=3,
            reach_px=1,
            window_px=3,
            features=8,
            blocks=1,
            optimizer=Optimizer(learning_rate=5e-3),
            ema_halflife_images=50.0,
        ),
        data=DataSettings(
            hr_crop_px=24,
            degradation=steady_burst(2, 3, 1),
            micro_batch=2,
            virtual_shards=4,
            window_images=4,
            crops=2,
        ),
        run=RunSettings(
            total_images=512,
            log_every_images=64,
            validate_every_images=256,
            checkpoint_every_images=128,
            validate_max_side_px=96,
        ),
    )


def x2_demo() -> Recipe:
    """Eight frames to one of twice the size, in at most ten minutes on one core."""
    return _demo(frames=8)


def x2_demo_single() -> Recipe:
    """What `x2_demo` is held against: the same net, the same pairs, but the first frame alone."""
    return _demo(frames=1)


def _demo(frames: int) -> Recipe:
    return Recipe(
        task=Burst(
            frames=frames,
            features=24,
            blocks=5,
            optimizer=Optimizer(learning_rate=2e-3, warmup_images=500, decay="cosine"),
            ema_halflife_images=500.0,
        ),
        data=DataSettings(
            hr_crop_px=64,
            degradation=steady_burst(2, frames, 2),
            micro_batch=8,
            virtual_shards=2,
            window_images=16,
            crops=16,
        ),
        run=RunSettings(
            total_images=12_000,
            log_every_images=1_000,
            validate_every_images=4_000,
            checkpoint_every_images=4_000,
            validate_max_side_px=256,
        ),
    )


def x2() -> Recipe:
    """x2 from 8 frames for production: hours on a GPU."""
    return _production(2, reach_px=3)


def x4() -> Recipe:
    """x4 from 8 frames for production."""
    return _production(4, reach_px=3)


def _production(scale: int, reach_px: int) -> Recipe:
    base = _demo(frames=8)
    return Recipe(
        task=Burst(
            scale=scale,
            frames=8,
            reach_px=reach_px,
            features=64,
            blocks=16,
            loss_kind="charbonnier",
            optimizer=Optimizer(learning_rate=5e-4, warmup_images=32_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=replace(
            base.data,
            hr_crop_px=64 * scale,
            degradation=steady_burst(scale, 8, reach_px),
            virtual_shards=8,
            window_images=32,
            crops=4,
        ),
        run=RunSettings(
            total_images=8_000_000,
            log_every_images=10_000,
            validate_every_images=200_000,
            checkpoint_every_images=100_000,
            validate_on_images=32,
            precision="bf16",
            compile=True,
        ),
    )
