"""A dataset at a glance: a contact sheet, histograms as a picture, and the same figures as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayscale.data.manifest import SPLITS
from rayscale.data.shards import open_split
from rayscale.data.verify import open_dataset
from rayscale.errors import ConfigError
from rayscale.imaging import U8, decode_rgb, panel

SIDES = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 1 << 31)  # px, of the shorter side
CELL_PX = 160
_LONGEST = 16  # bars of one chart; the rest is summed up
_BACK, _BAR, _INK = (24, 26, 30), (92, 148, 214), (228, 230, 235)


class Overview(NamedTuple):
    """What `overview` shows."""

    sheet: U8  # contact sheet
    histograms: U8
    facts: dict[str, Any]  # the same figures


def overview(uri: str, count: int = 48) -> Overview:
    """Figures of the whole dataset, and `count` of its photos, spread evenly over each split.

    Raises: MissingError (no dataset), ConfigError (count), IntegrityError (a shown photo is damaged).
    """
    if not 1 <= count <= 1000:
        raise ConfigError("count", count, "must be 1 to 1000 photos", "48 fill a screen")
    store, manifest = open_dataset(uri)
    wanted = ["split", "label", "format", "width", "height", "size", "group", "box"]
    file = pq.ParquetFile(pa.BufferReader(store.read(manifest.index_name)))
    facts = figures(file.read(columns=[c for c in wanted if c in file.schema_arrow.names], use_threads=False))
    facts |= {"shards": len(manifest.shards), "digest": manifest.digest, "parent": manifest.parent}
    charts = {name: facts[name] for name in ("splits", "formats", "shorter_side_px", "labels")}
    return Overview(_sheet(store.uri, manifest.counts, count), _charts(charts), facts)


def figures(index: pa.Table) -> dict[str, Any]:
    """Counts by split, label, format and shorter side, and sums, of an index's columns."""

    def counts(column: str) -> dict[str, int]:
        if column not in index.column_names:
            return {}
        found = Counter({row["values"]: row["counts"] for row in index[column].value_counts().to_pylist()})
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))

    width, height, size = (index[c].to_numpy().astype(np.int64) for c in ("width", "height", "size"))
    num, _ = np.histogram(np.minimum(width, height), SIDES)
    names = [f"{a}-{b - 1}" for a, b in pairwise(SIDES[:-1])] + [f"{SIDES[-2]}-"]
    splits = counts("split")
    alone = counts("group").pop("", index.num_rows)
    return {
        "photos": index.num_rows,
        "bytes": int(size.sum()),
        "megapixels": round(float((width * height).sum()) / 1e6, 3),
        "splits": {split: splits.get(split, 0) for split in SPLITS},
        "labels": counts("label"),
        "formats": counts("format"),
        "shorter_side_px": dict(zip(names, num.tolist(), strict=True)),
        "in_groups": index.num_rows - alone,
        "tiles": index.num_rows - counts("box").get("", index.num_rows),
    }


def _sheet(uri: str, counts: Mapping[str, int], count: int) -> U8:
    pictures: list[tuple[str, U8]] = []
    total = sum(counts.values())
    for split in SPLITS:
        photos = open_split(uri, split)
        share = min(len(photos), -(-count * len(photos) // total))
        indices = [i * len(photos) // share for i in range(share)]
        for i in indices:  # one at a time: decoded photos are large
            photo = decode_rgb(photos.read([i])[0], name=str(photos.keys[i]))
            factor = CELL_PX / max(photo.shape[:2])
            sides = (max(1, round(photo.shape[1] * factor)), max(1, round(photo.shape[0] * factor)))
            small = cv2.resize(photo, sides, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)
            pictures.append((f"{split[:5]} {photos.labels[i] or photos.keys[i][:8]}", np.asarray(small, np.uint8)))
    return panel(pictures[:count], columns=8, cell_px=CELL_PX)


def _charts(charts: Mapping[str, Mapping[str, int]]) -> U8:
    """Bar charts below each other, u8[h, w, 3]."""
    row, left, width = 22, 190, 720
    pieces = []
    for title, bars in charts.items():
        shown = list(bars.items())[:_LONGEST]
        if len(bars) > _LONGEST:
            shown.append((f"({len(bars) - _LONGEST} others)", sum(list(bars.values())[_LONGEST:])))
        canvas = np.full(((len(shown) + 2) * row, left + width + 90, 3), _BACK, np.uint8)
        _text(canvas, title.replace("_", " "), 8, row - 6)
        longest = max([num for _, num in shown] or [1]) or 1
        for i, (name, num) in enumerate(shown, 1):
            top, end = i * row + 3, left + round(width * num / longest)
            canvas[top : top + row - 6, left:end] = _BAR
            _text(canvas, (name or "(none)")[:22], 8, (i + 1) * row - 7)
            _text(canvas, str(num), end + 6, (i + 1) * row - 7)
        pieces.append(canvas)
    return np.concatenate(pieces)


def _text(canvas: U8, text: str, x: int, y: int) -> None:
    shown = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, shown, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _INK, 1, cv2.LINE_AA)
