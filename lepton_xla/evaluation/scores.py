"""From a model's outputs to probabilities of classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lepton_xla.errors import ModelError

# How far the probabilities of a row may be from adding up to one.
_ADDED_UP = 1e-2


def judged_output(outputs: Mapping[str, np.ndarray], asked: str | None = None) -> str:
    """The output with the classes: the one asked for, or the first of floats with several a row, or one a row.

    Raises:
        ModelError: if there is none.

    >>> judged_output({"ids": np.zeros((2, 3), np.int32), "logits": np.zeros((2, 3), np.float32)})
    'logits'
    """
    if asked is not None:
        if asked not in outputs:
            raise ModelError(f"there is no output {asked!r}; the model has {', '.join(outputs)}")
        return asked
    floats = {name: each for name, each in outputs.items() if each.dtype.kind not in "iubOSU"}
    for name, each in floats.items():
        if each.ndim == 2 and each.shape[1] > 1:
            return name
    for name, each in floats.items():
        if each.ndim == 1 or (each.ndim == 2 and each.shape[1] == 1):
            return name
    shapes = ", ".join(f"{name} {each.dtype}{list(each.shape)}" for name, each in outputs.items())
    raise ModelError(f"no output has classes, [rows, classes] or [rows] floats; the model gives {shapes}")


def are_logits(scores: np.ndarray) -> bool:
    """Whether scores are logits: they are if they leave [0, 1], or rows of several do not add up to one.

    >>> are_logits(np.float32([[2.0, -1.0]])), are_logits(np.float32([[0.7, 0.3]])), are_logits(np.float32([0.7, 0.2]))
    (True, False, False)
    """
    if scores.size and (scores.min() < 0 or scores.max() > 1):
        return True
    return scores.ndim == 2 and scores.shape[1] > 1 and bool((np.abs(scores.sum(1) - 1) > _ADDED_UP).any())


def probabilities_of(scores: np.ndarray, *, logits: bool) -> np.ndarray:
    """Probabilities of classes, float64 `[rows, classes]`; one score a row is that of class 1 of two.

    >>> probabilities_of(np.float32([0.0]), logits=True).tolist()
    [[0.5, 0.5]]
    """
    wide = np.asarray(scores, np.float64).reshape(len(scores), -1)
    if wide.shape[1] == 1:
        one = 1 / (1 + np.exp(-np.clip(wide, -700, 700))) if logits else wide
        return np.concatenate([1 - one, one], 1)
    if not logits:
        return wide
    raised = np.exp(wide - wide.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def checked_scores(found: Mapping[str, np.ndarray], name: str, whose: str, rows: int) -> np.ndarray:
    """The scores of a side.

    Raises:
        ModelError: if the output is missing, of another shape, or not finite; names the side.
    """
    if name not in found:
        raise ModelError(f"{whose} has no output {name!r}; it has {', '.join(found)}")
    scores = np.asarray(found[name]).astype(np.float64)
    if scores.ndim not in (1, 2) or len(scores) != rows:
        raise ModelError(f"output {name!r} of {whose} is {list(scores.shape)}, not [{rows}, classes]")
    broken = ~np.isfinite(scores.reshape(rows, -1)).all(1)
    if broken.any():
        raise ModelError(
            f"output {name!r} of {whose} is not finite in {int(broken.sum())} of {rows} rows, first in row "
            f"{int(broken.argmax())}"
        )
    return scores
