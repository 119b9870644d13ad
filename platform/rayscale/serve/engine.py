"""The engine: sessions by digest, and one thread per device that is never idle while a tile waits.

Tiles of many requests share the device: whoever waits is taken the moment it is free, one batch at a time, round
and round over the requests, so that a huge picture delays a thumbnail by one batch and not by all of its tiles.
No HTTP and no Ray: an engine lives in a gateway's process as well as behind a handle.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rayscale import artifact, imaging
from rayscale.contract import ModelCard, Spec
from rayscale.errors import RayscaleError, TooLargeError, UnavailableError
from rayscale.imaging import Tile

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class Session(Protocol):
    """What the engine needs of `artifact.Session`."""

    card: ModelCard
    digest: str
    provider: str

    def transform(self, nchw: F32, /) -> F32: ...


Load = Callable[[Path, str], Session]
"""(folder, expected digest) -> a verified session."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How pictures are cut and how tiles are batched; sides and areas in input pixels."""

    device: artifact.Device = "auto"
    threads: int = 0  # of ONNX Runtime; 0: the CPUs of this process
    tile_px: int = 256
    whole_max_px: int = 512 * 512  # up to this area a picture runs untiled: the same bytes for less work
    untiled_max_px: int = 4_000_000  # the same for models that have no exact tiling
    max_batch: int = 1  # tiles of one shape in one run: on a CPU more gains nothing


# --- a picture and its tiles: pure ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a picture of height x width goes through a model: the tiles of its padded area, all of one shape."""

    height: int
    width: int
    padded_height: int  # a multiple of the model's align, as padded_width is
    padded_width: int
    scale: int
    tiles: tuple[Tile, ...]

    @property
    def pixels(self) -> int:
        """Input pixels the device will see, overlaps included."""
        return sum(t.height * t.width for t in self.tiles)

    @property
    def tiling(self) -> str:
        return "whole" if len(self.tiles) == 1 else f"tiled {len(self.tiles)}"


def plan(spec: Spec, height: int, width: int, settings: EngineSettings) -> Plan:
    """Whole where that fits, exact tiles elsewhere. Raises: TooLargeError where neither is possible."""
    tall, wide = (-(-side // spec.align) * spec.align for side in (height, width))
    if spec.halo_px is None and height * width > settings.untiled_max_px:
        rule = f"this model runs on at most {settings.untiled_max_px} pixels ({spec.halo_why_none})"
        raise TooLargeError("image", f"{width}x{height}", rule, "send a smaller picture")
    if spec.halo_px is None or height * width <= settings.whole_max_px:
        tiles: tuple[Tile, ...] = (_whole(tall, wide),)
    else:
        # A tile keeps at least half of its side, however far the model sees.
        side = -(-max(settings.tile_px, 4 * spec.halo_px) // spec.align) * spec.align
        tiles = imaging.plan_tiles(tall, wide, tile_px=side, halo_px=spec.halo_px, align=spec.align)
    return Plan(height=height, width=width, padded_height=tall, padded_width=wide, scale=spec.scale, tiles=tiles)


def _whole(height: int, width: int) -> Tile:
    keep = {"keep_top": 0, "keep_bottom": height, "keep_left": 0, "keep_right": width}
    return Tile(y=0, x=0, height=height, width=width, **keep)


class Canvas:
    """A picture cut by its plan, and the result that grows as its tiles come back, in any order."""

    def __init__(self, plan: Plan, hwc_u8: U8) -> None:
        """`hwc_u8`: u8[plan.height, plan.width, 3]. The tiles are views: nothing is copied but for padding."""
        assert hwc_u8.shape == (plan.height, plan.width, 3), hwc_u8.shape
        below, right = plan.padded_height - plan.height, plan.padded_width - plan.width
        if below or right:
            hwc_u8 = np.pad(hwc_u8, ((0, below), (0, right), (0, 0)), mode="edge")
        self.plan = plan
        self.tiles = [hwc_u8[t.y : t.y + t.height, t.x : t.x + t.width] for t in plan.tiles]
        self._out = np.empty((plan.padded_height * plan.scale, plan.padded_width * plan.scale, 3), np.uint8)

    def place(self, index: int, tile_hwc_u8: U8) -> None:
        """Keep what tile `index` contributes: its own region, without the halo."""
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
        return np.ascontiguousarray(self._out[: self.plan.height * scale, : self.plan.width * scale])


# --- the queue: no thread, no clock -----------------------------------------------------------------------------


@dataclass(eq=False)
class Model:
    """A session and what it has been seen to cost."""

    session: Session
    seconds_per_px: float


class Timing(NamedTuple):
    """Where a request's time went in the engine."""

    queue_s: float  # its tiles waited while the device worked for others
    run_s: float


Place = Callable[[int, U8], None]
"""(index, result hwc u8): called in the device's thread, at most once per tile."""


@dataclass(eq=False)
class Job:
    """One request's tiles, all of one shape. Its future's end (result, error, cancellation) ends the job."""

    model: Model
    tiles: Sequence[U8]
    place: Place
    deadline: float  # on the engine's clock
    started: float = 0.0
    run_s: float = 0.0
    future: Future[Timing] = field(default_factory=Future)
    taken: int = 0
    finished: int = 0

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """What may share a batch: one session, one shape."""
        return id(self.model), self.tiles[0].shape

    @property
    def tile_px(self) -> int:
        """Input pixels of one tile."""
        height, width, _ = self.tiles[0].shape
        return int(height * width)

    @property
    def waiting_px(self) -> int:
        return (len(self.tiles) - self.taken) * self.tile_px

    def alive(self, now: float) -> bool:
        """Whether anyone still waits for it. A job past its deadline is failed here."""
        if not self.future.done() and now >= self.deadline:
            self.fail(_too_late())
        return not self.future.done()

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # it was cancelled in this very moment
            self.future.set_exception(error)


Item = tuple[Job, int]


class TileQueue:
    """Jobs in a circle: every batch starts with the next one, and those of the same key join it."""

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self._jobs: deque[Job] = deque()

    def put(self, job: Job) -> None:
        self._jobs.append(job)

    def take(self, now: float) -> list[Item]:
        """The next batch: up to max_batch tiles of one key, one per job and round. Empty when none waits."""
        self._jobs = deque(job for job in self._jobs if job.alive(now))
        batch: list[Item] = []
        while self._jobs and len(batch) < self.max_batch:
            key = batch[0][0].key if batch else self._jobs[0].key
            job = next((j for j in self._jobs if j.key == key), None)
            if job is None:
                break
            self._jobs.remove(job)
            batch.append((job, job.taken))
            job.taken += 1
            if job.taken < len(job.tiles):
                self._jobs.append(job)
        return batch

    def cost_s(self) -> float:
        """Estimated device time of all that waits, seconds."""
        return sum((j.waiting_px * j.model.seconds_per_px for j in self._jobs if not j.future.done()), 0.0)

    def drain(self) -> list[Job]:
        jobs, self._jobs = list(self._jobs), deque()
        return jobs


# --- the engine -------------------------------------------------------------------------------------------------


class Engine:
    """Sessions and the thread that runs them. `prepare` and `forget` from any thread, `run` from an event loop."""

    def __init__(self, settings: EngineSettings, *, load: Load | None = None) -> None:
        self.settings = settings
        self._load = load or self._load_artifact
        self._models: dict[str, Model] = {}
        self._queue = TileQueue(settings.max_batch)
        self._wake = threading.Condition()  # guards the queue and what follows
        self._closed = False
        self._busy_until = 0.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # models

    def prepare(self, digest: str, folder: Path) -> None:
        """Load, verify and warm a model: seconds, so never on an event loop. A second time does nothing."""
        if digest in self._models:
            return
        session = self._load(folder, digest)
        self._models[digest] = Model(session, _measure(session, self.settings))

    def forget(self, digest: str) -> None:
        """Take no new requests for it. What waits is still served."""
        self._models.pop(digest, None)

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self._models.copy())

    def session(self, digest: str) -> Session:
        """Raises: UnavailableError when it is not prepared here."""
        return self._model(digest).session

    def _model(self, digest: str) -> Model:
        model = self._models.get(digest)
        if model is None:
            raise UnavailableError("model", digest[:12], "is not loaded in this replica", "try again")
        return model

    def _load_artifact(self, folder: Path, digest: str) -> Session:
        s = self.settings
        return artifact.load(folder, expect_digest=digest, device=s.device, threads=s.threads)

    # requests

    def backlog_s(self) -> float:
        """Estimated seconds until the device has done all that is asked of it now."""
        with self._wake:
            return self._queue.cost_s() + max(0.0, self._busy_until - time.monotonic())

    def cost_s(self, digest: str, pixels: int) -> float:
        """Estimated device time of so many input pixels."""
        return pixels * self._model(digest).seconds_per_px

    async def run(self, digest: str, tiles: Sequence[U8], place: Place, *, deadline: float) -> Timing:
        """Run tiles u8[h, w, 3] of one shape and hand each result to `place`; `deadline` is time.monotonic().

        Cancelling the caller, or the deadline, drops the tiles that have not started.

        Raises: UnavailableError after the deadline, or when the engine is closed; what the session raises.
        """
        job = Job(self._model(digest), tiles, place, deadline, started=time.monotonic())
        with self._wake:
            if self._closed:
                raise _closed()
            self._queue.put(job)
            self._wake.notify()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.wrap_future(job.future)
        except TimeoutError:
            raise _too_late() from None

    def close(self) -> None:
        """Finish the running batch, refuse the rest, end the thread."""
        with self._wake:
            self._closed = True
            for job in self._queue.drain():
                job.fail(_closed())
            self._wake.notify()
        self._thread.join()

    # the device's thread

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (batch := self._queue.take(time.monotonic())):
                    if self._closed:
                        return
                    self._wake.wait()
                cost_s = sum(job.tile_px * job.model.seconds_per_px for job, _ in batch)
                self._busy_until = time.monotonic() + cost_s
            self._run(batch)
            with self._wake:
                self._busy_until = 0.0
            del batch  # an idle thread must not keep the last request's pictures

    def _run(self, batch: list[Item]) -> None:
        model = batch[0][0].model
        started = time.monotonic()
        try:
            nchw = [imaging.to_nchw_f32(job.tiles[index]) for job, index in batch]
            result = model.session.transform(nchw[0] if len(nchw) == 1 else np.concatenate(nchw))
            for position, (job, index) in enumerate(batch):
                job.place(index, imaging.to_hwc_u8(result[position : position + 1]))
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].fail(error)
                return
            for item in batch:  # a poison tile fails its own request only
                self._run([item])
            return
        now = time.monotonic()
        share_s = (now - started) / len(batch)
        model.seconds_per_px += 0.2 * (share_s / batch[0][0].tile_px - model.seconds_per_px)
        for job, _ in batch:
            job.run_s += share_s
            job.finished += 1
            if job.finished == len(job.tiles):
                with suppress(InvalidStateError):  # it was cancelled in this very moment
                    job.future.set_result(Timing(max(0.0, now - job.started - job.run_s), job.run_s))


def _measure(session: Session, settings: EngineSettings) -> float:
    """Warm a session up on one tile; seconds per input pixel of its second run."""
    spec = session.card.spec
    if spec.kind != "transform" or len(spec.inputs) != 1:
        return 0.0
    side = -(-min(settings.tile_px, 256) // spec.align) * spec.align
    probe = np.zeros((1, 3, side, side), np.float32)
    for _ in range(2):
        started = time.monotonic()
        session.transform(probe)
    return (time.monotonic() - started) / (side * side)


def _too_late() -> RayscaleError:
    return UnavailableError("request", "deadline", "passed before its tiles were run", "try again later")


def _closed() -> RayscaleError:
    return UnavailableError("engine", "closed", "this replica is going away", "try again")
