"""Engines elsewhere: a request's tiles leave in chunks, come back by key, and a dead engine's chunk is asked again.

Both ends are here and neither knows what carries a chunk (`lines.py` does). The work is pure, so asking twice is safe;
what is asked again is bounded by the deadline and by a budget for all requests.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from rayscale import artifact
from rayscale.errors import IntegrityError, RayscaleError, UnavailableError
from rayscale.observe import ASKED, Asked, log
from rayscale.serve.batching import F32, U8, Known, Outcome, Place, Timing, too_late, units
from rayscale.serve.calls import each
from rayscale.serve.course import Begin, Look, T, Then, Tiled
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.threads import Threads

CHUNK_BYTES = 3 << 20  # the larger of what goes and what comes back; a larger tile goes alone
_STALE_S = 10.0  # a backlog that was told so long ago says nothing
_INLINE_BYTES = 1 << 20  # larger results are copied to their place in a thread


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Part of one request, complete in itself: any engine that has the digest may run it."""

    request: str
    index: int
    digest: str
    left_s: float  # until the deadline: clocks of two machines differ
    asked: Asked = Asked()  # whom an engine's log names
    body: U8 | Mapping[str, F32]  # tiles u8[k, h, w, c], or the inputs of one call


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An engine's answer to the chunk of the same request, index and digest."""

    request: str
    index: int
    digest: str
    engine: str
    provider: str
    backlog_s: float  # how long the engine has to do what it was asked already
    body: U8 | Mapping[str, F32] | RayscaleError
    timing: Timing = Timing(0.0, 0.0)

    @property
    def declined(self) -> bool:
        """Whether another engine may do it: this one has not the model, or is going away, and did no work."""
        return isinstance(self.body, UnavailableError) and self.body.field != "request"  # that one came too late


class LostError(Exception):
    """The chunk is lost: with the engine that had it ("": none had it yet), or for want of one."""

    def __init__(self, engine: str, why: str = "died") -> None:
        super().__init__(f"{engine or 'an engine'} {why}")
        self.engine, self.why = engine, why


Carry = Callable[[Chunk], Awaitable[Reply]]
"""Raises: LostError."""


async def answer(engine: Engine, name: str, chunk: Chunk) -> Reply:
    """An engine's end. Cancelling it drops what has not started. Raises: what is nobody's fault but ours."""
    ASKED.set(chunk.asked)
    deadline = time.monotonic() + chunk.left_s
    body: U8 | Mapping[str, F32] | RayscaleError
    timing, provider = Timing(0.0, 0.0), ""
    try:
        provider = engine.session(chunk.digest).provider
        if isinstance(chunk.body, np.ndarray):
            body, timing = await _run_tiles(engine, chunk, deadline)
        else:
            body, timing = await engine.call(chunk.digest, chunk.body, deadline=deadline, owner=chunk.request)
    except RayscaleError as error:
        body = error
    return Reply(
        request=chunk.request,
        index=chunk.index,
        digest=chunk.digest,
        engine=name,
        provider=provider,
        backlog_s=engine.backlog_s(),
        body=body,
        timing=timing,
    )


async def _run_tiles(engine: Engine, chunk: Chunk, deadline: float) -> tuple[U8, Timing]:
    assert isinstance(chunk.body, np.ndarray)
    results: dict[int, U8] = {}
    timing = await engine.run(
        chunk.digest, list(chunk.body), results.__setitem__, deadline=deadline, owner=chunk.request
    )
    return _stacked([results[index] for index in range(len(results))]), timing


class RetryBudget:
    """How much may be asked again: a share of what succeeds and a reserve, so that retries cannot become the load."""

    def __init__(self, *, reserve: float = 200.0, share: float = 0.2) -> None:
        self._reserve, self._share, self._left = reserve, share, reserve

    def earn(self) -> None:
        self._left = min(self._reserve, self._left + self._share)

    def spend(self) -> bool:
        """Whether one more may be asked again."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class RemoteEngine:
    """`engine.Runner` over engines elsewhere. `run`, `call` and `learn` belong to one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        carry: Carry,
        wake: Callable[[], None],
        *,
        window: int = 4,
        budget: RetryBudget | None = None,
    ) -> None:
        """`window`: chunks of one request in flight; `wake` asks for an engine where none runs."""
        self.settings, self.wake = settings, wake
        self._carry, self.window, self._budget = carry, window, budget or RetryBudget()
        self._known: dict[str, Known] = {}
        self._digests: frozenset[str] = frozenset()
        self._num_engines = 0
        self._waiting_s: dict[object, float] = {}  # by request or call, estimated device time of what it waits for
        self._backlogs: dict[str, tuple[float, float]] = {}  # engine -> (seconds, when it said so)
        self._calls = itertools.count()
        self._crashed: dict[str, int] = {}  # digest -> chunks that two engines died of
        self._closed = False

    # models

    def learn(self, known: Mapping[str, Known], num_engines: int) -> None:
        """What the engines have prepared now. What they had stays known to requests that began with it."""
        self._known |= known
        self._digests, self._num_engines = frozenset(known), num_engines
        now = time.monotonic()
        self._backlogs = {k: (s, at) for k, (s, at) in self._backlogs.items() if now - at < _STALE_S}

    def forget(self, digest: str) -> None:
        self._known.pop(digest, None)
        self._crashed.pop(digest, None)

    @property
    def num_engines(self) -> int:
        return max(1, self._num_engines)

    @property
    def digests(self) -> frozenset[str]:
        return self._digests.intersection(self._known)

    def known(self) -> dict[str, Known]:
        return dict(self._known)

    def outcomes(self) -> dict[str, Outcome]:
        """What no engine lived to tell; the rest is in their own reports."""
        return {digest: Outcome(failed=count) for digest, count in self._crashed.items()}

    def session(self, digest: str) -> Known:
        """Raises: UnavailableError when no engine has said that it has it."""
        known = self._known.get(digest)
        if known is None:
            raise UnavailableError("model", digest[:12], "is not loaded by any engine", "try again")
        return known

    # requests

    def cost_s(self, digest: str, units: int) -> float:
        """As `Engine.cost_s`."""
        return units * self.session(digest).seconds_per_unit

    def backlog_s(self) -> float:
        """Estimated seconds until an engine is free: what they said lately, and at least what was asked from here."""
        now = time.monotonic()  # and the copies below: codec threads ask this too
        told = [max(0.0, s - (now - at)) for s, at in self._backlogs.copy().values() if now - at < _STALE_S]
        mean_s = sum(told) / len(told) if told else 0.0
        return max(mean_s, sum(self._waiting_s.copy().values()) / max(1, self._num_engines))

    async def run(self, digest: str, tiles: Sequence[U8], place: Place, *, deadline: float) -> Timing:
        """As `Engine.run`, over as many engines as are free. Raises: as it, and when two engines died of a chunk."""
        known, request = self.session(digest), uuid.uuid4().hex
        height, width, _ = tiles[0].shape
        tile_bytes = max(tiles[0].nbytes, 3 * height * width * known.card.spec.scale**2)
        share = -(-len(tiles) // max(1, self._num_engines))  # every engine gets its part
        count = max(1, min(CHUNK_BYTES // tile_bytes, share))
        starts = range(0, len(tiles), count)
        timings: list[Timing] = []

        async def one(index: int) -> None:
            start = starts[index]
            body = _stacked(tiles[start : start + count])
            chunk = Chunk(request=request, index=index, digest=digest, left_s=0.0, body=body)
            reply = await self._ask(chunk, deadline)
            self._waiting_s[request] -= tile_s * len(body)
            assert isinstance(reply.body, np.ndarray)
            if len(tiles) == 1:  # it is kept, not copied
                place(0, reply.body[0])
            else:
                await _place(reply.body, start, place)
            timings.append(reply.timing)

        began, tile_s = time.monotonic(), height * width * known.seconds_per_unit
        with self._waiting(request, tile_s * len(tiles)):
            await each(one, len(starts), self.window)
        run_s = sum(timing.run_s for timing in timings)
        return Timing(max(0.0, time.monotonic() - began - run_s), run_s)

    async def run_between(
        self, digest: str, pool: Threads, begin: Begin, then: Then[T], *, deadline: float, look: Look | None = None
    ) -> T | None:
        """As `Engine.run_between`."""
        loop = asyncio.get_running_loop()

        def first() -> tuple[Threads, Tiled | None]:
            rest = pool if look is None else look()
            return rest, begin() if rest is pool else None

        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                rest, tiled = await loop.run_in_executor(pool, first)
                if rest is not pool:
                    tiled = await loop.run_in_executor(rest, begin)
        except TimeoutError:
            raise too_late() from None
        if tiled is None:
            return None
        timing = await self.run(digest, tiled.tiles, tiled.place, deadline=deadline)
        return await loop.run_in_executor(rest, then, timing)

    async def call(
        self, digest: str, inputs: Mapping[str, F32], *, deadline: float, owner: str = ""
    ) -> tuple[dict[str, F32], Timing]:
        """As `Engine.call`. Raises: as it, and when two engines died of it."""
        known = self.session(digest)
        artifact.bind(known.card, {name: value.shape for name, value in inputs.items()})  # raises for what does not fit
        chunk = Chunk(
            request=owner or uuid.uuid4().hex, index=next(self._calls), digest=digest, left_s=0.0, body=dict(inputs)
        )
        with self._waiting(chunk.index, known.seconds_per_unit * units(known.card.spec, inputs)):
            reply = await self._ask(chunk, deadline)
        assert isinstance(reply.body, Mapping)
        return dict(reply.body), reply.timing

    @contextmanager
    def _waiting(self, key: object, cost_s: float) -> Iterator[None]:
        self._waiting_s[key] = cost_s
        try:
            yield
        finally:
            del self._waiting_s[key]

    async def _ask(self, chunk: Chunk, deadline: float) -> Reply:
        """One chunk, asked again where an engine died of it or had to decline. Raises: RayscaleError."""
        dead: set[str] = set()
        declined: RayscaleError | None = None
        for attempt in itertools.count():
            if self._closed:
                raise UnavailableError("gateway", "closed", "this replica is going away", "try again")
            if (left_s := deadline - time.monotonic()) <= 0:
                raise declined or too_late()
            try:
                async with asyncio.timeout(left_s):
                    reply = await self._carry(replace(chunk, left_s=left_s, asked=ASKED.get()))
            except TimeoutError:
                raise declined or too_late() from None
            except LostError as lost:
                if lost.engine:
                    dead.add(lost.engine)
                if len(dead) == 2:
                    log.error("model %s: two engines died of the same chunk", chunk.digest)
                    self._crashed[chunk.digest] = self._crashed.get(chunk.digest, 0) + 1
                    rule = "two engines died of a part of this request"
                    raise UnavailableError("engine", ", ".join(sorted(dead)), rule, "send another picture") from None
                if not self._budget.spend():
                    log.warning("a chunk is not asked again: the budget for that is spent")
                    raise UnavailableError("engine", lost.engine or "none", lost.why, "try again") from None
            else:
                self._backlogs[reply.engine] = reply.backlog_s, time.monotonic()
                if not isinstance(reply.body, RayscaleError):
                    self._budget.earn()
                    return _checked(reply, chunk)
                if not reply.declined:
                    raise reply.body
                declined = reply.body
            await asyncio.sleep(min(1.0, 0.02 * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError  # count() does not end

    def close(self) -> None:
        self._closed = True


def _checked(reply: Reply, chunk: Chunk) -> Reply:
    """Raises: IntegrityError for an answer to something else: two requests, or two versions, never mix."""
    got, asked = ((x.request, x.index, x.digest) for x in (reply, chunk))
    if got != asked:
        raise IntegrityError("reply", got, f"must be the answer to {asked}", "report it")
    return reply


def _stacked(tiles: Sequence[U8]) -> U8:
    """u8[h, w, c] of each -> u8[k, h, w, c]; one that lies in a piece is not copied."""
    return np.ascontiguousarray(tiles[0])[None] if len(tiles) == 1 else np.stack(tiles)


async def _place(results: U8, start: int, place: Place) -> None:
    def copy() -> None:
        for offset, result in enumerate(results):
            place(start + offset, result)

    if results.nbytes <= _INLINE_BYTES:
        copy()
    else:
        await asyncio.to_thread(copy)
