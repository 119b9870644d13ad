"""Recipes of the quality net: at most a million parameters, exactly tileable.

python jobs/train.py --recipe rayscale.recipes.span:demo --data photos/packed            # minutes on two cores
python jobs/train.py --recipe rayscale.recipes.span:x2 --data T91/packed --data BSDS200/packed --gpus-per-worker 1

The second is how published figures on 291 images are made: T91 and the training half of BSDS, nothing else.
"""

from __future__ import annotations

from rayscale.data.degrade import Bicubic
from rayscale.data.plan import DataSettings
from rayscale.recipes import Recipe
from rayscale.registry.gate import Gate
from rayscale.task import Optimizer
from rayscale.tasks.span import Span
from rayscale.train.loop import RunSettings


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    return Recipe(
        task=Span(scale=2, features=8, blocks=1, optimizer=Optimizer(learning_rate=5e-3)),
        data=DataSettings(hr_crop_px=32, micro_batch=2, virtual_shards=4, window_images=4, crops=2),
        run=RunSettings(
            total_images=512,
            log_every_images=128,
            validate_every_images=256,
            checkpoint_every_images=128,
            validate_max_side_px=96,
        ),
    )


def demo() -> Recipe:
    """x2, at least 1.0 dB above bicubic in less than ten minutes on two cores."""
    return Recipe(
        task=Span(
            scale=2,
            features=24,
            blocks=3,
            optimizer=Optimizer(learning_rate=2e-3, warmup_images=500, decay="cosine"),
            ema_halflife_images=500.0,
        ),
        data=DataSettings(hr_crop_px=64, micro_batch=4, virtual_shards=4, window_images=8, crops=16),
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
    """x2, hours on a GPU."""
    return _quality(2)


def x3() -> Recipe:
    """x3, hours on a GPU."""
    return _quality(3)


def x4() -> Recipe:
    """x4, hours on a GPU."""
    return _quality(4)


def _quality(scale: int) -> Recipe:
    return Recipe(
        task=Span(
            scale=scale,
            features=64,
            blocks=8,
            optimizer=Optimizer(learning_rate=1e-3, warmup_images=32_000, decay="cosine", final_fraction=1e-3),
            ema_halflife_images=50_000.0,
        ),
        data=DataSettings(
            hr_crop_px=64 * scale,
            degradation=(Bicubic(scale=scale),),
            micro_batch=16,
            virtual_shards=4,
            window_images=32,
            crops=8,
        ),
        run=RunSettings(
            total_images=16_000_000,
            log_every_images=16_000,
            validate_every_images=256_000,
            checkpoint_every_images=256_000,
            validate_max_side_px=0,
            precision="bf16",
            compile=True,
        ),
    )
