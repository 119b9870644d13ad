"""Many requests at once: nothing mixed up, an overload turned away with a true time to come back, nobody starved."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import runpy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayscale import artifact
from rayscale.artifact import Abort
from rayscale.contract import ModelCard
from rayscale.serve.admission import Admission
from rayscale.serve.api import create_app
from rayscale.serve.batching import Item, Job, Model, Queue, TileJob
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.gateway import Gateway, GatewaySettings
from rayscale.serve.table import Release

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
service = runpy.run_path(str(Path(__file__).parents[1] / "service.py"))
photo, png, is_problem = service["photo"], service["png"], service["is_problem"]
F32 = NDArray[np.float32]
TILE_S, TILE_PX = 0.05, 64


@contextmanager
def serving(session: object, timeout_s: float = 60.0, **engine_settings: int) -> Iterator[FastAPI]:
    """The application over an engine of this session."""
    engine = Engine(EngineSettings(**engine_settings), load=lambda folder, digest: session)  # type: ignore
    engine.prepare("d", Path())
    release = Release(name="photos", version=1, digest="d", uri="")
    gateway = Gateway(
        GatewaySettings(timeout_s=timeout_s), engine, service["FakeRouting"](release), service["FakeMeters"]()
    )
    app = create_app(gateway)
    app.state.gateway = gateway
    try:
        yield app
    finally:
        gateway.close()


async def upscale(app: FastAPI, body: bytes, gone: asyncio.Event | None = None) -> httpx.Response:
    """One request, as a server passes it on; the client hangs up when `gone` is set."""
    incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        for message in incoming:
            return message
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": "/v1/upscale", "raw_path": b"/v1/upscale", "query_string": b"", "root_path": "",
             "headers": [(b"host", b"t")], "client": ("127.0.0.1", 1), "server": ("t", 80)}  # fmt: skip
    await app(scope, receive, send)  # type: ignore[arg-type]
    content = b"".join(m.get("body", b"") for m in sent[1:])  # type: ignore[misc]
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=content)  # type: ignore[arg-type]


# --- many at once


class MixedUp:
    """A session that gives the pictures of a batch each other's results."""

    def __init__(self, session: artifact.Session) -> None:
        self._session = session
        self.card, self.digest, self.provider = session.card, session.digest, session.provider

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        return {name: np.roll(value, 1, axis=0) for name, value in self._session.run(inputs, abort).items()}


def sha256(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return hashlib.sha256(response.content).hexdigest()


def wrong(answers: Mapping[int, httpx.Response], alone: list[str]) -> int:
    """How many of those who stayed got another answer than alone."""
    return sum(sha256(answer) != alone[index] for index, answer in answers.items())


def test_200_pictures_at_once_are_what_each_is_alone_while_60_clients_hang_up(tmp_path: Path) -> None:
    small["write"](tmp_path / "a")
    session = artifact.load(tmp_path / "a", threads=1)
    sides = [(40, 52), (48, 48), (33, 64), (90, 70), (110, 60)]  # three of them whole, two in tiles
    bodies = [png(photo(*sides[i % len(sides)], seed=i)) for i in range(200)]
    tiles = {"tile_px": 48, "whole_max_px": 64 * 64}

    def together(session: object) -> tuple[dict[int, httpx.Response], list[httpx.Response]]:
        """The answers to those who stayed, and what came of the others."""
        draw = random.Random(0)
        moments = Counter([0] * 6 + draw.choices(range(1, 130), k=54))  # by how many have their answer
        waiting, gone = set(range(200)), [asyncio.Event() for _ in bodies]
        stayed: dict[int, httpx.Response] = {}
        left: list[httpx.Response] = []

        def hang_up(count: int) -> None:
            """So many of those who wait, whatever is being done for them."""
            for index in draw.sample(sorted(waiting), count):
                waiting.remove(index)
                gone[index].set()

        async def client(index: int) -> None:
            answer = await upscale(app, bodies[index], gone[index])
            if gone[index].is_set():
                left.append(answer)
                return
            waiting.remove(index)
            stayed[index] = answer
            hang_up(moments[len(stayed)])

        async def main() -> None:
            hang_up(moments[0])
            await asyncio.gather(*map(client, range(200)))

        with serving(session, max_batch=4, **tiles) as app:
            asyncio.run(main())
        return stayed, left

    with serving(session, **tiles) as app:
        alone = [sha256(asyncio.run(upscale(app, body))) for body in bodies]
    assert len(set(alone)) == 200
    stayed, left = together(session)
    assert (len(stayed), len(left)) == (140, 60)
    dropped = sum(answer.status_code == 499 for answer in left)
    print(f"\nof 60 pictures that nobody waited for, {dropped} were not finished")
    assert dropped > 40
    assert wrong(stayed, alone) == 0
    assert wrong(together(MixedUp(session))[0], alone) > 0


# --- more than can be done


class Device:
    """x2 by nearest neighbour; a tile of 64 x 64 takes 50 ms, others by their area. Runs are noted by their seconds."""

    def __init__(self) -> None:
        self.card: ModelCard = small["card"](halo_px=0)
        self.digest, self.provider = "d", "Simulated"
        self.runs: list[float] = []

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        (nchw,) = inputs.values()
        started = time.monotonic()
        time.sleep(TILE_S * nchw.shape[0] * nchw.shape[2] * nchw.shape[3] / TILE_PX**2)
        self.runs.append(time.monotonic() - started)
        return {"image_out": nchw.repeat(2, 2).repeat(2, 3)}


ONE_TILE = {"tile_px": TILE_PX, "whole_max_px": TILE_PX**2}


def check_refusal(response: httpx.Response) -> int:
    """Its Retry-After; 0 of what was let in and not done in time, which a busy machine may cause."""
    if "passed before" in is_problem(response, 503, "try again later")["detail"]:
        return 0
    is_problem(response, 503, "backlog")
    assert int(response.headers["retry-after"]) >= 1
    return int(response.headers["retry-after"])


def test_five_times_too_much_work_costs_no_goodput() -> None:
    device, body, seconds = Device(), png(photo(64, 64)), 2.0

    async def main(app: FastAPI) -> tuple[list[httpx.Response], float]:
        asked, started = [], time.monotonic()
        for i in range(round(5 * seconds / TILE_S)):  # an open loop
            await asyncio.sleep(started + i * TILE_S / 5 - time.monotonic())
            asked.append(asyncio.create_task(upscale(app, body)))
        return await asyncio.gather(*asked), time.monotonic() - started

    with serving(device, timeout_s=1.5, **ONE_TILE) as app:
        device.runs.clear()
        answers, took_s = asyncio.run(main(app))
    good = [answer for answer in answers if answer.status_code == 200]
    capacity = took_s / statistics.mean(device.runs)  # as this machine sleeps
    print(f"\ngoodput {len(good) / capacity:.3f} of capacity; {len(device.runs)} runs, {len(good)} answers")
    assert len(good) >= 0.9 * capacity  # seen: 0.95 to 0.98, on a busy machine
    told = [check_refusal(answer) for answer in answers if answer.status_code != 200]
    assert len(told) > 2 * len(good)
    assert told.count(0) < len(good)


def comebacks(share: float, timeout_s: float = 2.0) -> tuple[list[bool], float, float]:
    """All at once five times what fits, and those who are refused again after `share` of what they were told.

    Whether each of these was let in then, the goodput as a share of the capacity, and the device's longest run.
    """
    device, body = Device(), png(photo(64, 64))

    async def client(app: FastAPI) -> tuple[int, bool]:
        answer = await upscale(app, body)
        if answer.status_code == 200:
            return 0, True
        after_s = check_refusal(answer)
        if not after_s:
            return 0, False
        await asyncio.sleep(share * after_s)
        return after_s, (await upscale(app, body)).status_code == 200

    async def main(app: FastAPI) -> tuple[list[tuple[int, bool]], float]:
        started = time.monotonic()
        clients = [client(app) for _ in range(round(5 * timeout_s / TILE_S))]
        return await asyncio.gather(*clients), time.monotonic() - started

    with serving(device, timeout_s=timeout_s, **ONE_TILE) as app:
        device.runs.clear()
        found, took_s = asyncio.run(main(app))
    again = [ok for after_s, ok in found if after_s]
    goodput = sum(ok for _, ok in found) * statistics.mean(device.runs) / took_s
    print(f"\nafter {share:g} of Retry-After: {sum(again)} of {len(again)} let in; goodput {goodput:.3f}")
    return again, goodput, max(device.runs)


@pytest.mark.long
def test_who_comes_back_as_told_is_let_in_and_after_half_of_it_many_are_not() -> None:
    for _ in range(3):
        again, goodput, longest_s = comebacks(1.0)
        if longest_s < 1.5 * TILE_S:
            break  # else the machine stood still, all were sent away for longer than it took: once more, same bounds
    assert len(again) > 100
    assert sum(again) >= 0.6 * len(again)  # seen: 0.76 to 0.98, on a busy machine; told all the same time: 0.1
    assert goodput >= 0.75
    early, _, _ = comebacks(0.5)
    assert sum(early) / len(early) < sum(again) / len(again)


class Everyone:
    """The negative control of `Admission`: all are told when there is room for one."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def wait_s(self, cost_s: float, backlog_s: float, left_s: float, now: float) -> float | None:
        return Admission(self._timeout_s).wait_s(cost_s, backlog_s, left_s, now)


def simulate(admission: Admission | Everyone, costs: list[float], timeout_s: float) -> list[tuple[float, bool, bool]]:
    """A burst at second 0 whose refused clients come back as told, on a clock of its own.

    Of each of these: its wait, whether it was let in after it, and whether it would have been after half of it.
    """
    done_at, waits = 0.0, {}
    for i, cost_s in enumerate(costs):
        wait_s = admission.wait_s(cost_s, done_at, timeout_s, 0.0)
        if wait_s is None:
            done_at += cost_s
        else:
            waits[i] = wait_s
    events = sorted([(w, 0, i) for i, w in waits.items()] + [(w / 2, 1, i) for i, w in waits.items()])
    early: dict[int, bool] = {}
    found = []
    for due, kind, i in events:
        now = due + (-1e-6 if kind else 1e-6)
        backlog_s = max(0.0, done_at - now)
        if kind:
            early[i] = Everyone(timeout_s).wait_s(costs[i], backlog_s, timeout_s, now) is None
            continue
        let_in = admission.wait_s(costs[i], backlog_s, timeout_s, now) is None
        if let_in:
            done_at = now + backlog_s + costs[i]
        found.append((waits[i], let_in, early[i]))
    return found


@settings(max_examples=40, deadline=None)
@given(cost_s=st.floats(0.1, 5.0), timeout_s=st.floats(10.0, 60.0), times=st.integers(2, 6))
def test_the_time_to_come_back_is_right(cost_s: float, timeout_s: float, times: int) -> None:
    costs = [cost_s] * math.ceil(times * timeout_s / cost_s)
    found = simulate(Admission(timeout_s), costs, timeout_s)
    assert len(found) >= (times - 1) * timeout_s / cost_s
    assert all(let_in and not early for _, let_in, early in found)
    assert max(wait_s for wait_s, _, _ in found) > (times - 1.2) * timeout_s
    told = simulate(Everyone(timeout_s), costs, timeout_s)
    assert sum(let_in for _, let_in, _ in told) <= 2  # all of them at once


def test_engines_share_the_wait_and_it_ends_somewhere() -> None:
    admission = Admission(10.0)
    waits = [admission.wait_s(2.0, 20.0, 10.0, 0.0, 4) for _ in range(3)]
    first = 20.0 - 8.0 / 1.1
    assert waits == pytest.approx([first, first + 0.5, first + 1.0])
    assert [admission.wait_s(2.0, 20.0, 10.0, 0.0) for _ in range(100)][-1] == 100.0
    assert admission.wait_s(2.0, 0.0, 10.0, 1.0) is None  # an idle engine: nobody came back
    assert admission.wait_s(2.0, 20.0, 10.0, 1.0) == pytest.approx(first)


# --- a huge picture and thumbnails


class FirstComeFirstServed(Queue):
    """The negative control: the tiles of a request all run before the next one's."""

    def put(self, job: Job) -> None:
        self._circle.append([job])

    def take(self, now: float) -> list[Item]:
        batch = super().take(now)
        if batch and batch[0][0].taken < batch[0][0].count:
            self._circle.rotate(1)
        return batch


def queued(session: Device, queue: Callable[[int], Queue], side: tuple[int, int], count: int) -> list[list[float]]:
    """Seconds in the queue of `count` thumbnails, one after the other: alone, and beside a picture of `side`."""
    thumbnail, huge = png(photo(32, 32)), png(np.zeros((*side, 3), np.uint8))

    async def thumbnails(app: FastAPI) -> list[float]:
        waits = []
        for _ in range(count):
            answer = await upscale(app, thumbnail)
            assert answer.status_code == 200, answer.text
            spans = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
            waits.append(float(spans["queue"]) / 1e3)
        return waits

    async def main(app: FastAPI) -> list[list[float]]:
        alone, runs = await thumbnails(app), len(session.runs)
        job = asyncio.create_task(upscale(app, huge))
        while len(session.runs) == runs:  # until its first tile has run
            assert not job.done()
            await asyncio.sleep(0.005)
        beside = await thumbnails(app)
        assert not job.done() or count == 1
        job.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await job
        return [alone, beside]

    with serving(session, timeout_s=600.0, **ONE_TILE) as app:
        app.state.gateway.engine._queue = queue(1)
        return asyncio.run(main(app))


def p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def waits(queue: Queue, gaps: list[float], thumbnail_s: float, tiles: int) -> list[float]:
    """How long each thumbnail of one client waited, in tiles of a picture of so many, on a clock of its own.

    gaps: from the end of one thumbnail to the next one's coming, which is while a batch runs that began before.
    """
    model, now, found = Model(Device(), 1.0), 0.0, []
    whole, part = (np.zeros((side, side, 3), np.uint8) for side in (TILE_PX, TILE_PX // 2))

    def job(pieces: list[NDArray[np.uint8]]) -> TileJob:
        return TileJob(model=model, deadline=math.inf, tiles=pieces, place=lambda index, result: None)

    if tiles:
        queue.put(job([whole] * tiles))
    for gap in gaps:
        comes = now + gap
        while now < comes and (batch := queue.take(now)):
            now += len(batch)
        now = max(now, comes)
        queue.put(thumbnail := job([part]))
        while (batch := queue.take(now))[0][0] is not thumbnail:
            now += len(batch)
        found.append(now - comes)
        now += thumbnail_s
    return found


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=40),
    thumbnail_s=st.floats(0.01, 1.0),
    max_batch=st.integers(1, 4),
)
def test_no_thumbnail_waits_for_more_than_the_batch_that_runs(
    gaps: list[float], thumbnail_s: float, max_batch: int
) -> None:
    tiles = 3000 * 4000 // TILE_PX**2
    beside = waits(Queue(max_batch), gaps, thumbnail_s, tiles)
    assert max(beside) <= max_batch + 1e-6  # one batch of its tiles
    assert max(waits(Queue(max_batch), gaps, thumbnail_s, 0)) == 0.0
    assert waits(FirstComeFirstServed(max_batch), [1.0], thumbnail_s, tiles)[0] > 2 * max_batch


def test_a_picture_of_12_megapixels_delays_thumbnails_by_one_tile() -> None:
    device = Device()
    alone, beside = queued(device, Queue, (3000, 4000), 20)
    tile_s = statistics.median(run for run in device.runs if run > 0.8 * TILE_S)
    rise = (p95(beside) - p95(alone)) / tile_s
    print(f"\np95 of the thumbnails' queue rises by {rise:.2f} tiles")
    assert rise < 2  # one, by the clock of the test above, and what a busy machine takes to hand over
    assert statistics.median(beside) - statistics.median(alone) < tile_s  # half of one; behind one more: 1.5
    alone, beside = queued(Device(), FirstComeFirstServed, (64, 64 * 16), 1)
    assert beside[0] - alone[0] > 5 * tile_s
