"""What an execution costs, by key and compiled size: measured at load, and followed while serving.

The rule for the size of a batch, least cost per real row, is that of TensorFlow's `MINIMIZE_TPU_COST_PER_REQUEST`
padding policy. That compiled code takes the same time each run, so that a table of times can tell which requests will
miss their deadline, is what Clockwork (Gujarati et al., OSDI 2020) builds on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

type Key = tuple[int, ...]
"""Sizes of the dimensions other than the batch; requests with equal keys share an execution."""

type Measured = Mapping[Key, Mapping[int, float]]
"""Seconds of one execution, by key and compiled batch size."""

# A running estimate goes this far towards each new time.
_GAIN = 0.1
# A time further off than so many times the usual distance counts as that far off (Huber's rule): one stall of a busy
# machine moves the estimate by a third of the usual distance, while a real change widens that distance at every run
# and is followed within twenty.
_CLIP = 3.0
_FIRST_SPREAD = 0.25
_LEAST_SPREAD = 0.02
# At each run the other sizes of its key go this far towards what they were at load, times what has become of this one:
# a size that looked bad once is tried again some hundred runs later.
_FORGET = 0.01


class _Estimate:
    __slots__ = ("at_load", "seconds", "size", "spread")

    def __init__(self, size: int, seconds: float) -> None:
        self.size = size
        self.at_load = seconds
        self.seconds = seconds
        self.spread = _FIRST_SPREAD * seconds

    def learn(self, seconds: float) -> None:
        if not self.at_load:
            self.__init__(self.size, seconds)
            return
        limit = _CLIP * self.spread
        change = min(max(seconds - self.seconds, -limit), limit)
        self.seconds += _GAIN * change
        self.spread = max(self.spread + _GAIN * (abs(change) - self.spread), _LEAST_SPREAD * self.seconds)


class _Row:
    """The estimates of one key, ascending by size, and which of them is the cheapest per row when full."""

    __slots__ = ("best", "by_size", "estimates")

    def __init__(self, estimates: Sequence[_Estimate]) -> None:
        self.estimates = estimates
        self.by_size = {estimate.size: estimate for estimate in estimates}
        self.best = estimates[-1]
        self.rank()

    def rank(self) -> None:
        best, least = self.best, self.best.seconds / self.best.size
        for estimate in reversed(self.estimates):
            if estimate.seconds < least * estimate.size:
                best, least = estimate, estimate.seconds / estimate.size
        self.best = best


class Costs:
    """Seconds of executions, and the choices that follow from them.

    Args:
        ladder: compiled batch sizes, ascending.
        measured: seconds at load. An execution that is not in there counts as free until it has run.
    """

    def __init__(self, ladder: Sequence[int], measured: Measured | None = None) -> None:
        self._ladder = tuple(ladder)
        self._rows: dict[Key, _Row] = {}
        for key in measured or {}:
            self._row(key, measured)

    def _row(self, key: Key, measured: Measured | None = None) -> _Row:
        given = (measured or {}).get(key, {})
        row = self._rows[key] = _Row([_Estimate(size, given.get(size, 0.0)) for size in self._ladder])
        return row

    def __iter__(self) -> Iterator[tuple[Key, int, float]]:
        """Key, size and seconds of every execution known."""
        for key, row in self._rows.items():
            for estimate in row.estimates:
                yield key, estimate.size, estimate.seconds

    def of(self, key: Key, size: int) -> float:
        """Seconds of one execution."""
        return (self._rows.get(key) or self._row(key)).by_size[size].seconds

    def learn(self, key: Key, size: int, seconds: float) -> None:
        """Takes in what an execution took, copying its rows included."""
        row = self._rows.get(key) or self._row(key)
        ran = row.by_size[size]
        ran.learn(seconds)
        if ran.at_load:
            share = ran.seconds / ran.at_load
            for estimate in row.estimates:
                if estimate is not ran:
                    estimate.seconds += _FORGET * (estimate.at_load * share - estimate.seconds)
        row.rank()

    def size(self, key: Key, rows: int) -> int:
        """The compiled size with the least cost per real row, where `rows` wait; of equal ones what finishes more."""
        row = self._rows.get(key) or self._row(key)
        best, least = 0, float("inf")
        for estimate in row.estimates:
            size = estimate.size
            cost = estimate.seconds / (size if size < rows else rows)
            if cost < least or (cost == least and best < rows):
                best, least = size, cost
        return best

    def seconds(self, key: Key, rows: int) -> float:
        """Seconds until `rows` have run, the size of each batch by `size` and nothing else joining."""
        row = self._rows.get(key) or self._row(key)
        total = 0.0
        largest = self._ladder[-1]
        if rows > largest:
            # While more wait than the largest size holds, the choice is the same each time.
            full = -(-(rows - largest) // row.best.size)
            total = full * row.best.seconds
            rows -= full * row.best.size
        while rows > 0:
            size = self.size(key, rows)
            total += row.by_size[size].seconds
            rows -= size
        return total
