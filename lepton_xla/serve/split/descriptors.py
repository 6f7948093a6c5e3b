"""What a front-end and the engine tell each other of a request: fixed structures, and a few bytes a kind of request.

A request's tensors lie in a block of the front-end's memory. What is the same for equal requests, its *terms*, is
packed once and understood once: both ends keep what follows from the bytes. The results are written over the inputs,
once all of them are there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec

from lepton_xla.serve.batching.scheduler import Times
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.protocol.signature import Signature, Tensor
from lepton_xla.serve.protocol.wire import Plan
from lepton_xla.serve.split.blocks import SMALLEST, order_of

# To the engine: what it is, bytes of terms that follow, the block's offset >> SMALLEST, when the request came.
_TO_ENGINE = struct.Struct("<HHId")
# To the front-end: HTTP status, bytes of words that follow, the block.
_TO_FRONT = struct.Struct("<HHI")
_TIMES = struct.Struct("<dddII")

RUN, CANCEL, PING = 1, 2, 3
"""What a front-end says. To each RUN there is one answer, and one to each PING."""
OK, CANCELLED, WELL, UNWELL, RAN = 200, 1, 2, 3, 4
"""What the engine answers, a PING with WELL or UNWELL; else it is the status of a refusal. RAN goes before the answers
of a batch, and says when it ran."""

_ALIGNMENT = 64

type Slices = tuple[tuple[int, int], ...]
"""For each tensor where it starts and ends in its block."""

type _Size = Annotated[int, msgspec.Meta(ge=0)]


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """What the engine has to know of a request beside its tensors.

    Attributes:
        sizes: of each symbol, in the order of `Signature.buckets`.
        outputs: indices of the outputs wanted.
        timeout_s: seconds after which the client has no use for the answer; None if it said nothing.
        priority: as the client gave it.
    """

    sizes: tuple[_Size, ...]
    outputs: tuple[_Size, ...]
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None
    priority: _Size


_TERMS = msgspec.msgpack.Decoder(Terms)
_WORDS = msgspec.msgpack.Decoder(list[str])


class Layout:
    """Where the tensors of a request lie in its block.

    Attributes:
        terms: the packed `Terms`.
        plan: the request's.
        inputs: of every input.
        outputs: of each output wanted.
        order: of the block.
    """

    __slots__ = ("inputs", "order", "outputs", "plan", "terms")

    def __init__(self, signature: Signature, plan: Plan, terms: bytes) -> None:
        self.plan = plan
        self.terms = terms
        self.inputs, inputs_bytes = _lay(signature.inputs, plan)
        self.outputs, outputs_bytes = _lay([signature.outputs[index] for index, _ in plan.outputs], plan)
        self.order = order_of(max(inputs_bytes, outputs_bytes))


def _lay(tensors: Iterable[Tensor], plan: Plan) -> tuple[Slices, int]:
    slices: list[tuple[int, int]] = []
    at = 0
    for tensor in tensors:
        stop = at + math.prod(tensor.at(plan.sizes)) * tensor.datatype.item_bytes
        slices.append((at, stop))
        at = stop + -stop % _ALIGNMENT
    return tuple(slices), at


def pack(signature: Signature, plan: Plan) -> Layout:
    """The layout of a plan, on the front-end's side."""
    terms = Terms(
        sizes=tuple(plan.sizes[symbol] for symbol in signature.buckets),
        outputs=tuple(index for index, _ in plan.outputs),
        timeout_s=plan.timeout_s,
        priority=plan.priority,
    )
    return Layout(signature, plan, msgspec.msgpack.encode(terms))


def unpack(signature: Signature, packed: bytes, max_rows: int) -> Layout:
    """The layout of what `pack` packed, on the engine's side.

    Args:
        signature: the model's.
        packed: the terms.
        max_rows: most rows of a request.

    Raises:
        ValueError: for what no front-end that decodes right can have sent.
    """
    terms = _TERMS.decode(packed)
    sizes = dict(zip(signature.buckets, terms.sizes, strict=True))
    key = tuple(signature.fit(symbol, sizes[symbol]) or 0 for symbol in signature.others)
    rows = 1 if signature.batch is None else sizes[signature.batch]
    if not (0 < rows <= max_rows and all(terms.sizes) and all(key)):
        raise ValueError(f"sizes {sizes} do not fit the model")
    if len(set(terms.outputs)) != len(terms.outputs) or max(terms.outputs, default=0) >= len(signature.outputs):
        raise ValueError(f"the model has no outputs {terms.outputs}")
    plan = Plan(
        rows=rows,
        key=key,
        sizes=sizes,
        cut=any(sizes[symbol] != size for symbol, size in zip(signature.others, key, strict=True)),
        slices=(),
        tail_bytes=0,
        outputs=tuple((index, True) for index in terms.outputs),
        timeout_s=terms.timeout_s,
        priority=terms.priority,
    )
    return Layout(signature, plan, packed)


def run(layout: Layout, block: int, arrival_s: float) -> bytes:
    """A request whose tensors are in place."""
    return _TO_ENGINE.pack(RUN, len(layout.terms), block >> SMALLEST, arrival_s) + layout.terms


def cancel(block: int) -> bytes:
    """Nobody waits for the request in this block any more."""
    return _TO_ENGINE.pack(CANCEL, 0, block >> SMALLEST, 0.0)


def ping() -> bytes:
    """Asks whether the engine's event loop turns."""
    return _TO_ENGINE.pack(PING, 0, 0, 0.0)


def said(packet: bytes) -> Iterator[tuple[int, int, float, bytes]]:
    """Of each entry of a packet to the engine: what it is, the block, when it came, the terms.

    Raises:
        ValueError: for a packet that is cut short, or has more than that.
    """
    at, end = 0, len(packet)
    while at < end:
        if end - at < _TO_ENGINE.size:
            raise ValueError("a packet is cut short")
        kind, size, place, arrival_s = _TO_ENGINE.unpack_from(packet, at)
        at += _TO_ENGINE.size
        if kind not in (RUN, CANCEL, PING) or size > end - at or not 0 <= arrival_s < math.inf:
            raise ValueError("a packet holds what is no request")
        yield kind, place << SMALLEST, arrival_s, packet[at : at + size]
        at += size


def answer(status: int, block: int = 0) -> bytes:
    """An answer without words."""
    return _TO_FRONT.pack(status, 0, block >> SMALLEST)


def refusal(error: RefusedError, block: int) -> bytes:
    """A refusal, with its words."""
    words = msgspec.msgpack.encode([error.message, *error.headers])
    return _TO_FRONT.pack(error.status, len(words), block >> SMALLEST) + words


def ran(times: Times) -> bytes:
    """When the batch ran whose answers follow."""
    return _TO_FRONT.pack(RAN, _TIMES.size, 0) + _TIMES.pack(*times)


def answered(packet: bytes) -> Iterator[tuple[int, int, RefusedError | Times | None]]:
    """Of each entry of a packet to a front-end: its status, the block, and what it says beside.

    Raises:
        ValueError: for a packet that is cut short, or has more than that.
    """
    at, end = 0, len(packet)
    while at < end:
        if end - at < _TO_FRONT.size:
            raise ValueError("a packet is cut short")
        status, size, place = _TO_FRONT.unpack_from(packet, at)
        at += _TO_FRONT.size
        if size > end - at:
            raise ValueError("a packet is cut short")
        more: RefusedError | Times | None = None
        if status >= 400:
            message, *headers = _WORDS.decode(packet[at : at + size]) or [""]
            more = RefusedError(status, message, *headers)
        elif status == RAN and size == _TIMES.size:
            more = Times(*_TIMES.unpack_from(packet, at))
        elif size or status not in (OK, CANCELLED, WELL, UNWELL):
            raise ValueError("a packet holds what is no answer")
        at += size
        yield status, place << SMALLEST, more
