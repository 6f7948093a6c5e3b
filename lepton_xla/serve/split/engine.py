"""The engine process: it owns the device, and runs what front-ends put in their memory.

It is started by the supervisor, as `python -m lepton_xla.serve.split.engine`, with one end of a pair.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from time import monotonic

from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call, Scheduler, Times
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.observe.health import Health
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.process import run_on_calling_thread, settle
from lepton_xla.serve.protocol.signature import Signature, signature_of
from lepton_xla.serve.protocol.wire import InferRequest
from lepton_xla.serve.server import schedule, watch
from lepton_xla.serve.split import control, descriptors, hello, memory
from lepton_xla.serve.split.child import run_child
from lepton_xla.serve.split.descriptors import Layout
from lepton_xla.serve.split.packets import MOST_BYTES, Packets, close_all

_log = logging.getLogger("lepton_xla.serve")

_KEPT_LAYOUTS = 1024


class RemoteCall(Call, kw_only=True, eq=False):
    """A request of a front-end, whose tensors are in that one's memory.

    Attributes:
        front: asks for it.
        layout: where its tensors lie in its block.
    """

    front: FrontEnd
    layout: Layout

    def finish(self, outputs: Sequence[bytes | memoryview]) -> None:
        """Writes the results over the inputs."""
        shared, block = self.front.memory, self.block
        for (start, stop), output in zip(self.layout.outputs, outputs, strict=True):
            shared[block + start : block + stop] = output
        self.front.succeed(self)

    def fail(self, refusal: RefusedError) -> None:
        """Tells the front-end why there is no result."""
        self.front.answer(self.block, descriptors.refusal(refusal, self.block))


class FrontEnd:
    """A front-end as the engine sees it.

    Args:
        end: one end of a pair whose other end the front-end has.
        scheduler: runs its requests.
        signature: the model's.
        is_well: whether the scheduler can run anything.
        loop: the event loop.
    """

    def __init__(
        self,
        end: socket.socket,
        scheduler: Scheduler,
        signature: Signature,
        is_well: Callable[[], bool],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.memory = memoryview(b"")
        self._is_well = is_well
        self._scheduler = scheduler
        self._signature = signature
        self._calls: dict[int, RemoteCall] = {}
        self._layouts: dict[bytes, Layout] = {}
        self._times: Times | None = None
        self._packets = Packets(end, self._greeted, self._lost, loop, with_fds=True)

    def _greeted(self, packet: bytes, fds: list[int]) -> None:
        """Takes the front-end's memory, which comes first."""
        try:
            (fd,) = fds
            self.memory = memory.attach(fd)
        finally:
            close_all(fds)
        self._packets.with_fds = False
        self._packets.received = self._received
        said = hello.encode(self._signature, self._scheduler.max_rows)
        for start in range(0, len(said), MOST_BYTES):
            self._packets.write(said[start : start + MOST_BYTES])

    def _lost(self) -> None:
        """Drops what nobody waits for any more."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._scheduler.cancel(call)

    def _received(self, packet: bytes, fds: list[int]) -> None:
        for kind, block, arrival_s, terms in descriptors.said(packet):
            if kind == descriptors.RUN:
                self._run(block, arrival_s, terms)
            elif kind == descriptors.PING:
                self._packets.write(descriptors.answer(descriptors.WELL if self._is_well() else descriptors.UNWELL))
            elif block in self._calls:  # else the answer has crossed it
                self._scheduler.cancel(self._calls[block])
                self.answer(block, descriptors.answer(descriptors.CANCELLED, block))

    def _run(self, block: int, arrival_s: float, terms: bytes) -> None:
        layout = self._layouts.get(terms) or self._layout(terms)
        size = 1 << layout.order
        if block in self._calls or block & (size - 1) or block + size > len(self.memory):
            raise ValueError(f"the block at {block} is not free, or none of {size} bytes")
        plan = layout.plan
        tensors = [self.memory[block + start : block + stop] for start, stop in layout.inputs]
        request = InferRequest(plan, tensors, sum(map(len, tensors)))
        call = self._calls[block] = RemoteCall(
            plan.rows,
            plan.key,
            arrival_s,
            nbytes=request.nbytes,
            request=request,
            block=block,
            front=self,
            layout=layout,
        )
        self._scheduler.submit(call)

    def _layout(self, terms: bytes) -> Layout:
        if len(self._layouts) >= _KEPT_LAYOUTS:
            self._layouts.clear()
        layout = self._layouts[terms] = descriptors.unpack(self._signature, terms, self._scheduler.max_rows)
        return layout

    def succeed(self, call: RemoteCall) -> None:
        """Tells the front-end that the results are there, and before the first of a batch when it ran."""
        if call.times is not self._times and call.times is not None:
            self._times = call.times
            self._packets.write(descriptors.ran(call.times))
        self.answer(call.block, descriptors.answer(descriptors.OK, call.block))

    def answer(self, block: int, entry: bytes) -> None:
        """Tells the front-end of the end of a request; the block is its own again."""
        if self._calls.pop(block, None) is not None:
            self._packets.write(entry)


class EngineProcess:
    """The engine, its front-ends, and its supervisor.

    Args:
        scheduler: runs the requests of all front-ends.
        signature: the model's.
        metrics: what is counted.
        health: tells whether the scheduler works.
        loop: the event loop.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        signature: Signature,
        metrics: Metrics,
        health: Health,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._scheduler = scheduler
        self._health = health
        self._signature = signature
        self._metrics = metrics
        self._loop = loop
        self._over = asyncio.Event()
        metrics.watch(scheduler.figures)

    async def run(self, end: socket.socket) -> None:
        """Serves until the supervisor is gone or wants no more, or until only a new process would help."""
        self._scheduler.start()
        self._control = control.Control(end, self._told, self._over.set, self._loop)
        self._control.send(control.Ready(self._signature.name))
        reporting = self._loop.create_task(self._report())
        await self._over.wait()
        reporting.cancel()
        self._control.close()
        self._scheduler.stop(1.0)

    async def _report(self) -> None:
        while True:
            self._send_counts(0)
            self._health.check(monotonic())
            if not self._health.live:
                self._over.set()
            await asyncio.sleep(control.REPORT_S)

    def _send_counts(self, number: int) -> None:
        self._control.send(control.Counts(self._metrics.counts(), number))

    def _told(self, message: control.Message, fds: list[int]) -> None:
        match message:
            case control.Link():
                (fd,) = fds
                end = socket.socket(fileno=fd)
                FrontEnd(end, self._scheduler, self._signature, lambda: self._health.ready, self._loop)
            case control.Count(number):
                self._send_counts(number)
            case _:
                close_all(fds)


async def _main(settings: control.Settings, end: socket.socket) -> bool:
    from lepton_xla.compiler import load

    run_on_calling_thread()
    servable = load(settings.artifact)
    signature = signature_of(servable, settings.options.name)
    engine: Engine[Call] = Engine(servable, signature)
    metrics = Metrics(signature.name)
    measured = engine.warm_up()
    scheduler = schedule(engine, measured, signature, settings.options, metrics)
    health = watch(scheduler, measured, metrics)
    settle()
    await EngineProcess(scheduler, signature, metrics, health, asyncio.get_running_loop()).run(end)
    return True


if __name__ == "__main__":
    sys.exit(run_child(_main))
