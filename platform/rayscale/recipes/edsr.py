"""Recipes of the plain residual net, EDSR's baseline: a large, steady teacher or reference.

python jobs/train.py --recipe rayscale.recipes.edsr:x4 --data s3://bucket/photos --gpus-per-worker 1
"""

from __future__ import annotations

from rayscale.data.degrade import Bicubic
from rayscale.data.plan import DataSettings
from rayscale.recipes import Recipe
from rayscale.task import Optimizer
from rayscale.tasks.edsr import Edsr
from rayscale.train.loop import RunSettings


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    return Recipe(
        task=Edsr(scale=2, features=12, blocks=1, optimizer=Optimizer(learning_rate=5e-3)),
        data=DataSettings(hr_crop_px=32, micro_batch=2, virtual_shards=4, window_images=4, crops=2),
        run=RunSettings(
            total_images=512,
            log_every_images=128,
            validate_every_images=256,
            checkpoint_every_images=128,
            validate_max_side_px=96,
        ),
    )


def x2() -> Recipe:
    """x2, hours on a GPU."""
    return _production(2)


def x3() -> Recipe:
    """x3, hours on a GPU."""
    return _production(3)


def x4() -> Recipe:
    """x4, hours on a GPU."""
    return _production(4)


def _production(scale: int) -> Recipe:
    return Recipe(
        task=Edsr(
            scale=scale,
            features=64,
            blocks=16,
            optimizer=Optimizer(learning_rate=2e-4, warmup_images=32_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=DataSettings(
            hr_crop_px=48 * scale,
            degradation=(Bicubic(scale=scale),),
            micro_batch=8,
            virtual_shards=4,
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
