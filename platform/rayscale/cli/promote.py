"""`rayscale promote`, `jobs/promote.py`: move an alias to a version, if the gate lets it pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from rayscale import contract
from rayscale.artifact import Device
from rayscale.cli.disk import check_disks
from rayscale.cli.scoring import Scored, device_of, means, score_artifact
from rayscale.contract import Scores, dumps
from rayscale.errors import ConfigError, GateError, MissingError
from rayscale.evaluate import Suite, compare, score_baseline, session_model, show
from rayscale.observe import log
from rayscale.registry import moves
from rayscale.registry.gate import Gate, Hold, Promote, decide, markdown
from rayscale.registry.journal import GATED, PROMOTE, Journal, gated
from rayscale.registry.models import CHAMPION, Registry, Version, check_alias
from rayscale.storage import home
from rayscale.tracking import Tracker, default_uri


def promote(
    model: Annotated[str, typer.Argument(help="NAME:VERSION, NAME@ALIAS, or NAME for its newest version")],
    alias: Annotated[str, typer.Option(help="The alias to move")] = CHAMPION,
    photos: Annotated[str, typer.Option(help="Dataset to score on; by default the one of its publication")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: where both are scored")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and report, change nothing")] = False,
) -> dict[str, Any]:
    """Score a version anew beside the present holder of the alias, and move the alias if the gate lets it pass.

    The gate is that of the version's recipe. The report is an MLflow run in the experiment `promotions`.
    Held back: exit code 3, with every rule that failed. An alias that is there already is left, with exit code 0; if it
    was put there by hand, the version is held against the one that passed the gate before.
    """
    check_alias(alias)
    where = device_of(device)
    check_disks(default_uri(), home())  # artifacts are fetched into a cache there
    registry = Registry()
    candidate = _candidate(registry, model)
    holder = registry.aliases(candidate.name).get(alias)
    champion = None if holder is None else registry.resolve(f"{candidate.name}:{holder}")
    result = {"model": candidate.name, "version": candidate.version, "digest": candidate.digest, "alias": alias,
              "before": holder}  # fmt: skip
    if champion is not None and champion.digest == candidate.digest:
        if gated(registry, candidate.name, candidate.digest):
            log.info("%s is what %s points at already", candidate, alias)
            return {**result, "promoted": False, "already": True}
        champion = _passed_before(registry, candidate, alias)

    suite, gate = _suite(candidate, photos), _gate(candidate)
    scored = {"candidate": _score(registry, candidate, suite, where)}
    if champion is not None:
        scored["champion"] = _score(registry, champion, suite, where)
    card = scored["candidate"].session.card
    scores = {"baseline": score_baseline(card.spec, suite), **{name: one.scores for name, one in scored.items()}}
    decision = decide(scores["candidate"], scores.get("champion"), scores["baseline"], gate, card)
    log.info("%s -> %s\n\n%s", candidate, alias, markdown(decision.report))
    run_id = ""
    if not dry_run:
        tracker = _record(registry, candidate, alias, holder, suite, decision, scores, scored)
        run_id = tracker.run_id
        try:
            if isinstance(decision, Promote):
                Journal(registry, candidate.name).move(alias, candidate, before=holder, decision=PROMOTE, run_id=run_id)
                tracker.tags({"moved": "yes"})
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish()
    if isinstance(decision, Hold):
        remedy = f"the report is MLflow run {run_id}" if run_id else "this was a --dry-run"
        raise GateError("promote", f"{candidate} -> {alias}", "; ".join(decision.reasons), remedy)
    figures = means(scores["candidate"]) | means(scores["baseline"], "baseline_")
    return {**result, "promoted": not dry_run, "run_id": run_id, "images": len(scores["candidate"].keys), **figures}


def _candidate(registry: Registry, model: str) -> Version:
    if ":" in model or "@" in model:
        return registry.resolve(model)
    if found := registry.versions(model):
        return found[0]
    raise MissingError("version", model, "the model has none", "publish one first")


def _passed_before(registry: Registry, candidate: Version, alias: str) -> Version | None:
    """The last other version that the gate let hold this alias."""
    passed = [m for m in moves.read(registry, candidate.name) if m.alias == alias and m.moved and m.decision in GATED]
    there = {version.version: version for version in registry.versions(candidate.name)}
    found = [there[m.version] for m in reversed(passed) if m.version in there and m.digest != candidate.digest]
    return found[0] if found else None


def _suite(candidate: Version, photos: str) -> Suite:
    """Where and on what the candidate was scored when it was published; or the same on other photos."""
    if "suite" not in candidate.tags:
        raise ConfigError("model", candidate, "its version names no suite to score it on",
                          "publish it with `rayscale publish`")  # fmt: skip
    suite = contract.loads(Suite, candidate.tags["suite"], f"suite of {candidate}")
    if photos:
        return replace(suite, photos_uri=photos)
    if suite.digest != candidate.tags.get("suite_digest"):
        log.warning("the photos at %s are not those of the publication: all is scored on these", suite.photos_uri)
    return suite


def _gate(candidate: Version) -> Gate:
    return contract.loads(Gate, candidate.tags["gate"], f"gate of {candidate}") if "gate" in candidate.tags else Gate()


def _score(registry: Registry, version: Version, suite: Suite, device: Device) -> Scored:
    folder = registry.fetch(version, home() / "cache" / "artifacts")
    try:
        return score_artifact(folder, version.digest, suite, device)
    except ConfigError as error:
        raise ConfigError(str(version), error.value, error.rule, error.remedy) from None


def _record(
    registry: Registry,
    candidate: Version,
    alias: str,
    before: int | None,
    suite: Suite,
    decision: Promote | Hold,
    scores: Mapping[str, Scores],
    scored: Mapping[str, Scored],
) -> Tracker:
    """Write the report down before anything moves. Returns its run, open."""
    names = [name for name in ("champion", "candidate") if name in scored]
    picture = show({name: session_model(scored[name].session) for name in names}, suite)
    verdict = moves.HOLD if isinstance(decision, Hold) else PROMOTE
    tags = moves.tags(candidate.name, candidate.version, candidate.digest, alias, verdict, before)
    tracker = Tracker.start(moves.EXPERIMENT, f"{candidate} -> {alias}", tags=tags, uri=registry.uri)
    for name, one in scores.items():
        tracker.metrics({f"{name}/{metric}": one.mean(metric) for metric in one.metrics}, 0)
        tracker.text(dumps(one), f"scores/{name}.json")
    tracker.text(f"# {candidate} -> {alias}: {verdict}\n\n{markdown(decision.report)}\n{compare(scores)}", "report.md")
    tracker.text(dumps(decision.report), "report.json")
    tracker.picture(picture, "samples.png")
    return tracker
