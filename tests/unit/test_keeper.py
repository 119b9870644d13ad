"""The table outlives the process that made it, while the registry is away, and serves on a machine that has nothing."""

from __future__ import annotations

import asyncio
import contextlib
import runpy
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rayscale import artifact, imaging, storage
from rayscale.errors import UnavailableError
from rayscale.registry.models import Registry
from rayscale.serve import keeper as keeper_module
from rayscale.serve.batching import Outcome
from rayscale.serve.engine import Canvas, Engine, EngineSettings, plan
from rayscale.serve.follower import EngineFollower, fetch
from rayscale.serve.keeper import TABLE, Keeper, RegistrySource, Source
from rayscale.serve.rollout import Desired, Ending, Report, Rollout
from rayscale.serve.table import Release, Table, read_table

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
ONE, TWO = (Release(name="photos", version=v, digest=f"d{v}", uri=f"/store/{v}") for v in (1, 2))
ROUTE = "photos@champion"


class FakeSource:
    """A registry that says where the alias points, that it is away, or nothing for a while."""

    def __init__(self, champion: Release | None = None) -> None:
        self.champion = champion
        self.told: list[Ending] = []
        self.answers = threading.Event()
        self.answers.set()

    def ask(self) -> Desired:
        self.answers.wait(20)
        if self.champion is None:
            raise UnavailableError("registry", "away", "does not answer", "wait")
        return Desired(routes={ROUTE: self.champion}, names=frozenset({"photos"}))

    def tell(self, ending: Ending) -> None:
        self.told.append(ending)


class KeepsAfterReading(Keeper):
    """What it was before: a registry that is away keeps the table from the store."""

    async def _keep(self) -> None:
        await asyncio.to_thread(self._source.ask)
        await super()._keep()


def new(table: Table) -> Rollout:
    return Rollout(table, now=time.monotonic(), stale_s=0.2)


@contextlib.asynccontextmanager
async def running(source: Source, folder: Path, kind: type[Keeper] = Keeper) -> AsyncIterator[Keeper]:
    keeper = kind(source, storage.open_store(folder), new, poll_s=0.01)
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def report(failed: int = 0) -> Report:
    both = frozenset({ONE.digest, TWO.digest})
    return Report(replica="r", prepared=both, outcomes={TWO.digest: Outcome(0, failed)})


def kept(folder: Path) -> Table:
    return read_table(storage.open_store(folder), TABLE)


async def roll_back_while_away(folder: Path, kind: type[Keeper]) -> str:
    """Version 2 follows 1 and fails when the registry is away already: who answers after a full restart."""
    source = FakeSource(ONE)
    async with running(source, folder, kind) as keeper:
        await keeper.sync(report())
        await until(lambda: ONE.digest in kept(folder).routed)
        source.champion = TWO
        while (await keeper.sync(report())).table.routed != {TWO.digest}:
            await asyncio.sleep(0.01)
        await until(lambda: TWO.digest in kept(folder).routed)
        source.champion = None
        orders = await keeper.sync(report(failed=20))
        assert orders.table.routed == {ONE.digest}
        with contextlib.suppress(TimeoutError):
            await until(lambda: ONE.digest in kept(folder).routed, 1.0)
    async with running(FakeSource(None), folder) as keeper:  # no replica lived that would remember
        orders = await keeper.sync(Report(replica="new"))
        assert ("was rolled back" in str(orders.table.rolled_back)) == (orders.table.routed == {ONE.digest})
        (digest,) = orders.table.routed
        return digest


def test_a_rollback_that_the_registry_did_not_hear_of_survives_a_restart(tmp_path: Path) -> None:
    assert asyncio.run(roll_back_while_away(tmp_path / "now", Keeper)) == ONE.digest
    before = asyncio.run(roll_back_while_away(tmp_path / "before", KeepsAfterReading))
    assert before == TWO.digest  # control: the bad one would serve again


def test_what_was_rolled_back_is_told_when_the_registry_answers_again(tmp_path: Path) -> None:
    async def main() -> None:
        source = FakeSource(ONE)
        async with running(source, tmp_path) as keeper:
            await keeper.sync(report())
            source.champion = TWO
            while (await keeper.sync(report())).table.routed != {TWO.digest}:
                await asyncio.sleep(0.01)
            source.champion = None
            await keeper.sync(report(failed=20))
            source.champion = TWO
            await until(lambda: bool(source.told))
            (ending,) = source.told
            assert (ending.release, ending.instead) == (TWO, ONE)

    asyncio.run(main())


def test_a_registry_that_does_not_even_refuse_holds_neither_table_nor_replica_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "PATIENCE_S", 0.1)

    async def main() -> None:
        source = FakeSource(ONE)
        async with running(source, tmp_path) as keeper:
            await keeper.sync(report())
            await until(lambda: kept(tmp_path).generation == 1)
            source.answers.clear()  # from now on it is silent
            await asyncio.sleep(0.05)
            newer = Table(generation=7, routes={ROUTE: ((TWO.digest, 1.0),)}, versions={TWO.digest: TWO})
            await keeper.sync(Report(replica="r", table=newer))
            await until(lambda: kept(tmp_path).generation == 7)
            async with running(source, tmp_path) as again, asyncio.timeout(10):
                assert (await again.sync(Report(replica="new"))).table == newer
            async with running(source, tmp_path / "empty") as nothing:  # no table: the registry is waited for
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(nothing.sync(Report(replica="new")), 0.5)
        source.answers.set()

    asyncio.run(main())


def test_a_store_that_is_away_holds_no_promotion_up_and_gets_the_table_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        source = FakeSource(ONE)
        async with running(source, tmp_path / "state") as keeper:
            await keeper.sync(report())
            await until(lambda: kept(tmp_path / "state").generation == 1)
            shutil.rmtree(tmp_path / "state")
            (tmp_path / "state").write_text("no folder")
            source.champion = TWO
            while (await keeper.sync(report())).table.routed != {TWO.digest}:
                await asyncio.sleep(0.01)
            await until(lambda: "the table is not kept" in caplog.text)
            await asyncio.sleep(0.1)
            (tmp_path / "state").unlink()
            await until(lambda: TWO.digest in kept(tmp_path / "state").routed)
        assert caplog.text.count("the table is not kept") == 1

    asyncio.run(main())


def test_the_last_table_serves_on_a_new_machine_while_mlflow_is_away(
    tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry, an artifact store, an engine: then all but the store is new, and MLflow does not answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{closed.getsockname()[1]}"
    registry = Registry(f"sqlite:///{shutil.copy(mlflow_template, tmp_path)}")
    digest = small["write"](tmp_path / "artifact")
    registry.publish("photos", tmp_path / "artifact")
    registry.client.set_registered_model_alias("photos", "champion", "1")
    shutil.rmtree(tmp_path / "artifact")  # what is fetched is the store's
    hwc = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)

    async def machine(name: str, tracking_uri: str, state: str) -> tuple[str, np.ndarray | None]:
        """One that starts with nothing but a table's store: why it is not ready, and what it answers."""
        engine, cache = Engine(EngineSettings(threads=1, device="cpu")), tmp_path / name
        source = RegistrySource(tracking_uri, ("*@champion",))
        try:
            async with running(source, tmp_path / state) as keeper:
                meters = type("Nowhere", (), {"add": lambda *_, **__: None})()
                get = partial(fetch, cache=cache, tracking_uri=tracking_uri)
                replica = EngineFollower(
                    name, engine, keeper.sync, get, ThreadPoolExecutor(1), meters, grace_s=0.0  # type: ignore[arg-type]
                )  # fmt: skip
                await replica.start(wait_s=20.0, interval_s=0.02)
                if replica.reason:
                    return replica.reason, None
                await until(lambda: kept(tmp_path / state).generation > 0)
                release = replica.table.pick(ROUTE, 0.0)
                canvas = Canvas(plan(engine.session(release.digest).card.spec, 20, 30, engine.settings), hwc)
                await engine.run(release.digest, canvas.tiles, canvas.place, deadline=time.monotonic() + 20)
                assert [folder.name for folder in cache.iterdir()] == [digest]
                return "", canvas.result
        finally:
            engine.close()

    async def main() -> None:
        why, first = await machine("first", registry.uri, "state")
        assert (why, first is None) == ("", False)
        why, again = await machine("second", away, "state")
        assert why == ""
        np.testing.assert_array_equal(again, first)
        session = artifact.load(tmp_path / "second" / digest, expect_digest=digest, device="cpu", threads=1)
        (said,) = session.run({"image": imaging.to_nchw_f32(hwc)}).values()
        np.testing.assert_array_equal(again, imaging.to_hwc_u8(said))
        why, nothing = await machine("third", away, "no-table")  # control: the table is what it started from
        assert (bool(why), nothing) == (True, None)

    with pytest.raises(UnavailableError):
        Registry(away).standing()  # control: it is away
    asyncio.run(main())
