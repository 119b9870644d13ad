"""Engines elsewhere: the same bytes through a line that pickles, dies, delays, declines and mixes up."""

from __future__ import annotations

import asyncio
import pickle
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError, IntegrityError, UnavailableError
from rayscale.observe import ASKED, Asked
from rayscale.serve import remote
from rayscale.serve.batching import Timing
from rayscale.serve.engine import Canvas, Engine, EngineSettings, Runner, plan
from rayscale.serve.remote import Chunk, LostError, RemoteEngine, Reply, RetryBudget
from rayscale.serve.threads import Threads

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
U8, F32 = NDArray[np.uint8], NDArray[np.float32]
POISON = 255


class FakeSession:
    """x2 by nearest neighbour, or z doubled. A tile that begins with POISON raises; runs are counted."""

    def __init__(self, card: ModelCard, seconds: float) -> None:
        self.card, self.digest, self.provider, self.seconds = card, "d", "Fake", seconds
        self.num_runs = 0

    def run(self, inputs: dict[str, F32], abort: object = None) -> dict[str, F32]:
        (value,) = inputs.values()
        self.num_runs += 1
        time.sleep(self.seconds)
        if value.ndim == 2:
            return {"out": 2 * value}
        if (value[:, 0, 0, 0] == 1).any():
            raise ConfigError("image", "poison", "is not run", "send another")
        return {"image_out": value.repeat(2, 2).repeat(2, 3)}


GENERATE = ModelCard(
    family="fake",
    licence="MIT",
    spec=Spec(
        kind="generate",
        inputs=(TensorSpec(name="z", shape=("n", 5)),),
        outputs=(TensorSpec(name="out", shape=("n", 5)),),
    ),
)


class Line:
    """Two engines and what lies between: every chunk and reply is pickled, as by value, and noted."""

    def __init__(self, card: ModelCard, *, seconds: float = 0.0, num_engines: int = 2, **settings: int) -> None:
        self.sessions = [FakeSession(card, seconds) for _ in range(num_engines)]
        self.engines = [
            Engine(EngineSettings(**settings), load=lambda folder, digest, s=s: s)  # type: ignore
            for s in self.sessions
        ]
        for engine in self.engines:
            engine.prepare("d", Path())
        self.remote = RemoteEngine(self.engines[0].settings, self.carry, lambda: None)
        self.remote.learn(self.engines[0].known(), num_engines)
        self.chunks: list[Chunk] = []
        self.sizes: list[tuple[int, int]] = []
        self.in_flight = self.most_in_flight = 0
        self.fails: Callable[[Chunk, int], None] = lambda chunk, engine: None  # raises, or lets it pass

    async def carry(self, chunk: Chunk) -> Reply:
        self.chunks.append(chunk)
        number = len(self.chunks) % len(self.engines)
        sent = pickle.dumps(chunk)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            self.fails(chunk, number)
            reply = pickle.dumps(await remote.answer(self.engines[number], f"e{number}", pickle.loads(sent)))
        finally:
            self.in_flight -= 1
        self.sizes.append((len(sent), len(reply)))
        found = pickle.loads(reply)
        assert isinstance(found, Reply)
        return found

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


Start = Callable[..., Line]


@pytest.fixture
def start() -> Iterator[Start]:
    lines: list[Line] = []

    def begin(card: ModelCard | None = None, **settings: int) -> Line:
        lines.append(Line(card or small["card"](halo_px=0), **settings))  # type: ignore[arg-type]
        return lines[-1]

    yield begin
    for line in lines:
        line.close()


def picture(height: int, width: int, seed: int = 0) -> U8:
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), np.uint8)


async def upscale(engine: Runner, hwc: U8, timeout_s: float = 20.0) -> U8:
    canvas = Canvas(plan(engine.session("d").card.spec, *hwc.shape[:2], engine.settings), hwc)

    await engine.run("d", canvas.tiles, canvas.place, deadline=time.monotonic() + timeout_s)
    return canvas.result


def doubled(hwc: U8) -> U8:
    return hwc.repeat(2, 0).repeat(2, 1)


def test_a_large_picture_goes_in_chunks_and_comes_back_whole(start: Start) -> None:
    line = start(tile_px=256, whole_max_px=1)
    hwc = picture(1000, 1200)
    np.testing.assert_array_equal(asyncio.run(upscale(line.remote, hwc)), doubled(hwc))
    assert len(line.chunks) > 4
    assert line.most_in_flight == 4
    assert 2 << 20 < max(reply for _, reply in line.sizes) <= remote.CHUNK_BYTES + 4096  # chunks are filled
    assert [c.index for c in sorted(line.chunks, key=lambda c: c.index)] == list(range(len(line.chunks)))


def test_what_comes_before_and_after_the_tiles_is_done_in_the_pool(start: Start) -> None:
    line, hwc, deadline = start(), picture(64, 48), time.monotonic() + 20
    canvas = Canvas(plan(line.remote.session("d").card.spec, 64, 48, line.remote.settings), hwc)
    where: list[str] = []

    def begin() -> Canvas:
        where.append(threading.current_thread().name)
        return canvas

    def end(timing: Timing) -> U8:
        where.append(threading.current_thread().name)
        return canvas.result

    with Threads(1, "codec") as pool:
        found = asyncio.run(line.remote.run_between("d", pool, begin, end, deadline=deadline))
        nothing = asyncio.run(line.remote.run_between("d", pool, lambda: None, end, deadline=deadline))
        assert where == ["codec_0", "codec_0"]
        with Threads(1, "other") as other:
            again = line.remote.run_between("d", pool, begin, end, deadline=deadline, look=lambda: other)
            np.testing.assert_array_equal(asyncio.run(again), found)
        assert where[2:] == ["other_0", "other_0"]
    assert nothing is None
    np.testing.assert_array_equal(found, doubled(hwc))


def test_a_thumbnail_is_one_chunk_and_a_tile_beyond_the_limit_goes_alone(start: Start) -> None:
    line = start(whole_max_px=2_000_000)
    for hwc, count in ((picture(64, 64), 1), (picture(900, 1000), 2)):
        np.testing.assert_array_equal(asyncio.run(upscale(line.remote, hwc)), doubled(hwc))
        assert len(line.chunks) == count


@settings(max_examples=15, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6),
    deaths=st.sets(st.integers(1, 25), max_size=3),
    seed=st.integers(0, 99),
)
def test_whatever_dies_once_every_picture_is_right(sides: list[tuple[int, int]], deaths: set[int], seed: int) -> None:
    line = Line(small["card"](halo_px=0), tile_px=32, whole_max_px=40 * 40, max_batch=2)
    seen: set[tuple[str, int]] = set()

    def fails(chunk: Chunk, engine: int) -> None:
        if len(line.chunks) in deaths and (chunk.request, chunk.index) not in seen:
            seen.add((chunk.request, chunk.index))
            raise LostError(f"e{engine}")

    line.fails = fails
    pictures = [picture(h, w, seed + k) for k, (h, w) in enumerate(sides)]

    async def main() -> list[U8]:
        return await asyncio.gather(*(upscale(line.remote, hwc) for hwc in pictures))

    try:
        for hwc, found in zip(pictures, asyncio.run(main()), strict=True):
            np.testing.assert_array_equal(found, doubled(hwc))
    finally:
        line.close()


def test_a_chunk_that_met_two_dead_engines_fails_its_own_request(start: Start) -> None:
    line = start()
    hwc, killer = picture(20, 20), picture(30, 30)

    def fails(chunk: Chunk, engine: int) -> None:
        assert isinstance(chunk.body, np.ndarray)
        if chunk.body.shape[1] == 30:
            raise LostError(f"e{len(line.chunks)}")

    line.fails = fails

    async def main() -> list[U8 | BaseException]:
        asks = (upscale(line.remote, killer), *(upscale(line.remote, hwc) for _ in range(4)))
        return await asyncio.gather(*asks, return_exceptions=True)

    failed, *fine = asyncio.run(main())
    assert isinstance(failed, UnavailableError)
    assert "two engines died" in str(failed)
    assert line.remote.outcomes()["d"][:2] == (0, 1)
    for found in fine:
        np.testing.assert_array_equal(found, doubled(hwc))  # type: ignore[arg-type]


def test_one_dead_engine_that_is_met_twice_counts_once(start: Start) -> None:
    line, met = start(), 0

    def fails(chunk: Chunk, engine: int) -> None:
        nonlocal met
        met += 1
        if met <= 3:
            raise LostError("the same")

    line.fails = fails
    hwc = picture(20, 20)
    np.testing.assert_array_equal(asyncio.run(upscale(line.remote, hwc)), doubled(hwc))


def test_an_engine_that_has_not_loaded_the_model_is_not_the_last_word(start: Start) -> None:
    line = start()
    line.engines[1].forget("d")  # the one that is asked first
    hwc = picture(20, 20)
    np.testing.assert_array_equal(asyncio.run(upscale(line.remote, hwc)), doubled(hwc))
    line.engines[0].forget("d")
    line.remote._budget = RetryBudget(reserve=0.0)  # who declines did no work: it is not what the budget is for
    with pytest.raises(UnavailableError, match="is not loaded in this replica"):  # why, and not that time is up
        asyncio.run(upscale(line.remote, hwc, timeout_s=0.2))


def test_retries_end_with_the_budget(start: Start) -> None:
    line = start()
    line.remote._budget = RetryBudget(reserve=2.0)

    def fails(chunk: Chunk, engine: int) -> None:
        raise LostError("", "lent no line")

    line.fails = fails
    with pytest.raises(UnavailableError, match="lent no line"):
        asyncio.run(upscale(line.remote, picture(20, 20)))
    assert len(line.chunks) == 3
    budget = RetryBudget(reserve=1.0, share=0.5)
    assert [budget.spend(), budget.spend()] == [True, False]
    budget.earn()
    budget.earn()
    assert [budget.spend(), budget.spend()] == [True, False]


def test_an_error_of_the_picture_is_told_as_it_is_and_not_asked_again(start: Start) -> None:
    line = start(max_batch=4)
    poison = picture(20, 20)
    poison[:] = POISON
    hwc = picture(20, 20, 1)

    async def main() -> list[U8 | BaseException]:
        asks = (upscale(line.remote, p) for p in (hwc, poison, hwc, hwc))
        return await asyncio.gather(*asks, return_exceptions=True)

    first, failed, *rest = asyncio.run(main())
    assert isinstance(failed, ConfigError)
    assert str(failed) == "image=poison: is not run; send another"
    assert sum(engine.outcomes()["d"].failed for engine in line.engines) == 0  # the picture's fault
    for found in (first, *rest):
        np.testing.assert_array_equal(found, doubled(hwc))  # type: ignore[arg-type]
    assert len(line.chunks) == 4


@pytest.mark.parametrize("change", [{"index": 7}, {"request": "other"}, {"digest": "other"}])
def test_an_answer_to_something_else_is_seen(start: Start, change: dict[str, object]) -> None:
    line = start()

    async def carry(chunk: Chunk) -> Reply:
        reply = await line.carry(chunk)
        return Reply(**{**vars(reply), **change})  # type: ignore[arg-type]

    line.remote._carry = carry
    with pytest.raises(IntegrityError, match="must be the answer to"):
        asyncio.run(upscale(line.remote, picture(20, 20)))


def test_who_waits_for_a_codec_past_the_deadline_is_told_in_time(start: Start) -> None:
    line, pool, go = start(), Threads(1, "codec"), threading.Event()

    async def main() -> float:
        pool.submit(go.wait, 20)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="deadline"):
            await line.remote.run_between("d", pool, lambda: None, lambda timing: None, deadline=began + 0.2)
        return time.monotonic() - began

    try:
        assert asyncio.run(main()) < 5
    finally:
        go.set()
        pool.shutdown(wait=True)


def test_an_engine_knows_whom_it_works_for(start: Start) -> None:
    line, seen = start(), list[Asked]()
    line.fails = lambda chunk, engine: seen.append(chunk.asked)

    async def main() -> Asked:
        ASKED.set(Asked("abc", "trace"))
        await upscale(line.remote, picture(20, 20))
        ASKED.set(Asked("another"))
        await remote.answer(line.engines[0], "e", line.chunks[0])
        return ASKED.get()

    assert asyncio.run(main()) == Asked("abc", "trace")  # what the engine logs from there
    assert seen == [Asked("abc", "trace")]


def test_cancelling_reaches_the_engine(start: Start) -> None:
    line = start(seconds=0.01, num_engines=1, tile_px=16, whole_max_px=1)  # type: ignore[arg-type]
    (session,), (engine,) = line.sessions, line.engines

    async def main() -> None:
        asked = asyncio.create_task(upscale(line.remote, picture(300, 300)))
        while session.num_runs < 4:
            await asyncio.sleep(0.002)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.sleep(0.05)
        ran = session.num_runs
        await asyncio.sleep(0.1)
        assert session.num_runs == ran
        assert engine.backlog_s() == 0
        assert line.remote.backlog_s() < 0.1

    asyncio.run(main())
    assert session.num_runs < 300


def test_the_backlog_is_what_was_asked_and_what_engines_say(start: Start) -> None:
    line = start(seconds=0.02, num_engines=1, tile_px=32)  # type: ignore[arg-type]

    async def main() -> tuple[float, float]:
        asks = [asyncio.create_task(upscale(line.remote, picture(32, 32))) for _ in range(20)]
        await asyncio.sleep(0)
        estimate, price = line.remote.backlog_s(), line.remote.cost_s("d", 32 * 32)
        await asyncio.gather(*asks)
        return estimate, price

    estimate, price = asyncio.run(main())
    assert price >= 0.02  # what one takes at least
    assert estimate == pytest.approx(20 * price)
    assert line.remote.backlog_s() < estimate / 4
    other = RemoteEngine(line.remote.settings, line.carry, lambda: None)  # another gateway: it knows by replies only
    other._backlogs["e0"] = (5.0, (then := time.monotonic()) - 1.0)
    told = other.backlog_s()
    assert 4.0 - (time.monotonic() - then) <= told <= 4.0


def test_a_call_goes_the_same_way(start: Start) -> None:
    line = start(GENERATE)
    z = np.arange(15, dtype=np.float32).reshape(3, 5)

    def fails(chunk: Chunk, engine: int) -> None:
        if len(line.chunks) == 1:
            raise LostError("gone")

    line.fails = fails
    outputs, timing = asyncio.run(line.remote.call("d", {"z": z}, deadline=time.monotonic() + 5))
    np.testing.assert_array_equal(outputs["out"], 2 * z)
    assert timing.run_s >= 0
    assert len(line.chunks) == 2
    with pytest.raises(ConfigError, match="the model takes z"):
        asyncio.run(line.remote.call("d", {"y": z}, deadline=time.monotonic() + 5))


def test_what_no_engine_has_is_not_asked_for(start: Start) -> None:
    line = start()
    assert line.remote.digests == {"d"}
    line.remote.learn({}, 0)  # the engines are gone: what is under way still knows its model
    assert line.remote.digests == frozenset()
    assert line.remote.session("d").provider == "Fake"
    line.remote.forget("d")
    with pytest.raises(UnavailableError, match="not loaded by any engine"):
        line.remote.session("d")
