"""May this candidate become champion? A pure function of scores, costs, a card and a gate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayscale.contract import SCHEMA, Cost, Kind, ModelCard, Scores, digest
from rayscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a version must show before an alias moves to it, on each suite. Scores are higher-is-better.

    A limit of None is none. Costs are compared with the champion's: the first one has none to be compared with.
    """

    metric: str = "psnr_y"  # decides; the bounds in dB are in its unit
    min_gain_db_over_baseline: float = 0.2  # mean over the images, against the classical baseline
    margin_vs_champion: float = 0.05  # dB of the mean that may be lost to the champion, at `confidence`
    max_image_loss_db: float = 0.5  # that any single image may lose, against baseline and champion each
    worst_k: int = 10  # so many images that lose most, of a suite of more ...
    max_worst_k_loss_db: float | None = None  # ... may lose this on average; None: half of max_image_loss_db
    also: tuple[str, ...] = ("ssim_y",)  # metrics whose mean may not fall either ...
    also_margin: float = 0.002  # ... by more than this, against baseline and champion each
    suites: tuple[str, ...] = ()  # names of those that must be among the scored
    max_latency_ratio: float | None = 2.0  # time a megapixel, times the champion's
    max_memory_ratio: float | None = 3.0  # of a session, times the champion's (arenas double); measured on Linux CPUs
    max_ms_per_megapixel: float | None = None
    max_memory_mib: float | None = None
    hardware: str = ""  # part of the name of what costs must be measured on, e.g. "EPYC"; "": on anything
    max_parity_abs: float = 1e-4  # |ONNX Runtime - torch|, as the card states it
    min_images: int = 1  # held-out images; with very few, a bootstrap interval says little
    confidence: float = 0.95  # one-sided
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {  # a negative gain over the baseline is a choice
            "confidence": (0.5 < self.confidence < 1.0, "must lie in (0.5, 1)"),
            "min_gain_db_over_baseline": (math.isfinite(self.min_gain_db_over_baseline), "must be finite"),
        }
        for name in ("min_images", "resamples", "worst_k"):
            limits[name] = (getattr(self, name) >= 1, "must be at least 1")
        for name in ("margin_vs_champion", "max_image_loss_db", "also_margin", "max_parity_abs", "max_worst_k_loss_db"):
            limits[name] = (0.0 <= (getattr(self, name) or 0.0) < math.inf, "must be finite and not negative")
        for name in ("max_latency_ratio", "max_memory_ratio", "max_ms_per_megapixel", "max_memory_mib"):
            value = getattr(self, name)
            limits[name] = (value is None or 0.0 < value < math.inf, "must be finite and above 0, or null")
        for name, (good, rule) in limits.items():
            if not good:
                default = getattr(Gate, name)
                raise ConfigError(f"gate.{name}", getattr(self, name), rule, f"the default is {default}")


def default_for(kind: Kind) -> Gate:
    """The gate of a model that brings none: in the unit of what its kind is scored by."""
    if kind == "generate":  # 1000 KID; its rows are subsets of the samples, no pictures of their own
        return Gate(metric="neg_kid", min_gain_db_over_baseline=0.0, margin_vs_champion=1.0, max_image_loss_db=1e3,
                    also=())  # fmt: skip
    if kind == "embed":  # found or not: any single photo may be lost, not the mean
        return Gate(metric="same_photo_at_1", min_gain_db_over_baseline=0.0, margin_vs_champion=0.01,
                    max_image_loss_db=1.0, max_worst_k_loss_db=1.0, also=())  # fmt: skip
    return Gate()


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The scores of one suite."""

    candidate: Scores
    baseline: Scores
    champion: Scores | None = None  # None: the candidate is the first


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rule and the figure it was held against."""

    rule: str
    value: float | str
    bound: str
    passed: bool
    suite: str = ""  # "": of no suite


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was compared, and every rule's figure (rules on scores that cannot be compared have none)."""

    candidate: str  # subjects of the scores: digests of artifacts, name of the baseline
    champion: str  # "" where there is none yet
    baseline: str  # of several suites, one each, in their order; so are the suites
    suite: str
    rows: tuple[Row, ...]
    hardware: str = ""  # that costs were measured on
    gate: str = ""  # its digest
    forced: str = ""  # why the alias moved all the same
    schema: int = SCHEMA


@dataclass(frozen=True)
class Promote:
    """Every rule passed."""

    report: Report


@dataclass(frozen=True)
class Hold:
    """At least one rule failed: one reason for each, in the order of the report."""

    reasons: tuple[str, ...]
    report: Report


@dataclass(frozen=True)
class Forced:
    """At least one rule failed, and somebody answers for moving the alias all the same."""

    reasons: tuple[str, ...]
    report: Report


def decide(
    contests: Mapping[str, Contest], gate: Gate, card: ModelCard, cost: Mapping[str, Cost] | None = None
) -> Promote | Hold:
    """Hold the candidate against the classical baseline, the champion (None: the first one) and its own card.

    contests: by the names of their suites; every rule on scores holds on each. cost: of "candidate" and "champion".
    What was not measured and is bounded fails. A candidate that is the champion already is held: it would pass
    trivially.
    """
    rows = list(_subjects(contests, gate))
    for name, contest in contests.items():
        rows += [replace(row, suite=name) for row in _on_suite(contest, gate)]
    first = next(iter(contests.values()), None)
    champion = first.champion.subject if first and first.champion else ""
    rows += _costs(cost or {}, {"candidate": first.candidate.subject if first else "", "champion": champion}, gate)
    rows += _card(card, gate)
    report = Report(
        candidate=first.candidate.subject if first else "",
        champion=champion,
        baseline=", ".join(contest.baseline.subject for contest in contests.values()),
        suite=", ".join(contest.candidate.suite for contest in contests.values()),
        rows=tuple(rows),
        hardware=cost["candidate"].hardware if cost and "candidate" in cost else "",
        gate=digest(gate),
    )
    reasons = tuple(_reason(row, len(contests) > 1) for row in rows if not row.passed)
    return Hold(reasons, report) if reasons else Promote(report)


def refuse(candidate: str, fault: str) -> Hold:
    """A candidate whose artifact cannot be trusted: nothing else is asked, and nobody can force it."""
    row = Row(rule="digest and golden probe", value=fault, bound="verified", passed=False)
    return Hold((_reason(row, False),), Report(candidate=candidate, champion="", baseline="", suite="", rows=(row,)))


def overrule(held: Hold, reason: str) -> Forced:
    """Move all the same, on record."""
    return Forced(held.reasons, replace(held.report, forced=" ".join(reason.split())))


def _subjects(contests: Mapping[str, Contest], gate: Gate) -> Iterator[Row]:
    """Is the right thing scored, on all that is asked for?"""
    for name in gate.suites or (() if contests else ("any",)):
        found = "scored" if name in contests else "missing"
        yield Row(rule=f"suite {name}", value=found, bound="scored", passed=name in contests)
    rivals = {(c.candidate.subject, c.champion.subject if c.champion else "") for c in contests.values()}
    if len(rivals) > 1:
        yield Row(rule="models", value="not the same on all suites", bound="same", passed=False)
    for candidate, champion in list(rivals)[:1]:
        if champion:
            found = "already champion" if champion == candidate else "new"
            yield Row(rule="digest", value=found, bound="new", passed=found == "new")


def _on_suite(contest: Contest, gate: Gate) -> Iterator[Row]:
    rivals = {"baseline": contest.baseline}
    if contest.champion is not None:
        rivals["champion"] = contest.champion
    rows = list(_comparable(contest.candidate, rivals, gate))
    yield from rows
    if all(row.passed for row in rows):
        for name, rival in rivals.items():
            yield from _against(contest.candidate, name, rival, gate)


def _comparable(candidate: Scores, rivals: Mapping[str, Scores], gate: Gate) -> Iterator[Row]:
    """Are these figures of the same pictures, complete and finite? Only then the means say anything."""
    yield _at_least("held-out images", len(candidate.keys), gate.min_images)
    for name, rival in rivals.items():
        found = "same"
        if rival.suite != candidate.suite:
            found = "another suite"
        elif rival.keys != candidate.keys:
            found = "other images"
        yield Row(rule=f"suite of {name}", value=found, bound="same", passed=found == "same")
    for metric in (gate.metric, *gate.also):
        for name, scores in {"candidate": candidate, **rivals}.items():
            found = _fault(scores, metric) or "complete"
            yield Row(rule=f"{metric} of {name}", value=found, bound="complete", passed=found == "complete")


def _fault(scores: Scores, metric: str) -> str:
    values = scores.metrics.get(metric)
    if values is None:
        return "missing"
    if len(values) != len(scores.keys):
        return f"{len(values)} values for {len(scores.keys)} images"
    pairs = zip(scores.keys, values, strict=True)
    bad = [f"{key} is {value}" for key, value in pairs if not math.isfinite(value)]
    return ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")


def _against(candidate: Scores, name: str, rival: Scores, gate: Gate) -> Iterator[Row]:
    gains = _gains(candidate, rival, gate.metric)
    mean = _mean(gains)
    rule = f"{gate.metric} gain over {name}"
    # Non-inferiority: the interval decides. That the baseline is beaten, the mean must show besides.
    over_baseline = name == "baseline"
    bound = min(gate.min_gain_db_over_baseline, -gate.margin_vs_champion) if over_baseline else -gate.margin_vs_champion
    yield _at_least(f"{rule}, mean", mean, gate.min_gain_db_over_baseline if over_baseline else -math.inf)
    low = lower_bound(gains, confidence=gate.confidence, resamples=gate.resamples, seed=gate.seed)
    yield _at_least(f"{rule}, lower {gate.confidence:.0%} bound", low, bound)
    worst = sorted(range(len(gains)), key=gains.__getitem__)
    yield _at_least(f"{rule}, worst image ({candidate.keys[worst[0]]})", gains[worst[0]], -gate.max_image_loss_db)
    if len(gains) > gate.worst_k:
        loss = gate.max_image_loss_db / 2 if gate.max_worst_k_loss_db is None else gate.max_worst_k_loss_db
        few = _mean([gains[i] for i in worst[: gate.worst_k]])
        yield _at_least(f"{rule}, mean of the worst {gate.worst_k}", few, -loss)
    for metric in gate.also:
        value = _mean(_gains(candidate, rival, metric))
        yield _at_least(f"{metric} gain over {name}, mean", value, -gate.also_margin)


def _costs(cost: Mapping[str, Cost], subjects: Mapping[str, str], gate: Gate) -> Iterator[Row]:
    """Only figures of these very models, and of one kind of hardware, are compared."""
    known = {name: cost[name] for name, subject in subjects.items() if name in cost and cost[name].subject == subject}
    candidate, champion = known.get("candidate"), known.get("champion")
    if gate.hardware:
        found = candidate.hardware if candidate else "missing"
        good = candidate is not None and gate.hardware in found
        yield Row(rule="hardware", value=found, bound=f"named *{gate.hardware}*", passed=good)
    if candidate and champion and champion.hardware != candidate.hardware:
        yield Row(rule="hardware of champion", value=champion.hardware, bound=candidate.hardware, passed=False)
    time_ms, memory = "ms a megapixel", "memory of a session, MiB"
    yield _at_most(time_ms, None if candidate is None else _median(candidate.ms_per_megapixel),
                   gate.max_ms_per_megapixel)  # fmt: skip
    yield _at_most(memory, None if candidate is None else candidate.memory_mib, gate.max_memory_mib)
    if subjects["champion"]:
        slower = larger = None
        if candidate is not None and champion is not None:
            slower, larger = time_ratio(candidate, champion), _ratio(candidate.memory_mib, champion.memory_mib)
        yield _at_most(f"{time_ms}, times the champion's", slower, gate.max_latency_ratio)
        if candidate and champion and candidate.memory_mib is champion.memory_mib is None:  # a GPU's, or not glibc's
            yield Row(rule=f"{memory}, times the champion's", value="not measurable here", bound="(for information)",
                      passed=True)  # fmt: skip
        else:
            yield _at_most(f"{memory}, times the champion's", larger, gate.max_memory_ratio)


def time_ratio(candidate: Cost, champion: Cost) -> float | None:
    """The median over rounds: both ran in each of them, so that what slowed one slowed the other. None: not known."""
    if len(candidate.ms_per_megapixel) != len(champion.ms_per_megapixel):
        return None
    pairs = zip(candidate.ms_per_megapixel, champion.ms_per_megapixel, strict=True)
    return _median([_ratio(*pair) for pair in pairs])


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or by is None or not by > 0.0 else value / by


def _median(values: Sequence[float | None]) -> float | None:
    """None where a value is no number: a median of others would hide it."""
    known = [value for value in values if value is not None and 0.0 <= value < math.inf]
    return statistics.median(known) if known and len(known) == len(values) else None


def _card(card: ModelCard, gate: Gate) -> Iterator[Row]:
    yield _at_most("parity, max |ONNX Runtime - torch|", card.parity_max_abs, gate.max_parity_abs)
    licence = card.licence.strip()
    yield Row(rule="licence", value=licence or "missing", bound="stated", passed=bool(licence))
    stated = {"family": card.family, "lineage.recipe": card.lineage.recipe, "lineage.code_version":
              card.lineage.code_version}  # fmt: skip
    missing = [name for name, value in stated.items() if not value.strip()]
    found = f"without {', '.join(missing)}" if missing else "complete"
    yield Row(rule="card", value=found, bound="complete", passed=not missing)


def _gains(candidate: Scores, rival: Scores, metric: str) -> list[float]:
    return [a - b for a, b in zip(candidate.metrics[metric], rival.metrics[metric], strict=True)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)  # exact sum: the order of the images cannot matter


def _at_least(rule: str, value: float, bound: float) -> Row:
    shown = f">= {bound:g}" if math.isfinite(bound) else "(for information)"
    return Row(rule=rule, value=value, bound=shown, passed=value >= bound)


def _at_most(rule: str, value: float | None, bound: float | None) -> Row:
    """What is missing, or no number, fails where it is bounded."""
    shown = "(for information)" if bound is None else f"<= {bound:g}"
    if value is None or not math.isfinite(value):
        return Row(rule=rule, value="missing" if value is None else str(value), bound=shown, passed=bound is None)
    return Row(rule=rule, value=value, bound=shown, passed=bound is None or value <= bound)


def lower_bound(gains: list[float], *, confidence: float, resamples: int, seed: int) -> float:
    """One-sided lower confidence bound of the mean of paired differences: percentile bootstrap over images.

    Sorted first, so that the order of the images cannot matter and no gain that grows lowers the bound.
    One image gives its own gain.
    """
    ordered = np.sort(np.asarray(gains, dtype=np.float64))
    rng = np.random.default_rng(seed)
    means = np.array([ordered[rng.integers(0, len(ordered), len(ordered))].mean() for _ in range(resamples)])
    return float(np.quantile(means, 1.0 - confidence))


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _reason(row: Row, several: bool) -> str:
    where = f"{row.suite}: " if several and row.suite else ""
    return f"{where}{row.rule}: {_shown(row.value)}, must be {row.bound}"


def markdown(report: Report) -> str:
    """The report as a table for people."""
    forced = f"**forced**: {report.forced}\n\n" if report.forced else ""
    lines = [
        f"{forced}candidate `{report.candidate}`  ",
        f"champion `{report.champion or '(none)'}`  ",
        f"baseline `{report.baseline}`, suite `{report.suite}`  ",
        f"hardware `{report.hardware or '(costs were not measured)'}`",
        "",
        "| suite | rule | value | bound | passed |",
        "|---|---|---|---|---|",
    ]
    for row in report.rows:
        cells = [cell.replace("|", "\\|") for cell in (row.suite, row.rule, _shown(row.value), row.bound)]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.passed else '**NO**'} |")
    return "\n".join(lines) + "\n"
