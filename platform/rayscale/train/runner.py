"""The edge to Ray Train: resources before the start, the worker group, and what one worker does."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from rayscale.data.pairs import PlanDataConfig, steps
from rayscale.errors import DamageError, DivergedError, RayscaleError, ResourceError
from rayscale.observe import log, setup_logging
from rayscale.storage import open_store, ray_filesystem
from rayscale.train import checkpoint
from rayscale.train.hooks import RunHooks
from rayscale.train.job import Job, Node, Placement, check_fits
from rayscale.train.loop import build_state, fit, make_deterministic
from rayscale.train.record import Start, start_step, write_position


def check_resources(placement: Placement) -> None:
    """As `check_fits`, for the cluster that there is."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    check_fits(
        [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0), n.get("Labels", {})) for n in alive],
        placement,
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
            num_workers=(p.min_workers, p.num_workers) if p.min_workers else p.num_workers,
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
        dataset_config=PlanDataConfig(
            job.photos, job.plan, job.total_steps, functools.partial(start_step, uri), p.data
        ),
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
    if job.run.deterministic:
        make_deterministic()
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
        elif job.run.warm_start:
            loaded = checkpoint.warm_start(job.run.warm_start, state.nets)
            if rank == 0:
                log.info("%s begin with the weights of %s", ", ".join(loaded), job.run.warm_start)
    if state.step >= job.total_steps:  # all but the word of it was done
        return None
    shard = ray.train.get_dataset_shard("train")
    batches = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    given = steps(batches, job.plan, start_step=state.step, end_step=job.total_steps, rank=rank, world_size=world_size)
    hooks = RunHooks(job, state.step, rank)
    try:
        fit(
            job.task,
            job.run,
            state,
            hooks.watch(given),
            global_batch=job.data.global_batch,
            shards=job.data.virtual_shards,
            device=device,
            hooks=hooks,
        )
    except (DivergedError, DamageError) as error:  # on every rank: another start would end the same way
        return error
    except torch.OutOfMemoryError as error:
        rule = f"does not fit into the memory of {device}: {' '.join(str(error).split())[:120]}"
        remedy = "lower it and raise data.virtual_shards as much, or --set run.precision=bf16"
        raise ResourceError("data.micro_batch", job.data.micro_batch, rule, remedy) from None
    finally:
        hooks.close()
    return None
