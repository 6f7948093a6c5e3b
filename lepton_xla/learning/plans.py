"""What a learner does, as it is told: numbers of steps and rows, shares, and when a result is good enough."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from lepton_xla.errors import LearningError, ServeError, first_line
from lepton_xla.serve.monitor.comparisons import parse_comparison
from lepton_xla.serve.protocol.traffic import RolloutRequest


@dataclasses.dataclass(frozen=True)
class LearningPlan:
    """How a learner trains on and judges.

    Attributes:
        steps: of each round's training; None for those of the `TrainSpec`.
        fresh: share of the rows of a batch that are samples; the others are old data, against forgetting.
        held_out: share of the samples that is never trained on, by a hash of their ids, and judges.
        least_rows: labelled rows that there must be to train on, and as many new ones for another round.
        least_held_out: rows that there must be to judge by.
        most_rows: labelled rows that are read, the latest.
        old_rows: rows of old data that are kept to mix in; a fifth of them judges, if the `TrainSpec` has no
            evaluation.
        max_drop: how far a metric on old data may get worse.
        lower_is_better: metrics on old data that are better when they are smaller, beside the one of an `Evaluation`
            whose mode says so, and those whose names hold `loss`, `error` or `perplexity`.
        confidence: how sure it must be that the new version is right more often on the samples held out.
        seed: of the order of rows.
        direct: whether a version is promoted as soon as it is loaded, without a rollout.
        stages, rollback, promote: of the rollout, as the server takes them; None for the server's own.
        rollout_s: how long a rollout may take.

    Raises:
        LearningError: for a value out of range, or a rollout that no server carries out.

    >>> from lepton_xla.learning import LearningPlan
    >>> LearningPlan(fresh=2.0)
    Traceback (most recent call last):
    lepton_xla.errors.LearningError: learning: fresh = 2.0; expected above 0 and at most 1
    """

    steps: int | None = None
    fresh: float = 0.5
    held_out: float = 0.2
    least_rows: int = 200
    least_held_out: int = 40
    most_rows: int = 50_000
    old_rows: int = 10_000
    max_drop: float = 0.02
    lower_is_better: tuple[str, ...] = ()
    confidence: float = 0.95
    seed: int = 0
    direct: bool = False
    stages: tuple[Mapping[str, Any], ...] | None = None
    rollback: tuple[str, ...] | None = None
    promote: tuple[str, ...] | None = None
    rollout_s: float = 86400.0

    def __post_init__(self) -> None:
        for name, low, high, given in (
            ("fresh", 0, 1, self.fresh),
            ("held_out", 0, 0.9, self.held_out),
            ("confidence", 0, 0.999999, self.confidence),
            ("rollout_s", 0, math.inf, self.rollout_s),
        ):
            if not _is_number(given) or not low < given <= high:
                limit = "" if high == math.inf else f" and at most {high:g}"
                raise LearningError(f"learning: {name} = {given!r}; expected above {low}{limit}")
        if not _is_number(self.max_drop) or not self.max_drop >= 0:
            raise LearningError(f"learning: max_drop = {self.max_drop!r}; expected at least 0")
        for name in ("steps", "least_rows", "least_held_out", "most_rows", "old_rows"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise LearningError(f"learning: {name} = {value!r}; expected a whole number of at least 1")
        if not _is_whole(self.seed) or self.seed < 0:
            raise LearningError(f"learning: seed = {self.seed!r}; expected a whole number of at least 0")
        for field in dataclasses.fields(self):  # those of NumPy cannot be sent to a server
            value = getattr(self, field.name)
            if _is_whole(value) or _is_number(value):
                object.__setattr__(self, field.name, int(value) if _is_whole(value) else float(value))
        names = self.lower_is_better
        is_many = isinstance(names, Collection) and not isinstance(names, str)
        if not (is_many and all(isinstance(each, str) for each in names)):
            raise LearningError(f"learning: lower_is_better = {names!r}; expected names of metrics")
        self._check_rollout()

    def _check_rollout(self) -> None:
        """What a server would refuse, it would refuse after all of the training."""
        try:
            asked = msgspec.convert(self.rollout("1"), RolloutRequest)
            for rule in (*asked.rollback, *asked.promote):
                parse_comparison(rule)
        except (msgspec.ValidationError, ServeError) as error:
            raise LearningError(f"learning: the rollout cannot be asked for: {first_line(error)}") from error

    def rollout(self, version: str) -> dict[str, Any]:
        """The rollout to ask the server for.

        >>> from lepton_xla.learning import LearningPlan
        >>> LearningPlan(rollback=("errors > stable + 1%",)).rollout("4")
        {'version': '4', 'most_s': 86400.0, 'rollback': ('errors > stable + 1%',)}
        """
        given = {"stages": self.stages, "rollback": self.rollback, "promote": self.promote}
        return {"version": version, "most_s": self.rollout_s} | {
            name: value for name, value in given.items() if value is not None
        }


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
