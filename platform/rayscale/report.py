"""An evaluation as one page for people: values in, HTML text out.

The page stands alone: pictures and curves lie inside it, it has no scripts and loads nothing, so it can be mailed,
kept with a run and opened in ten years. It reads on a phone, on paper and in the dark. Everything given is escaped.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rayscale.errors import ConfigError
from rayscale.imaging import U8, encode, panel

Cell = str | int | float
Better = Literal["higher", "lower", ""]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names with their values, e.g. what was scored on what."""

    title: str
    values: Mapping[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells, the first of each row its name; floats with `digits` decimals, the best of a column in bold."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: Sequence[int] = ()  # a column each; by default 3
    better: Sequence[Better] = ()  # a column each; by default none is marked
    note: str = ""
    folded: bool = False  # opens at a click: for long ones

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                rule = f"must have {len(self.columns)} cells: {', '.join(self.columns)}"
                raise ConfigError(f"table {self.title}", f"{len(row)} cells", rule, "fill the missing ones")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over a common x, one a name; points that are not finite leave a gap."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures with a caption each, as wide as the page."""

    title: str
    pictures: Sequence[tuple[str, U8]]  # u8[h, w, 3]
    note: str = ""


Section = Facts | Table | Curves | Pictures


def page(title: str, sections: Sequence[Section], footer: str = "") -> str:
    """The whole report as one HTML document. Equal values give equal text."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{_text(title)}</h1>\n{body}\n<footer>{_text(footer)}</footer></main></body></html>\n"
    )


def worst(values: Sequence[float], count: int, *, better: Better = "higher") -> tuple[int, ...]:
    """Indices of the `count` worst values, worst first; what is not a number is worse than any number."""
    sign = -1.0 if better == "lower" else 1.0
    order = sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), sign * values[i], i))
    return tuple(order[:count])


def sorted_curve(values: Sequence[float]) -> tuple[Point, ...]:
    """(share of the pictures in percent, value), ascending: how often a value is at most this. NaN is left out."""
    finite = sorted(v for v in values if math.isfinite(v))
    return tuple((100.0 * (i + 0.5) / len(finite), v) for i, v in enumerate(finite))


def side_by_side(rows: Sequence[Mapping[str, U8]], *, cell_px: int | None = None) -> U8:
    """A labelled grid, a row of pictures a mapping {caption: u8[h, w, 3]}. Raises: ConfigError for rows unlike long."""
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ConfigError("rows", sorted(lengths), "must hold equally many pictures", "leave none out")
    return panel([item for row in rows for item in row.items()], columns=lengths.pop(), cell_px=cell_px)


def plot(curves: Curves) -> str:
    """An SVG element of the curves, with axes; colours hold for the colour-blind, dashes for paper."""
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.series.items()}
    points = [p for line in lines.values() for p in line]
    if not points:
        return "<p>No finite values.</p>"
    xs, ys = (_ticks(min(axis), max(axis)) for axis in zip(*points, strict=True))
    frame = _Frame(xs[0], xs[-1], ys[0], ys[-1])
    grid = "".join(_axes(frame, xs, ys))
    drawn = "".join(_line(frame, i, curves.series[name]) for i, name in enumerate(lines))
    labels = (
        f'<text x="{_LEFT}" y="14">{_text(curves.y_label)}</text>'
        f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 4}" text-anchor="end">{_text(curves.x_label)}</text>'
    )
    legend = "".join(f"<li>{_swatch(i)} {_text(name)}</li>" for i, name in enumerate(lines))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(curves.title)}">'
        f'{grid}{drawn}{labels}</svg><ul class="legend">{legend}</ul>'
    )


def _section(section: Section) -> str:
    match section:
        case Facts():
            rows = "".join(f"<dt>{_text(k)}</dt><dd>{_cell(v, 3)}</dd>" for k, v in section.values.items())
            inner = f"<dl>{rows}</dl>"
        case Table():
            inner = _table(section)
        case Curves():
            inner = f"<figure>{plot(section)}</figure>{_note(section.note)}"
        case Pictures():
            inner = "".join(_figure(caption, picture) for caption, picture in section.pictures) + _note(section.note)
    return f"<section><h2>{_text(section.title)}</h2>{inner}</section>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    best = [_best(table, i) for i in range(len(table.columns))]
    body = "".join(f"<tr>{''.join(_row(table, row, best))}</tr>" for row in table.rows)
    inner = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if table.folded:
        inner = f"<details><summary>{len(table.rows)} rows</summary>{inner}</details>"
    return inner + _note(table.note)


def _row(table: Table, row: Sequence[Cell], best: Sequence[Cell | None]) -> Iterator[str]:
    for i, cell in enumerate(row):
        shown = _cell(cell, table.digits[i] if i < len(table.digits) else 3)
        if i == 0:
            yield f'<th scope="row">{shown}</th>'
        else:
            yield f"<td><b>{shown}</b></td>" if cell == best[i] else f"<td>{shown}</td>"


def _best(table: Table, column: int) -> Cell | None:
    """Only where there is something to choose from: a single row is not the best of anything."""
    better = table.better[column] if column < len(table.better) else ""
    cells = [row[column] for row in table.rows]
    numbers = [c for c in cells if not isinstance(c, str) and not math.isnan(c)]
    if not better or len(cells) < 2 or not numbers:
        return None
    return max(numbers) if better == "higher" else min(numbers)


def _cell(cell: Cell, digits: int) -> str:
    if isinstance(cell, float):
        return "NaN" if math.isnan(cell) else f"{cell:.{digits}f}".replace("inf", "∞")
    return _text(str(cell))


def _figure(caption: str, picture: U8) -> str:
    data = base64.b64encode(encode(picture, "png")).decode()
    height, width = picture.shape[:2]
    image = f'<img alt="{_text(caption)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _note(note: str) -> str:
    return f"<p>{_text(note)}</p>" if note else ""


def _text(text: str) -> str:
    return html.escape(text, quote=True)


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 300, 52, 20, 24, 40  # large type: a phone shows it at two thirds
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe, Ito 2008
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "1 2")
_MARKED = 30  # points; more would be a smear


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> str:
        return f"{_LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT):.1f}"

    def y(self, value: float) -> str:
        room = _HEIGHT - _TOP - _BOTTOM
        return f"{_TOP + room - (value - self.y_low) / (self.y_high - self.y_low) * room:.1f}"


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that hold [low, high]: steps of 1, 2 or 5."""
    if low == high:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(f for f in (1, 2, 5, 10) if f * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _axes(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> Iterator[str]:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in ys:
        y = frame.y(value)
        yield f'<path class="grid" d="M{_LEFT} {y}H{right}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y}" dy="5" text-anchor="end">{_number(value, ys)}</text>'
    for value in xs:
        yield f'<text x="{frame.x(value)}" y="{floor + 18}" text-anchor="middle">{_number(value, xs)}</text>'


def _line(frame: _Frame, index: int, points: Sequence[Point]) -> str:
    colour, dash = _COLOURS[index % len(_COLOURS)], _DASHES[index % len(_DASHES)]
    steps, pen_down = [], False
    for x, y in points:
        finite = math.isfinite(x) and math.isfinite(y)
        if finite:
            steps.append(f"{'L' if pen_down else 'M'}{frame.x(x)} {frame.y(y)}")
        pen_down = finite
    line = f'<path fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" d="{"".join(steps)}"/>'
    if len(steps) <= _MARKED:
        finite_points = [p for p in points if all(map(math.isfinite, p))]
        line += "".join(
            f'<circle r="3" fill="{colour}" cx="{frame.x(x)}" cy="{frame.y(y)}"/>' for x, y in finite_points
        )
    return line


def _swatch(index: int) -> str:
    colour, dash = _COLOURS[index % len(_COLOURS)], _DASHES[index % len(_DASHES)]
    stroke = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"'
    return f'<svg viewBox="0 0 30 8" class="swatch"><path d="M0 4H30" {stroke}/></svg>'


def _number(value: float, ticks: Sequence[float]) -> str:
    """As short as tells the ticks apart."""
    step = ticks[1] - ticks[0]
    if abs(value) < step / 2:
        return "0"
    for limit, unit, letter in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if max(map(abs, ticks)) >= limit and step >= unit / 10:
            return f"{value / unit:.{0 if step >= unit else 1}f}{letter}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


_STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--paper:#fff;--faint:#8884;--soft:#8882}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6eb;--paper:#16181c}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0}
dt{opacity:.75}dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--faint);text-align:left}
thead th{border-bottom-width:2px;vertical-align:bottom}tbody tr:nth-child(even){background:var(--soft)}
tbody th{font-weight:400}td,thead th+th{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:0 0 1rem}img{max-width:100%;height:auto}figcaption,p,footer{font-size:.9rem;opacity:.8}
figure>svg{width:100%;max-width:34rem}svg text{font-size:14px;fill:currentColor}.grid{stroke:var(--faint)}
.legend{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.9rem}
.swatch{width:30px;height:8px}summary{cursor:pointer}footer{margin-top:2rem;overflow-wrap:anywhere}
@media print{:root{--ink:#000;--paper:#fff}main{max-width:none;padding:0}figure,tr{break-inside:avoid}
h2{break-after:avoid}.wide{overflow:visible}details::details-content{content-visibility:visible;block-size:auto}}
"""
