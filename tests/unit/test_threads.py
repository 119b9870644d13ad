"""The pool of threads: order, errors, cancelling, ends."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayscale.serve.threads import Threads


@given(count=st.integers(1, 4), tasks=st.lists(st.booleans(), max_size=30))
def test_every_task_ends_as_it_should(count: int, tasks: list[bool]) -> None:
    with Threads(count, "t") as pool:
        futures = [pool.submit(divmod, index, int(fine)) for index, fine in enumerate(tasks)]
        for index, (future, fine) in enumerate(zip(futures, tasks, strict=True)):
            if fine:
                assert future.result(10) == (index, 0)
            else:
                assert isinstance(future.exception(10), ZeroDivisionError)


def test_tasks_begin_in_their_order_and_no_more_at_once_than_there_are_threads() -> None:
    begun: list[int] = []
    gates = [threading.Event() for _ in range(6)]

    def work(index: int) -> None:
        begun.append(index)
        gates[index].wait(10)

    with Threads(2, "t") as pool:
        futures = [pool.submit(work, index) for index in range(6)]
        for index in (1, 0, 2, 3, 4, 5):
            gates[index].set()
            futures[index].result(10)
    assert sorted(begun[:2]) == [0, 1]
    assert begun[2:] == [2, 3, 4, 5]


def test_what_is_started_runs_in_turn_and_an_error_that_nobody_caught_is_told(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    with Threads(1, "t") as pool:
        pool.start(lambda: done.append(0))
        pool.start(lambda: done.append(1 // 0))
        pool.start(lambda: done.append(2))
        assert pool.submit(int).result(10) == 0
    assert done == [0, 2]
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.start(lambda: None)


def test_the_thread_that_was_busy_last_is_the_next() -> None:
    with Threads(3, "t") as pool:
        together = threading.Barrier(3)
        wait([pool.submit(together.wait, 10) for _ in range(3)])  # all three exist

        def rest() -> None:
            while len(pool._idle) < 3:  # a task's end is told before its thread is idle
                time.sleep(0)

        rest()
        last = pool.submit(threading.current_thread).result(10)
        for _ in range(20):
            rest()
            assert pool.submit(threading.current_thread).result(10) is last


def test_what_waits_can_be_cancelled_and_what_is_idle_ends() -> None:
    pool, gate = Threads(1, "t"), threading.Event()
    running, waiting, another = pool.submit(gate.wait, 10), pool.submit(int), pool.submit(int)
    assert waiting.cancel()
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        another.result(10)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)
    gate.set()
    assert running.result(10) is True
    pool.shutdown()
    assert not any(thread.is_alive() for thread in pool._threads)
    idle = Threads(2, "t")
    idle.submit(int).result(10)
    idle.shutdown()
    assert not any(thread.is_alive() for thread in idle._threads)


def test_shutdown_does_what_is_queued() -> None:
    pool, gate = Threads(1, "t"), threading.Event()
    futures = [pool.submit(gate.wait, 10), *(pool.submit(abs, -i) for i in range(5))]
    gate.set()
    pool.shutdown()
    assert [future.result(0) for future in futures] == [True, 0, 1, 2, 3, 4]


def test_an_idle_thread_keeps_nothing_of_its_last_task() -> None:
    class Large:
        pass

    with Threads(1, "t") as pool:
        large = Large()
        kept = weakref.ref(large)
        pool.submit(lambda it: it, large).result(10)
        del large
        pool.submit(int).result(10)
        gc.collect()
        assert kept() is None
