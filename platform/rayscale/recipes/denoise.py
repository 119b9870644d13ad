"""Recipes against Gaussian noise, of one level or blindly of any up to 55.

python jobs/train.py --recipe rayscale.recipes.denoise:sigma25_demo --data s3://bucket/photos
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.plan import DataSettings
from rayscale.data.presets import Degradation, denoise
from rayscale.recipes import Recipe
from rayscale.task import Optimizer
from rayscale.tasks.restore import Restore
from rayscale.tasks.unet import Unet
from rayscale.train.loop import RunSettings


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    return Recipe(
        task=Restore(features=8, depth=3, optimizer=Optimizer(learning_rate=4e-3), ema_halflife_images=100.0),
        data=DataSettings(
            hr_crop_px=32, degradation=denoise(25.0), micro_batch=2, virtual_shards=4, window_images=4, crops=2
        ),
        run=RunSettings(
            total_images=512,
            log_every_images=128,
            validate_every_images=256,
            checkpoint_every_images=128,
            validate_max_side_px=96,
        ),
    )


def sigma25_demo() -> Recipe:
    """Noise of sigma 25 in at most ten minutes on one core."""
    return Recipe(
        task=Restore(
            features=32,
            depth=10,
            optimizer=Optimizer(learning_rate=2e-3, warmup_images=1_000, decay="cosine"),
            ema_halflife_images=1_000.0,
        ),
        data=DataSettings(
            hr_crop_px=40, degradation=denoise(25.0), micro_batch=8, virtual_shards=2, window_images=16, crops=16
        ),
        run=RunSettings(
            total_images=60_000,
            log_every_images=1_000,
            validate_every_images=10_000,
            checkpoint_every_images=10_000,
            validate_max_side_px=256,
        ),
    )


def sigma25() -> Recipe:
    """Noise of sigma 25, the level that papers compare at: DnCNN's depth and width. Hours on a GPU."""
    return _production(denoise(25.0), depth=17)


def blind() -> Recipe:
    """Noise of any level up to 55: one model for all of them."""
    return _production(denoise(), depth=20)


def unet_blind() -> Recipe:
    """The same by an encoder-decoder (DRUNet's shape), which sees further."""
    base = blind()
    task = Unet(
        scale=1,
        features=32,
        blocks=2,
        levels=3,
        optimizer=Optimizer(learning_rate=2e-4, warmup_images=32_000, decay="cosine"),
        ema_halflife_images=20_000.0,
    )
    return replace(base, task=task, data=replace(base.data, hr_crop_px=128, micro_batch=8))


def _production(degradation: Degradation, depth: int) -> Recipe:
    return Recipe(
        task=Restore(
            features=64,
            depth=depth,
            optimizer=Optimizer(learning_rate=5e-4, warmup_images=32_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=DataSettings(
            hr_crop_px=96, degradation=degradation, micro_batch=16, virtual_shards=8, window_images=32, crops=4
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
