"""Counters cheap enough for the hot path: plain numbers, updated on the event loop.

`prometheus_client`'s own counters take a lock and a label lookup for each event. `exposition` shows these figures to
Prometheus.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client import ProcessCollector

COSTS = "cost_s"
"""Among the figures of `Metrics.now`, what executions are predicted to take: shape -> batch size -> seconds."""

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = tuple(float(2**power) for power in range(13))
_SHARES = tuple(eighth / 8 for eighth in range(8))
_BYTES = tuple(float(4**power) for power in range(3, 14))
# Answers are counted in groups of this many, which is faster than one by one.
_NOTED = 1024

PROCESS = ProcessCollector(registry=None)
"""Metrics of this process from the Prometheus client."""

# A server in several processes shows the sum of these.
_PROCESS_SUMS = frozenset(
    f"process_{name}" for name in ("cpu_seconds_total", "resident_memory_bytes", "virtual_memory_bytes", "open_fds")
)


class Histogram:
    """A histogram: counts by upper bound, and the sum of all values."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Adds a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Adds many values."""
        found = np.bincount(np.searchsorted(self.bounds, np.array(values)), minlength=len(self.counts))
        self.counts = [before + more for before, more in zip(self.counts, found.tolist(), strict=True)]
        self.total += sum(values)

    @property
    def count(self) -> int:
        """Number of values added."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus buckets: upper bound -> number of values up to it."""
        running = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        return buckets


def added(one: Mapping[str, Any], other: Mapping[str, Any], *, worse: bool = False) -> dict[str, Any]:
    """The sum of what two processes have counted; of times of day the later, of predictions the worse.

    Args:
        one, other: name -> number, list of numbers, or a mapping like these.
        worse: whether everything is a prediction.
    """
    total = dict(one)
    for name, value in other.items():
        before = total.get(name)
        if before is None:
            total[name] = value
        elif isinstance(value, Mapping):
            total[name] = added(before, value, worse=worse or name == COSTS)
        elif isinstance(value, list):
            total[name] = [x + y for x, y in zip(before, value, strict=True)]
        else:
            total[name] = max(before, value) if worse or name == "last_s" else before + value
    return total


class Metrics:
    """The counters of a server.

    Args:
        model: its name on the wire.
        version: its version.

    Attributes:
        codes: HTTP answers by status.
        failures: inferences that got 500 because their batch failed, alone too.
        rejected: inferences refused for load: queue full, or a deadline that cannot be met behind others.
        expired: inferences whose deadline passed, or is shorter than running them takes.
        cancelled: inferences whose client went away first.
        rows: real rows executed.
        padding: padding rows executed.
        failed_batches: executions that failed; they count nowhere else.
        request_s: seconds from a whole request to its answer.
        queue_s: seconds from a whole request to the start of its (first) batch.
        compute_s: seconds of an execution, copying rows into staging arrays included.
        batch_rows: real rows of an execution.
        padding_share: padding rows of an execution, as a share of all its rows.
        request_bytes, response_bytes: body of an infer request, and its answer: body and header fields, without status
            line, `Date` and `Connection`.
        input_s, infer_s, output_s: seconds that inferences spent in copying rows in, in execution, and from there to
            their answers; a batch of eight requests counts eight times.
        last_s: when the last batch finished, seconds since the epoch.
        by_size: executions, their seconds of copying in and of computing, by compiled batch size.
        now: figures that go up and down, as last looked at.
        look: called before figures are shown, to bring `now` up to date.
        ready: whether the server takes requests.
        live: whether it is worth keeping; false where only a new process would help.
    """

    def __init__(self, model: str, version: str = "1") -> None:
        self.model = model
        self.version = version
        self.codes: Counter[int] = Counter()
        self.failures = self.rejected = self.expired = self.cancelled = 0
        self.rows = self.padding = self.failed_batches = 0
        self.ready = False
        self.live = True
        self.request_s = Histogram(_SECONDS)
        self.queue_s = Histogram(_SECONDS)
        self.compute_s = Histogram(_SECONDS)
        self.batch_rows = Histogram(_ROWS)
        self.padding_share = Histogram(_SHARES)
        self.request_bytes = Histogram(_BYTES)
        self.response_bytes = Histogram(_BYTES)
        self.input_s = self.infer_s = self.output_s = 0.0
        self.last_s = 0.0
        self.by_size: dict[int, tuple[int, float, float]] = {}
        # Values not counted yet, of `request_s`, `request_bytes`, `response_bytes` and `queue_s`.
        self._seconds: list[float] = []
        self._requests: list[int] = []
        self._responses: list[int] = []
        self._waits: list[float] = []
        self.now: dict[str, Any] = dict.fromkeys(
            ("queue_rows", "queue_requests", "in_flight", "connections", "buffered_bytes"), 0.0
        )
        self.look: Callable[[], object] | None = self._look_at_process

    @property
    def requests(self) -> int:
        """Inferences answered with a result."""
        return self.request_s.count + len(self._seconds)

    def _look_at_process(self) -> None:
        for family in PROCESS.collect():
            self.now |= {each.name: each.value for each in family.samples if each.name in _PROCESS_SUMS}

    def watch(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Sets a function that reads gauges just before they are shown."""

        def look() -> None:
            self._look_at_process()
            self.now |= read()

        self.look = look

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as plain data that another process may add to its own with `plus`.

        Of a process that is gone, all but "now" still counts.
        """
        self.bring_up_to_date()
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                plain[name] = [*value.counts, value.total]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                plain[name] = value
        return plain | {
            "codes": {str(code): count for code, count in self.codes.items()},
            "by_size": {str(size): list(each) for size, each in self.by_size.items()},
            "now": dict(self.now),
        }

    def plus(self, counts: Mapping[str, Any]) -> Metrics:
        """What was counted here and elsewhere, of a server in several processes.

        Args:
            counts: from `counts`, or the sum of several by `added`.
        """
        total = Metrics(self.model, self.version)
        total.ready, total.live, total.look = self.ready, self.live, None
        for name, value in added(self.counts(), counts).items():
            if name == "codes":
                total.codes = Counter({int(code): count for code, count in value.items()})
            elif name == "by_size":
                total.by_size = {int(size): tuple(each) for size, each in value.items()}
            elif isinstance(value, list):
                histogram: Histogram = getattr(total, name)
                *histogram.counts, histogram.total = value
            else:
                setattr(total, name, value)
        return total

    def answered(self, seconds: float, request_bytes: int, response_bytes: int) -> None:
        """Counts an inference that was answered with its result."""
        noted = self._seconds
        noted.append(seconds)
        self._requests.append(request_bytes)
        self._responses.append(response_bytes)
        if len(noted) >= _NOTED:
            self._count_noted()

    def waited(self, seconds: Sequence[float]) -> None:
        """Counts the seconds that inferences waited for their batch."""
        waits = self._waits
        waits += seconds
        if len(waits) >= _NOTED:
            self._count_noted()

    def _count_noted(self) -> None:
        if self._seconds:
            self.codes[200] += len(self._seconds)
        for histogram, values in (
            (self.request_s, self._seconds), (self.request_bytes, self._requests),
            (self.response_bytes, self._responses), (self.queue_s, self._waits),
        ):  # fmt: skip
            if values:
                histogram.observe_all(values)
                values.clear()

    def bring_up_to_date(self) -> None:
        """Counts values not counted yet, and reads the gauges."""
        self._count_noted()
        if self.look is not None:
            self.look()

    def batch(self, rows: int, size: int, staging_s: float, compute_s: float, requests: int = 1) -> None:
        """Counts one execution.

        Args:
            rows: real rows.
            size: rows with padding.
            staging_s: seconds of copying rows in.
            compute_s: seconds of all of it.
            requests: how many inferences had a part in it.
        """
        self.rows += rows
        self.padding += size - rows
        self.batch_rows.observe(rows)
        self.padding_share.observe((size - rows) / size)
        self.compute_s.observe(compute_s)
        self.input_s += staging_s * requests
        self.infer_s += (compute_s - staging_s) * requests
        self.last_s = time.time()
        count, staging, computing = self.by_size.get(size, (0, 0.0, 0.0))
        self.by_size[size] = (count + 1, staging + staging_s, computing + compute_s - staging_s)
