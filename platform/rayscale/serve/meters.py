"""Where the serving metrics of `observe.METRICS` go: Ray's exporter, which Prometheus reads on every node."""

from __future__ import annotations

from typing import Any, Protocol

from rayscale.observe import METRICS

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)  # histogram boundaries


class Meters(Protocol):
    """Counters add the value, histograms take it. Names and labels are those of `observe.METRICS`."""

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None: ...


class RayMeters:
    """`Meters` of a Ray process."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._metrics: dict[str, Any] = {}
        for m in METRICS.values():
            if m.kind == "counter":
                self._metrics[m.name] = metrics.Counter(m.name, m.help, m.labels)
            elif m.kind == "histogram":
                self._metrics[m.name] = metrics.Histogram(m.name, m.help, SECONDS, m.labels)

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        metric = self._metrics[name]
        if METRICS[name].kind == "counter":
            metric.inc(value, labels)
        else:
            metric.observe(value, labels)
