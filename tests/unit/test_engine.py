"""The engine: exact tiles, fairness, cancellation, deadlines, batches across requests; on fakes and on ONNX Runtime."""

from __future__ import annotations

import asyncio
import functools
import gc
import runpy
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rayscale import artifact, imaging
from rayscale.artifact import Abort
from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError, ImageError, IntegrityError, TooLargeError, UnavailableError
from rayscale.serve.batching import CallJob, Job, Model, Queue, TileJob, Timing
from rayscale.serve.engine import Canvas, Engine, EngineSettings, plan
from rayscale.serve.threads import Threads

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
U8, F32 = NDArray[np.uint8], NDArray[np.float32]
POISON = 255


class FakeSession:
    """Doubles pixels; every run waits for `gate`, and is recorded as the first pixel of each tile of its batch."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.card: ModelCard = small["card"](halo_px=0)
        self.digest, self.provider, self.seconds = "fake", "Fake", seconds
        self.runs: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        (nchw,) = inputs.values()
        names = [round(float(x[0, 0, 0]) * 255) for x in nchw]
        if names != [0]:  # the warm-up
            self.runs.append(names)
            self.gate.wait(10)
        time.sleep(self.seconds)
        if POISON in names:
            raise ValueError("poison")
        return {"image_out": nchw.repeat(2, 2).repeat(2, 3)}


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def begin(session: FakeSession, **settings: int) -> Engine:
        engine = Engine(EngineSettings(**settings), load=lambda folder, digest: session)  # type: ignore[arg-type]
        engine.prepare("d", Path())
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        engine.close()


@pytest.fixture
def pool() -> Iterator[Threads]:
    with Threads(1, "codec") as codecs:
        yield codecs


class Tiles:
    """A picture cut into tiles of these names."""

    def __init__(self, *names: int) -> None:
        self.tiles = [tile(name) for name in names]

    def place(self, index: int, result: U8) -> None:
        pass


def tile(name: int, side: int = 8) -> U8:
    return np.full((side, side, 3), name, np.uint8)


def nowhere(index: int, result: U8) -> None:
    """Results are not looked at."""


async def ask(engine: Engine, *names: int, timeout_s: float = 10.0, side: int = 8) -> Timing:
    return await engine.run("d", [tile(n, side) for n in names], nowhere, deadline=time.monotonic() + timeout_s)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


# --- pictures and tiles


def serve_whole_and_tiled(folder: Path, digest: str, picture: U8, **settings: int) -> tuple[U8, Canvas]:
    engine = Engine(EngineSettings(threads=1, **settings))
    engine.prepare(digest, folder)
    spec = engine.session(digest).card.spec
    canvas = Canvas(plan(spec, *picture.shape[:2], engine.settings), picture)
    try:
        asyncio.run(engine.run(digest, canvas.tiles, canvas.place, deadline=time.monotonic() + 30))
    finally:
        engine.close()
    whole = artifact.load(folder, threads=1).transform(imaging.to_nchw_f32(picture))
    return imaging.to_hwc_u8(whole), canvas


@pytest.mark.parametrize(("height", "width"), [(31, 33), (32, 32), (33, 32), (97, 50), (20, 401), (64, 65)])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_tiled_is_untiled_bit_for_bit(tmp_path: Path, height: int, width: int, max_batch: int) -> None:
    digest = small["write"](tmp_path / "a")
    picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    whole, canvas = serve_whole_and_tiled(
        tmp_path / "a", digest, picture, tile_px=32, whole_max_px=1, max_batch=max_batch
    )
    np.testing.assert_array_equal(canvas.result, whole)
    assert len(canvas.tiles) > 1 or (height <= 32 and width <= 32)


def test_a_halo_one_pixel_short_is_seen(tmp_path: Path) -> None:
    digest = small["write"](tmp_path / "a", halo_px=1)  # the negative control of the test above
    picture = np.random.default_rng(0).integers(0, 256, (97, 50, 3), np.uint8)
    whole, canvas = serve_whole_and_tiled(tmp_path / "a", digest, picture, tile_px=32, whole_max_px=1)
    assert (canvas.result != whole).any()


def test_an_only_tile_is_kept_and_not_copied() -> None:
    planned = plan(small["card"](halo_px=2).spec, 9, 7, EngineSettings())
    canvas, made = Canvas(planned, np.zeros((9, 7, 3), np.uint8)), np.ones((18, 14, 3), np.uint8)
    with pytest.raises(ValueError, match=r"came back as \(18, 15, 3\), not as \(18, 14, 3\)"):
        canvas.place(0, np.ones((18, 15, 3), np.uint8))
    canvas.place(0, made)
    assert np.shares_memory(canvas.result, made)


def test_sides_are_padded_to_align_and_cropped_back() -> None:
    spec = small["card"](halo_px=2, align=4).spec
    planned = plan(spec, 41, 30, EngineSettings(tile_px=16, whole_max_px=1))
    assert (planned.padded_height, planned.padded_width) == (44, 32)
    assert all(t.y % 4 == 0 and t.x % 4 == 0 and t.height % 4 == 0 and t.width % 4 == 0 for t in planned.tiles)
    picture = np.random.default_rng(1).integers(0, 256, (41, 30, 3), np.uint8)
    canvas = Canvas(planned, picture)
    for index in reversed(range(len(canvas.tiles))):
        canvas.place(index, canvas.tiles[index].repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(canvas.result, picture.repeat(2, 0).repeat(2, 1))


def test_whole_or_tiled_is_decided_by_area_and_halo() -> None:
    exact, inexact = small["card"]().spec, small["card"](halo_px=None).spec
    settings = EngineSettings(tile_px=64, whole_max_px=100 * 100, untiled_max_px=200 * 200)
    assert plan(exact, 100, 100, settings).tiling == "whole"
    assert plan(exact, 101, 100, settings).tiling == "tiled 4"
    assert plan(replace(exact, halo_error=0.5 / 255), 101, 100, settings).tiling == "tiled 4, within 0.002"
    assert plan(inexact, 200, 200, settings).tiling == "whole"
    with pytest.raises(TooLargeError, match="looks everywhere"):
        plan(inexact, 201, 200, settings)
    far = small["card"](halo_px=60).spec  # more than the tile could hold: the tile grows
    tiles = plan(far, 500, 300, replace(settings, max_batch=2)).tiles
    assert (tiles[0].height, tiles[0].width) == (240, 240)
    fitted = plan(far, 500, 300, settings).tiles  # alone in its batch a picture has windows of its own size
    assert (len(fitted), fitted[0].height, fitted[0].width) == (len(tiles), 224, 224)


# --- the queue


def job(
    name: int, tiles: int = 1, side: int = 8, model: Model | None = None, deadline: float = 1e9, owner: str = ""
) -> Job:
    given = [tile(name, side)] * tiles
    return TileJob(model=model or MODEL, tiles=given, place=nowhere, deadline=deadline, owner=owner)


MODEL = Model(FakeSession(), 1e-3)


def taken(queue: Queue, now: float = 0.0) -> list[list[int]]:
    """Everything in the queue, as the names of each batch's tiles."""
    found = []
    while batch := queue.take(now):
        found.append([int(j.tiles[i][0, 0, 0]) for j, i in batch if isinstance(j, TileJob)])
    return found


def test_requests_take_turns() -> None:
    queue = Queue(1)
    for j in (job(1, tiles=4), job(2), job(3, tiles=2)):
        queue.put(j)
    assert taken(queue) == [[1], [2], [3], [1], [3], [1], [1]]


def test_a_batch_is_of_one_model_and_one_shape_and_fair_within() -> None:
    queue, other = Queue(3), Model(FakeSession(), 1e-3)
    for j in (job(1, tiles=4), job(2, side=16), job(3), job(4, model=other), job(5)):
        queue.put(j)
    assert taken(queue) == [[1, 3, 5], [2], [4], [1, 1, 1]]


def test_the_parts_of_one_request_take_one_turn_together() -> None:
    queue = Queue(1)
    for j in (job(1, 2, owner="a"), job(2, owner="a"), job(3, owner="b"), job(4), job(5, 2), job(6, owner="a")):
        queue.put(j)
    assert taken(queue) == [[1], [3], [4], [5], [1], [5], [2], [6]]
    queue = Queue(4)
    for j in (job(1, 3, owner="a"), job(2, owner="a"), job(3, 2)):
        queue.put(j)
    assert taken(queue) == [[1, 3, 1, 3], [1, 2]]


def test_the_dead_are_never_taken() -> None:
    queue = Queue(4)
    late, gone, alive = job(1, deadline=5.0), job(2), job(3, deadline=5.1)
    for j in (late, gone, alive):
        queue.put(j)
    gone.end.cancel()
    assert queue.cost_s() == pytest.approx(2 * 64 * 1e-3)
    assert taken(queue, now=5.0) == [[3]]
    assert isinstance(late.end.error, UnavailableError)


class TakesTurns(Queue):
    """The control: nobody is urgent."""

    def _first(self, now: float) -> None:
        return None


def in_time(queue: Queue, *, truth: float) -> list[int]:
    """Which of ten pictures of ten tiles are done in 60 s; a tile takes `truth` times the 0.6 s that are estimated."""
    model, now, done = Model(FakeSession(), 0.6 / 64), 0.0, []
    for name in range(10):
        queue.put(job(name, tiles=10, model=model, deadline=60.0 + name / 10))
    while batch := queue.take(now):
        now += 0.6 * truth
        for j, index in batch:
            if index == j.count - 1 and now <= j.deadline:
                assert isinstance(j, TileJob)
                done.append(int(j.tiles[0][0, 0, 0]))
                j.end.keep(Timing(0.0, 0.0))
    return done


def test_a_wrong_estimate_costs_the_last_and_not_all() -> None:
    assert in_time(Queue(1), truth=1.5) == [0, 1, 2, 3, 4, 5]  # of the 6.7 that there is time for
    assert in_time(TakesTurns(1), truth=1.5) == []
    assert sorted(in_time(Queue(1), truth=0.9)) == sorted(in_time(TakesTurns(1), truth=0.9)) == [*range(10)]


def test_who_is_nearly_done_goes_before_who_is_urgent() -> None:
    queue, model = Queue(1), Model(FakeSession(), 1.0 / 64)
    for name, tiles, deadline in ((1, 9, 10.0), (3, 5, 99.0), (2, 1, 99.0), (4, 1, 99.0)):
        queue.put(job(name, tiles, model=model, deadline=deadline))
    first = [int(j.tiles[i][0, 0, 0]) for _ in range(4) for j, i in queue.take(0.0) if isinstance(j, TileJob)]
    assert first == [2, 1, 4, 1]  # and not twice in a row


def test_an_estimate_does_not_jump_with_one_slow_moment() -> None:
    model = Model(FakeSession(), 0.01 / 64)
    one = job(1, model=model)
    for seconds, most in ((0.02, 0.0105), (1.0, 0.0126), (0.001, 0.0126)):
        one.learn(seconds)
        assert one.item_s <= most
    for _ in range(200):
        one.learn(0.03)
    assert one.item_s == pytest.approx(0.03, rel=0.05)  # and comes to what lasts


# --- the engine


def test_what_waits_is_taken_at_once_and_together(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session, max_batch=8)
    session.gate.clear()

    async def main() -> None:
        first = asyncio.create_task(ask(engine, 1))
        await until(lambda: session.runs == [[1]])  # alone: nothing waits for company
        rest = [asyncio.create_task(ask(engine, n)) for n in range(2, 8)]
        await asyncio.sleep(0.02)
        session.gate.set()
        await asyncio.gather(first, *rest)

    asyncio.run(main())
    assert session.runs == [[1], [2, 3, 4, 5, 6, 7]]


def test_a_huge_job_delays_a_small_one_by_one_batch(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session)
    session.gate.clear()

    async def main() -> None:
        huge = asyncio.create_task(ask(engine, *[1] * 50))
        await until(lambda: session.runs == [[1]])
        thumbnail = asyncio.create_task(ask(engine, 2))
        await asyncio.sleep(0.02)
        session.gate.set()
        await asyncio.gather(huge, thumbnail)

    asyncio.run(main())
    assert session.runs.index([2]) == 1
    assert session.runs.count([1]) == 50


def test_a_cancelled_request_stops_running(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session)
    session.gate.clear()

    async def main() -> None:
        request = asyncio.create_task(ask(engine, *[1] * 50))
        await until(lambda: len(session.runs) == 1)
        request.cancel()
        await asyncio.sleep(0.02)
        session.gate.set()
        await ask(engine, 2)

    asyncio.run(main())
    assert session.runs == [[1], [2]]


def test_the_deadline_answers_even_while_the_device_is_busy(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session)
    session.gate.clear()

    async def main() -> None:
        busy = asyncio.create_task(ask(engine, 1))
        await until(lambda: len(session.runs) == 1)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="deadline"):
            await ask(engine, 2, timeout_s=0.05)
        assert time.monotonic() - started < 1
        session.gate.set()
        await busy

    asyncio.run(main())
    assert session.runs == [[1]]


def test_a_poison_tile_fails_its_own_request_only(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session, max_batch=8)
    session.gate.clear()

    async def main() -> list[Timing | BaseException]:
        asks = [asyncio.create_task(ask(engine, 1))]
        await until(lambda: len(session.runs) == 1)
        asks += [asyncio.create_task(ask(engine, n)) for n in (2, POISON, 3)]
        await asyncio.sleep(0.02)
        session.gate.set()
        return await asyncio.gather(*asks, return_exceptions=True)

    results = asyncio.run(main())
    assert [type(r) for r in results] == [Timing, Timing, ValueError, Timing]
    assert [2, POISON, 3] in session.runs  # they did share a batch
    assert engine.outcomes()["fake"][:2] == (3, 1)


def test_runs_that_share_a_batch_are_not_timed(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session, max_batch=2)
    session.gate.clear()

    async def main() -> None:
        asks = [asyncio.create_task(ask(engine, 1))]
        await until(lambda: len(session.runs) == 1)
        asks += [asyncio.create_task(ask(engine, n)) for n in (2, 3)]
        await asyncio.sleep(0.02)
        session.gate.set()
        await asyncio.gather(*asks)

    asyncio.run(main())
    assert session.runs[-1] == [2, 3]
    assert engine.outcomes()["fake"][:3] == (3, 0, 1)


def test_the_event_loop_stays_free_and_time_is_told(start: Callable[..., Engine]) -> None:
    engine = start(FakeSession(seconds=0.05))

    async def main() -> tuple[int, tuple[Timing, Timing]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticker = asyncio.create_task(tick())
        both = await asyncio.gather(ask(engine, 1, 1), ask(engine, 2))
        ticker.cancel()
        return ticks, both

    ticks, (two_tiles, one_tile) = asyncio.run(main())
    assert ticks >= 5
    assert two_tiles.run_s >= 0.1
    assert one_tile.run_s >= 0.05
    assert one_tile.queue_s >= 0.04  # it waited for the other's first tile


def test_the_backlog_is_an_estimate_of_the_wait(start: Callable[..., Engine]) -> None:
    engine = start(FakeSession(seconds=0.02), tile_px=16)

    async def main() -> tuple[float, float]:
        asks = [asyncio.create_task(ask(engine, n, side=16)) for n in range(1, 21)]
        await asyncio.sleep(0)
        estimate, started = engine.backlog_s(), time.monotonic()
        await asyncio.gather(*asks)
        return estimate, time.monotonic() - started

    estimate, took = asyncio.run(main())
    assert took / 3 < estimate < took * 3
    assert engine.backlog_s() == pytest.approx(0.0, abs=0.03)


def test_a_forgotten_model_serves_what_waits_and_nothing_new(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session)
    session.gate.clear()

    async def main() -> None:
        waiting = asyncio.create_task(ask(engine, 1, 1))
        await until(lambda: len(session.runs) == 1)
        engine.forget("d")
        session.gate.set()
        await waiting
        with pytest.raises(UnavailableError, match="not loaded"):
            await ask(engine, 2)

    asyncio.run(main())


def test_closing_refuses_what_waits(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session)
    session.gate.clear()

    async def main() -> None:
        waiting = asyncio.create_task(ask(engine, 1, 1, 1))
        await until(lambda: len(session.runs) == 1)
        engine.close()
        with pytest.raises(UnavailableError, match="going away"):
            await waiting
        with pytest.raises(UnavailableError, match="going away"):
            await ask(engine, 2)
        assert engine._thread.is_alive()  # it still runs the first tile
        session.gate.set()
        await until(lambda: not engine._thread.is_alive())

    asyncio.run(main())
    assert session.runs == [[1]]


def test_closing_does_not_wait_for_what_runs_which_is_answered(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session)
    session.gate.clear()

    async def main() -> None:
        running = asyncio.create_task(ask(engine, 1))
        await until(lambda: len(session.runs) == 1)
        engine.close()  # in the event loop, as a gateway does
        assert engine._thread.is_alive()
        session.gate.set()
        await running

    asyncio.run(main())


CLOSING = """
import threading, time
from pathlib import Path
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.batching import Model, TileJob
import numpy as np, runpy, sys

class Session:
    card, digest, provider = runpy.run_path(sys.argv[1])["card"](halo_px=0), "d", "Fake"
    begun = threading.Event()
    def run(self, inputs, abort=None):
        if next(iter(inputs.values())).any():
            self.begun.set()
            time.sleep(0.5)
            print("ended", flush=True)
        return {"image_out": next(iter(inputs.values())).repeat(2, 2).repeat(2, 3)}

engine = Engine(EngineSettings(), load=lambda folder, digest: Session())
engine.prepare("d", Path())
tiles = [np.ones((8, 8, 3), np.uint8)]
engine._put(TileJob(model=engine._models.get("d"), tiles=tiles, place=print, deadline=1e12))
assert Session.begun.wait(10)
if sys.argv[2] == "close":
    engine.close()
"""


@pytest.mark.parametrize(("how", "ended"), [("close", True), ("forget", False)])
def test_a_process_that_has_closed_its_engine_ends_after_the_run(how: str, ended: bool) -> None:
    given = [sys.executable, "-c", CLOSING, str(Path(__file__).parents[1] / "small_onnx.py"), how]
    done = subprocess.run(given, capture_output=True, text=True, timeout=60, check=True)
    assert ("ended" in done.stdout) == ended, done.stdout + done.stderr


# --- several inputs, and functions that are no pictures


class LinearSession:
    """image * (1 - mask) + mask, frames' mean, or z doubled: what a card says; `gate` holds runs back."""

    def __init__(self, spec: Spec) -> None:
        self.card = ModelCard(family="fake", spec=spec, licence="MIT")
        self.digest, self.provider = "fake", "Fake"
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.aborted = threading.Event()
        self.slow = False

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        artifact.bind(self.card, {name: value.shape for name, value in inputs.items()})
        self.shapes.append({name: value.shape for name, value in inputs.items()})
        while self.slow and abort is not None:
            time.sleep(0.002)
            if abort.options.terminate:
                self.aborted.set()
                raise UnavailableError("run", "fake", "was aborted", "ask again")
        if "mask" in inputs:
            return {"image_out": inputs["image"] * (1 - inputs["mask"]) + inputs["mask"]}
        if "frames" in inputs:
            return {"image_out": inputs["frames"].mean(1)}
        return {"out": 2 * inputs["z"]}


def picture_spec(kind: str, **inputs: tuple[int | str, ...]) -> Spec:
    return Spec(
        kind=kind,  # type: ignore[arg-type]
        inputs=tuple(TensorSpec(name=name, shape=shape) for name, shape in inputs.items()),
        outputs=(TensorSpec(name="image_out", shape=("n", 3, "h", "w")),),
        halo_px=0,
    )


MASKED = picture_spec("transform", image=("n", 3, "h", "w"), mask=("n", 1, "h", "w"))
BURST = picture_spec("burst", frames=("n", 2, 3, "h", "w"))
GENERATE = Spec(
    kind="generate", inputs=(TensorSpec(name="z", shape=("n", 5)),), outputs=(TensorSpec(name="out", shape=("n", 5)),)
)


@contextmanager
def serving(session: LinearSession, **settings: int) -> Iterator[Engine]:
    engine = Engine(EngineSettings(**settings), load=lambda folder, digest: session)  # type: ignore[arg-type]
    engine.prepare("d", Path())
    yield engine
    engine.close()


def in_ten_s() -> float:
    return time.monotonic() + 10


def through(engine: Engine, hwc: U8) -> U8:
    canvas = Canvas(plan(engine.session("d").card.spec, *hwc.shape[:2], engine.settings), hwc)
    asyncio.run(engine.run("d", canvas.tiles, canvas.place, deadline=in_ten_s()))
    assert len(canvas.tiles) > 1
    return canvas.result


def test_a_mask_is_cut_with_its_picture() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (40, 30, 3), np.uint8), rng.integers(0, 2, (40, 30, 1), np.uint8) * np.uint8(255)
    with serving(LinearSession(MASKED), tile_px=16, whole_max_px=1, max_batch=3) as engine:
        found = through(engine, np.concatenate([image, mask], 2))
    np.testing.assert_array_equal(found, np.where(mask == 255, 255, image))


def test_the_frames_of_a_burst_are_cut_together() -> None:
    frames = np.random.default_rng(0).integers(0, 128, (2, 40, 30, 3), np.uint8) * 2
    with serving(LinearSession(BURST), tile_px=16, whole_max_px=1) as engine:
        found = through(engine, np.concatenate(frames, 2))
    np.testing.assert_array_equal(found, (frames.astype(int).sum(0) // 2).astype(np.uint8))


def test_what_is_learnt_of_calls_and_of_tiles_is_one_price_by_pixel() -> None:
    session = LinearSession(MASKED)
    with serving(session) as engine:
        model = engine._models.fetch("d")
        model.known.seconds_per_unit = 1e-3
        inputs = {"image": np.zeros((2, 3, 10, 20), np.float32), "mask": np.zeros((2, 1, 10, 20), np.float32)}
        job = CallJob(model=model, inputs=inputs, deadline=1e9)
        assert job.item_s == pytest.approx(0.4)
        for _ in range(50):
            job.learn(0.8)
        assert engine.cost_s("d", 400) == pytest.approx(0.8, rel=1e-3)


def test_other_channels_than_the_cards_are_refused() -> None:
    for spec, rule in (
        (MASKED, "channels=3: this model takes image and mask: 4 channels"),
        (GENERATE, "generate: is no function from pictures"),
    ):
        with serving(LinearSession(spec)) as engine, pytest.raises(ConfigError, match=rule):
            asyncio.run(ask(engine, 1))


def test_a_call_runs_any_function_and_takes_its_turn() -> None:
    session = LinearSession(GENERATE)
    z = np.arange(15, dtype=np.float32).reshape(3, 5)
    with serving(session) as engine:

        async def main() -> list[tuple[dict[str, F32], Timing]]:
            return await asyncio.gather(*(engine.call("d", {"z": z + k}, deadline=in_ten_s()) for k in range(3)))

        found = asyncio.run(main())
        for k, (outputs, timing) in enumerate(found):
            np.testing.assert_array_equal(outputs["out"], 2 * (z + k))
            assert timing.run_s >= 0
        with pytest.raises(ConfigError, match="z"):
            asyncio.run(engine.call("d", {"y": z}, deadline=in_ten_s()))
        with pytest.raises(UnavailableError, match="not loaded"):
            asyncio.run(engine.call("other", {"z": z}, deadline=in_ten_s()))
        with pytest.raises(UnavailableError, match="deadline"):
            asyncio.run(engine.call("d", {"z": z}, deadline=time.monotonic()))
    assert session.shapes[2:] == [{"z": (3, 5)}] * 3


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_run_that_nobody_waits_for_is_aborted(how: str) -> None:
    session = LinearSession(GENERATE)
    z = np.zeros((1, 5), np.float32)
    with serving(session) as engine:

        async def main() -> None:
            session.slow = True
            asked = asyncio.create_task(
                engine.call("d", {"z": z}, deadline=time.monotonic() + (0.1, 10)[how != "late"])
            )
            await until(lambda: len(session.shapes) == 3)
            if how == "cancelled":
                asked.cancel()
            with pytest.raises((asyncio.CancelledError, UnavailableError)):
                await asked
            await asyncio.to_thread(session.aborted.wait, 5)
            session.slow = False
            await engine.call("d", {"z": z}, deadline=in_ten_s())  # the engine goes on

        asyncio.run(main())
    assert session.aborted.is_set()


def test_a_batch_that_somebody_waits_for_goes_on(start: Callable[..., Engine]) -> None:
    session = FakeSession()
    engine = start(session, max_batch=2)
    session.gate.clear()

    async def main() -> None:
        first = asyncio.create_task(ask(engine, 1))
        await until(lambda: len(session.runs) == 1)
        gone, stays = (asyncio.create_task(ask(engine, n)) for n in (2, 3))
        await asyncio.sleep(0.02)
        session.gate.set()
        await first
        gone.cancel()
        await stays

    asyncio.run(main())
    assert session.runs[1:] in ([[2, 3]], [[3]])


@pytest.mark.parametrize("provider", ["Fake", artifact.CPU])
def test_what_a_request_held_is_gone_with_it(start: Callable[..., Engine], pool: Threads, provider: str) -> None:
    """Without waiting for the collector of cycles, which does not count arrays."""
    session = FakeSession()
    session.provider = provider
    engine = start(session)

    class Pixels:
        pass

    async def request() -> weakref.ref[Pixels]:
        pixels = Pixels()

        def begin(held: Pixels = pixels) -> Tiles:
            return Tiles(1)

        def then(timing: Timing, held: Pixels = pixels) -> Pixels:
            return held

        await engine.run_between("d", pool, begin, then, deadline=time.monotonic() + 10)
        return weakref.ref(pixels)

    async def main() -> None:
        left = await request()
        await until(lambda: left() is None)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_what_follows_the_tiles_ends_as_they_do(start: Callable[..., Engine], pool: Threads) -> None:
    session = FakeSession()
    engine = start(session)
    begun: list[Future[str]] = []

    def then(timing: Timing) -> str:
        begun.append(Future())
        return begun[-1].result(10)

    async def ask_then(name: int, timeout_s: float = 10.0) -> str | None:
        begin = functools.partial(Tiles, name)
        return await engine.run_between("d", pool, begin, then, deadline=time.monotonic() + timeout_s)

    async def main() -> None:
        made = asyncio.create_task(ask_then(1, 0.5))
        await until(lambda: len(begun) == 1)
        await asyncio.sleep(0.6)  # the deadline is the tiles'
        begun[0].set_result("encoded")
        assert await made == "encoded"

        failed = asyncio.create_task(ask_then(2))
        await until(lambda: len(begun) == 2)
        begun[1].set_exception(ValueError("no encoder"))
        with pytest.raises(ValueError, match="no encoder"):
            await failed

        with pytest.raises(ValueError, match="poison"):
            await ask_then(POISON)
        session.gate.clear()
        late = asyncio.create_task(ask_then(4, 0.05))
        dropped = asyncio.create_task(ask_then(5))
        with pytest.raises(UnavailableError, match="deadline"):
            await late
        dropped.cancel()
        await asyncio.sleep(0)
        session.gate.set()
        await ask(engine, 6)
        assert [5] not in session.runs
        assert len(begun) == 2

    asyncio.run(main())


@pytest.mark.parametrize("how", ["there", "elsewhere", "refused", "cancelled"])
def test_who_looks_first_says_where_the_rest_is_done(start: Callable[..., Engine], pool: Threads, how: str) -> None:
    session, where, go = FakeSession(), list[str](), threading.Event()
    engine = start(session)

    def note() -> None:
        where.append(threading.current_thread().name.partition("_")[0])

    def look() -> Threads:
        note()
        if how == "cancelled":
            go.wait(10)
        if how == "refused":
            raise ConfigError("image", 1, "is refused", "send another")
        return pool if how == "there" else other

    def begin() -> Tiles:
        note()
        return Tiles(1)

    def then(timing: Timing) -> str:
        note()
        return "made"

    async def main() -> None:
        asked = engine.run_between("d", pool, begin, then, deadline=time.monotonic() + 10, look=look)
        task = asyncio.create_task(asked)
        if how in ("there", "elsewhere"):
            assert await task == "made"
        elif how == "refused":
            with pytest.raises(ConfigError):
                await task
        else:
            await until(lambda: len(where) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go.set()
            await ask(engine, 2)
            assert session.runs == [[2]]

    with Threads(1, "other") as other:
        asyncio.run(main())
    rest = {"there": ["codec", "codec"], "elsewhere": ["other", "other"]}.get(how, [])
    assert where == ["codec", *rest]


@pytest.mark.parametrize("how", ["late", "cancelled", "refused", "nothing"])
def test_what_comes_before_the_tiles_may_end_it(start: Callable[..., Engine], pool: Threads, how: str) -> None:
    session, go = FakeSession(), threading.Event()
    engine = start(session)

    def begin() -> Tiles | None:
        go.wait(10)
        if how == "refused":
            raise ConfigError("image", 1, "is refused", "send another")
        return None if how == "nothing" else Tiles(1)

    async def main() -> None:
        left_s = 0.05 if how == "late" else 10.0
        asked = engine.run_between("d", pool, begin, lambda timing: "made", deadline=time.monotonic() + left_s)
        task = asyncio.create_task(asked)
        await asyncio.sleep(0.01)
        if how == "late":  # answered, though a codec is busy with it
            with pytest.raises(UnavailableError, match="deadline"):
                await task
        if how == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        go.set()
        if how == "refused":
            with pytest.raises(ConfigError):
                await task
        if how == "nothing":
            assert await task is None
        pool.shutdown()
        await ask(engine, 2)
        assert session.runs == [[2]]

    asyncio.run(main())


def test_a_free_device_is_worked_by_who_finds_it_free(start: Callable[..., Engine], pool: Threads) -> None:
    """A small picture's tile on a CPU; the device's thread has all that waits meanwhile, and everything else."""
    session = FakeSession()
    engine = start(session)
    where: list[str] = []

    class Here(Tiles):
        def place(self, index: int, result: U8) -> None:
            where.append(threading.current_thread().name)

    async def ask_between(*names: int) -> str | None:
        begin = functools.partial(Here, *names)
        return await engine.run_between("d", pool, begin, lambda timing: "made", deadline=time.monotonic() + 10)

    async def main() -> None:
        assert await ask_between(1) == "made"  # another device than a CPU has one thread
        session.provider = artifact.CPU
        assert await ask_between(2) == "made"
        assert await ask_between(3, 4) == "made"
        assert where == ["engine", "codec_0", "engine", "engine"]
        session.gate.clear()
        first = asyncio.create_task(ask_between(5))
        await until(lambda: session.runs[-1] == [5])
        rest = [asyncio.create_task(ask(engine, n)) for n in (6, 7)]
        await asyncio.sleep(0.02)
        assert session.runs[-1] == [5]  # one at a time
        session.gate.set()
        await asyncio.gather(first, *rest)
        assert where[-1] == "codec_0"

        session.gate.clear()
        gone = asyncio.create_task(ask_between(8))
        await until(lambda: session.runs[-1] == [8])
        gone.cancel()
        session.gate.set()
        assert await ask_between(9) == "made"
        assert await ask_between(9) == "made"
        assert engine.backlog_s() == 0

    asyncio.run(main())


def test_a_model_of_one_size_takes_others_in_tiles_of_it_or_refuses_them() -> None:
    tiled = picture_spec("transform", image=("n", 3, 16, 24))
    only = replace(tiled, halo_px=None, halo_why_none="looks everywhere")
    for spec in (tiled, only):
        assert plan(spec, 16, 24, EngineSettings()).tiling == "whole"
    with pytest.raises(ImageError, match="image=24x17: this model takes pictures of 24x16 px only"):
        plan(only, 17, 24, EngineSettings())
    found = plan(tiled, 17, 5, EngineSettings())
    assert (found.tiling, found.padded_height, found.padded_width) == ("tiled 2", 17, 24)
    assert {(t.height, t.width) for t in found.tiles} == {(16, 24)}


# --- memory


class Shelved:
    """An engine over sessions of so many MB each, by their files' size, and how often each was loaded."""

    def __init__(self, folder: Path, sizes: dict[str, int], memory_mb: int) -> None:
        self.loads: list[str] = []
        self.folder = folder
        self.engine = Engine(EngineSettings(memory_bytes=memory_mb << 20), load=self.load)
        for digest, size in sizes.items():
            self.add(digest, size)

    def add(self, digest: str, size: int) -> None:
        (self.folder / digest).mkdir(parents=True)
        with (self.folder / digest / "model.onnx").open("wb") as file:
            file.truncate(size << 20)
        self.engine.prepare(digest, self.folder / digest)

    def load(self, folder: Path, digest: str) -> LinearSession:
        if not folder.exists():
            raise IntegrityError("model", digest, "is gone", "fetch it again")
        self.loads.append(digest)
        return LinearSession(GENERATE)

    async def call(self, digest: str, timeout_s: float = 10.0) -> None:
        z = np.ones((1, 5), np.float32)
        outputs, _ = await self.engine.call(digest, {"z": z}, deadline=time.monotonic() + timeout_s)
        np.testing.assert_array_equal(outputs["out"], 2 * z)


def test_models_beyond_the_budget_are_loaded_when_they_are_asked_for(tmp_path: Path) -> None:
    shelved = Shelved(tmp_path, {"a": 40, "b": 40, "c": 40}, memory_mb=100)
    engine = shelved.engine
    assert engine.digests == {"a", "b", "c"}  # prepared, all of them
    assert engine.session("a").card.spec == GENERATE  # and known, though it is not in memory now

    async def main() -> None:
        for digest in "cbcbc":
            await shelved.call(digest)
        assert shelved.loads == ["a", "b", "c"]  # those are in memory
        await asyncio.gather(*(shelved.call("a") for _ in range(5)))
        assert shelved.loads[3:] == ["a"]  # once for all that ask
        await shelved.call("c")
        assert shelved.loads[4:] == []  # it was the last one asked for before
        await shelved.call("b")
        assert shelved.loads[4:] == ["b"]
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(UnavailableError, match="cannot be loaded again"):
            await shelved.call("a")
        await shelved.call("b")
        engine.forget("c")
        with pytest.raises(UnavailableError, match="not loaded"):
            await shelved.call("c")

    asyncio.run(main())
    engine.close()


def loads_of_two_swaps(folder: Path, memory_mb: int) -> list[str]:
    """What is loaded when, while a champion of 40 MB is followed by two others, and the last is rolled back."""
    shelved = Shelved(folder, {"v1": 40}, memory_mb)

    async def main() -> None:
        await shelved.call("v1")
        for old, new in (("v1", "v2"), ("v2", "v3")):
            shelved.add(new, 40)
            await shelved.call(old)  # while others still prepare it
            await shelved.call(new)
        await shelved.call("v2")

    asyncio.run(main())
    shelved.engine.close()
    return shelved.loads


def test_with_room_for_one_swap_neither_the_champion_nor_the_version_before_is_loaded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loads_of_two_swaps(tmp_path / "room", 100) == ["v1", "v2", "v3"]
    assert "model v2 leaves" not in caplog.text
    assert loads_of_two_swaps(tmp_path / "none", 60) == ["v1", "v2", "v1", "v2", "v3", "v2", "v3", "v2"]  # control
    said = "engines.memory_mb=60: 80 MB are wanted at once, model v2 leaves memory 0 s after it was asked for; raise it"
    assert said in caplog.text


def test_a_model_beyond_the_budget_serves_alone_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelved = Shelved(tmp_path, {"small": 40, "large": 140}, memory_mb=100)
    assert (
        "engines.memory_mb=100: model large alone takes 140 MB, so it is in memory by itself; raise it" in caplog.text
    )
    for digest in ("large", "large", "small", "large"):
        asyncio.run(shelved.call(digest))
    assert shelved.loads == ["small", "large", "small", "large"]
    shelved.engine.close()


def test_without_a_budget_everything_stays(tmp_path: Path) -> None:
    shelved = Shelved(tmp_path, {"a": 40, "b": 40, "c": 40}, memory_mb=0)
    for digest in "abcabc":
        asyncio.run(shelved.call(digest))
    assert shelved.loads == ["a", "b", "c"]
    shelved.engine.close()
