"""The client's half of the wire: arrays to an infer request, an infer answer to arrays.

Sources: Open Inference Protocol v2 (`specification/protocol/inference_rest.md`) and Triton's binary tensor data
extension (`docs/protocol/extension_binary_data.md`), as in `wire.py`, which is the server's half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_xla.errors import InputError, ServeError
from lepton_xla.serve.protocol.datatypes import DATATYPES, datatype_of, join_elements, split_elements


class _OutputHead(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _AnswerHead(msgspec.Struct, frozen=True):
    outputs: list[_OutputHead]


_DECODER = msgspec.json.Decoder(_AnswerHead)


def write_infer(
    inputs: Mapping[str, Any],
    outputs: Sequence[str] | None = None,
    parameters: Mapping[str, int] | None = None,
    *,
    request_id: str | None = None,
    binary: bool = True,
) -> tuple[bytes, list[bytes | memoryview]]:
    """The JSON part of a request, and the bytes of each input that follow it.

    Args:
        inputs: anything `numpy.asarray` takes, by name; text and bytes become BYTES. Python's floats and integers, and
            lists of them, become FP32 and INT32, as in JAX; FP64 and INT64 if those cannot hold one.
        outputs: names of the outputs wanted; None for all.
        parameters: of the request, such as `priority`.
        request_id: what to call the request.
        binary: whether tensors travel as bytes, both ways, instead of in the JSON.

    Raises:
        InputError: for an array that the protocol, or JSON, cannot carry.

    >>> head, tensors = write_infer({"x": np.float32([1, 2])})
    >>> head.startswith(b'{"inputs":[{"name":"x","shape":[2]'), len(tensors[0])
    (True, 8)
    >>> b'"FP32"' in write_infer({"x": [[1.0, 2.0]]})[0]
    True
    """
    described: list[dict[str, Any]] = []
    tail: list[bytes | memoryview] = []
    for name, value in inputs.items():
        array, datatype, data = _tensor(name, value)
        entry: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": datatype}
        if binary:
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            entry["data"] = _json_data(name, array, datatype)
        described.append(entry)
    head: dict[str, Any] = {"inputs": described} if request_id is None else {"id": request_id, "inputs": described}
    extra = dict(parameters or {})
    if outputs is not None:
        head["outputs"] = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
    elif binary:
        extra["binary_data_output"] = True
    if extra:
        head["parameters"] = extra
    return msgspec.json.encode(head), tail


def _tensor(name: str, value: Any) -> tuple[np.ndarray, str, bytes | memoryview]:
    """A value as an array, its datatype, and its bytes in C order."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"input {name!r} is no array: {error}") from error
    if array.dtype.kind in "OSU":
        items = [_bytes_of(name, item) for item in array.ravel().tolist()]
        return array, "BYTES", join_elements(items)
    if not _has_dtype(value):
        array = _narrowed(array)
    try:
        row = datatype_of(array.dtype.name)
    except ServeError as error:
        raise InputError(f"input {name!r}: {error}") from error
    array = np.asarray(array, row.dtype, order="C")  # little-endian too
    return array, row.name, array.reshape(-1).view(np.uint8).data


def _has_dtype(value: Any) -> bool:
    """Whether a value has a dtype of its own, unlike Python's numbers and lists of them."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return not isinstance(value, int | float | list | tuple) or isinstance(value, np.generic)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """Python's numbers in 32 bits, where JAX has them; unchanged if these cannot hold one."""
    narrow = {"float64": np.float32, "int64": np.int32}.get(array.dtype.name)
    if narrow is None:
        return array
    with np.errstate(over="ignore"):
        narrowed = array.astype(narrow)
    fits = np.isfinite(narrowed) == np.isfinite(array) if narrow is np.float32 else narrowed == array
    return narrowed if fits.all() else array


def _bytes_of(name: str, item: Any) -> bytes:
    if not isinstance(item, str | bytes):
        raise InputError(f"input {name!r} holds {type(item).__name__} among objects, which must be text or bytes")
    return item.encode() if isinstance(item, str) else item


def _json_data(name: str, array: np.ndarray, datatype: str) -> list[Any]:
    if DATATYPES[datatype].element is None:
        raise InputError(f"input {name!r} is {datatype}, which JSON cannot carry; send it as binary")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"input {name!r} holds NaN or infinity, which JSON cannot carry; send it as binary")
    values = array.ravel().tolist()
    if datatype != "BYTES":
        return values
    try:
        return [_bytes_of(name, item).decode() for item in values]
    except UnicodeDecodeError as error:
        raise InputError(f"input {name!r} holds bytes that are not UTF-8; send it as binary") from error


def read_infer(body: bytes, head_bytes: int | None) -> dict[str, np.ndarray]:
    """The outputs of an answer, as arrays of their own; BYTES as an array of `bytes` objects.

    Args:
        body: of the answer.
        head_bytes: length of its JSON part; None if all of it.

    Raises:
        ValueError: for an answer that the protocol does not allow.

    >>> read_infer(b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}', None)
    {'y': array([1., 2.], dtype=float32)}
    """
    size = len(body) if head_bytes is None else head_bytes
    if not 0 <= size <= len(body):
        raise ValueError(f"its JSON part has {size} bytes, but all of it {len(body)}")
    outputs: dict[str, np.ndarray] = {}
    at = size
    for output in _DECODER.decode(body[:size] if size < len(body) else body).outputs:
        count = math.prod(output.shape)
        length = output.parameters.get("binary_data_size")
        if output.datatype not in DATATYPES or any(dim < 0 for dim in output.shape):
            raise ValueError(f"output {output.name!r} is {output.datatype} of shape {output.shape}")
        if (length is None) == (output.data is None):
            raise ValueError(f"output {output.name!r} must have data or binary_data_size, and not both")
        if output.data is not None:
            outputs[output.name] = _from_json(output, output.data, count)
            continue
        if not isinstance(length, int) or not 0 <= length <= len(body) - at:
            raise ValueError(
                f"output {output.name!r} has binary_data_size {length!r}, but {len(body) - at} bytes follow"
            )
        outputs[output.name] = _from_bytes(output, body, at, length, count)
        at += length
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes follow its last tensor")
    return outputs


def _from_bytes(output: _OutputHead, body: bytes, start: int, length: int, count: int) -> np.ndarray:
    dtype = DATATYPES[output.datatype].dtype
    if dtype is None:
        return _objects(list(split_elements(body[start : start + length])), output, count)
    if length != count * dtype.itemsize:
        raise ValueError(f"output {output.name!r} of shape {output.shape} cannot have {length} bytes")
    # A copy: the body is read-only, and where a tensor starts in it is not aligned.
    return np.frombuffer(body, dtype, count, start).reshape(output.shape).copy()


def _from_json(output: _OutputHead, data: list[Any], count: int) -> np.ndarray:
    dtype = DATATYPES[output.datatype].dtype
    if dtype is None:
        flat = np.array(data, object).ravel().tolist()
        return _objects([item.encode() if isinstance(item, str) else bytes(item) for item in flat], output, count)
    array = np.array(data, dtype)
    if array.size != count:
        raise ValueError(f"output {output.name!r} of shape {output.shape} cannot have {array.size} elements")
    return array.reshape(output.shape)


def _objects(items: list[bytes], output: _OutputHead, count: int) -> np.ndarray:
    if len(items) != count:
        raise ValueError(f"output {output.name!r} of shape {output.shape} cannot have {len(items)} elements")
    array = np.empty(count, object)
    array[:] = items
    return array.reshape(output.shape)
