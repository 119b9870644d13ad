"""A request's way through an engine in this process: what comes before its tiles, the tiles, what comes after.

To hand work from one thread to the next costs a tenth of a millisecond of CPU, a fair part of what a small picture
takes. So the event loop is asleep from the first to the last, and a thread goes on with what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from rayscale.serve.batching import U8, Job, Place, Timing, too_late
from rayscale.serve.promise import Promise
from rayscale.serve.threads import Threads

T = TypeVar("T")


class Tiled(Protocol):
    """What `engine.Canvas` is: a picture's tiles, and where their results go."""

    @property
    def tiles(self) -> Sequence[U8]: ...
    @property
    def place(self) -> Place: ...


Begin = Callable[[], Tiled | None]
"""In a thread of the pool: the tiles; None where what follows is no engine's work."""

Look = Callable[[], Threads]
"""In a thread of the pool, before `Begin`: where that and what follows belong. What is refused here is refused soon."""

Then = Callable[[Timing], T]
"""In a thread of the pool, once the tiles are there."""


class Course(Generic[T]):
    """One request's. `end` is what `then` made, None where `begin` gave no tiles; to cancel it cancels what runs."""

    def __init__(self, pool: Threads, then: Then[T]) -> None:
        self.end: Promise[T | None] = Promise()
        self._pool = pool
        self._then: Then[T] | None = then
        self._job: Job | None = None
        self.end.then(self._ended)

    def _ended(self) -> None:
        """What it needed goes: a request's pixels do not wait for the collector of cycles."""
        job, self._job, self._then = self._job, None, None
        if job is not None:
            job.end.cancel()

    def start(self, look: Look | None, begin: Begin, enter: Callable[[Tiled], None]) -> None:
        """`look` in the pool, `begin` where it says, then `enter`, which calls `follow`: there, or later elsewhere."""

        def first() -> None:
            if look is not None and (pool := look()) is not self._pool:
                self._pool = pool
                pool.start(partial(self._step, rest))
            else:
                rest()

        def rest() -> None:
            if (tiled := begin()) is None:
                self.end.keep(None)
            else:
                enter(tiled)

        self._pool.start(partial(self._step, first))

    def _step(self, work: Callable[[], None]) -> None:
        """Unless it has ended; what it raises ends it."""
        if not self.end.done:
            try:
                work()
            except Exception as error:
                self.end.fail(error)

    def follow(self, job: Job, run: Callable[[Job], bool]) -> None:
        """The tiles' end. `run` queues them and says whether they were run in this very thread."""
        self._job = job
        if self.end.done:  # cancelled before there was anything to cancel with it
            self._job = None
        elif run(job):
            self._ran(job, here=True)
        else:
            job.end.then(partial(self._ran, job))

    def late(self) -> None:
        """The deadline is the tiles': what comes after them may end later."""
        job = self._job
        (self.end if job is None else job.end).fail(too_late())

    def _ran(self, job: Job, *, here: bool = False) -> None:
        if job.end.cancelled:
            self.end.cancel()
        elif job.end.error is not None:
            self.end.fail(job.end.error)
        elif here:
            self._step(partial(self._last, job.end.result()))
        else:
            try:
                self._pool.start(partial(self._step, partial(self._last, job.end.result())))
            except RuntimeError as error:  # the pool takes nothing any more
                self.end.fail(error)

    def _last(self, timing: Timing) -> None:
        if (then := self._then) is not None:
            self.end.keep(then(timing))
