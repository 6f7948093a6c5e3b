"""Metrics of classification from probabilities and labels, of all rows and of many resamples of them at once."""

from __future__ import annotations

import dataclasses

import numpy as np

from lepton_xla.errors import InputError

# Bins of the expected calibration error.
BINS = 15
# Elements of an array of resamples.
_AT_ONCE = 1 << 22
NAMES = ("accuracy", "recall", "precision", "f1", "auc", "calibration_error")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Metrics of one model.

    Attributes:
        metrics: `accuracy`; `recall`, `precision` and `f1`, means over the classes that occur; `auc`, the mean over
            classes of one against the rest (of two classes that of class 1), NaN if every label is the same; and
            `calibration_error`, the expected calibration error of the most likely class in 15 bins of equal width.
        confusion: rows by right class and by predicted class, `[classes, classes]`.
        recall, precision, f1: of each class; NaN where no row has it.
        bins: rows, mean confidence and accuracy in each bin of confidence, `[15, 3]`; NaN where there are no rows.

    >>> from lepton_xla.evaluation import measure
    >>> found = measure(np.float64([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), np.array([0, 1, 0]))
    >>> found.confusion.tolist(), round(found.metrics["accuracy"], 3), found.metrics["auc"]
    ([[1, 1], [0, 1]], 0.667, 0.5)
    """

    metrics: dict[str, float]
    confusion: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray
    bins: np.ndarray


def measure(probabilities: np.ndarray, labels: np.ndarray) -> Figures:
    """Measure a model.

    Args:
        probabilities: of each class, float `[rows, classes]`; the largest is the answer, the first of equal ones.
        labels: the right class of each row, integers `[rows]`.

    Raises:
        InputError: if labels are not one class for each row.

    >>> from lepton_xla.evaluation import measure
    >>> measure(np.eye(3), np.arange(3)).metrics["f1"]
    1.0
    """
    check_labels(labels, probabilities.shape)
    found = resampled(probabilities, labels, np.ones((1, len(labels))))
    classes = probabilities.shape[1]
    confusion = _confusions(probabilities.argmax(1), labels, np.ones((1, len(labels))), classes)[0]
    recall, precision, f1 = (each[0] for each in _of_classes(confusion[None]))
    sums = _bin_sums(probabilities, labels, np.ones((1, len(labels))))[0]
    with np.errstate(invalid="ignore"):
        bins = np.stack([sums[0], sums[1] / sums[0], sums[2] / sums[0]], 1)
    metrics = {name: float(values[0]) for name, values in found.items()}
    return Figures(metrics, np.rint(confusion).astype(np.int64), recall, precision, f1, bins)


def check_labels(labels: np.ndarray, shape: tuple[int, ...]) -> None:
    """Check that there is one class for each row.

    Raises:
        InputError: if not.

    >>> check_labels(np.array([0, 3]), (2, 3))
    Traceback (most recent call last):
    lepton_xla.errors.InputError: label is int64[2] with values from 0 to 3; expected 2 integers from 0 to 2
    """
    rows, classes = shape
    fits = labels.shape == (rows,) and labels.dtype.kind in "iu" and rows > 0
    if not fits or not 0 <= labels.min() <= labels.max() < classes:
        span = f" with values from {labels.min()} to {labels.max()}" if labels.size else ""
        raise InputError(
            f"label is {labels.dtype}{list(labels.shape)}{span}; expected {rows} integers from 0 to {classes - 1}"
        )


def resampled(
    probabilities: np.ndarray, labels: np.ndarray, counts: np.ndarray, *, auc: bool = True
) -> dict[str, np.ndarray]:
    """Every metric on resamples of the rows.

    Args:
        probabilities, labels: as of `measure`.
        counts: how often each row is in each resample, `[resamples, rows]`.
        auc: whether to compute it: it takes as many passes as there are classes.

    Returns:
        Metric -> its value on each resample, `[resamples]`; NaN where it is undefined.
    """
    step = max(1, _AT_ONCE // max(1, len(labels)))
    parts = [_part(probabilities, labels, counts[k : k + step], auc) for k in range(0, len(counts), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _part(probabilities: np.ndarray, labels: np.ndarray, counts: np.ndarray, auc: bool) -> dict[str, np.ndarray]:
    confusion = _confusions(probabilities.argmax(1), labels, counts, probabilities.shape[1])
    recall, precision, f1 = _of_classes(confusion)
    occurs = confusion.sum(2) > 0
    found = {"accuracy": np.trace(confusion, axis1=1, axis2=2) / counts.sum(1)}
    for name, values in (("recall", recall), ("precision", precision), ("f1", f1)):
        found[name] = np.where(occurs, values, 0).sum(1) / np.maximum(occurs.sum(1), 1)
    if auc:
        found["auc"] = _auc(probabilities, labels, counts)
    sums = _bin_sums(probabilities, labels, counts)
    found["calibration_error"] = np.abs(sums[:, 1] - sums[:, 2]).sum(1) / counts.sum(1)
    return found


def _confusions(predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray, classes: int) -> np.ndarray:
    cells = labels.astype(np.int64) * classes + predicted
    made = [np.bincount(cells, weights, minlength=classes**2) for weights in counts]
    return np.stack(made).reshape(-1, classes, classes)


def _of_classes(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall, precision and F1 of each class; a class that is never predicted has precision 0."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    there, said = confusion.sum(2), confusion.sum(1)
    recall = np.where(there > 0, right / np.maximum(there, 1), np.nan)
    precision = np.where(there > 0, right / np.maximum(said, 1), np.nan)
    f1 = np.where(there > 0, 2 * right / np.maximum(there + said, 1), np.nan)
    return recall, precision, f1


def _bin_sums(probabilities: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows, confidence and right answers added up in each bin, `[resamples, 3, bins]`.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017); bins are open below and closed above.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return np.stack(
        [
            np.stack([np.bincount(place, weights * each, minlength=BINS) for each in (1.0, confidence, right)])
            for weights in counts
        ]
    )


def _auc(probabilities: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve; equal scores count half. Source: Hanley and McNeil (1982); one against the rest."""
    classes = probabilities.shape[1]
    found = [_one_auc(probabilities[:, k], labels == k, counts) for k in ((1,) if classes == 2 else range(classes))]
    areas = np.stack(found)
    known = np.isfinite(areas)
    with np.errstate(invalid="ignore"):
        return np.where(known, areas, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _one_auc(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    inside = positive[order]
    ordered = counts[:, order]
    above = np.add.reduceat(ordered * inside, starts, axis=1)
    below = np.add.reduceat(ordered * ~inside, starts, axis=1)
    less = np.cumsum(below, axis=1) - below
    pairs = above.sum(1) * below.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (above * (less + below / 2)).sum(1) / pairs, np.nan)
