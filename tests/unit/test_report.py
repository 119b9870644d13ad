"""The report: what was given stands in it, nothing is loaded, nothing breaks out of it."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.errors import ConfigError
from rayscale.imaging import U8, decode_rgb
from rayscale.report import (
    Curves,
    Facts,
    Pictures,
    Section,
    Table,
    _ticks,
    page,
    plot,
    side_by_side,
    sorted_curve,
    worst,
)

PHOTO: U8 = np.ascontiguousarray(skimage.data.chelsea()[:40, :50])
HOSTILE = "<script>alert('x')</script>\"&"


class Parsed(HTMLParser):
    """Checks that tags nest, and keeps tags, texts and attributes."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def sections(name: str = "bicubic") -> list[Section]:
    return [
        Facts(title=f"What {name}", values={name: name, "images": 3, "seconds": 1.23456}),
        Table(title=name, columns=["method", name], rows=[[name, 1.0], ["other", 2.0]], note=name),
        Curves(title=name, x_label=name, y_label=name, series={name: [(0, 1), (1, 3)]}, note=name),
        Pictures(title=name, pictures=[(name, PHOTO)], note=name),
        Table(title="all", columns=["picture"], rows=[[name]], folded=True),
    ]


def test_a_page_stands_alone() -> None:
    text = page("Report", sections(), "made by a test")
    parsed = Parsed(text)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    sources = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    np.testing.assert_array_equal(decode_rgb(base64.b64decode(sources[0].partition(",")[2])), PHOTO)
    assert "http" not in text
    assert "url(" not in text
    assert ("name", "viewport") in parsed.attributes
    assert {"Report", "bicubic", "1.235", "3", "2.000", "made by a test"} <= set(parsed.texts)
    assert text == page("Report", sections(), "made by a test")


def test_nothing_given_breaks_out() -> None:
    text = page(HOSTILE, sections(HOSTILE), HOSTILE)
    parsed = Parsed(text)
    assert "script" not in parsed.tags
    assert parsed.texts.count(HOSTILE) >= 10
    plain = Parsed(page("x", sections("x"), "x"))
    assert (plain.tags, len(plain.attributes)) == (parsed.tags, len(parsed.attributes))


def test_the_best_of_a_column_is_bold_and_nan_is_told() -> None:
    rows = [["a", 1.0, 1.0, 5], ["b", math.nan, 2.0, 5], ["c", 3.0, math.inf, 5]]
    table = Table(title="t", columns=["m", "up", "down", "n"], rows=rows, digits=[0, 1, 2, 0],
                  better=["", "higher", "lower", ""])  # fmt: skip
    text = page("r", [table])
    assert re.findall("<b>(.*?)</b>", text) == ["1.00", "3.0"]
    assert ">NaN<" in text
    assert ">∞<" in text
    one = Table(title="t", columns=["m", "up"], rows=[["a", 1.0]], better=["", "higher"])
    assert "<b>" not in page("r", [one])  # best of one is no news
    with pytest.raises(ConfigError, match=r"table t=3 cells: must have 4 cells: m, up, down, n"):
        Table(title="t", columns=["m", "up", "down", "n"], rows=[["a", 1.0, 2.0]])


def drawing(curves: Curves) -> ElementTree.Element:
    return ElementTree.fromstring(plot(curves).partition("<ul")[0])


def test_a_plot_puts_points_where_they_belong() -> None:
    svg = drawing(Curves(title="t", x_label="x", y_label="y", series={"a": [(0, 0), (50, 5), (100, 10)]}))
    points = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert points[1] == pytest.approx(np.mean([points[0], points[2]], axis=0))
    assert points[0][0] < points[2][0]
    assert points[0][1] > points[2][1]  # up is more
    # the labels of the axes stand at the very places of those values
    labels = {t.text: t.attrib for t in svg.iter("text") if t.attrib.get("text-anchor") == "middle"}
    assert float(labels["100"]["x"]) == points[2][0]
    heights = {t.text: t.attrib for t in svg.iter("text") if "dy" in t.attrib}
    assert float(heights["10"]["y"]) == points[2][1]


def test_what_is_not_finite_leaves_a_gap() -> None:
    nan = math.nan
    svg = drawing(Curves(title="t", x_label="x", y_label="y", series={"a": [(0, 1), (1, 2), (2, nan), (3, 3), (4, 4)]}))
    (line,) = [p for p in svg.iter("path") if "stroke" in p.attrib]
    assert re.sub(r"[-0-9. ]", "", line.attrib["d"]) == "MLML"
    assert len(list(svg.iter("circle"))) == 4
    assert (
        plot(Curves(title="t", x_label="x", y_label="y", series={"a": [(0, nan)], "b": []}))
        == "<p>No finite values.</p>"
    )


def test_many_points_are_a_line_and_every_line_has_its_legend() -> None:
    series = {f"run {i}": [(float(x), float(x * i)) for x in range(200)] for i in range(8)}
    curves = Curves(title="t", x_label="x", y_label="y", series=series)
    assert not list(drawing(curves).iter("circle"))
    styles = {
        (p.attrib["stroke"], p.attrib["stroke-dasharray"]) for p in drawing(curves).iter("path") if "stroke" in p.attrib
    }
    assert len(styles) == 6  # then they come again
    assert all(f" {name}</li>" in plot(curves) for name in series)


@settings(max_examples=200, deadline=None)
@given(a=st.floats(-1e9, 1e9), b=st.floats(-1e9, 1e9))
def test_ticks_are_round_and_hold_the_values(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return  # a span below what a plot shows
    ticks = _ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 3 <= len(ticks) <= 8
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_the_worst_come_first_and_nan_is_worst() -> None:
    values = [30.0, math.nan, 25.0, 25.0, 40.0]
    assert worst(values, 3) == (1, 2, 3)
    assert worst(values, 2, better="lower") == (1, 4)
    assert worst(values, 9) == (1, 2, 3, 0, 4)
    assert worst([], 3) == ()


def test_a_sorted_curve_is_the_distribution() -> None:
    values = [4.0, math.nan, 1.0, 3.0, 2.0]
    assert sorted_curve(values) == ((12.5, 1.0), (37.5, 2.0), (62.5, 3.0), (87.5, 4.0))
    drawn = np.random.default_rng(0).normal(30, 2, 1001)
    x, y = np.array(sorted_curve(list(drawn))).T
    assert np.interp(50, x, y) == pytest.approx(np.median(drawn))


def test_side_by_side_keeps_rows() -> None:
    grid = side_by_side([{"lr": PHOTO, "truth": PHOTO}, {"lr": 255 - PHOTO, "truth": PHOTO}], cell_px=192)
    assert grid.shape[1] < 2 * 192 + 60 < grid.shape[0] + 100
    with pytest.raises(ConfigError, match="rows="):
        side_by_side([{"lr": PHOTO}, {"lr": PHOTO, "truth": PHOTO}])
    with pytest.raises(ConfigError, match="rows="):
        side_by_side([])
