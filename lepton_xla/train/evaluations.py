"""Evaluation during training: when it happens, which result is the best, and when to stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_xla.errors import TrainingError
from lepton_xla.modelspec import Predict, figures_of
from lepton_xla.program import Program


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When and how a model is evaluated while it is trained.

    Attributes:
        evaluate: `evaluate(predict) -> {"accuracy": 0.98, ...}`, as in a `ModelSpec`.
        every: steps between evaluations. The model is also evaluated after the last step.
        metric: the metric by which the best weights are kept; None keeps the last.
        mode: whether larger (`max`) or smaller (`min`) values of the metric are better.
        patience: evaluations without a better value after which training stops; None never stops.

    Raises:
        TrainingError: if a value is out of range, or there is patience without a metric.

    >>> lx.train.Evaluation(lambda predict: {"accuracy": 1.0}, every=100, patience=3)
    Traceback (most recent call last):
    lepton_xla.errors.TrainingError: evaluation: patience = 3 needs a metric to compare, such as metric = 'accuracy'
    """

    evaluate: Callable[[Predict], Mapping[str, float]]
    every: int
    metric: str | None = None
    mode: Literal["max", "min"] = "max"
    patience: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TrainingError(f"evaluation: evaluate is a {type(self.evaluate).__name__}, not a function of predict")
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise TrainingError(
                f"evaluation: every = {self.every}, patience = {self.patience}; both are at least 1, or patience None"
            )
        if self.mode not in ("max", "min"):
            raise TrainingError(f"evaluation: mode = {self.mode!r}; expected 'max' or 'min'")
        if self.patience is not None and self.metric is None:
            raise TrainingError(
                f"evaluation: patience = {self.patience} needs a metric to compare, such as metric = 'accuracy'"
            )

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value of the metric is better than the best one; NaN never is.

        >>> lx.train.Evaluation(lambda predict: {}, every=1, metric="loss", mode="min").is_better(0.1, 0.2)
        True
        """
        if math.isnan(value):
            return False
        return best is None or (value > best if self.mode == "max" else value < best)

    def run(self, predict: Predict) -> dict[str, float]:
        """Evaluate, and check the result.

        Raises:
            TrainingError: if the result is not a mapping of names to numbers, or lacks the metric.

        >>> lx.train.Evaluation(lambda predict: {"accuracy": 1}, every=1).run(lambda **inputs: {})
        {'accuracy': 1.0}
        """
        metrics = figures_of(self.evaluate(predict), TrainingError)
        if self.metric is not None and self.metric not in metrics:
            raise TrainingError(f"evaluate returned {sorted(metrics)}, without the metric {self.metric!r}")
        return metrics


class Predictor:
    """Runs a program at any batch size, compiled once a size; every process gets all outputs."""

    def __init__(self, program: Program, mesh: Mesh | None, between: Callable[[], None]) -> None:
        """Make a predictor.

        Args:
            program: the program; its weights are not used.
            mesh: the mesh of the weights, if they are spread over several devices.
            between: called before each call, for instance to look for a signal.
        """
        self._inputs = tuple(program.inputs)
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._run = jax.jit(program.named_outputs, out_shardings=everywhere)
        self._between = between

    def __call__(self, weights: Mapping[str, Any]) -> Predict:
        """The function of inputs by name, with these weights."""

        def predict(**inputs: Any) -> dict[str, np.ndarray]:
            self._between()
            missing = [name for name in self._inputs if name not in inputs]
            if missing or len(inputs) > len(self._inputs):
                raise TrainingError(f"predict got the inputs {sorted(inputs)}; the model takes {list(self._inputs)}")
            outputs = self._run(weights, *(np.asarray(inputs[name]) for name in self._inputs))
            return {name: np.asarray(leaf) for name, leaf in outputs.items()}

        return predict
