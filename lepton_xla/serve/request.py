"""The JSON part of an infer request: its types, and the checks of one input against what the model takes.

Source: Open Inference Protocol v2 (`specification/protocol/inference_rest.md`, "Inference Request JSON Object").
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import msgspec
import numpy as np

from lepton_xla.serve.datatypes import DATATYPES, Datatype
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.signature import Tensor

type Parameters = dict[str, bool | int | float | str | None]

_NESTED = re.compile(rb"\s*\[\s*\[")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")

_DEPTH_CHUNK = 1 << 16

# msgspec has no optional Raw.
_NO_DATA = msgspec.Raw(b"")


class InputHead(msgspec.Struct, frozen=True):
    """One input as sent."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: msgspec.Raw = _NO_DATA


class OutputHead(msgspec.Struct, frozen=True):
    """One output as asked for."""

    name: str
    parameters: Parameters = {}


class RequestHead(msgspec.Struct, frozen=True):
    """The whole JSON part."""

    inputs: list[InputHead]
    id: str | None = None
    parameters: Parameters = {}
    outputs: list[OutputHead] | None = None


_DECODER = msgspec.json.Decoder(RequestHead)


def parse_head(head: bytes, max_depth: int) -> RequestHead:
    """Parses the JSON part; `data` stays unread.

    Raises:
        RefusedError: 400 for what is no such object, or nested too deeply.
    """
    check_depth(head, max_depth)
    try:
        return _DECODER.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(400, f"the request is not a valid inference request: {error}") from error
    except RecursionError as error:
        raise RefusedError(400, "the JSON part is nested too deeply") from error


def check_depth(head: bytes, limit: int) -> None:
    """Refuses JSON nested more than `limit` deep, without recursion.

    Raises:
        RefusedError: 400.
    """
    if head.count(b"[") + head.count(b"{") <= limit:
        return
    brackets = np.frombuffer(_STRING.sub(b"", head).translate(_BRACES_TO_BRACKETS, _NOT_BRACKETS), np.uint8)
    depth = 0
    for start in range(0, len(brackets), _DEPTH_CHUNK):
        levels = depth + np.cumsum(np.where(brackets[start : start + _DEPTH_CHUNK] == ord("["), 1, -1))
        if levels.max() > limit:
            raise RefusedError(400, f"the JSON part is nested more than {limit} deep")
        depth = levels[-1]


def refuse_reserved(parameters: Parameters) -> None:
    """Refuses request parameters that belong to Triton."""
    for name in parameters:
        if name.startswith("triton_"):
            raise RefusedError(400, f"parameter {name!r} is reserved")


def refuse_extensions(parameters: Parameters, where: str) -> None:
    """Refuses tensor parameters of extensions that are not offered."""
    for name in parameters:
        if name.startswith("shared_memory_"):
            raise RefusedError(400, f"{where}: shared memory is not supported")
        if name == "classification":
            raise RefusedError(400, f"{where}: classification is not supported")


def flag(parameters: Parameters, name: str, where: str, *, default: bool) -> bool:
    """A parameter that is true or false."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RefusedError(400, f"{where}: parameter {name!r} must be true or false")
    return value


def check_input(given: InputHead, tensor: Tensor, sizes: dict[str, int]) -> int:
    """Checks datatype and shape, notes the sizes of symbols, and gives the number of elements."""
    where = f"input {given.name!r}"
    if given.datatype != tensor.datatype.name:
        known = "" if given.datatype in DATATYPES else ", which is no datatype of the protocol"
        raise RefusedError(
            400, f"{where}: datatype is {given.datatype!r}{known}; the model takes {tensor.datatype.name}"
        )
    refuse_extensions(given.parameters, where)
    if len(given.shape) != len(tensor.shape):
        raise RefusedError(400, f"{where}: shape {given.shape} has rank {len(given.shape)}, not {len(tensor.shape)}")
    for axis, (size, dim) in enumerate(zip(given.shape, tensor.shape, strict=True)):
        if not 0 <= size < 2**63:
            raise RefusedError(400, f"{where}: dimension {axis} is {size}, which is no size")
        if isinstance(dim, str):
            if sizes.setdefault(dim, size) != size:
                raise RefusedError(400, f"{where}: {dim!r} is {size}, but {sizes[dim]} in another dimension")
        elif size != dim:
            raise RefusedError(400, f"{where}: dimension {axis} is {size}; the model takes {dim}")
    return math.prod(given.shape)


def binary_size(given: InputHead, count: int, datatype: Datatype) -> int | None:
    """Bytes this input has in the binary tail, or None if its data is in the JSON."""
    where = f"input {given.name!r}"
    size = given.parameters.get("binary_data_size")
    if size is None:
        if not len(given.data):
            raise RefusedError(400, f"{where}: neither data nor binary_data_size is given")
        return None
    if len(given.data):
        raise RefusedError(400, f"{where}: both data and binary_data_size are given")
    if type(size) is not int or size < 0:
        raise RefusedError(400, f"{where}: binary_data_size must be a whole number, not {size!r}")
    if size != count * datatype.item_bytes:
        raise RefusedError(
            400,
            f"{where}: binary_data_size is {size}, but {count} elements of {datatype.name} "
            f"are {count * datatype.item_bytes} bytes",
        )
    return size


@functools.lru_cache(maxsize=128)
def _data_decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    kind: Any = DATATYPES[datatype].element
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def json_data(given: InputHead, count: int, tensor: Tensor) -> bytes:
    """The `data` of an input, flat or nested as its shape is, as C-order bytes."""
    where = f"input {given.name!r}"
    datatype = tensor.datatype
    if datatype.element is None:
        raise RefusedError(400, f"{where}: {datatype.name} cannot be sent as JSON; use binary_data_size")
    nested = len(given.shape) > 1 and _NESTED.match(given.data) is not None
    try:
        values = _data_decoder(datatype.name, len(given.shape) if nested else 1).decode(given.data)
        with np.errstate(over="raise"):
            array = np.asarray(values, dtype=tensor.dtype)
    except msgspec.DecodeError as error:
        raise RefusedError(400, f"{where}: data is not {datatype.name}: {error}") from error
    except (FloatingPointError, OverflowError) as error:
        raise RefusedError(400, f"{where}: a number in data does not fit {datatype.name}") from error
    except ValueError as error:
        raise RefusedError(400, f"{where}: data is a nested list whose lengths differ") from error
    except RecursionError as error:
        raise RefusedError(400, f"{where}: data is nested too deeply") from error
    if array.size != count or (nested and list(array.shape) != given.shape):
        raise RefusedError(400, f"{where}: shape {given.shape} needs {count} elements, data has {array.size}")
    return array.tobytes()
