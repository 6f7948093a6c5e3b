"""How much to ask of a server, and what came of it: the figures of one run of the load generator."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lepton_xla.errors import ServeError

# Instead of an HTTP status, where there is no answer.
TIMED_OUT, NO_CONNECTION, BROKEN = -1, -2, -3
_NAMES = {TIMED_OUT: "timeout", NO_CONNECTION: "no connection", BROKEN: "connection broken"}
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """How much is asked for how long.

    Attributes:
        rate: requests that become due a second, at random moments (a Poisson process); None for the closed loop.
        connections: the most connections of the open loop, those of the closed one.
        seconds: how long to measure.
        warmup_s: how long the same load runs before.
        timeout_s: after this long without an answer, counted from when it was due, a request is given up.

    Raises:
        ServeError: for a value out of range.
    """

    rate: float | None
    connections: int
    seconds: float
    warmup_s: float
    timeout_s: float

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate <= 1e6:
            raise ServeError(f"the rate must be above 0 and at most a million a second, not {self.rate!r}")
        if self.connections < 1:
            raise ServeError(f"there must be at least one connection, not {self.connections!r}")
        for name, least in (("seconds", 1e-3), ("warmup_s", 0), ("timeout_s", 1e-3)):
            if not least <= getattr(self, name) <= 1e6:
                raise ServeError(f"{name} must be from {least:g} to a million, not {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a load. Arrays have one entry for each request that became due while it was measured.

    Attributes:
        load: what was asked.
        seconds: how long was measured; less than asked for if it was stopped.
        due_s: when each request became due, in seconds after measuring began, in the order of the answers.
        latency_s: from then to the end of its answer, or until it was given up.
        status: HTTP status, or one of the negative ones of this module.
        lag_s: how late the generator itself was with each request: its own part of the latency.
        answered: answers that came while it was measured.
        good: those with status 200.
        most_connections: connections open at once.
        cores: processor time of the generator a second.
    """

    load: Load
    seconds: float
    due_s: np.ndarray
    latency_s: np.ndarray
    status: np.ndarray
    lag_s: np.ndarray
    answered: int
    good: int
    most_connections: int
    cores: float

    @property
    def counts(self) -> dict[str, int]:
        """Requests by what came of them: a status, `timeout`, `no connection` or `connection broken`."""
        values, counts = np.unique(self.status, return_counts=True)
        return {_NAMES.get(int(v), str(v)): int(count) for v, count in zip(values, counts, strict=True)}

    @property
    def errors(self) -> int:
        """Requests without a good answer."""
        return int((self.status != 200).sum())

    @property
    def counted(self) -> np.ndarray:
        """Which latencies count: of good answers, and of requests given up, else losing them would look fast."""
        return (self.status == 200) | (self.status == TIMED_OUT)

    def percentiles(self, values: np.ndarray | None = None) -> dict[str, float]:
        """Seconds by percentile, of the latencies that count or of other times; NaN where there are none."""
        return percentiles(self.latency_s[self.counted] if values is None else values)

    def to_json(self) -> dict[str, Any]:
        """Its figures, without the single requests."""
        return {
            "rate": self.load.rate,
            "connections": self.load.connections if self.load.rate is None else None,
            "seconds": self.seconds,
            "requests": len(self.status),
            "answered_per_s": self.answered / self.seconds,
            "goodput_per_s": self.good / self.seconds,
            "latency_s": self.percentiles(),
            "counts": self.counts,
            "errors": self.errors,
            "send_lag_s": self.percentiles(self.lag_s),
            "most_connections": self.most_connections,
            "generator_cores": self.cores,
        }


def percentiles(values: np.ndarray) -> dict[str, float]:
    """Values by percentile, each one that was measured; NaN where there are none.

    >>> percentiles(np.arange(1.0, 201.0))
    {'p50': 100.0, 'p90': 180.0, 'p99': 198.0, 'p99.9': 200.0, 'max': 200.0}
    """
    names = [f"p{percent:g}" for percent in PERCENTILES]
    if not len(values):
        return dict.fromkeys((*names, "max"), float("nan"))
    # The nearest rank above, in whole numbers.
    ordered = np.sort(values)
    ranks = [-(-len(ordered) * round(percent * 10) // 1000) for percent in PERCENTILES]
    return dict(zip(names, (float(ordered[rank - 1]) for rank in ranks), strict=True)) | {"max": float(ordered[-1])}
