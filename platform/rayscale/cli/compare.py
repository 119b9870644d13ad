"""`rayscale models compare`: two models side by side, on the terminal and as the report of `rayscale evaluate`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rayscale import contract
from rayscale import evaluate as evaluation
from rayscale.artifact import CARD, MODEL
from rayscale.cli import pages
from rayscale.cli.contest import Asked, Contender, Found, on_suite
from rayscale.cli.disk import check_disks
from rayscale.cli.evaluate import Out, Photos, Show, SuiteFiles, Where, open_one, report, suites_for, told_apart
from rayscale.cli.scoring import device_of
from rayscale.contract import Cost, ModelCard
from rayscale.errors import ConfigError
from rayscale.evaluate import extra
from rayscale.registry import cost
from rayscale.registry.gate import lower_bound, time_ratio
from rayscale.registry.models import Registry
from rayscale.report import Cell, Table
from rayscale.storage import home
from rayscale.tracking import default_uri, flatten

CONFIDENCE = 0.95  # two-sided
_RESAMPLES = 2000


def compare(
    a: Annotated[str, typer.Argument(help="NAME:VERSION, NAME@ALIAS, or the folder of an artifact")],
    b: Annotated[str, typer.Argument(help="Likewise; differences are B - A, B is judged")],
    suite: SuiteFiles = None,
    photos: Photos = "",
    out: Out = "",
    device: Where = "cpu",
    show: Show = 4,
) -> dict[str, Any]:
    """Compare two models: scores picture by picture with an interval, time, memory, size, and their cards.

    The tables are printed, and stand at the head of an HTML report with curves and pictures side by side: an MLflow
    run of the experiment `evaluations`. Nothing is moved.
    """
    where = device_of(device)
    check_disks(default_uri(), home())
    registry = Registry()
    suites = suites_for(registry, b, suite or [], photos)
    ours, theirs = told_apart([open_one(registry, reference, where) for reference in (b, a)])
    for reference, one in ((a, theirs), (b, ours)):
        if one.folder is None:
            raise ConfigError("model", reference, "is a classical method", "compare those with `rayscale evaluate`")
    if ours.subject == theirs.subject:
        raise ConfigError("models", f"{a} and {b}", "are the same artifact", "name another one")
    found = {name: on_suite(one, [ours, theirs], Asked(show=show)) for name, one in suites.items()}
    measured = cost.measure({one.label: one.folder for one in (theirs, ours) if one.folder}, where)
    tables = [_scores(name, one, theirs.label, ours.label) for name, one in found.items()]
    tables += [_costs(theirs, ours, measured), _cards(theirs, ours)]
    for table in tables:
        print(pages.text(table))
    differences = {
        name: {row[0]: {"difference": row[3], "low": row[4], "high": row[5]} for row in table.rows}
        for name, table in zip(found, tables, strict=False)
    }
    made = report(registry, [ours, theirs], found, out, first=tables)
    ratio = time_ratio(measured[ours.label], measured[theirs.label])
    return {"a": theirs.label, "b": ours.label, "differences": differences, "time_ratio": ratio,
            "run_id": made["run_id"], "report": made["report"]}  # fmt: skip


def _scores(name: str, found: Found, a: str, b: str) -> Table:
    known = {**evaluation.METRICS, **extra.TITLES}
    ours, theirs = found.scores[b], found.scores[a]
    rows = [[metric, *_row(theirs.metrics[metric], ours.metrics[metric])] for metric in known if metric in ours.metrics]
    return Table(
        title=f"{b} against {a} on suite {name}, {len(ours.keys)} rows",
        columns=["", a, b, "difference", "low", "high", "better (%)"],
        rows=rows,
        digits=[0, 4, 4, 4, 4, 4, 0],
        note=f"Higher is better. Low, high: {100 * CONFIDENCE:.0f} % interval of the mean difference, by bootstrap.",
    )


def _row(theirs: Sequence[float], ours: Sequence[float]) -> list[Cell]:
    """Both means, the mean difference with its interval, and the share of rows that B is better on."""
    gains = [b - a for a, b in zip(theirs, ours, strict=True)]
    better = 100.0 * sum(gain > 0 for gain in gains) / len(gains)
    means = [statistics.fmean(values) for values in (theirs, ours)]
    if not all(map(math.isfinite, gains)):  # inf of one and -inf of another have no mean
        return [*means, math.nan, math.nan, math.nan, better]
    bounds = {"confidence": (1 + CONFIDENCE) / 2, "resamples": _RESAMPLES, "seed": 0}
    low = lower_bound(gains, **bounds)  # type: ignore[arg-type]
    high = -lower_bound([-gain for gain in gains], **bounds)  # type: ignore[arg-type]
    return [*means, statistics.fmean(gains), low, high, better]


def _costs(a: Contender, b: Contender, measured: dict[str, Cost]) -> Table:
    rows: list[list[Cell]] = []
    for label, folder in ((one.label, one.folder) for one in (a, b)):
        assert folder is not None
        one = measured[label]
        memory = math.nan if one.memory_mib is None else one.memory_mib
        rows.append([label, statistics.median(one.ms_per_megapixel), memory, _size_mib(folder / MODEL)])
    return Table(
        title="Cost",
        columns=["", "ms a megapixel", "memory of a session (MiB)", f"{MODEL} (MiB)"],
        rows=rows,
        digits=[0, 1, 2, 3],
        better=["", "lower", "lower", "lower"],
        note=f"Measured side by side on {measured[a.label].hardware}.",
    )


def _cards(a: Contender, b: Contender) -> Table:
    """What the cards say unlike."""
    cards = []
    for folder in (a.folder, b.folder):
        assert folder is not None
        cards.append(flatten(contract.loads(ModelCard, (folder / CARD).read_bytes(), CARD)))
    old, new = cards
    rows = [[key, old.get(key, "-"), new.get(key, "-")] for key in {**old, **new} if old.get(key) != new.get(key)]
    return Table(title="Cards differ in", columns=["", a.label, b.label], rows=rows or [["nothing", "", ""]])


def _size_mib(path: Path) -> float:
    return path.stat().st_size / 2**20
