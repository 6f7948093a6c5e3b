"""A front-end process: it speaks HTTP with clients, and never imports JAX.

It is started by the supervisor, as `python -m lepton_xla.serve.split.frontend`, with one end of a pair. The supervisor
takes the connections and deals them out: of several event loops at one listening socket, one gets nearly all.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvloop

from lepton_xla.errors import LeptonError
from lepton_xla.serve.front import Front
from lepton_xla.serve.http.arrivals import Arrivals
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.observe.logs import configure
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.process import settle
from lepton_xla.serve.split import control
from lepton_xla.serve.split.control import Control
from lepton_xla.serve.split.hello import Hello
from lepton_xla.serve.split.packets import close_all
from lepton_xla.serve.split.remote import RemoteScheduler

_log = logging.getLogger("lepton_xla.serve")

# So long after a link is gone another is asked for.
_AGAIN_S = 0.1


class FrontEndProcess:
    """A front-end, its supervisor, and the engine that the supervisor links it with.

    Args:
        settings: what the server was told.
        end: of the pair whose other end the supervisor has.
        loop: the event loop.
    """

    def __init__(self, settings: control.Settings, end: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._options = settings.options
        self._access = settings.options.access()
        self._metrics = Metrics(settings.model)
        self._loop = loop
        self._stop = Stop()
        self._no_more = asyncio.Event()
        self._greeted = asyncio.Event()
        self._hello: Hello | None = None
        self._front: Front | None = None
        self._askers: dict[int, Callable[[Metrics], object]] = {}
        self._asked = 0
        self._arrivals: Arrivals | None = None
        self._control = Control(end, self._told, self._orphaned, loop)
        self._scheduler = RemoteScheduler(
            settings.options.limits.max_buffered_bytes, self._metrics, self._wish, self._met, loop
        )

    async def run(self) -> bool:
        """Serves until stopped; gives whether everything accepted was answered."""
        self._stop.listen(self._loop)
        self._stop.warming = False
        self._control.send(control.NoLink())
        await asyncio.wait(
            [self._loop.create_task(event.wait()) for event in (self._greeted, self._stop.asked)],
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._hello is None:
            return True
        front = self._front = Front(
            self._hello.signature, self._scheduler, self._metrics, self._options, self._access, gather=self._gather
        )
        self._arrivals = Arrivals(front.hub, self._access.tls_options(self._options.limits))
        settle()
        reporting = self._loop.create_task(self._report(front))
        try:
            return await front.serve(self, self._stop, self._announce)
        finally:
            reporting.cancel()
            self._control.send(control.Counts(self._metrics.counts()))
            self._control.close()

    def _announce(self) -> None:
        # Between the first hello and now the engine may have gone.
        self._metrics.ready = self._scheduler.ready
        self._control.send(control.Ready(self._hello.name if self._hello else ""))

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
            case control.Link():
                (fd,) = fds
                self._scheduler.connect(socket.socket(fileno=fd))
            case control.Stop(hurried):
                self._stop.asked.set()
                if hurried:
                    self._stop.hurried.set()
            case control.Reload():
                self._access.refresh(force=True)
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

    # The engine.

    def _wish(self) -> None:
        self._metrics.ready = False
        self._loop.call_later(_AGAIN_S, self._control.send, control.NoLink())

    def _met(self, hello: Hello) -> None:
        if self._hello is None:
            self._hello = hello
            self._greeted.set()
        elif hello != self._hello:
            _log.warning("the model has changed; this front-end ends, and is started again")
            self._stop.asked.set()
        else:
            self._metrics.ready = self._front is not None and not self._stop.asked.is_set()

    # What is counted.

    async def _report(self, front: Front) -> None:
        while True:
            self._metrics.ready = self._scheduler.ready and not self._stop.asked.is_set()
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


async def _main(settings: control.Settings, end: socket.socket) -> bool:
    return await FrontEndProcess(settings, end, asyncio.get_running_loop()).run()


def main() -> int:
    """The process; gives its exit code: 1 where something accepted was not answered."""
    end = socket.socket(fileno=int(sys.argv[1]))
    settings = control.settings_of(end)
    configure(settings.json_logs)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return 0 if runner.run(_main(settings, end)) else 1
    except LeptonError as error:
        control.say(end, control.Failed(str(error)))
        return 1


if __name__ == "__main__":
    sys.exit(main())
