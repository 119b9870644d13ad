"""What a rollout needs around it: the registry's word, again and again, and a table that outlives the process.

The two wait for nothing but themselves: what a rollout decides by itself, a rollback above all, is kept while the
registry is away or takes a minute to say so, and the registry is followed while the store is away.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from rayscale.observe import log
from rayscale.serve import rollout
from rayscale.serve.rollout import Desired, Ending, Orders, Report, Rollout
from rayscale.serve.table import Table, read_table, write_table
from rayscale.storage import Store

if TYPE_CHECKING:
    from rayscale.registry.models import Registry

TABLE = "table.json"
PATIENCE_S = 3.0  # whoever asks early waits so long for the registry, then the kept table serves; less than a sync may


class Source(Protocol):
    """Where aliases stand. Both are called in a thread, one at a time. Raise: UnavailableError."""

    def ask(self) -> Desired: ...
    def tell(self, ending: Ending) -> None: ...


class RegistrySource:
    """MLflow's registry, connected to when it is first asked."""

    def __init__(self, tracking_uri: str | None, models: tuple[str, ...], *, require_gate: bool = False) -> None:
        self._uri, self._models, self._require_gate = tracking_uri, models, require_gate

    def ask(self) -> Desired:
        from rayscale.registry import journal  # imports MLflow

        gated = functools.partial(journal.gated, self._registry) if self._require_gate else None
        return rollout.read_desired(self._registry, self._models, gated)

    def tell(self, ending: Ending) -> None:
        rollout.write_ending(self._registry, ending)

    @functools.cached_property
    def _registry(self) -> Registry:
        from rayscale.registry.models import Registry

        return Registry(self._uri)


class Keeper:
    """A rollout in step with the registry, its table in the store. Of one event loop; `run` before the first `sync`."""

    def __init__(self, source: Source, store: Store, new: Callable[[Table], Rollout], *, poll_s: float) -> None:
        """`new`: the rollout that goes on from a kept table; `poll_s`: how often the registry is read."""
        self._source, self._store, self._new, self._poll_s = source, store, new, poll_s
        self._asking, self._keeping = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("registry", "store"))
        self._rollout: Rollout
        self._kept = 0  # generation of the table in the store
        self._started = asyncio.Event()

    async def sync(self, report: Report) -> Orders:
        await self._started.wait()  # who asks early is told what the registry says
        return self._rollout.sync(report, time.monotonic())

    async def run(self) -> None:
        """Until cancelled. Raises: what reading the kept table raises."""
        kept = await _in_thread(self._keeping, read_table, self._store, TABLE)
        self._rollout, self._kept = self._new(kept), kept.generation
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again(self._keep, "the table is not kept", "the store"))
            tasks.create_task(self._again(self._follow, "the table stays", "the registry"))
            if kept.routes:
                asyncio.get_running_loop().call_later(PATIENCE_S, self._started.set)

    async def _again(self, step: Callable[[], Awaitable[None]], so: str, who: str) -> None:
        """What fails is said once and tried again."""
        away = ""
        while True:
            try:
                await step()
            except Exception as error:
                if str(error) != away:
                    log.warning("table %d: %s: %s", self._rollout.table.generation, so, error)
                away = str(error)
            else:
                if away:
                    log.info("%s answers again", who)
                away = ""
            await asyncio.sleep(self._poll_s)

    async def _keep(self) -> None:
        if (table := self._rollout.table).generation != self._kept:
            await _in_thread(self._keeping, write_table, self._store, TABLE, table)
            self._kept = table.generation

    async def _follow(self) -> None:
        try:
            self._rollout.desire(await _in_thread(self._asking, self._source.ask), time.monotonic())
        finally:
            self._started.set()
        while self._rollout.endings:  # where the registry does not take them now, next time
            await _in_thread(self._asking, self._source.tell, self._rollout.endings[0])
            del self._rollout.endings[0]


async def _in_thread(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
