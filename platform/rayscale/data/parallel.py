"""The same function over many items, at once: what packing is given to run on threads, processes or a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Protocol, TypeVar

import cv2

from rayscale.errors import ResourceError
from rayscale.memory import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 3  # items in flight for each worker: enough that a slow one at the head leaves nobody idle
THREADS_AT_MOST = 4  # beyond, they would wait for each other
TRIES = 3  # of an item whose worker is killed under it
PRELOAD = ["rayscale.data.pack"]  # imported once for all worker processes


class Mapper(Protocol):
    """`map` on many workers: results in the order of the items, few items in flight whatever their number.

    The function and the items are pickled where workers are processes, and an item whose worker was killed is simply
    run again: the function must bear that.
    """

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]: ...


def num_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local(workers: int | None = None) -> Mapper:
    """This machine: threads for a few workers or items, processes beyond that.

    Codecs and checksums let go of Python's lock: on two CPUs threads took 9 % less CPU time than processes. One thread
    more than CPUs works while another waits for a disk.
    """
    num = workers or num_cpus()

    def mapped(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        keep_freed_memory()
        few = num <= THREADS_AT_MOST or len(items) <= 2 * num
        return (threads(num + 1) if few else processes(num))(function, items)

    return mapped


def threads(num: int) -> Mapper:
    """`num` threads of this process."""

    def mapped(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        with ThreadPoolExecutor(num, "map") as pool:
            waiting: deque[Future[R]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > num * AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return mapped


def processes(num: int) -> Mapper:
    """`num` processes, which end with this one however it ends.

    Raises: ResourceError where workers were killed TRIES times over the same item.
    """

    def mapped(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        pool, left, deaths = _pool(num), iter(items), 0
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            while True:
                try:
                    while len(waiting) < num * AHEAD and (item := next(left, _END)) is not _END:
                        waiting.append((item, _submit(pool, function, item)))  # type: ignore[arg-type]
                    if not waiting:
                        return
                    result = waiting[0][1].result()
                except BrokenProcessPool:  # one killed worker takes the pool with it, and all that was in flight
                    deaths += 1
                    if deaths == TRIES:
                        rule = f"were killed {TRIES} times over the same photos"
                        remedy = "most often memory is short: lower --workers or --shard-mb"
                        raise ResourceError("workers", num, rule, remedy) from None
                    pool.shutdown(wait=False, cancel_futures=True)
                    pool = _pool(num)
                    waiting = deque((item, _submit(pool, function, item)) for item, _ in waiting)
                    continue
                waiting.popleft()
                deaths = 0
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return mapped


_END = object()


def _submit(pool: Executor, function: Callable[[T], R], item: T) -> Future[R]:
    """`submit`, with a pool that is broken already told by the future, as one that breaks later is."""
    try:
        return pool.submit(function, item)
    except BrokenProcessPool as error:
        future: Future[R] = Future()
        future.set_exception(error)
        return future


def _pool(num: int) -> ProcessPoolExecutor:
    # Never a plain fork: this process has threads, and libraries that do not survive one.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    return ProcessPoolExecutor(num, context, initializer=_begin_worker)


def _begin_worker() -> None:
    """A worker leaves Ctrl-C to its parent and ends with it: one that waits for work would never notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
