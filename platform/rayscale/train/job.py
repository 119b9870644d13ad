"""What a run is given, and what can be known to be wrong with it before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from rayscale.data.cut import check_sizes, sample_shapes
from rayscale.data.mixture import Mixture
from rayscale.data.pairs import DataPlacement, check_block
from rayscale.data.plan import DataSettings, Plan
from rayscale.errors import ConfigError
from rayscale.imaging import U8
from rayscale.storage import check_free
from rayscale.task import Task
from rayscale.train.loop import RunSettings
from rayscale.train.record import RunRecord


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
    min_workers: int = 0  # go on with so many while nodes are lost, grow again when they are back; 0: never
    data: DataPlacement = field(default_factory=DataPlacement)
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
    photos: Mixture
    placement: Placement
    validate: Validate | None
    tracking_uri: str  # with what the record does not keep: a password

    @property
    def plan(self) -> Plan:
        return self.photos.plan(self.data)

    @property
    def total_steps(self) -> int:
        return self.run.total_steps(self.data.global_batch)


def check(job: Job) -> None:
    """All that can be known before anything is started. Raises: ConfigError naming the setting."""
    wanted, given = set(job.task.needs), set(sample_shapes(job.data))
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
    if job.placement.min_workers > job.placement.num_workers:
        rule = f"is more than --workers={job.placement.num_workers}, the most"
        raise ConfigError("--min-workers", job.placement.min_workers, rule, "lower it")
    if job.run.ship == "best" and job.validate is None:
        raise ConfigError("run.ship", "best", "needs a validation split", "pack one, or --set run.ship=last")
    for part in job.photos.parts:
        check_sizes(part, job.data)
    check_block(job.plan)


def check_disk(job: Job) -> None:
    """Raises: ResourceError where a local disk cannot hold the run's checkpoints: weights, and two moments of each."""
    nets = job.task.build(torch.device("cpu"))
    size = sum(t.numel() * t.element_size() for net in nets.values() for t in net.state_dict().values())
    check_free(job.record.uri, 3 * size * (job.run.keep_checkpoints + 2) + (16 << 20), "the run")
