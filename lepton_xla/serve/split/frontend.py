"""A front-end process: it speaks HTTP with clients, has another process run their calls, and never imports JAX.

It is started by the supervisor, as `python -m lepton_xla.serve.split.frontend`, with one end of a pair.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.split import control
from lepton_xla.serve.split.child import run_child
from lepton_xla.serve.split.hello import Hello
from lepton_xla.serve.split.http_process import HttpProcess
from lepton_xla.serve.split.remote import RemoteScheduler

_log = logging.getLogger("lepton_xla.serve")

# So long after a link is gone another is asked for.
_AGAIN_S = 0.1


class FrontEndProcess(HttpProcess):
    """A front-end, and the engine that the supervisor links it with.

    Args:
        settings: what the server was told.
        end: of the pair whose other end the supervisor has.
        loop: the event loop.
    """

    def __init__(self, settings: control.Settings, end: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(settings, Metrics(settings.model), end, loop)
        self._greeted = asyncio.Event()
        self._hello: Hello | None = None
        self._scheduler = RemoteScheduler(
            settings.options.limits.max_buffered_bytes, self._metrics, self._wish, self._met, loop
        )

    async def run(self) -> bool:
        """Serves until stopped; gives whether everything accepted was answered."""
        self._control.send(control.NoLink())
        await asyncio.wait(
            [self._loop.create_task(event.wait()) for event in (self._greeted, self._stop.asked)],
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._hello is None:
            return True
        return await self.serve(self._hello.signature, self._scheduler, control.Ready(self._hello.name))

    def look(self) -> None:
        """Ready is who has an engine."""
        self._metrics.ready = self._scheduler.ready and not self._stop.asked.is_set()

    def _told(self, message: control.Message, fds: list[int]) -> None:
        if isinstance(message, control.Link):
            (fd,) = fds
            self._scheduler.connect(socket.socket(fileno=fd))
        else:
            super()._told(message, fds)

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
        elif self._arrivals is not None:
            self.look()


async def _main(settings: control.Settings, end: socket.socket) -> bool:
    return await FrontEndProcess(settings, end, asyncio.get_running_loop()).run()


if __name__ == "__main__":
    sys.exit(run_child(_main))
