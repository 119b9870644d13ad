"""The same makers as actors of a Ray Data pool. Pictures never pass through Ray: only their names and what became of
them do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from rayscale.bulk.work import Done, Item
from rayscale.bulk.workers import Maker, Making
from rayscale.errors import UnavailableError

ROWS_MAX = 8  # pictures of one task: told together, and what a killed worker may make again; a task costs Ray 12 ms


class PoolMaker:
    """One actor: a session, and a few threads that decode and encode beside it."""

    def __init__(self, making: Making) -> None:
        self._maker = Maker(making)
        self._threads = ThreadPoolExecutor(making.at_once, thread_name_prefix="bulk")

    def __call__(self, batch: pa.Table) -> pa.Table:
        work = [Item(*json.loads(one)) for one in batch.column("item").to_pylist()]
        return pa.table({"done": [json.dumps(done) for done in self._threads.map(self._maker, work)]})


def on_ray(making: Making, work: Sequence[Item], *, workers: int, num_cpus: float, num_gpus: float) -> Iterator[Done]:
    """Results as they come, from up to `workers` actors. A worker that dies is replaced and its pictures made again.

    Raises: UnavailableError where the cluster gives up.
    """
    rows = max(1, min(ROWS_MAX, len(work) // (4 * workers)))
    tables = [
        pa.table({"item": [json.dumps(one) for one in work[start : start + rows]]})
        for start in range(0, len(work), rows)
    ]
    resources: dict[str, Any] = {"num_cpus": num_cpus}
    if num_gpus:
        resources["num_gpus"] = num_gpus
    dataset = ray.data.from_arrow(tables).map_batches(
        PoolMaker,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=[making],
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(tables))),
        **resources,
    )
    context = dataset.context
    context.execution_options.preserve_order = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.column("done").to_pylist():
                item, *rest = json.loads(row)
                yield Done(Item(*item), *rest)
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise UnavailableError("ray", type(error).__name__, reason, "run it again: it goes on where it was") from None
