"""One window of training samples: a pure function of (photos, plan, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rayscale.data.cut import cut
from rayscale.data.plan import I64, Plan, sample_generator
from rayscale.data.shards import Photos
from rayscale.imaging import U8, decode_rgb


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


def render_window(photos: Photos, plan: Plan, w: int, v: int, first_row: int, last_row: int) -> Iterator[MicroBatch]:
    """Rows [first_row, last_row) of window `w` of virtual shard `v`: read once, decoded once, all crops cut."""
    s = plan.settings
    window = plan.window(w, v)
    rows = window.order[first_row:last_row]
    wanted = np.unique(rows // s.crops)  # slots of the window that these rows touch
    crops_of = {int(slot): np.unique(rows[rows // s.crops == slot] % s.crops) for slot in wanted}
    cuts: dict[int, dict[str, U8]] = {}
    for slot, data in zip(wanted, photos.read(window.images[wanted]), strict=True):
        image = int(window.images[slot])
        photo = decode_rgb(data, name=str(photos.keys[image]))
        for crop in crops_of[int(slot)]:
            rng = sample_generator(s.seed, int(window.epochs[slot]), image, int(crop))
            cuts[int(slot) * s.crops + int(crop)], _ = cut(photo, s, rng)
    for r, row in enumerate(rows, first_row):
        slots, crops = row // s.crops, row % s.crops
        tensors = {name: np.stack([cuts[int(e)][name] for e in row]) for name in cuts[int(row[0])]}
        ids = np.stack([window.epochs[slots], window.images[slots], crops], axis=1).astype(np.int64)
        batch = MicroBatch(w * plan.rows + r, v, tensors, ids, b"")
        yield MicroBatch(batch.step, v, tensors, ids, batch.checksum())
