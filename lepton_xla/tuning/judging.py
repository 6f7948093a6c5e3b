"""Judges candidates by the model's own `evaluate`: on one part of its rows to choose, on the other to report.

An `evaluate` gives one number for all rows. What a part of them contributes is found by letting it evaluate answers of
which only that part is the candidate's and the rest is the float model's: the metric then changes by that part alone.
For a metric that is a mean over rows this is exact, and blocks of rows give the paired interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.certificates import Certificate, promise
from lepton_xla.errors import LeptonError, TuningError, first_line
from lepton_xla.modelspec import Predict
from lepton_xla.program import Program
from lepton_xla.tuning.digests import digest_of

type Evaluate = Callable[[Predict], Mapping[str, float]]

# Blocks of rows that an interval comes from, and its coverage.
BLOCKS = 60
COVERAGE = 0.95
# Of a share of rows that was never seen to change, this over the number of rows is the upper end of a 95 % interval.
_NEVER_SEEN = 3.0


@dataclasses.dataclass(frozen=True)
class Drop:
    """By how much a metric fell, in hundredths of the metric (points of an accuracy).

    Attributes:
        points: the drop; negative if the metric rose.
        low, high: its 95 % interval, paired with the float model row by row.
        rows: number of rows that it was measured on.
        enough: rows that would tell this drop from none, or bound it by what is allowed; 0 if these do.

    >>> from lepton_xla.tuning import Drop
    >>> Drop(0.2, -0.1, 0.5, 400, 900).is_noise, str(Drop(0.2, -0.1, 0.5, 400, 900))
    (True, '+0.20 points (95 %: -0.10 to +0.50), within noise')
    """

    points: float
    low: float
    high: float
    rows: int
    enough: int = 0

    @property
    def is_noise(self) -> bool:
        """Whether rows that changed by chance could be all of it."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        noise = ", within noise" if self.is_noise else ""
        return f"{self.points:+.2f} points (95 %: {self.low:+.2f} to {self.high:+.2f}){noise}"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What was found of a candidate.

    Attributes:
        metrics: result of `evaluate` on all rows.
        judged: drop in points on the rows that candidates are chosen by.
        reported: drop on the other rows.
        output_error: `|outputs - float outputs| / |float outputs|` over all rows.
    """

    metrics: dict[str, float]
    judged: float
    reported: Drop
    output_error: float


class Judge:
    """Compares programs with the float model on the rows that `evaluate` asks for."""

    def __init__(
        self,
        program: Program,
        evaluate: Evaluate,
        float_predict: Predict,
        *,
        metric: str | None = None,
        lower_is_better: bool = False,
        seed: int = 0,
    ) -> None:
        """Evaluate the float model and split its rows.

        Args:
            program: the float model.
            evaluate: gives metrics; it must ask for the same rows each time.
            float_predict: the float model.
            metric: the metric of drops; by default `accuracy` if there is one, else the first.
            lower_is_better: whether it is a loss.
            seed: of the split.

        Raises:
            TuningError: if `evaluate` fails, gives NaN, is random, has no such metric, or asks for less than two rows.
        """
        self._evaluate, self._sign = evaluate, -1.0 if lower_is_better else 1.0
        self._inputs: list[dict[str, Any]] = []
        self._outputs: list[dict[str, np.ndarray]] = []

        def recorded(**inputs: Any) -> dict[str, np.ndarray]:
            found = {name: np.asarray(each) for name, each in float_predict(**inputs).items()}
            self._inputs.append(inputs)
            self._outputs.append(found)
            return dict(found)

        self.metrics = _metrics(evaluate, recorded)
        self.metric = _chosen(metric, self.metrics)
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise TuningError(f"evaluate gives {name} = {value} for the float model")
        if self._replayed(self._outputs) != self.metrics:
            raise TuningError(
                "evaluate gives other metrics for the same answers of the model: it must not be random; draw its rows "
                "from a fixed seed"
            )
        self._by_rows = {
            name: bool(spec.shape) and isinstance(spec.shape[0], str) for name, spec in program.outputs.items()
        }
        self._rows = [self._count(each) for each in self._outputs]
        self.rows = sum(self._rows)
        if self.rows < 2:
            raise TuningError(f"evaluate asks for {self.rows} rows; two parts take at least two, and a drop hundreds")
        order = np.random.default_rng(seed).permutation(self.rows)
        self._judged, self._reported = np.sort(order[: self.rows // 2]), order[self.rows // 2 :]

    @property
    def counts_rows(self) -> bool:
        """Whether the metric looks like a share of rows, such as an accuracy."""
        value = self.metrics[self.metric] * self.rows
        return abs(value - round(value)) < 1e-4

    @property
    def rows_digest(self) -> str:
        """Digest of the rows that `evaluate` asks for."""
        return digest_of(self._inputs)

    def check_resolution(self, max_drop: float) -> None:
        """Check that a drop can be told from none.

        Raises:
            TuningError: if one row more or less is a larger drop than is allowed; says how many rows would do.
        """
        part = len(self._judged)
        if self.counts_rows and 100 / part > max_drop > 0:
            raise TuningError(
                f"evaluate asks for {self.rows} rows, of which {part} judge candidates: one of them is "
                f"{100 / part:.2f} points, more than the {max_drop:g} that may be lost; "
                f"{2 * math.ceil(100 / max_drop)} rows would do"
            )

    def __call__(self, predict: Predict, *, max_drop: float | None = None) -> Judgement:
        """Judge a candidate.

        Args:
            predict: the candidate.
            max_drop: what is allowed, which `Drop.enough` refers to.

        Raises:
            TuningError: if `evaluate` fails or gives NaN for it.
        """
        outputs = self._answers(predict)
        metrics = self._replayed(outputs)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TuningError(f"evaluate gives {name} = {value} for this candidate")
        judged = self._drop(outputs, self._judged)
        blocks = np.array_split(self._reported, min(BLOCKS, len(self._reported)))
        drops = np.array([self._drop(outputs, block) for block in blocks])
        return Judgement(metrics, judged, self._interval(drops, blocks, max_drop), self._error(outputs))

    def drop(self, predict: Predict) -> float:
        """The drop in points on the rows that candidates are chosen by."""
        return self._drop(self._answers(predict), self._judged)

    def certify(self, predict: Predict, *, recipe: str, weights_bytes: int, float_bytes: int) -> Certificate:
        """Measure a finished model, and state what was found.

        Args:
            predict: the model.
            recipe: name of its recipe.
            weights_bytes, float_bytes: bytes of its weights on disk, and of the float model's.

        Raises:
            TuningError: if `evaluate` fails or gives NaN for it, or there are too few rows for an interval.
        """
        found = self(predict)
        drop, value = found.reported, self.metrics[self.metric]
        if not math.isfinite(drop.high):
            raise TuningError(f"evaluate asks for {self.rows} rows, too few for the interval that a certificate states")
        right = round(value * self.rows)
        is_accuracy = self.metric == "accuracy" and self.counts_rows and self._sign > 0 and 0 <= value <= 1
        return Certificate(
            metric=self.metric, float_value=value, value=found.metrics[self.metric], drop=drop.points, low=drop.low,
            high=drop.high, rows=drop.rows, all_rows=self.rows, data=self.rows_digest, weights_bytes=weights_bytes,
            float_bytes=float_bytes, recipe=recipe,
            promised=promise(right, self.rows, drop.high) if is_accuracy else None,
        )  # fmt: skip

    def _answers(self, predict: Predict) -> list[dict[str, np.ndarray]]:
        """A candidate's outputs for each call that `evaluate` makes."""
        return [{name: np.asarray(each) for name, each in predict(**inputs).items()} for inputs in self._inputs]

    def _interval(self, drops: np.ndarray, blocks: Sequence[np.ndarray], max_drop: float | None) -> Drop:
        from scipy.stats import t

        rows = len(self._reported)
        shares = np.array([len(block) / rows for block in blocks])
        mean = float(drops @ shares)
        if len(blocks) < 2:
            return Drop(mean, -math.inf, math.inf, rows, 0)
        if not drops.any():  # of rows that never changed, the rule of three bounds the share that may
            half = 100 * _NEVER_SEEN / rows if self.counts_rows else 0.0
            need = math.ceil(100 * _NEVER_SEEN / max_drop) if max_drop and half > max_drop else 0
            return Drop(0.0, -half, half, rows, 2 * need)
        spread = math.sqrt(float(shares**2 @ (drops - mean) ** 2) * len(blocks) / (len(blocks) - 1))
        half = float(t.ppf((1 + COVERAGE) / 2, len(blocks) - 1)) * spread
        apart = max(max_drop or 0.0, abs(mean))
        need = math.ceil(2 * rows * (half / apart) ** 2) if apart and half > apart else 0
        return Drop(mean, mean - half, mean + half, rows, need)

    def _drop(self, outputs: Sequence[Mapping[str, np.ndarray]], rows: np.ndarray) -> float:
        """The drop in points on some rows: those are the candidate's, all others the float model's."""
        if not len(rows):
            return 0.0
        chosen = np.zeros(self.rows, bool)
        chosen[rows] = True
        mixed: list[dict[str, np.ndarray]] = []
        start = 0
        for before, after, count in zip(self._outputs, outputs, self._rows, strict=True):
            own = chosen[start : start + count]
            mixed.append({name: self._mixed(name, before[name], after[name], own) for name in before})
            start += count
        found = self._replayed(mixed)[self.metric]
        return self._sign * (self.metrics[self.metric] - found) * 100 * self.rows / len(rows)

    def _mixed(self, name: str, before: np.ndarray, after: np.ndarray, own: np.ndarray) -> np.ndarray:
        if before.shape != after.shape:
            raise TuningError(f"output {name!r} has shape {after.shape}, and {before.shape} of the float model")
        if not self._by_rows[name]:
            return after if own.any() else before
        return np.where(own.reshape(-1, *[1] * (before.ndim - 1)), after, before)

    def _count(self, outputs: Mapping[str, np.ndarray]) -> int:
        """Number of rows of a call; a call whose outputs have no rows is one."""
        return next((len(each) for name, each in outputs.items() if self._by_rows.get(name)), 1)

    def _replayed(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """What `evaluate` makes of given answers."""
        calls = 0

        def answer(**inputs: Any) -> dict[str, np.ndarray]:
            nonlocal calls
            known: dict[str, Any] = self._inputs[calls] if calls < len(self._inputs) else {}
            if set(known) != set(inputs) or any(
                not np.array_equal(known[name], value) for name, value in inputs.items()
            ):
                raise TuningError(
                    "evaluate asks for other rows each time, so candidates cannot be compared: draw them from a fixed "
                    "seed"
                )
            calls += 1
            return dict(outputs[calls - 1])

        return _metrics(self._evaluate, answer)

    def _error(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> float:
        wrong = size = 0.0
        for before, after in zip(self._outputs, outputs, strict=True):
            for name, exact in before.items():
                if np.issubdtype(exact.dtype, np.integer) or exact.dtype == bool:
                    continue
                wrong += float(np.sum((after[name].astype(np.float64) - exact) ** 2))
                size += float(np.sum(exact.astype(np.float64) ** 2))
        return math.sqrt(wrong / size) if size else 0.0


def _metrics(evaluate: Evaluate, predict: Predict) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in dict(evaluate(predict)).items()}
    except LeptonError:
        raise
    except Exception as error:  # user code may raise anything
        raise TuningError(f"evaluate fails: {type(error).__name__}: {first_line(error)}") from error


def _chosen(asked: str | None, metrics: Mapping[str, float]) -> str:
    if not metrics:
        raise TuningError("evaluate returns no metric, so no drop can be measured")
    if asked is None:
        return "accuracy" if "accuracy" in metrics else next(iter(metrics))
    if asked not in metrics:
        raise TuningError(f"no metric {asked!r}: evaluate returns {', '.join(metrics)}")
    return asked
