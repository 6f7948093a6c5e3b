"""Stopping without losing a request.

A load balancer needs seconds to notice that a server is no longer ready, and a client that keeps a connection may be
sending on it just as it is closed. So the order is: readiness says no, while connections are still taken and every
answer asks the client to close its own; then no new connections, and what was accepted is answered; connections that
nobody uses are closed last, and only if nothing has arrived on them. Source for the states: Kubernetes' termination of
pods, where endpoints are removed at the same time as SIGTERM is sent, not before.
"""

from __future__ import annotations

import asyncio
import logging
import select
import signal
from time import monotonic
from typing import Protocol

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.server_state import ServerState

_log = logging.getLogger("lepton_xla.serve")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TICK_S = 0.005
# A connection whose last answer is younger than this is in use: its next request, and with it the answer that closes
# it in order, is probably on its way.
_QUIET_S = 0.5
# For the answers that are left at the end, which say that there will be none, to leave the process.
_PARTING_S = 0.1


class Stop:
    """Whether a stop is asked for, and whether it must not wait for anything.

    Attributes:
        asked: set once the server should stop.
        hurried: set once it should do so at once.
        warming: whether the model is being warmed up, which cannot be interrupted.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.warming = True

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes SIGTERM and SIGINT: the first asks, the second hurries, a third ends the process."""
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signal, loop)

    def _signal(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.asked.is_set():
            self.hurried.set()
        self.asked.set()
        if self.hurried.is_set() or self.warming:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)

    async def hurried_in(self, seconds: float) -> bool:
        """Waits so long, or until the stop is hurried; gives whether it is."""
        try:
            await asyncio.wait_for(self.hurried.wait(), seconds)
        except TimeoutError:
            return False
        return True


class Closable(Protocol):
    """Where connections come in."""

    async def close(self) -> None:
        """Lets in those that wait there, and no more."""
        ...


async def drain(state: ServerState, listener: Closable, stop: Stop, lame_duck_s: float, timeout_s: float) -> bool:
    """Stops a server; readiness must say no already.

    Args:
        state: the connections.
        listener: where they come in.
        stop: may hurry it.
        lame_duck_s: how long connections are still taken, and idle ones kept.
        timeout_s: how long after that answers are waited for.

    Returns:
        Whether everything accepted was answered.
    """
    state.draining = True
    _log.info("stopping: %d connections open, %d requests in hand", len(state.connections), state.in_flight)
    await stop.hurried_in(lame_duck_s)
    await listener.close()
    deadline = monotonic() + timeout_s
    while state.connections and monotonic() < deadline and not stop.hurried.is_set():
        _close_quiet(state, monotonic())
        await asyncio.sleep(_TICK_S)
    owing = sum(connection.owing for connection in state.connections)
    for connection in tuple(state.connections):
        connection.give_up(HTTPError(503, "the server has stopped"))
    if state.connections:
        await asyncio.sleep(_PARTING_S)
    if owing:
        _log.warning("stopped with %d connections that wait for an answer", owing)
    else:
        _log.info("stopped; everything accepted was answered")
    return not owing


def _close_quiet(state: ServerState, now: float) -> None:
    """Closes the connections that nobody has used for a while, unless a request lies unread in their sockets."""
    quiet = {each.fileno(): each for each in tuple(state.connections) if each.quiet_s(now) >= _QUIET_S}
    if not quiet:
        return
    poll = select.poll()
    for number in quiet:
        poll.register(number, select.POLLIN)
    for number, _ in poll.poll(0):
        del quiet[number]
    for connection in quiet.values():
        connection.end()
