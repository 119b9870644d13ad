"""The thread of filters and comparisons: what it is expected to take, when to come back, and what never begins."""

from __future__ import annotations

import asyncio
import math
import random
import runpy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.errors import ConfigError, UnavailableError
from rayscale.serve import filters as filters_module
from rayscale.serve import transform
from rayscale.serve.admission import Admission
from rayscale.serve.filters import PLACES, Filters, Line, Place, Prices
from rayscale.serve.problems import BusyError

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
service_ = runpy.run_path(str(Path(__file__).parents[1] / "service.py"))
photo, png, is_problem = service_["photo"], service_["png"], service_["is_problem"]


def place(cost_s: float, deadline: float = math.inf) -> Place:
    return Place(kind="mean", pixels=1, cost_s=cost_s, deadline=deadline, work=lambda: None)


# --- prices


def test_a_price_is_learnt_by_kind_and_by_size() -> None:
    prices = Prices()
    assert prices.cost_s("mean", 10**6) == pytest.approx(1.0)  # nothing is known
    prices.learn("mean", 10**6, 0.1)
    prices.learn("nlm", 10**6, 2.5)
    prices.learn("mean", 100, 0.001)  # where it is not the pixels that cost
    assert prices.cost_s("mean", 10**6) == pytest.approx(0.1)
    assert prices.cost_s("mean", 4 * 10**6) == pytest.approx(0.4)  # as what is most like it
    assert prices.cost_s("mean", 120) == pytest.approx(0.0012)
    assert prices.cost_s("nlm", 10**6) == pytest.approx(2.5)
    prices.learn("telea", 100, 0.01)
    assert prices.cost_s("telea", 10**6) == pytest.approx(1.0)  # not 100 s, of which it could not be cured


def test_a_price_follows_what_is_measured_and_not_one_stall() -> None:
    prices, rng = Prices(), random.Random(0)
    for _ in range(20):
        prices.learn("mean", 1000, rng.uniform(0.8, 1.2))
    assert 0.8 <= prices.cost_s("mean", 1000) <= 1.2
    prices.learn("mean", 1000, 60.0)
    assert prices.cost_s("mean", 1000) <= 1.5
    for _ in range(20):
        prices.learn("mean", 1000, rng.uniform(0.08, 0.12))
    assert 0.05 <= prices.cost_s("mean", 1000) <= 0.2


# --- when to come back, on a clock of its own


class Simulated:
    """A line whose thread takes `error` times what is expected."""

    def __init__(self, timeout_s: float, error: float = 1.0) -> None:
        self.line, self._error = Line(timeout_s), error
        self._timeout_s = timeout_s
        self._running: Place | None = None
        self._now = self._ends_at = 0.0
        self.ended_at: list[float] = []

    def ask(self, cost_s: float, now: float) -> float | None:
        self._advance(now)
        wait_s = self.line.enter(place(cost_s, now + self._timeout_s), now)
        self._advance(now)
        return wait_s

    def would_be_let_in(self, cost_s: float, now: float) -> bool:
        self._advance(now)
        line = Line(self._timeout_s)
        line._places = list(self.line._places)
        return line.wait_s(cost_s, self._timeout_s, now) is None

    def _advance(self, now: float) -> None:
        while True:
            if self._running is None:
                self._running, late = self.line.take(self._now)
                assert not late  # nobody waits in vain
                if self._running is None:
                    break
                self._ends_at = self._now + self._error * self._running.cost_s
            if self._ends_at > now:
                break
            self._now = self._ends_at
            self.line.leave(self._running)
            self.ended_at.append(self._now)
            self._running = None
        self._now = now


def comebacks(
    simulated: Simulated, costs: Sequence[float], told: Callable[[float], float] = lambda wait_s: wait_s
) -> list[tuple[float, bool, bool]]:
    """A burst at second 0 whose refused clients come back as `told`.

    Of each of these: its wait, whether it was let in after it, and whether it would have been after half of it.
    """
    waits = {i: told(w) for i, cost_s in enumerate(costs) if (w := simulated.ask(cost_s, 0.0)) is not None}
    early: dict[int, bool] = {}
    found = []
    for due, half, i in sorted([(w, 0, i) for i, w in waits.items()] + [(w / 2, 1, i) for i, w in waits.items()]):
        if half:
            early[i] = simulated.would_be_let_in(costs[i], due - 1e-6)
        else:
            found.append((due, simulated.ask(costs[i], due + 1e-6) is None, early[i]))
    return found


@settings(max_examples=60, deadline=None)
@given(cost_s=st.floats(0.05, 9.0), times=st.integers(2, 4))
def test_the_time_to_come_back_is_right_within_a_factor_of_two(cost_s: float, times: int) -> None:
    found = comebacks(Simulated(60.0), [cost_s] * (times * PLACES))
    assert len(found) >= (times - 1) * PLACES
    assert all(let_in and not early for _, let_in, early in found)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), error=st.floats(0.7, 1.3))
def test_it_is_so_too_where_filters_differ_and_estimates_err(seed: int, error: float) -> None:
    rng, simulated = random.Random(seed), Simulated(60.0, error)
    told = [wait_s for wait_s, _, _ in comebacks(simulated, [rng.uniform(0.3, 3.0) for _ in range(3 * PLACES)])]
    simulated.would_be_let_in(0.0, 1e9)  # all have ended
    assert len(told) == 2 * PLACES
    assert len(simulated.ended_at) > 1.5 * PLACES
    for wait_s, room_s in zip(told, simulated.ended_at, strict=False):  # each that ends makes room for one
        assert room_s / 2 <= wait_s <= 2 * room_s


def test_always_told_five_seconds_most_come_in_vain_or_too_late() -> None:
    slow = comebacks(Simulated(60.0), [3.0] * 48, lambda _: 5.0)  # the negative control: what it was
    assert sum(let_in for _, let_in, _ in slow) <= 2
    quick = comebacks(Simulated(60.0), [0.05] * 48, lambda _: 5.0)
    assert all(early for *_, early in quick)


def test_what_takes_longer_than_expected_is_expected_to_go_on() -> None:
    line = Line(60.0)
    for _ in range(PLACES):
        assert line.enter(place(2.0), 0.0) is None
    line.take(0.0)
    assert line.enter(place(2.0), 0.0) == pytest.approx(2.0)
    line._admission = Admission(60.0)
    assert line.enter(place(2.0), 12.0) == pytest.approx(10.0)  # it is so late already


def test_an_estimate_alone_refuses_nothing() -> None:
    line, dear = Line(60.0), place(1e6, 60.0)
    assert line.enter(dear, 0.0) is None  # or it would never be measured again
    assert line.enter(place(1.0, 60.0), 0.0) is not None


def test_what_comes_too_late_or_is_not_waited_for_is_not_taken() -> None:
    line, late, gone, stays = Line(60.0), place(1.0, 5.0), place(1.0, 60.0), place(1.0, 60.0)
    for one in (late, gone, stays):
        assert line.enter(one, 0.0) is None
    gone.end.cancel()
    assert line.take(5.0) == (stays, [late, gone])
    assert len(line) == 1


# --- the thread


class Gated:
    """Work that waits for `gate`, and is noted by its name when it begins."""

    def __init__(self) -> None:
        self.gate, self.began = threading.Event(), list[str]()

    def work(self, name: str) -> str:
        self.began.append(name)
        assert self.gate.wait(10)
        return name


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def filters() -> Iterator[Filters]:
    made = Filters(60.0)
    yield made
    made.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def start(filters: Filters, gated: Gated, name: str, timeout_s: float = 60.0) -> asyncio.Task[tuple[str, float]]:
    asked = filters.run("mean", 100, time.monotonic() + timeout_s, lambda: gated.work(name))
    return asyncio.create_task(asked)


def test_who_hangs_up_while_it_waits_is_not_run_and_holds_no_place(filters: Filters, gated: Gated) -> None:
    async def main() -> None:
        first, gone, stays = (start(filters, gated, name) for name in ("first", "gone", "stays"))
        await until(lambda: gated.began == ["first"] and len(filters._line) == 3)
        gone.cancel()
        await until(lambda: len(filters._line) == 2)
        gated.gate.set()
        assert [(await task)[0] for task in (first, stays)] == ["first", "stays"]

    asyncio.run(main())
    assert gated.began == ["first", "stays"]


def test_what_runs_cannot_be_stopped_and_counts_until_it_has_ended(filters: Filters, gated: Gated) -> None:
    async def main() -> None:
        gone, stays = start(filters, gated, "gone"), start(filters, gated, "stays")
        await until(lambda: gated.began == ["gone"] and len(filters._line) == 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert len(filters._line) == 2
        assert gated.began == ["gone"]  # one at a time
        gated.gate.set()
        await stays
        assert len(filters._line) == 0

    asyncio.run(main())


def test_what_waits_past_its_deadline_is_told_so_at_once_and_not_started(filters: Filters, gated: Gated) -> None:
    async def main() -> None:
        first = start(filters, gated, "first")
        await until(lambda: gated.began == ["first"])
        late, stays = start(filters, gated, "late", 0.05), start(filters, gated, "stays")
        with pytest.raises(BusyError, match="not done in time"):
            await late
        assert not first.done()
        gated.gate.set()
        await asyncio.gather(first, stays)

    asyncio.run(main())
    assert gated.began == ["first", "stays"]


def test_a_thread_that_is_free_after_the_deadline_starts_nothing(filters: Filters, gated: Gated) -> None:
    async def main() -> None:
        first = start(filters, gated, "first")
        await until(lambda: gated.began == ["first"])
        late, stays = start(filters, gated, "late", 0.05), start(filters, gated, "stays")
        await until(lambda: len(filters._line) == 3)
        gated.gate.set()
        time.sleep(0.2)  # the loop is held up: its timer has not told yet
        with pytest.raises(BusyError, match="not done in time"):
            await late
        await asyncio.gather(first, stays)

    async def slow_first() -> None:
        work = gated.work

        def longer(name: str) -> str:
            made = work(name)
            time.sleep(0.1 if name == "first" else 0.0)
            return made

        gated.work = longer  # type: ignore[method-assign]
        await main()

    asyncio.run(slow_first())
    assert gated.began == ["first", "stays"]


def test_what_fails_tells_who_asked_and_teaches_nothing(filters: Filters) -> None:
    def fails() -> None:
        raise ConfigError("image", 1, "is refused", "send another")

    async def main() -> None:
        with pytest.raises(ConfigError):
            await filters.run("mean", 100, time.monotonic() + 10, fails)
        assert (await filters.run("mean", 100, time.monotonic() + 10, lambda: 7))[0] == 7

    asyncio.run(main())
    assert list(filters._prices._known) == ["mean"]
    assert len(filters._line) == 0


def test_closing_refuses_what_waits_and_waits_for_nothing(filters: Filters, gated: Gated) -> None:
    async def main() -> None:
        runs, waits = start(filters, gated, "runs"), start(filters, gated, "waits")
        await until(lambda: gated.began == ["runs"] and len(filters._line) == 2)
        filters.close()
        for refused in (waits, start(filters, gated, "comes")):
            with pytest.raises(UnavailableError, match="going away"):
                await refused
        gated.gate.set()
        assert (await runs)[0] == "runs"

    asyncio.run(main())
    assert gated.began == ["runs"]


# --- over HTTP


@pytest.fixture
def service(tmp_path: Path, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    filtered = transform.filtered

    def slow(rgb: Any, missing: Any, method: str, scale: int) -> Any:
        gated.work(method)
        return filtered(rgb, missing, method, scale)

    monkeypatch.setattr(transform, "filtered", slow)
    made = service_["Service"](tmp_path / "a", small["write"](tmp_path / "a"))
    yield made
    gated.gate.set()
    made.gateway.close()


def test_a_full_line_tells_each_when_there_is_room_for_it(
    service: Any, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands = time.monotonic()
    monkeypatch.setattr(filters_module, "time", SimpleNamespace(monotonic=lambda: stands))
    prices, line = service.gateway._filters._prices, service.gateway._filters._line
    prices.learn("mean png", 40 * 52, 10.0)
    prices.learn("median png", 40 * 52, 2.0)

    async def main(method: str, places: int) -> list[int]:
        gated.gate.clear()
        async with service.client() as client:

            def ask(method: str) -> asyncio.Task[Any]:
                return asyncio.create_task(client.post(f"/v1/restore?method={method}", content=png(photo())))

            line._admission = Admission(60.0)
            asked = [ask(method) for _ in range(places)]
            await until(lambda: len(line) == places)
            refused = [await ask(method) for _ in range(3)]
            gated.gate.set()
            assert [(await task).status_code for task in asked] == [200] * places
        return [int(answer.headers["retry-after"]) for answer in refused if is_problem(answer, 503, "filters")]

    assert asyncio.run(main("median", PLACES)) == [2, 4, 6]  # when one, two and three of them have ended
    assert asyncio.run(main("mean", 5)) == [5, 15, 25]  # when at most (60 - 10) / 1.1 s of work wait, and 10 s later


def test_who_is_refused_by_its_header_waits_for_no_filter(service: Any, gated: Gated) -> None:
    async def main() -> None:
        async with service.client() as client:
            running = asyncio.create_task(client.post("/v1/restore?method=mean", content=png(photo())))
            await until(lambda: gated.began == ["mean"])
            refused = await asyncio.wait_for(client.post("/v1/restore?method=mean", content=b"no picture"), 10)
            assert refused.status_code == 415
            assert not running.done()
            gated.gate.set()
            assert (await running).status_code == 200

    asyncio.run(main())


async def restore(service: Any, method: str, gone: asyncio.Event) -> int:
    """One request, as a server passes it on; the client hangs up when `gone` is set. Its status."""
    incoming = iter([{"type": "http.request", "body": png(photo()), "more_body": False}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        for message in incoming:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": "/v1/restore", "raw_path": b"/v1/restore", "query_string": f"method={method}".encode(),
             "root_path": "", "headers": [], "client": ("127.0.0.1", 1), "server": ("t", 80)}  # fmt: skip
    await service.app(scope, receive, send)
    return int(sent[0]["status"])


def test_a_client_that_hangs_up_has_no_filter_run(service: Any, gated: Gated) -> None:
    async def main() -> list[int]:
        stay, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(restore(service, "mean", stay))
        await until(lambda: gated.began == ["mean"])
        gone, stays = (asyncio.create_task(restore(service, m, e)) for m, e in (("median", leave), ("gaussian", stay)))
        await until(lambda: len(service.gateway._filters._line) == 3)
        leave.set()
        left = await gone
        gated.gate.set()
        return [left, await first, await stays]

    assert asyncio.run(main()) == [499, 200, 200]
    assert gated.began == ["mean", "gaussian"]
