"""What `tune` found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lepton_xla.certificates import Certificate
from lepton_xla.errors import TuningError
from lepton_xla.modelspec import Predict
from lepton_xla.program import Program
from lepton_xla.tuning.constraints import Constraints, Objective
from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.trials import Trial

type Stop = Literal["done", "time", "trials", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was found, and all that was measured on the way.

    Attributes:
        constraints, objective: what was asked for.
        metric: the metric of drops.
        float_metrics: those of the float model.
        float_bytes: bytes of its weights on disk.
        float_operations: its multiply-adds, as `Trial.operations` counts them.
        best: the best trial that keeps to all constraints by measurement; None if none does.
        nearest: the trial that breaks the constraints least; the best if there is one.
        trials: everything that was measured, in order.
        sites: for each group its sites, and for each choice its name, estimated error and bytes.
        sizes: sizes of the symbolic dimensions at which calls were timed.
        stopped: why the search ended: it had nothing left to try, no time, no trials, or was interrupted.
        seconds: the time it took.
        skipped: what there was no time for, a line each.
        judge: compares models with the float one.
        maker: builds a trial's program again; see `build`.

    >>> small, large = (Trial(name, "", "chosen", {}, {}, drop, None, 0.1, size) for name, drop, size in
    ...                 (("a", 0.4, 100), ("b", 0.0, 400)))
    >>> worse = dataclasses.replace(large, name="c", judged=1.0)
    >>> found = Tuning(Constraints(max_drop=0.5), "bytes", "accuracy", {}, 800, small, small, (small, large, worse))
    >>> [trial.name for trial in found.frontier], found.to_json()["best"]["name"]
    (['a', 'b'], 'a')
    >>> found.correlations  # these trials estimated nothing
    {}
    """

    constraints: Constraints
    objective: Objective
    metric: str
    float_metrics: dict[str, float]
    float_bytes: int
    best: Trial | None
    nearest: Trial | None
    trials: tuple[Trial, ...]
    sites: tuple[dict[str, Any], ...] = ()
    sizes: tuple[Mapping[str, int], ...] = ()
    stopped: Stop = "done"
    seconds: float = 0.0
    skipped: tuple[str, ...] = ()
    float_operations: int = 0
    judge: Judge | None = dataclasses.field(default=None, repr=False, compare=False)
    maker: Callable[[Trial], Program] | None = dataclasses.field(default=None, repr=False, compare=False)

    def build(self, trial: Trial | None = None) -> Program:
        """Build a trial's program again, ready for `compile`.

        The best that this run trained is taken as it was trained; others are trained again, with the same seed.

        Args:
            trial: one that was measured; by default the best.

        Raises:
            TuningError: if there is none.

        >>> Tuning(Constraints(), "bytes", "accuracy", {}, 800, None, None, ()).build()
        Traceback (most recent call last):
        lepton_xla.errors.TuningError: no recipe that was measured keeps to the constraints, so none can be built
        """
        chosen = trial or self.best
        if chosen is None or chosen.failure or self.maker is None:
            raise TuningError("no recipe that was measured keeps to the constraints, so none can be built")
        return self.maker(chosen)

    def certify(self, predict: Predict, weights_bytes: int, trial: Trial | None = None) -> Certificate:
        """Measure a model that was built and compiled, on the rows of `evaluate`, and state what was found.

        Args:
            predict: the model, such as `artifact.servable()`.
            weights_bytes: bytes of its weights on disk.
            trial: the trial that it was built from; by default the best.

        Raises:
            TuningError: if there is no such trial, or `evaluate` fails.

        >>> Tuning(Constraints(), "bytes", "accuracy", {}, 800, None, None, ()).certify(lambda **inputs: {}, 100)
        Traceback (most recent call last):
        lepton_xla.errors.TuningError: no recipe that was measured keeps to the constraints, so none can be certified
        """
        chosen = trial or self.best
        if chosen is None or self.judge is None:
            raise TuningError("no recipe that was measured keeps to the constraints, so none can be certified")
        return self.judge.certify(
            predict, recipe=chosen.name, weights_bytes=weights_bytes, float_bytes=self.float_bytes
        )

    @property
    def frontier(self) -> tuple[Trial, ...]:
        """The best, and the trials that no other beats in drop, bytes on disk, latency and objective at once.

        The smallest first; of trials that are equal in all of these, one.
        """
        measured = [(self._point(trial), trial) for trial in self.trials if not trial.failure]
        kept = [(point, trial) for point, trial in measured if not any(_beats(other, point) for other, _ in measured)]
        # What is as good at the objective as the best, and was not chosen, may be better at what was not asked for.
        best = {} if self.best is None else {self._point(self.best): self.best}
        unique = dict(reversed(kept)) | best
        return tuple(sorted(unique.values(), key=lambda trial: trial.bytes))

    def _point(self, trial: Trial) -> tuple[float, ...]:
        return trial.judged, trial.bytes, trial.latency, trial.value(self.objective)

    @property
    def correlations(self) -> dict[str, float]:
        """Rank correlations (Spearman) of what was estimated with what was measured, over all chosen trials.

        `error` compares the estimated with the measured error of the outputs, `drop` with the drop; `latency`, `bytes`
        and `operations` their own. Kinds that did not vary are left out.
        """
        chosen = [trial for trial in self.trials if trial.estimates and not trial.failure]
        pairs = {
            "error": [(trial.estimates["output_error"], trial.output_error) for trial in chosen],
            "drop": [(trial.estimates["output_error"], trial.judged) for trial in chosen],
            "bytes": [(trial.estimates["bytes"], trial.bytes) for trial in chosen],
            "operations": [(trial.estimates["operations"], trial.operations) for trial in chosen],
            "latency": [(trial.estimates["latency"], trial.latency) for trial in chosen],
        }
        found = {kind: rank_correlation(values) for kind, values in pairs.items()}
        return {kind: value for kind, value in found.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "constraints": dataclasses.asdict(self.constraints),
            "objective": self.objective,
            "metric": self.metric,
            "float": self.float_metrics,
            "float_bytes": self.float_bytes,
            "float_operations": self.float_operations,
            "best": self.best.to_json() if self.best is not None else None,
            "nearest": self.nearest.to_json() if self.nearest is not None else None,
            "frontier": [trial.name for trial in self.frontier],
            "correlations": self.correlations,
            "trials": [trial.to_json() for trial in self.trials],
            "sites": list(self.sites),
            "stopped": self.stopped,
            "seconds": self.seconds,
            "skipped": list(self.skipped),
        }


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation; NaN of less than three pairs, or if a side does not vary.

    >>> rank_correlation([(1, 10), (2, 30), (3, 20)])
    0.5
    """
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return math.nan
    from scipy.stats import spearmanr

    found: Any = spearmanr([a for a, _ in pairs], [b for _, b in pairs])
    return float(found.statistic)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a point is nowhere worse than another and somewhere better."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
