"""The Ray Data graph of the training input, and its other end in the training worker.

A block is one window of one virtual shard, a row of it one micro-batch. A block costs Ray some 12 ms of CPU, whatever
is in it, so it should hold about a second of work, in at most 64 MiB.
Blocks come in order, window by window, and within a window shard by shard; they are dealt to the workers in
turn, so worker r holds the shards r, r + n, ... of V. Spare blocks (where n does not divide V) have weight 0.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.train import DataConfig

from rayscale.data.cut import dtype_of, sample_shapes
from rayscale.data.mixture import Mixture
from rayscale.data.plan import Plan
from rayscale.data.sample import MicroBatch, render_window
from rayscale.errors import ConfigError, IntegrityError

BLOCK_BYTES_MAX = 64 << 20  # a larger block stalls the object store; lower window_images or crops
BLOCKS_PER_S_MAX = 50.0  # of a run; Ray Data's coordinator takes about 12 ms of CPU for one
MEMORY_BUDGET = 512 << 20  # of the object store, for blocks on their way to the trainers


def padded_shards(shards: int, world_size: int) -> int:
    """Micro-batches a step that n workers take between them: V, rounded up to a multiple of n."""
    return -(-shards // world_size) * world_size


def check_block(plan: Plan) -> None:
    """Raises: ConfigError where a block would not fit its bound."""
    s = plan.settings
    size = s.window_images * s.crops * sum(math.prod(shape) for shape in sample_shapes(s).values())  # labels: nothing
    if size > BLOCK_BYTES_MAX:
        raise ConfigError(
            "data.window_images",
            s.window_images,
            f"x data.crops={s.crops} makes blocks of {size >> 20} MiB, beyond {BLOCK_BYTES_MAX >> 20}",
            "lower one of them, data.micro_batch or data.hr_crop_px",
        )


def advice(plan: Plan, images_per_s: float) -> str:
    """What to say of a run that trains so fast; "" where there is nothing to say."""
    s = plan.settings
    rate = images_per_s / (s.window_images * s.crops)
    if rate <= BLOCKS_PER_S_MAX:
        return ""
    return (
        f"{rate:.0f} blocks a second, and Ray Data moves about {BLOCKS_PER_S_MAX:g}: "
        f"raise data.crops={s.crops} or data.window_images={s.window_images}"
    )


@dataclass(frozen=True)
class Render:
    """The map function: block number -> one table of micro-batches. Pure, so a lost task is just repeated."""

    photos: Mixture
    plan: Plan
    start_step: int
    end_step: int
    world_size: int

    @property
    def num_blocks(self) -> int:
        rows, shards = self.plan.rows, padded_shards(self.plan.settings.virtual_shards, self.world_size)
        return (-(-self.end_step // rows) - self.start_step // rows) * shards

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        cv2.setNumThreads(1)  # Ray gave this task one CPU; OpenCV would take a thread for each core
        for block in batch["id"]:
            yield self.block(int(block))

    def block(self, number: int) -> pa.Table:
        """Block `number` of this run's remainder, counted from the window that holds `start_step`."""
        rows, shards = self.plan.rows, padded_shards(self.plan.settings.virtual_shards, self.world_size)
        w, v = self.start_step // rows + number // shards, number % shards
        first, last = max(self.start_step - w * rows, 0), min(self.end_step - w * rows, rows)
        if v < self.plan.settings.virtual_shards:
            batches = render_window(self.photos, self.plan, w, v, first, last)
        else:
            none = np.zeros((0, 3), np.int64)
            batches = (MicroBatch(w * rows + r, v, {}, none, b"", 0.0) for r in range(first, last))
        return pack(batches, tuple(sample_shapes(self.plan.settings)))


@dataclass(frozen=True, kw_only=True)
class DataPlacement:
    """Where the data work of a run is done, and in how much memory."""

    memory_budget: int = MEMORY_BUDGET  # bytes of the object store
    tasks: int | None = None  # at once, at most; None: as many as there are CPUs
    node_labels: Mapping[str, str] = field(default_factory=dict)  # only on nodes with these labels: CPU nodes, say


def training_data(render: Render, placement: DataPlacement | None = None) -> ray.data.Dataset:
    """The ordered stream of blocks; `streaming_split(world_size, equal=True)` deals them out."""
    placement = placement or DataPlacement()
    dataset = ray.data.range(render.num_blocks, override_num_blocks=render.num_blocks)
    dataset = dataset.map_batches(
        render,
        batch_size=None,
        batch_format="numpy",
        num_cpus=1,
        label_selector=dict(placement.node_labels) or None,
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        cpu=placement.tasks, object_store_memory=placement.memory_budget
    )
    context.target_min_block_size = 1  # never merge blocks
    context.target_max_block_size = 2 * BLOCK_BYTES_MAX  # never cut one
    context.enable_progress_bars = False  # the training run shows its own
    context.print_on_execution_start = False
    return dataset


class PlanDataConfig(DataConfig):  # type: ignore[misc]
    """Positions the stream when the workers ask for it: after rank 0 chose its checkpoint, for any world size."""

    def __init__(
        self,
        photos: Mixture,
        plan: Plan,
        end_step: int,
        read_position: Callable[[], int],
        placement: DataPlacement | None = None,
    ) -> None:
        super().__init__(enable_shard_locality=False)
        self._photos, self._plan, self._end_step, self._read_position = photos, plan, end_step, read_position
        self._placement = placement

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """One iterator a worker. Whatever `datasets` holds is a placeholder: the plan decides."""
        render = Render(self._photos, self._plan, self._read_position(), self._end_step, world_size)
        splits = training_data(render, self._placement).streaming_split(world_size, equal=True)
        return [dict.fromkeys(datasets, split) for split in splits]


def steps(
    batches: Iterator[pa.Table], plan: Plan, *, start_step: int, end_step: int, rank: int, world_size: int
) -> Iterator[list[MicroBatch]]:
    """This worker's micro-batches of every step in [start_step, end_step).

    Raises: IntegrityError where a block is not the one that the position asks for: a wrong order never trains.
    """
    shards = list(range(rank, padded_shards(plan.settings.virtual_shards, world_size), world_size))
    step = start_step
    while step < end_step:
        tables = list(itertools.islice(batches, len(shards)))
        if len(tables) < len(shards):
            raise IntegrityError("position", f"step {step}", f"of {end_step}: the stream ended", "report this")
        for row in range(tables[0].num_rows):
            given = [unpack(table, row) for table in tables]
            for batch, shard in zip(given, shards, strict=True):
                if (batch.step, batch.shard) != (step, shard):
                    raise IntegrityError(
                        "position",
                        f"step {batch.step}, micro-batch {batch.shard}",
                        f"the plan is at step {step}, micro-batch {shard}",
                        "data order was broken on the way; report this",
                    )
            yield given
            step += 1


def pack(batches: Iterable[MicroBatch], names: Sequence[str]) -> pa.Table:
    """Micro-batches with tensors of those names as rows of bytes: read back without a copy, one schema for every
    shape, also for spare ones without tensors."""
    given = list(batches)
    layout = [{k: list(v.shape) for k, v in b.tensors.items()} for b in given]
    columns: dict[str, Any] = {
        "step": pa.array([b.step for b in given], pa.int64()),
        "shard": pa.array([b.shard for b in given], pa.int32()),
        "weight": pa.array([b.weight for b in given], pa.float32()),
        "sha256": pa.array([b.sha256 for b in given], pa.binary()),
        "ids": pa.array([b.ids.tobytes() for b in given], pa.binary()),
        "layout": pa.array([json.dumps(shape) for shape in layout], pa.string()),
        "damaged": pa.array([json.dumps(b.damaged) for b in given], pa.string()),
    }
    for name in names:
        columns[name] = _binary([b.tensors.get(name, np.zeros(0, np.uint8)).view(np.uint8) for b in given])
    return pa.table(columns)


def _binary(arrays: Sequence[NDArray[np.uint8]]) -> pa.Array:
    """A binary column, one value an array. By hand: `pa.array` never frees the memoryviews it is given."""
    offsets = np.concatenate([[0], np.cumsum([a.nbytes for a in arrays])]).astype(np.int32)
    data = np.concatenate([a.ravel() for a in arrays]) if arrays else np.zeros(0, np.uint8)
    return pa.Array.from_buffers(pa.binary(), len(arrays), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def unpack(table: pa.Table, row: int) -> MicroBatch:
    """Row `row` of a block; its arrays are read-only views into the block."""

    def raw(name: str, dtype: Any) -> Any:
        return np.frombuffer(table.column(name)[row].as_buffer(), dtype)

    layout = json.loads(table.column("layout")[row].as_py())
    return MicroBatch(
        step=table.column("step")[row].as_py(),
        shard=table.column("shard")[row].as_py(),
        tensors={name: raw(name, dtype_of(name)).reshape(shape) for name, shape in layout.items()},
        ids=raw("ids", np.int64).reshape(-1, 3),
        sha256=table.column("sha256")[row].as_py(),
        weight=table.column("weight")[row].as_py(),
        damaged=tuple((key, reason) for key, reason in json.loads(table.column("damaged")[row].as_py())),
    )
