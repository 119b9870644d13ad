"""`rayscale publish`, `jobs/publish.py`: a run's checkpoint to a scored, immutable version in the registry."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rayscale import export, recipes
from rayscale.artifact import Device, digest_of
from rayscale.cli.disk import check_disks
from rayscale.cli.scoring import device_of, means, score_artifact
from rayscale.contract import Lineage, ModelCard, Scores, Spec, digest, dumps
from rayscale.data.mixture import check_held_out, open_mixture
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, MissingError, nearest
from rayscale.evaluate import METRICS, Suite, compare, score_baseline, suite_for
from rayscale.observe import log
from rayscale.recipes import Recipe
from rayscale.registry.gate import Gate
from rayscale.registry.models import Registry, Version
from rayscale.storage import open_store
from rayscale.tracking import without_password
from rayscale.train.checkpoint import CheckpointInfo, load_nets, select
from rayscale.train.identity import differences
from rayscale.train.record import RunRecord, open_run


@dataclass(frozen=True)
class Prepared:
    """One shipped function, exported and scored: ready to become a version."""

    name: str
    folder: Path
    card: ModelCard
    suite: Suite
    scores: Mapping[str, Scores]  # "model" and "baseline"


def publish(
    run: Annotated[str, typer.Argument(help="URI of the run: what `train` printed as run_uri")],
    name: Annotated[str, typer.Option(help="Name of the model in the registry, e.g. photos-x2")],
    which: Annotated[str, typer.Option(help="Checkpoint: best or last; by default as the recipe says")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the model; no gate lets one pass without")] = "",
    photos: Annotated[str, typer.Option(help="Dataset to score on; by default the run's own")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: where it is scored")] = "cpu",
) -> dict[str, Any]:
    """Export a run's checkpoint to ONNX, score the artifact on the held-out test split, and register a version.

    Nothing is registered before every check passed. The same checkpoint again is the same version again.
    Which alias follows it is decided by `promote`.
    """
    where = device_of(device)
    record = open_run(run)
    recipe = _recipe(record)
    if which not in ("", "best", "last"):
        raise ConfigError("--which", which, "must be best or last", nearest(which, ("best", "last")))
    if record.status != "finished":
        log.warning("run %s is not finished: publishing what it has so far", record.name)
    if not licence.strip():
        log.warning("no --licence: the gate will hold this version back")
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or record.tracking_uri
    check_disks(tracking_uri)  # before the work: what is too small or away is told now
    registry = Registry(tracking_uri)
    ship: Literal["best", "last"] = "best" if (which or recipe.run.ship) == "best" else "last"
    digests = {"recipe_digest": record.recipe_digest, "plan_digest": record.plan_digest}
    checkpoint = select(run, ship, recipe.run.best_metric, **digests)
    held_out = open_store(photos or _held_out(record)).uri
    _check_unseen(record, held_out)
    run_id = record.mlflow_run_id if _same(tracking_uri, record.tracking_uri) else ""
    check_disks(tracking_uri, model_bytes=2 * sum(entry.size for entry in open_store(checkpoint.uri).list()))
    with tempfile.TemporaryDirectory() as scratch:
        prepared = _prepare(recipe, record, checkpoint, name, licence.strip(), held_out, where, Path(scratch))
        results = [_register(registry, one, run_id, recipe, checkpoint) for one in prepared]
    main = next(result for result in results if result["model"] == name)
    return {**main, "checkpoint": checkpoint.uri, "also": [r for r in results if r is not main]}


def _held_out(record: RunRecord) -> str:
    """The first of the run's datasets that has a test split."""
    return next((uri for uri in record.datasets if len(open_split(uri, "test"))), record.datasets[0])


def _check_unseen(record: RunRecord, held_out: str) -> None:
    """Raises: ConfigError where the run was trained on photos that it would be scored on."""
    test = open_split(held_out, "test")
    if record.datasets == (test.uri,) or not len(test):  # one dataset holds each photo once
        return
    try:
        trained = [open_split(uri, "train") for uri in record.datasets]
        check_held_out(trained, [test], "name photos that the run has not seen with --photos")
    except MissingError as error:
        log.warning("whether the run was trained on photos of %s cannot be told: %s", test.uri, error)


def _recipe(record: RunRecord) -> Recipe:
    """The recipe of the run as it is today, an edited gate included: no weight depends on that.

    Raises: ConfigError where what was trained by is another one.
    """
    recipe = recipes.load(record.recipe, record.overrides)
    now = recipes.resolved(recipe)
    if digest(now) != record.recipe_digest:
        edits = differences(record.resolved, now)
        if not edits or any(not edit.startswith("gate.") for edit in edits):
            seen = record.resolved["run"]["total_images"]
            more = f" and run.total_images above {seen}" if record.status == "finished" else ""
            rule = f"was edited since the run: {'; '.join(edits) or 'its digest differs'}"
            remedy = f"undo the edit, or go on with `train --name {record.name} --rebase`{more}"
            raise ConfigError("recipe", record.recipe, rule, remedy)
        log.info("the gate was edited since the run: %s", "; ".join(edits))
    return recipe


def _same(tracking_uri: str, recorded: str) -> bool:
    # what an older version recorded may name a user
    return without_password(tracking_uri) == without_password(recorded)


def _prepare(
    recipe: Recipe,
    record: RunRecord,
    checkpoint: CheckpointInfo,
    name: str,
    licence: str,
    held_out: str,
    device: Device,
    scratch: Path,
) -> list[Prepared]:
    lineage = Lineage(
        recipe=" ".join((record.recipe, *record.overrides)),
        recipe_digest=record.recipe_digest,
        manifest=" ".join(record.datasets),
        manifest_digest=record.manifest_digest,
        code_version=checkpoint.code_version,
        run_id=record.mlflow_run_id,
        images_seen=checkpoint.images_seen,
    )
    modules = recipe.task.shipped(load_nets(checkpoint, recipe.task))
    classes = open_mixture(record.datasets, "train").classes if "label" in recipe.task.needs else ()
    prepared = []
    for function, module in modules.items():
        full_name = f"{name}.{function}" if function else name
        spec = recipe.task.specs[function]
        card = ModelCard(family=recipe.task.family, spec=spec, licence=licence, classes=classes, lineage=lineage)
        log.info("exporting %s after %d images", full_name, checkpoint.images_seen)
        folder = scratch / full_name
        card = export.to_onnx(module, card, folder)
        suite = suite_for(spec, recipe.data, held_out, "test")
        prepared.append(Prepared(full_name, folder, card, suite, _score(folder, spec, suite, recipe.gate, device)))
    return prepared


def _score(folder: Path, spec: Spec, suite: Suite, gate: Gate, device: Device) -> dict[str, Scores]:
    model = score_artifact(folder, digest_of(folder), suite, device).scores
    scores = {"baseline": score_baseline(spec, suite, _gate(gate, model).metric), "model": model}
    log.info("held-out photos:\n%s", compare(scores))
    return scores


def _register(
    registry: Registry, one: Prepared, run_id: str, recipe: Recipe, checkpoint: CheckpointInfo
) -> dict[str, Any]:
    figures = means(one.scores["model"]) | means(one.scores["baseline"], "baseline_")
    tags = {
        "images_seen": str(checkpoint.images_seen),
        "gate": dumps(_gate(recipe.gate, one.scores["model"])),
        # With these `promote` scores candidate and champion anew, on one suite.
        "suite": dumps(one.suite),
        "suite_digest": one.suite.digest,
        **{key: f"{value:.4f}" for key, value in figures.items()},
    }
    texts = {f"scores-{which}.json": dumps(scores) for which, scores in one.scores.items()}
    version = registry.publish(one.name, one.folder, run_id=run_id or None, tags=tags, texts=texts)
    return _result(version, one, figures)


def _gate(gate: Gate, scores: Scores) -> Gate:
    """The recipe's; for a function that is scored otherwise, one on its own first metric, which any gain passes."""
    if gate.metric in scores.metrics:
        return gate
    return replace(gate, metric=next(m for m in METRICS if m in scores.metrics), also=(), min_gain_db_over_baseline=0.0)


def _result(version: Version, one: Prepared, figures: Mapping[str, float]) -> dict[str, Any]:
    return {
        "model": version.name,
        "version": version.version,
        "digest": version.digest,
        "uri": version.uri,
        "run_id": version.run_id,
        "parity_max_abs": one.card.parity_max_abs,
        "images": len(one.scores["model"].keys),
        **figures,
    }
