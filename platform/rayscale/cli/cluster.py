"""Connecting to Ray: the cluster that RAY_ADDRESS or `ray job` names, else a local one."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from rayscale.errors import ConfigError, UnavailableError

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
