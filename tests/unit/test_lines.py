"""Lines between gateways and engines: whole, lent by calls, ended in time, closed to strangers."""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.errors import ConfigError, RayscaleError, UnavailableError
from rayscale.observe import ASKED, Asked
from rayscale.serve import lines
from rayscale.serve.lines import Lines, Offer
from rayscale.serve.remote import Chunk, LostError, Reply

T = TypeVar("T")


def chunk(index: int = 0, size: int = 100) -> Chunk:
    body = np.full((1, 1, size, 1), index % 251, np.uint8)
    return Chunk(request="r", index=index, digest="d", left_s=9.0, body=body)


@dataclass
class Engines:
    """Engines in this process, asked in turns, and what they saw."""

    names: tuple[str, ...] = ("e0", "e1")
    calls: int = 0
    lent: int = 0  # calls under way
    most_lent: int = 0
    under_way: list[int] = field(default_factory=list)  # indices of chunks
    dropped: list[int] = field(default_factory=list)
    answers: Callable[[str, Chunk], Awaitable[Any]] | None = None

    async def lend(self, offer: Offer) -> None:
        name = self.names[self.calls % len(self.names)]
        self.calls += 1
        self.lent += 1
        self.most_lent = max(self.most_lent, self.lent)
        try:
            await lines.lend(offer, name, lambda chunk: self.answer(name, chunk))
        finally:
            self.lent -= 1

    async def answer(self, name: str, chunk: Chunk) -> Reply:
        self.under_way.append(chunk.index)
        try:
            if self.answers is not None:
                await self.answers(name, chunk)
            assert isinstance(chunk.body, np.ndarray)
            return Reply(request=chunk.request, index=chunk.index, digest=chunk.digest, engine=name, provider="P",
                         backlog_s=0.0, body=chunk.body.repeat(2, 2))  # fmt: skip
        except asyncio.CancelledError:
            self.dropped.append(chunk.index)
            raise
        finally:
            self.under_way.remove(chunk.index)


def telling(error: RayscaleError) -> Engines:
    """Engines that answer every chunk with it."""
    engines = Engines()

    async def answer(name: str, chunk: Chunk) -> Reply:
        return Reply(request="r", index=0, digest="d", engine=name, provider="", backlog_s=0.0, body=error)

    engines.answer = answer  # type: ignore[method-assign]
    return engines


def on_lines(engines: Engines, work: Callable[[Lines], Awaitable[T]]) -> T:
    async def main() -> T:
        gateway = Lines(engines.lend)
        await gateway.start("127.0.0.1")
        try:
            return await work(gateway)
        finally:
            gateway.close()

    return asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.sampled_from((0, 1, 1000, 70_000, 3 << 20)), min_size=1, max_size=12), width=st.integers(1, 6))
def test_every_chunk_is_answered_whole(sizes: list[int], width: int) -> None:
    engines, gate = Engines(), asyncio.Semaphore(width)

    async def one(gateway: Lines, index: int) -> None:
        async with gate:
            reply = await gateway.carry(chunk(index, sizes[index]))
        assert reply.index == index
        assert isinstance(reply.body, np.ndarray)
        np.testing.assert_array_equal(reply.body, np.full((1, 1, 2 * sizes[index], 1), index, np.uint8))

    async def work(gateway: Lines) -> None:
        await asyncio.gather(*(one(gateway, index) for index in range(len(sizes))))

    on_lines(engines, work)
    assert engines.most_lent <= width


def test_one_call_carries_many_chunks_and_ends_when_idle() -> None:
    engines = Engines()

    async def work(gateway: Lines) -> None:
        for index in range(100):
            await gateway.carry(chunk(index))
        assert engines.lent <= 1
        await until(lambda: engines.lent == 0)

    on_lines(engines, work)
    assert engines.calls < 50  # on a slow machine a line's second may end in between


def test_a_line_ends_after_its_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "TERM_S", 0.0)
    engines = Engines()

    async def work(gateway: Lines) -> None:
        for index in range(10):
            await gateway.carry(chunk(index))

    on_lines(engines, work)
    assert engines.calls == 10


def test_a_chunk_goes_to_the_engine_that_does_least() -> None:
    released = asyncio.Event()

    async def hold(name: str, chunk: Chunk) -> None:
        if chunk.index < 100:
            await released.wait()

    engines = Engines(("e0", "e0", "e1"), answers=hold)

    async def work(gateway: Lines) -> None:
        await asyncio.gather(*(gateway.carry(chunk(index)) for index in (100, 101, 102)))  # three lines, now idle
        first = asyncio.create_task(gateway.carry(chunk(0)))
        await until(lambda: 0 in engines.under_way)
        second = asyncio.create_task(gateway.carry(chunk(1)))
        await until(lambda: 1 in engines.under_way)
        released.set()
        assert {(await first).engine, (await second).engine} == {"e0", "e1"}

    on_lines(engines, work)


def test_an_engine_that_dies_is_told_and_costs_its_own_chunk_only() -> None:
    async def work(gateway: Lines) -> None:
        dying = asyncio.create_task(gateway.carry(chunk(0)))
        await until(lambda: engines.under_way)
        (line,) = [line for line in gateway._offered.values() if line is not None]
        line.transport.abort()
        with pytest.raises(LostError) as caught:
            await dying
        assert caught.value.engine == "e0"
        engines.answers = None
        assert (await gateway.carry(chunk(1))).engine == "e1"

    async def forever(name: str, chunk: Chunk) -> None:
        await asyncio.Event().wait()

    engines = Engines(answers=forever)
    on_lines(engines, work)


def test_an_engine_that_vanishes_without_a_word_is_told_by_its_call() -> None:
    """The connection stays open; Ray tells the call of a node that is gone."""
    gone = asyncio.Event()

    async def lend(offer: Offer) -> None:
        _, writer = await asyncio.open_connection(offer.host, offer.port)
        message = offer.token + b"e0"
        writer.write(struct.pack("!II", len(message), 0) + message)
        await gone.wait()
        raise LostError("", "lent no line: its node is gone")

    async def main() -> None:
        gateway = Lines(lend)
        await gateway.start("127.0.0.1")
        asked = asyncio.create_task(gateway.carry(chunk()))
        await asyncio.sleep(0.05)
        assert not asked.done()
        gone.set()
        with pytest.raises(LostError) as caught:
            await asked
        assert caught.value.engine == "e0"
        gateway.close()

    asyncio.run(main())


def test_cancelling_reaches_the_engine_and_frees_its_line() -> None:
    async def forever(name: str, chunk: Chunk) -> None:
        if chunk.index == 0:
            await asyncio.Event().wait()

    engines = Engines(answers=forever)

    async def work(gateway: Lines) -> None:
        asked = asyncio.create_task(gateway.carry(chunk(0)))
        await until(lambda: engines.under_way)
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
        await until(lambda: engines.dropped == [0])
        await gateway.carry(chunk(1))

    on_lines(engines, work)


def test_who_waits_for_a_line_and_leaves_does_not_take_it_along() -> None:
    engines, allowed = Engines(), asyncio.Event()
    lend = engines.lend

    async def later(offer: Offer) -> None:
        await allowed.wait()
        await lend(offer)

    engines.lend = later  # type: ignore[method-assign]

    async def work(gateway: Lines) -> None:
        first, second = (asyncio.create_task(gateway.carry(chunk(index))) for index in (0, 1))
        await asyncio.sleep(0)
        first.cancel()
        allowed.set()
        assert (await second).index == 1

    on_lines(engines, work)


def test_a_call_that_lends_nothing_is_told() -> None:
    async def refuses(offer: Offer) -> None:
        raise LostError("", "lent no line: no engine runs")

    async def returns(offer: Offer) -> None:
        return

    for lend in (refuses, returns):
        engines = Engines()
        engines.lend = lend  # type: ignore[method-assign]
        with pytest.raises(LostError, match="an engine lent no line") as caught:
            on_lines(engines, lambda gateway: gateway.carry(chunk()))
        assert caught.value.engine == ""  # the chunk killed nobody


@dataclass
class Least(Engines):
    """Whoever has the fewest calls under way lends, as Ray Serve chooses; "sick" declines, the others take 5 ms."""

    under: Counter[str] = field(default_factory=Counter)
    declines: int = 0

    async def lend(self, offer: Offer) -> None:
        name = min(self.names, key=lambda name: self.under[name])
        self.under[name] += 1
        try:
            await lines.lend(offer, name, lambda chunk: self.answer(name, chunk))
        finally:
            self.under[name] -= 1

    async def answer(self, name: str, chunk: Chunk) -> Reply:
        if name == "sick":
            self.declines += 1
            body: Any = UnavailableError("model", chunk.digest, "is not loaded", "try again")
        else:
            await asyncio.sleep(0.005)
            body = chunk.body
        return Reply(request=chunk.request, index=chunk.index, digest=chunk.digest, engine=name, provider="P",
                     backlog_s=0.0, body=body)  # fmt: skip


@pytest.mark.parametrize("names", [("sick", "well"), ("well", "sick")])
def test_an_engine_that_declines_gets_no_more_for_a_while(names: tuple[str, ...]) -> None:
    """It would be the least busy of all: without a pause it declined 140 to 370 times here."""
    engines, began = Least(names), time.monotonic()

    async def client(gateway: Lines, count: int) -> None:
        for index in range(count):
            while (await gateway.carry(chunk(index))).declined:
                await asyncio.sleep(0)

    async def work(gateway: Lines) -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*(client(gateway, 50) for _ in range(12)))

    on_lines(engines, work)
    pauses = 12 + (time.monotonic() - began)  # all at once at first, then while they grow, then once a second
    assert 1 <= engines.declines <= 12 + pauses


def test_a_call_is_of_no_request() -> None:
    """Ray Serve ends the calls of a request that is cancelled, and with a line's call what others have on it."""
    engines, seen = Engines(), list[Asked]()
    lend = engines.lend

    async def noted(offer: Offer) -> None:
        seen.append(ASKED.get())
        await lend(offer)

    engines.lend = noted  # type: ignore[method-assign]

    async def work(gateway: Lines) -> None:
        ASKED.set(Asked("abc"))
        await gateway.carry(chunk())
        assert ASKED.get() == Asked("abc")  # the control: it is this request's own context

    on_lines(engines, work)
    assert seen == [Asked()]


def test_where_all_decline_they_are_asked_again() -> None:
    engines = telling(UnavailableError("model", "d", "is not loaded", "try again"))

    async def work(gateway: Lines) -> list[str]:
        return [(await gateway.carry(chunk(index))).engine for index in range(4)]

    assert sorted(on_lines(engines, work)) == ["e0", "e0", "e1", "e1"]


def test_who_declines_one_model_is_asked_for_others() -> None:
    engines = telling(UnavailableError("model", "d", "is not loaded", "try again"))
    engines.names = ("e0",)

    async def work(gateway: Lines) -> None:
        await gateway.carry(chunk())
        async with asyncio.timeout(10):
            await gateway.carry(replace(chunk(), digest="other"))
        assert engines.calls == 1  # on the same line

    on_lines(engines, work)


def test_a_fault_of_the_engine_is_an_error_of_ours() -> None:
    async def fails(name: str, chunk: Chunk) -> None:
        raise KeyError("a bug")

    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        on_lines(Engines(answers=fails), lambda gateway: gateway.carry(chunk()))


def test_an_error_of_the_picture_comes_as_it_is() -> None:
    engines = telling(ConfigError("image", "x", "is no picture", "send one"))
    reply = on_lines(engines, lambda gateway: gateway.carry(chunk()))
    assert str(reply.body) == "image=x: is no picture; send one"


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def test_a_stranger_gets_nothing_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())

    async def work(gateway: Lines) -> None:
        await gateway.carry(chunk())  # a line is open beside
        for message in (
            struct.pack("!II", len(bomb), 0) + bomb,
            struct.pack("!II", 20, 0) + bytes(20) + struct.pack("!II", len(bomb), 0) + bomb,
            struct.pack("!II", 0xFFFFFFFF, 0),  # 4 GiB to come
            struct.pack("!IIQ", len(bomb), 1, 1 << 62) + bomb,  # and an array that no memory holds
            struct.pack("!II", 0, 0xFFFFFFFF),
        ):
            reader, writer = await asyncio.open_connection(gateway._host, gateway._port)
            writer.write(message)
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        await gateway.carry(chunk())

    on_lines(Engines(), work)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(bomb)  # negative control: it works
    assert (tmp_path / "unpickled").exists()


def test_a_gateway_out_of_reach_is_told_with_its_remedy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UnavailableError, match=rf"gateway=127.0.0.1:{port}.*cannot connect.*on all ports"):
        asyncio.run(lines.lend(Offer("127.0.0.1", port, b"t" * 16), "e0", Engines().lend))  # type: ignore[arg-type]
