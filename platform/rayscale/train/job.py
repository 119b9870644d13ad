"""What a run is given, and what can be known to be wrong with it before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from rayscale.data.cut import check_sizes, dtype_of, sample_shapes
from rayscale.data.mixture import Mixture
from rayscale.data.pairs import DataPlacement, check_block
from rayscale.data.plan import DataSettings, Plan
from rayscale.errors import ConfigError, RayscaleError, ResourceError
from rayscale.imaging import U8
from rayscale.storage import check_free
from rayscale.task import Batch, Task
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.loop import RunSettings
from rayscale.train.record import RunRecord


class Validation(NamedTuple):
    """What a validation found: metrics by name, and a grid of pictures for people."""

    metrics: Mapping[str, float]
    picture: U8 | None


Validate = Callable[[Task, Mapping[str, nn.Module]], Validation]
"""Scores the nets of `Task.build`, through what is shipped of them; called on rank 0 only."""


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
    for spec in job.task.specs.values():
        pictures = [tensor for tensor in (*spec.inputs, *spec.outputs) if len(tensor.shape) >= 4]
        sides = {axis for tensor in pictures for axis in tensor.shape[-2:] if isinstance(axis, int)}
        if wrong := sides - {job.data.hr_crop_px, job.data.hr_crop_px // scale}:
            rule = f"the model's pictures have {min(wrong)} px"
            raise ConfigError("data.hr_crop_px", job.data.hr_crop_px, rule, "align them")
    _check_classes(job)
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


def _check_classes(job: Job) -> None:
    if "label" not in job.task.needs:
        return
    classes, wanted = job.photos.classes, getattr(job.task, "num_classes", None)
    if "" in classes:
        rule = "has photos without a label, and this model learns them by label"
        raise ConfigError(
            "data", job.photos.uri, rule, "pack with --labels or folders, or take a recipe without classes"
        )
    if wanted not in (None, len(classes)):
        known = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        rule = f"the dataset has {len(classes)} labels: {known}"
        raise ConfigError("task.num_classes", wanted, rule, f"--set task.num_classes={len(classes)}")


def check_batch(job: Job) -> None:
    """Two samples of the recipe's sizes go through every turn here: no cluster is needed to find out.

    Raises: ConfigError saying what torch said.
    """
    torch.manual_seed(job.run.seed)
    nets = job.task.build(torch.device("cpu"))
    num = min(2, job.data.micro_batch)
    tensors = {}
    for name, shape in sample_shapes(job.data).items():
        if dtype_of(name) == np.uint8:
            tensors[name] = torch.rand(num, *shape).movedim(-1, -3)
        else:
            tensors[name] = torch.zeros(num, *shape, dtype=torch.int64)
    for turn in job.task.turns:
        try:
            total, _ = job.task.loss(turn.name, nets, Batch(tensors, 0))
            ok = total.numel() == 1 and bool(torch.isfinite(total).all())
            said = f"a loss of {total.tolist()}"
        except RayscaleError:
            raise
        except Exception as error:  # whatever a family of the user's own may raise
            ok, said = False, " ".join(str(error).split())
        if not ok:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            rule = f"turn {turn.name!r} must take {shapes} and give one finite loss"
            raise ConfigError("task", said, rule, "align the recipe's task and data")


def check_steps_left(job: Job, newest: CheckpointInfo) -> None:
    """Raises: ConfigError where nothing is left to train by an edited recipe: no checkpoint of it would be written."""
    same = (newest.recipe_digest, newest.plan_digest) == (job.record.recipe_digest, job.record.plan_digest)
    if not same and -(-newest.images_seen // job.data.global_batch) >= job.total_steps:
        rule = f"the run has seen {newest.images_seen} images, none is left for the edited recipe or data"
        remedy = f"raise it above {newest.images_seen}; an edited gate alone needs no training, only `publish`"
        raise ConfigError("run.total_images", job.run.total_images, rule, remedy)


def check_disk(job: Job) -> None:
    """Raises: ResourceError where a local disk cannot hold the run's checkpoints: weights, and two moments of each."""
    nets = job.task.build(torch.device("cpu"))
    size = sum(t.numel() * t.element_size() for net in nets.values() for t in net.state_dict().values())
    check_free(job.record.uri, 3 * size * (job.run.keep_checkpoints + 2) + (16 << 20), "the run")


class Node(NamedTuple):
    """What one node of the cluster offers."""

    cpus: float
    gpus: float
    labels: Mapping[str, str]


def check_fits(nodes: Sequence[Node], p: Placement) -> None:
    """Raises: ResourceError where the workers do not fit, or would leave Ray Data no CPU: Ray would wait for ever."""
    wanted = p.min_workers or p.num_workers
    largest = max((node.cpus for node in nodes), default=0.0)
    if p.cpus_per_worker > largest:
        rule = f"no node has so many: the largest has {largest:g}"
        raise ResourceError("--cpus-per-worker", p.cpus_per_worker, rule, "lower it, or add a larger node")
    if wanted * p.gpus_per_worker > (gpus := sum(node.gpus for node in nodes)):
        rule = f"{wanted * p.gpus_per_worker:g} GPUs are asked for, the cluster has {gpus:g}"
        raise ResourceError("--gpus-per-worker", p.gpus_per_worker, rule, "take fewer workers, or 0 to train on CPUs")
    data = [node for node in nodes if p.data.node_labels.items() <= node.labels.items()]
    if not data:
        labels = ",".join(f"{name}={value}" for name, value in p.data.node_labels.items())
        raise ResourceError("--data-nodes", labels, "no node has these labels", "start one with `ray start --labels`")
    everywhere = sum(_capacity(node, p) for node in nodes)
    if not any(everywhere - _capacity(n, p) + _capacity(n, p, kept=1.0) >= wanted for n in data if n.cpus >= 1):
        cpus = sum(node.cpus for node in nodes)
        needs = f"x {p.cpus_per_worker:g} CPUs = {wanted * p.cpus_per_worker:g}, and Ray Data needs 1 more"
        rule = f"{needs}: the cluster has {cpus:g} on {len(nodes)} node(s)"
        raise ResourceError("--workers", wanted, rule, "take fewer workers, other --cpus-per-worker, or add nodes")
    if p.min_workers:
        _check_elastic(data, p)


def _check_elastic(data: Sequence[Node], p: Placement) -> None:
    """Workers that grow take all they can get: what is left then must do for the data, whichever nodes are lost."""
    left = [node.cpus - min(_capacity(node, p), p.num_workers) * p.cpus_per_worker for node in data]
    enough = max(left) if p.data.node_labels else min(left)  # nodes of its own, or any that happen to be there
    if enough < 1:
        rule = f"workers that fill a node leave {enough:g} of its CPUs to Ray Data, which needs 1"
        remedy = "choose it so that each node keeps 1, give --data-nodes, or leave --min-workers out"
        raise ResourceError("--cpus-per-worker", p.cpus_per_worker, rule, remedy)


def _capacity(node: Node, p: Placement, kept: float = 0.0) -> int:
    """Workers that fit on a node of which `kept` CPUs are somebody else's."""
    fits = [
        (free // each) for free, each in ((node.cpus - kept, p.cpus_per_worker), (node.gpus, p.gpus_per_worker)) if each
    ]
    return max(0, int(min(fits, default=p.num_workers)))
