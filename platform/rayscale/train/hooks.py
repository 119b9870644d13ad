"""What happens around the steps of a run: MLflow, progress, checkpoints, notices. Rank 0 speaks, all keep in step."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray.train
import ray.train.collective
import torch.distributed as dist
from ray.train import Checkpoint
from ray.util import metrics as ray_metrics
from torch import nn

from rayscale.contract import code_version
from rayscale.data import pairs
from rayscale.data.sample import MicroBatch
from rayscale.errors import DamageError, UnavailableError
from rayscale.observe import METRICS, Progress, log
from rayscale.storage import join, upload_dir
from rayscale.tracking import Tracker
from rayscale.train import checkpoint
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.job import Job
from rayscale.train.ledger import Ledger
from rayscale.train.loop import State

ASK_EVERY_S = 5.0  # whether a node is about to be taken away


def _gauges(run: str) -> dict[str, ray_metrics.Gauge]:
    """The training metrics of `observe.METRICS` in Ray's exporter, which Prometheus reads."""
    found = {}
    for m in METRICS.values():
        if m.name.startswith("rayscale_train_"):
            found[m.name] = ray_metrics.Gauge(m.name, m.help, m.labels)
            found[m.name].set_default_tags({"run": run})
    return found


class RunHooks:
    """What happens around the steps: everything of it on rank 0, and on the others what must be done in step."""

    def __init__(self, job: Job, start_step: int, rank: int) -> None:
        self.job, self.rank, self.first_step_unix = job, rank, 0.0
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self.note, self.advised = "", False
        self.damaged: dict[str, str] = {}  # key -> reason, of this rank's photos since the last log
        self.ledger: Ledger | None = None
        self.gauges: dict[str, ray_metrics.Gauge] = {}  # of rank 0
        self.warned: set[str] = set()  # nodes that a checkpoint was made for before they go
        self.asked_at, self.asked_step, self.ask_every, self.step = time.monotonic(), 0, 1, 0
        if rank == 0:
            self.ledger = Ledger(job.record.uri, len(job.photos), job.run.damage_budget)
            self.gauges = _gauges(job.record.name)
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

    def watch(self, given: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """What the loop is given, with an eye on the photos that others stand in for."""
        for batches in given:
            for batch in batches:
                self.damaged.update(batch.damaged)
            yield batches

    def stepped(self, images_seen: int) -> bool:
        if self.first_step_unix == 0.0:
            self.first_step_unix = time.time()
        if self.progress is not None:
            self.progress.update(min(images_seen, self.progress.total), self.note)
        self.step += 1
        return self.step - self.asked_step >= self.ask_every and self._preempted()

    def _preempted(self) -> bool:
        """Is a node of ours about to be taken away, and not yet saved for? A barrier: all ask at once."""
        info = ray.train.get_preemption_info()
        seconds = ray.train.collective.broadcast_from_rank_zero(time.monotonic() - self.asked_at)
        steps, self.asked_at, self.asked_step = self.step - self.asked_step, time.monotonic(), self.step
        self.ask_every = max(1, round(ASK_EVERY_S * steps / max(seconds, 1e-3)))
        leaving = set(info.preempted_node_ids) - self.warned if info else set()
        if leaving and self.rank == 0:
            log.warning("%d node(s) are about to be taken away: a checkpoint now", len(leaving))
        self.warned |= leaving
        return bool(leaving)

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        self._check_damage()
        advice = pairs.advice(self.job.plan, metrics["progress/images_per_s"])
        if self.rank == 0 and advice and not self.advised:
            log.warning("%s", advice)
            self.advised = True
        if self.ledger is not None:
            self.gauges["rayscale_train_seen_images"].set(images_seen)
            self.gauges["rayscale_train_damaged_photos"].set(self.ledger.num_found)
        if self.tracker is not None:
            left = max(0, self.job.run.total_images - images_seen)
            metrics = {
                **metrics,
                "progress/images_seen": float(images_seen),
                "progress/eta_s": left / max(metrics["progress/images_per_s"], 1e-9),
            }
            self.tracker.metrics(metrics, images_seen)
            self.tracker.system(images_seen)
            self.note = " ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in metrics.items() if k.startswith("loss/"))

    def _check_damage(self) -> None:
        """Raises: DamageError on every rank, where the photos damaged so far are beyond the budget."""
        found = [self.damaged]
        if dist.is_initialized():
            found = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, self.damaged)
        error: list[DamageError | None] = [None]
        if self.ledger is not None:
            try:
                self.ledger.add({key: reason for of_rank in found for key, reason in of_rank.items()})
            except DamageError as caught:
                error[0] = caught
        if dist.is_initialized():
            dist.broadcast_object_list(error, src=0)
        self.damaged = {}
        if error[0] is not None:
            raise error[0]

    def validate(self, images_seen: int, nets: Mapping[str, nn.Module]) -> Mapping[str, float]:
        if self.rank != 0 or self.job.validate is None:
            return {}
        found = self.job.validate(self.job.task, nets)
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
            self.gauges["rayscale_train_saved_images"].set(images_seen)
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
