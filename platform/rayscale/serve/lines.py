"""Lines to engines elsewhere: connections on which chunks go, each lent by one engine for a second at a time.

A call of Ray Serve's handle costs 2 to 4 ms of CPU, so it carries no chunk: it lends a line. Serve chooses the engine,
as for any call, and the engine connects to the gateway that asked. The call lasts as long as the line, and a line has
one chunk at a time, so what Serve counts for scaling and draining are chunks under way. Neither end knows Ray:
`app.py` gives the call.
"""

from __future__ import annotations

import asyncio
import pickle
import secrets
import struct
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rayscale.errors import UnavailableError
from rayscale.observe import log
from rayscale.serve.remote import Chunk, LostError, Reply

TERM_S = 1.0  # a line takes no chunk after this: draining engines wait no longer, new ones get their share
IDLE_S = 0.25  # a line that nobody used for so long ends
CONNECT_S = 5.0
DECLINED_S = (
    0.05,
    1.0,
)  # an engine that declined a chunk is asked for its model no more for so long, at first and at most
_TOKEN_BYTES = 16
_GREETING_BYTES = 1024  # at most, of who has not said its token: no memory for a stranger
_HEAD = struct.Struct("!II")  # bytes of a message, and how many arrays follow it


@dataclass(frozen=True)
class Offer:
    """Where a gateway takes lines, and the secret that opens one."""

    host: str
    port: int
    token: bytes


Answer = Callable[[Chunk], Awaitable[Reply]]
Lend = Callable[[Offer], Awaitable[None]]
"""Have some engine run `lend(offer, ...)`, until that ends. Raises: LostError."""


class _Frames(asyncio.BufferedProtocol):
    """Messages and, after each, its arrays: received in place, so that the kernel alone copies them.

    On the wire: `_HEAD`, the arrays' sizes as u64, the message, the arrays.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._reading = self._read()
        self._expect(next(self._reading))

    def _read(self) -> Generator[int, memoryview, None]:
        """Asks for so many bytes, gets them."""
        while True:
            length, count = _HEAD.unpack((yield _HEAD.size))
            if not self.takes(length, count):
                length = count = 0
            sizes = struct.unpack(f"!{count}Q", (yield 8 * count))
            message = yield length
            arrays = []
            for size in sizes:
                arrays.append((yield size))
            self.received(message, arrays)
            del message, arrays  # while it waits for the next

    def _expect(self, size: int) -> None:
        while size == 0:  # there is nothing to wait for
            size = self._reading.send(memoryview(b""))
        self._buffer, self._filled = np.empty(size, np.uint8).data, 0  # not filled with zeros first

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == len(self._buffer):
            self._expect(self._reading.send(self._buffer))

    def send(self, message: bytes, arrays: Sequence[memoryview] = ()) -> None:
        sizes = struct.pack(f"!{len(arrays)}Q", *(array.nbytes for array in arrays))
        self.transport.writelines((_HEAD.pack(len(message), len(arrays)) + sizes + message, *arrays))

    def send_pickled(self, value: object) -> None:
        arrays: list[pickle.PickleBuffer] = []
        message = pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
        self.send(message, [array.raw() for array in arrays])

    def takes(self, length: int, count: int) -> bool:
        """Whether a message of so many bytes and arrays is read; one that is not comes as an empty one."""
        return True

    def received(self, message: memoryview, arrays: Sequence[memoryview]) -> None:
        raise NotImplementedError


class _Line(_Frames):
    """A gateway's end."""

    engine = ""  # who lent it; "" until that is known

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines
        self._reply: asyncio.Future[Reply] | None = None
        self.opened = self.used = time.monotonic()

    def takes(self, length: int, count: int) -> bool:
        return bool(self.engine) or (length <= _GREETING_BYTES and not count)

    def received(self, message: memoryview, arrays: Sequence[memoryview]) -> None:
        if not self.engine:  # nothing is unpickled for a stranger
            said = message.tobytes()
            self._lines.opened(self, said[:_TOKEN_BYTES], said[_TOKEN_BYTES:].decode(errors="replace"))
        elif self._reply is not None and not self._reply.done():
            reply = pickle.loads(message, buffers=arrays)
            if isinstance(reply, Reply):
                self._reply.set_result(reply)
            else:
                self._reply.set_exception(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(LostError(self.engine))
        self._lines.ended(self)

    @property
    def open(self) -> bool:
        return not self.transport.is_closing()

    async def ask(self, chunk: Chunk) -> Reply:
        """Cancelling it ends the line, and so what the engine does for it."""
        if not self.open:
            raise LostError("", "ended its line")
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self.send_pickled(chunk)
            return await self._reply
        except asyncio.CancelledError:
            self.transport.abort()
            raise
        finally:
            self._reply, self.used = None, time.monotonic()


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A chunk's wish for a line."""

    digest: str
    line: asyncio.Future[_Line]


class Lines:
    """A gateway's lines. Of one event loop; `start` before the first chunk."""

    def __init__(self, lend: Lend) -> None:
        self._lend = lend
        self._server: asyncio.Server | None = None
        self._idle: list[_Line] = []
        self._busy: Counter[str] = Counter()  # engine -> chunks under way
        self._waiting: deque[_Waiting] = deque()
        self._declined: dict[tuple[str, str], tuple[float, float]] = {}  # (engine, digest) -> until when, and how long
        self._offered: dict[bytes, _Line | None] = {}  # token -> its line, from the offer to the call's end
        self._calls: set[asyncio.Task[None]] = set()
        self._sweeping = False

    async def start(self, host: str) -> None:
        """Listen on an address of this machine that engines can reach. Raises: OSError."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Line(self), host, 0)
        self._host, self._port = self._server.sockets[0].getsockname()[:2]

    async def carry(self, chunk: Chunk) -> Reply:
        """Raises: LostError; RuntimeError for what is nobody's fault but the engine's."""
        line = await self._take(chunk.digest)
        self._busy[line.engine] += 1
        reply = None
        try:
            reply = await line.ask(chunk)
            return reply
        finally:
            self._busy[line.engine] -= 1
            self._busy += Counter()  # without those that have none
            if reply is None or line.used - line.opened > TERM_S:
                line.transport.close()
            self._hear(line, chunk.digest, reply)
            self._free(line)

    def _hear(self, line: _Line, digest: str, reply: Reply | None) -> None:
        """Who declines gets no more of that model for a while.

        Its line stays meanwhile: Serve counts it as a call under way. Without any, the engine that declines at once
        would look the least busy of all, and get every next call.
        """
        key = line.engine, digest
        if reply is None or not reply.declined:
            self._declined.pop(key, None)
            return
        first_s, most_s = DECLINED_S
        delay_s = min(most_s, 2 * self._declined.get(key, (0.0, first_s / 2))[1])
        self._declined[key] = line.used + delay_s, delay_s

    def _may(self, line: _Line, digest: str) -> bool:
        until, _ = self._declined.get((line.engine, digest), (0.0, 0.0))
        return time.monotonic() >= until

    async def _take(self, digest: str) -> _Line:
        """A line of the engine that does least for us, or the next that is free or lent."""
        self._idle = [line for line in self._idle if line.open]
        if fitting := [line for line in self._idle if self._may(line, digest)]:
            line = min(reversed(fitting), key=lambda line: self._busy[line.engine])
            self._idle.remove(line)
            return line
        waiting = _Waiting(digest, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._ask_for_lines()
        future = waiting.line
        try:
            return await future
        except asyncio.CancelledError:
            with suppress(ValueError):
                self._waiting.remove(waiting)
            if future.done() and not future.cancelled() and future.exception() is None:
                self._free(future.result())
            raise

    def _ask_for_lines(self) -> None:
        """As many calls as wait for one."""
        missing = len(self._waiting) - sum(line is None for line in self._offered.values())
        for _ in range(missing):
            offer = Offer(self._host, self._port, secrets.token_bytes(_TOKEN_BYTES))
            self._offered[offer.token] = None
            # In no request's context: with that request Ray Serve would end the call, and what others have on its line.
            call = asyncio.get_running_loop().create_task(self._borrow(offer), context=Context())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _borrow(self, offer: Offer) -> None:
        """One call, as long as its line lasts; whoever waits is told of one that brought none."""
        error: Exception = LostError("", "lent no line")
        try:
            await self._lend(offer)
        except Exception as caught:
            error = caught
        line = self._offered.pop(offer.token)
        if line is not None:
            line.transport.abort()  # also of an engine that died without a word
            return
        waiting = next((waiting for waiting in self._waiting if not waiting.line.done()), None)
        if waiting is not None:
            self._waiting.remove(waiting)
            waiting.line.set_exception(error)
        else:
            log.warning("an engine lent no line: %s", error)

    def opened(self, line: _Line, token: bytes, engine: str) -> None:
        if token not in self._offered or self._offered[token] is not None:
            log.warning("a connection without a valid token was closed")
            line.transport.abort()
            return
        self._offered[token], line.engine = line, engine
        self._free(line)

    def ended(self, line: _Line) -> None:
        if line in self._idle:
            self._idle.remove(line)

    def _free(self, line: _Line) -> None:
        """To whom has waited longest and may have it."""
        if not line.open:
            return
        for waiting in self._waiting:
            if not waiting.line.done() and self._may(line, waiting.digest):
                self._waiting.remove(waiting)
                waiting.line.set_result(line)
                return
        self._idle.append(line)
        if not self._sweeping:
            self._sweep()

    def _sweep(self) -> None:
        """End what is idle for long, as long as there is any, and ask for others where nobody may have these."""
        now, idle = time.monotonic(), self._idle
        self._idle, self._sweeping = [], True
        for line in idle:
            if now - line.used > IDLE_S or now - line.opened > TERM_S:
                line.transport.close()
            else:
                self._free(line)
        self._ask_for_lines()
        self._declined = {key: (until, s) for key, (until, s) in self._declined.items() if now - until < DECLINED_S[1]}
        self._sweeping = bool(self._idle or self._waiting)
        if self._sweeping:
            asyncio.get_running_loop().call_later(IDLE_S / 2, self._sweep)

    def close(self) -> None:
        for call in self._calls:
            call.cancel()
        for line in [*self._offered.values(), *self._idle]:
            if line is not None:
                line.transport.abort()
        if self._server is not None:
            self._server.close()


class _Lent(_Frames):
    """An engine's end."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer
        self._task: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def received(self, message: memoryview, arrays: Sequence[memoryview]) -> None:
        self._task = asyncio.ensure_future(self._reply(pickle.loads(message, buffers=arrays)))

    async def _reply(self, chunk: Chunk) -> None:
        result: Any
        try:
            result = await self._answer(chunk)
        except Exception as error:
            log.exception("a chunk failed")
            result = RuntimeError(f"{type(error).__name__}: {error}")  # any error: not all can be pickled
        self.send_pickled(result)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        if not self.ended.done():
            self.ended.set_result(None)


async def lend(offer: Offer, name: str, answer: Answer) -> None:
    """Connect to the gateway that asked, and answer its chunks until it ends the line.

    Raises: UnavailableError where the gateway cannot be reached.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            transport, line = await loop.create_connection(lambda: _Lent(answer), offer.host, offer.port)
    except (OSError, TimeoutError) as error:
        rule = f"an engine cannot connect to it ({error or 'timed out'})"
        remedy = "let the cluster's nodes connect to each other on all ports"
        raise UnavailableError("gateway", f"{offer.host}:{offer.port}", rule, remedy) from None
    try:
        line.send(offer.token + name.encode())
        await line.ended
    finally:
        transport.abort()
