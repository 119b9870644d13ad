"""Open-loop load: requests leave by a clock, whether or not earlier ones were answered, as people's do.

A latency counts from when a request was due: a server that stalls shows all of the wait, not only the part of it that
a patient client would have seen. Nothing is tried again.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from rayscale.client import AsyncClient
from rayscale.client.answers import Answer
from rayscale.client.calls import Call
from rayscale.client.exchange import problem

PERCENTILES = (50, 90, 95, 99)
NOT_SENT = "not sent: too many in flight"
TIMED_OUT = "timeout"


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One request; seconds since the start of the run."""

    due_s: float
    sent_s: float
    done_s: float
    error: str = ""  # its kind; "" for an answer
    line: str = ""  # what the error says
    model: str = ""  # name:version that answered

    @property
    def latency_s(self) -> float:
        return self.done_s - self.due_s


def arrivals(rate: float, seconds: float, seed: int | None = None) -> list[float]:
    """When requests are due, in [0, seconds): evenly, or by chance (a Poisson process of this seed)."""
    if seed is None:
        return [i / rate for i in range(math.ceil(rate * seconds)) if i / rate < seconds]
    draw, found, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        found.append(now)
    return found


async def fire(
    client: AsyncClient, asked: Sequence[Call[Any]], due: Sequence[float], *, max_in_flight: int = 500
) -> list[Shot]:
    """Send `asked`, round and round, at the times `due`, and wait for all answers. `client` must not retry."""
    start = time.monotonic()
    shots: list[Shot] = []
    flying: set[asyncio.Task[Shot]] = set()
    for i, due_s in enumerate(due):
        if (left_s := start + due_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        if len(flying) >= max_in_flight:
            now_s = time.monotonic() - start
            shots.append(Shot(due_s=due_s, sent_s=now_s, done_s=now_s, error=NOT_SENT))
            continue
        task = asyncio.create_task(_shot(client, asked[i % len(asked)], start, due_s))
        flying.add(task)
        task.add_done_callback(flying.discard)
        task.add_done_callback(lambda done: shots.append(done.result()))
    await asyncio.gather(*flying)
    await asyncio.sleep(0)  # the last callbacks
    return sorted(shots, key=lambda shot: shot.due_s)


async def _shot(client: AsyncClient, call: Call[Any], start: float, due_s: float) -> Shot:
    sent_s, error, line, model = time.monotonic() - start, "", "", ""
    try:
        answer = await client.send(call)
        if isinstance(answer, Answer) and answer.model:
            model = answer.model if answer.version is None else f"{answer.model}:{answer.version}"
    except Exception as failure:  # also of some library: the other requests are measured nevertheless
        error, line = kind_of(failure), str(failure)
    return Shot(due_s=due_s, sent_s=sent_s, done_s=time.monotonic() - start, error=error, line=line, model=model)


def kind_of(error: Exception) -> str:
    """ "503 busy", "timeout", "ConnectError", ...: what is counted."""
    cause = error.__cause__
    if isinstance(cause, httpx.HTTPStatusError):
        kind = str(problem(cause.response).get("type", "")).rpartition(":")[2]
        return f"{cause.response.status_code} {kind}".strip()
    if isinstance(cause, httpx.TimeoutException):
        return TIMED_OUT
    return type(cause or error).__name__


def summary(shots: Sequence[Shot]) -> dict[str, Any]:
    """Counts, rates and latencies of a run. Latencies are of answers; how late requests left tells whether the
    generator kept its clock."""
    answered = [shot for shot in shots if not shot.error]
    finished = sorted(shot.done_s for shot in answered)
    gaps = [b - a for a, b in zip([0.0, *finished], finished, strict=False)]
    span_s = max((shot.done_s for shot in shots), default=0.0)
    return {
        "sent": len(shots),
        "answered": len(answered),
        "errors": dict(Counter(shot.error for shot in shots if shot.error).most_common()),
        "answers_per_s": round(len(answered) / span_s, 3) if span_s else 0.0,
        "latency_ms": spread_ms([shot.latency_s for shot in answered]),
        "sent_late_ms": spread_ms([shot.sent_s - shot.due_s for shot in shots]),
        "longest_gap_ms": round(1e3 * max(gaps, default=0.0), 3),  # between two answers
        "models": dict(Counter(shot.model for shot in answered if shot.model).most_common()),
    }


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """{"p50": ..., "max": ...} in milliseconds, by nearest rank; empty for none."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    found = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}
    return {name: round(1e3 * value, 3) for name, value in {**found, "max": ordered[-1]}.items()}
