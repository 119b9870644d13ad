"""A preview shows the samples that training would see."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rayscale.data import presets
from rayscale.data.augment import Rotate
from rayscale.data.cut import cut, recut
from rayscale.data.mixture import open_mixture
from rayscale.data.plan import DataSettings, sample_generator
from rayscale.data.preview import preview
from rayscale.data.sample import render_window
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError
from rayscale.imaging import decode_rgb

SETTINGS = DataSettings(hr_crop_px=64, seed=3)


@pytest.mark.parametrize("chain", [presets.real_esrgan(4), presets.inpaint(), presets.burst(4, 3)])
def test_a_preview_is_the_first_crops_of_training(dataset: str, chain: presets.Degradation) -> None:
    photos, settings = open_split(dataset, "train"), replace(SETTINGS, degradation=chain)
    shown = preview(photos, settings, 4)
    assert [sample.key for sample in shown.samples] == [photos.keys[i] for i in (0, 3, 6, 9)]
    for i, sample in zip((0, 3, 6, 9), shown.samples, strict=True):
        photo = decode_rgb(photos.read([i])[0])
        expected, _ = cut(photo, settings, sample_generator(3, 0, i, 0))
        again = recut(photo, settings, json.loads(json.dumps(sample.drawn)))
        for name, tensor in expected.items():
            np.testing.assert_array_equal(sample.tensors[name], tensor)
            np.testing.assert_array_equal(again[name], tensor)
    columns = {"lr": 1, "mask": 1, "hr": 1} if "mask" in expected else {"lr": expected["lr"].ndim * 2 - 5, "hr": 1}
    height, width = shown.sheet.shape[:2]
    assert width == pytest.approx(202 * sum(columns.values()), abs=12)
    assert height == pytest.approx(228 * 4, abs=12)


def test_training_draws_the_samples_of_a_preview(dataset: str) -> None:
    photos = open_mixture((dataset,), "train")
    settings = replace(
        SETTINGS, degradation=presets.inpaint(), augment=(Rotate(degrees=5),), micro_batch=2, window_images=4, crops=2
    )
    plan = photos.plan(settings)
    windows = range(-(-plan.num_images // (settings.window_images * settings.virtual_shards)))
    shards = range(settings.virtual_shards)
    batches = [b for w in windows for v in shards for b in render_window(photos, plan, w, v, 0, plan.rows)]
    trained = {
        tuple(key): {name: tensor[i] for name, tensor in batch.tensors.items()}
        for batch in batches
        for i, key in enumerate(batch.ids.tolist())
    }
    shown = preview(photos.parts[0], settings, plan.num_images).samples
    for image, sample in enumerate(shown):
        for name, tensor in sample.tensors.items():
            np.testing.assert_array_equal(tensor, trained[0, image, 0][name])
    assert not np.array_equal(shown[0].tensors["hr"], trained[0, 0, 1]["hr"])  # another crop would be noticed


def test_a_preview_holds_what_there_is(dataset: str) -> None:
    photos = open_split(dataset, "validation")
    assert len(preview(photos, SETTINGS, 50).samples) == len(photos) == 2
    with pytest.raises(ConfigError, match="count=0: there is nothing to show"):
        preview(photos, SETTINGS, 0)
    with pytest.raises(ConfigError, match=r"data\.hr_crop_px=512: exceeds the smallest photo"):
        preview(photos, replace(SETTINGS, hr_crop_px=512), 1)
