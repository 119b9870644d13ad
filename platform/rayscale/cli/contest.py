"""Contenders on a suite: who is scored, how, and what of it is shown. `rayscale evaluate` records and reports it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from rayscale import classical, evaluate
from rayscale.cli import pages
from rayscale.cli.pages import Seen
from rayscale.cli.scoring import TILE_PX
from rayscale.contract import Kind, Scores
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, DivergedError, MissingError, nearest
from rayscale.evaluate import Model, Pair, Run, Suite, extra, generated
from rayscale.evaluate.pictures import problem_of
from rayscale.evaluate.suite import chosen
from rayscale.features import FeatureNet, open_features, open_maps
from rayscale.imaging import U8
from rayscale.report import Cell, Section, Table, side_by_side, worst

CROP_PX = 128  # of what is shown, high resolution
TUNED_ON = 8  # pictures that the settings of a classical method are chosen on
_SHOWN = 3  # contenders beside the subject: more are too small to see


@dataclass(frozen=True)
class Contender:
    """What is scored: a model, or else the classical method `label`."""

    label: str
    subject: str  # an artifact's digest, or the method's name
    provider: str = ""
    model: Model | None = None
    run_id: str = ""  # MLflow run that a version was trained in
    folder: Path | None = None  # of a model's artifact

    @property
    def kind(self) -> Kind:
        return "transform" if self.model is None else self.model.spec.kind


class Asked(NamedTuple):
    """What else is scored and shown."""

    classical: bool = True
    self_ensemble: bool = False
    measures: tuple[str, ...] = ()
    classifier: FeatureNet | None = None
    show: int = 4


@dataclass(frozen=True)
class Found:
    """What one suite gave: a picture for people, and {label: scores}, the subject's first."""

    suite: Suite
    scores: Mapping[str, Scores]
    picture: U8
    caption: str
    facts: Mapping[str, str] = field(default_factory=dict)  # settings of methods, names of nets, counts
    further: Sequence[Section] = ()


@functools.cache
def method_names() -> tuple[str, ...]:
    """Of all classical methods, whatever they are for."""
    problems: tuple[classical.Problem, ...] = get_args(classical.Problem)
    return tuple(sorted({method.name for problem in problems for method in classical.methods(problem)}))


def on_suite(suite: Suite, contenders: Sequence[Contender], asked: Asked) -> Found:
    """All contenders on one suite; the first is the subject.

    Raises: ConfigError where they are of several kinds, or asked for what their kind has not; MissingError.
    """
    subject = contenders[0]
    pictures = subject.kind in ("transform", "burst")
    for one in contenders:
        if one.kind != subject.kind and not (pictures and one.kind in ("transform", "burst")):
            raise ConfigError("--against", one.label, f"is {one.kind}, {subject.label} is {subject.kind}",
                              "compare models of one kind")  # fmt: skip
    for option, given, fits in (
        ("--self-ensemble", asked.self_ensemble, pictures),
        ("--also", asked.measures, pictures),
        ("--classifier", asked.classifier, subject.kind == "generate"),
    ):
        if given and not fits:
            raise ConfigError(option, subject.label, f"has no meaning for a model of kind {subject.kind}", "omit it")
    return _pictures(suite, contenders, asked) if pictures else _others(suite, contenders, asked)


def _others(suite: Suite, contenders: Sequence[Contender], asked: Asked) -> Found:
    """Generators or embeddings."""
    subject = contenders[0]
    models = {one.label: one.model for one in contenders if one.model is not None}
    scores = {
        one.label: evaluate.score_model(models[one.label], suite, one.subject, one.provider) for one in contenders
    }
    if asked.classical:
        best = evaluate.score_baseline(models[subject.label].spec, suite)
        scores[best.subject] = best
    facts, further = {}, []
    if subject.kind == "generate":
        photos = len(chosen(open_split(suite.photos_uri, suite.split), suite))
        samples = suite.num_samples or max(generated.LEAST_SAMPLES, photos)
        facts = {"features": open_features(suite.features).name, "samples": f"{samples}, beside {photos} photos"}
    if asked.classifier is not None:
        name, found = extra.class_scores(models[subject.label], suite, asked.classifier)
        rows: list[list[Cell]] = [[label, spread.mean, spread.std] for label, spread in found.items()]
        note = f"Inception-style score over {name}: sure of each picture and varied over all is high."
        further.append(Table(title="Class score", columns=["", "mean", "deviation"], rows=rows, note=note))
    picture = evaluate.show({subject.label: models[subject.label]}, suite, asked.show)
    return Found(suite, scores, picture, f"of {subject.label}", facts, further)


def _pictures(suite: Suite, contenders: Sequence[Contender], asked: Asked) -> Found:
    subject = contenders[0].label
    known = {one.label: one for one in contenders}
    if asked.classical:
        known |= {name: Contender(name, name) for name in evaluate.baselines(suite) if name not in known}
    settings: dict[str, str] = {}
    runs: dict[str, Run] = {}
    for label, one in known.items():
        runs[label], settings[label] = _run_of(one, suite)
    if asked.self_ensemble:
        known[f"{subject}+8"] = replace(known[subject], label=f"{subject}+8")
        runs[f"{subject}+8"] = evaluate.self_ensemble(runs[subject])
    extra.measures(asked.measures, suite)  # a wrong name is told before the work
    scores = {}
    for label, one in known.items():
        scores[label] = evaluate.score(runs[label], suite, one.subject, one.provider)
        if asked.measures:
            scores[label] = extra.with_measures(scores[label], runs[label], suite, asked.measures)
    others = sorted((label for label in known if label != subject), key=lambda n: -_lead(scores[n]))[:_SHOWN]
    rows = _worst(suite, {label: runs[label] for label in (*others, subject)}, scores[subject], asked.show)
    grid = side_by_side(pages.side_by_side_rows(rows, subject, suite.scale, CROP_PX))
    caption = f"the worst of {subject}, each where it is furthest from the truth"
    facts = {label: s for label, s in settings.items() if s}
    if "neg_perceptual" in asked.measures:
        facts["features"] = open_maps(suite.features).name
    return Found(suite, scores, grid, caption, facts)


def _run_of(one: Contender, suite: Suite) -> tuple[Run, str]:
    """Its function on this suite and the settings it was given.

    Raises: ConfigError for a model of another scale; MissingError for a method that is none.
    """
    if one.model is None:
        return _classical_run(one.label, suite)
    spec = one.model.spec
    if spec.scale != suite.scale:
        rule = f"only an x{suite.scale} model can be scored on this suite"
        raise ConfigError(one.label, f"{spec.kind} x{spec.scale}", rule, "give it a suite of its own")
    return evaluate.picture_run(one.model, None if spec.halo_px is None else TILE_PX), ""


def _classical_run(name: str, suite: Suite) -> tuple[Run, str]:
    """With the settings that do best on some of these very pictures: what is beaten was not held back."""
    if name == "bicubic" and suite.scale > 1 and (usual := evaluate.baselines(suite).get(name)):
        return usual, ""  # MATLAB's
    methods = {m.name: m for m in classical.methods(problem_of(suite.degradation), suite.scale)}
    if name not in methods:
        rule = "is no artifact's folder, no NAME:VERSION or NAME@ALIAS, no classical method for this suite"
        raise MissingError("model", name, rule, nearest(name, methods))
    runs = methods[name].runs()
    if len(runs) == 1:
        return next(iter(runs.values())), ""
    few = replace(suite, max_images=min(suite.max_images or TUNED_ON, TUNED_ON))
    found = {label: _lead(evaluate.score(run, few, label)) for label, run in runs.items()}
    best = max(found, key=found.__getitem__)
    return runs[best], best


def _worst(suite: Suite, runs: Mapping[str, Run], scores: Scores, count: int) -> list[Seen]:
    wanted = [scores.keys[i] for i in worst(next(iter(scores.metrics.values())), count)]
    seen = {
        pair.key: Seen(pair, {label: _or_black(run, pair) for label, run in runs.items()})
        for pair in evaluate.pairs(suite, wanted)
    }
    return [seen[key] for key in wanted]


def _or_black(run: Run, pair: Pair) -> U8:
    try:
        return run(*pair.inputs)
    except DivergedError:  # scored NaN
        return np.zeros_like(pair.hr)


def _lead(scores: Scores) -> float:
    """The mean of the metric that decides; what is not a number loses."""
    mean = scores.mean(next(iter(scores.metrics)))
    return mean if mean == mean else float("-inf")
