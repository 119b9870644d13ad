"""Calls (vectors, pictures from seeds, tiles of 16 bits) share batches as tiles do, and nobody's answer shows it."""

from __future__ import annotations

import asyncio
import json
import math
import runpy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayscale import artifact
from rayscale.artifact import CPU, CUDA, Abort
from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError
from rayscale.serve import calls
from rayscale.serve.api import create_app
from rayscale.serve.batching import CallJob, Known, Model, Queue, TileJob, stacks
from rayscale.serve.calls import Ask
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.gateway import Gateway, GatewaySettings
from rayscale.serve.pools import PooledEngine
from rayscale.serve.remote import CHUNK_BYTES, Chunk, RemoteEngine, Reply, answer
from rayscale.serve.table import Release
from rayscale.serve.vectors import grouped

kinds = runpy.run_path(str(Path(__file__).parents[1] / "small_kinds.py"))
service = runpy.run_path(str(Path(__file__).parents[1] / "service.py"))
F32 = NDArray[np.float32]
RUN_S, MOST = 0.1, 8


def spec_of(kind: str, inputs: Mapping[str, tuple[int | str, ...]], output: tuple[int | str, ...]) -> Spec:
    given = tuple(TensorSpec(name=name, shape=shape) for name, shape in inputs.items())
    return Spec(kind=kind, inputs=given, outputs=(TensorSpec(name="out", shape=output),), halo_why_none="a fake")  # type: ignore


EMBED = spec_of("embed", {"image": ("n", 3, "h", "w")}, ("n", 3))
GENERATE = spec_of("generate", {"z": ("n", 5)}, ("n", 5))


class Device:
    """Mean colours, or what a test has it do: `seconds` a run, whatever is in it. Runs are noted by their samples."""

    def __init__(
        self, spec: Spec = EMBED, seconds: float = 0.0, digest: str = "d", provider: str = "Simulated"
    ) -> None:
        self.card = ModelCard(family="fake", spec=spec, licence="MIT")
        self.digest, self.provider, self.seconds = digest, provider, seconds
        self.runs: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        artifact.bind(self.card, {name: value.shape for name, value in inputs.items()})
        (given,) = inputs.values()
        self.runs.append(len(given))
        self.gate.wait(10)
        time.sleep(self.seconds)
        return {"out": self.answer(given)}

    def answer(self, given: F32) -> F32:
        return given.mean(axis=(2, 3)) if given.ndim == 4 else given + 1


@contextmanager
def engine_of(session: Any, **settings: int) -> Iterator[Engine]:
    engine = Engine(EngineSettings(**settings), load=lambda folder, digest: session)  # type: ignore[arg-type]
    engine.prepare("d", Path())
    if isinstance(session, Device):
        session.runs.clear()  # the warm-up
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def serving(session: Any, timeout_s: float = 60.0, **settings: int) -> Iterator[tuple[Any, Engine]]:
    """A client of the application over an engine of this session, and the engine."""
    with engine_of(session, **settings) as engine:
        release = Release(name="photos", version=1, digest="d", uri="")
        routing, meters = service["FakeRouting"](release), service["FakeMeters"]()
        gateway = Gateway(GatewaySettings(timeout_s=timeout_s), engine, routing, meters)
        app = create_app(gateway)
        transport = service["httpx"].ASGITransport(app)
        yield service["httpx"].AsyncClient(transport=transport, base_url="http://test", timeout=60.0), engine
        gateway.close()


def picture(seed: int = 0, height: int = 8, width: int = 8) -> bytes:
    return bytes(service["png"](service["photo"](height, width, seed)))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def in_ten_s() -> float:
    return time.monotonic() + 10


# --- what may share a batch


def test_samples_are_stacked_along_one_free_axis_that_all_tensors_begin_with() -> None:
    assert stacks(EMBED)
    assert stacks(spec_of("generate", {"z": ("batch", 5), "label": ("batch", 3)}, ("batch", 5)))
    for inputs, output in (
        ({"image": (1, 3, "h", "w")}, (1, 3)),  # one at a time
        ({"image": ("n", 3, "h", "w")}, (1, 3)),  # one answer to all of them
        ({"z": ("n", 5), "label": ("m", 3)}, ("n", 5)),
        ({"z": ("2*n", 5)}, ("2*n", 5)),  # pairs
        ({"z": ("n", "n")}, ("n", 5)),  # each sample is as long as there are many
    ):
        assert not stacks(spec_of("generate", inputs, output))


def test_pictures_from_seeds_share_a_batch_on_a_cpu_only() -> None:
    def shares(spec: Spec, provider: str) -> bool:
        return Known(card=ModelCard(family="f", spec=spec, licence="MIT"), digest="d", provider=provider).shares

    assert [shares(GENERATE, provider) for provider in (CPU, CUDA)] == [True, False]
    assert [shares(EMBED, provider) for provider in (CPU, CUDA)] == [True, True]


def call(model: Model, samples: int = 1, side: int = 4, dtype: type = np.float32, apart: bool = True) -> CallJob:
    inputs = {"image": np.zeros((samples, 3, side, 4), dtype)}
    return CallJob(model=model, inputs=inputs, deadline=math.inf, apart=apart)


def taken(queue: Queue, *jobs: CallJob | TileJob) -> list[list[int]]:
    """Everything that was put there, batch by batch, as positions in `jobs`."""
    found = []
    while batch := queue.take(0.0):
        found.append([jobs.index(job) for job, _ in batch])  # type: ignore[arg-type]
    return found


def test_samples_of_one_model_shape_and_type_share_a_batch_and_are_fair_within() -> None:
    one, other = Model(Device(), 1e-3), Model(Device(digest="e"), 1e-3)
    tile = TileJob(
        model=one, tiles=[np.zeros((4, 4, 3), np.uint8)], place=lambda index, result: None, deadline=math.inf
    )
    jobs = [
        call(one, 4), call(one, side=5), call(one), call(other), call(one, dtype=np.float64), call(one, 3), tile,
        call(one, apart=False),
    ]  # fmt: skip
    queue = Queue(3)
    for job in jobs:
        queue.put(job)
    assert taken(queue, *jobs) == [[0, 2, 5], [1], [3], [4], [6], [7], [0, 5, 0], [5, 0]]
    assert queue.cost_s() == 0


def test_what_cannot_be_stacked_runs_by_itself() -> None:
    device = Device(spec_of("embed", {"image": (1, 3, "h", "w")}, (1, 3)))

    async def main(engine: Engine) -> None:
        z = np.zeros((1, 3, 4, 4), np.float32)
        await asyncio.gather(*(engine.call("d", {"image": z}, deadline=in_ten_s()) for _ in range(5)))

    with engine_of(device, max_batch=MOST) as engine:
        asyncio.run(main(engine))
    assert device.runs == [1] * 5


# --- what waits goes together, and comes back to whom it belongs


async def behind_a_closed_gate(engine: Engine, device: Device, asked: Sequence[Any]) -> list[Any]:
    """The answers of calls that all came while the device was busy with one before them."""
    device.runs.clear()
    device.gate.clear()
    shape = [3 if axis == "n" else 5 if isinstance(axis, str) else axis for axis in device.card.spec.inputs[0].shape]
    name = device.card.spec.inputs[0].name
    first = asyncio.create_task(engine.call("d", {name: np.zeros(shape, np.float32)}, deadline=in_ten_s()))
    await until(lambda: len(device.runs) > 0)
    tasks = [asyncio.create_task(one) for one in asked]
    await asyncio.sleep(0.02)
    device.gate.set()
    await first
    device.runs[:] = device.runs[1:]
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_calls_of_many_requests_share_runs_and_each_gets_its_own() -> None:
    device = Device(GENERATE, provider=CPU)
    zs = [np.full((count, 5), index, np.float32) for index, count in enumerate((1, 3, 2, 1, 8, 1))]

    async def main(engine: Engine) -> list[Any]:
        return await behind_a_closed_gate(engine, device, [engine.call("d", {"z": z}, deadline=in_ten_s()) for z in zs])

    with engine_of(device, max_batch=MOST) as engine:
        found = asyncio.run(main(engine))
    assert device.runs == [8, 8]
    for z, (outputs, timing) in zip(zs, found, strict=True):
        np.testing.assert_array_equal(outputs["out"], z + 1)
        assert timing.run_s >= 0
        assert outputs["out"].base is None  # no neighbour's arrays are held


def test_on_one_sample_a_run_calls_stay_as_they_were_sent() -> None:
    device = Device(GENERATE, provider=CPU)

    async def main(engine: Engine) -> None:
        asked = [engine.call("d", {"z": np.zeros((count, 5), np.float32)}, deadline=in_ten_s()) for count in (8, 1, 3)]
        await behind_a_closed_gate(engine, device, asked)

    with engine_of(device) as engine:
        asyncio.run(main(engine))
    assert device.runs == [8, 1, 3]


class Poisoned(Device):
    """Fails over a batch that has a 13 in it."""

    def answer(self, given: F32) -> F32:
        if (given == 13).any():
            raise ValueError("poison")
        return super().answer(given)


class Short(Device):
    """Answers one sample, however many there are: its card says otherwise."""

    def answer(self, given: F32) -> F32:
        return super().answer(given)[:1]


@pytest.mark.parametrize(("make", "bad"), [(Poisoned, 13), (Short, -1)])
def test_what_fails_together_is_run_alone(make: type[Device], bad: int) -> None:
    device = make(GENERATE, provider=CPU)
    zs = [np.full((1, 5), value, np.float32) for value in (1, 13, 2, 3)]

    async def main(engine: Engine) -> list[Any]:
        return await behind_a_closed_gate(engine, device, [engine.call("d", {"z": z}, deadline=in_ten_s()) for z in zs])

    with engine_of(device, max_batch=MOST) as engine:
        found = asyncio.run(main(engine))
    assert device.runs[-5:] == [4, 1, 1, 1, 1]
    for z, got in zip(zs, found, strict=True):
        if z[0, 0] == bad:
            assert isinstance(got, ValueError)
        else:
            np.testing.assert_array_equal(got[0]["out"], z + 1)


def test_a_request_that_shares_runs_with_itself_alone_is_timed() -> None:
    device = Device(GENERATE, provider=CPU)
    z = np.zeros((1, 5), np.float32)

    async def main(engine: Engine, owners: Sequence[str]) -> int:
        before = engine.outcomes()["d"].timed if engine.outcomes() else 0
        asked = [engine.call("d", {"z": z}, deadline=in_ten_s(), owner=owner) for owner in owners]
        await behind_a_closed_gate(engine, device, asked)
        return engine.outcomes()["d"].timed - before - 1  # and who closed the gate

    with engine_of(device, max_batch=MOST) as engine:
        assert [asyncio.run(main(engine, owners)) for owners in ("aaa", "aab", ["", ""])] == [3, 0, 0]


# --- many answers at once, each of them what it is alone


class MixedUp:
    """A session that gives the samples of a batch each other's results."""

    def __init__(self, session: artifact.Session) -> None:
        self._session = session
        self.card, self.digest, self.provider = session.card, session.digest, session.provider

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        return {name: np.roll(value, 1, axis=0) for name, value in self._session.run(inputs, abort).items()}


def deep(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 65536, (40, 52, 3), np.uint16)
    return bytes(service["cv2"].imencode(".png", pixels)[1])


REQUESTS: dict[str, tuple[Callable[[Path], str], Callable[[int], tuple[str, dict[str, Any]]]]] = {
    "embedder": (
        lambda folder: str(kinds["embedder"](folder)),
        lambda i: (
            "/v1/embed",
            {"files": [("image", picture(100 * i + k, 8 + k % 2)) for k in range(1 + i % 5)]},
        ),
    ),
    "generator": (
        lambda folder: str(kinds["generator"](folder, side_px=16)),
        lambda i: ("/v1/generate", {"json": {"seed": i, "n": 1 + i % 11}, "headers": {"accept": "application/json"}}),
    ),
    "16 bits": (
        lambda folder: str(kinds["negative"](folder)),
        lambda i: ("/v1/restore", {"content": deep(i)}),
    ),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_what_40_ask_at_once_is_what_each_gets_alone(kind: str, tmp_path: Path) -> None:
    write, request = REQUESTS[kind]
    write(tmp_path / "a")
    session = artifact.load(tmp_path / "a", threads=1)
    tiles = {"tile_px": 16, "whole_max_px": 1}

    async def main(client: Any, *, together: bool) -> list[bytes]:
        async def one(index: int) -> bytes:
            path, body = request(index)
            answer = await client.post(path, **body)
            assert answer.status_code == 200, answer.text
            is_json = answer.headers["content-type"] == "application/json"
            return json.dumps(answer.json()["data"]).encode() if is_json else bytes(answer.content)

        async with client:
            if together:
                return list(await asyncio.gather(*map(one, range(40))))
            return [await one(index) for index in range(40)]

    def answers(session: Any, together: bool, **settings: int) -> list[bytes]:
        with serving(session, **settings, **tiles) as (client, _):
            return asyncio.run(main(client, together=together))

    alone = answers(session, False)
    assert len(set(alone)) == 40
    assert answers(session, True, max_batch=MOST) == alone
    assert answers(MixedUp(session), True, max_batch=MOST) != alone


# --- a device that takes as long for eight as for one


def goodput(max_batch: int, rate: float = 50.0, seconds: float = 2.0) -> tuple[float, list[int]]:
    """Embeddings a second, asked for in an open loop and answered in time; the runs that they took."""
    device = Device(seconds=RUN_S)

    async def main(client: Any) -> float:
        async def one(index: int) -> bool:
            return bool((await client.post("/v1/embed", content=picture(index))).status_code == 200)

        asked, started = [], time.monotonic()
        async with client:
            for index in range(round(rate * seconds)):
                await asyncio.sleep(started + index / rate - time.monotonic())
                asked.append(asyncio.create_task(one(index)))
            return sum(await asyncio.gather(*asked)) / (time.monotonic() - started)

    with serving(device, timeout_s=1.5, max_batch=max_batch) as (client, _):
        return asyncio.run(main(client)), device.runs


def test_50_embeddings_a_second_are_batched() -> None:
    for _ in range(3):  # a machine that stands still is measured again
        many, runs = goodput(MOST)
        one, serial = goodput(1)
        print(f"\n{many:.1f}/s in {len(runs)} runs of up to {max(runs)}; one at a time {one:.1f}/s")
        if many >= 2.5 * one:
            break
    assert many >= 2.5 * one  # seen: 4.5
    assert max(runs) <= MOST
    assert max(serial) == 1
    assert one <= 1 / RUN_S


@pytest.mark.parametrize(("max_batch", "most"), [(MOST, 12), (1, 64)])
def test_64_pictures_of_one_request_share_runs(max_batch: int, most: int) -> None:
    device = Device(seconds=0.002)

    async def main(client: Any) -> None:
        async with client:
            answer = await client.post("/v1/embed", files=[("image", picture(index)) for index in range(64)])
            rows = answer.json()["data"]
        for index, row in enumerate(rows):
            mean = service["photo"](8, 8, index).mean(axis=(0, 1)) / 255
            np.testing.assert_allclose(row["embedding"], mean, atol=1e-6)
        assert [row["index"] for row in rows] == list(range(64))

    with serving(device, max_batch=max_batch) as (client, _):
        asyncio.run(main(client))
    assert sum(device.runs) == 64
    assert len(device.runs) <= most
    assert (len(device.runs) == 64) == (max_batch == 1)


@pytest.mark.parametrize("max_batch", [MOST, 1])
def test_tiles_of_16_bits_of_one_picture_share_runs(max_batch: int, tmp_path: Path) -> None:
    kinds["negative"](tmp_path / "a")
    session = artifact.load(tmp_path / "a", threads=1)

    class Gated(Device):
        def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
            super().run(inputs, abort)
            return session.run(inputs, abort)

    device = Gated(session.card.spec)
    device.answer = lambda given: given  # type: ignore[method-assign]

    async def main(client: Any, engine: Engine) -> None:
        device.gate.clear()
        async with client:
            asked = asyncio.create_task(client.post("/v1/restore", content=deep(0)))
            there = min(12, 2 * max_batch)  # run or wait
            await until(lambda: sum(device.runs) + sum(map(len, engine._queue._circle)) == there)
            device.gate.set()
            answer = await asked
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-rayscale-tiling"] == "tiled 12"

    with serving(device, max_batch=max_batch, tile_px=16, whole_max_px=1) as (client, engine):
        asyncio.run(main(client, engine))
    assert sum(device.runs) == 12
    assert len(device.runs) <= 3 if max_batch == MOST else device.runs == [1] * 12


def test_a_request_of_many_delays_one_of_one_by_a_run() -> None:
    device = Device(GENERATE, provider=CPU)
    order: list[str] = []

    async def ask(engine: Engine, name: str, count: int) -> None:
        await engine.call("d", {"z": np.zeros((count, 5), np.float32)}, deadline=in_ten_s())
        order.append(f"{name} after {sum(device.runs)}")

    async def main(engine: Engine) -> None:
        await behind_a_closed_gate(engine, device, [ask(engine, "many", 40), ask(engine, "one", 1)])

    with engine_of(device, max_batch=4) as engine:
        asyncio.run(main(engine))
    assert device.runs == [4] * 10 + [1]
    assert order[0].startswith("one")


def test_pictures_of_one_shape_go_in_one_call_as_far_as_a_chunk_holds_them() -> None:
    small, large = np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 3, 300, 300), np.float32)
    assert grouped([small, large, small, small, small], 3) == [[0, 2, 3], [4], [1]]
    assert grouped([large] * 5, 8) == [[0, 1], [2, 3], [4]]
    assert 2 * large.nbytes <= CHUNK_BYTES < 3 * large.nbytes
    assert grouped([small] * 3, 1) == [[0], [1], [2]]


@pytest.mark.parametrize("path", ["/v1/embed", "/v1/generate"])
def test_a_model_that_takes_one_sample_at_a_time_is_given_one(path: str) -> None:
    spec = (
        spec_of("embed", {"image": (1, 3, "h", "w")}, (1, 3))
        if path == "/v1/embed"
        else spec_of("generate", {"z": (1, 192)}, (1, 3, 8, 8))
    )

    class Fixed(Device):
        def answer(self, given: F32) -> F32:
            return given.mean(axis=(2, 3)) if given.ndim == 4 else (given.reshape(1, 3, 8, 8) / 8 + 0.5).clip(0, 1)

    device = Fixed(spec, provider=CPU)

    async def main(client: Any) -> int:
        bodies = {
            "/v1/embed": {"files": [("image", picture(index)) for index in range(5)]},
            "/v1/generate": {"json": {"n": 5, "seed": 1}, "headers": {"accept": "application/json"}},
        }
        async with client:
            answer = await client.post(path, **bodies[path])
            assert answer.status_code == 200, answer.text
            return len(answer.json()["data"])

    with serving(device, max_batch=MOST) as (client, _):
        assert asyncio.run(main(client)) == 5
    assert device.runs == [1] * 5


def test_engines_elsewhere_batch_calls_of_all_gateways() -> None:
    device = Device(GENERATE, provider=CPU)
    flying: dict[str, int] = {}
    most: list[int] = []

    async def request(remote: RemoteEngine, value: float) -> None:
        async def part(ask: Ask, index: int) -> None:
            z = np.full((2, 5), value + index, np.float32)
            np.testing.assert_array_equal((await ask({"z": z}))["out"], z + 1)

        await calls.run(PooledEngine({"": remote}), "d", part, 6, in_ten_s())

    async def main(engine: Engine) -> None:
        async def carry(chunk: Chunk) -> Reply:
            flying[chunk.request] = flying.get(chunk.request, 0) + 1
            most.append(flying[chunk.request])
            try:
                return await answer(engine, "e", chunk)
            finally:
                flying[chunk.request] -= 1

        gateways = [RemoteEngine(EngineSettings(max_batch=MOST), carry, lambda: None, window=3) for _ in range(2)]
        for gateway in gateways:
            gateway.learn(engine.known(), 1)
        device.gate.clear()
        asked = [asyncio.create_task(request(gateway, 10.0 * i)) for i, gateway in enumerate(gateways)]
        await until(lambda: sum(device.runs) + sum(j.count for jobs in engine._queue._circle for j in jobs) == 12)
        device.gate.set()
        await asyncio.gather(*asked)

    with engine_of(device, max_batch=MOST) as engine:
        asyncio.run(main(engine))
    assert sum(device.runs) == 24
    assert MOST in device.runs
    assert max(most) == 3  # of one request in flight


# --- the parts of one request


def test_parts_are_asked_for_a_window_at_a_time_and_what_fails_ends_the_others() -> None:
    device = Device(GENERATE)
    made: list[int] = []

    async def main(engine: Engine) -> None:
        async def part(ask: Ask, index: int) -> None:
            made.append(index)
            await ask({"z": np.zeros((1, 5), np.float32)})
            if index == 3:
                raise ConfigError("part", index, "is wrong", "leave it out")

        device.gate.clear()
        asked = asyncio.create_task(calls.run(engine, "d", part, 10, in_ten_s()))
        await until(lambda: len(device.runs) == 1)
        await asyncio.sleep(0.02)
        assert made == [0, 1]  # one runs, one waits
        device.gate.set()
        with pytest.raises(ConfigError, match="part=3"):
            await asked
        await asyncio.sleep(0.02)
        assert len(made) < 7
        assert engine.backlog_s() == 0

    with engine_of(device) as engine:
        asyncio.run(main(engine))


def test_what_parts_do_beside_asking_is_no_waiting() -> None:
    device = Device(GENERATE, seconds=0.02)

    async def main(engine: Engine) -> None:
        async def part(ask: Ask, index: int) -> None:
            await ask({"z": np.zeros((1, 5), np.float32)})
            await asyncio.sleep(0.3)

        timing = await calls.run(engine, "d", part, 1, in_ten_s())
        assert 0.02 <= timing.run_s < 0.3
        assert timing.queue_s < 0.2

    with engine_of(device) as engine:
        asyncio.run(main(engine))
