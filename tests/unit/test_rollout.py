"""The routing table follows the aliases: prepared everywhere first, published once, the version before kept warm."""

from __future__ import annotations

import asyncio
import random
import runpy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayscale import contract, storage
from rayscale.artifact import Device
from rayscale.errors import ConfigError, IntegrityError, MissingError, UnavailableError
from rayscale.serve import follower as follower_module
from rayscale.serve.batching import Known, Outcome
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.follower import EngineFollower, GatewayFollower, fetch
from rayscale.serve.pools import Pool, PooledEngine
from rayscale.serve.remote import Chunk, LostError, RemoteEngine, Reply
from rayscale.serve.rollout import Canary, Desired, Orders, Report, Rollout, read_desired
from rayscale.serve.table import Release, Table, read_table, write_table

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))


def release(version: int, name: str = "photos") -> Release:
    return Release(name=name, version=version, digest=f"{name}-{version}", uri=f"/store/{name}/{version}")


def known(digest: str) -> Known:
    return Known(card=small["card"](), digest=digest, provider="Fake")


def desired(*releases: Release, **refused: str) -> Desired:
    routes = {f"{r.name}@champion": r for r in releases}
    refusals = {f"{name}@champion": why for name, why in refused.items()}
    return Desired(routes=routes, refused=refusals, names=frozenset({"photos", "faces"}))


def report(replica: str, *prepared: Release, **more: Any) -> Report:
    return Report(replica=replica, prepared=frozenset(r.digest for r in prepared), **more)


ONE, TWO, THREE, OTHER = release(1), release(2), release(3), release(1, "faces")
ROUTE = "photos@champion"


def serving_one() -> Rollout:
    """Two replicas, "a" and "b", that serve version 1."""
    state = Rollout(now=0.0, stale_s=5.0)
    state.desire(desired(ONE), 0.0)
    for replica in ("a", "b"):
        state.sync(report(replica, ONE), 0.0)
    assert state.table.routes == {ROUTE: ((ONE.digest, 1.0),)}
    return state


# --- the state machine


def test_a_new_digest_is_published_when_every_live_replica_has_prepared_it() -> None:
    state = serving_one()
    generation = state.table.generation
    state.desire(desired(TWO), 1.0)
    orders = state.sync(report("a", ONE), 1.0)
    assert orders.prepare == (ONE, TWO)  # what is served comes first
    assert "0 of 2 engines" in orders.held[ROUTE]
    assert state.sync(report("a", ONE, TWO), 2.0).table.routes[ROUTE] == ((ONE.digest, 1.0),)
    orders = state.sync(report("b", ONE, TWO), 2.1)
    assert orders.table.routes == {ROUTE: ((TWO.digest, 1.0),)}
    assert orders.table.generation == generation + 1
    assert orders.held == {}
    assert orders.prepare == (TWO, ONE)  # the champion before is warm


def test_rolling_back_needs_no_preparation() -> None:
    state = serving_one()
    state.desire(desired(TWO), 1.0)
    for replica in ("a", "b"):
        state.sync(report(replica, ONE, TWO), 1.0)
    state.desire(desired(ONE), 2.0)
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    assert set(state.table.versions) == {ONE.digest, TWO.digest}


def test_only_one_version_before_stays_warm() -> None:
    state = serving_one()
    for moment, version in ((1.0, TWO), (2.0, THREE)):
        state.desire(desired(version), moment)
        for replica in ("a", "b"):
            state.sync(report(replica, ONE, TWO, THREE), moment)
    assert set(state.table.versions) == {TWO.digest, THREE.digest}


def test_a_failed_preparation_keeps_the_old_version_and_says_why() -> None:
    state = serving_one()
    state.desire(desired(TWO), 1.0)
    state.sync(report("a", ONE, TWO), 1.0)
    orders = state.sync(report("b", ONE, failed={TWO.digest: "golden is off by 0.3"}), 1.0)
    assert orders.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    assert orders.held[ROUTE] == "photos:2 is refused: golden is off by 0.3"
    assert TWO.digest not in orders.table.versions


def test_a_silent_replica_holds_nothing_up_and_a_live_one_does() -> None:
    state = serving_one()
    state.desire(desired(TWO), 1.0)
    state.sync(report("a", ONE, TWO), 4.9)  # b, last heard at 0.0, still counts
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    state.sync(report("a", ONE, TWO), 5.0)
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)


def test_an_engine_that_cannot_load_what_is_served_holds_nothing_up() -> None:
    state = serving_one()
    state.desire(desired(TWO), 1.0)
    state.sync(report("a", ONE, TWO), 1.0)
    state.sync(report("b", failed={ONE.digest: "CUDA did not start"}), 1.0)
    state.sync(report("a", ONE, TWO), 1.0)
    assert state.table.routes == {ROUTE: ((TWO.digest, 1.0),)}
    pool = state.sync(report("gateway", runs=False), 1.0).pools[""]
    assert (pool.num_engines, pool.failed) == (1, {})


def test_what_an_engine_has_tells_whether_it_answers_and_not_what_it_had() -> None:
    state = serving_one()
    state.desire(desired(TWO), 6.0)  # "b" is silent meanwhile
    state.sync(report("a", ONE, TWO), 6.0)
    assert state.table.routes == {ROUTE: ((TWO.digest, 1.0),)}
    state.sync(report("b", ONE, failed={TWO.digest: "out of memory"}), 7.0)
    state.desire(desired(THREE), 7.0)
    state.sync(report("a", ONE, TWO, THREE), 7.0)
    assert state.table.routes == {ROUTE: ((THREE.digest, 1.0),)}


def test_who_has_most_of_what_is_served_answers() -> None:
    state = serving_one()
    state.desire(desired(ONE, OTHER), 1.0)
    for name in ("a", "b"):  # "b" is of `serving_one`: both are heard
        state.sync(report(name, ONE, OTHER), 1.0)
    assert state.table.routed == {ONE.digest, OTHER.digest}

    def others(*prepared: Release, **known: tuple[Release, ...]) -> bool:
        """Whether an engine that has `prepared` is told that others answer more."""
        fresh = Rollout(state.table, now=0.0, stale_s=5.0)
        for name, has in known.items():
            fresh.sync(report(name, *has), 6.0)
        return fresh.sync(report("me", *prepared), 6.0).others

    assert others(ONE, a=(ONE, OTHER))
    assert others(a=(ONE,))  # it can do nothing, another something
    assert not others(ONE, a=(ONE,))  # the other version is damaged for all of them
    assert not others(ONE, a=(OTHER,))  # each is needed
    assert not others(ONE, a=(ONE, TWO))  # nobody asks for that one
    assert not others(ONE, OTHER, a=(ONE, OTHER))


def test_a_new_version_waits_for_no_engine_that_can_do_less() -> None:
    state = serving_one()
    state.desire(desired(ONE, OTHER), 1.0)
    for name in ("a", "b"):
        state.sync(report(name, ONE, OTHER), 1.0)
    damaged = {OTHER.digest: "digest: expected y"}
    state.desire(desired(TWO, OTHER), 20.0)  # all were replaced meanwhile, and one version is damaged
    state.sync(report("c", ONE, failed=damaged), 20.0)
    state.sync(report("sick", failed={ONE.digest: "CUDA did not start", **damaged}), 20.0)
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    state.sync(report("c", ONE, TWO, failed=damaged), 20.0)
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)


def test_the_first_version_waits_for_each_engine_that_can() -> None:
    for said, published in (({}, False), ({ONE.digest: "CUDA did not start"}, True)):
        state = Rollout(now=0.0, stale_s=5.0)
        state.desire(desired(ONE), 0.0)
        state.sync(report("sick", failed=said), 0.0)
        assert not state.table.routes  # it alone publishes nothing
        state.sync(report("well", ONE), 0.0)
        assert bool(state.table.routes) is published


def test_who_is_told_that_others_answer() -> None:
    state = Rollout(now=0.0, stale_s=5.0, pools={"rare": ("faces",)})
    state.desire(desired(ONE, OTHER), 0.0)
    assert not state.sync(report("e", pool="rare"), 0.0).others  # nobody does
    state.sync(report("a", ONE), 0.0)
    assert not state.sync(report("e", pool="rare"), 0.0).others  # only in another pool
    assert not state.sync(report("a", ONE), 0.0).others  # none but itself
    state.sync(report("e", OTHER, pool="rare"), 0.0)
    assert state.sync(report("f", pool="rare"), 0.0).others
    restarted = Rollout(state.table, now=10.0, stale_s=5.0, pools={"rare": ("faces",)})
    assert restarted.sync(report("f", pool="rare"), 11.0).others  # it has not heard them yet
    assert not restarted.sync(report("f", pool="rare"), 16.0).others


def test_a_target_that_moves_on_is_dropped() -> None:
    state = serving_one()
    state.desire(desired(TWO), 1.0)
    state.desire(desired(THREE), 1.5)
    assert state.sync(report("a", ONE), 2.0).prepare == (ONE, THREE)


def test_a_deleted_alias_closes_its_route_and_an_unusable_one_keeps_it() -> None:
    state = serving_one()
    state.desire(desired(photos="was not published by rayscale"), 1.0)
    assert ROUTE in state.table.routes
    assert state.held() == {ROUTE: "was not published by rayscale"}
    state.desire(Desired(), 2.0)  # an empty registry: rather lost than meant
    assert ROUTE in state.table.routes
    assert "gone from the registry" in state.held()[ROUTE]
    state.desire(desired(), 3.0)
    assert state.table.routes == {}


def test_nothing_moves_while_the_registry_has_not_answered() -> None:
    kept = serving_one().table
    state = Rollout(kept, now=100.0)  # started again, MLflow away
    orders = state.sync(report("new"), 100.0)
    assert (orders.table, orders.prepare) == (kept, (ONE,))


def test_a_restarted_rollout_waits_for_the_replicas_of_its_previous_life() -> None:
    state = Rollout(serving_one().table, now=100.0, stale_s=5.0)
    state.desire(desired(TWO), 100.0)
    state.sync(report("a", ONE, TWO), 100.1)  # b has not been heard yet
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    state.sync(report("b", ONE), 103.0)
    state.sync(report("a", ONE, TWO), 105.1)
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    state.sync(report("b", ONE, TWO), 105.2)
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)


def test_a_lost_table_comes_back_from_the_replicas() -> None:
    table = serving_one().table
    state = Rollout(now=100.0)
    assert state.sync(report("a", ONE, table=table), 100.0).table == table


def test_models_move_independently() -> None:
    state = serving_one()
    state.desire(desired(TWO, OTHER), 1.0)
    for replica in ("a", "b"):
        state.sync(report(replica, ONE, OTHER), 1.0)
    assert state.table.routes == {ROUTE: ((ONE.digest, 1.0),), "faces@champion": ((OTHER.digest, 1.0),)}


# --- two tiers: gateways follow what engines have


def engine(name: str, *prepared: Release, **more: Any) -> Report:
    return report(name, *prepared, known={r.digest: known(r.digest) for r in prepared}, **more)


def engines_of(orders: Orders) -> Pool:
    """What a gateway is told where there is one pool only."""
    assert set(orders.pools) == {""}
    return orders.pools[""]


def gateway(*prepared: Release) -> Report:
    return report("gateway", *prepared, runs=False)


def test_a_gateway_learns_what_the_engines_have_and_the_table_waits_for_all_of_them() -> None:
    state = Rollout(now=0.0)
    state.desire(desired(ONE), 0.0)
    orders = state.sync(gateway(), 0.0)
    assert (engines_of(orders).num_engines, engines_of(orders).known, orders.table.routes) == (0, {}, {})
    assert state.sync(engine("e1", ONE), 0.0).pools == {}  # an engine has its own
    orders = state.sync(gateway(), 0.0)
    assert engines_of(orders).known == {ONE.digest: known(ONE.digest)}
    assert state.sync(gateway(ONE), 0.0).table.routes == {ROUTE: ((ONE.digest, 1.0),)}
    state.desire(desired(TWO), 1.0)
    state.sync(engine("e2", ONE), 1.0)
    state.sync(engine("e1", ONE, TWO), 1.0)
    orders = state.sync(gateway(ONE, TWO), 1.0)
    assert (engines_of(orders).num_engines, set(engines_of(orders).known)) == (2, {ONE.digest, TWO.digest})
    assert orders.table.routes[ROUTE] == ((ONE.digest, 1.0),)  # e2 could not answer yet
    state.sync(engine("e2", ONE, TWO), 1.5)
    assert state.sync(gateway(ONE, TWO), 1.5).table.routes[ROUTE] == ((TWO.digest, 1.0),)


def test_sleeping_engines_are_known_and_failing_ones_are_named() -> None:
    state = Rollout(now=0.0)
    state.desire(desired(ONE), 0.0)
    state.sync(engine("e1", ONE), 0.0)
    state.sync(gateway(ONE), 0.0)
    asleep = engines_of(state.sync(gateway(ONE), 9.0))
    assert (asleep.num_engines, set(asleep.known), asleep.failed) == (0, {ONE.digest}, {})
    why = "device=cuda: CUDA did not start"
    state.sync(engine("e2", failed={ONE.digest: why}), 9.0)
    awake = engines_of(state.sync(gateway(ONE), 9.0))
    assert (awake.num_engines, awake.known, awake.failed) == (1, {}, {ONE.digest: why})
    state.sync(engine("e3", ONE), 9.0)
    assert engines_of(state.sync(gateway(ONE), 9.0)).failed == {}  # one of them can


# --- a version that fails is rolled back


def counted(replica: str, ok: int, failed: int, **more: Any) -> Report:
    return report(replica, ONE, TWO, outcomes={TWO.digest: Outcome(ok, failed)}, **more)


def on_trial() -> Rollout:
    """Replicas "a" and "b" serve version 2 since 1.0, in place of version 1; "a" had failed 50 times before."""
    state = serving_one()
    state.desire(desired(TWO), 1.0)
    for replica, failed in (("a", 50), ("b", 0)):
        state.sync(counted(replica, 0, failed), 1.0)
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)
    return state


def test_a_version_that_fails_on_probation_is_rolled_back_until_its_alias_moves() -> None:
    state = on_trial()
    state.sync(counted("a", 10, 52), 2.0)
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)
    orders = state.sync(counted("b", 5, 3), 2.0)
    assert orders.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    assert orders.held == {ROUTE: "photos:2 was rolled back: 5 of 20 runs failed"}
    state.desire(desired(TWO), 3.0)  # the alias still says so
    again = Rollout(contract.loads(Table, contract.dumps(state.table), "table"), now=50.0, stale_s=5.0)
    for rollout in (state, again):  # and after a restart
        rollout.desire(desired(TWO), 60.0)
        rollout.sync(counted("a", 10, 52), 60.0)
        assert rollout.table.routes[ROUTE] == ((ONE.digest, 1.0),)
        assert "was rolled back" in rollout.held()[ROUTE]
    state.desire(desired(ONE), 61.0)
    assert (state.held(), state.table.rolled_back) == ({}, {})
    state.desire(desired(TWO), 62.0)  # once more, on purpose
    assert state.sync(counted("a", 10, 52), 62.0).table.routes[ROUTE] == ((TWO.digest, 1.0),)


@pytest.mark.parametrize(
    ("ok", "failed", "now"), [(0, 4, 2.0), (100, 6, 2.0), (0, 100, 601.0)], ids=["few", "rare", "later"]
)
def test_what_is_no_jump_of_errors_stays(ok: int, failed: int, now: float) -> None:
    state = on_trial()
    state.sync(counted("b", ok, failed), now)
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)


def test_engines_that_die_of_a_version_count_against_it() -> None:
    state = on_trial()
    state.sync(counted("gateway", 0, 7, runs=False), 1.5)  # what it counted before it was heard is of former days
    assert state.table.routes[ROUTE] == ((TWO.digest, 1.0),)
    state.sync(counted("gateway", 0, 12, runs=False), 2.0)
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)


def test_the_first_version_has_nothing_to_go_back_to() -> None:
    state = serving_one()
    state.sync(report("a", ONE, outcomes={ONE.digest: Outcome(0, 99)}), 1.0)
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)


# --- the table


def test_a_route_with_two_weights_draws_from_both() -> None:
    table = Table(
        routes={ROUTE: ((ONE.digest, 0.9), (TWO.digest, 0.1))}, versions={r.digest: r for r in (ONE, TWO)}
    )  # a canary
    assert [table.pick(ROUTE, draw) for draw in (0.0, 0.89, 0.91, 0.999999)] == [ONE, ONE, TWO, TWO]
    with pytest.raises(MissingError, match="did you mean 'photos@champion'"):
        table.pick("photo@champion", 0.0)


def test_the_table_survives_a_restart(tmp_path: Path) -> None:
    store = storage.open_store(tmp_path / "state")
    assert read_table(store, "table.json") == Table()
    table = serving_one().table
    write_table(store, "table.json", table)
    assert read_table(store, "table.json") == table
    newer = contract.dumps(table).replace('"schema": 1', '"schema": 2')
    store.write("table.json", newer.encode())
    with pytest.raises(ConfigError, match="upgrade"):
        read_table(store, "table.json")


# --- the registry


@dataclass
class FakeRegistry:
    """Reference -> release, or the error that resolving it raises."""

    known: dict[str, Release | Exception]

    def standing(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for reference in sorted(self.known):
            name, _, alias = reference.partition("@")
            found.setdefault(name, {})[alias] = getattr(self.known[reference], "version", 0)
        return found

    def resolve(self, reference: str) -> Release:
        match self.known.get(reference):
            case Release() as found:
                return found
            case Exception() as error:
                raise error
        raise MissingError("alias", reference, "no such alias", "set it")


def test_what_to_serve_is_read_by_name_and_by_pattern() -> None:
    foreign = ConfigError("model", "x@champion", "has no digest", "publish it")
    registry = FakeRegistry({ROUTE: ONE, "photos@beta": TWO, "faces@champion": OTHER, "x@champion": foreign})
    everything = read_desired(registry, ("*@champion", "photos@beta"))  # type: ignore[arg-type]
    assert everything.routes == {ROUTE: ONE, "faces@champion": OTHER, "photos@beta": TWO}
    assert "has no digest" in everything.refused["x@champion"]
    assert read_desired(registry, ("photos",)).routes == {ROUTE: ONE}  # type: ignore[arg-type]
    assert read_desired(registry, ("absent@champion",)).routes == {}  # type: ignore[arg-type]
    assert everything.names == {"photos", "faces", "x"}


# --- a replica's side


class FakeEngine:
    """Prepares what it is told to, unless a digest is in `broken`."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.batches: Counter[tuple[str, str, int]] = Counter()

    def take_batches(self) -> Counter[tuple[str, str, int]]:
        taken, self.batches = self.batches, Counter()
        return taken

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self.loaded)

    def prepare(self, digest: str, folder: Path) -> None:
        if digest in self.broken:
            raise self.broken[digest]
        self.loaded.add(digest)

    def forget(self, digest: str) -> None:
        self.loaded.discard(digest)

    def known(self) -> dict[str, Known]:
        return {digest: known(digest) for digest in self.loaded}

    def outcomes(self) -> dict[str, Outcome]:
        return {}

    def session(self, digest: str) -> FakeEngine:
        return self

    provider = "Fake"


class FakeMeters:
    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.values: list[tuple[str, float]] = []

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        self.seen.append((name, labels))
        self.values.append((name, value))


class Replica:
    """A follower on fakes, in step with a rollout whose clock stands still."""

    def __init__(self, state: Rollout, folder: Path, grace_s: float = 0.0, name: str = "r") -> None:
        self.state, self.engine, self.meters, self.away = state, FakeEngine(), FakeMeters(), False
        self.fetched: list[str] = []

        def fetch(wanted: Release) -> Path:
            self.fetched.append(wanted.digest)
            (folder / wanted.digest).mkdir(exist_ok=True)
            return folder / wanted.digest

        async def sync(said: Report) -> Orders:
            if self.away:
                raise UnavailableError("rollout", "away", "does not answer", "wait")
            return state.sync(said, 0.0)

        self.follower = EngineFollower(
            name, self.engine, sync, fetch, ThreadPoolExecutor(1), self.meters, grace_s=grace_s  # type: ignore[arg-type]
        )  # fmt: skip

    async def steps(self, count: int = 6) -> None:
        for _ in range(count):
            await self.follower.step()
            await asyncio.sleep(0.02)


def test_a_replica_is_ready_once_it_has_prepared_its_table(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        replica = Replica(state, tmp_path)
        assert replica.follower.reason
        await replica.follower.step()
        assert "the registry has not answered yet" in replica.follower.reason
        state.desire(desired(), 0.0)
        await replica.follower.step()
        assert "no model is promoted" in replica.follower.reason
        state.desire(desired(ONE), 0.0)
        await replica.follower.step()
        assert "photos:1 is being prepared" in replica.follower.reason
        await replica.steps()
        assert replica.follower.reason == ""
        assert replica.follower.table.pick(ROUTE, 0.0) == ONE
        assert ("rayscale_model_swaps_total", {"model": "photos", "result": "prepared"}) in replica.meters.seen

    asyncio.run(main())


def test_what_an_engine_ran_is_counted_by_model_and_size_of_batch(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        state.desire(desired(ONE), 0.0)
        replica = Replica(state, tmp_path)
        await replica.steps()
        replica.engine.batches.update({(ONE.digest, "Fake", 1): 5, (ONE.digest, "Fake", 4): 2})
        await replica.steps(2)  # told once
        counted = [(name, value) for name, value in replica.meters.values if name != "rayscale_model_swaps_total"]
        batches, tiles = "rayscale_batches_total", "rayscale_tiles_total"
        assert counted == [(batches, 5), (tiles, 5), (batches, 2), (tiles, 8)]
        assert (batches, {"model": "photos", "provider": "Fake", "items": "4"}) in replica.meters.seen

    asyncio.run(main())


def test_a_replica_keeps_the_old_table_until_it_has_all_of_the_new_one(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        state.desire(desired(ONE), 0.0)
        replica = Replica(state, tmp_path)
        await replica.steps()
        old = replica.follower.table
        state.table = Table(generation=9, routes={ROUTE: ((TWO.digest, 1.0),)}, versions={TWO.digest: TWO})
        state.desire(desired(TWO), 0.0)  # published behind its back, as when it had been silent
        await replica.follower.step()
        assert (replica.follower.table, replica.follower.reason) == (old, "")
        await replica.steps()
        assert replica.follower.table.generation == 9
        assert replica.engine.digests == {TWO.digest}  # the unnamed one was let go

    asyncio.run(main())


def test_a_canary_that_a_replica_cannot_load_holds_it_up_no_more_than_it_must(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        beside = {ROUTE: Canary(release=TWO, weight=0.5, key="k")}
        state.desire(replace(desired(ONE), canaries=beside), 0.0)
        state.sync(report("other", ONE, TWO), 0.0)
        assert len(state.table.routes[ROUTE]) == 2
        replica = Replica(state, tmp_path)
        replica.engine.broken[TWO.digest] = IntegrityError("digest", "x", "expected y", "fetch again")
        await replica.steps()
        assert (replica.follower.reason, replica.engine.digests) == ("", {ONE.digest})
        assert [replica.follower.table.pick(ROUTE, draw) for draw in (0.1, 0.9)] == [ONE, ONE]
        whole = Replica(state, tmp_path)  # control
        await whole.steps()
        assert [whole.follower.table.pick(ROUTE, draw) for draw in (0.1, 0.9)] == [ONE, TWO]

    asyncio.run(main())


def test_a_damaged_artifact_is_refused_fetched_anew_and_taken_once_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "RETRY_FIRST_S", 0.05)

    async def main() -> None:
        state = Rollout(now=0.0)
        state.desire(desired(ONE), 0.0)
        replica = Replica(state, tmp_path)
        await replica.steps()
        replica.engine.broken[TWO.digest] = IntegrityError("digest", "x", "expected y", "fetch again")
        state.desire(desired(TWO), 0.0)
        await replica.steps(2)
        await replica.follower.step()
        assert "expected y" in replica.follower.held[ROUTE]
        assert replica.follower.table.pick(ROUTE, 0.0) == ONE
        assert not (tmp_path / TWO.digest).exists()  # the bad copy does not stay in the cache
        replica.engine.broken.clear()
        await replica.steps(10)
        assert replica.follower.table.pick(ROUTE, 0.0) == TWO
        assert replica.fetched.count(TWO.digest) > 1
        refused = ("rayscale_model_swaps_total", {"model": "photos", "result": "refused"})
        assert replica.meters.seen.count(refused) == 1

    asyncio.run(main())


def test_a_rollout_that_is_away_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        state.desire(desired(ONE), 0.0)
        replica = Replica(state, tmp_path)
        await replica.steps()
        replica.away = True
        task = asyncio.create_task(replica.follower.follow(0.01))
        await asyncio.sleep(0.05)
        assert not task.done()
        assert (replica.follower.reason, replica.follower.table) == ("", state.table)
        task.cancel()

    asyncio.run(main())


def test_starting_waits_for_what_there_is_and_for_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        async with asyncio.timeout(1):
            await Replica(state, tmp_path).follower.start(wait_s=30, interval_s=0.01)  # nothing is promoted
        state.desire(desired(ONE), 0.0)
        replica = Replica(state, tmp_path)
        async with asyncio.timeout(1):
            await replica.follower.start(wait_s=30, interval_s=0.01)
        assert replica.follower.reason == ""
        replica = Replica(state, tmp_path)
        replica.engine.broken[ONE.digest] = IntegrityError("digest", "x", "expected y", "fetch again")
        async with asyncio.timeout(1):
            await replica.follower.start(wait_s=0.1, interval_s=0.01)  # then it says why it is not ready
        assert "expected y" in replica.follower.reason

    asyncio.run(main())


@pytest.mark.parametrize("mended", [False, True])
def test_who_is_not_ready_stays_out_while_others_are(tmp_path: Path, mended: bool) -> None:
    async def main() -> str:
        state = Rollout(now=0.0)
        state.desire(desired(ONE), 0.0)
        state.sync(report("other", ONE), 0.0)
        replica = Replica(state, tmp_path)
        replica.engine.broken[ONE.digest] = ConfigError("device", "cuda", "CUDA did not start", "mend it")
        start = asyncio.create_task(replica.follower.start(wait_s=0.05, interval_s=0.01))
        await asyncio.sleep(0.3)
        assert not start.done()  # the control, with no other, is the test before
        if mended:
            del replica.engine.broken[ONE.digest]
        else:
            state.sync(report("other"), 0.0)  # nobody answers: now it says why
        async with asyncio.timeout(5):
            await start
        return replica.follower.reason

    assert asyncio.run(main()) == ("" if mended else "preparing photos:1; device=cuda: CUDA did not start; mend it")


def test_what_is_damaged_takes_nothing_else_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All replicas start anew, and one of two champions cannot be loaded."""
    monkeypatch.setattr(follower_module, "RETRY_FIRST_S", 0.2)
    table = Table(
        generation=3,
        routes={ROUTE: ((ONE.digest, 1.0),), "faces@champion": ((OTHER.digest, 1.0),)},
        versions={r.digest: r for r in (ONE, OTHER)},
    )

    async def main() -> None:
        state = Rollout(table, now=-10.0)
        state.desire(desired(ONE, OTHER), 0.0)
        first, second, third = (Replica(state, tmp_path, name=name) for name in ("first", "second", "third"))
        for replica in (first, second):
            replica.engine.broken[OTHER.digest] = IntegrityError("digest", "x", "expected y", "fetch again")
        async with asyncio.timeout(5):
            await first.follower.start(wait_s=30, interval_s=0.01)
            assert first.engine.digests == {ONE.digest}  # it has tried both
            await second.follower.start(wait_s=30, interval_s=0.01)  # who can do as much comes in as well
        for replica in (first, second):
            assert list(replica.follower.held) == ["faces@champion"]
            assert "expected y" in replica.follower.held["faces@champion"]
            assert replica.follower.table.pick(ROUTE, 0.0) == ONE
            replica.follower.check()
        await third.follower.start(wait_s=30, interval_s=0.01)  # and one that can do more
        assert (third.follower.held, third.engine.digests) == ({}, {ONE.digest, OTHER.digest})
        fourth = Replica(state, tmp_path, name="fourth")  # then no more that can do less
        fourth.engine.broken = dict(second.engine.broken)
        start = asyncio.create_task(fourth.follower.start(wait_s=0.05, interval_s=0.01))
        await asyncio.sleep(0.3)
        assert not start.done()
        await first.follower.step()
        first.follower.check()  # what it answers it goes on answering
        for replica in (first, fourth):
            replica.engine.broken.clear()
        async with asyncio.timeout(10):
            await start
            while first.follower.held:
                await first.follower.step()
                await asyncio.sleep(0.05)
        assert fourth.follower.held == {}

    asyncio.run(main())


def test_who_came_in_while_nobody_answered_leaves_once_others_do(tmp_path: Path) -> None:
    async def main() -> None:
        state = Rollout(now=0.0)
        state.desire(desired(ONE), 0.0)
        replica = Replica(state, tmp_path)
        replica.engine.broken[ONE.digest] = ConfigError("device", "cuda", "CUDA did not start", "mend it")
        await replica.follower.start(wait_s=0.05, interval_s=0.01)
        replica.follower.check()  # somebody must say why
        state.sync(report("other", ONE), 0.0)
        await replica.follower.step()
        with pytest.raises(UnavailableError, match="CUDA did not start; mend it; others answer"):
            replica.follower.check()
        del replica.engine.broken[ONE.digest]
        async with asyncio.timeout(10):
            while replica.follower.reason:
                await replica.follower.step()
                await asyncio.sleep(0.05)
        replica.follower.check()

    asyncio.run(main())


async def never(chunk: Chunk, large: bool) -> Reply:
    raise AssertionError("nothing is asked here")


def test_a_gateway_is_as_ready_as_its_engines_and_wakes_them() -> None:
    async def main() -> None:
        state, woken = Rollout(now=0.0), 0

        def wake() -> None:
            nonlocal woken
            woken += 1

        async def sync(said: Report) -> Orders:
            return state.sync(said, clock)

        clock, remote = 0.0, RemoteEngine(EngineSettings(), never, wake)
        follower = GatewayFollower("gateway", PooledEngine({"": remote}), sync, grace_s=0.0)
        state.desire(desired(ONE), 0.0)
        await follower.step()
        assert woken == 1  # no engine runs, and one is needed to prepare
        assert "photos:1 is being prepared" in follower.reason
        state.sync(engine("e1", failed={ONE.digest: "CUDA did not start"}), 0.0)
        await follower.step()
        assert "CUDA did not start" in follower.reason
        state.sync(engine("e1", ONE), 0.0)
        await follower.step()
        assert (follower.reason, woken) == ("", 1)
        assert follower.table.pick(ROUTE, 0.0) == ONE
        clock = 9.0
        await follower.step()  # all asleep: a request wakes one
        assert (follower.reason, woken) == ("", 1)
        state.sync(engine("e2", failed={ONE.digest: "CUDA did not start"}), 9.0)
        await follower.step()
        assert follower.reason == "preparing photos:1; CUDA did not start"

    asyncio.run(main())


def test_a_gateway_forgets_what_no_table_names_once_its_requests_are_over() -> None:
    async def main(grace_s: float) -> tuple[set[str], set[str]]:
        """What a gateway knows, and whose failures it counts, after twenty promotions."""
        state, remote = Rollout(now=0.0), RemoteEngine(EngineSettings(), dies, lambda: None)

        async def sync(said: Report) -> Orders:
            return state.sync(said, 0.0)

        follower = GatewayFollower("gateway", PooledEngine({"": remote}), sync, grace_s=grace_s)
        for version in range(20):
            state.desire(desired(release(version)), 0.0)
            state.sync(engine("e1", *(release(v) for v in range(version + 1))), 0.0)
            await follower.step()
            with pytest.raises(UnavailableError, match="two engines died"):
                await remote.call(release(version).digest, {"image": np.zeros((1, 3, 8, 8), np.float32)}, deadline=1e9)
            if version:
                remote.session(release(version - 1).digest)  # the one before is warm
        return set(remote.known()), set(remote.outcomes())

    knows, counts = asyncio.run(main(0.0))
    assert knows == counts == {release(18).digest, release(19).digest}
    knows, counts = asyncio.run(main(60.0))  # control: requests that began with one still know it
    assert len(knows) == len(counts) == 20


async def dies(chunk: Chunk) -> Reply:
    raise LostError(f"engine {random.random()}")


def test_a_gpu_that_was_asked_for_and_not_obtained_is_not_ready_and_says_why(tmp_path: Path) -> None:
    digest = small["write"](tmp_path / "a")
    wanted = Release(name="photos", version=1, digest=digest, uri=str(tmp_path / "a"))

    async def main(device: Device) -> tuple[str, str, bool]:
        state, remote = Rollout(now=0.0), RemoteEngine(EngineSettings(), never, lambda: None)
        state.desire(desired(wanted), 0.0)

        async def sync(said: Report) -> Orders:
            return state.sync(said, 0.0)

        engine = Engine(EngineSettings(device=device, threads=1))
        own = EngineFollower(
            "e", engine, sync, lambda r: tmp_path / "a", ThreadPoolExecutor(1), FakeMeters(), grace_s=0
        )
        gateway = GatewayFollower("g", PooledEngine({"": remote}), sync, grace_s=0.0)
        try:
            await own.start(wait_s=0.3, interval_s=0.05)  # one tier: the gateway itself
            await gateway.step()  # two tiers: the gateway before it
            return own.reason, gateway.reason, digest in state.sync(report("x"), 0.0).table.routed
        finally:
            engine.close()

    own, before, routed = asyncio.run(main("cuda"))
    assert "device=cuda: CUDA did not start" in own
    assert "device=cuda: CUDA did not start" in before
    assert not routed
    assert asyncio.run(main("auto"))[:2] == ("", "")  # it may take the CPU


def test_an_artifact_is_fetched_once(tmp_path: Path) -> None:
    source, cache = tmp_path / "store", tmp_path / "cache"
    source.mkdir()
    (source / "card.json").write_text("{}")
    wanted = Release(name="photos", version=1, digest="d" * 64, uri=source.as_uri())
    folder = fetch(wanted, cache, None)
    assert (folder / "card.json").read_text() == "{}"
    (source / "card.json").unlink()
    assert fetch(wanted, cache, None) == folder
    assert [p.name for p in cache.iterdir()] == ["d" * 64]
