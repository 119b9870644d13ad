"""A client whose requests fail from a chosen one on: before it reaches the server, or once, its answer lost, after.

`runpy.run_path` loads it where tests need it: test folders are no packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Killed(BaseException):
    """SIGKILL: nothing of ours runs any more."""


class Interrupted:
    """`client`, whose request number `k` (from 0) raises `error`; `late`: after it was carried out."""

    def __init__(self, client: Any, k: int, *, late: bool, error: BaseException) -> None:
        self.client, self.k, self.late, self.error = client, k, late, error
        self.sent: list[str] = []

    def __getattr__(self, name: str) -> Any:
        known = getattr(self.client, name)
        return self._counted(name, known) if callable(known) else known

    def _counted(self, name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.sent.append(name)
            if len(self.sent) - 1 < self.k:
                return request(*args, **kwargs)
            if len(self.sent) - 1 == self.k and self.late:
                request(*args, **kwargs)
            raise self.error

        return call
