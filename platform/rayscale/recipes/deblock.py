"""Recipes against the blocks of JPEG, of one quality or blindly of any from 10 to 80.

python jobs/train.py --recipe rayscale.recipes.deblock:quality20_demo --data s3://bucket/photos
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.presets import Degradation, deblock
from rayscale.recipes import Recipe, denoise


def quality20_demo() -> Recipe:
    """JPEG of quality 20 in at most ten minutes on one core."""
    return _of(denoise.sigma25_demo(), deblock((20, 20)))


def quality20() -> Recipe:
    """JPEG of quality 20, as papers compare. Hours on a GPU."""
    return _of(denoise.sigma25(), deblock((20, 20)))


def blind() -> Recipe:
    """JPEG of any quality from 10 to 80: one model for all of them."""
    return _of(denoise.blind(), deblock())


def unet_blind() -> Recipe:
    """The same by an encoder-decoder, which sees further than a block."""
    return _of(denoise.unet_blind(), deblock())


def _of(base: Recipe, degradation: Degradation) -> Recipe:
    return replace(base, data=replace(base.data, degradation=degradation))
