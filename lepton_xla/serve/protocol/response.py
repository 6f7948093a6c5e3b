"""The answer to an infer request: its JSON part, and what follows it.

Sources: Open Inference Protocol v2 (`specification/protocol/inference_rest.md`, "Inference Response JSON Object"),
Triton's binary tensor data and classification extensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from lepton_xla.conversion.converter import names_at
from lepton_xla.serve.protocol.classification import classes_shape, top_classes
from lepton_xla.serve.protocol.datatypes import join_elements
from lepton_xla.serve.protocol.jsondata import write_data
from lepton_xla.serve.protocol.metadata import DatatypeName
from lepton_xla.serve.protocol.signature import Signature, Tensor
from lepton_xla.serve.protocol.wire import RequestSpec

type Data = Annotated[
    msgspec.Raw | msgspec.UnsetType,
    msgspec.Meta(
        description="Elements in row-major order. Absent where the parameter `binary_data_size` says how many bytes "
        "of them follow the JSON part.",
        extra_json_schema={"type": "array"},
    ),
]


class BinarySize(msgspec.Struct, frozen=True):
    """Parameters of an output that follows the JSON part."""

    binary_data_size: Annotated[int, msgspec.Meta(ge=0)]


class OutputTensor(msgspec.Struct, frozen=True):
    """One output."""

    name: str
    datatype: DatatypeName
    shape: tuple[int, ...]
    parameters: BinarySize | msgspec.UnsetType = msgspec.UNSET
    data: Data = msgspec.UNSET


class ResponseHead(msgspec.Struct, frozen=True):
    """The whole JSON part."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | msgspec.UnsetType = msgspec.UNSET


def write_response(
    signature: Signature, spec: RequestSpec, outputs: Sequence[memoryview | bytes]
) -> tuple[bytes, list[memoryview | bytes]]:
    """The JSON part of an answer, and the binary outputs that follow it, in order.

    Args:
        signature: the model's.
        spec: the request's.
        outputs: the bytes of each output asked for, in the order of `spec.outputs`.

    Raises:
        HTTPError: 400 if an output that JSON should carry holds NaN or infinity.
    """
    described: list[OutputTensor] = []
    tail: list[memoryview | bytes] = []
    for position, (index, binary) in enumerate(spec.outputs):
        tensor = signature.outputs[index]
        count = spec.classes[position] if spec.classes else 0
        if count:
            entry, data = _classified(signature, tensor, spec, outputs[position], count, binary=binary)
        else:
            entry, data = _described(tensor, spec, outputs[position], binary=binary)
        described.append(entry)
        if binary:
            tail.append(data)
    response_id = msgspec.UNSET if spec.id is None else spec.id
    return msgspec.json.encode(ResponseHead(signature.name, signature.version, described, response_id)), tail


def _described(
    tensor: Tensor, spec: RequestSpec, data: memoryview | bytes, *, binary: bool
) -> tuple[OutputTensor, memoryview | bytes]:
    shape = tensor.at(spec.sizes)
    if tensor.labels:
        texts = names_at(tensor.labels, np.frombuffer(data, tensor.dtype))
        if binary:
            raw = join_elements(text.encode() for text in texts)
            return OutputTensor(tensor.name, "BYTES", shape, BinarySize(len(raw))), raw
        return OutputTensor(tensor.name, "BYTES", shape, data=msgspec.Raw(msgspec.json.encode(texts))), b""
    if binary:
        return OutputTensor(tensor.name, tensor.datatype.name, shape, BinarySize(len(data))), data
    text = write_data(np.frombuffer(data, tensor.dtype), f"output {tensor.name!r}")
    return OutputTensor(tensor.name, tensor.datatype.name, shape, data=msgspec.Raw(text)), b""


def _classified(
    signature: Signature, tensor: Tensor, spec: RequestSpec, data: memoryview | bytes, count: int, *, binary: bool
) -> tuple[OutputTensor, bytes]:
    shape = classes_shape(tensor.at(spec.sizes), count, batched=signature.batch is not None)
    rows = math.prod(shape[:-1])
    values = np.frombuffer(data, tensor.dtype)
    texts = top_classes(values.reshape(rows, values.size // rows), shape[-1])
    if binary:
        raw = join_elements(text.encode() for text in texts)
        return OutputTensor(tensor.name, "BYTES", shape, BinarySize(len(raw))), raw
    return OutputTensor(tensor.name, "BYTES", shape, data=msgspec.Raw(msgspec.json.encode(list(texts)))), b""
