"""What waits for a device, and in which order it goes: no thread, no clock, no HTTP.

Tiles of one model and one shape may share a batch, whoever asked for them, and so may the samples of calls. Requests
stand in a circle, so a huge picture delays a thumbnail by one batch and not by all of its tiles.

On a CPU a sample's result does not depend on its batch: every export checks that, to the bit.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rayscale import imaging
from rayscale.artifact import CPU, Abort, axis_of
from rayscale.contract import ModelCard, Spec
from rayscale.errors import ConfigError, RayscaleError, UnavailableError
from rayscale.serve.promise import Promise

LEARN, _LOOK_BACK_S = 0.2, 0.5

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class Session(Protocol):
    """What the engine needs of `artifact.Session`."""

    card: ModelCard
    digest: str
    provider: str

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None, /) -> dict[str, F32]: ...


def leads(spec: Spec) -> dict[str, tuple[int, ...]]:
    """By input, the axes between batch and sides of a function of pictures: (3,) of one, (1,) of a mask, (T, 3).

    Raises: ConfigError for a function of anything else (generate, embed).
    """
    if spec.kind not in ("transform", "burst"):
        raise ConfigError("model", spec.kind, "is no function from pictures to a picture", "see /v1/models")
    return {t.name: tuple(int(axis) for axis in t.shape[1:-2]) for t in spec.inputs}


def units(spec: Spec, inputs: Mapping[str, F32]) -> int:
    """By what a run's cost is counted: input pixels of a function of pictures, samples of any other."""
    shape = inputs[spec.inputs[0].name].shape
    return int(math.prod((shape[0], *shape[-2:])) if spec.kind in ("transform", "burst") else shape[0])


def stacks(spec: Spec) -> bool:
    """Whether several samples are one run: a free axis counts them, the first one of all inputs and outputs."""
    tensors = (*spec.inputs, *spec.outputs)
    factor, free = axis_of(first := tensors[0].shape[0])
    others = {axis_of(axis)[1] for t in tensors for axis in t.shape[1:]}
    return free not in ("", *others) and factor == 1 and all(t.shape[0] == first for t in tensors)


@dataclass(kw_only=True)
class Known:
    """What is known of a loaded model where it is not: enough to cut pictures for it and to say what they cost."""

    card: ModelCard
    digest: str
    provider: str
    seconds_per_unit: float = 0.0  # `units` says which; where the model is, the engine corrects it

    @functools.cached_property
    def leads(self) -> dict[str, tuple[int, ...]]:
        """As `leads`."""
        return leads(self.card.spec)

    @functools.cached_property
    def shares(self) -> bool:
        """Whether samples of its calls may share a run with others'.

        Pictures from seeds only on a CPU: elsewhere last bits may depend on the batch, and a seed is promised the same
        picture again. Other answers are promised within a tolerance there, as those of tiles are.
        """
        return stacks(self.card.spec) and (self.card.spec.kind != "generate" or self.provider == CPU)


def learnt(before_s: float, measured_s: float, weight: float = LEARN) -> float:
    """An estimate, corrected by one measurement; work that waited for its CPU moves it up by a fifth at most."""
    return before_s + weight * (min(measured_s, 2 * before_s) - before_s) if before_s else measured_s


class Model:
    """A session and what is known of it by now."""

    def __init__(self, session: Session, seconds_per_unit: float = 0.0) -> None:
        self.session = session
        self.known = Known(
            card=session.card, digest=session.digest, provider=session.provider, seconds_per_unit=seconds_per_unit
        )


class Outcome(NamedTuple):
    """How a model's runs ended. What the caller could mend, or what came too late, is neither."""

    ok: int = 0
    failed: int = 0
    timed: int = 0  # of the ok ones, those that shared no batch with others: what is rarely asked for shares few
    log_s: float = 0.0  # sum over the timed ones: log of their device seconds per unit


class Timing(NamedTuple):
    """Where a request's time went in the engine."""

    queue_s: float  # its tiles waited while the device worked for others
    run_s: float


Place = Callable[[int, U8], None]
"""(index, result hwc u8): called in the device's thread, at most once per tile."""


@dataclass(eq=False, kw_only=True)
class Job:
    """Work of one request, `TileJob` or `CallJob`. What ends its promise (result, error, cancellation) ends the job."""

    count: int = field(init=False)  # of its items, each of which is run once
    key: tuple[object, ...] = field(init=False)  # items of the same may share a batch
    item_units: int = field(init=False)  # `units` of one item
    model: Model
    deadline: float  # on the engine's clock
    owner: str = ""  # the request, where it comes as several jobs: they take one turn together
    started: float = 0.0
    run_s: float = 0.0
    end: Promise[Timing] = field(default_factory=Promise)
    taken: int = 0
    finished: int = 0
    alone: bool = True  # no other job was in its batches

    @property
    def item_s(self) -> float:
        """Estimated device time of one item."""
        return self.item_units * self.model.known.seconds_per_unit

    def learn(self, item_s: float) -> None:
        """Correct the estimate by one measurement.

        It looks back over some half a second of the device's time: over a few tiles alone it would jump with every
        busy moment, and with it who is let in.
        """
        known, weight = self.model.known, min(LEARN, max(item_s, self.item_s) / _LOOK_BACK_S)
        known.seconds_per_unit = learnt(known.seconds_per_unit, item_s / self.item_units, weight)

    @property
    def waiting_s(self) -> float:
        return (self.count - self.taken) * self.item_s

    def alive(self, now: float) -> bool:
        """Whether anyone still waits for it. A job whose next item would end past its deadline is failed here."""
        if not self.end.done and now + self.item_s >= self.deadline:
            self.end.fail(too_late())
        return not self.end.done


@dataclass(eq=False, kw_only=True)
class TileJob(Job):
    """Tiles u8[h, w, c] of one shape; each result goes to `place`."""

    tiles: Sequence[U8]
    place: Place

    def __post_init__(self) -> None:
        height, width, _ = shape = self.tiles[0].shape
        self.count, self.key, self.item_units = len(self.tiles), (id(self.model), shape), height * width


@dataclass(eq=False, kw_only=True)
class CallJob(Job):
    """Samples of a function of any kind; `outputs` are there when it has ended."""

    inputs: Mapping[str, F32]
    apart: bool = False  # each sample is an item, which may share a batch; else they all are one, which runs alone
    outputs: dict[str, F32] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.model.session.card.spec
        self.count, self.key = 1, (id(self),)
        if self.apart:
            shapes = sorted((name, value.shape[1:], value.dtype.str) for name, value in self.inputs.items())
            self.count, self.key = len(self.inputs[spec.inputs[0].name]), (id(self.model), *shapes)
        self.item_units = units(spec, self.inputs) // self.count

    def item(self, index: int) -> Mapping[str, F32]:
        """The inputs of one item."""
        return {name: value[index : index + 1] for name, value in self.inputs.items()} if self.apart else self.inputs

    def keep(self, index: int, outputs: Mapping[str, F32]) -> None:
        """What one item gave, copied where there are others: no request holds the arrays of its neighbours."""
        for name, value in outputs.items():
            if not self.apart:
                self.outputs[name] = value
                continue
            if name not in self.outputs:
                self.outputs[name] = np.empty((self.count, *value.shape[1:]), value.dtype)
            self.outputs[name][index] = value[0]


Item = tuple[Job, int]


def execute(batch: Sequence[Item], abort: Abort | None = None) -> None:
    """Run one batch of `Queue.take`, and hand each job its results. Raises: what the session raises."""
    session = batch[0][0].model.session
    calls = [(job, index) for job, index in batch if isinstance(job, CallJob)]
    tiles = [(job, index) for job, index in batch if isinstance(job, TileJob)]
    if calls:
        _execute_calls(session, calls, abort)
        return
    spec = session.card.spec
    run = imaging.as_one(lambda inputs: session.run(inputs, abort)[spec.outputs[0].name], batch[0][0].model.known.leads)
    nchw = [imaging.to_nchw_f32(job.tiles[index]) for job, index in tiles]
    if len(nchw) == 1:
        result = run(nchw[0])
    elif spec.inputs[0].shape[0] == 1:  # a network made elsewhere may take one picture at a time
        result = np.concatenate([run(one) for one in nchw])
    else:
        result = run(np.concatenate(nchw))
    for position, (job, index) in enumerate(tiles):
        job.place(index, imaging.to_hwc_u8(result[position : position + 1]))


def _execute_calls(session: Session, calls: Sequence[tuple[CallJob, int]], abort: Abort | None) -> None:
    inputs = [job.item(index) for job, index in calls]
    if len(calls) == 1:
        calls[0][0].keep(calls[0][1], session.run(inputs[0], abort))
        return
    outputs = session.run({name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}, abort)
    for name, value in outputs.items():
        if len(value) != len(calls):  # then each is run alone
            raise ValueError(f"{name} has {len(value)} samples, of {len(calls)} that were asked for")
    for position, (job, index) in enumerate(calls):
        job.keep(index, {name: value[position : position + 1] for name, value in outputs.items()})


class Queue:
    """Requests in a circle: every batch starts with the next one, and those of the same key join it.

    Where that would make somebody late, the one whose deadline comes first starts it: taking turns, all of those who
    were let in by a wrong estimate would be nearly done when their time is up, and none of them done.
    """

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self._circle: deque[list[Job]] = deque()  # the jobs of each request
        self._served = 0  # requests at its end that had their turn in the last batch, and want more
        self._spared = False  # one with a single item had the last batch before its turn

    def put(self, job: Job) -> None:
        for jobs in self._circle if job.owner else ():
            if jobs[0].owner == job.owner:
                jobs.append(job)
                return
        # Before who is being served just now: it would wait for a second batch of theirs otherwise.
        self._circle.insert(len(self._circle) - self._served, [job])

    def take(self, now: float) -> list[Item]:
        """The next batch: up to max_batch items of one key, one per request and round. Empty when none waits."""
        living = ([job for job in jobs if job.alive(now)] for jobs in self._circle)
        self._circle = deque(jobs for jobs in living if jobs)
        if len(self._circle) > 1 and (first := self._first(now)) is not None:
            self._circle.remove(first)
            self._circle.appendleft(first)
        batch: list[Item] = []
        served: set[int] = set()
        while self._circle and len(batch) < self.max_batch:
            key = batch[0][0].key if batch else self._circle[0][0].key
            found = next(((jobs, job) for jobs in self._circle for job in jobs if job.key == key), None)
            if found is None:
                break
            jobs, job = found
            batch.append((job, job.taken))
            job.taken += 1
            if job.taken == job.count:
                jobs.remove(job)
            self._circle.remove(jobs)
            served.discard(id(jobs))
            if jobs:
                self._circle.append(jobs)
                served.add(id(jobs))
        self._served = len(served)
        return batch

    def _first(self, now: float) -> list[Job] | None:
        """Who is to go first lest somebody be late; None: nobody would be.

        Every other time one whose last item it is, where there is such: a thumbnail waits for no picture.
        """
        if now + self.cost_s() <= min(map(_deadline, self._circle)):
            return None
        last = next((jobs for jobs in self._circle if _items_left(jobs) == 1), None)
        self._spared = last is not None and not self._spared
        if self._spared:
            return last
        can = [jobs for jobs in self._circle if now + _left_s(jobs) <= _deadline(jobs)]
        return min(can, key=_deadline, default=None)

    def __bool__(self) -> bool:
        return bool(self._circle)

    def cost_s(self) -> float:
        """Estimated device time of all that waits, seconds."""
        return sum((job.waiting_s for jobs in self._circle for job in jobs if not job.end.done), 0.0)

    def drain(self) -> list[Job]:
        drained = [job for jobs in self._circle for job in jobs]
        self._circle.clear()
        self._served = 0
        return drained


def _items_left(jobs: Sequence[Job]) -> int:
    return sum(job.count - job.taken for job in jobs)


def _left_s(jobs: Sequence[Job]) -> float:
    return sum(job.waiting_s for job in jobs)


def _deadline(jobs: Sequence[Job]) -> float:
    return min(job.deadline for job in jobs)


def too_late() -> RayscaleError:
    return UnavailableError("request", "deadline", "passed before the work was done", "try again later")
