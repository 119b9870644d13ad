"""Recipes against blur that nobody measured: of motion, defocus and lenses, with a little noise.

python jobs/train.py --recipe rayscale.recipes.deblur:demo --data s3://bucket/photos
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.presets import deblur
from rayscale.recipes import Recipe, denoise
from rayscale.task import Optimizer
from rayscale.tasks.restore import Restore

_SEEN_FAR = (1, 2, 3, 4, 3, 2, 1)  # IRCNN's dilations: a blur is wider than noise


def demo() -> Recipe:
    """The blurs of `presets.deblur` in at most ten minutes on one core."""
    base = denoise.sigma25_demo()
    return replace(
        base,
        task=Restore(
            features=32,
            depth=10,
            dilations=_SEEN_FAR,
            optimizer=Optimizer(learning_rate=2e-3, warmup_images=1_000, decay="cosine"),
            ema_halflife_images=1_000.0,
        ),
        data=replace(base.data, hr_crop_px=48, degradation=deblur()),
        run=replace(base.run, total_images=40_000),
    )


def any_blur() -> Recipe:
    """The same for production. Hours on a GPU."""
    base = denoise.sigma25()
    return replace(
        base,
        task=Restore(
            features=64,
            depth=21,
            dilations=_SEEN_FAR,
            optimizer=Optimizer(learning_rate=5e-4, warmup_images=32_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=replace(base.data, hr_crop_px=128, degradation=deblur()),
    )


def unet_any_blur() -> Recipe:
    """The same by an encoder-decoder, which sees further than the longest motion."""
    base = denoise.unet_blind()
    return replace(base, data=replace(base.data, degradation=deblur()))
