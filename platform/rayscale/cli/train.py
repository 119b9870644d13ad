"""`rayscale train`, `jobs/train.py`: a recipe and a manifest to a finished run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import nn

from rayscale import recipes
from rayscale.cli.cluster import connect
from rayscale.cli.disk import check_disks
from rayscale.contract import Spec, code_version, digest, dumps
from rayscale.data.mixture import Mixture, check_held_out, open_mixture
from rayscale.data.pairs import DataPlacement
from rayscale.data.preview import preview
from rayscale.errors import ConfigError, MissingError, RayscaleError, nearest
from rayscale.evaluate import METRICS, Suite, metrics_of, pairs, score_model, show, suite_for, torch_model
from rayscale.imaging import U8
from rayscale.observe import log
from rayscale.recipes import Recipe
from rayscale.storage import home
from rayscale.task import Batch, Judging, Task
from rayscale.tracking import Tracker, default_uri, without_password
from rayscale.tracking import connect as connect_mlflow
from rayscale.train import checkpoint
from rayscale.train.identity import claim, default_name, run_uri
from rayscale.train.job import Job, Placement, Validation, check, check_batch, check_disk, check_steps_left
from rayscale.train.record import RunRecord, write_run
from rayscale.train.runner import check_resources
from rayscale.train.runner import train as run_to_end

DATA_SHEET_ROWS = 6  # samples
TRAINED_SHOWN = 256  # photos of the training split that a trivial baseline is made of


def train(
    recipe: Annotated[str, typer.Option(help="`module:function`; `rayscale recipes` lists them")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="URI of a packed dataset, a folder or `s3://bucket/prefix`; several are mixed, in the shares of "
            "`--set data.weights=[3,1]`"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="`path=value`, e.g. `run.total_images=8000`; may be repeated")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run; by default recipe and digest of recipe and data")] = "",
    storage: Annotated[str, typer.Option(help="URI under which runs are kept; by default under RAYSCALE_HOME")] = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment")] = "rayscale",
    workers: Annotated[int, typer.Option(min=1, help="Train workers; a run may go on with another number")] = 1,
    min_workers: Annotated[
        int, typer.Option(min=0, help="Go on with as few while nodes are lost, and grow again; 0: wait for all")
    ] = 0,
    cpus_per_worker: Annotated[float, typer.Option(help="CPUs that Ray reserves for each worker")] = 1.0,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs for each worker; 0 trains on CPUs")] = 0.0,
    threads: Annotated[int, typer.Option(help="torch threads a worker; 0: its share of the node's cores")] = 0,
    data_nodes: Annotated[
        list[str] | None, typer.Option(help="`label=value` of the nodes that prepare data, e.g. those without a GPU")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Take a new name where this one is taken")] = False,
    rebase: Annotated[bool, typer.Option("--rebase", help="Go on from its weights with an edited recipe")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop")] = False,
) -> dict[str, Any]:
    """Train a recipe on a packed dataset with Ray Data and Ray Train, tracked in MLflow.

    The same command resumes a run that was interrupted, from its newest sound checkpoint and at the very
    next sample; a finished run says so. Tracking goes to MLFLOW_TRACKING_URI, else to an embedded SQLite.
    """
    chosen = recipes.load(recipe, settings or ())
    if dry_run:
        print(dumps(recipes.resolved(chosen)), end="")
        return {"recipe": recipe, "recipe_digest": digest(recipes.resolved(chosen)), "dry_run": True}
    if not data:
        raise MissingError("--data", "(missing)", "training needs a packed dataset", "pack one with jobs/ingest.py")
    photos = open_mixture(data, "train")
    if len(photos.parts) > 1:  # one holds each photo once
        held_out = [replace(part, split=split) for part in photos.parts for split in ("validation", "test")]
        check_held_out(photos.parts, held_out, "pack the photos of both into one dataset")
    job = _job(
        chosen,
        _identify(recipe, tuple(settings or ()), chosen, photos, name, storage),
        photos,
        Placement(
            num_workers=workers,
            min_workers=min_workers,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            threads=threads,
            data=DataPlacement(node_labels=_labels(data_nodes or ())),
        ),
    )
    check(job)
    record = claim(job.record, new=new, rebase=rebase)
    found = checkpoint.checkpoints(record.uri)
    if record.status == "finished":
        log.info("run %s is finished; nothing to do (--new trains it again)", record.name)
        last = checkpoint.select(record.uri, "last")
        return _result(record, {"images_seen": last.images_seen, "chain": last.chain, **last.metrics})
    if found and rebase:
        checkpoint.load_nets(found[0], chosen.task)  # do they fit? before anything is changed
    if not found and chosen.run.warm_start:
        checkpoint.warm_start(chosen.run.warm_start, chosen.task.build(torch.device("cpu")))  # likewise
    job = replace(job, record=record)
    if found:
        check_steps_left(job, found[0])
    else:
        check_batch(job)
    check_disk(job)
    check_disks(job.tracking_uri)
    connect_mlflow(job.tracking_uri)  # where it is away, say so before a cluster starts
    connect()
    check_resources(job.placement)
    job = replace(job, record=_tracked(record, job.tracking_uri, experiment, chosen, photos))
    if not found:
        _show_data(job)
    try:
        metrics = run_to_end(job)
    except BaseException as error:
        _close(job, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    _close(job, "FINISHED")
    write_run(replace(job.record, status="finished"))
    return _result(job.record, metrics)


def _labels(given: Sequence[str]) -> dict[str, str]:
    for text in given:
        if not all(text.partition("=")):
            raise ConfigError("--data-nodes", text, "must be label=value", "e.g. --data-nodes role=data")
    return dict(text.split("=", 1) for text in given)


def _close(job: Job, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """End the MLflow run; where MLflow is away, what happened to the training matters more."""
    try:
        tracker = Tracker.start("", job.record.name, run_id=job.record.mlflow_run_id, uri=job.tracking_uri)
        tracker.finish(status)
    except RayscaleError as error:
        log.warning("the MLflow run stays open: %s", error)


def _identify(
    recipe: str, overrides: tuple[str, ...], chosen: Recipe, photos: Mixture, name: str, storage: str
) -> RunRecord:
    resolved = recipes.resolved(chosen)
    name = name or default_name(recipe, digest(resolved), photos.digest)
    return RunRecord(
        name=name,
        uri=run_uri(storage or str(home() / "runs"), name),
        recipe=recipe,
        overrides=overrides,
        recipe_digest=digest(resolved),
        resolved=json.loads(dumps(resolved)),
        datasets=tuple(part.uri for part in photos.parts),
        manifest_digest=photos.digest,
        plan_digest=photos.plan(chosen.data).digest(photos.digest),
        tracking_uri=without_password(default_uri()),
        mlflow_run_id="",
        code_version=code_version(),
    )


def _job(chosen: Recipe, record: RunRecord, photos: Mixture, placement: Placement) -> Job:
    if chosen.run.ship == "best":
        known = [f"{name}/{m}" if name else m for name, s in chosen.task.specs.items() for m in metrics_of(s.kind)]
        if chosen.run.best_metric not in known:
            best = chosen.run.best_metric
            raise ConfigError("run.best_metric", best, "no such metric of this model", nearest(best, known))
    validate = None
    if scored := next((part for part in photos.parts if part.manifest.counts.get("validation")), None):
        limits = {
            "max_images": chosen.run.validate_on_images,
            "max_side_px": chosen.run.validate_max_side_px,
            "num_samples": chosen.run.validate_on_images,
        }
        specs = chosen.task.specs
        suites = {
            name: suite_for(spec, chosen.data, scored.uri, "validation", **limits) for name, spec in specs.items()
        }
        validate = Validator(specs, suites)
    else:
        log.warning("%s has no validation split: no scores while training", photos.uri)
    return Job(
        task=chosen.task,
        data=chosen.data,
        run=chosen.run,
        record=record,
        photos=photos,
        placement=placement,
        validate=validate,
        tracking_uri=default_uri(),
    )


def _tracked(record: RunRecord, tracking_uri: str, experiment: str, chosen: Recipe, photos: Mixture) -> RunRecord:
    """The record with its MLflow run, which holds the recipe and the lineage before the first step."""
    write_run(record)  # first: where the storage takes nothing, MLflow hears of no run
    tracker = Tracker.start(
        experiment,
        record.name,
        run_id=record.mlflow_run_id or None,
        uri=tracking_uri,
        tags={
            "rayscale.run_uri": record.uri,
            "rayscale.code_version": code_version(),
            "rayscale.recipe": record.recipe,
        },
    )
    record = replace(record, mlflow_run_id=tracker.run_id)
    write_run(record)
    tracker.params(recipes.resolved(chosen))
    tracker.text(dumps(recipes.resolved(chosen)), "recipe.json")
    for part in photos.parts:
        tracker.dataset("train", part.uri, part.digest)
    tracker.flush()
    return record


def _show_data(job: Job) -> None:
    """What the model will be given, as a picture in MLflow before the first step. A damaged photo costs only that."""
    try:
        tracker = Tracker.start("", job.record.name, run_id=job.record.mlflow_run_id, uri=job.tracking_uri)
        tracker.picture(preview(job.photos.parts[0], job.data, DATA_SHEET_ROWS).sheet, "data_sheet.png")
    except RayscaleError as error:
        log.warning("no picture of the data: %s", error)


def _result(record: RunRecord, metrics: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("images_seen", "chain", "first_step_unix", *METRICS)
    return {
        "run": record.name,
        "run_uri": record.uri,
        "mlflow_run_id": record.mlflow_run_id,
        "tracking_uri": record.tracking_uri,
        "finished_unix": time.time(),
        **{k: metrics[k] for k in kept if k in metrics},
    }


@dataclass(frozen=True)
class Validator:
    """Scores every shipped function on its suite, as evaluation does, and draws samples of the main one.

    Metrics of the others bear their names: "reconstruct/psnr_y".
    """

    specs: Mapping[str, Spec]
    suites: Mapping[str, Suite]

    def __call__(self, task: Task, nets: Mapping[str, nn.Module]) -> Validation:
        shipped = task.shipped(nets)
        device = next(next(iter(shipped.values())).parameters()).device
        models = {name: torch_model(module, self.specs[name], device) for name, module in shipped.items()}
        found: dict[str, float] = {}
        for name, model in models.items():
            scores = score_model(model, self.suites[name], "training")
            prefix = f"{name}/" if name else ""
            found |= {f"{prefix}{metric}": scores.mean(metric) for metric in scores.metrics}
        if isinstance(task, Judging):
            held_out, seen = self._pictures
            hr = torch.from_numpy(held_out).to(device).movedim(-1, 1) / 255
            found |= task.held_out(nets, Batch({"hr": hr}, 0), seen)
        return Validation(found, show({"model": models[""]}, self.suites[""]))

    @cached_property
    def _pictures(self) -> tuple[U8, U8]:
        """Whole pictures, u8[n, h, w, 3]: held out, and trained on."""
        suite = self.suites[""]
        trained = replace(suite, split="train", max_images=TRAINED_SHOWN)
        held_out, seen = (np.stack([pair.hr for pair in pairs(one)]) for one in (suite, trained))
        return held_out, seen
