"""The edge to Ray Train: resources before the start, workers, checkpoints, and what rank 0 logs."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.collective
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from rayscale.contract import code_version
from rayscale.data.cut import check_sizes
from rayscale.data.pairs import PlanDataConfig, check_block, steps
from rayscale.data.plan import DataSettings, Plan
from rayscale.data.shards import Photos
from rayscale.errors import ConfigError, DivergedError, RayscaleError, ResourceError, UnavailableError
from rayscale.imaging import U8
from rayscale.observe import Progress, log, setup_logging
from rayscale.storage import check_free, join, open_store, ray_filesystem, upload_dir
from rayscale.task import Task
from rayscale.tracking import Tracker
from rayscale.train import checkpoint
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.loop import RunSettings, State, build_state, fit
from rayscale.train.record import RunRecord, Start, start_step, write_position


class Validation(NamedTuple):
    """What a validation found: metrics by name, and a grid of pictures for people."""

    metrics: Mapping[str, float]
    picture: U8 | None


Validate = Callable[[Mapping[str, nn.Module]], Validation]
"""Scores what `Task.shipped` returned; called on rank 0 only."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a run runs. Not part of its identity: it may go on with other workers."""

    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads: int = 0  # of torch in each worker; 0: its share of the node's cores
    max_failures: int = 3  # times that a lost worker group is started again


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run, complete."""

    task: Task
    data: DataSettings
    run: RunSettings
    record: RunRecord
    photos: Photos
    placement: Placement
    validate: Validate | None
    tracking_uri: str  # with what the record does not keep: a password

    @property
    def plan(self) -> Plan:
        return Plan(len(self.photos), self.data)

    @property
    def total_steps(self) -> int:
        return self.run.total_steps(self.data.global_batch)


def check(job: Job) -> None:
    """All that can be known before anything is started. Raises: ConfigError naming the setting."""
    wanted, given = set(job.task.needs), {"lr", "hr"}
    if not wanted <= given:
        raise ConfigError("task.needs", sorted(wanted), f"the data gives {sorted(given)}", "choose another recipe")
    scale = next(iter(job.task.specs.values())).scale
    if scale != job.data.scale:
        raise ConfigError("data.degradation", f"scale {job.data.scale}", f"the model's scale is {scale}", "align them")
    if job.placement.num_workers > job.data.virtual_shards:
        raise ConfigError(
            "--workers",
            job.placement.num_workers,
            f"a step has data.virtual_shards={job.data.virtual_shards} micro-batches to share",
            f"take at most {job.data.virtual_shards} workers",
        )
    if job.run.ship == "best" and job.validate is None:
        raise ConfigError("run.ship", "best", "needs a validation split", "pack one, or --set run.ship=last")
    check_sizes(job.photos, job.data)
    check_block(job.plan)


def check_disk(job: Job) -> None:
    """Raises: ResourceError where a local disk cannot hold the run's checkpoints: weights, and two moments of each."""
    nets = job.task.build(torch.device("cpu"))
    size = sum(t.numel() * t.element_size() for net in nets.values() for t in net.state_dict().values())
    check_free(job.record.uri, 3 * size * (job.run.keep_checkpoints + 2) + (16 << 20), "the run")


def check_resources(placement: Placement) -> None:
    """Raises: ResourceError where the Train group would leave Ray Data no CPU, or does not fit at all."""
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if placement.cpus_per_worker > largest:
        raise ResourceError(
            "--cpus-per-worker",
            placement.cpus_per_worker,
            f"no node has so many: the largest has {largest:g}",
            "lower it, or add a larger node",
        )
    wanted = placement.num_workers * placement.cpus_per_worker
    if wanted + 1 > cpus:
        raise ResourceError(
            "--workers",
            placement.num_workers,
            f"x {placement.cpus_per_worker:g} CPUs = {wanted:g}, and Ray Data needs 1 more: the cluster has {cpus:g}",
            "take fewer workers, lower --cpus-per-worker, or add nodes",
        )
    if (wanted_gpus := placement.num_workers * placement.gpus_per_worker) > gpus:
        raise ResourceError(
            "--gpus-per-worker",
            placement.gpus_per_worker,
            f"{wanted_gpus:g} GPUs are asked for, the cluster has {gpus:g}",
            "take fewer workers, or 0 to train on CPUs",
        )


def train(job: Job) -> dict[str, Any]:
    """Run a checked job to the end, through lost workers, from wherever it stands. Returns the last metrics."""
    p, uri = job.placement, job.record.uri
    filesystem, path = ray_filesystem(uri.rpartition("/")[0])
    _check_snapshot(uri)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=p.num_workers,
            use_gpu=p.gpus_per_worker > 0,
            resources_per_worker={"CPU": p.cpus_per_worker} | ({"GPU": p.gpus_per_worker} if p.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=job.record.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=p.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=job.run.keep_checkpoints,
                checkpoint_score_attribute="score",
                checkpoint_score_order="max",
            ),
        ),
        datasets={"train": _placeholder},
        dataset_config=PlanDataConfig(job.photos, job.plan, job.total_steps, functools.partial(start_step, uri)),
    )
    with _interruptible():
        try:
            result = trainer.fit()
        except Exception as error:
            raise (_cause(error) or error) from None
    if isinstance(result.return_value, RayscaleError):
        raise result.return_value
    last = checkpoint.select(uri, "last")  # Ray's own list may end before it, after a kill
    return {**(result.metrics or {}), "images_seen": last.images_seen, "chain": last.chain, **last.metrics}


def _check_snapshot(uri: str) -> None:
    """Remove Ray Train's own list of checkpoints where it would refuse the run for it; we do not go on from it.

    It is written in place, so a kill may leave half of it; another version of Ray may not read it; and a checkpoint
    that it names may be gone.
    """
    store, name = open_store(uri), "checkpoint_manager_snapshot.json"
    if not store.exists(name):
        return
    try:
        snapshot = json.loads(store.read(name))
        named = {found["checkpoint_dir_name"] for found in snapshot["checkpoint_results"]}
        sound = snapshot["ray_version"] == ray.__version__
    except (ValueError, KeyError, TypeError):
        named, sound = set(), False
    if not sound or named - {found.uri.rpartition("/")[2] for found in checkpoint.checkpoints(uri)}:
        log.warning("%s: removing Ray Train's list of checkpoints, which is not true; ours is whole", uri)
        store.delete(name)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C while Ray Train runs is a KeyboardInterrupt, as anywhere else.

    Ray Train handles SIGINT itself (it stops the workers in order), leaves its handler behind, and exits.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _placeholder() -> ray.data.Dataset:
    """Ray Train wants a dataset; `PlanDataConfig` makes the real one when it knows the position."""
    return ray.data.range(1)


def _cause(error: BaseException | None) -> RayscaleError | None:
    """Our own error inside the layers that Ray wraps around it."""
    seen: list[BaseException] = [error] if error else []
    for e in seen:  # grows while we walk
        if isinstance(e, RayscaleError):
            return e
        inner = [getattr(e, "cause", None), e.__cause__, e.__context__, *getattr(e, "worker_failures", {}).values()]
        seen += [i for i in inner if isinstance(i, BaseException) and i not in seen]
    return None


def _worker(config: dict[str, Any]) -> RayscaleError | None:
    """One rank: choose the position, ask for the data, go on. Returns what no new start would mend."""
    setup_logging()
    for handler in logging.getLogger("ray.train").handlers:
        if handler.name == "console":  # its files keep everything
            handler.setLevel(logging.WARNING)
    job: Job = config["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job.placement.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    device = ray.train.torch.get_device()
    state = build_state(job.task, job.run, device)

    with tempfile.TemporaryDirectory() as scratch:
        folder, found = Path(scratch) / "checkpoint", None
        if rank == 0:
            found = checkpoint.newest(job.record.uri, folder)
            step = -(-found.images_seen // job.data.global_batch) if found else 0
            start = Start(step=step, checkpoint=found.uri if found else "", world_size=world_size, unix=time.time())
            write_position(job.record.uri, start)
        chosen = ray.train.collective.broadcast_from_rank_zero((found.uri, step) if found else ("", 0))
        if chosen[0]:
            if rank != 0:
                found = next(c for c in checkpoint.checkpoints(job.record.uri) if c.uri == chosen[0])
                checkpoint.fetch(found, folder)
            assert found is not None
            checkpoint.restore(folder, state.nets, state.optimizers)
            state.step, state.chain = chosen[1], found.chain
    shard = ray.train.get_dataset_shard("train")
    batches = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    given = steps(batches, job.plan, start_step=state.step, end_step=job.total_steps, rank=rank, world_size=world_size)
    hooks = _Hooks(job, state.step, rank)
    try:
        fit(
            job.task,
            job.run,
            state,
            given,
            global_batch=job.data.global_batch,
            shards=job.data.virtual_shards,
            device=device,
            hooks=hooks,
        )
    except DivergedError as error:  # on every rank: the same start would diverge again
        return error
    finally:
        hooks.close()
    return None


class _Hooks:
    """What happens around the steps: everything of it on rank 0, and on the others what must be done in step."""

    def __init__(self, job: Job, start_step: int, rank: int) -> None:
        self.job, self.rank, self.first_step_unix = job, rank, 0.0
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self.note = ""
        if rank == 0:
            log.info(
                "%s: from image %d of %d, on %d worker(s)",
                job.record.name,
                start_step * job.data.global_batch,
                job.run.total_images,
                ray.train.get_context().get_world_size(),
            )
            record = job.record
            try:
                self.tracker = Tracker.start("", record.name, run_id=record.mlflow_run_id, uri=job.tracking_uri)
            except UnavailableError as error:  # costs curves, not the run
                log.warning("training goes on without MLflow: %s", error)
            self.progress = Progress("training", job.run.total_images, "images", 10.0)

    def stepped(self, images_seen: int) -> None:
        if self.first_step_unix == 0.0:
            self.first_step_unix = time.time()
        if self.progress is not None:
            self.progress.update(min(images_seen, self.progress.total), self.note)

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.metrics({**metrics, "progress/images_seen": float(images_seen)}, images_seen)
            self.note = " ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in metrics.items() if k.startswith("loss/"))

    def validate(self, images_seen: int, nets: Mapping[str, nn.Module]) -> Mapping[str, float]:
        if self.rank != 0 or self.job.validate is None:
            return {}
        found = self.job.validate(self.job.task.shipped(nets))
        if self.tracker is not None:
            self.tracker.metrics({f"validation/{k}": v for k, v in found.metrics.items()}, images_seen)
            if found.picture is not None:
                self.tracker.picture(found.picture, f"samples/{images_seen:012d}.png")
        self.note = " ".join(f"{k} {v:.3f}" for k, v in found.metrics.items())
        return found.metrics

    def checkpoint(self, state: State, images_seen: int, metrics: Mapping[str, float]) -> None:
        score = metrics.get(self.job.run.best_metric, math.nan)
        score = score if math.isfinite(score) else -sys.float_info.max  # -inf comes back as null from Ray's snapshot
        report = {
            "images_seen": images_seen,
            "score": score,
            "chain": state.chain,
            "first_step_unix": self.first_step_unix,
            **metrics,
        }
        if self.rank != 0:
            ray.train.report(report)
            return
        folder = Path(tempfile.mkdtemp(prefix="rayscale-checkpoint-"))
        try:
            info = CheckpointInfo(
                images_seen=images_seen,
                position=state.step,
                plan_digest=self.job.record.plan_digest,
                recipe_digest=self.job.record.recipe_digest,
                code_version=code_version(),
                chain=state.chain,
                metrics=dict(metrics),
                files={},
            )
            checkpoint.save(folder, state.nets, state.optimizers, info)
            if self.tracker is not None:
                self.tracker.flush()  # what a checkpoint has seen is not lost in a crash
            ray.train.report(
                report,
                checkpoint=Checkpoint.from_directory(folder),
                checkpoint_upload_fn=self._upload,
                delete_local_checkpoint_after_upload=False,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, local: Checkpoint, name: str) -> Checkpoint:
        """Publish a checkpoint, `checkpoint.json` last: one that was cut off half-way is none."""
        upload_dir(Path(local.path), join(self.job.record.uri, name), last="checkpoint.json")
        storage = ray.train.get_context().get_storage()
        return Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        if self.tracker is not None:
            self.tracker.flush()
