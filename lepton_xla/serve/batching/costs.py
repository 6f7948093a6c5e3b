"""Execution time by key and compiled size: measured at load, and updated while serving.

A batch gets the size with the least cost per real row, as in TensorFlow's padding policy
`MINIMIZE_TPU_COST_PER_REQUEST`. As in Clockwork (Gujarati et al., OSDI 2020), compiled code takes about the same time
on every run, so the table predicts which requests will miss their deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

type Key = tuple[int, ...]
"""Sizes of the dimensions other than the batch. Requests with equal keys may share an execution."""

type Measured = Mapping[Key, Mapping[int, float]]
"""Seconds of one execution, by key and compiled batch size."""

# Gain of the moving average; larger for the first samples.
_GAIN = 0.1
# Deviations are clipped at this multiple of the mean deviation (Huber). A single stall then moves the estimate by a
# third of the mean deviation; a lasting change widens that with every run and is followed within twenty.
_CLIP = 3.0
_FIRST_SPREAD = 0.25
_LEAST_SPREAD = 0.02
# Pseudo-counts: the weight of the warm-up measurement; samples before clipping starts; the cap.
_AT_LOAD = 2.0
_TRUSTED = 5.0
_MOST_KNOWN = 20.0
# At each run the pseudo-counts of the key's other sizes shrink by this share; below `_FORGOTTEN` they count as none.
_FORGET = 0.003
_FORGOTTEN = 0.5
# After this many runs of a size, a change of its estimate is taken for a change of the machine, which other sizes
# share; before, for a correction of the warm-up measurement.
_SETTLED = 10


class _Estimate:
    """A running estimate of one size.

    Attributes:
        size: rows of the batch.
        seconds: the estimate.
        spread: mean absolute deviation of the samples.
        known: pseudo-count of samples; old ones count less.
        runs: samples since load.
        rise: square root of how many times the next smaller size it is.
    """

    __slots__ = ("known", "rise", "runs", "seconds", "size", "spread")

    def __init__(self, size: int, seconds: float, smaller: int | None = None) -> None:
        self.size = size
        self.rise = math.sqrt(size / (smaller or size))
        self.seconds = seconds
        self.spread = _FIRST_SPREAD * seconds
        self.known = _AT_LOAD if seconds else 0.0
        self.runs = 0

    def learn(self, seconds: float) -> float:
        """Adds a sample; returns the factor by which the machine seems to have changed."""
        before = self.seconds
        change = seconds - before
        if self.known >= _TRUSTED:
            limit = _CLIP * self.spread
            change = min(max(change, -limit), limit)
        gain = max(_GAIN, 1 / (self.known + 1))
        self.seconds += gain * change
        self.spread = max(self.spread + gain * (abs(change) - self.spread), _LEAST_SPREAD * self.seconds)
        self.known = min(self.known + 1, _MOST_KNOWN)
        self.runs += 1
        return self.seconds / before if self.runs > _SETTLED else 1.0


class _Row:
    """The estimates of one key, ascending by size, and which of them is the cheapest per row when full.

    A size whose estimate knows nothing any more is not believed to cost more than the next larger one, nor more than
    the next smaller one times the square root of what it has more rows. So one that looked bad, at load or later, gets
    another chance when there are the rows for it.
    """

    __slots__ = ("_best", "_ranked", "by_size", "estimates")

    def __init__(self, estimates: Sequence[_Estimate]) -> None:
        self.estimates = estimates
        self.by_size = {estimate.size: estimate for estimate in estimates}
        self._best = estimates[-1]
        self._ranked = False

    def learn(self, size: int, seconds: float) -> None:
        """Adds a sample of a size; the fewer samples another one has, the more it follows. Runs with every batch."""
        ran = self.by_size[size]
        change = ran.learn(seconds) - 1
        self._ranked = False
        forgotten = False
        bound_s = math.inf  # of the size before
        for estimate in self.estimates:
            known = estimate.known
            if estimate is not ran:
                estimate.seconds *= 1 + change * (1 - known / _MOST_KNOWN)
                estimate.known = known = known - _FORGET * known
            if known < _FORGOTTEN:
                forgotten = True
                if estimate.seconds > bound_s * estimate.rise:
                    estimate.seconds = bound_s * estimate.rise
            bound_s = estimate.seconds
        if forgotten:
            for estimate in reversed(self.estimates):
                if estimate.known < _FORGOTTEN and estimate.seconds > bound_s:
                    estimate.seconds = bound_s
                bound_s = estimate.seconds

    @property
    def best(self) -> _Estimate:
        """The cheapest per row when full."""
        if not self._ranked:
            self._ranked = True
            best, least = self._best, self._best.seconds / self._best.size
            for estimate in reversed(self.estimates):
                if estimate.seconds < least * estimate.size:
                    best, least = estimate, estimate.seconds / estimate.size
            self._best = best
        return self._best


class Costs:
    """Seconds of executions, and the choices that follow from them.

    Args:
        bucket_sizes: compiled batch sizes, ascending.
        measured: seconds at load. An execution that is not in there counts as free until it has run.
    """

    def __init__(self, bucket_sizes: Sequence[int], measured: Measured | None = None) -> None:
        self._bucket_sizes = tuple(bucket_sizes)
        self._rows: dict[Key, _Row] = {}
        for key in measured or {}:
            self._row(key, measured)

    def _row(self, key: Key, measured: Measured | None = None) -> _Row:
        given = (measured or {}).get(key, {})
        sizes = self._bucket_sizes
        row = self._rows[key] = _Row([
            _Estimate(size, given.get(size, 0.0), smaller)
            for size, smaller in zip(sizes, (None, *sizes), strict=False)
        ])  # fmt: skip
        return row

    def __iter__(self) -> Iterator[tuple[Key, int, float]]:
        """Key, size and seconds of every compiled execution."""
        for key, row in self._rows.items():
            for estimate in row.estimates:
                yield key, estimate.size, estimate.seconds

    def of(self, key: Key, size: int) -> float:
        """Seconds of one execution."""
        return (self._rows.get(key) or self._row(key)).by_size[size].seconds

    def learn(self, key: Key, size: int, seconds: float) -> None:
        """Adds the time of an execution, copying of rows included."""
        (self._rows.get(key) or self._row(key)).learn(size, seconds)

    def size(self, key: Key, rows: int) -> int:
        """The compiled size with the least cost per real row while `rows` wait; of equal ones the larger."""
        row = self._rows.get(key) or self._row(key)
        best, least = 0, float("inf")
        for estimate in row.estimates:
            size = estimate.size
            cost = estimate.seconds / (size if size < rows else rows)
            if cost < least or (cost == least and best < rows):
                best, least = size, cost
        return best

    def seconds(self, key: Key, rows: int) -> float:
        """Seconds to run `rows` in batches of the sizes that `size` chooses."""
        row = self._rows.get(key) or self._row(key)
        total = 0.0
        largest = self._bucket_sizes[-1]
        if rows > largest:
            # While more rows wait than the largest size holds, every choice is the same.
            full = -(-(rows - largest) // row.best.size)
            total = full * row.best.seconds
            rows -= full * row.best.size
        while rows > 0:
            size = self.size(key, rows)
            total += row.by_size[size].seconds
            rows -= size
        return total
