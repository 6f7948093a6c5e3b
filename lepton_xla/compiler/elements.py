"""Elements as plain bytes or words and back, bit for bit: for dtypes that zarr lacks, and for `gaps`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lepton_xla.dtypes import bits, is_integer, is_signed


def zarr_lacks(dtype: str) -> bool:
    """Tell whether zarr lacks the dtype, or would use a whole byte for a narrower element.

    >>> zarr_lacks("int4"), zarr_lacks("int8")
    (True, False)
    """
    if bits(dtype) < 8:
        return True
    try:
        return ts.dtype(dtype).name != dtype
    except (TypeError, ValueError):
        return True


def to_bytes(array: np.ndarray) -> np.ndarray:
    """Convert an array to flat bytes; elements narrower than a byte share bytes, the first in the low bits.

    >>> import ml_dtypes
    >>> flat = to_bytes(np.array([1, -1, 2], ml_dtypes.int4))
    >>> flat.nbytes, from_bytes(flat, (3,), "int4").tolist()
    (2, [1, -1, 2])
    """
    width = bits(array.dtype)
    flat = np.ascontiguousarray(array).reshape(-1)
    if width == 8:
        return flat.view(np.uint8)
    # Integers go through int8, because ml_dtypes leaves the unused bits of a byte unspecified.
    values = flat.astype(np.int8).view(np.uint8) if is_integer(array.dtype) else flat.view(np.uint8)
    per_byte = 8 // width
    joined = np.zeros(flat_bytes(array.shape, array.dtype.name), np.uint8)
    padded = np.zeros(joined.size * per_byte, np.uint8)
    padded[: flat.size] = values & ((1 << width) - 1)
    for place in range(per_byte):
        joined |= padded[place::per_byte] << (place * width)
    return joined


def flat_bytes(shape: Sequence[int], dtype: str) -> int:
    """Number of bytes that `to_bytes` gives for an array of this shape and dtype.

    >>> flat_bytes((3, 5), "int4")
    8
    """
    return -(-math.prod(shape) // (8 // bits(dtype)))


def from_bytes(flat: np.ndarray, shape: Sequence[int], dtype: str) -> np.ndarray:
    """The inverse of `to_bytes`.

    >>> import ml_dtypes
    >>> from_bytes(to_bytes(np.array([1, -1], ml_dtypes.int4)), (2,), "int4").tolist()
    [1, -1]
    """
    kind = np.dtype(dtype)
    width = bits(kind)
    if width == 8:
        return flat.view(kind).reshape(shape)
    per_byte, size = 8 // width, math.prod(shape)
    spread = np.empty(flat.size * per_byte, np.uint8)
    for place in range(per_byte):
        spread[place::per_byte] = (flat >> (place * width)) & ((1 << width) - 1)
    spread = spread[:size]
    if not is_integer(kind):
        return spread.view(kind).reshape(shape)
    if is_signed(kind):
        spread = (spread << (8 - width)).view(np.int8) >> (8 - width)
    return spread.astype(kind).reshape(shape)


def words_of(shape: Sequence[int], dtype: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of `to_words` of an array of this shape and dtype.

    >>> words_of((2, 3), "float32")
    ((2, 3), dtype('uint32'))
    """
    kind = np.dtype(dtype)
    if bits(kind) < 8:
        return (flat_bytes(shape, dtype),), np.dtype(np.uint8)
    width = min(kind.itemsize, 8)
    halves = (kind.itemsize // width,) if kind.itemsize > width or not shape else ()
    return (*shape, *halves), np.dtype(f"<u{width}")


def to_words(array: np.ndarray) -> np.ndarray:
    """Convert elements to little-endian unsigned integers with the same bits, in the array's shape.

    Elements narrower than a byte become flat bytes instead, as from `to_bytes`; elements of sixteen bytes become two
    words; a scalar gets one axis.

    >>> to_words(np.float32([1.0])).tolist() == np.float32([1.0]).view(np.uint32).tolist()
    True
    """
    shape, word = words_of(array.shape, array.dtype.name)
    if bits(array.dtype) < 8:
        return to_bytes(array)
    return np.ascontiguousarray(array).reshape(-1).view(f"u{word.itemsize}").astype(word, copy=False).reshape(shape)


def from_words(words: np.ndarray, shape: Sequence[int], dtype: str) -> np.ndarray:
    """The inverse of `to_words`.

    >>> from_words(to_words(np.float32([1.5])), (1,), "float32").tolist()
    [1.5]
    """
    kind = np.dtype(dtype)
    if bits(kind) < 8:
        return from_bytes(words, shape, dtype)
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    return native.reshape(-1).view(kind).reshape(shape)
