"""Infer requests of what a model's converter takes: texts, files and words as BYTES, beside ordinary tensors.

In JSON, elements are strings: texts and words as they are, files in base64. In binary, each element is behind its
length. A body without a JSON part is one value. Limits are checked before anything is converted.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from typing import Any, NamedTuple

import msgspec
import numpy as np

from lepton_xla.conversion import Images
from lepton_xla.errors import InputError
from lepton_xla.serve.errors import HTTPError, shortened
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol.datatypes import split_elements
from lepton_xla.serve.protocol.request import (
    InputHead,
    RequestHead,
    binary_size,
    check_depth,
    check_input,
    json_data,
)
from lepton_xla.serve.protocol.signature import Signature, Tensor

# Strings that the JSON part may have for each tensor, beside its elements: keys, values and names.
_STRINGS_PER_TENSOR = 32
# Images of a model's most pixels that one request may bring. Decoding one may take a quarter of a second.
_IMAGES = 16

_DECODER = msgspec.json.Decoder(RequestHead)
_STRINGS = msgspec.json.Decoder(list[str])


class Parsed(NamedTuple):
    """The JSON part, and what follows it."""

    head: RequestHead
    tail: memoryview


def parse(body: bytes, head_bytes: int | None, limits: Limits, max_rows: int) -> Parsed:
    """Parse the JSON part; `data` stays unread.

    Raises:
        HTTPError: 400 for what is no such object, or has too many strings.
    """
    size = len(body) if head_bytes is None else head_bytes
    if size > len(body):
        raise HTTPError(400, f"Inference-Header-Content-Length is {size}, but the body has {len(body)} bytes")
    head = body[:size]
    most = 2 * (max_rows * limits.max_tensors + _STRINGS_PER_TENSOR * limits.max_tensors)
    if head.count(b'"') > most or head.count(b":") > most:
        raise HTTPError(400, f"the JSON part has more than {most // 2} strings")
    check_depth(head, limits.max_json_depth)
    try:
        parsed = _DECODER.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPError(400, f"the request is not a valid inference request: {error}") from error
    named = len(parsed.inputs) + len(parsed.outputs or ())
    if named > limits.max_tensors:
        raise HTTPError(400, f"the request names {named} tensors; it may name {limits.max_tensors}")
    return Parsed(parsed, memoryview(body)[size:])


def only_input(signature: Signature, body: bytes) -> dict[str, Any]:
    """A body without a JSON part: one value of the only input.

    Raises:
        HTTPError: 400 if there are several inputs.
    """
    sent = signature.sent
    if len(sent) != 1:
        raise HTTPError(400, f"a raw request needs a model with one input; this one has {len(sent)}")
    (tensor,) = sent
    if len(tensor.shape) != 1:
        raise HTTPError(400, f"input {tensor.name!r} has {len(tensor.shape)} dimensions; send a JSON part")
    return {tensor.name: [body]}


def read(signature: Signature, parsed: Parsed, limits: Limits, max_rows: int) -> dict[str, Any]:
    """The values of each input, unconverted.

    Raises:
        HTTPError: 400 for anything malformed or that does not fit the model, 413 for more than may be converted.
    """
    assert signature.converter is not None
    tensors = {tensor.name: tensor for tensor in signature.sent}
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    at = taken = 0
    for given in parsed.head.inputs:
        tensor = tensors.get(given.name)
        if tensor is None:
            raise HTTPError(400, f"the model has no input {shortened(given.name)}; it has {_names(tensors)}")
        if given.name in found:
            raise HTTPError(400, f"input {given.name!r} is given twice")
        count = check_input(given, tensor, sizes)
        rows = given.shape[0] if given.shape else 1
        if rows > max_rows:
            raise HTTPError(413, f"input {given.name!r} has {rows} rows; a request may bring {max_rows}")
        if count > limits.max_elements:
            raise HTTPError(400, f"input {given.name!r} has {count} elements; it may have {limits.max_elements}")
        size = binary_size(given, count, tensor.datatype)
        if size is not None and at + size > len(parsed.tail):
            raise HTTPError(400, f"input {given.name!r}: {size} bytes should follow, and {len(parsed.tail) - at} do")
        data = None if size is None else parsed.tail[at : at + size]
        at += size or 0
        if tensor.datatype.dtype is not None:
            plain = json_data(given, tensor, b"", {}) if data is None else data
            found[given.name] = np.frombuffer(plain, tensor.dtype).reshape(given.shape)
            continue
        taken += count * signature.converter.row_bytes(given.name)
        if taken > limits.max_body_bytes:
            raise HTTPError(413, f"the inputs become {taken} bytes, more than {limits.max_body_bytes}; send fewer rows")
        elements = _strings(signature, given, count) if data is None else _split(given.name, data, count)
        values = np.empty(count, object)
        values[:] = elements
        found[given.name] = values.reshape(given.shape)
    missing = [name for name in tensors if name not in found]
    if missing:
        raise HTTPError(400, f"input {missing[0]!r} is missing; the model needs {_names(tensors)}")
    if at != len(parsed.tail):
        raise HTTPError(400, f"the binary inputs need {at} bytes after the JSON part, but {len(parsed.tail)} follow")
    return found


def converted(signature: Signature, given: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, int]]:
    """The model's inputs, in order, and the sizes of their symbols.

    Raises:
        HTTPError: 400 for a value that cannot be converted.
    """
    assert signature.converter is not None
    try:
        made = signature.converter(given, images=_IMAGES)
    except InputError as error:
        raise HTTPError(400, str(error)) from error
    sizes: dict[str, int] = {}
    arrays: list[np.ndarray] = []
    for tensor in signature.inputs:
        array = np.ascontiguousarray(made[tensor.name], tensor.dtype)
        check_input(InputHead(tensor.name, list(array.shape), tensor.datatype.name), tensor, sizes)
        arrays.append(array)
    return arrays, sizes


def _strings(signature: Signature, given: InputHead, count: int) -> list[str] | list[bytes]:
    assert signature.converter is not None
    where = f"input {given.name!r}"
    assert given.data is not msgspec.UNSET
    data = bytes(given.data)
    try:
        found = _STRINGS.decode(data)
    except msgspec.ValidationError:
        try:
            found = _flat(msgspec.json.decode(data), given.shape)
        except (msgspec.DecodeError, TypeError, ValueError) as error:
            raise HTTPError(400, f"{where}: data is not strings, flat or nested as shape {given.shape} is") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPError(400, f"{where}: data is not strings: {error}") from error
    if len(found) != count:
        raise HTTPError(400, f"{where}: shape {given.shape} needs {count} elements, not {len(found)}")
    if not isinstance(signature.converter.conversion.inputs[given.name], Images):
        return found
    try:
        return [base64.b64decode(each, validate=True) for each in found]
    except (binascii.Error, ValueError) as error:
        raise HTTPError(400, f"{where}: a file in JSON is written in base64, and this is not: {error}") from error


def _flat(values: Any, shape: list[int]) -> list[str]:
    """The strings of nested lists of this shape; raises `TypeError` or `ValueError` for others."""
    found: list[Any] = [values]
    for size in shape:  # not by NumPy, which would repeat what is too short
        if not all(isinstance(each, list) and len(each) == size for each in found):
            raise ValueError
        found = [item for each in found for item in each]
    if not all(isinstance(each, str) for each in found):
        raise TypeError
    return found


def _split(name: str, data: memoryview, count: int) -> list[bytes]:
    """The elements of a BYTES tensor, each behind its length."""
    try:
        items = list(itertools.islice(split_elements(data), count + 1))  # no more than it takes to tell
    except ValueError as error:
        raise HTTPError(400, f"input {name!r}: its bytes are cut short") from error
    if len(items) != count:
        raise HTTPError(400, f"input {name!r}: its bytes are not {count} elements")
    return items


def _names(table: dict[str, Tensor]) -> str:
    return ", ".join(repr(name) for name in table)
