"""The scheduler of a front-end: it hands calls to the engine in another process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from lepton_xla.serve.batching.scheduler import Call, Times
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.protocol.signature import Signature
from lepton_xla.serve.split import descriptors, hello, memory
from lepton_xla.serve.split.blocks import Blocks, order_of
from lepton_xla.serve.split.hello import Hello
from lepton_xla.serve.split.packets import Packets

_log = logging.getLogger("lepton_xla.serve")

_PING_S = 0.5
# An engine that has not said anything for so many pings is given up, with all that it was asked.
_MOST_PINGS = 10
# Turns of the event loop that requests wait for others, while others come. With 64 connections at one front-end all
# processes together take 18 us for a small request then, not 39, because batches hold more of them.
_PATIENCE = 2
# Memory that is kept when no request is there any more.
_KEPT_BYTES = 16 << 20


class RemoteScheduler:
    """Runs calls on the engine of another process, while there is a link to it.

    Args:
        memory_bytes: for the tensors of all calls that are not answered yet.
        metrics: what is counted.
        wish: asks for a link, which `connect` then gets.
        met: told what an engine says of itself, as soon as it takes calls.
        loop: the event loop.

    Attributes:
        ready: whether there is an engine that takes calls, and can run them.
        max_rows: most rows of one request.
        shed: nothing, for the queue is the engine's.
    """

    shed = None

    def __init__(
        self,
        memory_bytes: int,
        metrics: Metrics,
        wish: Callable[[], object],
        met: Callable[[Hello], object],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._order = order_of(memory_bytes)
        self._metrics = metrics
        self._wish = wish
        self._met = met
        self._loop = loop
        self._packets: Packets | None = None
        self._signature: Signature | None = None
        self._pinger: asyncio.TimerHandle | None = None
        self.ready = False
        self.max_rows = 0

    # The link.

    def connect(self, end: socket.socket) -> None:
        """Takes one end of a pair whose other end the engine has, or will have."""
        if self._packets is not None:
            end.close()
            return
        # New memory each time: an engine that was given up may yet write to what it knows.
        fd = memory.create(1 << self._order)
        try:
            self._memory = memory.attach(fd)
            self._blocks = Blocks(self._order)
            self._calls: dict[int, Call] = {}
            self._hello = b""
            self._times: Times | None = None
            self._packets = Packets(end, self._greeted, self._lost, self._loop, patience=_PATIENCE)
            self._packets.offer(b"memory", [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        """Gives the link up; what was asked and not answered fails."""
        if self._packets is not None:
            self._packets.close()
            self._lost()

    def _greeted(self, packet: bytes, fds: list[int]) -> None:
        self._hello += packet
        if not packet.endswith(hello.END):
            return
        said = hello.decode(self._hello)
        self._signature = said.signature
        self.max_rows = said.max_rows
        packets = self._packets
        assert packets is not None
        packets.received = self._received
        self._unanswered = 0
        self._ping()
        self.ready = True
        self._met(said)

    def _lost(self) -> None:
        self._packets = self._signature = None
        self.ready = False
        if self._pinger is not None:
            self._pinger.cancel()
            self._pinger = None
        calls, self._calls = self._calls, {}
        if calls:
            _log.warning("the engine is gone; %d requests get 503", len(calls))
        for call in calls.values():
            if not call.closed:
                call.closed = True
                self._metrics.failures += 1
                call.fail(RefusedError(503, "the engine has stopped; it is being started again"))
        self._wish()

    def _ping(self) -> None:
        packets = self._packets
        assert packets is not None
        if self._unanswered >= _MOST_PINGS:
            _log.error("the engine has not answered for %g s; it is given up", _MOST_PINGS * _PING_S)
            self.close()
            return
        self._unanswered += 1
        if not self._calls and self._blocks.used > _KEPT_BYTES:
            memory.give_back(self._memory, self._blocks.used)
            self._blocks = Blocks(self._order)
        packets.write(descriptors.ping())
        self._pinger = self._loop.call_later(_PING_S, self._ping)

    # Calls.

    def figures(self) -> dict[str, float]:
        """What `Metrics` shows of the queue of this process: there is none, the engine has it."""
        return {}

    def submit(self, call: Call) -> None:
        """Hands over a call; `finish` or `fail` is told of its end, unless it is cancelled first.

        It fails at once with 503 where there is no engine, or no room for the tensors, 413 where there never will be.
        """
        packets, signature = self._packets, self._signature
        if packets is None or signature is None:
            self._metrics.rejected += 1
            call.fail(RefusedError(503, "the engine is being started"))
            return
        request = call.request
        layout = request.plan.layout
        if layout is None:
            layout = request.plan.layout = descriptors.pack(signature, request.plan)
        block = self._blocks.take(layout.order)
        if block is None:
            if layout.order > self._order:
                call.fail(RefusedError(413, "the request's tensors exceed the memory that there is for them"))
                return
            self._metrics.rejected += 1
            call.fail(RefusedError(503, "too much waits for an answer"))
            return
        shared = self._memory
        for (start, stop), tensor in zip(layout.inputs, request.tensors, strict=True):
            shared[block + start : block + stop] = tensor
        self._calls[block] = call
        call.block = block
        packets.write(descriptors.run(layout, block, call.arrival_s))

    def cancel(self, call: Call) -> None:
        """Forgets a call: nobody waits for it any more. Its block is free once the engine says so."""
        if not call.closed:
            call.closed = True
            if self._packets is not None:
                self._packets.write(descriptors.cancel(call.block))

    def _received(self, packet: bytes, fds: list[int]) -> None:
        self._unanswered = 0
        shared = self._memory
        for status, block, more in descriptors.answered(packet):
            if isinstance(more, Times):
                self._times = more
                continue
            if status in (descriptors.WELL, descriptors.UNWELL):
                self.ready = status == descriptors.WELL
                continue
            call = self._calls.pop(block)
            layout = call.request.plan.layout
            if not call.closed:
                call.closed = True
                if status == descriptors.OK:
                    call.times = self._times
                    try:
                        call.finish([shared[block + start : block + stop] for start, stop in layout.outputs])
                    except Exception:
                        _log.exception("an answer could not be written")
                        call.fail(RefusedError(500, "internal error"))
                else:
                    call.fail(more or RefusedError(500, "internal error"))
            self._blocks.give(block, layout.order)
