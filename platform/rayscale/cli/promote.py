"""`rayscale promote`, `jobs/promote.py`: move an alias to a version, if the gate lets it pass."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rayscale.cli.disk import check_disks
from rayscale.cli.judge import Judged, gate_of, judge, suites_for, write
from rayscale.cli.scoring import device_of, means
from rayscale.errors import ConfigError, GateError, MissingError, UnavailableError
from rayscale.observe import log
from rayscale.registry import moves
from rayscale.registry.gate import Forced, Hold, Promote, markdown, overrule
from rayscale.registry.journal import FORCED, GATED, PROMOTE, Journal, gated
from rayscale.registry.models import CHAMPION, Registry, Version, check_alias
from rayscale.storage import home
from rayscale.tracking import Tracker, default_uri, without_password


def promote(
    model: Annotated[str, typer.Argument(help="NAME:VERSION, NAME@ALIAS, or NAME for its newest version")],
    alias: Annotated[str, typer.Option(help="The alias to move")] = CHAMPION,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="JSON file of a suite, several times for several, beside the one of its publication"),
    ] = None,
    photos: Annotated[str, typer.Option(help="Dataset to score on instead of the suites' own")] = "",
    gate: Annotated[
        str,
        typer.Option(help="JSON or YAML file of a gate; what it leaves out is as by default", show_default="its own"),
    ] = "",
    force: Annotated[
        str | None,
        typer.Option("--force", metavar="REASON", help="Move it also where the gate says no. The reason is recorded"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: where both are scored and measured")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and report, change nothing")] = False,
) -> dict[str, Any]:
    """Score a version anew beside the present holder of the alias, and move the alias if the gate lets it pass.

    Where the alias points nowhere yet, the champion is taken for its holder. Both are verified (digest, golden probe),
    scored on every suite, picture by picture, and measured: time and memory.
    The gate is that of the version's recipe. The report is an MLflow run in the experiment `promotions`.
    Held back: exit code 3, with every rule that failed. An alias that is there already is left, with exit code 0; if it
    was put there by hand, the version is held against the one that passed the gate before. A damaged artifact is never
    promoted, by force neither.
    """
    check_alias(alias)
    where = device_of(device)
    _check_force(force, dry_run)
    check_disks(default_uri(), home())  # artifacts are fetched into a cache there
    registry = Registry()
    candidate = _candidate(registry, model)
    policy, source = gate_of(candidate, gate)
    holder = registry.aliases(candidate.name).get(alias)
    champion = None if holder is None else registry.resolve(f"{candidate.name}:{holder}")
    result = {"model": candidate.name, "version": candidate.version, "digest": candidate.digest, "alias": alias,
              "before": holder}  # fmt: skip
    if champion is not None and champion.digest == candidate.digest:
        if gated(registry, candidate.name, candidate.digest, alias):
            forced = "" if force is None else ": --force is not needed, and not recorded"
            log.info("%s is what %s points at already%s", candidate, alias, forced)
            return {**result, "promoted": False, "already": True}
        champion = _passed_before(registry, candidate, alias)
    if champion is None and alias != CHAMPION:
        champion = _champion(registry, candidate)

    judged = judge(registry, candidate, champion, suites_for(candidate, suite or [], photos), policy, where)
    judged = _forced(judged, force)
    decision = judged.decision
    log.info("%s -> %s\n\n%s", candidate, alias, markdown(decision.report))
    run_id = ""
    if not dry_run:
        tracker = _record(registry, candidate, alias, holder, judged, source)
        run_id = tracker.run_id
        try:
            if not isinstance(decision, Hold):
                if not tracker.flush():
                    rule = "did not take the report: nothing was moved"
                    raise UnavailableError(
                        "MLFLOW_TRACKING_URI", without_password(registry.uri), rule, "run this again"
                    )
                _move(Journal(registry, candidate.name), alias, candidate, holder, decision, run_id)
                tracker.tags({"moved": "yes"})
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish()
    if judged.fault is not None:
        raise judged.fault
    if isinstance(decision, Hold):
        remedy = f"the report is MLflow run {run_id}" if run_id else "this was a --dry-run"
        raise GateError("promote", f"{candidate} -> {alias}", "; ".join(decision.reasons), remedy)
    return {**result, "promoted": not dry_run, "run_id": run_id, **_figures(judged)}


def _check_force(reason: str | None, dry_run: bool) -> None:
    if reason is not None and not reason.strip():
        raise ConfigError("--force", reason, "must not be empty", "say why: others will read it")
    if reason is not None and dry_run:
        raise ConfigError("--force", reason, "has no effect beside --dry-run", "omit one of them")


def _forced(judged: Judged, reason: str | None) -> Judged:
    """With its Hold overruled, where that is asked for and may be."""
    if reason is None or judged.fault is not None:
        return judged
    if not isinstance(judged.decision, Hold):
        log.info("the gate lets it pass: --force is not needed, and not recorded")
        return judged
    log.warning("forced, although: %s", "; ".join(judged.decision.reasons))
    return judged._replace(decision=overrule(judged.decision, reason))


def _move(
    journal: Journal, alias: str, candidate: Version, before: int | None, decision: Promote | Forced, run_id: str
) -> None:
    """Raises: ConflictError where another one moved it meanwhile."""
    forced = isinstance(decision, Forced)
    journal.move(alias, candidate, before=before, decision=FORCED if forced else PROMOTE, why=decision.report.forced,
                 run_id=run_id)  # fmt: skip


def _candidate(registry: Registry, model: str) -> Version:
    if ":" in model or "@" in model:
        return registry.resolve(model)
    if found := registry.versions(model):
        return found[0]
    raise MissingError("version", model, "the model has none", "publish one first")


def _figures(judged: Judged) -> dict[str, Any]:
    """Of the first suite, and whether and why it was forced."""
    first = next(iter(judged.contests.values()))
    figures = {"images": len(first.candidate.keys), **means(first.candidate), **means(first.baseline, "baseline_")}
    if isinstance(judged.decision, Forced):
        return {"forced": judged.decision.report.forced, "failed": list(judged.decision.reasons), **figures}
    return figures


def _passed_before(registry: Registry, candidate: Version, alias: str) -> Version | None:
    """The last other version that the gate let hold this alias."""
    passed = [m for m in moves.read(registry, candidate.name) if m.alias == alias and m.moved and m.decision in GATED]
    there = {version.version: version for version in registry.versions(candidate.name)}
    found = [there[m.version] for m in reversed(passed) if m.version in there and m.digest != candidate.digest]
    return found[0] if found else None


def _champion(registry: Registry, candidate: Version) -> Version | None:
    """Whom a first challenger is held against; None where there is none, or it does something else (x4 beside x2)."""
    number = registry.aliases(candidate.name).get(CHAMPION)
    if number is None:
        return None
    champion = registry.resolve(f"{candidate.name}:{number}")
    if any(champion.tags.get(what) != candidate.tags.get(what) for what in ("kind", "scale")):
        return None
    return _passed_before(registry, candidate, CHAMPION) if champion.digest == candidate.digest else champion


def _record(
    registry: Registry, candidate: Version, alias: str, before: int | None, judged: Judged, source: str
) -> Tracker:
    """Write the report down before anything moves. Returns its run, open."""
    decision = judged.decision
    verdict = {Hold: moves.HOLD, Forced: FORCED}.get(type(decision), PROMOTE)
    tags = moves.tags(candidate.name, candidate.version, candidate.digest, alias, verdict, before)
    if isinstance(decision, Forced):
        tags["reason"] = decision.report.forced
    tracker = Tracker.start(moves.EXPERIMENT, f"{candidate} -> {alias}", tags=tags, uri=registry.uri)
    try:
        write(tracker, judged, f"{candidate} -> {alias}: {verdict}", source)
    except BaseException:
        tracker.finish("FAILED")
        raise
    return tracker
