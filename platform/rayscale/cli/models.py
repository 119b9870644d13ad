"""`rayscale models ...`: what is in the registry, where it comes from, and who moved which alias when."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rayscale import artifact, contract
from rayscale.artifact import CARD
from rayscale.cli.pages import aligned
from rayscale.contract import ModelCard, to_json
from rayscale.errors import ConfigError, MissingError, RayscaleError
from rayscale.evaluate import METRICS
from rayscale.observe import log
from rayscale.registry import moves
from rayscale.registry.gate import Gate, Report, default_for, markdown
from rayscale.registry.journal import EXTERNAL, FORCED, PROMOTE, ROLLBACK, Journal, gated
from rayscale.registry.models import CHAMPION, Registry, Version, check_alias
from rayscale.registry.moves import Move
from rayscale.storage import home
from rayscale.tracking import answering, artifact_uri, download

PICTURES = "samples.png"  # of a decision's run

Name = Annotated[str, typer.Argument(help="Name of the model, without alias or version")]


def list_models() -> dict[str, Any]:
    """List the models of the registry: what each does, its newest version, where its aliases point, its score.

    The score is that of the champion, or of the newest version where there is none, in the metric that its gate
    decides by, on the held-out photos of its publication; the classical baseline's stands beside it. An imported
    network has none here: `show` has its decisions, `evaluate` scores it.
    """
    found, rows = {}, []
    for name, versions in Registry().overview().items():
        newest = versions[0]
        shown = next((v for v in versions if CHAMPION in v.aliases), newest)
        aliases = {alias: v.version for v in versions for alias in v.aliases}
        metric, score, baseline = _score(shown)
        kind, scale = newest.tags.get("kind", ""), int(newest.tags.get("scale") or 1)
        found[name] = {
            "kind": kind,
            "family": newest.tags.get("family", ""),
            "scale": scale,
            "versions": len(versions),
            "newest": newest.version,
            "created": newest.created,
            "aliases": aliases,
            "scored": shown.version,
            "metric": metric,
            "score": score,
            "baseline": baseline,
        }
        pointing = ", ".join(f"{alias} {at}" for alias, at in sorted(aliases.items())) or "-"
        scored = "-" if score is None else f"{metric} {score:.3f}" + (f" ({baseline:.3f})" if baseline else "")
        does = f"{kind} x{scale}" if kind in ("transform", "burst") else kind
        rows.append((name, does, str(newest.version), pointing, scored, newest.created[:10]))
    print(aligned([("model", "kind", "newest", "aliases", "score (baseline)", "published"), *rows]))
    return {"models": found}


def show(
    model: Annotated[str, typer.Argument(help="NAME (its champion, or its newest version), NAME@ALIAS, NAME:VERSION")],
) -> dict[str, Any]:
    """Show one version: its card, where it comes from, its scores, what the gate said of it, where its pictures are.

    The artifact is fetched and its digest verified; where that fails, the reason stands in the place of the card.
    """
    registry = Registry()
    version = _version(registry, model)
    history = moves.read(registry, version.name)
    judged = [move for move in history if move.version == version.version and move.digest == version.digest]
    card, fault = _card(registry, version)
    aliases = sorted(alias for alias, at in registry.aliases(version.name).items() if at == version.version)
    decision = judged[-1] if judged else None
    report = _report(registry, decision) if decision else None
    pictures = _pictures(registry, version, judged)
    metric, score, baseline = _score(version)
    scores = {key: float(value) for key, value in version.tags.items() if key.removeprefix("baseline_") in METRICS}
    facts = {
        "version": str(version),
        "aliases": ", ".join(aliases) or "-",
        "published": version.created,
        "digest": version.digest,
        "artifact": f"{version.uri} ({fault or 'verified'})",
        **(_card_facts(card) if card else {}),
        "score": "-" if score is None else f"{metric} {score:.4f}" + (f", baseline {baseline:.4f}" if baseline else ""),
        "MLflow run": version.run_id or "-",
        "decision": _told(decision) if decision else "never put before the gate",
        **{f"pictures {i}": uri for i, uri in enumerate(pictures, 1)},
    }
    print(aligned(list(facts.items())))
    if report is not None:
        print(f"\n{markdown(report)}")
    return {
        "model": version.name,
        "version": version.version,
        "aliases": aliases,
        "created": version.created,
        "digest": version.digest,
        "uri": version.uri,
        "verified": not fault,
        "card": to_json(card) if card else None,
        "scores": scores,
        "run_id": version.run_id,
        "decisions": [to_json(move) for move in judged],
        "failed_rules": [row.rule for row in report.rows if not row.passed] if report else [],
        "pictures": pictures,
    }


def history(
    name: Name,
    alias: Annotated[str, typer.Option(help="Only this alias.", show_default="all")] = "",
) -> dict[str, Any]:
    """Who moved which alias of a model when, and what the gate held back.

    Read from the model's journal and from the MLflow runs that `promote` leaves in the experiment `promotions`. An
    alias that was moved by hand is told where it stands; the next promotion or rollback writes that down.
    """
    registry = Registry()
    registry.versions(name)  # a wrong name is told
    aliases = {a: at for a, at in registry.aliases(name).items() if alias in ("", a)}
    recorded = [move for move in moves.read(registry, name) if alias in ("", move.alias)]
    rows = [(m.at[:19], m.alias, _told(m), m.who or "-", m.run_id) for m in recorded]
    outside = moves.unrecorded(recorded, aliases)
    rows += [
        ("-", a, f"at {now or 'no version'} now, moved by hand", "not recorded", "-") for a, now in outside.items()
    ]
    print(aligned([("when (UTC)", "alias", "what", "who", "MLflow run"), *rows]))
    if not recorded:
        log.info("nothing is recorded of %s: no promotion was tried", name)
    return {"model": name, "aliases": aliases, "moves": [to_json(m) for m in recorded], "moved_by_hand": outside}


def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why: it is kept with the move")],
    alias: Annotated[str, typer.Option(help="The alias to move back")] = CHAMPION,
    to: Annotated[
        int | None, typer.Option(help="Another version than the previous one", show_default="previous")
    ] = None,
) -> dict[str, Any]:
    """Point an alias back at the version that it stood at before; a second time goes one further back.

    No gate is asked: that version held the alias once. Its artifact is fetched and verified first. Who moved it, and
    why, is kept in the model's journal (`rayscale models history`).
    """
    check_alias(alias)
    if not reason.strip():
        raise ConfigError("--reason", reason, "must not be empty", "say why: others will read it")
    registry = Registry()
    registry.versions(name)
    now = registry.aliases(name).get(alias)
    if now is None:
        raise MissingError(
            "alias", f"{name}@{alias}", "no such alias: there is nothing to roll back", "promote one first"
        )
    stood = moves.holders(moves.read(registry, name), alias, now)
    if to is None and len(stood) < 2:
        raise MissingError("version", f"{name}@{alias}", f"no version is recorded before {now}", "name one with --to")
    target = registry.resolve(f"{name}:{stood[-2] if to is None else to}")
    if target.version == now:
        raise ConfigError("--to", target.version, f"{alias} points there already", "see `rayscale models history`")
    artifact.load(registry.fetch(target, home() / "cache" / "artifacts"), expect_digest=target.digest)
    why = reason.strip()
    Journal(registry, name).move(alias, target, before=now, decision=ROLLBACK, why=why)
    if not gated(registry, name, target.digest, alias):
        rule = f"never passed the gate for {alias} on record"
        log.warning("%s %s: servers with require_gate follow it once it is promoted", target, rule)
    return {"model": name, "alias": alias, "before": now, "version": target.version, "digest": target.digest,
            "reason": why}  # fmt: skip


def gc(
    name: Name,
    keep: Annotated[int, typer.Option(min=1, help="Newest versions that stay in any case")] = 5,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only what would go is told")] = False,
) -> dict[str, Any]:
    """Delete old versions of a model with their artifacts; without `--yes` nothing is touched.

    What any alias points at stays, what any alias stood at before (for `rollback`), and the newest. The records of
    decisions and the training runs stay too.
    """
    registry = Registry()
    versions = registry.versions(name)
    recorded = moves.read(registry, name)
    kept = {v.version: "newest" for v in versions[:keep]}
    for alias, now in registry.aliases(name).items():
        for number in moves.holders(recorded, alias, now)[-2:]:
            kept[number] = f"{alias} before"
        kept[now] = alias
    shared = {v.uri for v in versions if v.version in kept}
    gone = [v for v in versions if v.version not in kept and v.uri not in shared]
    rows = [
        (str(v), "kept: " + kept[v.version] if v.version in kept else "deleted" if yes else "would go", v.created,
         v.digest[:12]) for v in versions
    ]  # fmt: skip
    print(aligned([("version", "", "published", "digest"), *rows]))
    for version in gone if yes else ():
        if set(registry.resolve(str(version)).aliases):  # an alias moved there meanwhile
            log.warning("%s has an alias now: it stays", version)
            continue
        registry.delete(version)
    if gone and not yes:
        log.info("nothing was deleted: this was a dry run, --yes deletes")
    return {"model": name, "kept": sorted(kept), "versions": [v.version for v in gone], "deleted": yes}


def _version(registry: Registry, model: str) -> Version:
    """As it is named; of a bare name the champion, or the newest where there is none."""
    if ":" in model or "@" in model:
        return registry.resolve(model)
    versions = registry.versions(model)
    if not versions:
        raise MissingError("version", model, "the model has none", "publish one first")
    return next((v for v in versions if CHAMPION in v.aliases), versions[0])


def _card(registry: Registry, version: Version) -> tuple[ModelCard | None, str]:
    """The verified card, or why there is none."""
    try:
        folder = registry.fetch(version, home() / "cache" / "artifacts")
        return contract.loads(ModelCard, (folder / CARD).read_bytes(), CARD), ""
    except RayscaleError as error:
        log.warning("%s", error)
        return None, error.rule


def _card_facts(card: ModelCard) -> dict[str, str]:
    spec, lineage = card.spec, card.lineage
    halo = f"{spec.halo_px} px" + (f", within {spec.halo_error:.2g}" if spec.halo_error else "")
    halo += "" if spec.fixed_px is None else ", tiles of {1}x{0} px".format(*spec.fixed_px)
    return {
        "does": f"{spec.kind} x{spec.scale}, family {card.family}",
        "inputs": "; ".join(f"{t.name} {list(t.shape)}" for t in spec.inputs),
        "outputs": "; ".join(f"{t.name} {list(t.shape)}" for t in spec.outputs),
        "tiling": f"none: {spec.halo_why_none}" if spec.halo_px is None else f"halo {halo}, align {spec.align}",
        "licence": card.licence or "none stated",
        "parity": "not measured" if card.parity_max_abs is None else f"{card.parity_max_abs:.3g}",
        "recipe": f"{lineage.recipe or '-'} {lineage.recipe_digest[:12]}".strip(),
        "photos": f"{lineage.manifest or '-'} {lineage.manifest_digest[:12]}".strip(),
        "images seen": str(lineage.images_seen),
        "code": lineage.code_version or "-",
    }


def _score(version: Version) -> tuple[str, float | None, float | None]:
    """The metric that decides, its mean over the held-out photos, and the baseline's; None where not scored."""
    if "gate" in version.tags:
        gate = contract.loads(Gate, version.tags["gate"], f"gate of {version}")
    else:
        gate = default_for(version.tags.get("kind", "transform"))  # type: ignore[arg-type]
    found = [version.tags.get(f"{prefix}{gate.metric}") for prefix in ("", "baseline_")]
    score, baseline = (None if text is None else float(text) for text in found)
    return gate.metric, score, baseline


def _told(move: Move) -> str:
    to = move.version or "none"
    path = f"{move.before or 'none'} -> {to}" if move.before or move.moved else str(to)
    if move.decision == moves.HOLD:
        return f"held {to} back"
    done = {PROMOTE: "promoted", FORCED: "forced", ROLLBACK: "rolled back", EXTERNAL: "moved by hand"}
    told = f"{done.get(move.decision, move.decision)} {path}"
    if not move.moved:
        told += f", but {move.why_not or 'the alias was not moved, or not known to be'}"
    return told + (f": {move.reason}" if move.reason else "")


def _report(registry: Registry, move: Move) -> Report | None:
    """The gate's report of a decision, if it left one."""
    if move.decision == ROLLBACK or not move.run_id:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        try:
            uri = artifact_uri(registry.client, move.run_id, "report.json")
            file = download(registry.uri, uri, Path(scratch) / "report")
            return contract.loads(Report, file.read_bytes(), "report.json")
        except (RayscaleError, OSError) as error:
            log.warning("the report of run %s cannot be read: %s", move.run_id, error)
            return None


def _pictures(registry: Registry, version: Version, judged: Sequence[Move]) -> list[str]:
    """Where sample pictures lie, the newest decision's first, then of its evaluations and its training."""
    client, found = registry.client, []
    with answering(registry.uri):
        runs = [move.run_id for move in reversed(judged) if move.run_id and move.decision != ROLLBACK]
        if (experiment := client.get_experiment_by_name("evaluations")) is not None:
            query = f"tags.digest = '{version.digest}'"
            runs += [r.info.run_id for r in client.search_runs([experiment.experiment_id], query, max_results=3)]
        for run_id in runs:
            names = (PICTURES, "report.html")
            found += [artifact_uri(client, run_id, f.path) for f in client.list_artifacts(run_id) if f.path in names]
        if version.run_id and any(f.path == "samples" for f in client.list_artifacts(version.run_id)):
            found.append(artifact_uri(client, version.run_id, "samples"))
    return found
