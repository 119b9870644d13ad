"""Seen from outside: logging, progress bars, and the names of all metrics in one table."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from rayscale.errors import ConfigError

log = logging.getLogger("rayscale")


class _Printable(logging.Filter):
    """Names of files may hold bytes that are no text, which nobody could write: as escapes they stay readable."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not (text := record.getMessage()).isascii():
            record.msg, record.args = text.encode(errors="backslashreplace").decode(), ()
        return True


log.addFilter(_Printable())


class Asked(NamedTuple):
    """Which request something is done for."""

    request_id: str = ""
    trace_id: str = ""  # W3C's, of its `traceparent`

    def fields(self) -> dict[str, str]:
        return {name: value for name, value in self._asdict().items() if value}


NOBODY = Asked()
ASKED = ContextVar("ASKED", default=NOBODY)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment, which whoever captures output changes."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class Text(logging.Formatter):
    """Time, level, text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def event(self, message: str, fields: Mapping[str, Any]) -> str:
        """One line of level INFO, past `logging`: for what happens some hundred times a second."""
        facts = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{time.strftime('%H:%M:%S')} INFO    {message} {facts}\n"


class Json(logging.Formatter):
    """An object a line: time (UTC), level, message, which request it was for, and an event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(ASKED.get().fields())
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return self._line(record.created, record.levelname, record.getMessage(), fields)

    def event(self, message: str, fields: Mapping[str, Any]) -> str:
        """As `Text.event`."""
        return self._line(time.time(), "INFO", message, fields) + "\n"

    def _line(self, created: float, level: str, message: str, fields: Mapping[str, Any]) -> str:
        when = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": when, "level": level, "message": message, **fields}, default=str)


_FORMATS: dict[str, type[Text] | type[Json]] = {"text": Text, "json": Json}


def log_format() -> Text | Json:
    """By `RAYSCALE_LOG_FORMAT`: text or json. Raises: ConfigError."""
    name = os.environ.get("RAYSCALE_LOG_FORMAT", "text")
    if name not in _FORMATS:
        raise ConfigError("RAYSCALE_LOG_FORMAT", name, "is no format of log lines", f"one of {', '.join(_FORMATS)}")
    return _FORMATS[name]()


def setup_logging() -> None:
    """Records go to standard error. `RAYSCALE_LOG` sets the level (INFO), `RAYSCALE_LOG_FORMAT` the form (text)."""
    if log.handlers:
        return
    handler = _Stderr()
    handler.setFormatter(log_format())
    log.addHandler(handler)
    log.setLevel(os.environ.get("RAYSCALE_LOG", "INFO").upper())
    log.propagate = False


class Metric(NamedTuple):
    """One exported metric. Names are snake case and end in their unit."""

    name: str
    kind: str  # counter, gauge, histogram
    labels: tuple[str, ...]
    help: str


METRICS = {
    m.name: m
    for m in (
        Metric("rayscale_train_seen_images", "gauge", ("run",), "Images that a run has been trained on"),
        Metric("rayscale_train_saved_images", "gauge", ("run",), "Those of its newest checkpoint"),
        Metric("rayscale_train_damaged_photos", "gauge", ("run",), "Photos that others stand in for"),
        Metric("rayscale_requests_total", "counter", ("route", "model", "status"), "Finished HTTP requests"),
        Metric("rayscale_request_seconds", "histogram", ("route", "model"), "Time from first byte to answer"),
        Metric("rayscale_queue_seconds", "histogram", ("model",), "Time a request's tiles waited for their device"),
        Metric("rayscale_tiles_total", "counter", ("model",), "Tiles and samples run by an engine"),
        Metric(
            "rayscale_batches_total", "counter", ("model", "provider", "items"), "Its runs, by how many were in one"
        ),
        Metric("rayscale_model_swaps_total", "counter", ("model", "result"), "Versions prepared, or refused"),
        Metric("rayscale_rollbacks_total", "counter", ("model", "of"), "Champions and canaries taken back by serving"),
    )
}


class Progress:
    """A bar on a terminal; elsewhere (a job's log) a line at most every `interval_s` seconds."""

    def __init__(self, title: str, total: int, unit: str, interval_s: float) -> None:
        self.title, self.total, self.unit, self.interval_s = title, total, unit, interval_s
        self.done, self.note = 0, ""
        self.started = self.shown = time.monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar
            from rich.progress import TextColumn, TimeRemainingColumn

            columns = [*Bar.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` so far; `note` (loss, rate) stands beside it."""
        self.done, self.note = done, note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self.shown >= self.interval_s:
            self._line()

    def _line(self) -> None:
        self.shown = time.monotonic()
        elapsed = self.shown - self.started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("nan")
        share = 100.0 * self.done / self.total if self.total else 100.0
        log.info(
            "%s: %d/%d %s (%.0f %%), %.1f/s, %.0f s left %s",
            self.title,
            self.done,
            self.total,
            self.unit,
            share,
            rate,
            left,
            self.note,
        )

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
        else:
            self._line()


@contextmanager
def progress(title: str, total: int, unit: str = "items", interval_s: float = 5.0) -> Iterator[Progress]:
    """Show the progress of a long piece of work."""
    shown = Progress(title, total, unit, interval_s)
    try:
        yield shown
    finally:
        shown.close()
