"""A preview shows the samples that training would see."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rayscale.data import presets
from rayscale.data.cut import cut, recut
from rayscale.data.plan import DataSettings, sample_generator
from rayscale.data.preview import preview
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


def test_a_preview_holds_what_there_is(dataset: str) -> None:
    photos = open_split(dataset, "validation")
    assert len(preview(photos, SETTINGS, 50).samples) == len(photos) == 2
    with pytest.raises(ConfigError, match="count=0: there is nothing to show"):
        preview(photos, SETTINGS, 0)
