"""The access log: a line for every request that has ended. No Ray here."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from starlette.types import Scope

from rayscale.observe import Asked, log, log_format
from rayscale.serve.lean import header

FLUSH_S = 0.25  # lines are written together: one by one they would cost as much as a small picture's HTTP
_QUIET = frozenset({"/livez", "/readyz"})  # asked every few seconds by who watches
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def asked(scope: Scope, request_id: str) -> Asked:
    """Which request this is, and by its `traceparent` of which trace it is part."""
    given = header(scope, b"traceparent")
    found = _TRACEPARENT.match(given) if given else None
    return Asked(request_id, found[1] if found else "")


class AccessLog:
    """Route, status, seconds, model and version, key, where the time went, and the ids to find the rest by."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write or (lambda lines: sys.stderr.write(lines))  # what it is at that moment
        self._event = log_format().event
        self._lines: list[str] = []

    def add(self, scope: Scope, route: str, status: int, seconds: float, about: Asked) -> None:
        if route in _QUIET or not log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {"status": status, "ms": round(1e3 * seconds, 1)}
        for name in ("release", "key", "timing"):
            if (value := scope.get(f"rayscale.{name}")) is not None:
                fields["model" if name == "release" else name] = str(value)
        fields |= about.fields()
        self._lines.append(self._event(f"{scope['method']} {route}", fields))
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._write("".join(lines))
