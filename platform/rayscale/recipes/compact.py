"""Recipes of the compact upscaler: small, fast, exactly tileable.

python jobs/train.py --recipe rayscale.recipes.compact:x2 --data s3://bucket/photos
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.degrade import Bicubic
from rayscale.data.plan import DataSettings
from rayscale.data.presets import real_esrgan
from rayscale.recipes import Recipe
from rayscale.registry.gate import Gate
from rayscale.task import Optimizer
from rayscale.tasks.compact import Compact
from rayscale.train.loop import RunSettings


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    return Recipe(
        task=Compact(scale=2, features=12, blocks=2, optimizer=Optimizer(learning_rate=5e-3)),
        data=DataSettings(hr_crop_px=32, micro_batch=2, virtual_shards=4, window_images=4, crops=2),
        run=RunSettings(
            total_images=1024,
            log_every_images=128,
            validate_every_images=512,
            checkpoint_every_images=256,
            validate_max_side_px=96,
        ),
    )


def demo() -> Recipe:
    """x2 in about four minutes on two cores, from a dozen photos: what `make demo` trains."""
    return Recipe(
        task=Compact(
            scale=2,
            features=24,
            blocks=5,
            optimizer=Optimizer(learning_rate=2e-3, warmup_images=500, decay="cosine"),
            ema_halflife_images=500.0,
        ),
        data=DataSettings(hr_crop_px=96, micro_batch=4, virtual_shards=4, window_images=8, crops=16),
        run=RunSettings(
            total_images=16_000,
            log_every_images=400,
            validate_every_images=4_000,
            checkpoint_every_images=4_000,
            validate_max_side_px=256,
        ),
        gate=Gate(min_gain_db_over_baseline=0.5, min_images=2),
    )


def x2() -> Recipe:
    """x2 for production: hours on a GPU, gate against the champion."""
    return _production(2)


def x3() -> Recipe:
    """x3 for production."""
    return _production(3)


def x4() -> Recipe:
    """x4 for production."""
    return _production(4)


def real_x4() -> Recipe:
    """x4 for photos as they are found: blurred, noisy and compressed in the second order of Real-ESRGAN."""
    base = _production(4)
    return replace(base, data=replace(base.data, degradation=real_esrgan(4)))


def _production(scale: int) -> Recipe:
    return Recipe(
        task=Compact(
            scale=scale,
            features=64,
            blocks=16,
            loss_kind="charbonnier",
            optimizer=Optimizer(learning_rate=5e-4, warmup_images=32_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=DataSettings(
            hr_crop_px=64 * scale,
            degradation=(Bicubic(scale=scale),),
            micro_batch=8,
            virtual_shards=8,
            window_images=32,
            crops=4,
        ),
        run=RunSettings(
            total_images=16_000_000,
            log_every_images=10_000,
            validate_every_images=200_000,
            checkpoint_every_images=100_000,
            validate_on_images=32,
            precision="bf16",
            compile=True,
        ),
    )
