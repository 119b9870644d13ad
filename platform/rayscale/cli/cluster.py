"""Connecting to Ray: the cluster that RAY_ADDRESS or `ray job` names, else a local one."""

from __future__ import annotations

import os
from typing import Any

import ray

from rayscale.errors import UnavailableError


def connect(**options: Any) -> None:
    """`ray.init`, once. Workers inherit settings such as AWS_ENDPOINT_URL from the nodes they run on.

    Raises: UnavailableError where the cluster that RAY_ADDRESS names does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address, logging_level="WARNING", log_to_driver=True, **options)
    except ConnectionError as error:
        reason = " ".join(str(error).split())[:200]
        raise UnavailableError(
            "RAY_ADDRESS", address, reason, "start it with `ray start --head`, or unset it"
        ) from None
