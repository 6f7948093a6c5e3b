"""The classification extension: the largest elements of each row, as text, in the place of the tensor.

Source: Triton's `docs/protocol/extension_classification.md`. An element is `value:index`; models have no labels here.
Its text calls the datatype STRING; what Triton sends, and clients read, is BYTES.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def classes_shape(shape: Sequence[int], count: int, *, batched: bool) -> tuple[int, ...]:
    """The shape of the text in the place of a tensor.

    Args:
        shape: the tensor's.
        count: how many of the largest elements are asked for; there may be fewer.
        batched: whether its first dimension counts rows, or all of it is one.

    >>> classes_shape((8, 10), 3, batched=True), classes_shape((10,), 3, batched=False)
    ((8, 3), (3,))
    """
    rows = tuple(shape[:1]) if batched else ()
    return (*rows, min(count, math.prod(shape[len(rows) :])))


def top_classes(rows: np.ndarray[Any, Any], count: int) -> Iterator[str]:
    """The `count` largest elements of each row, largest first; of equal ones the first, and NaN last.

    Args:
        rows: of any number of elements, `[row, element]`.
        count: how many, at most the number of elements.

    >>> list(top_classes(np.float32([[0.1, 0.7, 0.2]]), 2))
    ['0.7:1', '0.2:2']
    """
    wide = rows.dtype if rows.dtype.kind in "biu" else np.result_type(rows.dtype, np.float32)
    for row in rows.astype(wide, copy=False) if count else ():
        for index in _largest(row, count):
            yield f"{_text(row[index])}:{index}"


def _text(value: Any) -> str:
    # Of a NumPy scalar, that is the shortest text which is read back as this value of this type.
    return str(int(value)) if value.dtype.kind in "biu" else str(value)


def _largest(row: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    ranked = np.where(np.isnan(row), -np.inf, row) if row.dtype.kind == "f" else row
    size = ranked.size
    # Sorting a vocabulary for its five best is not worth it: take what reaches the last of them, and sort that.
    least = np.partition(ranked, size - count)[size - count]
    reach = np.flatnonzero(ranked >= least)
    # Ascending and stable from behind, then turned around: descending, and the first of equals first.
    order = np.argsort(ranked[reach][::-1], kind="stable")[::-1]
    return reach[reach.size - 1 - order][:count]
