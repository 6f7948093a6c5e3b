"""Columns of a file to inputs of a model: dtype, shape, and the row that is to blame where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport] (with it NumPy knows bfloat16 and others by name)
import numpy as np

from lepton_xla.errors import InputError
from lepton_xla.program import TensorSpec
from lepton_xla.rows import row_symbol


def check_rows(inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
    """Check that a model takes and gives rows.

    Raises:
        InputError: if an input or an output has no row dimension.

    >>> check_rows({"x": TensorSpec(("batch", 4), "float32"), "t": TensorSpec((), "float32")}, {})
    Traceback (most recent call last):
    lepton_xla.errors.InputError: input 't' is float32[], one value for all rows; a file of rows cannot give it
    """
    symbol = row_symbol(inputs)
    if symbol is None:
        raise InputError("the model has no row dimension, so a file of rows cannot be split for it")
    for what, specs in (("input", inputs), ("output", outputs)):
        for name, spec in specs.items():
            if not spec.shape or spec.shape[0] != symbol:
                raise InputError(f"{what} {name!r} is {spec}, one value for all rows; a file of rows cannot give it")


def columns_of(inputs: Sequence[str], found: Sequence[str], renamed: Mapping[str, str], path: str) -> dict[str, str]:
    """Which column each input is read from.

    Args:
        inputs: the model's inputs.
        found: the file's columns.
        renamed: column by input, where they have different names.
        path: the file, for errors.

    Raises:
        InputError: for an unknown input, or a column that is missing.

    >>> columns_of(["x"], ["id", "pixels"], {"x": "pixels"}, "rows.parquet")
    {'x': 'pixels'}
    """
    for name in renamed:
        if name not in inputs:
            raise InputError(f"the model has no input {name!r}; it takes {', '.join(map(repr, inputs))}")
    taken = {name: renamed.get(name, name) for name in inputs}
    for name, column in taken.items():
        if column not in found:
            has = ", ".join(map(repr, found))[:300] or "none"
            raise InputError(f"{path} has no column {column!r} for the input {name!r}; its columns: {has}")
    return taken


def as_input(values: Any, spec: TensorSpec, where: Callable[[int], str]) -> np.ndarray:
    """Values of a column as an input of the model.

    Args:
        values: an array, or a list of what JSON holds; one entry a row.
        spec: what the model takes.
        where: how messages call the n-th of these rows.

    Returns:
        An array of the model's dtype. Rows may be flat: their values then take the input's shape in row-major order.

    Raises:
        InputError: for the first row that does not fit.

    >>> as_input([[1, 2], [3, 4]], TensorSpec(("batch", 2), "float32"), lambda row: f"line {row + 1}")
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    >>> as_input([[1, 2], [3, 0.5]], TensorSpec(("batch", 2), "int32"), lambda row: f"line {row + 1}")
    Traceback (most recent call last):
    lepton_xla.errors.InputError: line 2: 0.5 is not an int32; the model takes int32[batch, 2]
    """
    try:
        return _as_input(values, spec)
    except InputError as error:
        for row in range(len(values)):
            try:
                _as_input(values[row : row + 1], spec)
            except InputError as of_row:
                raise InputError(f"{where(row)}: {of_row}") from None
        row = next((row for row in range(1, len(values)) if np.shape(values[row]) != np.shape(values[0])), 0)
        raise InputError(f"{where(row)}: {error}; rows before have another shape: pad them to one") from None


def _as_input(values: Any, spec: TensorSpec) -> np.ndarray:
    dtype, shape = np.dtype(spec.dtype), spec.shape[1:]
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise InputError(f"lists of different lengths; the model takes {spec}") from None
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == dtype.itemsize:
        array = array.view(dtype)  # .npy cannot name bfloat16 and fp8
    elif array.dtype.kind not in "biuf":
        raise InputError(f"{_shown(values)} is not made of numbers; the model takes {spec}")
    fixed = [size for size in shape if isinstance(size, int)]
    if len(array.shape) == 2 and len(shape) != 1 and len(fixed) == len(shape) and array.shape[1] == np.prod(fixed):
        array = array.reshape(len(array), *fixed)
    if array.ndim != len(spec.shape) or any(
        isinstance(size, int) and size != got for size, got in zip(shape, array.shape[1:], strict=True)
    ):
        raise InputError(f"a row of shape {list(array.shape[1:])}; the model takes {spec}")
    if array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):
        converted = array.astype(dtype)
        if dtype.kind in "biu":
            lost = converted.astype(array.dtype) != array
            if array.dtype.kind in "iu" and dtype.kind in "iu":  # a sign that wraps around both ways
                lost |= (converted < 0) != (array < 0)
        else:
            lost = ~np.isfinite(converted.astype(np.float64)) & np.isfinite(array.astype(np.float64))
    if lost.any():
        raise InputError(f"{array[lost].flat[0]} is not {_article(dtype)}; the model takes {spec}")
    return converted


def _article(dtype: np.dtype[Any]) -> str:
    return f"{'an' if dtype.name[0] in 'aeiou' else 'a'} {dtype.name}"


def _shown(values: Any) -> str:
    text = repr(values[0] if len(values) else values)
    return text if len(text) <= 60 else text[:60] + "..."
