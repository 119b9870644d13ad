"""What an evaluation found, as the sections of its report: functions of scores and pictures, nothing is run here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from rayscale.contract import Scores
from rayscale.evaluate.suite import Pair
from rayscale.imaging import U8
from rayscale.metrics import psnr
from rayscale.registry.gate import lower_bound
from rayscale.report import Better, Cell, Curves, Table, sorted_curve, worst

CONFIDENCE = 0.95  # one-sided, of a mean gain
_RESAMPLES = 2000
_KEY = 8  # characters of a picture's key above it: enough to find it in the table


class Seen(NamedTuple):
    """One picture with what each contender made of it: {name: u8[h, w, 3]}."""

    pair: Pair
    made: Mapping[str, U8]


def means(scores: Mapping[str, Scores], titles: Mapping[str, str]) -> Table:
    """A row a contender, a column a metric of `titles`."""
    rows: list[list[Cell]] = [[name, *(one.mean(metric) for metric in titles)] for name, one in scores.items()]
    higher: Better = "higher"  # scores are
    return Table(
        title=f"Means over {_count(scores)} pictures",
        columns=["", *titles.values()],
        rows=rows,
        digits=[0, *(digits(one.mean(metric) for one in scores.values()) for metric in titles)],
        better=["", *[higher] * len(titles)],
    )


def gains(scores: Mapping[str, Scores], subject: str, metric: str, title: str) -> Table:
    """How much `subject` gains over each other, picture by picture; the bound is that of promotion's gate."""
    rows: list[list[Cell]] = []
    for name, one in scores.items():
        if name == subject:
            continue
        paired = [a - b for a, b in zip(scores[subject].metrics[metric], one.metrics[metric], strict=True)]
        known = [g for g in paired if not math.isnan(g)]
        bound = lower_bound(known, confidence=CONFIDENCE, resamples=_RESAMPLES, seed=0) if known else math.nan
        better = 100.0 * sum(g > 0 for g in known) / len(paired)
        mean = math.fsum(paired) / len(paired) if all(map(math.isfinite, paired)) else math.nan
        rows.append([f"over {name}", mean, bound, better, min(known, default=math.nan), max(known, default=math.nan)])
    shown = digits([scores[subject].mean(metric)])
    return Table(
        title=f"Gain of {subject} in {title}",
        columns=["", "mean", f"at least ({100 * CONFIDENCE:.0f} %)", "pictures gained (%)", "least", "most"],
        rows=rows,
        digits=[0, shown, shown, 0, shown, shown],
        note="At least: lower bound of the mean by bootstrap over the pictures. A picture that is not finite counts "
        "as not gained.",
    )


def distribution(scores: Mapping[str, Scores], metric: str, title: str) -> Curves:
    """How often a value is at most this, a line a contender."""
    series = {name: sorted_curve(one.metrics[metric]) for name, one in scores.items()}
    return Curves(title=f"{title}, sorted", x_label="share of the pictures (%)", y_label=title, series=series)


def every_picture(scores: Mapping[str, Scores], subject: str, titles: Mapping[str, str]) -> Table:
    """All values of all contenders, the subject's worst picture first; folded."""
    first = next(iter(titles))
    keys = scores[subject].keys
    order = worst(scores[subject].metrics[first], len(keys))
    columns = [(metric, name) for metric in titles for name in scores]
    return Table(
        title="Every picture",
        columns=["picture", *(f"{titles[metric]} {name}" for metric, name in columns)],
        rows=[[keys[i], *(scores[name].metrics[metric][i] for metric, name in columns)] for i in order],
        digits=[0, *(digits([scores[name].mean(metric)]) for metric, name in columns)],
        folded=True,
    )


def side_by_side_rows(seen: Sequence[Seen], subject: str, scale: int, crop_px: int) -> list[dict[str, U8]]:
    """Of each picture the crop where `subject` is furthest from the truth: lr | each contender | truth."""
    rows = []
    for pair, made in seen:
        y, x = error_corner(made[subject], pair.hr, crop_px, scale)
        hr = slice(y, y + crop_px), slice(x, x + crop_px)
        lr = slice(y // scale, (y + crop_px) // scale), slice(x // scale, (x + crop_px) // scale)
        given = (pair.lr[0] if pair.lr.ndim == 4 else pair.lr)[lr].repeat(scale, axis=0).repeat(scale, axis=1)
        row = {f"{pair.key[:_KEY]} {'low resolution' if scale > 1 else 'as given'}": given}
        for name, picture in made.items():
            row[f"{name} {psnr(picture[hr], pair.hr[hr], luma_only=True):.2f} dB"] = picture[hr]
        rows.append({**row, "truth": pair.hr[hr]})
    return rows


def error_corner(picture: U8, truth: U8, crop_px: int, multiple: int = 1) -> tuple[int, int]:
    """(y, x) of the window of crop_px with the most squared error, at multiples of `multiple`; of equals the first."""
    error = np.square(picture.astype(np.int64) - truth).sum(axis=2).astype(np.float64)
    height, width = (min(crop_px, side) for side in error.shape)
    sums = cv2.integral(error)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    y, x = np.unravel_index(inside[::multiple, ::multiple].argmax(), inside[::multiple, ::multiple].shape)
    return int(y) * multiple, int(x) * multiple


def text(table: Table) -> str:
    """A table for the terminal."""
    shown = [
        [
            str(cell) if not isinstance(cell, float) else f"{cell:.{table.digits[i] if i < len(table.digits) else 3}f}"
            for i, cell in enumerate(row)
        ]
        for row in (table.columns, *table.rows)
    ]
    return "\n".join((table.title, aligned(shown), *([table.note] if table.note else []))) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns for the terminal, a line a row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def digits(values: Iterable[float]) -> int:
    """Decimals that leave four significant digits of the largest, at most 4."""
    largest = max((abs(v) for v in values if math.isfinite(v) and v), default=1.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 4)


def _count(scores: Mapping[str, Scores]) -> int:
    return len(next(iter(scores.values())).keys)
