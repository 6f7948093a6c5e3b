"""Kinds of dtypes, those of ml_dtypes included, which NumPy knows by name once this is imported."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def is_integer(dtype: Any) -> bool:
    """Whether elements are integers, signed or not; booleans are none.

    >>> is_integer("int4"), is_integer("bool")
    (True, False)
    """
    return _integers(np.dtype(dtype)) is not None


def is_signed(dtype: Any) -> bool:
    """Whether elements are signed integers.

    >>> is_signed("int4"), is_signed("uint4")
    (True, False)
    """
    found = _integers(np.dtype(dtype))
    return found is not None and int(found.min) < 0


def is_floating(dtype: Any) -> bool:
    """Whether elements are real floating-point numbers.

    >>> is_floating("bfloat16"), is_floating("complex64")
    (True, False)
    """
    kind = np.dtype(dtype)
    return kind.kind == "f" or (kind.kind == "V" and _floats(kind) is not None)


def is_inexact(dtype: Any) -> bool:
    """Whether elements are floating-point numbers, real or complex.

    >>> is_inexact("float8_e4m3fn"), is_inexact("complex64"), is_inexact("int8")
    (True, True, False)
    """
    return np.dtype(dtype).kind == "c" or is_floating(dtype)


def bits(dtype: Any) -> int:
    """Bits of one element.

    >>> bits("int4"), bits("float4_e2m1fn"), bits("bool"), bits("complex64")
    (4, 4, 8, 64)
    """
    kind = np.dtype(dtype)
    found = _integers(kind) or (_floats(kind) if kind.kind in "fV" else None)
    return kind.itemsize * 8 if found is None else int(found.bits)


def _integers(kind: np.dtype[Any]) -> Any:
    """The limits of a dtype of integers; None of another."""
    try:
        return ml_dtypes.iinfo(kind) if kind.kind in "iuV" else None
    except ValueError:
        return None


def _floats(kind: np.dtype[Any]) -> Any:
    """The limits of a dtype of floats; None of another."""
    try:
        return ml_dtypes.finfo(kind)
    except ValueError:
        return None


def classes_of(rows: np.ndarray) -> np.ndarray:
    """The class that each row names by its largest element along the last axis; -1, which is no class, beside a NaN.

    >>> classes_of(np.float32([[0.1, 0.9], [np.nan, 0.2]])).tolist()
    [1, -1]
    """
    found = rows.argmax(axis=-1)
    return np.where(np.isnan(rows).any(axis=-1), -1, found) if is_floating(rows.dtype) else found
