"""The calls of one request: so many at a time that the engine waits for none of them, and one turn for them all."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping

from rayscale.serve.batching import F32, Timing
from rayscale.serve.engine import Runner

Ask = Callable[[Mapping[str, F32]], Awaitable[dict[str, F32]]]
"""Inputs -> outputs, as `Runner.call`."""


async def run(
    engine: Runner, digest: str, part: Callable[[Ask, int], Awaitable[None]], count: int, deadline: float
) -> Timing:
    """`part` of 0 .. count - 1, each of which asks once, at most `Crew.window` of them at a time.

    The timing is of asking alone: what parts do beside it is not in it. Raises: as `Runner.call`, and what a part does.
    """
    owner = uuid.uuid4().hex
    num_asking, since, asked_s, run_s = 0, 0.0, 0.0, 0.0

    async def ask(inputs: Mapping[str, F32]) -> dict[str, F32]:
        nonlocal num_asking, since, asked_s, run_s
        if not num_asking:
            since = time.monotonic()
        num_asking += 1
        try:
            outputs, timing = await engine.call(digest, inputs, deadline=deadline, owner=owner)
        finally:
            num_asking -= 1
            if not num_asking:
                asked_s += time.monotonic() - since
        run_s += timing.run_s
        return outputs

    async def one(index: int) -> None:
        await part(ask, index)

    await each(one, count, engine.of(digest).window)
    return Timing(max(0.0, asked_s - run_s), run_s)


async def each(one: Callable[[int], Awaitable[None]], count: int, window: int) -> None:
    """`one` of 0 .. count - 1, at most `window` at a time. What fails, or a cancellation, ends the others."""
    if count == 1:
        await one(0)
        return
    indices = iter(range(count))

    async def work() -> None:
        for index in indices:
            await one(index)

    workers = [asyncio.ensure_future(work()) for _ in range(min(window, count))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
