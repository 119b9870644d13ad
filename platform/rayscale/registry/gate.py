"""May this candidate become champion? A pure function of scores, a card and a gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rayscale.contract import SCHEMA, ModelCard, Scores
from rayscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a version must show before an alias moves to it. Scores are higher-is-better."""

    metric: str = "psnr_y"  # decides; the bounds in dB are in its unit
    min_gain_db_over_baseline: float = 0.2  # mean over the images, against the classical baseline
    margin_vs_champion: float = 0.05  # dB of the mean that may be lost to the champion, at `confidence`
    max_image_loss_db: float = 0.5  # that any single image may lose, against baseline and champion each
    also: tuple[str, ...] = ("ssim_y",)  # metrics whose mean may not fall either ...
    also_margin: float = 0.002  # ... by more than this, against baseline and champion each
    max_parity_abs: float = 1e-4  # |ONNX Runtime - torch|, as the card states it
    min_images: int = 1  # held-out images; with very few, a bootstrap interval says little
    confidence: float = 0.95  # one-sided
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {  # a negative gain over the baseline is a choice
            "confidence": (0.5 < self.confidence < 1.0, "must lie in (0.5, 1)"),
            "min_images": (self.min_images >= 1, "must be at least 1"),
            "resamples": (self.resamples >= 1, "must be at least 1"),
            "min_gain_db_over_baseline": (math.isfinite(self.min_gain_db_over_baseline), "must be finite"),
        }
        for name in ("margin_vs_champion", "max_image_loss_db", "also_margin", "max_parity_abs"):
            limits[name] = (0.0 <= getattr(self, name) < math.inf, "must be finite and not negative")
        for name, (good, rule) in limits.items():
            if not good:
                default = getattr(Gate, name)
                raise ConfigError(f"gate.{name}", getattr(self, name), rule, f"the default is {default}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rule and the figure it was held against."""

    rule: str
    value: float | str
    bound: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was compared, and every rule's figure (rules on scores that cannot be compared have none)."""

    candidate: str  # subjects of the scores: digests of artifacts, name of the baseline
    champion: str  # "" where there is none yet
    baseline: str
    suite: str
    rows: tuple[Row, ...]
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


def decide(candidate: Scores, champion: Scores | None, baseline: Scores, gate: Gate, card: ModelCard) -> Promote | Hold:
    """Hold the candidate against the classical baseline, the champion (None: the first one) and its own card.

    A candidate that is the champion already is held: it would pass trivially.
    """
    rivals = {"baseline": baseline} if champion is None else {"baseline": baseline, "champion": champion}
    rows = list(_comparable(candidate, rivals, gate))
    if all(row.passed for row in rows):
        for name, rival in rivals.items():
            rows += _against(candidate, name, rival, gate)
    rows += _card(card, gate)
    report = Report(
        candidate=candidate.subject,
        champion="" if champion is None else champion.subject,
        baseline=baseline.subject,
        suite=candidate.suite,
        rows=tuple(rows),
    )
    reasons = tuple(f"{row.rule}: {_shown(row.value)}, must be {row.bound}" for row in rows if not row.passed)
    return Hold(reasons, report) if reasons else Promote(report)


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
    if "champion" in rivals:
        found = "already champion" if rivals["champion"].subject == candidate.subject else "new"
        yield Row(rule="digest", value=found, bound="new", passed=found == "new")
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
    if name == "baseline":
        yield _at_least(f"{rule}, mean", mean, gate.min_gain_db_over_baseline)
    else:
        # Non-inferiority: the interval decides, the mean is there to be read.
        yield _at_least(f"{rule}, mean", mean, -math.inf)
        low = lower_bound(gains, confidence=gate.confidence, resamples=gate.resamples, seed=gate.seed)
        yield _at_least(f"{rule}, lower {gate.confidence:.0%} bound", low, -gate.margin_vs_champion)
    worst = min(range(len(gains)), key=gains.__getitem__)
    yield _at_least(f"{rule}, worst image ({candidate.keys[worst]})", gains[worst], -gate.max_image_loss_db)
    for metric in gate.also:
        value = _mean(_gains(candidate, rival, metric))
        yield _at_least(f"{metric} gain over {name}, mean", value, -gate.also_margin)


def _card(card: ModelCard, gate: Gate) -> Iterator[Row]:
    rule, parity, bound = "parity, max |ONNX Runtime - torch|", card.parity_max_abs, f"<= {gate.max_parity_abs:g}"
    if parity is None or not math.isfinite(parity):
        yield Row(rule=rule, value="missing" if parity is None else str(parity), bound=bound, passed=False)
    else:
        yield Row(rule=rule, value=parity, bound=bound, passed=parity <= gate.max_parity_abs)
    licence = card.licence.strip()
    yield Row(rule="licence", value=licence or "missing", bound="stated", passed=bool(licence))


def _gains(candidate: Scores, rival: Scores, metric: str) -> list[float]:
    return [a - b for a, b in zip(candidate.metrics[metric], rival.metrics[metric], strict=True)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)  # exact sum: the order of the images cannot matter


def _at_least(rule: str, value: float, bound: float) -> Row:
    shown = f">= {bound:g}" if math.isfinite(bound) else "(for information)"
    return Row(rule=rule, value=value, bound=shown, passed=value >= bound)


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


def markdown(report: Report) -> str:
    """The report as a table for people."""
    lines = [
        f"candidate `{report.candidate}`  ",
        f"champion `{report.champion or '(none)'}`  ",
        f"baseline `{report.baseline}`, suite `{report.suite}`",
        "",
        "| rule | value | bound | passed |",
        "|---|---|---|---|",
    ]
    for row in report.rows:
        rule = row.rule.replace("|", "\\|")
        lines.append(f"| {rule} | {_shown(row.value)} | {row.bound} | {'yes' if row.passed else '**NO**'} |")
    return "\n".join(lines) + "\n"
