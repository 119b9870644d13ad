"""A replica's side of the rollout: report, prepare in the background, adopt a table when all of it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from rayscale import storage
from rayscale.errors import ConfigError, IntegrityError, RayscaleError, UnavailableError
from rayscale.observe import log
from rayscale.serve.engine import Engine, Runner
from rayscale.serve.meters import Meters
from rayscale.serve.pools import PooledEngine
from rayscale.serve.rollout import Orders, Report
from rayscale.serve.table import Release, Table

RETRY_FIRST_S, RETRY_MAX_S = 1.0, 60.0


class Follower(ABC):
    """Keeps a replica in step with the rollout: reports, does its part, adopts tables."""

    def __init__(
        self, replica: str, engine: Runner, sync: Callable[[Report], Awaitable[Orders]], *, grace_s: float
    ) -> None:
        """A digest is forgotten `grace_s` after no table names it."""
        self.table = Table()  # what requests resolve against: everything in it is prepared
        self.held: Mapping[str, str] = {}
        self.watched: Mapping[str, str] = {}
        self.reason = "the rollout has not answered yet"  # why it is not ready, "" once it is
        self._replica, self._engine, self._sync, self._grace_s = replica, engine, sync, grace_s
        self._published = Table()  # by the rollout
        self._failed: dict[str, str] = {}  # digest -> why
        self._unnamed: dict[str, float] = {}  # digest -> since when no table names it
        self._sync_failed = False
        self._others = False  # engines that answer

    @abstractmethod
    def report(self) -> Report:
        """What the rollout is told."""

    @abstractmethod
    def obey(self, orders: Orders) -> None:
        """Do what is ordered, before a table is adopted."""

    async def follow(self, interval_s: float) -> None:
        """Stay in step until cancelled. A rollout that is away changes nothing: the last table serves."""
        while True:
            try:
                await self.step()
                self._sync_failed = False
            except Exception as error:
                if not self._sync_failed:
                    log.warning("no answer from the rollout, table %d stays: %r", self.table.generation, error)
                self._sync_failed = True
            await asyncio.sleep(interval_s)

    async def start(self, wait_s: float, interval_s: float) -> None:
        """Return when ready to answer, or when there is nothing to get ready.

        Also after `wait_s` where no other replica can do more, so that clients are told why. While others can, it
        stays out however long that takes: one that only declines is done at once with each request, so it would look
        the least busy of all and get most of them.
        """
        until = time.monotonic() + wait_s
        while True:
            try:
                if not (await self.step()).prepare or not self.reason:
                    return
            except Exception as error:
                log.warning("no answer from the rollout yet: %r", error)
            if time.monotonic() >= until:
                log.error("not ready after %.0f s: %s", wait_s, self.reason)
                if not self._others:
                    return
                until = time.monotonic() + wait_s  # say it again then
            await asyncio.sleep(interval_s)

    def check(self) -> None:
        """Raises: UnavailableError where this replica only declines what others answer: Serve then starts it anew.

        It came in while none could answer.
        """
        if self.reason and self._others:
            raise UnavailableError("replica", self._replica, self.reason, "others answer; this one starts again")

    async def step(self) -> Orders:
        """One report and what follows from its answer."""
        orders = await self._sync(self.report())
        self.held, self.watched, self._published = orders.held, orders.watched, orders.table
        self._others = orders.others
        self.obey(orders)
        self._adopt(orders)
        self._forget(orders)
        return orders

    def _adopt(self, orders: Orders) -> None:
        """A table serves when all of it is here, or has been tried: what is damaged takes nothing else with it.

        Of several pools, those that are late hold no other up.
        """
        table = orders.table.without_canaries(self._engine.digests)
        missing = table.routed.intersection(r.digest for r in orders.prepare) - self._engine.digests  # of what is ours
        failed = {digest: why for pool in orders.pools.values() for digest, why in pool.failed.items()}
        tried = failed.keys() if orders.others else failed.keys() | self._failed.keys()
        pools = [pool.digests for pool in orders.pools.values()] or [table.routed]
        late = frozenset[str]().union(*(of & missing if of & missing <= tried else of for of in pools))

        def waiting(wanted: frozenset[str]) -> str:
            versions, whys = {**self.table.versions, **orders.table.versions}, {**failed, **self._failed}
            releases = sorted(str(versions[digest]) for digest in wanted)
            failures = [whys[digest] for digest in sorted(wanted) if digest in whys]
            return "; ".join([f"preparing {', '.join(releases)}", *failures])

        if not missing or table.routed - late:
            self.table = table.without_late(late, self.table)
            champions = {route: frozenset({shares[0][0]}) for route, shares in table.routes.items()}
            self.held = {**orders.held, **{r: waiting(one) for r, one in champions.items() if one <= missing}}
        if self.table.routes and not self.table.routed <= failed.keys():
            self.reason = ""  # an old table serves as long as the new one is not ready
        elif wanted := missing or self.table.routed:
            self.reason = waiting(wanted)
        else:
            held = "; ".join(f"{route}: {why}" for route, why in sorted(orders.held.items()))
            none = "no model is promoted yet: no alias that this application follows exists"
            self.reason = held or (none if orders.heard else "the registry has not answered yet, and no table is kept")

    def _forget(self, orders: Orders) -> None:
        named = {r.digest for r in orders.prepare} | set(orders.table.versions) | set(self.table.versions)
        now = time.monotonic()
        held = self._engine.known().keys()  # of a gateway more than its engines have now
        self._unnamed = {digest: self._unnamed.get(digest, now) for digest in held - named}
        for digest, since in list(self._unnamed.items()):
            if now - since >= self._grace_s:  # requests that resolved to it are over
                self._engine.forget(digest)
        for digest in set(self._failed) - named:
            self._failed.pop(digest)


class EngineFollower(Follower):
    """Of a replica that runs models itself. All but the preparing happens on the event loop."""

    def __init__(
        self,
        replica: str,
        engine: Engine,
        sync: Callable[[Report], Awaitable[Orders]],
        fetch: Callable[[Release], Path],
        executor: Executor,
        meters: Meters,
        *,
        grace_s: float,
        pool: str = "",
    ) -> None:
        """`executor` runs `fetch` and `Engine.prepare`; `pool`: whose models the engine runs."""
        super().__init__(replica, engine, sync, grace_s=grace_s)
        self._loader, self._fetch, self._executor, self._meters, self._pool = engine, fetch, executor, meters, pool
        self._retry: dict[str, tuple[float, float]] = {}  # digest -> (not before, last delay)
        self._preparing: asyncio.Task[None] | None = None
        self._names: dict[str, str] = {}  # of models, by digest

    def report(self) -> Report:
        for (digest, provider, items), runs in self._loader.take_batches().items():
            model = self._names.get(digest, "")
            self._meters.add("rayscale_batches_total", runs, model=model, provider=provider, items=str(items))
            self._meters.add("rayscale_tiles_total", runs * items, model=model)
        return Report(
            replica=self._replica,
            pool=self._pool,
            known=self._engine.known(),
            prepared=self._engine.digests,
            failed=dict(self._failed),
            outcomes=self._engine.outcomes(),
            table=self._published,
        )

    def obey(self, orders: Orders) -> None:
        """One at a time: loading is heavy, and requests are being answered beside it."""
        self._names |= {release.digest: release.name for release in orders.prepare}
        if self._preparing is not None and not self._preparing.done():
            return
        self._retry = {digest: retry for digest, retry in self._retry.items() if digest in self._failed}
        now = time.monotonic()
        for release in orders.prepare:
            not_before, _ = self._retry.get(release.digest, (0.0, 0.0))
            if release.digest not in self._engine.digests and now >= not_before:
                self._preparing = asyncio.create_task(self._prepare(release))
                return

    async def _prepare(self, release: Release) -> None:
        loop, digest, started = asyncio.get_running_loop(), release.digest, time.monotonic()
        try:
            await loop.run_in_executor(self._executor, self._fetch_and_load, release)
        except Exception as error:
            if digest not in self._failed:
                log.error("%s is refused: %s", release, error, exc_info=not isinstance(error, RayscaleError))
                self._meters.add("rayscale_model_swaps_total", model=release.name, result="refused")
            _, delay = self._retry.get(digest, (0.0, RETRY_FIRST_S / 2))
            delay = min(2 * delay, RETRY_MAX_S)
            self._retry[digest] = time.monotonic() + delay, delay
            self._failed[digest] = str(error)
            return
        self._failed.pop(digest, None)
        self._retry.pop(digest, None)
        log.info("%s is prepared in %.1f s (%s)", release, time.monotonic() - started,
                 self._engine.session(digest).provider)  # fmt: skip
        self._meters.add("rayscale_model_swaps_total", model=release.name, result="prepared")

    def _fetch_and_load(self, release: Release) -> None:
        folder = self._fetch(release)
        try:
            self._loader.prepare(release.digest, folder)
        except IntegrityError:
            shutil.rmtree(folder, ignore_errors=True)  # the cache's copy is damaged: fetch it anew next time
            raise


class GatewayFollower(Follower):
    """Of a gateway that asks engines: it follows what they have prepared."""

    def __init__(
        self, replica: str, engine: PooledEngine, sync: Callable[[Report], Awaitable[Orders]], *, grace_s: float
    ) -> None:
        super().__init__(replica, engine, sync, grace_s=grace_s)
        self._pooled = engine

    def report(self) -> Report:
        return Report(
            replica=self._replica,
            runs=False,
            prepared=self._engine.digests,
            outcomes=self._engine.outcomes(),
            table=self._published,
        )

    def obey(self, orders: Orders) -> None:
        self._pooled.learn(orders.pools)


def fetch(release: Release, cache: Path, tracking_uri: str | None) -> Path:
    """The release's artifact as a local folder `cache/DIGEST`. What is loaded is verified by its digest then.

    Raises: MissingError, UnavailableError, ResourceError as the store does.
    """
    folder = cache / release.digest
    if folder.is_dir():
        return folder
    try:
        storage.open_store(release.uri)
    except ConfigError:  # in MLflow's own terms (mlflow-artifacts:, runs:): only then a replica pays for its import
        from rayscale.registry.models import Registry, Version

        version = Version(name=release.name, version=release.version, digest=release.digest, uri=release.uri, run_id="")
        return Registry(tracking_uri).fetch(version, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        storage.download_dir(release.uri, scratch)
        with contextlib.suppress(FileExistsError, OSError):  # another replica on this node was faster
            Path(scratch).rename(folder)
    if not folder.is_dir():
        raise IntegrityError("cache", folder, "could not be written", "check the cache folder")
    return folder
