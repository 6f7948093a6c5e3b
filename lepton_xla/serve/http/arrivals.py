"""Accepts sockets and makes connections of them, after a TLS handshake if there is one."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.listening import Listening
from lepton_xla.serve.http.reserve import HANDSHAKE_S, RESERVED, LastConnection
from lepton_xla.serve.http.server_state import ServerState

_log = logging.getLogger("lepton_xla.serve")

AT_ONCE = 64
"""Connections accepted in one turn of the event loop."""

# Pause after the process has run out of file descriptors.
_FULL_S = 0.5
_PLAIN = HTTPError(400, "plain HTTP was sent to a port that speaks TLS: use https://")

# Turns of the event loop before a connection counts as beyond the limits: closed ones leave meanwhile.
_TURNS = 3
# Wait for handshakes that are under way when the server stops accepting.
_SETTLE_S = 1.0


def accept(
    listener: socket.socket, loop: asyncio.AbstractEventLoop, resume: Callable[[], object]
) -> socket.socket | None:
    """Accepts a connection at a non-blocking listening socket; None if there is none.

    Args:
        listener: the socket, watched by the event loop.
        loop: the event loop. It stops watching if the process has no file descriptor left.
        resume: called half a second later, to watch again.
    """
    while True:
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except ConnectionAbortedError:
            continue
        except OSError as error:
            _log.error("connections cannot be taken: %s", error.strerror)
            loop.remove_reader(listener)
            loop.call_later(_FULL_S, resume)
            return None


def _address_of(accepted: socket.socket) -> str:
    """The client's address; empty for a Unix socket.

    Raises:
        OSError: if the client has gone.
    """
    return "" if accepted.family == socket.AF_UNIX else str(accepted.getpeername()[0])


class Arrivals:
    """Makes connections of accepted sockets. TLS handshakes take at most `head_timeout_s`.

    A socket counts as a connection from the start. Beyond the limits it gets one answer: health, or that there are too
    many. At most `RESERVED` TLS handshakes run beyond the limits; each further one closes the oldest.

    Args:
        state: shared by all connections.
        tls: options of the event loop for TLS; empty for plain HTTP.
    """

    def __init__(self, state: ServerState, tls: dict[str, Any]) -> None:
        self._state = state
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._beyond: dict[asyncio.Task[None], None] = {}

    def take(self, accepted: socket.socket) -> None:
        """Takes an accepted socket over."""
        state = self._state
        try:
            address = _address_of(accepted)
        except OSError:
            accepted.close()  # gone
            return
        connection = Connection(state)
        if state.full(address) is None:
            connection.announce(address)
            self._begin(self._enter(accepted, connection))
            return
        task = self._begin(self._enter_beyond(accepted, connection, address))
        if self._tls:
            beyond = self._beyond
            beyond[task] = None

            def leave(done: asyncio.Task[None]) -> None:
                beyond.pop(done, None)
                if done.cancelled():
                    accepted.close()

            task.add_done_callback(leave)
            if len(beyond) > RESERVED:
                oldest = next(iter(beyond))
                del beyond[oldest]
                oldest.cancel()

    def _begin(self, entering: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(entering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _enter_beyond(self, accepted: socket.socket, connection: Connection, address: str) -> None:
        state = self._state
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        refusal = state.full(address)
        if refusal is None:
            connection.announce(address)
        else:
            connection = LastConnection(state, refusal, state.always)
        await self._enter(accepted, connection)

    async def _enter(self, accepted: socket.socket, connection: Connection) -> None:
        tls: dict[str, Any] = self._tls
        limit_s = self._state.limits.head_timeout_s
        try:
            if tls:
                if isinstance(connection, LastConnection):
                    limit_s = min(HANDSHAKE_S, limit_s)
                    tls = {**tls, "ssl_handshake_timeout": limit_s}
                if await self._is_plain(accepted, limit_s):
                    connection.recall()
                    connection = LastConnection(self._state, _PLAIN)
                    tls = {}
            taken = connection
            await self._loop.connect_accepted_socket(lambda: taken, accepted, **tls)
        except OSError:
            accepted.close()  # gone, or not TLS
        finally:
            connection.recall()

    async def _is_plain(self, accepted: socket.socket, limit_s: float) -> bool:
        """Whether a client speaks plain HTTP instead of TLS: its first byte is a letter, not a record type.

        Raises:
            OSError: if nothing comes in time.
        """
        came = asyncio.Event()
        self._loop.add_reader(accepted, came.set)
        try:
            async with asyncio.timeout(limit_s):
                await came.wait()
        finally:
            self._loop.remove_reader(accepted)
        return accepted.recv(1, socket.MSG_PEEK).isalpha()

    async def settle(self) -> None:
        """Waits a moment for handshakes that are under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_SETTLE_S)


class Listener:
    """Listens and accepts, until closed.

    Args:
        state: shared by all connections.
        listening: the sockets.
        backlog: connections that may wait in the kernel.
        tls: see `Arrivals`.
    """

    def __init__(self, state: ServerState, listening: Listening, backlog: int, tls: dict[str, Any]) -> None:
        self._arrivals = Arrivals(state, tls)
        self._listening = listening
        self._backlog = backlog
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def open(self) -> None:
        """Starts to listen. uvloop's own server would accept one connection a turn of the event loop."""
        self._listening.open(self._backlog)
        self._watch()

    def _watch(self) -> None:
        if not self._closed:
            for listener in self._listening.sockets:
                self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Accepts the connections that wait; returns whether there may be more."""
        for _ in range(AT_ONCE):
            accepted = accept(listener, self._loop, self._watch)
            if accepted is None:
                return False
            self._arrivals.take(accepted)
        return True

    async def close(self) -> None:
        """Accepts the connections that the kernel has already, and stops listening."""
        # Closing the socket resets connections that wait.
        for listener in self._listening.sockets:
            while self._accept(listener):
                pass
            self._loop.remove_reader(listener)
        self._closed = True
        self._listening.close()
        await self._arrivals.settle()
