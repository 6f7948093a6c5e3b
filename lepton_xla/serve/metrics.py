"""What the server counts, cheaply enough for the hot path, shown in Prometheus' text format when scraped.

`prometheus_client`'s own counters take a lock and a label lookup for each event. Here events are plain integers on
the event loop, and a collector turns them into metric families at scrape time. Labels are the model's name and HTTP
status codes, so their number is bounded whatever clients send.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = tuple(float(2**power) for power in range(13))


class Histogram:
    """Counts of values by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Adds one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values were added."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus buckets: upper bound -> values at or under it."""
        running = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        return buckets


def added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The sum of what two processes have counted; of times of day the later."""
    total = dict(one)
    for name, value in other.items():
        before = total.get(name)
        if before is None:
            total[name] = value
        elif isinstance(value, Mapping):
            total[name] = added(before, value)
        elif isinstance(value, list):
            total[name] = [x + y for x, y in zip(before, value, strict=True)]
        else:
            total[name] = max(before, value) if name == "last_s" else before + value
    return total


class Metrics(Collector):
    """Counters of one server.

    Attributes:
        codes: HTTP answers by status.
        requests: inferences answered with a result.
        failures: inferences answered with an error after they were queued.
        rejected: inferences refused because the queue was full or the server was stopping.
        cancelled: inferences whose client went away first.
        rows: real rows executed.
        padding: padding rows executed.
        batches: executions.
        request_s, queue_s, compute_s: seconds from a whole request to its answer, to the start of its batch, and of an
            execution (staging included).
        input_s: seconds spent copying rows into staging arrays.
        batch_rows: real rows of an execution.
        last_s: when the last batch finished, seconds since the epoch.
        by_size: executions and their seconds by compiled batch size.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.codes: Counter[int] = Counter()
        self.failures = self.rejected = self.cancelled = 0
        self.rows = self.padding = 0
        self.waiting_rows = 0
        self.ready = False
        self.request_s = Histogram(_SECONDS)
        self.queue_s = Histogram(_SECONDS)
        self.compute_s = Histogram(_SECONDS)
        self.batch_rows = Histogram(_ROWS)
        self.input_s = 0.0
        self.last_s = 0.0
        self.by_size: dict[int, tuple[int, float]] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    @property
    def requests(self) -> int:
        """Inferences answered with a result."""
        return self.request_s.count

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as plain data that another process may add to its own with `plus`."""
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                plain[name] = [*value.counts, value.total]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                plain[name] = value
        return plain | {
            "codes": {str(code): count for code, count in self.codes.items()},
            "by_size": {str(size): list(each) for size, each in self.by_size.items()},
        }

    def plus(self, counts: Mapping[str, Any]) -> Metrics:
        """What was counted here and elsewhere, of a server in several processes.

        Args:
            counts: from `counts`, or the sum of several by `added`.
        """
        total = Metrics(self._model)
        total.ready = self.ready
        for name, value in added(self.counts(), counts).items():
            if name == "codes":
                total.codes = Counter({int(code): count for code, count in value.items()})
            elif name == "by_size":
                total.by_size = {int(size): (count, seconds) for size, (count, seconds) in value.items()}
            elif isinstance(value, list):
                histogram: Histogram = getattr(total, name)
                *histogram.counts, histogram.total = value
            else:
                setattr(total, name, value)
        return total

    def batch(self, rows: int, size: int, staging_s: float, compute_s: float) -> None:
        """Counts one execution."""
        self.rows += rows
        self.padding += size - rows
        self.batch_rows.observe(rows)
        self.compute_s.observe(compute_s)
        self.input_s += staging_s
        self.last_s = time.time()
        count, seconds = self.by_size.get(size, (0, 0.0))
        self.by_size[size] = (count + 1, seconds + compute_s)

    def collect(self) -> Iterable[Metric]:
        """The metric families; called by the registry."""
        codes = CounterMetricFamily("lepton_http_responses", "HTTP answers by status code.", labels=["code"])
        for code, count in sorted(self.codes.items()):
            codes.add_metric([str(code)], count)
        yield codes
        for name, text, value in (
            ("lepton_inference_requests", "Inferences answered with a result.", self.requests),
            ("lepton_inference_failures", "Inferences that failed in execution.", self.failures),
            ("lepton_inference_rejected", "Inferences refused: queue full or stopping.", self.rejected),
            ("lepton_inference_cancelled", "Inferences whose client went away first.", self.cancelled),
            ("lepton_rows", "Rows executed, padding not counted.", self.rows),
            ("lepton_padding_rows", "Padding rows executed.", self.padding),
            ("lepton_batches", "Executions.", self.batch_rows.count),
        ):
            counter = CounterMetricFamily(name, text, labels=["model"])
            counter.add_metric([self._model], value)
            yield counter
        for name, text, value in (
            ("lepton_queue_rows", "Rows waiting now.", self.waiting_rows),
            ("lepton_ready", "1 while the server takes requests.", float(self.ready)),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, histogram in (
            ("lepton_request_seconds", "From a whole request to its answer.", self.request_s),
            ("lepton_queue_seconds", "From a whole request to the start of its batch.", self.queue_s),
            ("lepton_compute_seconds", "One execution.", self.compute_s),
            ("lepton_batch_rows", "Real rows of one execution.", self.batch_rows),
        ):
            family = HistogramMetricFamily(name, text, labels=["model"])
            family.add_metric([self._model], histogram.cumulative(), histogram.total)
            yield family

    def render(self) -> bytes:
        """Prometheus' text exposition format."""
        return exposition.generate_latest(self.registry)
