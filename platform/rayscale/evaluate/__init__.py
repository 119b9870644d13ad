"""Quality of whatever a task ships, by kind; alike for a module in training, an artifact, a classical method.

transform, burst -> `pictures`, generate -> `generated`, embed -> `vectors`. Scores are higher-is-better per row and
carry the digest of their suite: those of another suite are never compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rayscale.contract import Kind, Scores, Spec
from rayscale.data.plan import DataSettings
from rayscale.errors import ConfigError
from rayscale.evaluate import generated, pictures, vectors
from rayscale.evaluate.model import Model, Run, picture_run, session_model, session_run, torch_model, torch_run
from rayscale.evaluate.pictures import baseline, baselines, sample_grid, score, self_ensemble
from rayscale.evaluate.suite import Pair, Suite, pairs
from rayscale.imaging import U8

__all__ = [
    "METRICS",
    "Model",
    "Pair",
    "Run",
    "Suite",
    "baseline",
    "baselines",
    "compare",
    "metrics_of",
    "pairs",
    "picture_run",
    "sample_grid",
    "score",
    "score_baseline",
    "score_model",
    "self_ensemble",
    "session_model",
    "session_run",
    "show",
    "suite_for",
    "torch_model",
    "torch_run",
]

METRICS: Mapping[str, str] = {**pictures.METRICS, **generated.METRICS, **vectors.METRICS}  # name -> for people
_BY_KIND: Mapping[Kind, Mapping[str, str]] = {
    "transform": pictures.METRICS,
    "burst": pictures.METRICS,
    "generate": generated.METRICS,
    "embed": vectors.METRICS,
}


def metrics_of(kind: Kind) -> tuple[str, ...]:
    """The metrics of models of this kind, the one that decides first."""
    return tuple(_BY_KIND[kind])


def suite_for(spec: Spec, data: DataSettings, photos_uri: str, split: str, **limits: Any) -> Suite:
    """Held-out pictures for what was trained on `data`: small whole pictures as it saw them, photos otherwise."""
    whole = spec.kind in ("generate", "embed") or any(isinstance(axis, int) for axis in spec.inputs[0].shape[-2:])
    if whole:
        limits = {"max_images": limits.get("max_images", 0), "side_px": data.hr_crop_px} | (
            {"num_samples": limits["num_samples"]} if "num_samples" in limits else {}
        )
    else:
        limits.pop("num_samples", None)
    return Suite(photos_uri, split, data.degradation, fit_px=data.fit_px, **limits)


def score_model(model: Model, suite: Suite, subject: str, provider: str = "", tile_px: int | None = None) -> Scores:
    """Score a shipped function of any kind. tile_px: of one that can be tiled.

    Raises: ConfigError for one that the suite cannot judge.
    """
    spec = model.spec
    if spec.kind in ("transform", "burst"):
        if spec.scale != suite.scale:
            rule = f"only an x{suite.scale} model can be scored on this suite"
            raise ConfigError("model", f"{spec.kind} x{spec.scale}", rule, "give it a suite of its own")
        return score(picture_run(model, None if spec.halo_px is None else tile_px), suite, subject, provider)
    if spec.kind == "generate":
        return generated.score(model, suite, subject, provider)
    return vectors.score(model, suite, subject, provider)


def score_baseline(spec: Spec, suite: Suite, metric: str = "") -> Scores:
    """The best of what a user would otherwise take; its name is the subject.

    metric: a gate's, that decides which is the best; by default, or where they have none such, the kind's first.
    """
    if spec.kind == "generate":
        return generated.score_baseline(suite)
    if spec.kind == "embed":
        found = vectors.score_baselines(suite)
    else:
        found = [score(run, suite, name) for name, run in baselines(suite).items()]
    by = next(name for name in (metric, *metrics_of(spec.kind)) if all(name in one.metrics for one in found))
    means = [one.mean(by) for one in found]
    ranks = [-math.inf if math.isnan(mean) else mean for mean in means]  # in a comparison a NaN would win or hide
    return found[ranks.index(max(ranks))]


def show(models: Mapping[str, Model], suite: Suite, max_images: int = 4, crop_px: int = 128) -> U8:
    """A picture for people: each model beside the classical method (of one model alone, where that is no picture)."""
    spec = next(iter(models.values())).spec
    last = list(models.values())[-1]
    if spec.kind == "generate":
        return generated.sample_grid(last, 8 * max_images)
    if spec.kind == "embed":
        return vectors.neighbours(last, suite, max_images)
    runs = {name: picture_run(model) for name, model in models.items()}
    return sample_grid(suite, runs, max_images, crop_px, rivals=baselines(suite))


def compare(scores: Mapping[str, Scores]) -> str:
    """Means as a markdown table, one row per name; in brackets the gain over the first row.

    Raises: ConfigError where the scores are of different suites or pictures.
    """
    first = next(iter(scores.values()))
    names = [name for name in METRICS if name in first.metrics]
    what = "subsets" if "neg_kid" in first.metrics else "images"
    lines = [f"| {len(first.keys)} {what} | {' | '.join(METRICS[n] for n in names)} |", "|---" * (len(names) + 1) + "|"]
    for name, one in scores.items():
        if (one.suite, one.keys) != (first.suite, first.keys):
            raise ConfigError(f"suite of {name}", one.suite, f"must be {first.suite}", "score both on one suite")
        cells = []
        for metric in names:
            digits = 2 if metric.startswith("psnr") else 4
            gain = "" if one is first else f" ({one.mean(metric) - first.mean(metric):+.{digits}f})"
            cells.append(f"{one.mean(metric):.{digits}f}{gain}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
