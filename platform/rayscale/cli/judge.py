"""What `promote` decides by: candidate and champion, scored on every suite and measured side by side.

Nothing is moved here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import yaml

from rayscale import artifact, contract
from rayscale.artifact import Device, Session
from rayscale.cli.scoring import read, score_session, suites_of
from rayscale.contract import Cost, Kind, Scores, dumps
from rayscale.errors import ConfigError, IntegrityError
from rayscale.evaluate import Suite, compare, score_baseline, session_model, show
from rayscale.observe import log
from rayscale.registry import cost
from rayscale.registry.gate import Contest, Forced, Gate, Hold, Promote, decide, default_for, markdown, refuse
from rayscale.registry.models import Registry, Version
from rayscale.storage import home
from rayscale.tracking import Tracker

PUBLISHED = "published"  # name of the suite that a version was published with


class Judged(NamedTuple):
    """A decision with all that it rests on."""

    decision: Promote | Hold | Forced
    gate: Gate
    suites: Mapping[str, Suite] = {}
    contests: Mapping[str, Contest] = {}
    cost: Mapping[str, Cost] = {}
    sessions: Mapping[str, Session] = {}  # the champion's first, where there is one
    fault: IntegrityError | None = None  # of the candidate's artifact


def judge(
    registry: Registry,
    candidate: Version,
    champion: Version | None,
    suites: Mapping[str, Suite],
    gate: Gate,
    device: Device,
) -> Judged:
    """Load both (digests and golden probes are verified), score both on every suite, measure both, and decide.

    Raises: ConfigError for a model that a suite cannot judge; IntegrityError for a damaged champion.
    """
    cache = home() / "cache" / "artifacts"
    versions = {"champion": champion, "candidate": candidate} if champion else {"candidate": candidate}
    try:
        sessions = {"candidate": _load(registry, candidate, device)}
    except IntegrityError as error:
        return Judged(refuse(candidate.digest, str(error)), gate, fault=error)
    if champion is not None:
        sessions = {"champion": _load(registry, champion, device), **sessions}
    contests = {name: _contest(suite, sessions, versions, gate) for name, suite in suites.items()}
    costs = cost.measure({name: registry.fetch(version, cache) for name, version in versions.items()}, device)
    decision = decide(contests, gate, sessions["candidate"].card, costs)
    return Judged(decision, gate, suites, contests, costs, sessions)


def gate_of(candidate: Version, file: str) -> tuple[Gate, str]:
    """The gate and where it is from: `file`, else what the version was published with, else its kind's."""
    if file:
        data = read(file)
        if not file.endswith(".json"):
            try:
                data = json.dumps(yaml.safe_load(data), default=str).encode()
            except yaml.YAMLError as error:
                raise ConfigError(
                    "--gate", file, f"is no YAML: {error}", "give the fields of a gate, or name it .json"
                ) from None
        return contract.loads(Gate, data, file), f"file {file}"
    if "gate" in candidate.tags:
        return contract.loads(Gate, candidate.tags["gate"], f"gate of {candidate}"), "of the version"
    kind: Kind = candidate.tags.get("kind", "transform")  # type: ignore[assignment]
    return default_for(kind), f"default of {kind}"


def suites_for(candidate: Version, files: list[str], photos: str) -> dict[str, Suite]:
    """The suite that the candidate was published with, and those of `files`; `photos` in place of theirs."""
    found = {}
    if "suite" in candidate.tags:
        suite = found[PUBLISHED] = contract.loads(Suite, candidate.tags["suite"], f"suite of {candidate}")
        if not photos and suite.digest != candidate.tags.get("suite_digest"):
            log.warning("the photos at %s are not those of the publication: all is scored on these", suite.photos_uri)
    given = suites_of(files)
    if found.keys() & given:
        raise ConfigError("--suite", f"{PUBLISHED}.json", "is what the version's own suite is called", "rename it")
    found |= given
    if not found:
        raise ConfigError("model", candidate, "its version names no suite to score it on",
                          "publish it with `rayscale publish`, or give --suite")  # fmt: skip
    return {name: replace(suite, photos_uri=photos) if photos else suite for name, suite in found.items()}


def write(tracker: Tracker, judged: Judged, title: str, source: str) -> None:
    """The report and all that it rests on, into an MLflow run."""
    tracker.tags({"gate": source})
    tracker.text(dumps(judged.gate), "gate.json")
    tables = []
    for name, contest in judged.contests.items():
        scores = _named(contest)
        tables.append(f"\n## Suite {name}\n\n{compare(scores)}")
        for who, one in scores.items():
            tracker.metrics({f"{name}/{who}/{metric}": one.mean(metric) for metric in one.metrics}, 0)
            tracker.text(dumps(one), f"{name}/scores/{who}.json")
        tracker.text(dumps(judged.suites[name]), f"{name}/suite.json")
        models = {who: session_model(session) for who, session in judged.sessions.items()}
        tracker.picture(show(models, judged.suites[name]), "samples.png" if len(tables) == 1 else f"{name}/samples.png")
    for who, measured in judged.cost.items():
        tracker.text(dumps(measured), f"cost/{who}.json")
    about = f"Gate: {source}.\n"
    if judged.fault is None:
        about += f"Digests and golden probes were verified on {judged.decision.report.hardware}.\n"
    tracker.text(f"# {title}\n\n{about}\n{markdown(judged.decision.report)}{''.join(tables)}", "report.md")
    tracker.text(dumps(judged.decision.report), "report.json")


def _load(registry: Registry, version: Version, device: Device) -> Session:
    folder = registry.fetch(version, home() / "cache" / "artifacts")
    return artifact.load(folder, expect_digest=version.digest, device=device)


def _contest(suite: Suite, sessions: Mapping[str, Session], versions: Mapping[str, Version], gate: Gate) -> Contest:
    found = {}
    for name in sorted(sessions):  # the candidate first: what it cannot do is told before more work
        try:
            found[name] = score_session(sessions[name], suite)
        except ConfigError as error:
            raise ConfigError(str(versions[name]), error.value, error.rule, error.remedy) from None
    baseline = score_baseline(sessions["candidate"].card.spec, suite, gate.metric)
    return Contest(candidate=found["candidate"], baseline=baseline, champion=found.get("champion"))


def _named(contest: Contest) -> dict[str, Scores]:
    found = {"baseline": contest.baseline, "candidate": contest.candidate}
    return found if contest.champion is None else found | {"champion": contest.champion}
