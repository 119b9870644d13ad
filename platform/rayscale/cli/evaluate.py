"""`rayscale evaluate`, `jobs/evaluate.py`: what a model or a method is worth on suites of one's own; a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from rayscale import artifact, classical, contract
from rayscale import evaluate as evaluation
from rayscale.artifact import CARD, Device, Session
from rayscale.cli import pages
from rayscale.cli.disk import check_disks
from rayscale.cli.pages import Seen
from rayscale.cli.scoring import TILE_PX, device_of
from rayscale.contract import Kind, Scores, dumps
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, DivergedError, MissingError, nearest
from rayscale.evaluate import Model, Pair, Run, Suite, extra
from rayscale.evaluate.pictures import problem_of
from rayscale.imaging import U8, encode
from rayscale.registry.models import Registry
from rayscale.report import Facts, Pictures, Section, page, side_by_side, worst
from rayscale.storage import home, open_store
from rayscale.tracking import Tracker, default_uri

EXPERIMENT = "evaluations"
REPORT = "report.html"
CLASSICAL = "classical"  # all methods that a user would otherwise take
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

    @property
    def kind(self) -> Kind:
        return "transform" if self.model is None else self.model.spec.kind


class Asked(NamedTuple):
    """What else is scored and shown."""

    classical: bool
    self_ensemble: bool
    measures: tuple[str, ...]
    show: int


@dataclass(frozen=True)
class Found:
    """What one suite gave: a picture for people, and {label: scores}, the subject's first."""

    suite: Suite
    scores: Mapping[str, Scores]
    picture: U8
    caption: str
    settings: Mapping[str, str] = field(default_factory=dict)  # of classical methods, where they have any


def evaluate(
    subject: Annotated[
        str, typer.Argument(help="NAME:VERSION, NAME@ALIAS, the folder of an artifact, or a classical method's name")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(help="The same, several times for several; **classical**, the default, is all methods there are"),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="JSON file of a suite, several times for several. By default that of the version"),
    ] = None,
    photos: Annotated[str, typer.Option(help="Dataset to score on instead of the suite's own")] = "",
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix that gets a copy of the report")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: where models run")] = "cpu",
    self_ensemble: Annotated[
        bool, typer.Option("--self-ensemble", help="Score the mean of 8 turned and mirrored answers as well, apart")
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(help=f"Measures that cost more, several times for several: {', '.join(extra.TITLES)}"),
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Pictures shown: that many of the worst")] = 4,
) -> dict[str, Any]:
    """Score a model, or a classical method, beside others on held-out photos, and write a report for people.

    The report is one HTML page (tables, curves, the worst pictures side by side) in an MLflow run of the experiment
    `evaluations`, with the scores and the suites as JSON beside it. Nothing is promoted.
    """
    where = device_of(device)
    check_disks(default_uri(), home())
    registry = Registry()
    suites = _suites(registry, subject, suite or [], photos)
    names = dict.fromkeys([subject, *(against or [CLASSICAL])])
    contenders = [_open(registry, name, where) for name in names if name != CLASSICAL]
    asked = Asked(CLASSICAL in names, self_ensemble, tuple(also or ()), show)
    found = {name: _on(one, contenders, asked) for name, one in suites.items()}
    title = f"{contenders[0].label} on {', '.join(suites)}"
    sections = [section for name, one in found.items() for section in _sections(name, one, contenders)]
    texts = {REPORT: page(title, sections, f"rayscale {contract.code_version()}")}
    for name, one in found.items():
        texts[f"{name}/suite.json"] = dumps(one.suite)
        texts |= {f"{name}/scores/{_file_name(label)}.json": dumps(scores) for label, scores in one.scores.items()}
    pictures = {f"{name}/pictures.png": one.picture for name, one in found.items()}
    run_id = _record(registry, title, contenders[0], found, texts, pictures)
    if out:
        store = open_store(out)
        for path, data in (*((p, t.encode()) for p, t in texts.items()),
                           *((p, encode(u8, "png")) for p, u8 in pictures.items())):  # fmt: skip
            store.write(path, data)
    figures = {name: _figures(one.scores[contenders[0].label]) for name, one in found.items()}
    return {"subject": contenders[0].label, "digest": contenders[0].subject, "run_id": run_id, "suites": figures}


def _open(registry: Registry, reference: str, device: Device) -> Contender:
    """A folder with a card, a name with a version or an alias, or a classical method. Raises: MissingError."""
    if (Path(reference) / CARD).is_file():
        return _of_session(Path(reference).resolve().name, artifact.load(reference, device=device))
    if ":" in reference or "@" in reference:
        version = registry.resolve(reference)
        folder = registry.fetch(version, home() / "cache" / "artifacts")
        return _of_session(str(version), artifact.load(folder, expect_digest=version.digest, device=device))
    return Contender(reference, reference)


def _of_session(label: str, session: Session) -> Contender:
    return Contender(label, session.digest, session.provider, evaluation.session_model(session))


def _suites(registry: Registry, subject: str, files: Sequence[str], photos: str) -> dict[str, Suite]:
    """{name: suite}: the files' by their names, or the one that the version was published with."""
    if files:
        found = {Path(file).stem: contract.loads(Suite, _read(file), file) for file in files}
        if len(found) < len(files):
            raise ConfigError("--suite", ", ".join(files), "two of one name", "rename one: reports go by file names")
    else:
        version = registry.resolve(subject) if ":" in subject or "@" in subject else None
        if version is None or "suite" not in version.tags:
            raise ConfigError("--suite", "(none)", f"{subject} names no suite to score it on", "give one as JSON")
        found = {"published": contract.loads(Suite, version.tags["suite"], f"suite of {version}")}
    return {name: replace(one, photos_uri=photos) if photos else one for name, one in found.items()}


def _read(file: str) -> bytes:
    folder, slash, name = file.rpartition("/")
    return open_store(folder or slash or ".").read(name)


def _on(suite: Suite, contenders: Sequence[Contender], asked: Asked) -> Found:
    """All contenders on one suite. Raises: ConfigError where they are of several kinds."""
    subject = contenders[0]
    for one in contenders:
        pictures = {one.kind, subject.kind} <= {"transform", "burst"}
        if one.kind != subject.kind and not pictures:
            raise ConfigError("--against", one.label, f"is {one.kind}, {subject.label} is {subject.kind}",
                              "compare models of one kind")  # fmt: skip
    if subject.kind in ("transform", "burst"):
        return _on_pictures(suite, contenders, asked)
    if asked.self_ensemble or asked.measures:
        option = "--self-ensemble" if asked.self_ensemble else "--also"
        raise ConfigError(option, subject.label, f"is {subject.kind}, it makes no picture of a picture", "omit it")
    models = {one.label: one.model for one in contenders if one.model is not None}
    scores = {
        one.label: evaluation.score_model(models[one.label], suite, one.subject, one.provider) for one in contenders
    }
    if asked.classical:
        best = evaluation.score_baseline(models[subject.label].spec, suite)
        scores[best.subject] = best
    picture = evaluation.show({subject.label: models[subject.label]}, suite, asked.show)
    return Found(suite, scores, picture, f"of {subject.label}")


def _on_pictures(suite: Suite, contenders: Sequence[Contender], asked: Asked) -> Found:
    subject = contenders[0].label
    known = {one.label: one for one in contenders}
    if asked.classical:
        known |= {name: Contender(name, name) for name in evaluation.baselines(suite) if name not in known}
    settings: dict[str, str] = {}
    runs: dict[str, Run] = {}
    for label, one in known.items():
        runs[label], settings[label] = _run_of(one, suite)
    if asked.self_ensemble:
        known[f"{subject}+8"] = replace(known[subject], label=f"{subject}+8")
        runs[f"{subject}+8"] = evaluation.self_ensemble(runs[subject])
    extra.measures(asked.measures, suite)  # a wrong name is told before the work
    scores = {}
    for label, one in known.items():
        scores[label] = evaluation.score(runs[label], suite, one.subject, one.provider)
        if asked.measures:
            scores[label] = extra.with_measures(scores[label], runs[label], suite, asked.measures)
    others = sorted((label for label in known if label != subject), key=lambda n: -_lead(scores[n]))[:_SHOWN]
    rows = _worst(suite, {label: runs[label] for label in (*others, subject)}, scores[subject], asked.show)
    grid = side_by_side(pages.side_by_side_rows(rows, subject, suite.scale, CROP_PX))
    caption = f"the worst of {subject}, each where it is furthest from the truth"
    return Found(suite, scores, grid, caption, {label: s for label, s in settings.items() if s})


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
    return evaluation.picture_run(one.model, None if spec.halo_px is None else TILE_PX), ""


def _classical_run(name: str, suite: Suite) -> tuple[Run, str]:
    """With the settings that do best on some of these very pictures: what is beaten was not held back."""
    if name == "bicubic" and suite.scale > 1 and (usual := evaluation.baselines(suite).get(name)):
        return usual, ""  # MATLAB's
    methods = {m.name: m for m in classical.methods(problem_of(suite.degradation), suite.scale)}
    if name not in methods:
        rule = "is no artifact's folder, no NAME:VERSION or NAME@ALIAS, no classical method for this suite"
        raise MissingError("model", name, rule, nearest(name, methods))
    runs = methods[name].runs()
    if len(runs) == 1:
        return next(iter(runs.values())), ""
    few = replace(suite, max_images=min(suite.max_images or TUNED_ON, TUNED_ON))
    found = {label: _lead(evaluation.score(run, few, label)) for label, run in runs.items()}
    best = max(found, key=found.__getitem__)
    return runs[best], best


def _worst(suite: Suite, runs: Mapping[str, Run], scores: Scores, count: int) -> list[Seen]:
    wanted = [scores.keys[i] for i in worst(next(iter(scores.metrics.values())), count)]
    seen = {
        pair.key: Seen(pair, {label: _or_black(run, pair) for label, run in runs.items()})
        for pair in evaluation.pairs(suite, wanted)
    }
    return [seen[key] for key in wanted]


def _or_black(run: Run, pair: Pair) -> U8:
    try:
        return run(*pair.inputs)
    except DivergedError:  # scored NaN
        return np.zeros_like(pair.hr)


def _sections(name: str, found: Found, contenders: Sequence[Contender]) -> list[Section]:
    suite, scores = found.suite, found.scores
    subject = contenders[0].label
    known = {**evaluation.METRICS, **extra.TITLES}
    titles = {m: title for m, title in known.items() if m in scores[subject].metrics}
    first, title = next(iter(titles.items()))
    facts = {
        "photos": f"{suite.photos_uri}, split {suite.split}",
        "manifest": open_split(suite.photos_uri, suite.split).manifest.digest,
        "degradation": " > ".join(map(str, suite.degradation)) or "none",
        "suite": suite.digest,
        **{one.label: " ".join((one.subject, one.provider)) for one in contenders if one.model is not None},
        **found.settings,
    }
    if contenders[0].kind == "generate" or "neg_perceptual" in titles:
        facts["features"] = suite.features.uri
    return [
        Facts(title=f"Suite {name}", values=facts),
        pages.means(scores, titles),
        pages.gains(scores, subject, first, title),
        pages.distribution(scores, first, title),
        Pictures(title="Pictures", pictures=[(found.caption, found.picture)]),
        pages.every_picture(scores, subject, titles),
    ]


def _record(
    registry: Registry,
    title: str,
    subject: Contender,
    found: Mapping[str, Found],
    texts: Mapping[str, str],
    pictures: Mapping[str, U8],
) -> str:
    """All of it as an MLflow run; its id."""
    tags = {"subject": subject.label, "digest": subject.subject}
    tracker = Tracker.start(EXPERIMENT, title, tags=tags, uri=registry.uri)
    try:
        for name, one in found.items():
            tracker.dataset(name, one.suite.photos_uri, one.suite.digest)
            values = _figures(one.scores[subject.label])
            tracker.metrics({f"{name}/{metric}": value for metric, value in values.items()}, 0)
        for path, text in texts.items():
            tracker.text(text, path)
        for path, picture in pictures.items():
            tracker.picture(picture, path)
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish()
    return tracker.run_id


def _lead(scores: Scores) -> float:
    """The mean of the metric that decides; what is not a number loses."""
    mean = scores.mean(next(iter(scores.metrics)))
    return mean if mean == mean else float("-inf")


def _figures(scores: Scores) -> dict[str, float]:
    return {metric: scores.mean(metric) for metric in scores.metrics}


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\-]", "-", label)
