"""Models side by side on the same labelled rows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.errors import InputError, ModelError
from lepton_xla.evaluation.damage import ClassDamage, class_damage
from lepton_xla.evaluation.figures import Figures, measure, resampled
from lepton_xla.evaluation.intervals import Interval, bootstrap_interval, paired_interval, share_interval
from lepton_xla.evaluation.scores import are_logits, checked_scores, judged_output, probabilities_of

type Predict = Callable[..., Mapping[str, np.ndarray]]

_ROUNDS = 30
# Resamples times rows times classes up to which the AUC has an interval.
_AUC_WORK = 400_000_000
# Resamples times rows: how often each row is in each resample is kept. There are at least 100 resamples.
_COUNTS = 30_000_000


@dataclasses.dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Attributes:
        name: its name.
        figures: its metrics.
        intervals: metric -> its interval, if it has one.
        differences: metric -> this one minus the first model's, and its paired interval; empty for the first.
        damage: what became of each class, the greatest loss first; empty for the first.
        latency: rows of a call -> median and 99th percentile of its time in seconds.
        cpu_s: seconds of this process's processors for each row, in calls of the most rows; of a server its own are not
            seen.
        resources: what is known besides, such as `weights_bytes`.

    >>> from lepton_xla.evaluation import compare
    >>> side = compare({"model": lambda x: {"y": x}}, {"x": np.eye(3, dtype=np.float32)}, np.arange(3)).sides[0]
    >>> side.name, side.figures.metrics["accuracy"], str(side.intervals["accuracy"])
    ('model', 1.0, '0.4385 to 1.0000')
    """

    name: str
    figures: Figures
    intervals: dict[str, Interval]
    differences: dict[str, tuple[float, Interval | None]]
    damage: tuple[ClassDamage, ...]
    latency: dict[int, tuple[float, float]]
    cpu_s: float
    resources: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models on the same rows, the first of which the others are compared with.

    Attributes:
        sides: the models.
        rows: number of rows.
        output: name of the output that was judged.
        logits: whether it holds logits, of which probabilities were made.

    >>> from lepton_xla.evaluation import compare
    >>> models = {"float": lambda x: {"y": x}, "small": lambda x: {"y": -x}}
    >>> found = compare(models, {"x": np.eye(3, dtype=np.float32)}, np.arange(3))
    >>> found.to_json()["sides"][1]["differences"]["accuracy"]["value"]
    -1.0
    """

    sides: tuple[Side, ...]
    rows: int
    output: str
    logits: bool

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "rows": self.rows,
            "output": self.output,
            "scores": "logits" if self.logits else "probabilities",
            "sides": [_side_json(side) for side in self.sides],
        }


def compare(
    models: Mapping[str, Predict],
    inputs: Mapping[str, Any],
    labels: Any,
    *,
    output: str | None = None,
    batch: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    resources: Mapping[str, Mapping[str, float]] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Comparison:
    """Measure models on the same labelled rows.

    Args:
        models: name -> `predict(**inputs) -> outputs`: a loaded artifact, a program under `jax.jit`, or a client of a
            server. The others are compared with the first, row by row.
        inputs: name -> array `[rows, ...]`.
        labels: the right class of each row, integers `[rows]`.
        output: the output that is judged; by default the first with classes.
        batch: rows of a call.
        resamples: of the bootstrap; fewer where there are more than 30,000 rows.
        seed: of the bootstrap; all models have the same resamples.
        resources: name of a model -> what is known of its size.
        progress: called before each step.

    Raises:
        InputError: if inputs and labels do not fit each other.
        ModelError: if an output is missing or not finite.

    >>> from lepton_xla.evaluation import compare
    >>> x, labels = np.eye(4, dtype=np.float32), np.arange(4)
    >>> found = compare({"float": lambda x: {"y": x}, "worse": lambda x: {"y": x * [1, 1, 1, -1]}}, {"x": x}, labels)
    >>> [each.label for each in found.sides[1].damage][0], found.sides[1].figures.metrics["accuracy"]
    (3, 0.75)
    """
    arrays = {name: np.asarray(each) for name, each in inputs.items()}
    labels = np.asarray(labels)
    rows = _rows(arrays, labels)
    if not models:
        raise InputError("there is no model to evaluate")
    if batch < 1 or resamples < 1:
        raise InputError(f"batch is {batch} and resamples {resamples}; both are at least 1")
    answers: dict[str, Mapping[str, np.ndarray]] = {}
    for name, predict in models.items():
        progress(f"evaluate {name}")
        answers[name] = _answers(predict, arrays, rows, batch)
    first = next(iter(models))
    judged = judged_output(answers[first], output)
    scores = {name: checked_scores(found, judged, name, rows) for name, found in answers.items()}
    logits = are_logits(scores[first])
    chances = {name: probabilities_of(each, logits=logits) for name, each in scores.items()}
    for name, each in chances.items():
        if each.shape != chances[first].shape:
            raise ModelError(f"{name} has {each.shape[1]} classes, and {first} {chances[first].shape[1]}")
    figures = {name: measure(each, labels) for name, each in chances.items()}
    progress("resample the rows")
    resamples = min(resamples, max(100, _COUNTS // rows))
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), resamples).astype(np.float64)
    with_auc = resamples * chances[first].size <= _AUC_WORK
    drawn = {name: resampled(each, labels, counts, auc=with_auc) for name, each in chances.items()}
    right = {name: each.argmax(1) == labels for name, each in chances.items()}
    progress("time calls")
    latency, cpu_s = _times(models, arrays, rows, batch)
    sides = tuple(
        Side(
            name,
            figures[name],
            _intervals(right[name], drawn[name]),
            {}
            if name == first
            else {
                metric: (value - figures[first].metrics[metric], _paired(metric, right, drawn, first, name))
                for metric, value in figures[name].metrics.items()
            },
            () if name == first else tuple(class_damage(right[first], right[name], labels)),
            latency[name],
            cpu_s[name],
            dict((resources or {}).get(name, {})),
        )
        for name in models
    )
    return Comparison(sides, rows, judged, logits)


def _rows(arrays: Mapping[str, np.ndarray], labels: np.ndarray) -> int:
    if not arrays:
        raise InputError("there are no inputs to evaluate on")
    for name, each in {**arrays, "label": labels}.items():
        if each.ndim == 0 or len(each) != len(labels) or not len(each):
            raise InputError(
                f"{name!r} is {list(each.shape)}, and there are {len(labels) if labels.ndim else 0} labels"
            )
    return len(labels)


def _answers(predict: Predict, arrays: Mapping[str, np.ndarray], rows: int, batch: int) -> dict[str, np.ndarray]:
    found: list[Mapping[str, np.ndarray]] = []
    for start in range(0, rows, batch):
        asked = {name: each[start : start + batch] for name, each in arrays.items()}
        count = min(batch, rows - start)
        # Repeated rows fill the last call, so that a model under `jax.jit` is compiled once.
        padded = {name: each[np.arange(min(batch, rows)) % count] for name, each in asked.items()}
        found.append({name: np.asarray(each)[:count] for name, each in predict(**padded).items()})
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def _intervals(right: np.ndarray, drawn: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    found: dict[str, Interval] = {"accuracy": share_interval(int(right.sum()), len(right))}
    for name, values in drawn.items():
        made = bootstrap_interval(values, paired=False) if name != "accuracy" else None
        if made is not None:
            found[name] = made
    return found


def _paired(
    metric: str,
    right: Mapping[str, np.ndarray],
    drawn: Mapping[str, Mapping[str, np.ndarray]],
    first: str,
    second: str,
) -> Interval | None:
    if metric == "accuracy":
        one, two = right[first], right[second]
        cells = (one & two, one & ~two, ~one & two, ~one & ~two)
        return paired_interval(*(int(cell.sum()) for cell in cells))
    if metric not in drawn[first]:
        return None
    return bootstrap_interval(drawn[second][metric] - drawn[first][metric], paired=True)


def _times(
    models: Mapping[str, Predict], arrays: Mapping[str, np.ndarray], rows: int, batch: int
) -> tuple[dict[str, dict[int, tuple[float, float]]], dict[str, float]]:
    """Time calls of one row and of a batch, the models in turns."""
    latency: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in models}
    cpu_s: dict[str, float] = {}
    for size in dict.fromkeys((1, min(batch, rows))):
        asked = {name: each[:size] for name, each in arrays.items()}
        for predict in models.values():
            predict(**asked)
        times: dict[str, list[float]] = {name: [] for name in models}
        spent = dict.fromkeys(models, 0.0)
        for _ in range(_ROUNDS):
            for name, predict in models.items():
                start, busy = time.perf_counter(), time.process_time()
                predict(**asked)
                times[name].append(time.perf_counter() - start)
                spent[name] += time.process_time() - busy
        for name, found in times.items():
            latency[name][size] = _quantiles(found)
            cpu_s[name] = spent[name] / _ROUNDS / size
    return latency, cpu_s


def _quantiles(times: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(times)
    return float(np.median(ordered)), ordered[math.ceil(0.99 * len(ordered)) - 1]


def _side_json(side: Side) -> dict[str, Any]:
    figures = side.figures
    return {
        "name": side.name,
        "metrics": figures.metrics,
        "intervals": {name: dataclasses.asdict(each) for name, each in side.intervals.items()},
        "differences": {
            name: {"value": value, **(dataclasses.asdict(interval) if interval is not None else {})}
            for name, (value, interval) in side.differences.items()
        },
        "classes": {
            "recall": figures.recall.tolist(),
            "precision": figures.precision.tolist(),
            "f1": figures.f1.tolist(),
        },
        "confusion": figures.confusion.tolist(),
        "calibration": figures.bins.tolist(),
        "damage": [{**dataclasses.asdict(each), "surely": each.surely} for each in side.damage],
        "latency": {str(rows): {"median_s": pair[0], "p99_s": pair[1]} for rows, pair in side.latency.items()},
        "cpu_s_per_row": side.cpu_s,
        "resources": side.resources,
    }
