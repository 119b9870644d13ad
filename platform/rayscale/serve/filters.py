"""One thread for classical filters and comparisons: they are slow and wide, and must not hold up the codecs.

What runs cannot be stopped. So nothing begins that nobody waits for any more, and who is sent away is told when there
will be room, by what the others are expected to take.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from rayscale.errors import UnavailableError
from rayscale.serve.admission import Admission
from rayscale.serve.batching import learnt
from rayscale.serve.problems import BusyError
from rayscale.serve.promise import Promise
from rayscale.serve.threads import Threads

T = TypeVar("T")

PLACES = 16  # of those that wait, and of the one that runs
_FIRST_S = 1e-6  # a pixel, of what has not run yet: most take less, non-local means twice as long


class Prices:
    """Seconds a pixel, by kind of work and size of picture, as far as they were measured."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, float]] = {}

    def cost_s(self, kind: str, pixels: int) -> float:
        """By what was most like it. Of small pictures it is not the pixels that cost: they say little of large ones."""
        sizes, size = self._known.get(kind, {}), pixels.bit_length()
        nearest = min(sizes, key=lambda known: abs(known - size), default=0)
        price_s = sizes.get(nearest, _FIRST_S)
        return pixels * (price_s if size - nearest <= 2 else min(price_s, _FIRST_S))

    def learn(self, kind: str, pixels: int, seconds: float) -> None:
        """Correct them by one measurement."""
        sizes, size = self._known.setdefault(kind, {}), pixels.bit_length()
        sizes[size] = learnt(sizes.get(size, 0.0), seconds / pixels)


@dataclass(eq=False, kw_only=True)
class Place:
    """One piece of work that waits or runs."""

    kind: str
    pixels: int
    cost_s: float  # estimated
    deadline: float  # on the clock of who asks
    work: Callable[[], Any]
    end: Promise[tuple[Any, float]] = field(default_factory=Promise)
    started: float | None = None

    def left_s(self, now: float) -> float:
        """Of the thread's time. What takes longer than expected is expected to take as long again as it is late."""
        return self.cost_s if self.started is None else abs(self.started + self.cost_s - now)


class Line:
    """Who waits, in their order, behind the one that runs: no thread, no clock."""

    def __init__(self, timeout_s: float) -> None:
        self._places: list[Place] = []
        self._admission = Admission(timeout_s)

    def enter(self, place: Place, now: float) -> float | None:
        """None where it is let in; else the seconds until there is room for it."""
        wait_s = self.wait_s(place.cost_s, place.deadline - now, now)
        if wait_s is None:
            self._places.append(place)
        return wait_s

    def wait_s(self, cost_s: float, left_s: float, now: float) -> float | None:
        """As `Admission.wait_s`. Where nobody else is, everything is let in: an estimate alone refuses nothing."""
        ends_s = list(itertools.accumulate(place.left_s(now) for place in self._places))
        backlog_s, cost_s = ends_s[-1] if ends_s else 0.0, min(cost_s, left_s)
        if len(ends_s) < PLACES:
            return self._admission.wait_s(cost_s, backlog_s, left_s, now)
        promised_s = self._admission.promised_s(now)  # each end makes room for one
        full_s = next((end_s for end_s in ends_s if end_s > promised_s), promised_s + backlog_s / PLACES)
        return self._admission.wait_s(0.0, backlog_s, left_s, now, full_s=full_s)

    def take(self, now: float) -> tuple[Place | None, list[Place]]:
        """The next one, which starts now, and those before it that come too late: they left."""
        late: list[Place] = []
        for place in [place for place in self._places if place.started is None]:
            if now < place.deadline and not place.end.done:
                place.started = now
                return place, late
            self._places.remove(place)
            late.append(place)
        return None, late

    def leave(self, place: Place) -> None:
        """It has ended, or nobody waits for it any more."""
        if place in self._places:
            self._places.remove(place)

    def drain(self) -> list[Place]:
        """Those that have not started, who leave."""
        waiting = [place for place in self._places if place.started is None]
        self._places = [place for place in self._places if place.started is not None]
        return waiting

    def __len__(self) -> int:
        return len(self._places)


class Filters:
    """The line and its thread."""

    def __init__(self, timeout_s: float) -> None:
        self._line, self._prices, self._timeout_s = Line(timeout_s), Prices(), timeout_s
        self._lock = threading.Lock()  # of both: the thread learns
        self._thread = Threads(1, "slow")

    async def run(self, kind: str, pixels: int, deadline: float, work: Callable[[], T]) -> tuple[T, float]:
        """`work()` in its turn; its result and its seconds. It is priced as `kind`, by its pixels.

        Cancelled, or at its deadline (time.monotonic()), it leaves the line where it has not begun.
        Raises: BusyError where too many wait, or it was not done by its deadline; what `work` raises.
        """
        now = time.monotonic()
        with self._lock:
            cost_s = self._prices.cost_s(kind, pixels)
            place = Place(kind=kind, pixels=pixels, cost_s=cost_s, deadline=deadline, work=work)
            num_before, wait_s = len(self._line), self._line.enter(place, now)
        if wait_s is not None:
            raise BusyError("filters", f"{num_before} before this", "one runs at a time", "try again later",
                            retry_after_s=wait_s)  # fmt: skip
        place.end.then(partial(self._gone, place))
        try:
            self._thread.start(self._next)
        except RuntimeError:
            place.end.fail(_closed())
        timer = asyncio.get_running_loop().call_later(deadline - now, self._late, place)
        try:
            return await place.end.wait()
        finally:
            timer.cancel()

    def close(self) -> None:
        """Refuse what waits and what comes. What runs is finished: nobody waits for it here."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            places = self._line.drain()
        for place in places:
            place.end.fail(_closed())

    def _gone(self, place: Place) -> None:
        with self._lock:
            if place.started is None:
                self._line.leave(place)

    def _late(self, place: Place) -> None:
        with self._lock:
            if place.started is None:
                self._line.leave(place)
            wait_s = self._line.wait_s(place.cost_s, self._timeout_s, time.monotonic()) or 0.0
        rule, remedy = "not done in time", "send a smaller picture, or try again later"
        place.end.fail(BusyError("filters", "deadline", rule, remedy, retry_after_s=wait_s))

    def _next(self) -> None:
        """In the thread, once for each that entered: whoever is next, if anyone still is."""
        with self._lock:
            place, late = self._line.take(time.monotonic())
        for one in late:
            if not one.end.done:
                self._late(one)
        if place is None:
            return
        started = time.monotonic()
        try:
            result = place.work()
        except Exception as error:
            end = partial(place.end.fail, error)
        else:
            seconds = time.monotonic() - started
            end = partial(place.end.keep, (result, seconds))
            with self._lock:
                self._prices.learn(place.kind, place.pixels, seconds)
        with self._lock:
            self._line.leave(place)
        end()


def _closed() -> UnavailableError:
    return UnavailableError("filters", "closed", "this replica is going away", "try again")
