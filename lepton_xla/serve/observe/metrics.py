"""Counters cheap enough for the hot path: plain numbers, updated on the event loop.

`prometheus_client`'s own counters take a lock and a label lookup for each event. `exposition` shows these figures to
Prometheus.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.serve.monitor.monitor import Monitor

COSTS = "cost_s"
"""Among the figures of `Metrics.now`, what executions are predicted to take: shape -> batch size -> seconds."""

DEVICES = "devices"
"""Among the figures of `Metrics.now`, the processes in which the version runs on a device: its number -> processes."""

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = tuple(float(2**power) for power in range(13))
_SHARES = tuple(eighth / 8 for eighth in range(8))
_BYTES = tuple(float(4**power) for power in range(3, 14))
# Answers are counted in groups of this many, which is faster than one by one.
_NOTED = 1024
# Fewer values than this are counted one by one, which is faster than NumPy.
_FEW = 24


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
        if len(values) < _FEW:
            for value in values:
                self.counts[bisect_left(self.bounds, value)] += 1
            self.total += sum(values)
            return
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
    """The counters of one version of a model. They outlive the version's handle, so that no sum falls at a swap.

    Args:
        model: its name on the wire.
        version: its version.

    Attributes:
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
        generations: sequences that ended by themselves.
        generations_cancelled: sequences whose client went away first.
        prompt_tokens, generated_tokens: tokens that were read, and made.
        first_token_s: seconds from a whole request to its first token.
        next_token_s: seconds from a token to the next one.
        loads: times that the version was loaded.
        load_failures: times that it could not be loaded.
        last_s: when the last batch finished, seconds since the epoch.
        by_size: executions, their seconds of copying in and of computing, by compiled batch size.
        now: figures that go up and down, as last looked at; without those of a version that is not loaded.
        monitor: watches what it answers, if this process has the model.
        samples: what became of records of samples and of feedback for them, see `SampleWriter`.
        shadow: what came of the rows that it was asked as a shadow, see `Mirror`.
        sketch, feedback: what monitors have counted, in counters that come from `of_counts`; ask `feedback_counts`.
    """

    def __init__(self, model: str, version: str = "1") -> None:
        self.model = model
        self.version = version
        self.failures = self.rejected = self.expired = self.cancelled = 0
        self.rows = self.padding = self.failed_batches = 0
        self.loads = self.load_failures = 0
        self.generations = self.generations_cancelled = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.first_token_s = Histogram(_SECONDS)
        self.next_token_s = Histogram(_SECONDS)
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
        self.now: dict[str, Any] = {}
        self.monitor: Monitor | None = None
        self.samples = {"kept": 0, "left_out": 0, "lost": 0}
        self.shadow = {"same": 0, "different": 0, "failed": 0, "dropped": 0}
        self.sketch: dict[str, dict[str, list[int]]] = {}
        self.feedback: dict[str, Any] = {}

    @property
    def requests(self) -> int:
        """Inferences answered with a result."""
        return self.request_s.count + len(self._seconds)

    def feedback_counts(self) -> dict[str, Any]:
        """Rows with feedback, see `Feedback.counts`; empty if the version takes none."""
        if self.monitor is None:
            return self.feedback
        return {} if self.monitor.feedback is None else self.monitor.feedback.counts()

    def counts(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """What was counted so far, as plain data that another process may add to its own.

        Args:
            names: of what is wanted; None for all, which takes a tenth of a millisecond.
        """
        self.count_noted(names)
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if names is not None and name not in names:
                continue
            if isinstance(value, Histogram):
                plain[name] = [*value.counts, value.total]
            elif isinstance(value, int | float):
                plain[name] = value
        if self.monitor is not None:
            plain |= self.monitor.counts()
        else:
            plain |= {name: value for name in ("sketch", "feedback") if (value := getattr(self, name))}
        for name in ("samples", "shadow", "now"):
            if names is None or name in names:
                plain[name] = dict(getattr(self, name))
        if names is None or "by_size" in names:
            plain["by_size"] = {str(size): list(each) for size, each in self.by_size.items()}
        return plain

    @staticmethod
    def of_counts(model: str, version: str, counts: Mapping[str, Any]) -> Metrics:
        """The counters that `counts`, or the sum of several by `added`, describe."""
        metrics = Metrics(model, version)
        for name, value in counts.items():
            if name == "by_size":
                metrics.by_size = {int(size): tuple(each) for size, each in value.items()}
            elif isinstance(value, list):
                histogram: Histogram = getattr(metrics, name)
                *histogram.counts, histogram.total = value
            else:
                setattr(metrics, name, value)
        return metrics

    def answered(self, seconds: float, request_bytes: int, response_bytes: int) -> None:
        """Counts an inference that was answered with its result."""
        noted = self._seconds
        noted.append(seconds)
        self._requests.append(request_bytes)
        self._responses.append(response_bytes)
        if len(noted) >= _NOTED:
            self.count_noted()

    def waited(self, seconds: Sequence[float]) -> None:
        """Counts the seconds that inferences waited for their batch."""
        waits = self._waits
        waits += seconds
        if len(waits) >= _NOTED:
            self.count_noted()

    def count_noted(self, names: Collection[str] | None = None) -> None:
        """Counts what is noted and not counted yet, of the histograms of these names; None for all."""
        for name, histogram, values in (
            ("request_s", self.request_s, self._seconds), ("request_bytes", self.request_bytes, self._requests),
            ("response_bytes", self.response_bytes, self._responses), ("queue_s", self.queue_s, self._waits),
        ):  # fmt: skip
            if values and (names is None or name in names):
                histogram.observe_all(values)
                values.clear()

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
