"""Pools of engines: each has its own models, readiness, backlog and sleep, and holds no other up."""

from __future__ import annotations

import asyncio
import io
import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from rayscale.errors import ConfigError, UnavailableError
from rayscale.serve import remote
from rayscale.serve.api import create_app
from rayscale.serve.batching import Known
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.follower import EngineFollower, GatewayFollower
from rayscale.serve.gateway import Gateway, GatewaySettings
from rayscale.serve.pools import Pool, PooledEngine, deployment_of, pool_of
from rayscale.serve.remote import Chunk, RemoteEngine, Reply
from rayscale.serve.rollout import Desired, Orders, Report, Rollout
from rayscale.serve.table import Release, Table

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
POOLS = {"rare": ("gan-*",)}
PHOTOS, GAN = "photos@champion", "gan-x@champion"


def release(version: int, name: str = "photos") -> Release:
    return Release(name=name, version=version, digest=f"{name}-{version}", uri=f"/store/{name}/{version}")


ONE, TWO, RARE, RARE_TWO = release(1), release(2), release(1, "gan-x"), release(2, "gan-x")


def desired(*releases: Release) -> Desired:
    return Desired(routes={f"{r.name}@champion": r for r in releases}, names=frozenset({"photos", "gan-x"}))


def engine(name: str, pool: str, *prepared: Release, **more: Any) -> Report:
    known = {r.digest: Known(card=small["card"](), digest=r.digest, provider="Fake") for r in prepared}
    return Report(replica=name, pool=pool, prepared=frozenset(known), known=known, **more)


class Meters:
    def add(self, *_: Any, **__: Any) -> None: ...


# --- which model is whose


def test_a_model_is_in_the_first_pool_that_names_it_or_in_none() -> None:
    assert [pool_of(name, POOLS) for name in ("gan-x", "photos", "a-gan-x")] == ["rare", "", ""]
    assert [pool_of("photos", pools) for pools in ({}, {"all": ("*",)})] == ["", "all"]
    assert [deployment_of(pool) for pool in ("", "rare")] == ["Engine", "Engine-rare"]


@pytest.mark.parametrize(
    ("engines", "says"),
    [
        ({"pools": POOLS}, "={'rare': ('gan-*',)}: has no effect with one tier; set tiers: two"),
        ({"pools": {"rare": ["gna-*"]}}, ".rare=gna-*: is not among args.models; did you mean 'gan-*'?"),
        ({"pools": {"rare": ["gan-x@champion"]}},
         ".rare=gan-x@champion: is no model's name: all versions of a model share a pool; say gan-x"),
        ({"pools": {"a": ["gan-x"], "b": ["faces", "gan-*"]}},
         ".a=gan-x: its models are in the pool b too; name each model in one pool"),
        ({"pools": {"Rare#1": ["gan-x"]}},
         "=Rare#1: a pool's name is at most 30 small letters, digits and dashes; its deployment is Engine-NAME"),
        ({"pools": {"rare": []}}, ".rare=[]: has no models; name some, or leave the pool out"),
    ],
    ids=["one tier", "not served", "an alias", "in two", "a bad name", "empty"],
)  # fmt: skip
def test_pools_that_could_not_be_meant_are_one_line(engines: dict[str, Any], says: str) -> None:
    from rayscale.serve.app import AppArgs

    args = {"models": ["photos@champion", "gan-*@champion", "faces@beta"]}
    tiers = {} if "one tier" in says else {"tiers": "two"}
    with pytest.raises(ConfigError) as error:
        AppArgs.model_validate({**args, "engines": {**tiers, **engines}})
    assert str(error.value) == f"args.engines.pools{says}"
    found = AppArgs.model_validate({**args, "engines": {"tiers": "two", "pools": {"rare": ["gan-x"], "b": ["faces"]}}})
    assert found.engines.pools == {"rare": ("gan-x",), "b": ("faces",)}  # control
    AppArgs.model_validate({"engines": {"tiers": "two", "pools": POOLS}})  # of all models


def test_an_application_has_an_engine_deployment_for_every_pool() -> None:
    from ray.serve._private.build_app import build_app

    from rayscale.serve.app import AppArgs, build

    def names(**engines: Any) -> list[str]:
        args = AppArgs.model_validate({"models": ["*@champion"], "engines": engines})
        return sorted(d.name for d in build_app(build(args), name="a").deployments)

    assert names() == ["Gateway", "Rollout"]
    assert names(tiers="two") == ["Engine", "Gateway", "Rollout"]
    assert names(tiers="two", pools=POOLS) == ["Engine", "Engine-rare", "Gateway", "Rollout"]


# --- the rollout


def test_a_version_waits_for_the_engines_of_its_pool_alone() -> None:
    def after(pools: dict[str, tuple[str, ...]]) -> tuple[set[str], dict[str, str]]:
        """What is published, and what is held, when the engines of "" have theirs and that of "rare" has nothing."""
        state = Rollout(now=0.0, pools=pools)
        state.desire(desired(ONE, RARE), 0.0)
        state.sync(engine("r1", "rare" if pools else ""), 0.0)
        orders = state.sync(engine("e1", "", ONE), 0.0)
        return set(orders.table.routes), dict(orders.held)

    assert after(POOLS) == ({PHOTOS}, {GAN: "gan-x:1 is being prepared: 0 of 1 engines are ready"})
    assert after({})[0] == set()  # control: one pool waits for all of its engines


def test_engines_prepare_what_is_theirs() -> None:
    state = Rollout(now=0.0, pools=POOLS)
    state.desire(desired(ONE, RARE), 0.0)
    state.sync(engine("e1", "", ONE), 0.0)
    state.sync(engine("r1", "rare", RARE), 0.0)
    state.desire(desired(TWO, RARE), 0.0)
    assert state.sync(engine("e1", "", ONE), 0.0).prepare == (ONE, TWO)
    assert state.sync(engine("r1", "rare", RARE), 0.0).prepare == (RARE,)


def test_gateways_are_told_of_every_pool_by_itself() -> None:
    state = Rollout(now=0.0, pools=POOLS)
    state.desire(desired(ONE, RARE), 0.0)
    state.sync(engine("e1", "", ONE), 0.0)
    state.sync(engine("e2", "", ONE), 0.0)
    state.sync(engine("r1", "rare", RARE), 0.0)
    gateway = Report(replica="g", runs=False)
    found = state.sync(gateway, 0.0).pools
    assert {name: (pool.num_engines, set(pool.known)) for name, pool in found.items()} == {
        "": (2, {ONE.digest}), "rare": (1, {RARE.digest})}  # fmt: skip
    state.sync(engine("e1", "", ONE), 9.0)
    asleep = state.sync(gateway, 9.0).pools  # the rare one sleeps: it is known what it could do
    assert (asleep["rare"].num_engines, set(asleep["rare"].known)) == (0, {RARE.digest})
    why = "device=cuda: CUDA did not start"
    state.sync(engine("r2", "rare", failed={RARE.digest: why}), 9.0)
    awake = state.sync(gateway, 9.0).pools
    assert (awake["rare"].known, awake["rare"].failed, awake[""].failed) == ({}, {RARE.digest: why}, {})


# --- a gateway


class Stage:
    """A rollout of two pools and a gateway's follower; who was woken, and which pool was asked what."""

    def __init__(self, pools: dict[str, tuple[str, ...]] | None = None) -> None:
        self.state, self.now = Rollout(now=0.0, pools=POOLS if pools is None else pools), 0.0
        self.woken: list[str] = []
        self.asked: list[tuple[str, str]] = []
        names = ("", *(POOLS if pools is None else pools))
        self.remotes = {name: RemoteEngine(EngineSettings(), self.carry(name), self.wake(name)) for name in names}
        self.engine = PooledEngine(self.remotes)
        self.follower = GatewayFollower("g", self.engine, self.sync, grace_s=0.0)

    def carry(self, pool: str) -> Callable[[Chunk], Any]:
        async def carry(chunk: Chunk) -> Reply:
            self.asked.append((pool, chunk.digest))
            assert isinstance(chunk.body, np.ndarray)
            return Reply(request=chunk.request, index=chunk.index, digest=chunk.digest, engine=f"e-{pool}",
                         provider="Fake", backlog_s=0.0, body=chunk.body.repeat(2, 1).repeat(2, 2))  # fmt: skip

        return carry

    def wake(self, pool: str) -> Callable[[], None]:
        return lambda: self.woken.append(pool)

    async def sync(self, report: Report) -> Orders:
        return self.state.sync(report, self.now)

    def step(self, *reports: Report) -> None:
        for report in reports:
            self.state.sync(report, self.now)
        asyncio.run(self.step_())

    async def step_(self) -> None:
        await self.follower.step()

    def ask(self, model: str, **settings: Any) -> httpx.Response:
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")

        async def main() -> httpx.Response:
            gateway = Gateway(GatewaySettings(**settings), self.engine, self.follower, Meters())
            transport = httpx.ASGITransport(create_app(gateway))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/v1/upscale", params={"model": model}, content=buffer.getvalue())

        return asyncio.run(main())


def test_every_model_is_asked_of_its_own_pool() -> None:
    stage = Stage()
    stage.state.desire(desired(ONE, RARE), 0.0)
    stage.step(engine("e1", "", ONE), engine("r1", "rare", RARE))
    assert stage.follower.reason == ""
    assert [stage.ask(model).status_code for model in ("photos", "gan-x", "gan-x:1")] == [200] * 3
    assert stage.asked == [("", ONE.digest), ("rare", RARE.digest), ("rare", RARE.digest)]


def test_a_pool_is_woken_for_what_is_new_to_it_and_no_other_is() -> None:
    stage = Stage()
    stage.state.desire(desired(ONE, RARE), 0.0)
    stage.step(engine("e1", "", ONE))
    assert stage.woken == ["rare"]  # its model has never been prepared
    stage.step(engine("r1", "rare", RARE))
    stage.now = 9.0
    stage.step(engine("e1", "", ONE))  # it sleeps again, and nothing is new
    assert (stage.woken, stage.follower.reason) == (["rare"], "")
    assert stage.ask("gan-x").status_code == 200  # by a line that Serve starts an engine for
    stage.state.desire(desired(TWO, RARE), 9.0)
    stage.step(engine("e1", "", ONE))
    assert stage.woken == ["rare"]
    stage.state.desire(desired(TWO, RARE_TWO), 9.0)
    stage.step(engine("e1", "", ONE))
    assert stage.woken == ["rare", "rare"]


def test_a_pool_that_is_late_holds_no_other_up() -> None:
    why = "device=cuda: CUDA did not start"
    table = Table(
        generation=3,
        routes={PHOTOS: ((ONE.digest, 1.0),), GAN: ((RARE.digest, 1.0),)},
        versions={r.digest: r for r in (ONE, RARE)},
    )

    def begun(pools: dict[str, tuple[str, ...]]) -> Stage:
        """A new gateway; engines of the rare model do not start."""
        stage = Stage(pools)
        stage.state.table = table
        stage.state.desire(desired(ONE, RARE), 0.0)
        stage.step(engine("e1", "", ONE), engine("r1", "rare" if pools else "", failed={RARE.digest: why}))
        return stage

    stage = begun(POOLS)
    assert stage.follower.reason == ""
    assert [stage.ask(model).status_code for model in ("photos", "")] == [200, 200]
    assert stage.ask("", default_model="gan-x").status_code == 503  # no other model stands in for it
    refused = stage.ask("gan-x")
    assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
    assert stage.follower.held == {GAN: f"preparing gan-x:1; {why}"}
    one = begun({})
    assert one.follower.reason == "preparing gan-x:1"  # control: of one pool, the first engine may have it yet
    one.step(engine("e1", "", ONE, failed={RARE.digest: why}))
    assert (one.follower.reason, one.follower.held) == ("", {GAN: f"preparing gan-x:1; {why}"})
    assert [one.ask(model).status_code for model in ("photos", "gan-x")] == [200, 503]

    stage.step(engine("r1", "rare", RARE))
    assert (stage.ask("gan-x").status_code, stage.follower.held) == (200, {})
    stage.state.desire(desired(TWO, RARE_TWO), 0.0)
    stage.step(engine("r1", "rare", RARE, RARE_TWO), engine("e1", "", ONE, TWO))
    stage.step(engine("r1", "rare", RARE))  # a new one in its place, which has the old version only
    routes = stage.follower.table.routes
    assert (routes[PHOTOS], routes[GAN]) == (((TWO.digest, 1.0),), ((RARE_TWO.digest, 1.0),))


def test_a_late_pool_stays_with_the_version_before_while_others_follow() -> None:
    stage = Stage()
    stage.state.desire(desired(ONE, RARE), 0.0)
    stage.step(engine("e1", "", ONE), engine("r1", "rare", RARE))
    stage.state.desire(desired(TWO, RARE_TWO), 0.0)
    stage.state.sync(engine("r1", "rare", RARE, RARE_TWO), 0.0)  # published, and its engine is replaced at once
    stage.step(engine("e1", "", ONE, TWO), engine("r1", "rare", RARE))
    assert stage.state.table.routed == {TWO.digest, RARE_TWO.digest}
    table = stage.follower.table
    assert [table.pick(route, 0.0) for route in (PHOTOS, GAN)] == [TWO, RARE]
    assert stage.follower.held == {GAN: "preparing gan-x:2"}
    assert stage.ask("gan-x").headers["x-rayscale-model"] == "gan-x:1"
    assert stage.follower.report().table == stage.state.table  # what would be told a rollout that lost its own
    stage.step(engine("r1", "rare", RARE, RARE_TWO))
    assert stage.follower.table == stage.state.table


def test_the_backlog_of_one_pool_sends_nobody_of_another_away() -> None:
    stage = Stage()
    stage.state.desire(desired(ONE, RARE), 0.0)
    stage.step(engine("e1", "", ONE), engine("r1", "rare", RARE))
    stage.remotes["rare"].backlog_s = lambda: 1e6  # type: ignore[method-assign]
    refused = stage.ask("gan-x")
    assert (refused.status_code, "backlog" in refused.json()["detail"]) == (503, True)
    assert int(refused.headers["retry-after"]) > 1
    assert stage.ask("photos").status_code == 200


def test_what_one_pool_promised_another_does_not_keep() -> None:
    """Who was sent away by a pool is told to come later and later; the first of another pool is not."""
    stage = Stage()
    stage.state.desire(desired(ONE, RARE), 0.0)
    stage.step(engine("e1", "", ONE), engine("r1", "rare", RARE))
    for each in stage.remotes.values():
        each.backlog_s = lambda: 40.0  # type: ignore[method-assign]
        each.cost_s = lambda digest, units: 15.0  # type: ignore[method-assign]
    gateway = Gateway(GatewaySettings(timeout_s=30.0), stage.engine, stage.follower, Meters())

    def told(digest: str) -> float:
        with pytest.raises(Exception, match="backlog") as error:
            gateway.admit(digest, 1, gateway.deadline(), "x")
        return float(error.value.retry_after_s)  # type: ignore[attr-defined]

    first, second, other = told(RARE.digest), told(RARE.digest), told(ONE.digest)
    assert second > first + 10
    assert other == pytest.approx(first, abs=1.0)
    gateway.close()


def test_a_model_that_changed_its_pool_is_asked_of_the_new_one_and_forgotten_by_both() -> None:
    remotes = {name: RemoteEngine(EngineSettings(), _never, lambda: None) for name in ("", "rare")}
    pooled = PooledEngine(remotes)
    has = Pool(num_engines=1, known=engine("e", "", ONE).known, digests=frozenset({ONE.digest}))
    pooled.learn({"": has, "rare": Pool()})
    assert pooled.of(ONE.digest) is remotes[""]
    pooled.learn({"": Pool(num_engines=1), "rare": has, "unheard-of": has})
    assert (pooled.of(ONE.digest), pooled.digests) == (remotes["rare"], {ONE.digest})
    pooled.forget(ONE.digest)
    assert pooled.known() == {}
    with pytest.raises(UnavailableError, match="not loaded by any engine"):
        pooled.session(ONE.digest)


async def _never(chunk: Chunk) -> Reply:
    raise AssertionError("nothing is asked here")


# --- with real engines


def test_two_pools_of_real_engines_have_their_own_models_and_answer_for_them(tmp_path: Path) -> None:
    releases = [
        Release(name=name, version=1, digest=small["write"](tmp_path / name, seed), uri=str(tmp_path / name))
        for seed, name in enumerate(("photos", "gan-x"))
    ]

    async def main() -> None:
        state = Rollout(now=0.0, pools=POOLS)
        state.desire(desired(*releases), 0.0)

        async def sync(report: Report) -> Orders:
            return state.sync(report, 0.0)

        engines = {pool: Engine(EngineSettings(threads=1, device="cpu")) for pool in ("", "rare")}
        followers = {
            pool: EngineFollower(f"e-{pool}", each, sync, lambda r: Path(r.uri), ThreadPoolExecutor(1), Meters(),
                                 grace_s=0.0, pool=pool)
            for pool, each in engines.items()
        }  # fmt: skip
        for follower in followers.values():
            while not follower._engine.digests:
                await follower.step()
                await asyncio.sleep(0.02)
            await follower.step()
        assert set(state.table.routes) == {PHOTOS, GAN}
        for follower in followers.values():  # one that starts waits for its own models, not for those of others
            async with asyncio.timeout(10):
                await follower.start(wait_s=60.0, interval_s=0.01)
            assert (follower.reason, follower.table) == ("", state.table)

        def line(pool: str) -> RemoteEngine:
            async def carry(chunk: Chunk) -> Reply:
                return await remote.answer(engines[pool], pool, chunk)

            return RemoteEngine(EngineSettings(), carry, lambda: None)

        pooled = PooledEngine({pool: line(pool) for pool in engines})
        gateway = GatewayFollower("g", pooled, sync, grace_s=0.0)
        await gateway.step()
        assert gateway.reason == ""
        assert [each.digests for each in engines.values()] == [{releases[0].digest}, {releases[1].digest}]
        tile = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        for found in releases:
            results: dict[int, Any] = {}
            await pooled.run(found.digest, [tile], results.__setitem__, deadline=asyncio.get_running_loop().time() + 20)
            wanted: dict[int, Any] = {}
            own = engines[pool_of(found.name, POOLS)]
            await own.run(found.digest, [tile], wanted.__setitem__, deadline=asyncio.get_running_loop().time() + 20)
            np.testing.assert_array_equal(results[0], wanted[0])
        for each in engines.values():
            each.close()

    asyncio.run(main())
