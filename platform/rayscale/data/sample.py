"""One training sample, and one window of them: pure functions of (photos, plan, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayscale.data.degrade import apply, margin_px
from rayscale.data.plan import I64, DataSettings, Plan, sample_generator
from rayscale.data.shards import Photos
from rayscale.errors import ConfigError
from rayscale.imaging import decode_rgb

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class MicroBatch:
    """Row `step % R` of virtual shard `shard`. weight 0: a spare that only keeps ranks in step."""

    step: int
    shard: int
    tensors: dict[str, U8]  # lr: u8[b, h, w, 3], hr: u8[b, h * scale, w * scale, 3]
    ids: I64  # [b, 3]: epoch, image, crop
    sha256: bytes  # of ids and tensors
    weight: float = 1.0

    def checksum(self) -> bytes:
        """SHA-256 over ids and tensors, in the order of their names."""
        total = hashlib.sha256(np.ascontiguousarray(self.ids).tobytes())
        for name in sorted(self.tensors):
            total.update(np.ascontiguousarray(self.tensors[name]).data)
        return total.digest()


def check_sizes(photos: Photos, settings: DataSettings) -> None:
    """Raises: ConfigError where a photo of the split is smaller than a crop."""
    sides = np.minimum(np.asarray(photos.widths), np.asarray(photos.heights))
    scale = settings.scale
    if len(sides) and int(sides.min()) // scale * scale < settings.hr_crop_px:
        worst = int(sides.argmin())
        raise ConfigError(
            "data.hr_crop_px",
            settings.hr_crop_px,
            f"exceeds the smallest photo, {photos.keys[worst]} with {int(sides.min())} px",
            f"lower it, or pack again with --min-side {settings.hr_crop_px}",
        )


def cut_pair(photo: U8, settings: DataSettings, rng: np.random.Generator) -> tuple[U8, U8]:
    """One (lr, hr) pair of a decoded photo u8[h, w, 3].

    The crop is degraded with the photo's own pixels around it, so lr is what cutting the degraded photo gives,
    and no crop's border leaks into training.
    """
    scale, side = settings.scale, settings.hr_crop_px
    rows, columns = photo.shape[0] // scale, photo.shape[1] // scale  # the LR grid, anchored at the top left
    lr_side = side // scale
    top = int(rng.integers(0, rows - lr_side + 1))
    left = int(rng.integers(0, columns - lr_side + 1))
    margin = -(-margin_px(settings.degradation) // scale)  # in LR pixels
    y0, x0 = max(0, top - margin), max(0, left - margin)
    y1, x1 = min(rows, top + lr_side + margin), min(columns, left + lr_side + margin)
    wide, _ = apply(settings.degradation, photo[y0 * scale : y1 * scale, x0 * scale : x1 * scale], rng)
    lr = wide[top - y0 : top - y0 + lr_side, left - x0 : left - x0 + lr_side]
    hr = photo[top * scale : (top + lr_side) * scale, left * scale : (left + lr_side) * scale]
    if settings.flips:
        turns, mirror = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
        lr, hr = (np.rot90(p[:, ::-1] if mirror else p, turns) for p in (lr, hr))
    return lr, hr


def render_window(photos: Photos, plan: Plan, w: int, v: int, first_row: int, last_row: int) -> Iterator[MicroBatch]:
    """Rows [first_row, last_row) of window `w` of virtual shard `v`: read once, decoded once, all crops cut."""
    s = plan.settings
    window = plan.window(w, v)
    rows = window.order[first_row:last_row]
    wanted = np.unique(rows // s.crops)  # slots of the window that these rows touch
    crops_of = {int(slot): np.unique(rows[rows // s.crops == slot] % s.crops) for slot in wanted}
    pairs: dict[int, tuple[U8, U8]] = {}
    for slot, data in zip(wanted, photos.read(window.images[wanted]), strict=True):
        image = int(window.images[slot])
        photo = decode_rgb(data, name=str(photos.keys[image]))
        for crop in crops_of[int(slot)]:
            rng = sample_generator(s.seed, int(window.epochs[slot]), image, int(crop))
            pairs[int(slot) * s.crops + int(crop)] = cut_pair(photo, s, rng)
    for r, row in enumerate(rows, first_row):
        slots, crops = row // s.crops, row % s.crops
        tensors = {
            "lr": np.stack([pairs[int(e)][0] for e in row]),
            "hr": np.stack([pairs[int(e)][1] for e in row]),
        }
        ids = np.stack([window.epochs[slots], window.images[slots], crops], axis=1).astype(np.int64)
        batch = MicroBatch(w * plan.rows + r, v, tensors, ids, b"")
        yield MicroBatch(batch.step, v, tensors, ids, batch.checksum())
