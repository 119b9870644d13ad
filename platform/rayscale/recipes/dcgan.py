"""Recipes of the convolutional GAN: small, and quick enough for a CPU.

Flowers in at most ten minutes on two cores, from photos packed as a dataset (with their folders as labels):

    rayscale data pack flowers128 flowers
    python jobs/train.py --recipe rayscale.recipes.dcgan:flowers_demo --data flowers
    python jobs/train.py --recipe rayscale.recipes.dcgan:flowers_by_class_demo --data flowers
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.augment import Mirror
from rayscale.data.plan import DataSettings
from rayscale.recipes import Recipe
from rayscale.registry.gate import Gate
from rayscale.task import Optimizer
from rayscale.tasks.gan import Dcgan, Gan
from rayscale.train.loop import RunSettings

# In units of 1000 KID in the built-in features, where a Gaussian of the pixels is at 1.2; a single subset may fall.
GATE = Gate(metric="neg_kid", min_gain_db_over_baseline=0.0, margin_vs_champion=0.05, max_image_loss_db=1e9, also=())


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
        data=whole_photos(28, micro_batch=4, virtual_shards=2, window_images=8, crops=2),
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


def flowers_demo() -> Recipe:
    """32 px, a few thousand photos: better than a Gaussian of the pixels within minutes on a CPU."""
    adam = Optimizer(learning_rate=1.5e-3, betas=(0.0, 0.99), decay="cosine", final_fraction=0.1)
    return Recipe(
        task=Gan(
            architecture=Dcgan(features=32, max_features=128),
            side=32,
            adversarial="relativistic",
            r1_gamma=0.05,
            r2_gamma=0.05,
            penalty_share=0.25,
            optimizer=adam,
            critic_optimizer=adam,
            ema_halflife_images=10_000.0,
        ),
        data=whole_photos(32, micro_batch=16, virtual_shards=1, window_images=256, crops=1),
        run=RunSettings(
            total_images=80_000,
            log_every_images=4_000,
            validate_every_images=40_000,
            checkpoint_every_images=40_000,
            validate_on_images=1_000,
            best_metric="neg_kid",
        ),
        gate=GATE,
    )


def flowers_by_class_demo() -> Recipe:
    """The same with a class as second input: five kinds of flowers."""
    base = flowers_demo()
    assert isinstance(base.task, Gan)
    return replace(base, task=replace(base.task, num_classes=5), data=replace(base.data, tensors=("hr", "label")))


def px28() -> Recipe:
    """28 px for production: minutes on a GPU."""
    return _production(28, features=64, images=2_000_000)


def px32() -> Recipe:
    """32 px for production."""
    return _production(32, features=64, images=4_000_000)


def px64() -> Recipe:
    """64 px for production."""
    return _production(64, features=64, images=8_000_000)


def px128() -> Recipe:
    """128 px for production: hours on a GPU."""
    return _production(128, features=32, images=16_000_000)


def _production(side: int, features: int, images: int) -> Recipe:
    adam = Optimizer(learning_rate=5e-4, betas=(0.0, 0.99), warmup_images=20_000, decay="cosine", final_fraction=0.1)
    return Recipe(
        task=Gan(
            architecture=Dcgan(features=features, max_features=512),
            side=side,
            latent=128,
            r1_gamma=0.1 * (side / 32) ** 2,  # a gradient's square grows with the pixels it is spread over
            optimizer=adam,
            critic_optimizer=adam,
            ema_halflife_images=50_000.0,
        ),
        data=whole_photos(side, micro_batch=16, virtual_shards=8, window_images=256, crops=1),
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


def whole_photos(side: int, *, micro_batch: int, virtual_shards: int, window_images: int, crops: int) -> DataSettings:
    """Whole photos, shrunk, left and right exchanged at random, nothing degraded."""
    return DataSettings(
        hr_crop_px=side,
        fit_px=side,
        tensors=("hr",),
        degradation=(),
        augment=(Mirror(),),
        flips=False,
        micro_batch=micro_batch,
        virtual_shards=virtual_shards,
        window_images=window_images,
        crops=crops,
    )
