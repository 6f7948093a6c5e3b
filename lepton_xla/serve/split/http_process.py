"""A process under the supervisor that speaks HTTP with clients, whatever runs their calls.

It does not listen: the supervisor takes the connections and deals them out. Of several event loops at one listening
socket, one gets nearly all.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

from lepton_xla.serve.app import Backend
from lepton_xla.serve.front import Front
from lepton_xla.serve.http.arrivals import Arrivals
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.observe.health import Health
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.process import settle
from lepton_xla.serve.protocol.signature import Signature
from lepton_xla.serve.split import control
from lepton_xla.serve.split.control import Control
from lepton_xla.serve.split.packets import close_all

_log = logging.getLogger("lepton_xla.serve")


class HttpProcess:
    """Connections to one model, and the supervisor that hands them over.

    Args:
        settings: what the server was told.
        metrics: what is counted here.
        end: of the pair whose other end the supervisor has.
        loop: the event loop.
    """

    def __init__(
        self, settings: control.Settings, metrics: Metrics, end: socket.socket, loop: asyncio.AbstractEventLoop
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
        self._askers: dict[int, Callable[[Metrics], object]] = {}
        self._asked = 0
        self._arrivals: Arrivals | None = None
        self._control = Control(end, self._told, self._orphaned, loop)

    async def serve(
        self, signature: Signature, backend: Backend, ready: control.Ready, health: Health | None = None
    ) -> bool:
        """Serves until stopped; gives whether everything accepted was answered.

        Args:
            signature: the model's.
            backend: runs its calls.
            ready: said to the supervisor once connections may come.
            health: says whether the backend works; None where `look` does.
        """
        front = Front(
            signature, backend, self._metrics, self._options, self._access, gather=self._gather, health=health
        )
        self._arrivals = Arrivals(front.hub, self._access.tls_options(self._options.limits))
        settle()
        reporting = self._loop.create_task(self._report(front))

        def announce() -> None:
            self.look()
            self._control.send(ready)

        try:
            return await front.serve(self, self._stop, announce)
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

    def look(self) -> None:
        """Called twice a second, for those who know whether this process is ready."""

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

    async def _report(self, front: Front) -> None:
        while True:
            self.look()
            if not self._metrics.live:
                self._stop.asked.set()
            self._control.send(control.Connections(front.hub.open))
            self._control.send(control.Counts(self._metrics.counts()))
            await asyncio.sleep(control.REPORT_S)

    def _gather(self, then: Callable[[Metrics], object]) -> None:
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
