"""What one thread will have made and others wait for: a future without the lock of its own that each look at it takes.

Of `concurrent.futures` a small picture's request took eighty calls of Python, a sixth of all that it makes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Promise(Generic[T]):
    """It ends once: with a result, with an error, or cancelled. Any thread may end it, or look at it."""

    __slots__ = ("_callbacks", "_lock", "_result", "cancelled", "done", "error")

    def __init__(self) -> None:
        self.done = self.cancelled = False
        self.error: BaseException | None = None
        self._result: T | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def keep(self, result: T) -> None:
        """Its result, where it has not ended yet."""
        self._end(result=result)

    def fail(self, error: BaseException) -> None:
        """The same, an error."""
        self._end(error=error)

    def cancel(self) -> None:
        """The same: nobody waits for it any more."""
        self._end(cancelled=True)

    def _end(self, result: T | None = None, error: BaseException | None = None, cancelled: bool = False) -> None:
        with self._lock:
            if self.done:
                return
            self._result, self.error, self.cancelled, self.done = result, error, cancelled, True
            callbacks, self._callbacks = self._callbacks, []  # what they hold goes with its end
        for callback in callbacks:
            callback()

    def then(self, callback: Callable[[], None]) -> None:
        """`callback`, which must not raise, in the thread that ends it; here and now where it has ended."""
        with self._lock:
            if not self.done:
                self._callbacks.append(callback)
                return
        callback()

    def result(self) -> T:
        """Of one that has ended. Raises: its error; CancelledError."""
        if self.cancelled:
            raise asyncio.CancelledError
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # the error knows this frame: no cycle
        return self._result  # type: ignore[return-value]

    async def wait(self) -> T:
        """From an event loop: its result. To cancel who waits cancels it. Raises: as `result`."""
        if not self.done:
            loop = asyncio.get_running_loop()
            ended = loop.create_future()

            def wake() -> None:
                if not ended.done():
                    ended.set_result(None)

            def tell() -> None:
                try:
                    loop.call_soon_threadsafe(wake)
                except RuntimeError:  # the loop is closed: nobody waits
                    return

            self.then(tell)
            try:
                await ended
            except asyncio.CancelledError:
                self.cancel()
                raise
        try:
            return self.result()
        finally:
            del self  # as in `result`
