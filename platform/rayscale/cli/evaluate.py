"""`rayscale evaluate`, `jobs/evaluate.py`: what a model or a method is worth on suites of one's own; a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rayscale import artifact, contract
from rayscale import evaluate as evaluation
from rayscale.artifact import CARD, Device, Session
from rayscale.cli import pages
from rayscale.cli.contest import Asked, Contender, Found, method_names, on_suite
from rayscale.cli.disk import check_disks
from rayscale.cli.scoring import device_of, file_name, suites_of
from rayscale.contract import Scores, dumps
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, MissingError, nearest
from rayscale.evaluate import Suite, extra
from rayscale.features import FeatureNet
from rayscale.imaging import U8, encode
from rayscale.registry.models import Registry
from rayscale.report import Curves, Facts, Pictures, Point, Section, page
from rayscale.storage import home, open_store
from rayscale.tracking import Tracker, answering, artifact_uri, default_uri

EXPERIMENT = "evaluations"
REPORT = "report.html"
CLASSICAL = "classical"  # all methods that a user would otherwise take

SuiteFiles = Annotated[
    list[str] | None,
    typer.Option(help="JSON file of a suite, several times for several. By default that of the version judged"),
]
Photos = Annotated[str, typer.Option(help="Dataset to score on instead of the suite's own")]
Out = Annotated[str, typer.Option(help="Folder or s3:// prefix that gets a copy of the report")]
Where = Annotated[str, typer.Option(help="cpu, cuda or auto: where models run")]
Show = Annotated[int, typer.Option(min=1, help="Pictures shown: that many of the worst")]


def evaluate(
    subject: Annotated[
        str, typer.Argument(help="NAME:VERSION, NAME@ALIAS, the folder of an artifact, or a classical method's name")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(help="The same, several times for several; **classical**, the default, is all methods there are"),
    ] = None,
    suite: SuiteFiles = None,
    photos: Photos = "",
    out: Out = "",
    device: Where = "cpu",
    self_ensemble: Annotated[
        bool, typer.Option("--self-ensemble", help="Score the mean of 8 turned and mirrored answers as well, apart")
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(help=f"Measures that cost more, several times for several: {', '.join(extra.TITLES)}"),
    ] = None,
    classifier: Annotated[
        str, typer.Option(help="Generators: ONNX file with class probabilities, for an Inception-style score")
    ] = "",
    show: Show = 4,
) -> dict[str, Any]:
    """Score a model, or a classical method, beside others on held-out photos, and write a report for people.

    The report is one HTML page (tables, curves, the worst pictures side by side) in an MLflow run of the experiment
    `evaluations`, with the scores and the suites as JSON beside it. Nothing is promoted.
    """
    where = device_of(device)
    check_disks(default_uri(), home())
    registry = Registry()
    suites = suites_for(registry, subject, suite or [], photos)
    names = dict.fromkeys([subject, *(against or [CLASSICAL])])
    contenders = told_apart([open_one(registry, name, where) for name in names if name != CLASSICAL])
    net = FeatureNet(uri=classifier) if classifier else None
    asked = Asked(CLASSICAL in names, self_ensemble, tuple(also or ()), net, show)
    found = {name: on_suite(one, contenders, asked) for name, one in suites.items()}
    return report(registry, contenders, found, out)


def report(
    registry: Registry,
    contenders: Sequence[Contender],
    found: Mapping[str, Found],
    out: str,
    first: Sequence[Section] = (),
) -> dict[str, Any]:
    """The page and the run of what was found on suites by name; the result of the command. first: above all else."""
    title = f"{contenders[0].label} on {', '.join(found)}"
    sections = [*first]
    sections += [section for name, one in found.items() for section in _sections(name, one, contenders)]
    sections += _training(registry, contenders)
    texts = {REPORT: page(title, sections, f"rayscale {contract.code_version()}")}
    for name, one in found.items():
        texts[f"{name}/suite.json"] = dumps(one.suite)
        texts |= {f"{name}/scores/{file_name(label)}.json": dumps(scores) for label, scores in one.scores.items()}
    pictures = {f"{name}/pictures.png": one.picture for name, one in found.items()}
    run_id = _record(registry, title, contenders[0], found, texts, pictures)
    if out:
        store = open_store(out)
        for path, data in (*((p, t.encode()) for p, t in texts.items()),
                           *((p, encode(u8, "png")) for p, u8 in pictures.items())):  # fmt: skip
            store.write(path, data)
    figures = {name: _figures(one.scores[contenders[0].label]) for name, one in found.items()}
    uri = artifact_uri(registry.client, run_id, REPORT)
    return {"subject": contenders[0].label, "digest": contenders[0].subject, "run_id": run_id, "report": uri,
            "suites": figures}  # fmt: skip


def open_one(registry: Registry, reference: str, device: Device) -> Contender:
    """A folder with a card, a classical method, or a version. Raises: MissingError with the nearest of all."""
    if (Path(reference) / CARD).is_file():
        folder = Path(reference).resolve()
        return _of_session(folder.name, artifact.load(folder, device=device), folder)
    if reference in method_names():
        return Contender(reference, reference)
    try:
        version = registry.resolve(reference)
    except MissingError as error:
        if error.field != "model":
            raise
        rule = "is no folder of an artifact, no model of the registry, no classical method"
        remedy = nearest(reference, (*method_names(), *registry.names()))
        raise MissingError("model", reference, rule, remedy) from None
    folder = registry.fetch(version, home() / "cache" / "artifacts")
    session = artifact.load(folder, expect_digest=version.digest, device=device)
    return _of_session(str(version), session, folder, version.run_id)


def _of_session(label: str, session: Session, folder: Path, run_id: str = "") -> Contender:
    return Contender(label, session.digest, session.provider, evaluation.session_model(session), run_id, folder)


def told_apart(contenders: Sequence[Contender]) -> list[Contender]:
    """Folders of one name get their digests beside it."""
    labels = Counter(label for label, _ in {(one.label, one.subject) for one in contenders})
    return [
        replace(one, label=f"{one.label} {one.subject[:8]}") if labels[one.label] > 1 else one for one in contenders
    ]


def suites_for(registry: Registry, subject: str, files: Sequence[str], photos: str) -> dict[str, Suite]:
    """{name: suite}: the files' by their names, or the one that the version was published with."""
    if files:
        found = suites_of(files)
    else:
        bare = subject in method_names() or (Path(subject) / CARD).is_file()
        tags = {} if bare else registry.resolve(subject).tags
        if "suite" not in tags:
            raise ConfigError("--suite", "(none)", f"{subject} names no suite to score it on", "give one as JSON")
        found = {"published": contract.loads(Suite, tags["suite"], f"suite of {subject}")}
    return {name: replace(one, photos_uri=photos) if photos else one for name, one in found.items()}


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
        **found.facts,
    }
    return [
        Facts(title=f"Suite {name}", values=facts),
        pages.means(scores, titles),
        pages.gains(scores, subject, first, title),
        pages.distribution(scores, first, title),
        Pictures(title="Pictures", pictures=[(found.caption, found.picture)]),
        *found.further,
        pages.every_picture(scores, subject, titles),
    ]


def _training(registry: Registry, contenders: Sequence[Contender]) -> list[Section]:
    """The decisive metric on the validation split while the versions trained, by images seen; none where none is."""
    metric = evaluation.metrics_of(contenders[0].kind)[0]
    series: dict[str, list[Point]] = {}
    with answering(registry.uri):
        for one in contenders:
            if one.run_id and (history := registry.client.get_metric_history(one.run_id, f"validation/{metric}")):
                series[one.label] = sorted((float(m.step), float(m.value)) for m in history)
    title = evaluation.METRICS[metric]
    curves = Curves(title="Validation while it trained", x_label="images seen", y_label=title, series=series)
    return [curves] if series else []


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


def _figures(scores: Scores) -> dict[str, float]:
    return {metric: scores.mean(metric) for metric in scores.metrics}
