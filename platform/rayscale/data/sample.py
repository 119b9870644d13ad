"""One window of training samples: a pure function of (photos, plan, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscale.data.cut import cut, dtype_of, fit, sample_shapes
from rayscale.data.mixture import Mixture
from rayscale.data.plan import I64, Plan, sample_generator
from rayscale.errors import ImageError, RayscaleError
from rayscale.imaging import U8, decode_rgb

SUBSTITUTES = 16  # photos tried in the place of a damaged one


@dataclass(frozen=True)
class MicroBatch:
    """Row `step % R` of virtual shard `shard`. weight 0: a spare that only keeps ranks in step."""

    step: int
    shard: int
    tensors: dict[str, NDArray[Any]]  # lr: u8[b, h, w, 3], hr: u8[b, h * scale, w * scale, 3], label: i64[b], ...
    ids: I64  # [b, 3]: epoch, image, crop
    sha256: bytes  # of ids and tensors
    weight: float = 1.0
    damaged: tuple[tuple[str, str], ...] = ()  # (key, reason) of photos of it that another one stands in for

    def checksum(self) -> bytes:
        """SHA-256 over ids and tensors, in the order of their names."""
        total = hashlib.sha256(np.ascontiguousarray(self.ids).tobytes())
        for name in sorted(self.tensors):
            total.update(np.ascontiguousarray(self.tensors[name]).data)
        return total.digest()


def render_window(photos: Mixture, plan: Plan, w: int, v: int, first_row: int, last_row: int) -> Iterator[MicroBatch]:
    """Rows [first_row, last_row) of window `w` of virtual shard `v`: read once, decoded once, all crops cut.

    In the place of a photo that is damaged stands another one, chosen by the plan: counts and order never change, and
    the choice depends on nothing but the plan and which photos are damaged.
    """
    s = plan.settings
    window = plan.window(w, v)
    rows = window.order[first_row:last_row]
    wanted = np.unique(rows // s.crops)  # slots of the window that these rows touch
    tensors = {name: np.empty((*rows.shape, *shape), dtype_of(name)) for name, shape in sample_shapes(s).items()}
    place = {int(entry): divmod(i, s.micro_batch) for i, entry in enumerate(rows.ravel())}
    damaged: dict[int, tuple[str, str]] = {}
    for slot, data in zip(wanted.tolist(), photos.read_each(window.images[wanted]), strict=True):
        image = int(window.images[slot])
        shown, photo = image, _decoded(data)
        if isinstance(photo, RayscaleError):
            damaged[slot] = (photos.key(image), photo.rule)
            shown, photo = _stand_in(photos, plan, w, v, slot, photo)
        photo, label = fit(photo, s.fit_px), photos.label(shown)
        for crop in range(s.crops):
            if (at := place.get(slot * s.crops + crop)) is None:  # of a row that is not asked for
                continue
            rng = sample_generator(s.seed, int(window.epochs[slot]), image, crop)
            for name, tensor in cut(photo, s, rng)[0].items():
                tensors[name][at] = tensor  # a copy: a crop that is a view would keep its whole photo
            if "label" in tensors:
                tensors["label"][at] = label
    for r, entries in enumerate(rows):
        slots, crops = entries // s.crops, entries % s.crops
        ids = np.stack([window.epochs[slots], window.images[slots], crops], axis=1).astype(np.int64)
        bad = tuple(damaged[slot] for slot in slots.tolist() if slot in damaged)
        of_row = {name: tensor[r] for name, tensor in tensors.items()}
        batch = MicroBatch(w * plan.rows + first_row + r, v, of_row, ids, b"", damaged=bad)
        yield replace(batch, sha256=batch.checksum())


def _decoded(data: bytes | RayscaleError) -> U8 | RayscaleError:
    if isinstance(data, RayscaleError):
        return data
    try:
        return decode_rgb(data)
    except ImageError as error:
        return error


def _stand_in(photos: Mixture, plan: Plan, w: int, v: int, slot: int, error: RayscaleError) -> tuple[int, U8]:
    """(number of a sound photo, that photo) for a slot, of outside the window if it can be.

    Raises: `error`, where others are damaged too.
    """
    there = plan.window(w, v).images
    choices = [int(plan.substitute(w, v, attempt)[slot]) for attempt in range(SUBSTITUTES)]
    for image in sorted(choices, key=lambda image: image in there):
        if image != there[slot]:
            photo = _decoded(photos.read_each(np.array([image]))[0])
            if not isinstance(photo, RayscaleError):
                return image, photo
    raise error
