"""An evaluation's tables: their figures are those of the scores, and the crop shown is the one that errs most."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.cli.pages import Seen, digits, error_corner, every_picture, gains, means, side_by_side_rows
from rayscale.contract import Scores
from rayscale.evaluate.suite import Pair
from rayscale.registry.gate import lower_bound
from rayscale.report import page

TITLES = {"psnr_y": "PSNR", "ssim_y": "SSIM"}


def scores(seed: int, shift: float = 0.0) -> Scores:
    rng = np.random.default_rng(seed)
    values = {"psnr_y": tuple(30 + shift + rng.normal(0, 2, 20)), "ssim_y": tuple(rng.random(20))}
    return Scores(subject="x", suite="s", keys=tuple(f"photo {i}" for i in range(20)), metrics=values)


def test_means_and_gains_are_those_of_the_scores() -> None:
    ours, other = scores(0, 1.5), scores(1)
    table = means({"ours": ours, "other": other}, TITLES)
    assert table.rows[0] == ["ours", ours.mean("psnr_y"), ours.mean("ssim_y")]
    assert "<b>" in page("t", [table])
    (row,) = gains({"ours": ours, "other": other}, "ours", "psnr_y", "PSNR").rows
    paired = np.subtract(ours.metrics["psnr_y"], other.metrics["psnr_y"])
    bound = lower_bound(list(paired), confidence=0.95, resamples=2000, seed=0)
    assert row[0] == "over other"
    assert row[1:] == pytest.approx([paired.mean(), bound, 100 * (paired > 0).mean(), paired.min(), paired.max()])
    assert bound < paired.mean()


def test_a_picture_that_is_not_finite_is_no_gain() -> None:
    ours, other = scores(0, 50.0), scores(1)
    values = (math.nan, *ours.metrics["psnr_y"][1:])
    broken = Scores(subject="x", suite="s", keys=ours.keys, metrics={**ours.metrics, "psnr_y": values})
    (row,) = gains({"ours": broken, "other": other}, "ours", "psnr_y", "PSNR").rows
    assert math.isnan(row[1])  # type: ignore[arg-type]
    assert row[3] == 95.0
    table = every_picture({"ours": broken, "other": other}, "ours", TITLES)
    assert table.rows[0][0] == "photo 0"  # the worst
    assert [r[1] for r in table.rows[1:]] == sorted(values[1:])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), height=st.integers(1, 4), width=st.integers(1, 4), crop=st.sampled_from([2, 4, 6]))
def test_the_corner_is_where_a_search_finds_it(seed: int, height: int, width: int, crop: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, 2 * height, 2 * width, 3)).astype(np.uint8)
    error = np.square(a.astype(int) - b).sum(2)
    h, w = min(crop, 2 * height), min(crop, 2 * width)
    places = [(y, x) for y in range(0, 2 * height - h + 1, 2) for x in range(0, 2 * width - w + 1, 2)]
    best = max(places, key=lambda p: (error[p[0] : p[0] + h, p[1] : p[1] + w].sum(), (-p[0], -p[1])))
    assert error_corner(a, b, crop, 2) == best


def test_rows_show_the_same_place_everywhere() -> None:
    truth = np.zeros((40, 60, 3), np.uint8)
    truth[24:, 40:] = 200
    lr = truth[::2, ::2]
    made = {"good": truth, "bad": np.zeros_like(truth)}
    (row,) = side_by_side_rows([Seen(Pair("k", lr, truth), made)], "bad", 2, 16)
    names = list(row)
    assert names[0] == "k low resolution"
    assert [name.split()[0] for name in names[1:]] == ["good", "bad", "truth"]
    assert {picture.shape for picture in row.values()} == {(16, 16, 3)}
    assert (row["truth"] == 200).all()
    assert (row["k low resolution"] == 200).all()
    assert (row[names[2]] == 0).all()


def test_digits_leave_what_a_reader_can_use() -> None:
    assert [digits([v]) for v in (33.4567, 0.98765, -921.4, 123456.0, 0.00123, math.nan)] == [2, 4, 1, 0, 4, 3]
    assert digits([0.5, 33.0]) == 2
