"""One loop for every family. Progress is counted in images seen; schedules are pure functions of it.

The loop owns the optimization: per turn it freezes the other nets, runs every micro-batch of this worker forward
and backward, clips, steps, and moves the averages. Upkeep first, then "done?", then the step.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayscale.data.sample import MicroBatch
from rayscale.errors import ConfigError, DivergedError, IntegrityError
from rayscale.nn import ema_update, unwrap
from rayscale.observe import log
from rayscale.task import Batch, Optimizer, Task, Turn


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run half of a recipe. Lengths and intervals are in images, over all workers."""

    total_images: int = 256_000
    log_every_images: int = 1_000
    validate_every_images: int = 16_000
    checkpoint_every_images: int = 16_000
    validate_on_images: int = 8  # at most so many photos of the validation split
    validate_max_side_px: int = 512  # centre crop of larger ones; 0 = whole
    ship: Literal["best", "last"] = "best"  # which checkpoint is published
    best_metric: str = "psnr_y"
    keep_checkpoints: int = 2  # the best by best_metric; the newest is kept besides
    warm_start: str = ""  # URI of another run, whose weights this one begins with
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: bool = True
    deterministic: bool = False  # GPU: the same bits in every run; slower, and operators that cannot are refused
    damage_budget: float = 0.001  # share of the photos that may be damaged, each replaced by another one
    verify_batches: bool = False  # recompute the checksum of every micro-batch that arrives

    def __post_init__(self) -> None:
        for name in (
            "total_images",
            "log_every_images",
            "validate_every_images",
            "checkpoint_every_images",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}", getattr(self, name), "must be at least 1", "raise it")

    def total_steps(self, global_batch: int) -> int:
        """Global steps of the whole run: the last one completes `total_images`."""
        return -(-self.total_images // global_batch)


@dataclass
class State:
    """All that changes during a run. Keys of `nets` are checkpoint keys."""

    nets: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0
    chain: str = ""
    seen_batches: list[tuple[int, int, str]] = field(default_factory=list)  # step, shard, sha256 since the chain's end


class Hooks(Protocol):
    """What happens around the steps, on every rank; see `runner.py`."""

    def stepped(self, images_seen: int) -> bool:
        """After every step; must cost nothing. True, on all ranks, asks for a checkpoint at once."""

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Metrics, averaged over the images since the last call and over all ranks."""

    def validate(self, images_seen: int, nets: Mapping[str, nn.Module]) -> Mapping[str, float]:
        """Score the shipped nets; {} on ranks that do not."""

    def checkpoint(self, state: State, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Keep the state."""


def make_deterministic() -> None:
    """Let CUDA's kernels give the same bits in every run, before its first use. CPUs do without."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def build_state(task: Task, settings: RunSettings, device: torch.device) -> State:
    """Fresh nets (the same on every rank) and one optimizer a turn."""
    torch.manual_seed(settings.seed)
    nets = task.build(device)
    if settings.channels_last:
        nets = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}  # type: ignore[call-overload]
    return State(nets, {turn.name: _optimizer(turn, nets) for turn in task.turns})


def _optimizer(turn: Turn, nets: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for name in turn.nets for p in nets[name].parameters() if p.requires_grad]
    o = turn.optimizer
    kind = torch.optim.AdamW if o.weight_decay else torch.optim.Adam
    return kind(parameters, lr=o.learning_rate, betas=o.betas, weight_decay=o.weight_decay)


def learning_rate(o: Optimizer, images_seen: int, total_images: int) -> float:
    """The schedule: linear warm-up, then constant or a cosine down to `final_fraction`."""
    if images_seen < o.warmup_images:
        return o.learning_rate * (images_seen + 1) / (o.warmup_images + 1)
    if o.decay == "constant":
        return o.learning_rate
    done = min(1.0, (images_seen - o.warmup_images) / max(1, total_images - o.warmup_images))
    low = o.final_fraction
    return o.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    task: Task,
    settings: RunSettings,
    state: State,
    steps: Iterator[list[MicroBatch]],
    *,
    global_batch: int,
    shards: int,
    device: torch.device,
    hooks: Hooks,
) -> State:
    """Train from `state.step` to the end of `settings`. `steps` yields this rank's micro-batches of every step,
    which over all ranks are `shards` of them with `global_batch` images.

    Raises: DivergedError when a loss or gradient is not finite; no checkpoint is made of such a state.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    learners = [name for turn in task.turns for name in turn.nets]
    if settings.compile:
        if why := compiler_missing(device):
            log.warning("run.compile=True: no compiler here (%s); training without it", why)
        else:
            for name in learners:
                state.nets[name] = torch.compile(state.nets[name])  # type: ignore[assignment]
    if world_size > 1:
        for name in learners:  # BatchNorm's buffers follow the data of their own rank (pytorch#175024)
            state.nets[name] = DistributedDataParallel(state.nets[name], broadcast_buffers=False)

    last_step = settings.total_steps(global_batch)
    meter = _Meter(device)
    kept, urgent = state.step, False  # upkeep of the starting point was done, or there is nothing to keep yet
    while True:
        # Upkeep first: at any step that crossed an interval since the last upkeep, and at the end.
        seen, before = state.step * global_batch, kept * global_batch
        done = state.step >= last_step
        if state.step > kept:
            meter.pause()
            if done or _crossed(before, seen, settings.log_every_images):
                rates = {
                    f"learning_rate/{t.name}": learning_rate(t.optimizer, seen, settings.total_images)
                    for t in task.turns
                }
                hooks.log(seen, meter.read(seen, global_batch) | rates)
            validate = done or _crossed(before, seen, settings.validate_every_images)
            if validate or urgent or _crossed(before, seen, settings.checkpoint_every_images):
                unwrapped = {name: unwrap(net) for name, net in state.nets.items()}
                meter.check(seen, unwrapped)  # no score and no checkpoint of a diverged state
                scores = hooks.validate(seen, unwrapped) if validate else {}
                _extend_chain(state, shards)
                hooks.checkpoint(state, seen, scores)
            kept = state.step
            meter.resume()
        if done:
            return state

        given = next(steps)
        batches = [_to_device(b, given[0], seen, device, settings) for b in given]
        weights = [b.weight * len(b.ids) / global_batch for b in given]
        for index, turn in enumerate(task.turns):
            optimizer = state.optimizers[turn.name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(turn.optimizer, seen, settings.total_images)
            for name in learners:
                state.nets[name].train().requires_grad_(name in turn.nets)
            optimizer.zero_grad(set_to_none=True)
            for i, (batch, weight, source) in enumerate(zip(batches, weights, given, strict=True)):
                torch.manual_seed(_seed(settings.seed, state.step, index, source.shard))
                with ExitStack() as scope:
                    if i < len(batches) - 1:  # gradients meet once a turn
                        for name in turn.nets:
                            if isinstance(net := state.nets[name], DistributedDataParallel):
                                scope.enter_context(net.no_sync())
                    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                        total, terms = task.loss(turn.name, state.nets, batch)
                    # DDP averages over the ranks, so a micro-batch's share of the global batch times their number
                    # is its weight in the mean over the global batch; a spare one weighs nothing.
                    (total * (weight * world_size)).backward()  # type: ignore[no-untyped-call]
                meter.add(terms, total, weight)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if turn.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(parameters, turn.clip_norm)
                meter.add({f"grad_norm/{turn.name}": norm}, norm, 1.0 / world_size)
            optimizer.step()
            for ema in turn.ema:
                halflife = min(ema.halflife_images, ema.rampup * seen)
                follower, leader = state.nets[ema.target], state.nets[ema.source]
                ema_update(follower, leader, halflife_images=halflife, images=global_batch)
        state.seen_batches += [(b.step, b.shard, b.sha256.hex()) for b in given if b.weight > 0]
        state.step += 1
        meter.steps += 1
        urgent = hooks.stepped(state.step * global_batch)


class _Meter:
    """Weighted means of the loss terms since the last reading, kept on the device: nothing waits for it between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad = torch.zeros((), device=device)
        self.steps, self.seconds, self.since = 0, 0.0, time.monotonic()
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, terms: Mapping[str, Tensor], guard: Tensor, weight: float) -> None:
        """Add one micro-batch's terms; `guard` must be finite unless the micro-batch weighs nothing."""
        if weight > 0:
            self.bad += ~torch.isfinite(guard.detach())
        for name, value in terms.items():
            kept = self.sums.setdefault(name, torch.zeros((), device=self.device))
            kept += value.detach().float() * weight if weight > 0 else 0.0

    def read(self, images_seen: int, global_batch: int) -> dict[str, float]:
        """Means per step over all ranks, and the rate; starts anew."""
        self.check(images_seen)
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names]) / max(1, self.steps)
        if dist.is_initialized():
            dist.all_reduce(values)
        rate = self.steps * global_batch / max(1e-9, self.seconds + time.monotonic() - self.since)
        self.steps, self.seconds, self.sums, self.since = 0, 0.0, {}, time.monotonic()
        return dict(zip(names, values.tolist(), strict=True)) | {"progress/images_per_s": rate}

    def pause(self) -> None:
        """Upkeep begins: validation and checkpoints do not count as time of training."""
        self.seconds += time.monotonic() - self.since
        self.since = time.monotonic()

    def resume(self) -> None:
        """Upkeep is over."""
        self.since = time.monotonic()

    @torch.no_grad()
    def check(self, images_seen: int, nets: Mapping[str, nn.Module] | None = None) -> None:
        """Raises: DivergedError on every rank, if any met a loss, a gradient or (of `nets`) a weight not finite."""
        for net in (nets or {}).values():
            norms = torch._foreach_norm([p.float() for p in net.parameters()])
            self.bad += ~torch.isfinite(torch.stack(norms)).all()
        if dist.is_initialized():
            dist.all_reduce(self.bad, op=dist.ReduceOp.MAX)
        if self.bad.item() > 0:
            raise DivergedError(
                "loss",
                "not finite",
                f"met before image {images_seen}; the last checkpoint is sound",
                "give it a --name, and --rebase with a lower task.optimizer.learning_rate or a task.clip_norm",
            )


def _extend_chain(state: State, shards: int) -> None:
    """Fold the global batches since the last call into the hash chain: the same for any number of ranks.

    Raises: IntegrityError unless every step held every micro-batch exactly once.
    """
    ranks: list[list[tuple[int, int, str]]] = [state.seen_batches]
    if dist.is_initialized():
        ranks = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, state.seen_batches)
    seen = sorted(batch for of_rank in ranks for batch in of_rank)
    steps = seen[-1][0] - seen[0][0] + 1
    expected = [(seen[0][0] + i // shards, i % shards) for i in range(steps * shards)]
    if [batch[:2] for batch in seen] != expected:
        raise IntegrityError(
            "global batch",
            f"steps {seen[0][0]}..{seen[-1][0]}",
            f"must hold each of the {shards} micro-batches once",
            "data was lost; report this",
        )
    for _, _, sha256 in seen:
        state.chain = hashlib.sha256((state.chain + sha256).encode()).hexdigest()
    state.seen_batches = []


def _to_device(
    batch: MicroBatch, spare: MicroBatch, images_seen: int, device: torch.device, settings: RunSettings
) -> Batch:
    """uint8 pictures -> f32 NCHW in [0, 1] on the device. A batch of weight 0 borrows the shapes of `spare`."""
    if settings.verify_batches and batch.weight > 0 and batch.checksum() != batch.sha256:
        raise IntegrityError(
            f"micro-batch {batch.shard} of step {batch.step}",
            batch.sha256.hex()[:12],
            "does not have this checksum",
            "bytes were damaged on the way; run the same command",
        )
    tensors = {}
    for name, array in (batch.tensors or spare.tensors).items():
        if array.dtype != np.uint8:  # a label
            tensors[name] = torch.tensor(array, device=device)
            continue
        picture = torch.tensor(array, device=device).movedim(-1, -3)  # NHWC in memory: channels_last already
        picture = picture.to(torch.float32, memory_format=torch.preserve_format).div_(255.0)
        tensors[name] = picture if settings.channels_last else picture.contiguous()
    return Batch(tensors, images_seen)


def _crossed(before: int, now: int, interval: int) -> bool:
    return now // interval > before // interval


def _seed(seed: int, step: int, turn: int, shard: int) -> int:
    """Of torch's generator for one micro-batch. The rank never enters."""
    text = f"{seed}/{step}/{turn}/{shard}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def compiler_missing(device: torch.device) -> str:
    """Why torch.compile cannot work here, or ""."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        return " ".join(str(error).split())[:120]
    return ""
