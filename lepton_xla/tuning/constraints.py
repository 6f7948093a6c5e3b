"""What a recipe must keep to, and what it should be best at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from lepton_xla.errors import TuningError

type Objective = Literal["latency", "bytes", "memory", "operations", "metric"]
"""What is to be least: the time of a call (its share of float's, geometric mean over buckets), bytes on disk, bytes in
memory, multiply-adds, or the drop of the metric."""

# What texts call each of them.
OBJECTIVES: dict[Objective, str] = {
    "latency": "time", "bytes": "bytes on disk", "memory": "bytes in memory", "operations": "operations",
    "metric": "drop",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What a recipe must keep to; None allows anything.

    Attributes:
        max_drop: by how much the metric may fall, in hundredths of it: 0.5 is half a point of accuracy.
        max_bytes: bytes of the weights on disk, as an artifact stores them.
        max_memory: bytes of the weights in memory.
        max_latency_ms: milliseconds of a call, at every bucket; or several, one for each size at which calls are timed,
            in order.
        max_operations: multiply-adds by weights that are not zero, of a call at the smallest size.
        min_speedup: how many times as fast as the float program calls must be, the geometric mean over the sizes.

    Raises:
        TuningError: if a value is not a number that can be kept to.

    >>> lx.tuning.Constraints(max_drop=0.5, max_bytes=2_000_000)
    Constraints(max_drop=0.5, max_bytes=2000000, max_memory=None, max_latency_ms=None, max_operations=None, ...
    """

    max_drop: float | None = None
    max_bytes: int | None = None
    max_memory: int | None = None
    max_latency_ms: float | tuple[float, ...] | None = None
    max_operations: int | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not (self.max_drop >= 0 and math.isfinite(self.max_drop)):
            raise TuningError(
                f"max_drop = {self.max_drop}: expected a number above or equal to 0, in hundredths of the metric"
            )
        if isinstance(self.max_latency_ms, Sequence):
            object.__setattr__(self, "max_latency_ms", tuple(self.max_latency_ms))
        for name, given in vars(self).items():
            if name == "max_drop" or given is None:
                continue
            for value in given if isinstance(given, tuple) else (given,):
                if value is None or not (value > 0 and math.isfinite(value)):
                    raise TuningError(f"{name} = {value}: expected a number above 0")

    def given(self) -> dict[str, str]:
        """The limits that are given, as text.

        >>> Constraints(max_drop=0.5, max_latency_ms=(0.5, 3.0)).given()
        {'max_drop': '0.5', 'max_latency_ms': '0.5, 3'}
        """
        values = {name: value for name, value in vars(self).items() if value is not None}
        return {
            name: ", ".join(f"{each:.12g}" for each in (value if isinstance(value, tuple) else (value,)))
            for name, value in values.items()
        }

    def latencies_us(self, sizes: int) -> tuple[float, ...]:
        """The limits on the microseconds of a call at each of so many sizes; infinite where there is none.

        Raises:
            TuningError: if there are several, but not one for each size.

        >>> Constraints(max_latency_ms=2.0).latencies_us(2), Constraints().latencies_us(1)
        ((2000.0, 2000.0), (inf,))
        >>> Constraints(max_latency_ms=(0.5, 3.0)).latencies_us(3)
        Traceback (most recent call last):
        lepton_xla.errors.TuningError: max_latency_ms has 2 limits, but calls are timed at 3 sizes; give ...
        """
        given = self.max_latency_ms
        if not isinstance(given, tuple):
            return (math.inf if given is None else 1000.0 * given,) * sizes
        if len(given) != sizes:
            raise TuningError(
                f"max_latency_ms has {len(given)} limits, but calls are timed at {sizes} sizes; give one for all, or "
                "one for each, in order"
            )
        return tuple(1000.0 * each for each in given)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to look for a recipe.

    Attributes:
        minutes: for scoring, building, measuring and training together. The first candidate is measured however long
            that takes; nothing else is begun that would not end in them, by the last step of its kind. What there was
            no time for is told.
        trials: no more candidates than these are measured; None: as many as there is time for.
        trainings: no more candidates than these are trained, if a training is given; training then has the second half
            of the minutes.
        rebuild: whether the minutes are also for building the best again afterwards, such as for an artifact.

    Raises:
        TuningError: if there is no time, no trial or no training.

    >>> lx.tuning.Budget(minutes=0)
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: a budget of 0 minutes is no time to measure anything; give at least one minute
    """

    minutes: float = 10.0
    trials: int | None = None
    trainings: int = 30
    rebuild: bool = False

    def __post_init__(self) -> None:
        if not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise TuningError(
                f"a budget of {self.minutes:g} minutes is no time to measure anything; give at least one minute"
            )
        if self.trials is not None and self.trials < 1:
            raise TuningError(f"a budget of {self.trials} trials measures nothing; give at least one")
        if self.trainings < 1:
            raise TuningError(f"a budget of {self.trainings} trainings trains nothing; give at least one")


def check_objective(objective: str, constraints: Constraints) -> None:
    """Check that an objective is one, and that something is asked for besides it.

    Raises:
        TuningError: if it is not.

    >>> check_objective("speed", Constraints(max_drop=1.0))
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: objective 'speed': expected one of latency, bytes, memory, operations, metric
    """
    if objective not in OBJECTIVES:
        raise TuningError(f"objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if objective != "metric" and constraints.max_drop is None:
        raise TuningError(f"objective {objective!r} needs max_drop, or everything would be rounded away")
    if objective == "metric" and constraints == Constraints(max_drop=constraints.max_drop):
        raise TuningError(
            "objective 'metric' needs max_bytes, max_memory, max_latency_ms, max_operations or min_speedup, or float "
            "is the best"
        )
