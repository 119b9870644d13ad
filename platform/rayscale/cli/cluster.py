"""Ray for commands: the cluster that RAY_ADDRESS or `ray job` names, else a local one; work spread over all of it."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from rayscale.data.parallel import Mapper, local
from rayscale.errors import ConfigError, UnavailableError
from rayscale.observe import log
from rayscale.storage import Store

T = TypeVar("T")
R = TypeVar("R")

TASKS_PER_CPU = 3  # in flight: enough that a slow one at the head leaves no CPU idle
TASK_RETRIES = 5  # of one whose worker was killed
KNOCK_TIMEOUT_S = 4.0
_HOST_PORT = re.compile(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d{1,5})")


def connect(**options: Any) -> None:
    """`ray.init`, once. Workers inherit settings such as AWS_ENDPOINT_URL from the nodes they run on.

    Raises: UnavailableError where the cluster that RAY_ADDRESS names does not answer; ConfigError where RAY_ADDRESS
    is no address, or the token is refused.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        _knock(address or "")
        ray.init(address=address, logging_level="WARNING", log_to_driver=True, **options)
    except (OSError, ValueError, AuthenticationError) as error:
        if not address:  # a cluster of our own: nothing that the user has said is wrong
            raise
        reason = " ".join(str(error).split())[:200]
        if "AuthenticationError" in f"{type(error)} {error.__cause__}":  # inside a RuntimeError, as text
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
            raise ConfigError("RAY_ADDRESS", address, "the cluster refuses this token", remedy) from None
        if isinstance(error, ValueError):
            raise ConfigError("RAY_ADDRESS", address, reason, "give HOST:PORT of the cluster's head") from None
        remedy = "start it with `ray start --head`, or unset it"
        raise UnavailableError("RAY_ADDRESS", address, reason, remedy) from None


def _knock(address: str) -> None:
    """Does anybody listen at HOST:PORT? Ray itself would ask a silent address for many minutes. Raises: OSError."""
    if match := _HOST_PORT.fullmatch(address):
        socket.create_connection((match[1], int(match[2])), timeout=KNOCK_TIMEOUT_S).close()


def over_cluster(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """A `Mapper` over all CPUs of the cluster: Ray tasks, results in order, a bounded number in flight.

    A task whose worker or node is killed is run again; one that raises ends it. Nodes that join are used.
    """
    task = ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(function_of_item)
    shared = ray.put(function)
    waiting: deque[Any] = deque()
    left = iter(items)
    try:
        while True:
            in_flight = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
            waiting.extend(task.remote(shared, item) for item in itertools.islice(left, in_flight - len(waiting)))
            if not waiting:
                return
            yield ray.get(waiting[0])
            waiting.popleft()
    except RayTaskError as error:  # what it raised there, without Ray's account of where that was
        raise error.cause from None
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise UnavailableError("ray", type(error).__name__, reason, "run it again: it goes on where it was") from None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=False)


def function_of_item(function: Callable[[T], R], item: T) -> R:
    """What a task runs."""
    return function(item)


def spread(*stores: Store, anyway: bool) -> Mapper:
    """`over_cluster`, connected; or this machine, for folders that other nodes of a cluster may not see.

    anyway: they do see them. Raises: as `connect`.
    """
    return local() if better_alone(*stores, anyway=anyway) else over_cluster


def better_alone(*stores: Store, anyway: bool) -> bool:
    """Whether the work stays on this machine, as folders of it that other nodes may not see have a part in it.

    anyway: they do see them. Connects. Raises: as `connect`.
    """
    connect()
    folders = [store.uri for store in stores if not store.remote]
    if folders and not anyway and sum(node["Alive"] for node in ray.nodes()) > 1:
        log.warning("%s is a folder of this machine, which works alone (--on ray if all nodes share it)", folders[0])
        return True
    return False


def sizes() -> tuple[float, float]:
    """CPUs and GPUs of the cluster."""
    found = ray.cluster_resources()
    return float(found.get("CPU", 0.0)), float(found.get("GPU", 0.0))
