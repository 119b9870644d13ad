"""Recipes of upscalers trained against a critic: sharper to people, a little worse in PSNR.

First the generator on its pixel loss, then from its weights:

python jobs/train.py --recipe rayscale.recipes.rrdb:x4 --data s3://bucket/photos --name pixels --gpus-per-worker 1
python jobs/train.py --recipe rayscale.recipes.srgan:x4 --data s3://bucket/photos --gpus-per-worker 1 \
    --set run.warm_start=RUNS/pixels \
    --set task.perceptual.net=vgg19 --set task.perceptual.uri=s3://bucket/vgg19.onnx
"""

from __future__ import annotations

from dataclasses import replace

from rayscale.recipes import Recipe, compact, rrdb, span
from rayscale.task import Optimizer
from rayscale.tasks.srgan import Srgan
from rayscale.upscaler import Upscaler


def tiny() -> Recipe:
    """Seconds on one core: what the contract tests train."""
    base = compact.tiny()
    optimizer = Optimizer(learning_rate=1e-3)
    task = Srgan(
        generator=replace(_generator(base), optimizer=optimizer),
        critic="patch",
        critic_features=8,
        critic_optimizer=optimizer,
        style_weight=0.01,
    )
    run = replace(base.run, total_images=512, log_every_images=64, checkpoint_every_images=128, ship="last")
    return replace(base, task=task, run=run)


def demo() -> Recipe:
    """x2 on two cores: the first third on pixels alone, the rest against the critic."""
    base = span.demo()
    task = Srgan(generator=_generator(base), critic="patch", critic_features=32, ramp_images=base.run.total_images // 3)
    return replace(base, task=task, run=replace(base.run, ship="last"))


def x4() -> Recipe:
    """x4 for production, from the weights of `rrdb:x4`."""
    return _production(rrdb.x4())


def fast_x4() -> Recipe:
    """x4 with the generator of `span:x4`, from its weights."""
    return _production(span.x4())


def real_x4() -> Recipe:
    """x4 for photos as they are found, with the degradations of `compact:real_x4` and the weights of its run."""
    return _production(compact.real_x4())


def _production(base: Recipe) -> Recipe:
    """The base's data and length; the best PSNR is not what is looked for, so the last checkpoint ships."""
    optimizer = Optimizer(learning_rate=1e-4, decay="constant")
    generator = replace(_generator(base), optimizer=optimizer)
    task = Srgan(generator=generator, critic_optimizer=optimizer, perceptual_weight=0.5, style_weight=0.05)
    run = replace(base.run, ship="last", total_images=3_200_000, compile=False)
    return replace(base, task=task, run=run)


def _generator(base: Recipe) -> Upscaler:
    assert isinstance(base.task, Upscaler)
    return base.task
