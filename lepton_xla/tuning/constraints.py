"""What a recipe must keep to, and what it should be best at."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from lepton_xla.errors import TuningError

type Objective = Literal["latency", "bytes", "memory", "metric"]
"""What is to be least: the time of a call (its share of float's, geometric mean over buckets), bytes on disk, bytes in
memory, or the drop of the metric."""


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What a recipe must keep to; None allows anything.

    Attributes:
        max_drop: by how much the metric may fall, in hundredths of it: 0.5 is half a point of accuracy.
        max_bytes: bytes of the weights on disk, as an artifact stores them.
        max_memory: bytes of the weights in memory.
        max_latency_ms: milliseconds of a call, at every bucket.

    Raises:
        TuningError: if a value is not a number that can be kept to.

    >>> lx.tuning.Constraints(max_drop=0.5, max_bytes=2_000_000)
    Constraints(max_drop=0.5, max_bytes=2000000, max_memory=None, max_latency_ms=None)
    """

    max_drop: float | None = None
    max_bytes: int | None = None
    max_memory: int | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not (self.max_drop >= 0 and math.isfinite(self.max_drop)):
            raise TuningError(
                f"max_drop = {self.max_drop}: expected a number above or equal to 0, in hundredths of the metric"
            )
        for name in ("max_bytes", "max_memory", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise TuningError(f"{name} = {value}: expected a number above 0")


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
    lepton_xla.errors.TuningError: objective 'speed': expected one of latency, bytes, memory, metric
    """
    known = get_args(Objective.__value__)
    if objective not in known:
        raise TuningError(f"objective {objective!r}: expected one of {', '.join(known)}")
    if objective != "metric" and constraints.max_drop is None:
        raise TuningError(f"objective {objective!r} needs max_drop, or everything would be rounded away")
    if objective == "metric" and constraints == Constraints(max_drop=constraints.max_drop):
        raise TuningError("objective 'metric' needs max_bytes, max_memory or max_latency_ms, or float is the best")
