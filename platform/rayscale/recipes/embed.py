"""Recipes of the embedding: vectors by which like pictures find each other, learned without labels or from them.

Flowers in at most ten minutes on two cores, from photos packed as a dataset (the first takes their folders for the
score alone: precision among the 10 nearest):

    rayscale data pack flowers128 flowers
    python jobs/train.py --recipe rayscale.recipes.embed:flowers_demo --data flowers
    python jobs/train.py --recipe rayscale.recipes.embed:flowers_by_label_demo --data flowers
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.data.plan import DataSettings
from rayscale.recipes import Recipe
from rayscale.registry.gate import Gate
from rayscale.task import Optimizer
from rayscale.tasks.embed import Embed
from rayscale.train.loop import RunSettings

LABELLED, UNLABELLED = "precision_at_10", "same_photo_at_1"
GATE = Gate(metric=UNLABELLED, min_gain_db_over_baseline=0.02, margin_vs_champion=0.01, max_image_loss_db=1.0,
            max_worst_k_loss_db=1.0, also=())  # fmt: skip


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    return Recipe(
        task=Embed(
            features=8,
            levels=2,
            head=16,
            temperature=0.5,
            optimizer=Optimizer(learning_rate=5e-3),
            ema_halflife_images=100.0,
        ),
        data=_pictures(16, micro_batch=4, virtual_shards=2, window_images=8),
        run=RunSettings(
            total_images=512,
            log_every_images=128,
            validate_every_images=256,
            checkpoint_every_images=128,
            validate_on_images=16,
            best_metric=UNLABELLED,
        ),
        gate=GATE,
    )


def flowers_demo() -> Recipe:
    """32 px in a minute of one core, from a few thousand photos.

    flowers128, the 1,036 photos of its test split: precision among the 10 nearest 0.38, colour histograms 0.41 (chance
    0.21). The best of ten settings is no better than a histogram: views of 4,000 small photos teach what tells photos
    apart, light and background too; longer training and 64 px did not help. Labels do: `flowers_by_label_demo`.
    """
    return Recipe(
        task=Embed(
            features=24,
            levels=3,
            crop_area=(0.3, 1.0),
            jitter=0.25,
            gray_chance=0.05,
            optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-4, warmup_images=4_000, decay="cosine"),
        ),
        data=_pictures(32, micro_batch=64, virtual_shards=1, window_images=256),
        run=RunSettings(
            total_images=20_000,
            log_every_images=2_000,
            validate_every_images=10_000,
            checkpoint_every_images=10_000,
            validate_on_images=500,
            best_metric=LABELLED,
        ),
        gate=replace(GATE, metric=LABELLED),
    )


def flowers_by_label_demo() -> Recipe:
    """The same, told by the folders which flowers are of one kind: what is alike is then what people call so.

    Five minutes of one core: precision among the 10 nearest of held-out flowers 0.55, colour histograms 0.41. A copy of
    a photo is found less often than without labels (0.53, 0.96): what tells flowers of a kind apart is not learned.
    """
    base = flowers_demo()
    assert isinstance(base.task, Embed)
    return replace(
        base,
        task=replace(base.task, objective="supcon"),
        data=replace(base.data, tensors=("hr", "label")),
        run=replace(base.run, total_images=120_000),
        gate=replace(base.gate, min_gain_db_over_baseline=0.1),
    )


def px64() -> Recipe:
    """64 px for production: hours on a GPU."""
    return Recipe(
        task=Embed(
            features=64,
            blocks=2,
            head=256,
            crop_area=(0.1, 1.0),
            blur_chance=0.5,
            optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-4, warmup_images=100_000, decay="cosine"),
            ema_halflife_images=20_000.0,
        ),
        data=_pictures(64, micro_batch=512, virtual_shards=4, window_images=1024),
        run=RunSettings(
            total_images=32_000_000,
            log_every_images=20_000,
            validate_every_images=800_000,
            checkpoint_every_images=400_000,
            validate_on_images=2_000,
            best_metric=UNLABELLED,
            precision="bf16",
            compile=True,
        ),
        gate=GATE,
    )


def _pictures(side_px: int, *, micro_batch: int, virtual_shards: int, window_images: int) -> DataSettings:
    """Photos as they are: every change that a view needs is made in the loss, on the device."""
    return DataSettings(
        hr_crop_px=side_px,
        fit_px=side_px,
        tensors=("hr",),
        degradation=(),
        flips=False,
        micro_batch=micro_batch,
        virtual_shards=virtual_shards,
        window_images=window_images,
        crops=1,
    )
