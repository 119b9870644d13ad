"""Recipes of the convolutional GAN: small, and quick enough for a CPU.

python jobs/train.py --recipe rayscale.recipes.dcgan:flowers_demo --data s3://bucket/flowers
"""

from __future__ import annotations

from rayscale.data.plan import DataSettings
from rayscale.recipes import Recipe
from rayscale.task import Optimizer
from rayscale.tasks.gan import Dcgan, Gan
from rayscale.train.loop import RunSettings


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    adam = Optimizer(learning_rate=1e-3, betas=(0.0, 0.99))
    return Recipe(
        task=Gan(
            architecture=Dcgan(features=8, max_features=16),
            side=28,
            latent=8,
            r1_gamma=0.1,
            penalty_share=0.5,
            optimizer=adam,
            critic_optimizer=adam,
            ema_halflife_images=100.0,
        ),
        data=DataSettings(hr_crop_px=28, micro_batch=4, virtual_shards=2, window_images=8, crops=2),
        run=RunSettings(
            total_images=512, log_every_images=128, validate_every_images=256, checkpoint_every_images=128, ship="last"
        ),
    )
