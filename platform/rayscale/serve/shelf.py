"""Which models are in memory: all that were prepared, or, within a budget, those that were asked for last.

What a model takes is measured while it loads. One that had to go stays prepared (it was verified here, and its files
are) and is loaded again when it is asked for; its price and card stay known. A budget with room for one swap keeps
the version before beside a new one; what a smaller one costs is said aloud.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayscale.errors import UnavailableError
from rayscale.observe import log
from rayscale.serve.batching import Known, Model

RECENT_S = 60.0  # what is wanted again within this should not have had to leave


@dataclass(eq=False)
class _Place:
    """A prepared digest: where its files are, its model while it is in memory, and what that takes."""

    folder: Path
    known: Known
    bytes: int
    model: Model | None
    asked: float = -math.inf  # when, last


class Shelf:
    """Prepared models by digest. Every method may be called from any thread; loading happens one at a time."""

    def __init__(self, load: Callable[[Path, str], Model], budget_bytes: int = 0) -> None:
        """`load`: (folder, digest) -> a verified model, warm. `budget_bytes` 0: everything stays."""
        self._load, self._budget = load, budget_bytes
        self._places: dict[str, _Place] = {}  # the first was not asked for the longest
        self._lock = threading.Lock()  # of the places
        self._loading = threading.Lock()

    def prepare(self, digest: str, folder: Path) -> None:
        """Load, verify and warm a model: seconds, so never on an event loop. A second time does nothing."""
        with self._loading:
            if digest in self._places:
                return
            size = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
            self._make_room(size)  # what it takes is not known yet
            self._bring(digest, folder)

    def get(self, digest: str) -> Model | None:
        """The model, where it is in memory. Raises: UnavailableError when it is not prepared."""
        with self._lock:
            place = self._place(digest)
            self._places[digest] = self._places.pop(digest)
            place.asked = time.monotonic()
            return place.model

    def fetch(self, digest: str) -> Model:
        """The model, loaded where it had to go. Raises: UnavailableError."""
        with self._loading:
            if (model := self.get(digest)) is not None:
                return model
            place = self._place(digest)
            self._make_room(place.bytes)
            try:
                return self._bring(digest, place.folder)
            except Exception as error:
                log.error("model %s cannot be loaded again: %s", digest, error)
                raise UnavailableError("model", digest[:12], f"cannot be loaded again: {error}", "try again") from error

    def forget(self, digest: str) -> None:
        with self._lock:
            self._places.pop(digest, None)

    @property
    def digests(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._places)

    def known(self, digest: str) -> Known:
        """Raises: UnavailableError when it is not prepared."""
        place = self._places.get(digest)  # one look at a dict: no lock
        return place.known if place is not None else self._place(digest).known

    def _place(self, digest: str) -> _Place:
        place = self._places.get(digest)
        if place is None:
            raise UnavailableError("model", digest[:12], "is not loaded in this replica", "try again")
        return place

    def _bring(self, digest: str, folder: Path) -> Model:
        before = _resident_bytes()
        model = self._load(folder, digest)
        taken = max(_resident_bytes() - before, sum(f.stat().st_size for f in folder.glob("*.onnx")))
        with self._lock:
            asked = place.asked if (place := self._places.get(digest)) else -math.inf
            self._places[digest] = _Place(folder, model.known, taken, model, asked)
        if self._budget and taken > self._budget:
            log.warning("engines.memory_mb=%d: model %s alone takes %d MB, so it is in memory by itself; raise it",
                        self._budget >> 20, digest[:12], taken >> 20)  # fmt: skip
        self._make_room(0, keep=digest)
        return model

    def _make_room(self, size: int, keep: str = "") -> None:
        """Let go what was not asked for the longest. What runs or waits holds its model until it is done."""
        if not self._budget:
            return
        with self._lock:
            used = size + sum(place.bytes for place in self._places.values() if place.model)
            for digest, place in self._places.items():
                if used <= self._budget:
                    break
                if place.model is not None and digest != keep:
                    self._say_leaving(digest, place, used)
                    place.model = None
                    used -= place.bytes

    def _say_leaving(self, digest: str, place: _Place, used: int) -> None:
        since_s, budget_mb = time.monotonic() - place.asked, self._budget >> 20
        if since_s > RECENT_S:
            log.info("model %s leaves memory: %d of %d MB are taken", digest[:12], used >> 20, budget_mb)
        else:
            log.warning("engines.memory_mb=%d: %d MB are wanted at once, model %s leaves memory %.0f s after it was "
                        "asked for; raise it, or put models in a pool",
                        budget_mb, used >> 20, digest[:12], since_s)  # fmt: skip


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
