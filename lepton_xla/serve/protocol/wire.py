"""The Open Inference Protocol v2 for infer requests: bytes to a typed request. The answer is in `response.py`.

Sources: Open Inference Protocol v2 (`specification/protocol/inference_rest.md`) and Triton's binary tensor data
extension (`docs/protocol/extension_binary_data.md`). A request body is a JSON object of H bytes, then the binary
tensors in the order of its inputs; H is the header `Inference-Header-Content-Length`, and absent means all of it.

Pure functions of bytes: nothing here knows HTTP, sockets or the batcher.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from lepton_xla.serve.errors import HTTPError, shortened
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol import raw
from lepton_xla.serve.protocol.classification import classes_shape
from lepton_xla.serve.protocol.request import (
    InputHead,
    OutputHead,
    RequestHead,
    binary_size,
    check_input,
    check_reserved,
    check_tensor_parameters,
    check_unread,
    flag,
    json_data,
    number,
    parse_head,
)
from lepton_xla.serve.protocol.signature import Signature
from lepton_xla.serve.protocol.sizes import answer_bytes

# In the place of the length of a JSON part: a model that converts inputs takes the body for one value, as in `curl
# --data-binary @image.jpg -H 'Content-Type: image/jpeg'`, and answers in JSON; any other model reads JSON.
ONE_VALUE = -1
_CACHED_HEADS = 512
_CACHED_HEAD_BYTES = 4096
# The usual place of a client's id: first, and without escapes.
_ID = re.compile(rb'\{"id": ?"([ !#-\[\]-~]*)", ?')
# Bound on the strings of a classification: each takes fifty times the bytes of its element.
_MOST_CLASSES = 1_000_000


# JSON parts longer than this are not searched for an id that is not at their start.
_LONG_HEAD_BYTES = 1 << 16


class _OnlyId(msgspec.Struct):
    id: str | None = None


def id_of(body: bytes, head_bytes: int | None) -> bytes | None:
    """The client's id of a request that was not decoded yet; None where it has none, or is malformed.

    Args:
        body: after decompression, or its start.
        head_bytes: length of the JSON part; None if all of it.

    >>> id_of(b'{"id": "a7", "inputs": []}', None), id_of(b'{"inputs": [], "id": "b8"}', None)
    (b'a7', b'b8')
    """
    found = _ID.match(body)
    if found is not None:
        return found[1]
    head = body if head_bytes is None else body[:head_bytes]
    if len(head) > _LONG_HEAD_BYTES:
        return None
    try:
        given = msgspec.json.decode(head, type=_OnlyId).id
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if given is None else given.encode(errors="replace")


class RequestSpec(msgspec.Struct, eq=False, kw_only=True):
    """The JSON part of a request, checked against the signature. Equal requests share one.

    Attributes:
        rows: size of the batch dimension; 1 if there is none.
        key: compiled size of each other symbol, in the order of `Signature.others`.
        sizes: real size of every symbol; larger in `key` where rows are padded within.
        cut: whether a symbol other than the batch is padded, so that outputs must be cut.
        slices: for each input in executable order, its place in the binary tail; empty for JSON data.
        tail_bytes: required length of the binary tail.
        outputs: for each requested output, its index in the signature, and whether it is sent as binary.
        classes: for each requested output, the number of largest elements to send instead of the tensor, 0 for the
            tensor itself; empty if all are tensors.
        answer_bytes: upper estimate of the memory of the answer.
        id: the client's id, which the answer repeats; None without one.
        timeout_s: the client's timeout; None without one.
        priority: 0 is the default, 1 the highest, larger numbers are lower.
        named: whether an output is sent as names, whose lengths differ.
        response: header fields and JSON part that all its answers share, cached by the app with the first answer.
        responses: number of bytes of an id -> the same up to the id, for all ids that are so long; shared by requests
            that differ in their ids.
    """

    rows: int
    key: tuple[int, ...]
    sizes: dict[str, int]
    cut: bool
    slices: tuple[tuple[int, int], ...]
    tail_bytes: int
    outputs: tuple[tuple[int, bool], ...]
    classes: tuple[int, ...] = ()
    answer_bytes: int = 0
    id: str | None = None
    timeout_s: float | None = None
    priority: int = 0
    named: bool = False
    response: Any = None
    responses: dict[int, Any] = {}  # msgspec makes one for each

    @property
    def constant(self) -> bool:
        """Whether the JSON part of the answer is the same for every result: all outputs are binary tensors."""
        return not self.classes and not self.named and all(binary for _, binary in self.outputs)


class _Options(NamedTuple):
    """The part of a request that is not its inputs."""

    outputs: tuple[tuple[int, bool], ...]
    classes: tuple[int, ...] = ()
    id: str | None = None
    timeout_s: float | None = None
    priority: int = 0


class InferRequest(msgspec.Struct, eq=False):
    """A request ready to run.

    Attributes:
        spec: its JSON part.
        tensors: for each input the bytes of its tensor, in C order, little-endian.
        nbytes: memory that the tensors hold: the whole body if they are views of it.
    """

    spec: RequestSpec
    tensors: list[memoryview]
    nbytes: int


class Decoder:
    """Decodes infer requests of one model.

    Clients repeat the JSON part byte for byte, so specs of binary requests are cached.

    Args:
        signature: the model's.
        limits: the bounds on a request.
        max_rows: largest number of rows of a request.

    Attributes:
        converts: whether a request may have to be converted, which takes too long for an event loop.
    """

    def __init__(self, signature: Signature, limits: Limits, max_rows: int) -> None:
        self._signature = signature
        self.converts = signature.converter is not None and bool(signature.converter.conversion.inputs)
        self._limits = limits
        self._max_rows = max_rows
        self._inputs = {tensor.name: index for index, tensor in enumerate(signature.inputs)}
        self._outputs = {tensor.name: index for index, tensor in enumerate(signature.outputs)}
        self._bool_inputs = tuple(i for i, t in enumerate(signature.inputs) if t.datatype.name == "BOOL")
        self._specs: dict[bytes, RequestSpec] = {}
        # The last JSON part and its spec: comparing is faster than a lookup.
        self._last_head = b""
        self._last: RequestSpec | None = None

    def decode(self, body: bytes, head_bytes: int | None) -> InferRequest:
        """Decodes one request body.

        Args:
            body: after decompression.
            head_bytes: length of the JSON part; None if all of it; 0 for a raw request, whose body is the only
                input's bytes.

        Raises:
            HTTPError: 400 for anything malformed or that does not fit the model, 413 for too many rows.
        """
        if self.converts:
            request = self._converted(body, head_bytes)
            if request is not None:
                return request
        total = len(body)
        if head_bytes is None or head_bytes == ONE_VALUE:
            head, head_bytes = body, total
        elif head_bytes > total:
            raise HTTPError(400, f"Inference-Header-Content-Length is {head_bytes}, but the body has {total} bytes")
        elif head_bytes == 0:
            return self._raw(body)
        elif head_bytes == len(self._last_head) and body.startswith(self._last_head):
            head = self._last_head
        else:
            head = body[:head_bytes]
        arrays: dict[int, memoryview] | None = None
        spec = self._last if head is self._last_head else self._known(head)
        if spec is None:
            arrays = {}
            spec = self._spec(head, arrays)
            if head_bytes <= _CACHED_HEAD_BYTES and not arrays:
                self._remember(head, spec)
        if total - head_bytes != spec.tail_bytes:
            raise HTTPError(
                400,
                f"the binary inputs need {spec.tail_bytes} bytes after the JSON part, but {total - head_bytes} follow",
            )
        view = memoryview(body)
        tensors = [view[head_bytes + start : head_bytes + stop] for start, stop in spec.slices]
        nbytes = total if spec.tail_bytes else 0
        if arrays:
            for index, data in arrays.items():
                tensors[index] = data
                nbytes += len(data)
        if self._bool_inputs:
            self._check_bools(tensors)
        return InferRequest(spec, tensors, nbytes)

    def _converted(self, body: bytes, head_bytes: int | None) -> InferRequest | None:
        """Decodes a request of what has to be converted; None if it brings the model's own inputs."""
        signature = self._signature
        assert signature.converter is not None
        if head_bytes in (0, ONE_VALUE):
            binary = head_bytes == 0
            options = _Options(tuple((index, binary) for index in range(len(signature.outputs))))
            given: dict[str, Any] = raw.only_input(signature, body)
        else:
            parsed = raw.parse(body, head_bytes, self._limits, self._max_rows)
            if not signature.converter.takes({each.name: None for each in parsed.head.inputs}):
                return None
            check_reserved(parsed.head.parameters)
            options = self._options(parsed.head)
            given = raw.read(signature, parsed, self._limits, self._max_rows)
        arrays, sizes = raw.converted(signature, given)
        spec = self._fit(sizes, (), 0, options)
        tensors = [memoryview(array.reshape(-1).view(np.uint8)) for array in arrays]
        return InferRequest(spec, tensors, sum(array.nbytes for array in arrays))

    def repeated(self, body: bytes, head_bytes: int | None) -> RequestSpec | None:
        """The spec of a body that repeats the JSON part of the one before it.

        Args:
            body: after decompression.
            head_bytes: length of its JSON part, as for `decode`.

        Returns:
            None for any other body, malformed ones included: `decode` handles those.
        """
        spec, head = self._last, self._last_head
        if spec is None or head_bytes != len(head) or len(body) != len(head) + spec.tail_bytes:
            return None
        return spec if body.startswith(head) else None

    def _known(self, head: bytes) -> RequestSpec | None:
        if len(head) > _CACHED_HEAD_BYTES:
            return None
        spec = self._specs.get(head)
        if spec is not None:
            self._last_head, self._last = head, spec
        elif (found := _ID.match(head)) is not None:
            spec = self._specs.get(b"{" + head[found.end() :])
            if spec is not None:
                spec = copy.copy(spec)
                spec.id = found[1].decode()
                spec.response = None
        return spec

    def _remember(self, head: bytes, spec: RequestSpec) -> None:
        """Caches a spec for equal requests. One with an id is cached without it, since ids differ."""
        if spec.id is not None:
            found = _ID.match(head)
            head = b"{" + head[found.end() :] if found is not None else b""
            # The rest must not contain an id again, in any spelling.
            if not head or b'"id"' in head or b"\\" in head:
                return
            spec = copy.copy(spec)
            spec.id = None
        if len(self._specs) >= _CACHED_HEADS:
            self._specs.clear()
        self._specs[head] = spec

    def _check_bools(self, tensors: Sequence[memoryview]) -> None:
        for index in self._bool_inputs:
            if len(tensors[index]) and np.frombuffer(tensors[index], np.uint8).max() > 1:
                raise HTTPError(400, f"input {self._signature.inputs[index].name!r}: a BOOL byte is neither 0 nor 1")

    def _spec(self, head: bytes, arrays: dict[int, memoryview]) -> RequestSpec:
        request, cut = parse_head(head, self._limits)
        check_reserved(request.parameters)
        named = len(request.inputs) + len(request.outputs or ())
        if named > self._limits.max_tensors:
            raise HTTPError(400, f"the request names {named} tensors; it may name {self._limits.max_tensors}")
        sizes: dict[str, int] = {}
        in_json: dict[int, InputHead] = {}
        slices: list[tuple[int, int] | None] = [None] * len(self._inputs)
        cursor = 0
        for given in request.inputs:
            index = self._inputs.get(given.name)
            if index is None:
                name = shortened(given.name)
                raise HTTPError(400, f"the model has no input {name}; it has {_names(self._inputs)}")
            if slices[index] is not None:
                raise HTTPError(400, f"input {given.name!r} is given twice")
            tensor = self._signature.inputs[index]
            count = check_input(given, tensor, sizes)
            if count > self._limits.max_elements:
                raise HTTPError(
                    400, f"input {given.name!r} has {count} elements; it may have {self._limits.max_elements}"
                )
            size = binary_size(given, count, tensor.datatype)
            slices[index] = (cursor, cursor + (size or 0))
            cursor += size or 0
            if size is None:
                in_json[index] = given
        missing = [name for name, index in self._inputs.items() if slices[index] is None]
        if missing:
            raise HTTPError(400, f"input {missing[0]!r} is missing; the model needs {_names(self._inputs)}")
        spec = self._fit(sizes, tuple(s for s in slices if s is not None), cursor, self._options(request))
        # Last, after all cheap checks.
        for index, given in in_json.items():
            arrays[index] = json_data(given, self._signature.inputs[index], head, cut)
        check_unread(head, cut, self._limits)
        return spec

    def _fit(
        self, sizes: dict[str, int], slices: tuple[tuple[int, int], ...], tail_bytes: int, options: _Options
    ) -> RequestSpec:
        """Checks the sizes against the compiled ones."""
        signature = self._signature
        key: list[int] = []
        for symbol in signature.others:
            fit = signature.fit(symbol, sizes[symbol])
            if fit is None or not sizes[symbol]:
                raise HTTPError(
                    400, f"dimension {symbol!r} is {sizes[symbol]}; it must be 1 to {signature.buckets[symbol][-1]}"
                )
            key.append(fit)
        rows = 1 if signature.batch is None else sizes[signature.batch]
        if rows < 1:
            raise HTTPError(400, f"dimension {signature.batch!r} is 0; a request needs at least one row")
        if rows > self._max_rows:
            raise HTTPError(413, f"dimension {signature.batch!r} is {rows}; a request may bring {self._max_rows} rows")
        for (index, _), count in zip(options.outputs, options.classes, strict=False):
            shape = signature.outputs[index].at(sizes)
            strings = math.prod(classes_shape(shape, count, batched=signature.batch is not None))
            if strings > _MOST_CLASSES:
                raise HTTPError(
                    400, f"the classification asked for has {strings} elements; it may have {_MOST_CLASSES}"
                )
        taken = answer_bytes(signature, sizes, rows, options.outputs, options.classes)
        if taken > self._limits.max_buffered_bytes:
            raise HTTPError(
                413,
                f"the answer takes {taken} bytes of memory, and the server may hold {self._limits.max_buffered_bytes}; "
                "ask for fewer rows or outputs, or for binary_data",
            )
        return RequestSpec(
            rows=rows,
            key=tuple(key),
            sizes=sizes,
            cut=any(sizes[symbol] != size for symbol, size in zip(signature.others, key, strict=True)),
            slices=slices,
            tail_bytes=tail_bytes,
            outputs=options.outputs,
            classes=options.classes,
            answer_bytes=taken,
            id=options.id,
            timeout_s=options.timeout_s,
            priority=options.priority,
            named=any(signature.outputs[index].labels for index, _ in options.outputs),
        )

    def _options(self, request: RequestHead) -> _Options:
        parameters = request.parameters
        outputs, classes = self._wanted(request)
        timeout_us = number(parameters, "timeout", "the request")
        return _Options(
            outputs=outputs,
            classes=classes,
            id=request.id,
            timeout_s=timeout_us * 1e-6 if timeout_us else None,
            priority=number(parameters, "priority", "the request"),
        )

    def _wanted(self, request: RequestHead) -> tuple[tuple[tuple[int, bool], ...], tuple[int, ...]]:
        """The requested outputs, whether each is binary, and the number of classes of each."""
        default = flag(request.parameters, "binary_data_output", "the request", default=False)
        wanted: dict[int, bool] = {}
        classes: list[int] = []
        for output in request.outputs or [OutputHead(name) for name in self._outputs]:
            index = self._outputs.get(output.name)
            if index is None:
                name = shortened(output.name)
                raise HTTPError(400, f"the model has no output {name}; it has {_names(self._outputs)}")
            where = f"output {output.name!r}"
            if index in wanted:
                raise HTTPError(400, f"{where} is asked for twice")
            check_tensor_parameters(output.parameters, where)
            binary = wanted[index] = flag(output.parameters, "binary_data", where, default=default)
            classes.append(number(output.parameters, "classification", where))
            datatype = self._signature.outputs[index].datatype
            if not binary and not classes[-1] and datatype.element is None:
                raise HTTPError(400, f"{where} is {datatype.name}, which JSON cannot carry; ask for binary_data")
        return tuple(wanted.items()), tuple(classes) if any(classes) else ()

    def _raw(self, body: bytes) -> InferRequest:
        """Decodes a body without a JSON part: one row of the only input. All outputs are sent as binary."""
        signature = self._signature
        if len(signature.inputs) != 1:
            raise HTTPError(400, f"a raw request needs a model with one input; this one has {len(signature.inputs)}")
        tensor = signature.inputs[0]
        sizes = {} if signature.batch is None else {signature.batch: 1}
        free = [dim for dim in tensor.shape if isinstance(dim, str) and dim not in sizes]
        if len(free) > 1:
            raise HTTPError(400, f"a raw request cannot say the sizes of {len(free)} dimensions; send a JSON part")
        unit = math.prod(tensor.at(sizes | dict.fromkeys(free, 1))) * tensor.datatype.item_bytes
        count, rest = divmod(len(body), unit) if unit else (0, len(body))
        if rest or (not free and len(body) != unit):
            raise HTTPError(400, f"input {tensor.name!r} needs a multiple of {unit} bytes, but {len(body)} came")
        sizes |= dict.fromkeys(free, count)
        options = _Options(tuple((index, True) for index in range(len(signature.outputs))))
        spec = self._fit(sizes, ((0, len(body)),), len(body), options)
        tensors = [memoryview(body)]
        self._check_bools(tensors)
        return InferRequest(spec, tensors, len(body))


def _names(table: dict[str, int]) -> str:
    return ", ".join(repr(name) for name in table)
