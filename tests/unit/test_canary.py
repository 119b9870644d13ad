"""A canary: its share is what it should be and sticks to clients, and it loses it by itself where it does worse."""

from __future__ import annotations

import hashlib
import math
import random
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale import contract
from rayscale.errors import ConfigError
from rayscale.registry.canary import Share, read_share
from rayscale.serve.batching import Outcome
from rayscale.serve.keys import Key
from rayscale.serve.rollout import Canary, Desired, Ending, Orders, Report, Rollout, read_desired
from rayscale.serve.table import Release, Table, draw
from rayscale.serve.trial import verdict

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
service = runpy.run_path(str(Path(__file__).parents[1] / "service.py"))
ROUTE = "photos@champion"
POLL_S, SYNC_S = 1.0, 0.5  # `tests/e2e/test_serve.py` holds them against the configs that ship
ONE, TWO, THREE = (Release(name="photos", version=v, digest=f"photos-{v}", uri="") for v in (1, 2, 3))
ALL = frozenset(r.digest for r in (ONE, TWO, THREE))


def wish(champion: Release = ONE, canary: Release | None = TWO, weight: float = 0.05, key: str = "k") -> Desired:
    beside = {ROUTE: Canary(release=canary, weight=weight, key=key)} if canary else {}
    return Desired(routes={ROUTE: champion}, names=frozenset({"photos"}), canaries=beside)


def table(weight: float, champion: Release = ONE, canary: Release = TWO) -> Table:
    shares = (champion.digest, 1.0 - weight), (canary.digest, weight)
    return Table(generation=1, routes={ROUTE: shares}, versions={r.digest: r for r in (champion, canary)})


# --- who meets it


def test_5_percent_of_10_000_keys_are_5_percent_and_stay_so() -> None:
    keys = [f"key-{i}" for i in range(10_000)]
    met = [table(0.05).pick(ROUTE, draw(ROUTE, key)) for key in keys]
    share = met.count(TWO) / len(met)
    print(f"\n5 % of 10,000 keys: {100 * share:.2f} %")
    assert abs(share - 0.05) < 0.01
    assert met == [table(0.05).pick(ROUTE, draw(ROUTE, key)) for key in keys]
    at_random = [table(0.05).pick(ROUTE, random.random()) for _ in keys]  # control: what is not sticky is seen
    assert met != at_random
    elsewhere = [table(0.05).pick(ROUTE, draw("faces@champion", key)) for key in keys]
    assert met != elsewhere  # not the same keys for every model


@settings(max_examples=30, deadline=None)
@given(weights=st.tuples(st.floats(0.001, 0.999), st.floats(0.001, 0.999)), who=st.lists(st.text(), max_size=50))
def test_more_weight_takes_clients_from_the_champion_alone(weights: tuple[float, float], who: list[str]) -> None:
    low, high = sorted(weights)
    for one in who:
        assert 0 <= draw(ROUTE, one) < 1
        before, after = (table(w).pick(ROUTE, draw(ROUTE, one)) for w in (low, high))
        assert (before, after) != (TWO, ONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("artifact")
    small["write"](path)
    return path


def test_a_client_is_its_key_or_without_keys_its_request_id(folder: Path) -> None:
    from rayscale.artifact import digest_of

    body = service["png"](service["photo"](12, 12))
    secrets = [f"secret {i}" for i in range(40)]
    keys = tuple(Key(name=f"app-{i}", sha256=hashlib.sha256(s.encode()).hexdigest()) for i, s in enumerate(secrets))

    def versions(app: object, headers: list[dict[str, str]]) -> list[str]:
        return [app.upscale(body, **h).headers["x-rayscale-model"] for h in headers]  # type: ignore[attr-defined]

    for settings_, mine, other in (
        ({}, [{"X-Request-Id": f"id-{i}"} for i in range(40)], {}),
        ({"keys": keys}, [{"Authorization": f"Bearer {s}"} for s in secrets], {"X-Request-Id": "another"}),
    ):
        app = service["Service"](folder, digest_of(folder), **settings_)
        try:
            canary = replace(app.release, version=4, digest="c" * 64)
            app.engine.prepare(app.release.digest, folder)
            app.engine._models._places[canary.digest] = app.engine._models._places[app.release.digest]
            app.routing.table = table(0.5, app.release, canary)
            met = versions(app, mine)
            assert set(met) == {"photos:3", "photos:4"}
            assert met == versions(app, [{**h, **other} for h in mine])
            listed = app.ask("GET", "/v1/models", headers=mine[0]).json()["models"]
            assert [(m["version"], m["aliases"], m["canary"]) for m in listed] == [
                (4, [], {"champion": 0.5}), (3, ["champion"], {})]  # fmt: skip
        finally:
            app.gateway.close()


# --- a fleet on a clock of its own


@dataclass
class Fleet:
    """Three engines that have everything; requests come 20 a second, each from a client of its own."""

    state: Rollout
    fails: Callable[[Release, int], bool] = lambda release, i: False
    takes_s: Callable[[Release, int], float] = lambda release, i: 0.02
    now: float = 0.0
    asked: int = 0
    answered: dict[str, int] = field(default_factory=dict)
    _outcomes: list[dict[str, Outcome]] = field(default_factory=lambda: [{}, {}, {}])

    def sync(self) -> list[Orders]:
        return [
            self.state.sync(Report(replica=f"e{i}", prepared=ALL, outcomes=dict(outcomes)), self.now)
            for i, outcomes in enumerate(self._outcomes)
        ]

    def ask(self) -> None:
        release = self.state.table.pick(ROUTE, draw(ROUTE, f"client {self.asked}"))
        outcomes = self._outcomes[self.asked % 3]
        ok, failed, timed, log_s = outcomes.get(release.digest, Outcome())
        if self.fails(release, self.asked):
            outcomes[release.digest] = Outcome(ok, failed + 1, timed, log_s)
        else:
            log_s += math.log(self.takes_s(release, self.asked))
            outcomes[release.digest] = Outcome(ok + 1, failed, timed + 1, log_s)
        self.answered[release.digest] = self.answered.get(release.digest, 0) + 1
        self.asked += 1

    def run(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Until `stop`, or so long; the engines report twice a second."""
        until = self.now + seconds
        while self.now < until and not stop():
            for _ in range(10):
                self.ask()
            self.now += 0.5
            self.sync()

    @property
    def shares(self) -> dict[str, float]:
        return dict(self.state.table.routes[ROUTE])


def fleet(weight: float = 0.05, **more: object) -> Fleet:
    """Version 1 serves, version 2 is its canary since second 0."""
    found = Fleet(Rollout(now=0.0, probation_s=600.0, meters=service["FakeMeters"]()), **more)  # type: ignore[arg-type]
    found.state.desire(wish(canary=None), 0.0)
    found.sync()
    found.state.desire(wish(weight=weight), 0.0)
    found.sync()
    assert found.shares == {ONE.digest: 1 - weight, TWO.digest: weight}
    return found


def is_hit(release: Release, i: int, percent: int, *releases: Release) -> bool:
    """Whether request `i` is one of so many percent, for one of these versions."""
    return release in releases and hashlib.sha256(b"%d" % i).digest()[0] * 100 < percent * 256


def test_a_canary_that_fails_in_a_fifth_of_its_runs_is_rolled_back_by_itself() -> None:
    found = fleet(fails=lambda release, i: is_hit(release, i, 20, TWO))
    found.run(600.0, stop=lambda: TWO.digest not in found.shares)
    print(f"\nrolled back after {found.now:.0f} s and {found.answered[TWO.digest]} runs")
    assert found.now < 600
    assert found.shares == {ONE.digest: 1.0}
    (ending,) = found.state.endings
    assert (ending.route, ending.release, ending.canary, ending.instead) == (ROUTE, TWO, "k", ONE)
    assert "runs failed" in ending.why
    assert "canary photos:2 was rolled back: " in found.state.held()[ROUTE]
    told = ("rayscale_rollbacks_total", 1.0, {"model": "photos", "of": "canary"})
    assert told in found.state._meters.seen  # type: ignore[union-attr]
    assert set(found.state.table.versions) == {ONE.digest}
    for _ in range(3):  # the registry says so still: it has not been told yet
        found.state.desire(wish(), found.now)
        found.run(60.0)
    assert found.shares == {ONE.digest: 1.0}
    assert len(found.state.endings) == 1
    found.state.desire(wish(key="once more"), found.now)
    found.sync()
    assert TWO.digest in found.shares


def test_a_healthy_canary_stays() -> None:
    found = fleet(fails=lambda release, i: is_hit(release, i, 1, ONE, TWO))
    found.run(1800.0)
    assert found.shares == {ONE.digest: 0.95, TWO.digest: 0.05}
    assert found.state.endings == []
    assert found.answered[TWO.digest] > 1500
    watched = found.sync()[0].watched["photos:2"]
    assert watched.startswith("canary: ")
    assert "1.00 times the time" in watched


def test_what_fails_as_often_as_the_champion_is_no_worse() -> None:
    found = fleet(fails=lambda release, i: is_hit(release, i, 20, ONE, TWO))
    found.run(1200.0)
    assert TWO.digest in found.shares


@pytest.mark.parametrize(("times", "stays"), [(3.0, False), (1.4, True)])
def test_a_slow_canary_is_rolled_back_and_one_whose_runs_wait_now_and_then_is_not(times: float, stays: bool) -> None:
    def takes_s(release: Release, i: int) -> float:
        waits = 50 if is_hit(release, i, 4, ONE, TWO) else 1  # a busy CPU
        return 0.02 * waits * (times if release == TWO else 1)

    found = fleet(takes_s=takes_s)
    found.run(600.0)
    assert (TWO.digest in found.shares) is stays
    if not stays:
        assert "times as long" in found.state.endings[0].why


def test_a_failure_in_a_later_window_counts_too() -> None:
    found = fleet(fails=lambda release, i: release == TWO and i > 20 * 1300)
    found.run(1300.0)
    assert TWO.digest in found.shares
    found.run(600.0)
    assert TWO.digest not in found.shares


def test_a_verdict_needs_enough_runs() -> None:
    fine = Outcome(1000, 0, 1000, 0.0)
    assert verdict(Outcome(0, 4), fine) == ""
    assert verdict(Outcome(0, 5), fine) == "5 of 5 runs failed"
    assert verdict(Outcome(90, 0, 49, 49.0), fine) == ""
    assert "2.7 times as long" in verdict(Outcome(90, 0, 50, 50.0), fine)
    assert verdict(Outcome(90, 0, 50, 50.0), Outcome(90, 0, 49, 0.0)) == ""  # a new champion has nobody beside it


# --- its beginning and its end


def test_an_alias_that_cannot_be_followed_has_no_canary_that_nobody_watches() -> None:
    state = Rollout(now=0.0)
    state.desire(wish(), 0.0)
    state.sync(Report(replica="a", prepared=ALL), 0.0)
    assert len(state.table.routes[ROUTE]) == 2
    refused = Desired(refused={ROUTE: "photos:3 passed no gate"}, names=frozenset({"photos"}))
    state.desire(refused, 1.0)
    assert state.table.routes[ROUTE] == ((ONE.digest, 1.0),)


def test_a_canary_has_its_share_when_every_engine_has_prepared_it() -> None:
    state = Rollout(now=0.0)
    state.desire(wish(canary=None), 0.0)
    state.sync(Report(replica="a", prepared=frozenset({ONE.digest})), 0.0)
    state.sync(Report(replica="b", prepared=frozenset({ONE.digest})), 0.0)
    state.desire(wish(), 1.0)
    orders = state.sync(Report(replica="a", prepared=ALL), 1.0)
    assert orders.prepare == (ONE, TWO)
    assert orders.held == {ROUTE: "photos:2 is being prepared: 1 of 2 engines are ready"}
    broken = Report(replica="b", prepared=frozenset({ONE.digest}), failed={TWO.digest: "golden is off"})
    orders = state.sync(broken, 1.0)
    assert orders.table.routes[ROUTE] == ((ONE.digest, 1.0),)
    assert orders.held == {ROUTE: "photos:2 is refused: golden is off"}
    orders = state.sync(Report(replica="b", prepared=ALL), 1.5)
    assert orders.table.routes[ROUTE] == ((ONE.digest, 0.95), (TWO.digest, 0.05))
    assert orders.held == {}
    # One that starts later has its champion first, and serves with that alone.
    late = state.sync(Report(replica="c"), 2.0)
    assert late.prepare == (ONE, TWO)
    assert late.table.routes[ROUTE] == orders.table.routes[ROUTE]
    assert late.table.without_canaries(frozenset({ONE.digest})).routes[ROUTE] == ((ONE.digest, 1.0),)
    assert late.table.without_canaries(ALL) == late.table


def test_its_share_may_grow_while_its_trial_goes_on() -> None:
    found = fleet(fails=lambda release, i: release == TWO and i % 2 == 0)
    found.run(600.0, stop=lambda: sum(found.state._trials[ROUTE, "k"].outcome(TWO.digest)[:2]) >= 4)
    found.state.desire(wish(weight=0.2), found.now)
    assert found.shares == {ONE.digest: 0.8, TWO.digest: 0.2}
    assert sum(found.state._trials[ROUTE, "k"].outcome(TWO.digest)[:2]) >= 4


@pytest.mark.parametrize("champion", [ONE, TWO, THREE], ids=["stopped", "promoted", "moved"])
def test_it_ends_when_it_is_stopped_promoted_or_its_alias_moves(champion: Release) -> None:
    found = fleet()
    found.state.desire(wish(champion, canary=None), 1.0)
    found.sync()
    assert found.shares == {champion.digest: 1.0}
    warm = {ONE.digest} if champion != ONE else set()
    assert set(found.state.table.versions) == {champion.digest} | warm
    assert found.state.endings == []
    assert found.state.held() == {}
    assert list(found.state._trials) == ([(ROUTE, "")] if champion != ONE else [])


def test_it_ends_at_once_where_its_alias_moved_to_what_nobody_can_load() -> None:
    found = fleet()
    broken = replace(THREE, digest="broken")
    found.state.desire(wish(broken, canary=None), 1.0)
    found.sync()
    assert found.shares == {ONE.digest: 1.0}
    assert "photos:3 is being prepared" in found.state.held()[ROUTE]


def test_a_champion_that_is_rolled_back_takes_its_canary_with_it() -> None:
    found = fleet(fails=lambda release, i: release == THREE)
    found.state.desire(wish(THREE, canary=None), 1.0)
    found.sync()
    found.state.desire(wish(THREE, canary=TWO), 1.0)
    assert found.shares == {THREE.digest: 0.95, TWO.digest: 0.05}
    found.run(10.0)
    found.state.desire(wish(THREE, canary=TWO), found.now)
    found.run(10.0)
    assert found.shares == {ONE.digest: 1.0}
    (ending,) = found.state.endings
    assert (ending.release, ending.canary, ending.instead) == (THREE, "", ONE)


def test_what_was_rolled_back_while_the_registry_was_away_is_told_by_the_next_process() -> None:
    found = fleet(fails=lambda release, i: release == TWO)
    found.run(60.0)
    kept = contract.loads(Table, contract.dumps(found.state.table), "table")
    state = Rollout(kept, now=100.0)
    assert state.endings == []
    for _ in range(2):
        state.desire(wish(), 110.0)
        state.sync(Report(replica="e0", prepared=ALL), 110.0)
    assert state.table.routes == {ROUTE: ((ONE.digest, 1.0),)}
    (ending,) = state.endings
    assert (ending.release, ending.canary, ending.instead) == (TWO, "k", ONE)
    state.desire(wish(TWO, canary=None), 111.0)  # promoted all the same
    state.sync(Report(replica="e0", prepared=ALL), 111.0)
    assert state.table.routes == {ROUTE: ((TWO.digest, 1.0),)}


def test_a_table_of_former_days_is_read() -> None:
    old = contract.to_json(table(0.05)) | {"rolled_back": {ROUTE: {"digest": TWO.digest, "why": "failed"}}}
    del old["before"]
    found = contract.loads(Table, contract.dumps(old), "table")
    assert (found.before, found.rolled_back[ROUTE].canary, found.routes) == ({}, "", table(0.05).routes)


EVENTS = st.one_of(
    st.tuples(st.just("alias"), st.sampled_from([ONE, TWO, THREE])),
    st.tuples(st.just("canary"), st.sampled_from([None, ONE, TWO, THREE])),
    st.tuples(st.just("weight"), st.sampled_from([0.01, 0.3, 0.99])),
    st.tuples(st.just("has"), st.tuples(st.integers(0, 2), st.sets(st.sampled_from(sorted(ALL))))),
    st.tuples(st.just("fails"), st.tuples(st.integers(0, 2), st.sampled_from(sorted(ALL)), st.integers(1, 9))),
    st.tuples(st.just("time"), st.sampled_from([1.0, 4.0])),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_every_share_can_be_answered_and_what_was_rolled_back_stays_so(
    events: list[tuple[str, Any]],
) -> None:
    state, now, key = Rollout(now=0.0, probation_s=10.0), 0.0, 0
    champion, canary, weight = ONE, None, 0.05
    has = [set(ALL), set(ALL), set(ALL)]
    outcomes: list[dict[str, Outcome]] = [{}, {}, {}]
    for kind, value in [("time", 0.0), *events]:
        before, had = state.table, [set(one) for one in has]
        if kind == "alias":
            champion, canary = value, canary if value == champion else None  # it ends with the alias
        elif kind == "canary":
            canary, key = None if value == champion else value, key + 1
        elif kind == "weight":
            weight = value
        elif kind == "has":
            warm = set(before.before.values())  # a rollback needs it: followers keep all that a table names
            has[value[0]] = value[1] | before.routed | warm
        elif kind == "fails":
            i, digest, count = value
            outcomes[i][digest] = Outcome(0, outcomes[i].get(digest, Outcome()).failed + count)
        else:
            now += value
        state.desire(wish(champion, canary, weight, str(key)), now)
        for i in range(3):
            state.sync(Report(replica=f"e{i}", prepared=frozenset(has[i]), outcomes=dict(outcomes[i])), now)
        after = state.table
        shares = after.routes.get(ROUTE, ())
        assert sum(share for _, share in shares) == pytest.approx(1 if shares else 0)
        assert len(dict(shares)) == len(shares) <= 2
        assert after.routed <= set(after.versions)
        for digest in after.routed - before.routed - set(before.before.values()):
            assert all(digest in now_has | had_ for now_has, had_ in zip(has, had, strict=True))
        if canary and (back := before.rolled_back.get(ROUTE)) and back.canary == str(key):
            assert len(shares) == 1


# --- the registry


@dataclass(frozen=True)
class Registered:
    """A version as the registry has it."""

    version: int
    tags: dict[str, str] = field(default_factory=dict)
    name: str = "photos"
    uri: str = ""

    @property
    def digest(self) -> str:
        return f"{self.name}-{self.version}"

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


class FakeRegistry:
    def __init__(self, champion: int, canary: Registered | None) -> None:
        self.aliases = {"champion": Registered(champion)} | ({"champion-canary": canary} if canary else {})

    def standing(self) -> dict[str, dict[str, int]]:
        return {"photos": {alias: version.version for alias, version in self.aliases.items()}}

    def resolve(self, reference: str) -> Registered:
        return self.aliases[reference.partition("@")[2]]


def share(**changes: Any) -> Registered:
    found = Share(**{"weight": 5.0, "champion": 1, "since": "2026-11-01T10:00:00+00:00", **changes})
    return Registered(2, {"canary.champion": contract.dumps(found)})


def desired(champion: int, canary: Registered | None, gated: Callable[[str, str, str], bool] | None = None) -> Desired:
    return read_desired(FakeRegistry(champion, canary), ("*@champion",), gated)  # type: ignore[arg-type]


def test_what_the_registry_says_of_a_canary_is_read() -> None:
    found = desired(1, share())
    assert found.canaries == {ROUTE: Canary(release=TWO, weight=0.05, key="2026-11-01T10:00:00+00:00")}
    assert (found.routes, found.over, found.refused) == ({ROUTE: ONE}, (), {})
    assert desired(1, None).canaries == {}


@pytest.mark.parametrize(
    ("champion", "canary", "says"),
    [
        (2, share(), "it was promoted to 2"),
        (3, share(), "the alias moved from 1 to 3"),
        (1, share(until="2026-11-01T11:00:00+00:00"), "its time is up"),
        (1, share(until="9999-11-01T11:00:00+00:00"), ""),  # control
    ],
)
def test_a_canary_is_over_when_its_alias_moved_or_its_time_is_up(champion: int, canary: Registered, says: str) -> None:
    found = desired(champion, canary)
    since = "2026-11-01T10:00:00+00:00"
    assert found.over == ((Ending(route=ROUTE, release=TWO, why=says, canary=since),) if says else ())
    assert bool(found.canaries) is not bool(says)
    state = Rollout(now=0.0)
    for _ in range(2):  # told until the registry has it
        state.desire(found, 0.0)
    assert state.endings == list(found.over)


def test_a_canary_that_cannot_be_followed_is_reported_and_its_champion_serves() -> None:
    for canary, says in (
        (Registered(2), "was set by hand"),
        (Registered(2, {"canary.champion": "{"}), "must be valid JSON"),
        (share(weight=100.0), "more than 0 and less than 100"),
    ):
        found = desired(1, canary)
        assert says in found.refused["photos@champion-canary"]
        assert (found.routes, found.canaries) == ({ROUTE: ONE}, {})
    ungated = desired(1, share(), lambda name, digest, alias: digest == ONE.digest)
    assert "photos:2 passed no gate" in ungated.refused["photos@champion-canary"]
    assert (ungated.routes, ungated.canaries) == ({ROUTE: ONE}, {})
    assert desired(1, share(), lambda name, digest, alias: True).canaries
    with pytest.raises(ConfigError, match="rayscale models canary"):
        read_share(Registered(2), "champion")  # type: ignore[arg-type]


def test_a_canary_needs_the_gate_of_its_champions_alias_or_of_challenger() -> None:
    for alias, follows in (("champion", True), ("challenger", True), ("scratch", False), ("champion-canary", False)):
        passed = {(ONE.digest, "champion"), (TWO.digest, alias)}
        found = desired(1, share(), lambda name, digest, asked, passed=passed: (digest, asked) in passed)
        assert (found.routes, bool(found.canaries)) == ({ROUTE: ONE}, follows)
        assert ("passed no gate for challenger" in found.refused.get("photos@champion-canary", "")) is not follows
    challenger = {(digest, "challenger") for digest in (ONE.digest, TWO.digest)}
    found = desired(1, share(), lambda name, digest, asked: (digest, asked) in challenger)
    assert (found.routes, found.canaries) == ({}, {})  # all requests are another matter than a share
    assert "photos:1 passed no gate for champion" in found.refused[ROUTE]


# --- how soon


@settings(max_examples=30, deadline=None)
@given(
    poll=st.floats(0, 1),
    read_s=st.floats(0, 1),
    engines=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    gateways=st.lists(st.floats(0, 1), max_size=3),
)
def test_a_rollback_to_a_warm_version_is_served_within_5_seconds(
    poll: float, read_s: float, engines: list[float], gateways: list[float]
) -> None:
    """At whatever moments each polls and reports, while MLflow takes up to a second."""
    state, phases, promoted_s, moved_s = Rollout(now=0.0), [*engines, *gateways], 2.0, 8.0

    def alias(at: float) -> Release:
        return TWO if promoted_s <= at < moved_s else ONE

    events = [(poll * POLL_S + i * (POLL_S + read_s), -1) for i in range(20)]
    events += [((phase + i) * SYNC_S, who) for who, phase in enumerate(phases) for i in range(60)]
    served: dict[int, list[tuple[float, str]]] = {}
    for at, who in sorted(events):
        if who < 0:  # an answer of the registry, as it was when it was asked
            state.desire(wish(alias(at - read_s), canary=None), at)
            continue
        report = Report(replica=f"{who}", runs=who < len(engines), prepared=ALL)
        table = state.sync(report, at).table
        if table.routes:
            served.setdefault(who, []).append((at, table.pick(ROUTE, 0.0).digest))
    for seen in served.values():
        assert {digest for at, digest in seen if 7.0 < at < moved_s} == {TWO.digest}
        assert {digest for at, digest in seen if at > moved_s + 5.0} == {ONE.digest}
