"""What serving costs: our one and two tiers beside a bare ONNX Runtime loop and Starlette with a pool of threads.

python tests/benchmarks/serve.py [--only threads,floor,one,two,batcher] [--sizes 64,512,2mp] [--rounds 3]
                                 [--concurrency 1,8,32] [--requests 2000] [--proxy haproxy|python]
                                                                            # the last line is one JSON object

Every system upscales the same noisy PNGs (64 px: 12 KB; 512 px; 1600 x 1280) by the same small x2 net, one thread of
ONNX Runtime, the same codecs; the answers are compared byte for byte. The bare loop runs whole pictures, and with the
tile plan that the engine uses.

CPU-ms a request is that of every process the system started (proxies, Ray's daemons, controller and agents too)
without the client's, less what they use while idle: the mean of `IDLE_S` before and after a cell, printed beside it,
with what each kind of process takes of the rest. A cell starts after a tenth of its requests. The bare loop and the
client run on the same cores as the system: neither is moved out of its way. `floor one`: the same proxy and a FastAPI
application that reads the body and answers the right bytes without any work; `floor two`: it also asks a second
deployment, with the bytes that go and come between our tiers. That is Ray Serve's share of an overhead.
`one_tier_over_least`: our overhead over that of Starlette with a pool of threads and Ray Serve's share together, which
a busy host moves as it moves ours.

The bare loop takes 1.3 to 1.9 ms within one hour on a shared machine, so it runs before and after every cell, whole
and in tiles: `*_overhead_ms_12kb` is ours less that, `fraction_of_bare_*` that over ours, the medians over all
concurrencies and rounds. Wall times mean little there; images a second stand in the table. Systems take turns,
`--rounds` times. `batcher_over_serve_batch`: answers a second of our queue and of `@serve.batch` as it comes (it waits
10 ms for a fuller batch), 50 requests a second on a simulated device that takes 100 ms for up to eight at once;
`_best`: at the best of `BATCH_WAITS_S`.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rayscale import artifact, imaging
from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.serve.batching import F32
from rayscale.serve.engine import Canvas, Engine, EngineSettings, plan

MARK = f"RAYSCALE_BENCH_{uuid.uuid4().hex}"  # in the environment of every process that is started here, and not in ours
os.environ |= {MARK: "1", "RAY_USAGE_STATS_ENABLED": "0"}

U8 = NDArray[np.uint8]
SIZES = {"64": (64, 64), "512": (512, 512), "2mp": (1280, 1600)}
REQUESTS = {"64": 2000, "512": 64, "2mp": 6}  # in a cell, or as many as its concurrency
CHANNELS, LAYERS = 16, 4
TIMEOUT_S = 300.0
IDLE_S = 4.0  # Ray's daemons work in turns of a second or two


# --- the work: a net, pictures, and what each system makes of one


def write_artifact(folder: Path) -> str:
    """LAYERS 3x3 convolutions of CHANNELS on the nearest-neighbour picture, x2. Its digest."""
    rng, nodes, weights, last = np.random.default_rng(0), [], [], "image"
    widths = [3, *[CHANNELS] * (LAYERS - 1), 12]
    for layer, (c_in, c_out) in enumerate(pairwise(widths)):
        w = (rng.standard_normal((c_out, c_in, 3, 3)) * (0.5 / (3 * c_in**0.5))).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        last = f"c{layer}"
        if layer < LAYERS - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{layer}"]))
            last = f"r{layer}"
    constants = {"sizes": np.array([1, 1, 2, 2]), "low": np.array(0.0), "high": np.array(1.0)}
    weights += [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    nodes += [
        helper.make_node("DepthToSpace", [last], ["detail"], blocksize=2, mode="CRD"),
        helper.make_node("Resize", ["image", "", "sizes"], ["base"], mode="nearest"),
        helper.make_node("Add", ["base", "detail"], ["sum"]),
        helper.make_node("Clip", ["sum", "low", "high"], ["image_out"]),
    ]
    edges = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"]),
        helper.make_tensor_value_info("image_out", TensorProto.FLOAT, ["n", 3, "h2", "w2"]),
    ]
    graph = helper.make_graph(nodes, "bench", edges[:1], edges[1:], weights)
    model = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)])
    spec = Spec(
        kind="transform",
        inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")),),
        outputs=(TensorSpec(name="image_out", shape=("n", 3, "2*h", "2*w")),),
        scale=2,
        halo_px=LAYERS,
    )
    golden = {"image": rng.random((1, 3, 16, 16), np.float32)}
    card = ModelCard(family="bench", spec=spec, licence="MIT")
    return artifact.write(folder, model.SerializeToString(), card, golden)


def body(size: str) -> bytes:
    """A PNG of noise: nothing is gained by its content."""
    height, width = SIZES[size]
    return imaging.encode(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8), "png")


def whole(session: artifact.Session, data: bytes) -> bytes:
    """The least that an answer takes."""
    return imaging.encode(imaging.to_hwc_u8(session.transform(imaging.to_nchw_f32(imaging.decode_rgb(data)))), "png")


def tiled(session: artifact.Session, data: bytes) -> bytes:
    """The same through the engine's own tile plan, one tile after the other."""
    pixels = imaging.decode_rgb(data)
    canvas = Canvas(plan(session.card.spec, *pixels.shape[:2], EngineSettings()), pixels)
    for index, tile in enumerate(canvas.tiles):
        canvas.place(index, imaging.to_hwc_u8(session.transform(imaging.to_nchw_f32(tile))))
    return imaging.encode(canvas.result, "png")


# --- what is measured


@dataclass(frozen=True)
class Cell:
    cpu_ms: float  # of one request, over all processes of the system
    per_s: float
    idle_ms: float = 0.0  # CPU-ms a second that the system uses without requests
    parts: dict[str, float] = field(default_factory=dict)  # CPU-ms of one request by kind of process
    bare_ms: float = 0.0  # the bare loop's, just before and after
    tiled_ms: float = 0.0  # the same in tiles


def cpu_seconds() -> dict[str, float]:
    """By kind of process, of all that were started here, with the children that they have buried.

    They are found by descent and by our mark: a title written over its environment hides the second, an early end of
    a parent the first.
    """
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            marked = f"{MARK}=".encode() in (folder / "environ").read_bytes()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended
            continue
        pid = int(folder.name)
        parents[pid] = int(fields[1])
        found[pid] = marked, kind_of(title), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total: dict[str, float] = {}
    for pid, (marked, kind, seconds) in found.items():
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if pid != os.getpid() and (marked or above == os.getpid()):
            total[kind] = total.get(kind, 0.0) + seconds
    return total


KINDS = {  # what a title has in it -> what the process is called here
    "ServeReplica:[^:]*:Gateway": "gateway", "ServeReplica:[^:]*:Engine": "engine", "ServeReplica": "replica",
    "haproxy .*-f|haproxy$": "haproxy", "HAProxyManager|ProxyActor": "proxy actor", "ServeController": "controller",
    "raylet": "raylet", "gcs_server": "gcs", "ray::|/ray/": "other of Ray",
}  # fmt: skip


def kind_of(title: str) -> str:
    return next((kind for pattern, kind in KINDS.items() if re.search(pattern, title)), "server")


def bare(work: Callable[[artifact.Session, bytes], bytes], session: artifact.Session, size: str) -> Cell:
    data, count = body(size), max(2, REQUESTS[size] // 4)
    for _ in range(1 + count // 10):
        work(session, data)
    cpu, started = time.process_time(), time.monotonic()
    for _ in range(count):
        work(session, data)
    return Cell((time.process_time() - cpu) * 1e3 / count, count / (time.monotonic() - started))


def load(port: int, size: str, concurrency: int, wanted: bytes) -> Cell:
    """A closed loop of `concurrency` clients; every answer must be `wanted`."""
    data, count = body(size), max(REQUESTS[size], concurrency)
    wrong: list[str] = []

    def client(requests: Iterator[int]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        for _ in requests:
            try:
                connection.request("POST", "/v1/upscale", data, {"Accept": "image/png"})
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                wrong.append(repr(error))
                return
            if answer.status != 200 or content != wanted:
                wrong.append(f"{answer.status} {len(content)} bytes: {content[:200]!r}")
        connection.close()

    def go(total: int) -> None:
        shared = iter([*range(total)])  # one `next` is atomic
        threads = [threading.Thread(target=client, args=(shared,)) for _ in range(concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def idle() -> Counter[str]:
        """CPU seconds a second."""
        before = Counter(cpu_seconds())
        time.sleep(IDLE_S)
        used = Counter(cpu_seconds())
        used.subtract(before)
        return Counter({kind: seconds / IDLE_S for kind, seconds in used.items()})

    go(max(concurrency, count // 10))  # connections and caches are warm
    calm = idle()
    cpu, started = Counter(cpu_seconds()), time.monotonic()
    go(count)
    wall, used = time.monotonic() - started, Counter(cpu_seconds())
    used.subtract(cpu)
    calm.update(idle())
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong answers, e.g. {wrong[0]}")
    parts = {kind: (seconds - calm[kind] / 2 * wall) * 1e3 / count for kind, seconds in used.items()}
    return Cell(sum(parts.values()), count / wall, calm.total() / 2 * 1e3, parts)


# --- the systems


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(port: int, path: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise SystemExit("the system did not start")


THREADS = """
import sys, uvicorn
from pathlib import Path
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route
sys.path.insert(0, sys.argv[1])
import serve as bench
from rayscale import artifact
session = artifact.load(Path(sys.argv[2]), threads=1)
async def upscale(request):
    return Response(await run_in_threadpool(bench.whole, session, await request.body()), media_type="image/png")
async def ready(request):
    return Response("ok")
routes = [Route("/v1/upscale", upscale, methods=["POST"]), Route("/readyz", ready)]
uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=int(sys.argv[3]), log_level="error")
"""


@contextmanager
def threads_server(folder: Path) -> Iterator[int]:
    """What many would write first: Starlette, one session, the pool of threads that it brings along."""
    port = free_port()
    command = [sys.executable, "-c", THREADS, str(Path(__file__).parent), str(folder), str(port)]
    process = subprocess.Popen(command)
    try:
        wait_for(port, "/readyz")
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def cluster(proxy: str) -> Iterator[None]:
    """One Ray of our own. The proxy's mode is decided here."""
    if proxy == "haproxy":
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    import ray

    temp = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    ray.init(address="local", num_cpus=4, object_store_memory=600 << 20, include_dashboard=False,
             logging_level="ERROR", log_to_driver=False, _temp_dir=temp)  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp, ignore_errors=True)
        stop_what_is_left()


def stop_what_is_left() -> None:
    """HAProxy outlives Ray; what carries our mark is ours."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}=".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), 15)
        except OSError:
            continue


@contextmanager
def tiers(which: str, folder: Path, root: Path) -> Iterator[int]:
    """Our application from a registry of its own, gateways and engines of one CPU."""
    root.mkdir(parents=True)
    from ray import serve

    from rayscale.registry.models import Registry
    from rayscale.serve.app import AppArgs, build

    uri, port = f"sqlite:///{root / 'mlflow.db'}", free_port()
    registry = Registry(uri)
    version = registry.publish("bench", folder)
    registry.client.set_registered_model_alias("bench", "champion", str(version.version))
    given: dict[str, Any] = {"tracking_uri": uri, "state_uri": str(root / "state"), "cache_dir": str(root / "cache"),
                             "threads": 1, "timeout_s": TIMEOUT_S, "engines": {"tiers": which}}  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(AppArgs.model_validate(given)), name="bench", route_prefix="/")
    wait_for(port, "/readyz")
    yield port  # it ends with its cluster: in HAProxy's mode `serve.shutdown` waits for half a minute


@contextmanager
def floor(which: str, size: str, wanted: bytes) -> Iterator[int]:
    """Ray Serve alone: a gateway that only answers, and for two tiers an engine that only answers it."""
    from ray import serve

    height, width = SIZES[size]
    tiles, made = np.zeros((1, height, width, 3), np.uint8), np.zeros((1, 2 * height, 2 * width, 3), np.uint8)

    @serve.deployment(name="Engine", max_ongoing_requests=64, logging_config={"enable_access_log": False})
    class Second:
        async def answer(self, tiles: U8) -> U8:
            return made

    @serve.deployment(name="Gateway", max_ongoing_requests=64)
    @serve.ingress()
    class First:
        def __init__(self, *second: Any) -> None:
            pickled = {"request_serialization": "pickle", "response_serialization": "pickle"}
            self.ask = second[0].options(method_name="answer", **pickled) if second else None

        async def upscale(self, request: Request) -> Response:
            await request.body()
            if self.ask is not None:
                await self.ask.remote(tiles)
            return Response(wanted, media_type="image/png")

        async def ready(self, _: Request) -> Response:
            return Response("ok")

        def __serve_build_asgi_app__(self) -> FastAPI:
            api = FastAPI()
            api.add_route("/v1/upscale", self.upscale, methods=["POST"])
            api.add_route("/readyz", self.ready)
            return api

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(First.bind(*([Second.bind()] if which == "two" else [])), name="bench", route_prefix="/")
    wait_for(port, "/readyz")
    yield port


# --- the batcher

BATCH_WAITS_S = (0.0, 0.01, 0.05, 0.1)  # how long `@serve.batch` may wait for a fuller batch


class Device:
    """100 ms for whatever it is given, as `artifact.Session`."""

    def __init__(self, card: ModelCard) -> None:
        self.card, self.digest, self.provider = card, "device", "Simulated"

    def run(self, inputs: dict[str, F32], abort: object = None) -> dict[str, F32]:
        time.sleep(0.1)
        return {"image_out": inputs["image"].repeat(2, 2).repeat(2, 3)}


class Rate(NamedTuple):
    per_s: float
    p50_ms: float


def batcher(card: ModelCard, seconds: float = 8.0, rate: float = 50.0) -> dict[str, Rate]:
    """Answers a second of `@serve.batch`, by how long it waits, and of our queue; arrivals are Poisson's."""
    from ray import serve

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5})
    class Both:
        def __init__(self) -> None:
            self.device = Device(card)
            self.engine = Engine(EngineSettings(max_batch=8), load=lambda folder, digest: self.device)  # type: ignore
            self.engine.prepare("device", Path())

        def reconfigure(self, config: dict[str, float]) -> None:
            self.batch.set_batch_wait_timeout_s(config["wait_s"])  # type: ignore[attr-defined]

        @serve.batch(max_batch_size=8)
        async def batch(self, items: list[int]) -> list[int]:
            await asyncio.to_thread(time.sleep, 0.1)
            return items

        async def builtin(self) -> None:
            await self.batch(1)

        async def ours(self) -> None:
            tile = np.zeros((8, 8, 3), np.uint8)
            await self.engine.run("device", [tile], lambda i, r: None, deadline=time.monotonic() + TIMEOUT_S)

    serve.start(proxy_location="Disabled")  # it is asked by handle

    def run(wait_s: float) -> Any:
        return serve.run(Both.options(user_config={"wait_s": wait_s}).bind(), name="batcher", route_prefix=None)

    async def drive(handle: Any, method: str) -> Rate:
        random.seed(0)
        started, asked = time.monotonic(), []
        while time.monotonic() - started < seconds:
            asked.append(asyncio.ensure_future(_seconds(getattr(handle, method).remote())))
            await asyncio.sleep(random.expovariate(rate))
        await asyncio.gather(*asked)
        return Rate(len(asked) / (time.monotonic() - started), 1e3 * median([one.result() for one in asked]))

    async def each() -> dict[str, Rate]:
        found = {}
        for wait_s in BATCH_WAITS_S:
            handle = await asyncio.to_thread(run, wait_s)
            found[f"builtin {wait_s:g} s"] = await drive(handle, "builtin")
        return {**found, "ours": await drive(handle, "ours")}

    return asyncio.run(each())


async def _seconds(response: Any) -> float:
    began = time.monotonic()
    await response
    return time.monotonic() - began


# --- all of it


def names(text: str, known: tuple[str, ...]) -> list[str]:
    chosen = [name.strip() for name in text.split(",")]
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    return chosen


Table = dict[str, dict[str, list[Cell]]]  # system -> "size x concurrency" -> one cell a round


def measure(given: argparse.Namespace, root: Path) -> tuple[Table, dict[str, Rate]]:
    folder, table, batches = root / "artifact", {}, {}
    write_artifact(folder)
    session = artifact.load(folder, threads=1)
    wanted = {size: whole(session, body(size)) for size in given.sizes}
    for size in given.sizes:
        assert tiled(session, body(size)) == wanted[size], "tiles are not the whole"

    def note(system: str, size: str, concurrency: int, cell: Cell) -> None:
        table.setdefault(system, {}).setdefault(f"{size} x{concurrency}", []).append(cell)
        costly = sorted(((ms, kind) for kind, ms in cell.parts.items() if abs(ms) >= 0.005), reverse=True)
        parts = ", ".join(f"{kind} {ms:.2f}" for ms, kind in costly)
        found = f"{cell.cpu_ms:9.2f} CPU-ms {cell.per_s:9.1f}/s   {parts}"
        if parts:
            found += f"; idle {cell.idle_ms:.0f} ms/s"
        if cell.bare_ms:
            found += f"; bare {cell.bare_ms:.2f}, tiled {cell.tiled_ms:.2f}"
        print(f"{system:10} {size:>4} x{concurrency:<3} {found}", flush=True)

    def beside(size: str) -> tuple[float, float]:
        """The bare loop, now."""
        cells = [bare(work, session, size) for work in (whole, tiled)]
        for name, cell in zip(("bare", "bare tiled"), cells, strict=True):
            table.setdefault(name, {}).setdefault(f"{size} x1", []).append(cell)
        return cells[0].cpu_ms, cells[1].cpu_ms

    def serve_one(system: str, port: int, sizes: list[str] = given.sizes) -> None:
        for size in sizes:
            before = beside(size)
            for concurrency in given.concurrency:
                cell, after = load(port, size, concurrency, wanted[size]), beside(size)
                means = [sum(pair) / 2 for pair in zip(before, after, strict=True)]
                note(system, size, concurrency, replace(cell, bare_ms=means[0], tiled_ms=means[1]))
                before = after

    for number in range(given.rounds):
        if "threads" in given.only:
            with threads_server(folder) as port:
                serve_one("threads", port)
        state = root / str(number)
        for which in ("one", "two"):
            if "floor" in given.only and (size := given.sizes[0]):
                with cluster(given.proxy), floor(which, size, wanted[size]) as port:
                    serve_one(f"floor {which}", port, [size])
            if which in given.only:
                with cluster(given.proxy), tiers(which, folder, state / which) as port:
                    serve_one(which, port)
    if "batcher" in given.only:
        with cluster(given.proxy):
            batches = batcher(session.card)
            print(batches, flush=True)
    return table, batches


def summary(table: Table, batches: dict[str, Rate]) -> dict[str, Any]:
    cpu = {s: {cell: median(c.cpu_ms for c in found) for cell, found in cells.items()} for s, cells in table.items()}
    rate = {s: {cell: median(c.per_s for c in found) for cell, found in cells.items()} for s, cells in table.items()}
    out: dict[str, Any] = {}

    def put(name: str, system: str, size: str, figure: Callable[[Cell], float]) -> None:
        cells = [
            figure(c) for cell, found in table.get(system, {}).items() for c in found if cell.startswith(f"{size} ")
        ]
        if cells:
            out[name] = round(median(cells), 3)

    for which in ("one", "two"):
        put(f"{which}_tier_overhead_ms_12kb", which, "64", lambda c: c.cpu_ms - c.bare_ms)
        put(f"{which}_tier_floor_ms_12kb", f"floor {which}", "64", lambda c: c.cpu_ms)
    put("threads_overhead_ms_12kb", "threads", "64", lambda c: c.cpu_ms - c.bare_ms)
    if {"one_tier_overhead_ms_12kb", "one_tier_floor_ms_12kb", "threads_overhead_ms_12kb"} <= out.keys():
        least = out["threads_overhead_ms_12kb"] + out["one_tier_floor_ms_12kb"]
        out["one_tier_over_least"] = round(out["one_tier_overhead_ms_12kb"] / least, 3)
    for size in ("512", "2mp"):
        put(f"two_tier_overhead_ms_{size}", "two", size, lambda c: c.cpu_ms - c.bare_ms)
    put("two_tier_overhead_ms_2mp_tiled", "two", "2mp", lambda c: c.cpu_ms - c.tiled_ms)
    put("fraction_of_bare_same_tiles", "one", "2mp", lambda c: c.tiled_ms / c.cpu_ms)
    put("fraction_of_bare_whole_512px", "one", "512", lambda c: c.bare_ms / c.cpu_ms)
    if batches:
        ours, builtin = batches["ours"].per_s, {name: one.per_s for name, one in batches.items() if name != "ours"}
        out["batcher_over_serve_batch"] = round(ours / builtin["builtin 0.01 s"], 3)
        out["batcher_over_serve_batch_best"] = round(ours / max(builtin.values()), 3)
        out["batcher"] = {name: {k: round(v, 1) for k, v in one._asdict().items()} for name, one in batches.items()}
    out["table"] = {
        system: {cell: {"cpu_ms": round(ms, 2), "per_s": round(rate[system][cell], 1)} for cell, ms in cells.items()}
        for system, cells in cpu.items()
    }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts, sizes = ("threads", "floor", "one", "two", "batcher"), tuple(SIZES)
    parser.add_argument("--only", type=lambda text: names(text, parts), default=list(parts))
    parser.add_argument("--sizes", type=lambda text: names(text, sizes), default=list(sizes))
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=REQUESTS["64"], help="of 64 px in a cell")
    parser.add_argument("--proxy", choices=("haproxy", "python"), default="haproxy")
    given = parser.parse_args()
    REQUESTS["64"] = given.requests
    root = Path(tempfile.mkdtemp(prefix="rayscale-serve-"))
    os.environ |= {"RAYSCALE_HOME": str(root), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    try:
        print(json.dumps(summary(*measure(given, root))))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
