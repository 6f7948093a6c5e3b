"""The JSON part of an infer request: its types, and the checks of one input against what the model takes.

Source: Open Inference Protocol v2 (`specification/protocol/inference_rest.md`, "Inference Request JSON Object").
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import numpy as np

from lepton_xla.serve.errors import HTTPError, shortened
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol.datatypes import DATATYPES, Datatype
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES, read_data, slices
from lepton_xla.serve.protocol.outline import check_members, check_size, outline_of
from lepton_xla.serve.protocol.signature import Tensor

type Arrays = dict[bytes, tuple[int, int]]
type Parameters = dict[str, bool | int | float | str | None]

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")

_BACKSLASH = ord("\\")
_LONGEST_MARK = 64

type Shape = list[Annotated[int, msgspec.Meta(extra_json_schema={"minimum": 0})]]
type Data = Annotated[
    msgspec.Raw | msgspec.UnsetType,
    msgspec.Meta(
        description="Elements in row-major order, flat or nested as the shape is. Exactly one of this and the "
        "parameter `binary_data_size` is given.",
        extra_json_schema={"type": "array"},
    ),
]


class InputHead(msgspec.Struct, frozen=True):
    """One input as sent."""

    name: str
    shape: Shape
    datatype: str
    parameters: Parameters | None = None
    data: Data = msgspec.UNSET


class OutputHead(msgspec.Struct, frozen=True):
    """One output as asked for; its parameters may be `binary_data` and `classification`."""

    name: str
    parameters: Parameters | None = None


class RequestHead(msgspec.Struct, frozen=True):
    """The whole JSON part.

    Parameters that mean something are `binary_data_output` (whether outputs go out as binary unless they say
    otherwise), `timeout` (microseconds until nobody wants the answer any more) and `priority` (1 is the highest, 0 the
    default).
    """

    inputs: list[InputHead]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[OutputHead] | None = None


_DECODER = msgspec.json.Decoder(RequestHead)
_ANYTHING = msgspec.json.Decoder(msgspec.Raw)


def parse_head(head: bytes, limits: Limits) -> tuple[RequestHead, Arrays]:
    """Parse the JSON part; `data` stays unread.

    Returns:
        What it says; and where in `head` the data lies that was cut out of a long one, by what stands in its place.

    Raises:
        HTTPError: 400 for what is no such object, nested too deeply, or too much beside data.
    """
    arrays: Arrays = {}
    if len(head) > PIECE_BYTES:
        head, arrays = outline_of(head, limits.max_tensors)
    check_members(head, limits.max_tensors)
    check_depth(head, limits.max_json_depth)
    try:
        return _DECODER.decode(head), arrays
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPError(400, f"the request is not a valid inference request: {error}") from error
    except RecursionError as error:
        raise HTTPError(400, "the JSON part is nested too deeply") from error


def check_unread(head: bytes, arrays: Arrays, limits: Limits) -> None:
    """Checks the arrays that were cut out and belong to no tensor: they are ignored, but must be JSON, and few.

    Raises:
        HTTPError: 400.
    """
    check_size(sum(stop - start for start, stop in arrays.values()), limits.max_tensors)
    for start, stop in arrays.values():
        check_depth(head[start:stop], limits.max_json_depth)
        try:
            _ANYTHING.decode(head[start:stop])
        except msgspec.DecodeError as error:
            raise HTTPError(400, f"the request is not a valid inference request: {error}") from error


def check_depth(head: bytes, limit: int) -> None:
    """Refuse JSON nested more than `limit` deep, without recursion.

    Raises:
        HTTPError: 400.

    >>> check_depth(b"[[1]]", limit=2)
    >>> check_depth(b"[[[1]]]", limit=2)
    Traceback (most recent call last):
    lepton_xla.serve.errors.HTTPError: the JSON part is nested more than 2 deep
    """
    size = len(head)
    if sum(head.count(b"[", start, stop) + head.count(b"{", start, stop) for start, stop in slices(size)) <= limit:
        return
    depth, cut, quoted = 0, 0, 0
    for _, stop in slices(size):
        # Never between a backslash and what it escapes.
        while stop < size and head[stop - 1] == _BACKSLASH:
            stop += 1
        part = head[cut:stop]
        cut = max(cut, stop)
        if quoted or b'"' in part:
            parts = part.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
            part = b"".join(parts[quoted::2])
            quoted = (quoted + len(parts) - 1) % 2
        brackets = np.frombuffer(part.translate(_BRACES_TO_BRACKETS, _NOT_BRACKETS), np.uint8)
        if len(brackets):
            levels = depth + np.cumsum(np.where(brackets == ord("["), 1, -1))
            if levels.max() > limit:
                raise HTTPError(400, f"the JSON part is nested more than {limit} deep")
            depth = levels[-1]


def check_reserved(parameters: Parameters | None) -> None:
    """Refuse parameters of the request that mean something to the protocol and nothing here."""
    for name, value in (parameters or {}).items():
        if name.startswith("triton_") or name == "headers":
            raise HTTPError(400, f"parameter {shortened(name)} is reserved")
        # A sequence that is said not to be one is what some clients send with every request.
        if name.startswith("sequence_") and value:
            raise HTTPError(
                400, f"parameter {shortened(name)}: models keep no state, so there are no sequences of requests"
            )


def check_tensor_parameters(parameters: Parameters | None, where: str) -> None:
    """Refuse tensor parameters of extensions that are not offered."""
    for name in parameters or ():
        if name.startswith("shared_memory_"):
            raise HTTPError(400, f"{where}: shared memory is not supported; send tensors in the body")


def flag(parameters: Parameters | None, name: str, where: str, *, default: bool) -> bool:
    """A parameter that is true or false."""
    value = default if parameters is None else parameters.get(name, default)
    if not isinstance(value, bool):
        raise HTTPError(400, f"{where}: parameter {name!r} must be true or false")
    return value


def number(parameters: Parameters | None, name: str, where: str) -> int:
    """A parameter that is a whole number; 0 where it is not given."""
    value = 0 if parameters is None else parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**64:
        raise HTTPError(400, f"{where}: parameter {name!r} must be a whole number from 0 to 2**64 - 1")
    return value


def check_input(given: InputHead, tensor: Tensor, sizes: dict[str, int]) -> int:
    """Check datatype and shape, notes the sizes of symbols, and gives the number of elements."""
    where = f"input {tensor.name!r}"
    if given.datatype != tensor.datatype.name:
        known = "" if given.datatype in DATATYPES else ", which is no datatype of the protocol"
        raise HTTPError(
            400, f"{where}: datatype is {shortened(given.datatype)}{known}; the model takes {tensor.datatype.name}"
        )
    check_tensor_parameters(given.parameters, where)
    if len(given.shape) != len(tensor.shape):
        rank, shape = len(given.shape), shortened(given.shape)
        raise HTTPError(400, f"{where}: shape {shape} has rank {rank}, not {len(tensor.shape)}")
    for axis, (size, dim) in enumerate(zip(given.shape, tensor.shape, strict=True)):
        if not 0 <= size < 2**63:
            raise HTTPError(400, f"{where}: dimension {axis} is {size}, which is no size")
        if isinstance(dim, str):
            if sizes.setdefault(dim, size) != size:
                raise HTTPError(400, f"{where}: {dim!r} is {size}, but {sizes[dim]} in another dimension")
        elif size != dim:
            raise HTTPError(400, f"{where}: dimension {axis} is {size}; the model takes {dim}")
    return math.prod(given.shape)


def binary_size(given: InputHead, count: int, datatype: Datatype) -> int | None:
    """Bytes this input has in the binary tail, or None if its data is in the JSON.

    Those of BYTES depend on the elements, and are not held against their number.
    """
    where = f"input {given.name!r}"
    size = None if given.parameters is None else given.parameters.get("binary_data_size")
    # KServe writes null where it has none.
    no_data = given.data is msgspec.UNSET or (len(given.data) == 4 and bytes(given.data) == b"null")
    if size is None:
        if no_data:
            raise HTTPError(400, f"{where}: neither data nor binary_data_size is given")
        return None
    if not no_data:
        raise HTTPError(400, f"{where}: both data and binary_data_size are given")
    if type(size) is not int or size < 0:
        raise HTTPError(400, f"{where}: binary_data_size must be a whole number, not {shortened(size)}")
    if datatype.dtype is not None and size != count * datatype.item_bytes:
        raise HTTPError(
            400,
            f"{where}: binary_data_size is {size}, but {count} elements of {datatype.name} "
            f"are {count * datatype.item_bytes} bytes",
        )
    return size


def json_data(given: InputHead, tensor: Tensor, head: bytes, arrays: Arrays) -> memoryview:
    """The `data` of an input as C-order little-endian bytes.

    Args:
        given: the input; checked.
        tensor: what the model takes.
        head: the JSON part that it came in.
        arrays: as of `parse_head`; the one that is read is taken out.
    """
    where = f"input {given.name!r}"
    if tensor.datatype.element is None:
        raise HTTPError(400, f"{where}: {tensor.datatype.name} cannot be sent as JSON; use binary_data_size")
    assert given.data is not msgspec.UNSET
    span = arrays.pop(bytes(given.data), None) if arrays and len(given.data) < _LONGEST_MARK else None
    if span is not None:
        return read_data(head, given.shape, tensor.datatype, where, span)
    return read_data(bytes(given.data), given.shape, tensor.datatype, where)
