"""Recipes of the modern GAN: relativistic pairing, R1 and R2, residual nets without any norm (arXiv:2501.05441).

python jobs/train.py --recipe rayscale.recipes.r3gan:px64 --data s3://bucket/photos
python jobs/train.py --recipe rayscale.recipes.r3gan:px64_by_class --data s3://bucket/flowers --set task.num_classes=5
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.recipes import Recipe
from rayscale.recipes.dcgan import GATE, whole_photos
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
        data=whole_photos(16, micro_batch=4, virtual_shards=2, window_images=8, crops=2),
        run=RunSettings(
            total_images=512,
            log_every_images=128,
            validate_every_images=256,
            checkpoint_every_images=128,
            validate_on_images=16,
            best_metric="neg_kid",
        ),
        gate=GATE,
    )


def px64() -> Recipe:
    """64 px for production: hours on a GPU."""
    return _production(64, features=128, gamma=1.0, images=16_000_000)


def px64_by_class() -> Recipe:
    """The same with a class as second input; `--set task.num_classes=` as many as the dataset has labels."""
    base = px64()
    assert isinstance(base.task, Gan)
    return replace(base, task=replace(base.task, num_classes=5), data=replace(base.data, tensors=("hr", "label")))


def px128() -> Recipe:
    """128 px for production: a day on a GPU."""
    return _production(128, features=48, gamma=8.0, images=24_000_000)


def _production(side: int, features: int, gamma: float, images: int) -> Recipe:
    adam = Optimizer(learning_rate=2e-4, betas=(0.0, 0.99), decay="cosine", final_fraction=0.25)
    return Recipe(
        task=Gan(
            architecture=Residual(features=features, max_features=384),
            side=side,
            adversarial="relativistic",
            r1_gamma=gamma,
            r2_gamma=gamma,
            optimizer=adam,
            critic_optimizer=adam,
            ema_halflife_images=50_000.0,
        ),
        data=whole_photos(side, micro_batch=32, virtual_shards=8, window_images=256, crops=1),
        run=RunSettings(
            total_images=images,
            log_every_images=10_000,
            validate_every_images=400_000,
            checkpoint_every_images=200_000,
            validate_on_images=1_000,
            best_metric="neg_kid",
            precision="bf16",
            compile=True,
        ),
        gate=GATE,
    )
