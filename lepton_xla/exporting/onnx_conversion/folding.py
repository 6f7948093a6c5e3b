"""Computes with NumPy what depends on no input: shapes, indices, and integer weights that are unpacked.

Floats stay in the graph, so that weights remain as small as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport] (NumPy's names of 4-bit integers)
import numpy as np

from lepton_xla.compiler.operations import Operation

# Of what is not smaller than its operands, this many elements may be made.
_MOST = 4096
_COMPARISONS = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip


def fold(operation: Operation, operands: Sequence[np.ndarray]) -> np.ndarray | None:
    """The only result of an operation on integers; None if it is not to be computed here."""
    rule = _RULES.get(operation.name.partition(".")[2])
    if rule is None or len(operation.types) != 1:
        return None
    dtype = np.dtype(operation.types[0].dtype)
    if is_float(dtype) and not all(array.dtype == bool or array.size <= 1 for array in operands):
        return None
    if any(is_float(array.dtype) and array.size > 1 for array in operands):
        return None
    if "broadcast" not in operation.name and None not in operation.types[0].shape:
        made = int(np.prod(operation.types[0].sizes, dtype=np.int64))
        if made > max(_MOST, 2 * sum(array.size for array in operands)):
            return None
    with np.errstate(all="ignore"):
        return np.asarray(rule(operation, *operands)).astype(dtype, copy=False)


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is a float, those that NumPy does not know included."""
    return dtype.kind == "f" or "float" in dtype.name


def _shift_right(operation: Operation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if operation.name.endswith("logical"):
        unsigned = np.dtype(f"u{first.dtype.name.removeprefix('u')}")
        return (first.view(unsigned) >> second.view(unsigned)).view(first.dtype)
    return first >> second


def _broadcast(operation: Operation, array: np.ndarray, *shape: np.ndarray) -> np.ndarray:
    sizes = tuple(shape[0].tolist()) if shape else operation.types[0].sizes
    wide = np.ones(len(sizes), int)
    places = operation.attributes["broadcast_dimensions"]
    wide[list(places)] = array.shape
    return np.broadcast_to(array.reshape(wide), sizes)


def _slice(operation: Operation, array: np.ndarray) -> np.ndarray:
    kept = zip(
        *(operation.attributes[f"{name}"] for name in ("start_indices", "limit_indices", "strides")), strict=True
    )
    return array[tuple(slice(*each) for each in kept)]


def _dynamic_slice(operation: Operation, array: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    sizes = operation.attributes["slice_sizes"]
    first = np.clip([int(start) for start in starts], 0, np.subtract(array.shape, sizes))
    return array[tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))]


def _iota(operation: Operation) -> np.ndarray:
    shape, axis = operation.types[0].sizes, operation.attributes["iota_dimension"]
    wide = [1] * len(shape)
    wide[axis] = -1
    return np.broadcast_to(np.arange(shape[axis]).reshape(wide), shape)


def _bitcast(operation: Operation, array: np.ndarray) -> np.ndarray:
    kind = operation.types[0].dtype
    if kind not in ("int4", "uint4", "int2", "uint2"):
        return np.ascontiguousarray(array).view(kind).reshape(operation.types[0].sizes)
    bits = int(kind[-1])
    parts = np.stack([array.view(np.uint8) >> shift & (2**bits - 1) for shift in range(0, 8, bits)], axis=-1)
    signed = parts.astype(np.int8)
    return np.where(signed >= 2 ** (bits - 1), signed - 2**bits, signed) if kind.startswith("i") else signed


def _of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *operands: function(*operands)


_RULES: dict[str, Callable[..., Any]] = {
    "add": _of(np.add),
    "subtract": _of(np.subtract),
    "multiply": _of(np.multiply),
    "maximum": _of(np.maximum),
    "minimum": _of(np.minimum),
    "negate": _of(np.negative),
    "abs": _of(np.abs),
    "and": _of(np.bitwise_and),
    "or": _of(np.bitwise_or),
    "xor": _of(np.bitwise_xor),
    "not": _of(np.invert),
    "shift_left": _of(np.left_shift),
    "shift_right_logical": _shift_right,
    "shift_right_arithmetic": _shift_right,
    "compare": lambda op, first, second: _COMPARISONS[op.attributes["comparison_direction"]](first, second),
    "select": _of(np.where),
    "clamp": _of(lambda low, array, high: np.clip(array, low, high)),
    "convert": _of(lambda array: array),
    "reshape": lambda op, array: array.reshape(op.types[0].shape),
    "dynamic_reshape": _of(lambda array, shape: array.reshape(shape.tolist())),
    "transpose": lambda op, array: array.transpose(op.attributes["permutation"]),
    "concatenate": lambda op, *arrays: np.concatenate(arrays, op.attributes["dimension"]),
    "broadcast_in_dim": _broadcast,
    "dynamic_broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "iota": _iota,
    "bitcast_convert": _bitcast,
}
