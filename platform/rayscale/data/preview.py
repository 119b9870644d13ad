"""Some degraded samples to look at, with what was drawn for each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rayscale.data.cut import check_sizes, cut, fit
from rayscale.data.draws import Drawn
from rayscale.data.plan import DataSettings, sample_generator
from rayscale.data.shards import Photos
from rayscale.errors import ConfigError
from rayscale.imaging import U8, decode_rgb, panel


class PreviewSample(NamedTuple):
    """One sample: the photo's key, its tensors to the bit as training gets them, and what was drawn for them."""

    key: str
    tensors: dict[str, U8]
    drawn: Drawn


class Preview(NamedTuple):
    """sheet: u8[h, w, 3], a row a sample; a burst's frames beside each other."""

    sheet: U8
    samples: list[PreviewSample]


def preview(photos: Photos, settings: DataSettings, count: int) -> Preview:
    """Crop 0 of epoch 0 of `count` photos spread evenly over the split (less where it holds less).

    Training on this split alone draws these very samples, in an order of its plan; of several datasets, those of the
    first one. A damaged photo is told here, where training takes another one in its place.

    Raises: ConfigError for no sample, or a photo smaller than a crop; as `Photos.read` and `decode_rgb`.
    """
    count = min(count, len(photos))
    if count < 1:
        raise ConfigError("count", count, "there is nothing to show", "ask for 1 or more of a split with photos")
    check_sizes(photos, settings)
    indices = [i * len(photos) // count for i in range(count)]
    samples = []
    for index, data in zip(indices, photos.read(indices), strict=True):
        photo = fit(decode_rgb(data, name=str(photos.keys[index])), settings.fit_px)
        tensors, drawn = cut(photo, settings, sample_generator(settings.seed, 0, index, 0))
        kept = {name: tensor.copy() for name, tensor in tensors.items()}  # a view would keep its whole photo
        samples.append(PreviewSample(str(photos.keys[index]), kept, drawn))
    rows = [_pictures(sample) for sample in samples]
    return Preview(panel([cell for row in rows for cell in row], columns=len(rows[0])), samples)


def _pictures(sample: PreviewSample) -> list[tuple[str, U8]]:
    """(caption, picture) of every tensor of a sample, frame by frame."""
    found = []
    for name, tensor in sample.tensors.items():
        frames = tensor if tensor.ndim == 4 else tensor[None]
        for number, frame in enumerate(frames):
            caption = f"{sample.key[:8]} {name}" + (f" {number}" if len(frames) > 1 else "")
            found.append((caption, np.ascontiguousarray(np.broadcast_to(frame, (*frame.shape[:2], 3)))))
    return found
