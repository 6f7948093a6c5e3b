"""Numbers in JSON: the `data` of a tensor, read and written a piece at a time.

A piece is what one call into the JSON library sees. Such a call keeps Python's interpreter to itself, on whatever
thread it runs, so a long array is worked through in pieces with a rest after each, in which the event loop goes on.
"""

from __future__ import annotations

import array
import functools
import math
import re
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol.badelement import describe
from lepton_xla.serve.protocol.datatypes import DATATYPES, Datatype

# Bytes of JSON in a piece: a tenth of a millisecond of parsing.
PIECE_BYTES = 1 << 16
_PIECE_ITEMS = 1 << 13
# Anything shorter and the thread that rests takes the interpreter back before another has woken up.
REST_S = 50e-6

# Bytes that are searched through at once: as long.
_SLICE_BYTES = 1 << 19

_ARRAY = re.compile(rb"\s*\[")
_SPACE = b" \t\r\n"
_NOTHING = _SPACE + b"[],"  # a flat list of nothing has no comma
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[],"))
_ELEMENTS_TO_ZEROS = bytes(each if each in b"[]," else ord("0") for each in range(256))
# Far more than a number of any datatype has digits, and than anybody indents.
_LONGEST_ELEMENT = 1 << 12


def read_data(
    text: bytes, shape: Sequence[int], datatype: Datatype, where: str, span: tuple[int, int] | None = None
) -> memoryview:
    """The elements of a JSON array, as C-order little-endian bytes.

    Args:
        text: holds the array; flat, or nested as `shape` is.
        shape: of the tensor.
        datatype: one that JSON can carry.
        where: what an error calls the tensor.
        span: where the array lies in `text`; all of it by default.

    Raises:
        HTTPError: 400 for what is no such array: elements of another type or out of its range, or another number or
            nesting of them.

    >>> from lepton_xla.serve.protocol.datatypes import datatype_of
    >>> read_data(b"[1, 2, 3]", [3], datatype_of("uint8"), "input 'x'").tolist()
    [1, 2, 3]
    """
    dtype, decoder = datatype.dtype, _decoder(datatype.name)
    assert dtype is not None
    count, (start, stop) = math.prod(shape), span or (0, len(text))
    outer = _ARRAY.match(text, start, stop)
    if outer is None:
        raise HTTPError(400, f"{where}: data is not a list")
    nested = text.find(b"[", outer.end(), stop) >= 0
    if not (_is_nested_as(text, start, stop, shape) if nested else text.find(b"]", start, stop) == stop - 1):
        raise HTTPError(400, f"{where}: data is neither flat nor nested as shape {list(shape)} is")
    # An element takes a byte of JSON at least, so that no shape makes this allocate more than came.
    if count > stop - start or (not count and text[start:stop].translate(None, _NOTHING if nested else _NOTHING[:-1])):
        raise HTTPError(400, f"{where}: shape {list(shape)} needs {count} elements, not these")
    piece, found, values = b"", 0, np.empty(count, dtype)
    try:
        for begin, end in _pieces(text, start, stop) if count else ():
            if end - begin > PIECE_BYTES + _LONGEST_ELEMENT:
                raise HTTPError(400, f"{where}: an element of data takes more than {_LONGEST_ELEMENT} bytes")
            piece = text[begin:end]
            if nested and _is_misplaced(piece):
                raise HTTPError(400, f"{where}: data is neither flat nor nested as shape {list(shape)} is")
            part = _convert(decoder.decode(b"[" + piece.replace(b"[", b" ").replace(b"]", b" ") + b"]"), dtype)
            if not len(part):
                raise HTTPError(400, f"{where}: an element is missing in data")
            if found + len(part) > count:
                raise HTTPError(400, f"{where}: shape {list(shape)} needs {count} elements, not {found + len(part)}")
            values[found : found + len(part)] = part
            found += len(part)
    except msgspec.DecodeError as error:
        why = describe(piece, datatype.element, found, shape if nested else None)
        raise HTTPError(400, f"{where}: data is not {datatype.name}{why}") from error
    except (FloatingPointError, OverflowError) as error:
        raise HTTPError(400, f"{where}: a number in data does not fit {datatype.name}") from error
    except RecursionError as error:
        raise HTTPError(400, f"{where}: data is nested too deeply") from error
    if found != count:
        raise HTTPError(400, f"{where}: shape {list(shape)} needs {count} elements, not {found}")
    return values.view(np.uint8).data


def write_data(values: np.ndarray[Any, Any], where: str) -> bytes:
    """A flat JSON array of numbers or booleans.

    Args:
        values: one-dimensional.
        where: what an error calls the tensor.

    Raises:
        HTTPError: 400 for NaN or infinity, which JSON has no way to write; the client has to ask for binary.

    >>> write_data(np.float32([0.5, 2.0]), "output 'y'")
    b'[0.5,2.0]'
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise HTTPError(400, f"{where} holds NaN or infinity, which JSON cannot carry; ask for binary_data")
    if values.size <= _PIECE_ITEMS:
        return msgspec.json.encode(values.tolist())
    pieces: list[bytes] = []
    for start, stop in slices(values.size, _PIECE_ITEMS):
        pieces.append(msgspec.json.encode(values[start:stop].tolist())[1:-1])
    return b"[" + b",".join(pieces) + b"]"


def _is_nested_as(text: bytes, start: int, stop: int, shape: Sequence[int]) -> bool:
    """Whether brackets and commas of an array are those of a nested list of this shape."""
    length = 0
    for size in reversed(shape):
        length = size * length + max(size - 1, 0) + 2
    # Compared before it is built: a shape is free to claim anything.
    if length > stop - start:
        return False
    parts = (text[start + a : start + b].translate(None, _NOT_STRUCTURE) for a, b in slices(stop - start))
    structure = b"".join(parts)
    if length != len(structure):
        return False
    expected = b""
    for size in reversed(shape):
        expected = b"[" + (expected + b",") * (size - 1) + (expected if size else b"") + b"]"
    return structure == expected


def _is_misplaced(piece: bytes) -> bool:
    """Whether an element stands right before an opening bracket, or behind a closing one."""
    marks = piece.translate(_ELEMENTS_TO_ZEROS, _SPACE)
    return b"0[" in marks or b"]0" in marks


def slices(size: int, step: int = _SLICE_BYTES) -> Iterator[tuple[int, int]]:
    """Cuts of something long, with a rest between two of them."""
    for start in range(0, size, step):
        if start:
            time.sleep(REST_S)
        yield start, min(start + step, size)


def _pieces(text: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where a JSON array may be cut at commas, into parts of about `PIECE_BYTES`."""
    begin = start
    while begin < stop:
        if begin > start:
            time.sleep(REST_S)
        end = text.find(b",", begin + PIECE_BYTES, stop)
        end = stop if end < 0 else end
        yield begin, end
        begin = end + 1


@functools.cache
def _decoder(datatype: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(types.GenericAlias(list, DATATYPES[datatype].element))


def _convert(values: list[Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if dtype.kind == "b":
        return np.array(values, dtype)
    # The standard library's arrays take a list in half the time of NumPy's.
    if dtype.kind != "f":
        return np.frombuffer(array.array(dtype.char, values), dtype)
    exact = np.frombuffer(array.array("d", values), np.float64)
    with np.errstate(over="raise"):
        return exact.astype(dtype)
