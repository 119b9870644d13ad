"""Who is let in, and when the others may come back."""

from __future__ import annotations

import threading

from rayscale.serve.batching import learnt

_ERROR = 1.1  # the backlog may take so much longer than estimated: who is let in should not wait in vain
_HORIZON = 10.0  # in timeouts: beyond it nobody is told when to come back


class Admission:
    """Those who are sent away come back one after the other, as fast as the work is done.

    Told all the same time, they would meet a backlog again.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._promised_until = 0.0
        self._lock = threading.Lock()  # codec threads ask as well as the event loop

    def promised_s(self, now: float) -> float:
        """Until the last of those who were sent away is to come back."""
        return self._promised_until - now

    def wait_s(
        self,
        cost_s: float,
        backlog_s: float,
        left_s: float,
        now: float,
        num_engines: int = 1,
        full_s: float | None = None,
    ) -> float | None:
        """None: let it in. Else when there is room for it, after those who were sent away before it.

        full_s: until one of the places is free, where their number is limited and none is.
        """
        with self._lock:
            if not backlog_s:
                self._promised_until = now  # who was to come by now did not
            if full_s is None and _ERROR * backlog_s + cost_s <= left_s:
                return None
            room_s = backlog_s - (self._timeout_s - cost_s) / _ERROR  # it comes back with all of its time
            wait_s = min(max(room_s, full_s or 0.0, self._promised_until - now), _HORIZON * self._timeout_s)
            self._promised_until = now + wait_s + cost_s / num_engines
            return wait_s


class CodecLoad:
    """Those who were let in and are with their codecs: what these still take, and what the engine will get of them.

    With a small net most of the work is decoding and encoding.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.codec_s: dict[CodecShare, float] = {}  # of each from here to its end
        self.engine_s: dict[CodecShare, tuple[object, float]] = {}  # of each until its tiles are its engines'
        self._seconds_per_px = 0.0  # measured while others decode and encode too, so a full machine shows

    def cost_s(self, pixels: int) -> float:
        """Of so many pixels read and written."""
        return pixels * self._seconds_per_px

    def backlog_s(self) -> float:
        """Estimated seconds until a codec thread is free."""
        return sum(self.codec_s.copy().values()) / self.threads  # a copy: codec threads add to it

    def coming_s(self, crew: object) -> float:
        """Estimated device time of what these engines do not know of yet."""
        return sum(seconds for whose, seconds in self.engine_s.copy().values() if whose is crew)

    def learn(self, pixels: int, seconds: float) -> None:
        """Correct the price by one request that has ended."""
        self._seconds_per_px = learnt(self._seconds_per_px, seconds / pixels)


class CodecShare:
    """One request's part of it. A thread that comes late to a request that has ended enters nothing."""

    def __init__(self, load: CodecLoad) -> None:
        self._load, self._ended = load, False

    def enter(self, pixels: int, crew: object, engine_s: float) -> None:
        self._load.codec_s[self], self._load.engine_s[self] = self._load.cost_s(pixels), (crew, engine_s)
        if self._ended:
            self.end()

    def decoded(self) -> None:
        """The engine has it now."""
        self._load.engine_s.pop(self, None)

    def end(self) -> None:
        self._ended = True
        self.decoded()
        self._load.codec_s.pop(self, None)
