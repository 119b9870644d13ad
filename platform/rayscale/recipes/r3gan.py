"""Recipes of the modern GAN: relativistic pairing, R1 and R2, residual nets without any norm (arXiv:2501.05441).

python jobs/train.py --recipe rayscale.recipes.r3gan:px64 --data s3://bucket/photos
"""

from __future__ import annotations

from rayscale.data.plan import DataSettings
from rayscale.recipes import Recipe
from rayscale.task import Optimizer
from rayscale.tasks.gan import Gan, Residual
from rayscale.train.loop import RunSettings


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    adam = Optimizer(learning_rate=1e-3, betas=(0.0, 0.99))
    return Recipe(
        task=Gan(
            architecture=Residual(features=8, max_features=16, blocks=1),
            side=16,
            latent=8,
            adversarial="relativistic",
            r1_gamma=0.1,
            r2_gamma=0.1,
            optimizer=adam,
            critic_optimizer=adam,
            ema_halflife_images=100.0,
        ),
        data=DataSettings(hr_crop_px=16, micro_batch=4, virtual_shards=2, window_images=8, crops=2),
        run=RunSettings(
            total_images=512, log_every_images=128, validate_every_images=256, checkpoint_every_images=128, ship="last"
        ),
    )
