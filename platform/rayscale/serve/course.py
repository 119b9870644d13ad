"""A request's way through an engine in this process: what comes before its tiles, the tiles, what comes after.

To hand work from one thread to the next costs a tenth of a millisecond of CPU, a fair part of what a small picture
takes. So the event loop is asleep from the first to the last, and a thread goes on with what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Generic, Protocol, TypeVar

from rayscale.serve.batching import U8, Job, Place, Timing, too_late
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

Then = Callable[[Timing], T]
"""In a thread of the pool, once the tiles are there."""


class Course(Generic[T]):
    """One request's. `end` is what `then` made, None where `begin` gave no tiles; to cancel it cancels what runs."""

    def __init__(self, pool: Threads, then: Then[T]) -> None:
        self.end: Future[T | None] = Future()
        self._pool = pool
        # A future keeps its callbacks for good: what they need goes with the end, or a request's pixels would wait for
        # the collector of cycles.
        self._then, self._jobs = [then], list[Job]()
        then_, jobs = self._then, self._jobs

        def ended(_: Future[T | None]) -> None:
            then_.clear()
            for job in tuple(jobs):
                job.future.cancel()
            jobs.clear()

        self.end.add_done_callback(ended)

    def start(self, begin: Begin, enter: Callable[[Tiled], None]) -> None:
        """`begin` in the pool, then `enter`, which calls `follow`: there, or later in another thread."""

        def first() -> None:
            if self.end.done():
                return
            try:
                if (tiled := begin()) is None:
                    self._set(None)
                else:
                    enter(tiled)
            except Exception as error:
                self.fail(error)

        self._pool.start(first)

    def follow(self, job: Job, run: Callable[[Job], bool]) -> None:
        """The tiles' end. `run` queues them and says whether they were run in this very thread."""
        self._jobs.append(job)
        if self.end.done():  # cancelled before there was anything to cancel with it
            self._jobs.clear()
        elif run(job):
            self._ran(job.future, here=True)
        else:
            job.future.add_done_callback(self._ran)

    def late(self) -> None:
        """The deadline is the tiles': what comes after them may end later."""
        for job in tuple(self._jobs):
            job.fail(too_late())
            return
        self.fail(too_late())

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # it was cancelled, or is late
            self.end.set_exception(error)

    def _ran(self, done: Future[Timing], *, here: bool = False) -> None:
        if done.cancelled():
            self.end.cancel()
        elif error := done.exception():
            self.fail(error)
        elif here:
            self._last(done.result())
        else:
            try:
                self._pool.start(partial(self._last, done.result()))
            except RuntimeError as error:  # the pool takes nothing any more
                self.fail(error)

    def _last(self, timing: Timing) -> None:
        for then in tuple(self._then):
            try:
                self._set(then(timing))
            except Exception as error:
                self.fail(error)

    def _set(self, result: T | None) -> None:
        with suppress(InvalidStateError):
            self.end.set_result(result)
