"""A promise ends once, for all who wait, from whatever thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from rayscale.serve.promise import Promise


def test_what_comes_first_counts() -> None:
    for first in range(3):
        promise: Promise[int] = Promise()
        ends = [lambda p=promise: p.keep(1), lambda p=promise: p.fail(ValueError("no")), promise.cancel]
        for end in ends[first:] + ends[:first]:
            end()
        assert promise.done
        assert (promise.cancelled, promise.error is not None) == (first == 2, first == 1)
        if first == 0:
            assert promise.result() == 1
        else:
            with pytest.raises((ValueError, asyncio.CancelledError)):
                promise.result()


def test_each_callback_runs_once_before_or_after_the_end() -> None:
    promise, told = Promise[int](), list[str]()
    promise.then(lambda: told.append("before"))
    promise.keep(1)
    promise.cancel()
    promise.then(lambda: told.append("after"))
    assert told == ["before", "after"]


def test_of_many_threads_one_ends_it() -> None:
    for _ in range(200):
        promise, told = Promise[int](), list[int]()
        promise.then(lambda p=promise, t=told: t.append(p.result()))
        ready = threading.Barrier(4)

        def end(number: int, promise: Promise[int] = promise, ready: threading.Barrier = ready) -> None:
            ready.wait()
            promise.keep(number)

        threads = [threading.Thread(target=end, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == [promise.result()]


def test_who_waits_gets_the_result_the_error_or_is_cancelled() -> None:
    async def main() -> None:
        for wait_s in (0.0, 0.01):
            kept, failed, dropped = Promise[int](), Promise[int](), Promise[int]()
            ends = (lambda k=kept: k.keep(7), lambda f=failed: f.fail(ValueError("no")), dropped.cancel)
            for end in ends:
                threading.Timer(wait_s, end).start()
            if not wait_s:
                await asyncio.sleep(0.02)  # they have ended before anybody asks
            assert await kept.wait() == 7
            with pytest.raises(ValueError, match="no"):
                await failed.wait()
            with pytest.raises(asyncio.CancelledError):
                await dropped.wait()

    asyncio.run(main())


def test_to_cancel_who_waits_cancels_it() -> None:
    async def main() -> None:
        promise: Promise[int] = Promise()
        task = asyncio.create_task(promise.wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert promise.cancelled
        promise.keep(1)  # who made it comes too late, and nobody minds
        assert promise.cancelled

    asyncio.run(main())


def test_an_end_after_its_loop_is_closed_is_no_error() -> None:
    promise: Promise[int] = Promise()

    async def main() -> None:
        task = asyncio.create_task(promise.wait())
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    promise.keep(1)


def test_an_error_keeps_no_promise_alive() -> None:
    async def main() -> weakref.ref[Promise[int]]:
        class Mine(Promise[int]):
            __slots__ = ("__weakref__",)

        promise = Mine()
        promise.fail(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await promise.wait()
        left = weakref.ref(promise)
        del promise  # the error knows this frame too
        return left

    gc.disable()
    try:
        left = asyncio.run(main())
        assert left() is None
    finally:
        gc.enable()
