"""The rule by which weights move towards others, in a server that adjusts a model and wherever updates are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lepton_xla.errors import InputError


def move_weights(weights: Mapping[str, Any], target: Mapping[str, Any], alpha: float) -> dict[str, np.ndarray]:
    """Move weights a part of the way: `weights + alpha (target - weights)`.

    Floats are computed in float64 and rounded once; 1 gives the target bit for bit. Other dtypes cannot move, so they
    must be equal.

    Args:
        weights: path -> array.
        target: the same paths, shapes and dtypes.
        alpha: the part, above 0 and at most 1.

    Returns:
        Path -> array, with the dtypes of `weights`.

    Raises:
        InputError: if alpha is outside (0, 1]; or a path, shape, dtype, or a value that cannot move differs, or a value
            is NaN; names the first.

    >>> from lepton_xla.adjustments import move_weights
    >>> move_weights({"w": np.float32([1.0, 2.0])}, {"w": np.float32([3.0, 2.0])}, 0.25)["w"].tolist()
    [1.5, 2.0]
    """
    if not 0 < alpha <= 1:
        raise InputError(f"alpha = {alpha}: expected a number above 0 and at most 1")
    for path in (*weights, *target):
        if path not in weights or path not in target:
            raise InputError(f"weight {path!r} is only in one of both")
    moved: dict[str, np.ndarray] = {}
    for path, value in weights.items():
        one, two = np.asarray(value), np.asarray(target[path])
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            raise InputError(
                f"weight {path!r} is {one.dtype}{list(one.shape)}, and is to be {two.dtype}{list(two.shape)}"
            )
        if not _is_float(one.dtype):
            if not np.array_equal(one, two):
                raise InputError(f"weight {path!r} is {one.dtype}, which cannot move in steps, and is to change")
            moved[path] = one
            continue
        start, end = one.astype(np.float64), two.astype(np.float64)
        if np.isnan(start).any() or np.isnan(end).any():
            raise InputError(f"weight {path!r} holds NaN")
        if alpha == 1:
            moved[path] = two
            continue
        with np.errstate(invalid="ignore"):
            between = start + alpha * (end - start)
        moved[path] = np.where(start == end, start, between).astype(one.dtype)  # infinities that are equal stay
    return moved


def _is_float(dtype: np.dtype[Any]) -> bool:
    try:
        return bool(ml_dtypes.finfo(dtype).bits)
    except ValueError:
        return False
