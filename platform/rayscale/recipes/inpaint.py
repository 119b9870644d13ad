"""Recipes that fill missing pixels: boxes, brush strokes, irregular holes. The mask is the model's second input.

python jobs/train.py --recipe rayscale.recipes.inpaint:demo --data s3://bucket/photos
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.presets import inpaint
from rayscale.recipes import Recipe, denoise
from rayscale.task import Optimizer
from rayscale.tasks.restore import Restore
from rayscale.tasks.unet import Unet


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    base = denoise.tiny()
    return replace(
        base,
        task=Restore(
            features=8,
            depth=3,
            masked=True,
            fill_levels=1,  # leaves much to learn
            fill_steps=0,
            optimizer=Optimizer(learning_rate=4e-3),
            ema_halflife_images=100.0,
        ),
        data=replace(base.data, degradation=inpaint()),
    )


def demo() -> Recipe:
    """A tenth to four tenths of the picture missing, in holes of up to some 50 px; at most ten minutes on one core."""
    base = denoise.sigma25_demo()
    return replace(
        base,
        task=Restore(
            features=24,
            depth=11,
            dilations=(1, 2, 4, 8, 4, 2, 1, 2, 4, 2, 1),
            masked=True,
            loss_kind="mse",
            optimizer=Optimizer(learning_rate=2e-3, warmup_images=1_000, decay="cosine"),
            ema_halflife_images=1_000.0,
        ),
        data=replace(base.data, hr_crop_px=96, degradation=inpaint(picture_px=96), micro_batch=4),
        run=replace(base.run, total_images=10_000),
    )


def holes() -> Recipe:
    """The same for production. Hours on a GPU."""
    base = denoise.sigma25()
    return replace(
        base,
        task=Restore(
            features=64,
            depth=18,
            dilations=(1, 2, 4, 8, 16, 8, 4, 2, 1),
            masked=True,
            fill_levels=7,
            optimizer=Optimizer(learning_rate=5e-4, warmup_images=32_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=replace(base.data, hr_crop_px=128, degradation=inpaint(picture_px=128), micro_batch=8),
    )


def unet_holes() -> Recipe:
    """The same by an encoder-decoder, which sees across the hole."""
    base = denoise.unet_blind()
    task = Unet(
        scale=1,
        features=32,
        blocks=2,
        levels=4,
        needs_mask=True,
        optimizer=Optimizer(learning_rate=2e-4, warmup_images=32_000, decay="cosine"),
        ema_halflife_images=20_000.0,
    )
    return replace(base, task=task, data=replace(base.data, degradation=inpaint(picture_px=base.data.hr_crop_px)))
