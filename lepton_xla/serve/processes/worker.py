"""A worker process: a whole server of its own, which has its connections from the supervisor.

The supervisor starts it, as `python -m lepton_xla.serve.processes.worker`, with one end of a pair. It does not listen:
the supervisor takes the connections and deals them out. Of several event loops at one listening socket, one gets nearly
all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from lepton_xla.errors import ServeError
from lepton_xla.serve.app.frontend import HTTPFrontEnd
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call
from lepton_xla.serve.http.arrivals import Arrivals
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import run_child
from lepton_xla.serve.processes.control import Control
from lepton_xla.serve.processes.packets import close_all
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.runtime import count_on_cores, run_on_calling_thread, settle
from lepton_xla.serve.server import open_model

_log = logging.getLogger("lepton_xla.serve")


class Worker:
    """Connections to one model, and the supervisor that hands them over.

    Args:
        settings: what the server was told.
        metrics: what is counted here.
        end: of the pair whose other end the supervisor has.
        loop: the event loop.
    """

    def __init__(
        self, settings: control.Settings, metrics: ServerMetrics, end: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._options = settings.options
        self._access = settings.options.access()
        self._metrics = metrics
        self._loop = loop
        self._stop = Stop()
        self._stop.listen(loop)
        self._stop.warming = False
        loop.add_signal_handler(signal.SIGHUP, self._access.reload)
        self._no_more = asyncio.Event()
        self._askers: dict[int, Callable[[ServerMetrics], object]] = {}
        self._asked = 0
        self._arrivals: Arrivals | None = None
        self._control = Control(end, self._told, self._orphaned, loop)

    async def serve(self, model: ModelHandle, digest: str) -> bool:
        """Serves until stopped; gives whether everything accepted was answered.

        Args:
            model: what is served.
            digest: of its artifact's manifest.
        """
        frontend = HTTPFrontEnd(Registry(model), self._metrics, self._options, self._access, self._gather)
        self._arrivals = Arrivals(frontend.state, self._access.tls_options(self._options.limits))
        settle()
        reporting = self._loop.create_task(self._report(frontend))
        try:
            return await frontend.serve(
                self, self._stop, lambda: self._control.send(control.Ready(model.signature.name, digest))
            )  # fmt: skip
        finally:
            reporting.cancel()
            self._control.send(control.Counts(self._metrics.counts()))
            self._control.close()

    async def close(self) -> None:
        """Takes the connections that the supervisor has accepted already, and no more."""
        self._control.send(control.Leaving())
        await self._no_more.wait()
        if self._arrivals is not None:
            await self._arrivals.settle()

    # From the supervisor.

    def _told(self, message: control.Message, fds: list[int]) -> None:
        match message:
            case control.Connections():
                for fd in fds:
                    self._take(socket.socket(fileno=fd))
            case control.Stop(hurried):
                self._stop.asked.set()
                if hurried:
                    self._stop.hurried.set()
            case control.Reload():
                self._access.reload()
            case control.Closed():
                self._no_more.set()
            case control.Count(number):
                self._control.send(control.Counts(self._metrics.counts(), number))
            case control.Counts(counts, number):
                self._show(counts, number)
            case _:
                close_all(fds)

    def _orphaned(self) -> None:
        _log.error("the supervisor is gone")
        self._no_more.set()
        self._stop.asked.set()

    def _take(self, client: socket.socket) -> None:
        if self._arrivals is None:
            client.close()
        else:
            self._arrivals.take(client)

    # What is counted.

    async def _report(self, frontend: HTTPFrontEnd) -> None:
        while True:
            if not self._metrics.live:
                self._stop.asked.set()
            self._control.send(control.Connections(frontend.state.open))
            self._control.send(control.Counts(self._metrics.counts()))
            await asyncio.sleep(control.REPORT_S)

    def _gather(self, then: Callable[[ServerMetrics], object]) -> None:
        """Calls back with what the whole server has counted."""
        self._asked += 1
        self._askers[self._asked] = then
        self._control.send(control.Total(self._metrics.counts(), self._asked))

    def _show(self, others: dict[str, Any], number: int) -> None:
        then = self._askers.pop(number)
        try:
            then(self._metrics.plus(others))
        except Exception:
            _log.exception("what is counted could not be shown")


def check_device() -> None:
    """Refuses to be one of several on a device that the others would want whole too.

    Raises:
        ServeError: where models do not run on the CPU.
    """
    import jax

    platform = jax.default_backend()
    if platform != "cpu":
        raise ServeError(
            f"each of --workers holds the model, and here it would run on the {platform}: serve from one process, "
            "without --workers, or set JAX_PLATFORMS=cpu"
        )


async def _main(settings: control.Settings, end: socket.socket) -> bool:
    from lepton_xla.compiler import load

    cores = max(1, len(os.sched_getaffinity(0)) // settings.workers)
    run_on_calling_thread()
    count_on_cores(cores)
    check_device()
    servable = load(settings.artifact)
    signature = signature_of(servable, settings.options.name)
    engine: Engine[Call] = Engine(servable, signature)
    measured = engine.warm_up()
    metrics = ServerMetrics()
    model = open_model(engine, measured, signature, settings.options, metrics, cores)
    worker = Worker(settings, metrics, end, asyncio.get_running_loop())
    model.scheduler.start()
    finished = False
    try:
        finished = await worker.serve(model, servable.manifest.sha256)
        return finished
    finally:
        model.scheduler.stop(5.0 if finished else 0.0)


if __name__ == "__main__":
    sys.exit(run_child(_main))
