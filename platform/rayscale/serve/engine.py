"""The engine: sessions by digest, and one thread per device that is never idle while a tile waits.

Tiles of many requests share the device: whoever waits is taken the moment it is free, one batch at a time, round
and round over the requests, so that a huge picture delays a thumbnail by one batch and not by all of its tiles.
No HTTP and no Ray: an engine lives in a gateway's process as well as behind a handle.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from rayscale import artifact, imaging
from rayscale.artifact import Abort
from rayscale.contract import Spec
from rayscale.errors import ConfigError, ImageError, RayscaleError, TooLargeError, UnavailableError, UserError
from rayscale.imaging import Tile
from rayscale.serve.batching import (
    F32,
    U8,
    CallJob,
    Item,
    Job,
    Known,
    Model,
    Outcome,
    Place,
    Queue,
    Session,
    TileJob,
    Timing,
    execute,
    too_late,
    units,
)
from rayscale.serve.course import Begin, Course, Look, Then, Tiled
from rayscale.serve.shelf import Shelf
from rayscale.serve.threads import Threads

T = TypeVar("T")

_LEAD_S = 0.005  # what takes longer is left to the device's thread: others wait for the pool's

Load = Callable[[Path, str], Session]
"""(folder, expected digest) -> a verified session."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How pictures are cut and how tiles are batched; sides and areas in input pixels."""

    device: artifact.Device = "auto"
    threads: int = 0  # of ONNX Runtime; 0: the CPUs of this process
    tile_px: int = 256  # at most; just that where tiles of several pictures share a batch
    whole_max_px: int = 512 * 512  # up to this area a picture runs untiled: the same bytes for less work
    untiled_max_px: int = 4_000_000  # the same for models that have no exact tiling
    max_batch: int = 1  # tiles or samples of one shape in one run: on a CPU more gains nothing
    memory_bytes: int = 0  # of loaded models; beyond it those leave that were not asked for the longest; 0: no limit


# --- a picture and its tiles: pure ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a picture of height x width goes through a model: the tiles of its padded area, all of one shape."""

    height: int
    width: int
    padded_height: int  # as `imaging.padded_sides` says, and padded_width
    padded_width: int
    scale: int
    tiles: tuple[Tile, ...]
    error: float = 0.0  # by which tiles may differ from the whole, of a card whose halo is not exact

    @property
    def pixels(self) -> int:
        """Input pixels the device will see, overlaps included."""
        return len(self.tiles) * self.tiles[0].height * self.tiles[0].width

    @property
    def tiling(self) -> str:
        if len(self.tiles) == 1:
            return "whole"
        return f"tiled {len(self.tiles)}" + (f", within {self.error:.2g}" if self.error else "")


def plan(spec: Spec, height: int, width: int, settings: EngineSettings) -> Plan:
    """Whole where that fits, exact tiles elsewhere.

    Raises: TooLargeError where neither is possible; ImageError for another size than the only one a model takes.
    """
    fixed_px = spec.fixed_px
    if fixed_px is not None and spec.halo_px is None and (height, width) != fixed_px:
        rule = f"this model takes pictures of {fixed_px[1]}x{fixed_px[0]} px only"
        raise ImageError("image", f"{width}x{height}", rule, "crop or resize it")
    tall, wide = imaging.padded_sides(height, width, align=spec.align, fixed_px=fixed_px)
    if spec.halo_px is None and height * width > settings.untiled_max_px:
        rule = f"this model runs on at most {settings.untiled_max_px} pixels ({spec.halo_why_none})"
        raise TooLargeError("image", f"{width}x{height}", rule, "send a smaller picture")
    if spec.halo_px is not None and fixed_px is not None:
        tiles = imaging.plan_tiles(tall, wide, tile_px=fixed_px, halo_px=spec.halo_px, align=spec.align)
    elif spec.halo_px is None or height * width <= settings.whole_max_px:
        tiles = (_whole(tall, wide),)
    else:
        # A tile keeps at least half of its side, however far the model sees.
        side = -(-max(settings.tile_px, 4 * spec.halo_px) // spec.align) * spec.align
        cut = {"halo_px": spec.halo_px, "align": spec.align}
        sides = (side, side)
        if settings.max_batch == 1 and not spec.halo_error:  # nothing shares a batch: windows of the picture's own size
            sides = (imaging.fitted_side(tall, tile_px=side, **cut), imaging.fitted_side(wide, tile_px=side, **cut))
        tiles = imaging.plan_tiles(tall, wide, tile_px=sides, **cut)
    padded = {"padded_height": tall, "padded_width": wide}
    return Plan(height=height, width=width, **padded, scale=spec.scale, tiles=tiles, error=spec.halo_error)


def _whole(height: int, width: int) -> Tile:
    keep = {"keep_top": 0, "keep_bottom": height, "keep_left": 0, "keep_right": width}
    return Tile(y=0, x=0, height=height, width=width, **keep)


class Canvas:
    """A picture cut by its plan, and the result that grows as its tiles come back, in any order."""

    def __init__(self, plan: Plan, hwc_u8: U8) -> None:
        """`hwc_u8`: u8[plan.height, plan.width, c], c as `Engine.run` has it. The tiles are views of it, or padded."""
        assert hwc_u8.ndim == 3, hwc_u8.shape
        assert hwc_u8.shape[:2] == (plan.height, plan.width), hwc_u8.shape
        below, right = plan.padded_height - plan.height, plan.padded_width - plan.width
        if below or right:
            hwc_u8 = np.pad(hwc_u8, ((0, below), (0, right), (0, 0)), mode="edge")
        self.plan = plan
        self.tiles = [hwc_u8[t.y : t.y + t.height, t.x : t.x + t.width] for t in plan.tiles]
        self._shape = plan.padded_height * plan.scale, plan.padded_width * plan.scale, 3
        self._out = np.empty(self._shape, np.uint8) if len(self.tiles) > 1 else None

    def place(self, index: int, tile_hwc_u8: U8) -> None:
        """Keep what tile `index` contributes: its own region, without the halo; an only tile is kept as it is."""
        if self._out is None:
            if tile_hwc_u8.shape != self._shape:
                raise ValueError(f"a tile came back as {tile_hwc_u8.shape}, not as {self._shape}")
            self._out = tile_hwc_u8
            return
        tile, scale = self.plan.tiles[index], self.plan.scale
        ys = slice((tile.keep_top - tile.y) * scale, (tile.keep_bottom - tile.y) * scale)
        xs = slice((tile.keep_left - tile.x) * scale, (tile.keep_right - tile.x) * scale)
        self._out[
            tile.keep_top * scale : tile.keep_bottom * scale, tile.keep_left * scale : tile.keep_right * scale
        ] = tile_hwc_u8[ys, xs]

    @property
    def result(self) -> U8:
        """u8[height * scale, width * scale, 3], contiguous."""
        scale = self.plan.scale
        assert self._out is not None  # every tile was placed
        return np.ascontiguousarray(self._out[: self.plan.height * scale, : self.plan.width * scale])


# --- the engine -------------------------------------------------------------------------------------------------


class Crew(Protocol):
    """Who runs a model: how many, what they have to do, and how many calls of one request they take at once."""

    @property
    def num_engines(self) -> int: ...
    @property
    def window(self) -> int: ...
    def backlog_s(self) -> float: ...


class Runner(Protocol):
    """What a gateway needs: an `Engine` in its own process, or `pools.PooledEngine`."""

    @property
    def settings(self) -> EngineSettings: ...
    @property
    def digests(self) -> frozenset[str]: ...
    def session(self, digest: str) -> Known: ...
    def forget(self, digest: str) -> None: ...
    def known(self) -> dict[str, Known]: ...
    def outcomes(self) -> dict[str, Outcome]: ...
    def of(self, digest: str) -> Crew: ...
    def cost_s(self, digest: str, units: int) -> float: ...
    async def run(self, digest: str, tiles: Sequence[U8], place: Place, *, deadline: float) -> Timing: ...
    async def run_between(
        self, digest: str, pool: Threads, begin: Begin, then: Then[T], *, deadline: float, look: Look | None = None
    ) -> T | None: ...
    async def call(
        self, digest: str, inputs: Mapping[str, F32], *, deadline: float, owner: str = ""
    ) -> tuple[dict[str, F32], Timing]: ...
    def close(self) -> None: ...


class Engine:
    """Sessions and the thread that runs them. `prepare` and `forget` from any thread, `run` from an event loop."""

    num_engines = 1

    def __init__(self, settings: EngineSettings, *, load: Load | None = None) -> None:
        self.settings = settings
        self.window = 2 * settings.max_batch  # calls of one request in flight: one batch runs, one waits
        self._load = load or self._load_artifact
        self._models = Shelf(lambda folder, digest: _measure(Model(self._load(folder, digest)), settings),
                             settings.memory_bytes)  # fmt: skip
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._queue = Queue(settings.max_batch)
        self._lock = threading.Lock()  # of the queue and what follows
        self._wake = threading.Condition(self._lock)
        self._closed = False
        self._taken = False  # somebody runs a batch: the device's thread, or who found the device free
        self._busy_until = 0.0
        self._outcomes: dict[str, Outcome] = {}
        self._batches: Counter[tuple[str, str, int]] = Counter()
        self._running: tuple[list[Item], Abort] | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # models

    def prepare(self, digest: str, folder: Path) -> None:
        """Load, verify and warm a model: seconds, so never on an event loop. A second time does nothing."""
        self._models.prepare(digest, folder)

    def forget(self, digest: str) -> None:
        """Take no new requests for it. What waits is still served."""
        self._models.forget(digest)

    @property
    def digests(self) -> frozenset[str]:
        return self._models.digests

    def known(self) -> dict[str, Known]:
        """Digest -> what other processes may know of it."""
        return {digest: replace(self._models.known(digest)) for digest in self.digests}

    def outcomes(self) -> dict[str, Outcome]:
        """Digest -> how its requests' work has ended so far."""
        return self._outcomes.copy()

    def take_batches(self) -> Counter[tuple[str, str, int]]:
        """How many runs there were of (digest, provider, items in one) since this was asked last."""
        with self._lock:
            taken, self._batches = self._batches, Counter()
        return taken

    def _count(self, job: Job, *, ok: bool) -> None:
        done = self._outcomes.get(digest := job.model.session.digest, Outcome())
        timed = ok and job.alone
        log_s = math.log(max(job.run_s, 1e-9) / (job.count * job.item_units)) if timed else 0.0
        self._outcomes[digest] = Outcome(done.ok + ok, done.failed + (not ok), done.timed + timed, done.log_s + log_s)

    def session(self, digest: str) -> Known:
        """Raises: UnavailableError when it is not prepared here."""
        return self._models.known(digest)

    def of(self, digest: str) -> Engine:
        """Who runs it: the one that there is."""
        return self

    async def _model(self, digest: str, deadline: float) -> Model:
        """The model itself, loaded again where it had to leave memory."""
        model = self._models.get(digest)
        if model is not None:
            return model
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await loop.run_in_executor(self._loader, self._models.fetch, digest)
        except TimeoutError:
            raise too_late() from None

    def _load_artifact(self, folder: Path, digest: str) -> Session:
        s = self.settings
        return artifact.load(folder, expect_digest=digest, device=s.device, threads=s.threads)

    # requests

    def backlog_s(self) -> float:
        """Estimated seconds until the device has done all that is asked of it now."""
        with self._lock:
            return self._queue.cost_s() + max(0.0, self._busy_until - time.monotonic())

    def cost_s(self, digest: str, units: int) -> float:
        """Estimated device time of so many input pixels (functions of pictures) or samples (others)."""
        return units * self._models.known(digest).seconds_per_unit

    async def run(self, digest: str, tiles: Sequence[U8], place: Place, *, deadline: float, owner: str = "") -> Timing:
        """Run tiles u8[h, w, c] of one shape and hand each result u8[h * scale, w * scale, 3] to `place`.

        c: the channels of all of the card's inputs, in its order: 3 of a picture, 4 with a mask (255: missing), 3 T of
        a burst of T frames. `deadline` is time.monotonic(). Cancelling the caller, or the deadline, drops the tiles
        that have not started, and stops the device where it works for nobody else. Calls of one `owner` (the request
        that they are parts of) take one turn together.

        Raises: ConfigError for other channels; UnavailableError after the deadline, or when the engine is closed;
        what the session raises.
        """
        self._check_channels(digest, tiles)
        model = await self._model(digest, deadline)
        job = TileJob(model=model, tiles=tiles, place=place, deadline=deadline, owner=owner)
        return await self._finish(job)

    async def run_between(
        self, digest: str, pool: Threads, begin: Begin, then: Then[T], *, deadline: float, look: Look | None = None
    ) -> T | None:
        """`begin` in a thread of the pool, its tiles as `run` does, `then` in the pool again: its result.

        `look`, in the pool before them, may send them to another. The event loop is woken once. Where the device has
        nothing to do, a small picture's only tile runs in the thread that decoded it. The deadline is the tiles'.
        Raises: as `run`, and what the other parts raise.
        """
        course = Course(pool, then)

        def enter(tiled: Tiled) -> None:
            self._check_channels(digest, tiled.tiles)
            if (model := self._models.get(digest)) is not None:
                follow(tiled, model, lead=True)
                return
            loading = self._loader.submit(self._models.fetch, digest)
            loading.add_done_callback(lambda done: loaded(tiled, done))

        def loaded(tiled: Tiled, done: Future[Model]) -> None:
            try:
                follow(tiled, done.result(), lead=False)
            except Exception as error:
                course.end.fail(error)

        def follow(tiled: Tiled, model: Model, *, lead: bool) -> None:
            job = TileJob(model=model, tiles=tiled.tiles, place=tiled.place, deadline=deadline)
            course.follow(job, functools.partial(self._put, lead=lead))

        timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), course.late)
        try:
            course.start(look, begin, enter)
            return await course.end.wait()
        finally:
            timer.cancel()

    def _check_channels(self, digest: str, tiles: Sequence[U8]) -> None:
        inputs, found = self._models.known(digest).leads, tiles[0].shape[2]
        if found != (wanted := sum(map(math.prod, inputs.values()))):
            names = " and ".join(inputs)
            raise ConfigError("channels", found, f"this model takes {names}: {wanted} channels", "send what it takes")

    async def call(
        self, digest: str, inputs: Mapping[str, F32], *, deadline: float, owner: str = ""
    ) -> tuple[dict[str, F32], Timing]:
        """Run a function of any kind, by the names of its card, in turn with all that waits.

        All samples at once, or with a `max_batch` above 1 each as a tile is: in a batch with others of its shapes.

        Raises: ConfigError for inputs unlike the card's; otherwise as `run`.
        """
        card = self._models.known(digest).card
        artifact.bind(card, {name: value.shape for name, value in inputs.items()})
        model = await self._model(digest, deadline)
        apart = self.settings.max_batch > 1 and model.known.shares
        job = CallJob(model=model, inputs=inputs, apart=apart, deadline=deadline, owner=owner)
        timing = await self._finish(job)
        return job.outputs, timing

    async def _finish(self, job: Job) -> Timing:
        """Queue a job and wait for it."""
        self._put(job)
        timer = asyncio.get_running_loop().call_later(job.deadline - time.monotonic(), job.end.fail, too_late())
        try:
            return await job.end.wait()
        finally:
            timer.cancel()

    def _put(self, job: Job, *, lead: bool = False) -> bool:
        """Queue a job, or with `lead` run it here where that is quick and nobody else is there. Whether it was."""
        job.started = time.monotonic()
        job.end.then(self._stop_if_idle)
        with self._lock:
            if self._closed:
                raise _closed()
            quick = job.count == 1 and job.item_s <= _LEAD_S and job.model.session.provider == artifact.CPU
            if not (lead and quick) or self._taken or self._queue:
                self._queue.put(job)
                if not self._taken:  # who has the device looks for more at its end
                    self._wake.notify()
                return False
            if not job.alive(job.started):
                return True
            job.taken = 1
            batch = [(job, 0)]
            self._hold(batch, job.started)
        try:
            self._run(batch)
        finally:
            with self._lock:
                self._give_back()
                if self._queue or self._closed:
                    self._wake.notify()
        return True

    def _stop_if_idle(self) -> None:
        """Abort the running batch when nobody waits for any of it."""
        if (running := self._running) is not None:
            for job, _ in running[0]:
                if not job.end.done:
                    return
            running[1].now()

    def close(self) -> None:
        """Refuse what waits and what comes. What runs is finished, and the thread ends after it: nobody waits here."""
        with self._lock:
            self._closed = True
            for job in self._queue.drain():
                job.end.fail(_closed())
            self._wake.notify()
        atexit.register(self._thread.join)  # ONNX Runtime must not be taken down under a run
        self._loader.shutdown(wait=False, cancel_futures=True)

    # the device's thread

    def _work(self) -> None:
        while True:
            with self._lock:
                while self._taken or not (batch := self._take()):
                    if self._closed and not self._taken:
                        return
                    self._wake.wait()
            self._run(batch)
            with self._lock:
                self._give_back()
            del batch  # an idle thread must not keep the last request's pictures

    def _take(self) -> list[Item]:
        """The next batch, and the device with it."""
        now = time.monotonic()
        if batch := self._queue.take(now):
            self._hold(batch, now)
        return batch

    def _hold(self, batch: list[Item], now: float) -> None:
        self._taken, self._busy_until = True, now + sum([job.item_s for job, _ in batch])

    def _give_back(self) -> None:
        self._taken, self._busy_until = False, 0.0

    def _run(self, batch: list[Item]) -> None:
        started, abort = time.monotonic(), Abort()
        self._running = batch, abort
        self._stop_if_idle()  # it was cancelled since it was taken
        try:
            execute(batch, abort)
        except Exception as error:
            if len(batch) == 1:
                if not isinstance(error, UserError | UnavailableError):
                    self._count(batch[0][0], ok=False)
                batch[0][0].end.fail(error)
                return
            for item in batch:  # a poison tile fails its own request only
                if not item[0].end.done:
                    self._run([item])
            return
        finally:
            self._running = None
        now, session = time.monotonic(), batch[0][0].model.session
        with self._lock:
            self._batches[session.digest, session.provider, len(batch)] += 1
        share_s = (now - started) / len(batch)
        batch[0][0].learn(share_s)
        alone = len({job.owner or id(job) for job, _ in batch}) == 1
        for job, _ in batch:
            job.alone = job.alone and alone
            job.run_s += share_s
            job.finished += 1
            if job.finished == job.count:
                self._count(job, ok=True)
                job.end.keep(Timing(max(0.0, now - job.started - job.run_s), job.run_s))


def _measure(model: Model, settings: EngineSettings) -> Model:
    """Warm a session up on one small sample; what its second run cost is the first estimate."""
    spec = model.session.card.spec
    side = -(-min(settings.tile_px, 256) // spec.align)  # of free axes, before their factor align
    probe = {}
    for tensor in spec.inputs:
        sizes = []
        for position, axis in enumerate(tensor.shape):
            factor, free = artifact.axis_of(axis)
            step = artifact.side_multiple(model.session.card, tensor, position)
            sizes.append(factor * (1 if free == "n" else side * step) if free else factor)
        probe[tensor.name] = np.zeros(sizes, np.float32)
    for _ in range(2):
        started = time.monotonic()
        model.session.run(probe)
    model.known.seconds_per_unit = (time.monotonic() - started) / units(spec, probe)
    return model


def _closed() -> RayscaleError:
    return UnavailableError("engine", "closed", "this replica is going away", "try again")
