"""Memory of a connection's answers, from before the request is handled until the client has read the answer.

The size of an answer is reserved before its request is handled, and released when the transport takes the answer. What
the transport cannot send yet counts until it is sent. Both count against the same limit as request bodies. If a client
sends requests without reading answers, its further requests wait here unhandled, and then the connection is not read.
They also wait while a long body is decoded on another thread, because the size of its answer is unknown until then.
"""

from __future__ import annotations

from collections import deque

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.http.heads import buffer_refusal
from lepton_xla.serve.http.server_state import ServerState

AHEAD_BYTES = 1 << 20
"""With more than this in answers, a connection's next request is not handled; in bodies, it is not read."""


class Outgoing:
    """The answers of one connection that have not left.

    Args:
        state: shared by all connections.

    Attributes:
        held: whether the size of an answer is still unknown.
        waiting: requests read but not handled yet, in order.
    """

    __slots__ = ("_reserved", "_running", "_state", "_unsent", "held", "waiting")

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._reserved = self._unsent = 0
        self._running = self.held = False
        self.waiting: deque[Exchange] = deque()

    @property
    def full(self) -> bool:
        """Whether the next request has to wait."""
        return self.held or self._reserved + self._unsent > AHEAD_BYTES

    def reserve(self, nbytes: int) -> None:
        """Reserves bytes for an answer, or releases them if negative.

        Raises:
            HTTPError: 503 if the server holds too much already.
        """
        state = self._state
        if nbytes > 0 and state.buffered_bytes + nbytes > state.limits.max_buffered_bytes:
            raise buffer_refusal()
        state.buffered_bytes += nbytes
        self._reserved += nbytes

    def count(self, unsent: int) -> None:
        """Sets the number of bytes that the transport has not sent."""
        self._state.buffered_bytes += unsent - self._unsent
        self._unsent = unsent

    def handle(self, exchange: Exchange) -> None:
        """Passes a request to the handler, now or when there is room for its answer."""
        if self.full or self.waiting:
            self.waiting.append(exchange)
        else:
            self._state.handler(exchange)

    def go_on(self) -> None:
        """Passes waiting requests to the handler while there is room."""
        waiting = self.waiting
        if self._running:
            return  # the handler answered at once, within the loop below
        self._running = True
        try:
            while waiting and not self.full:
                exchange = waiting.popleft()
                if not exchange.answered:
                    self._state.handler(exchange)
        finally:
            self._running = False

    def end(self) -> None:
        """Releases everything: the connection is lost."""
        self.waiting.clear()
        self._state.buffered_bytes -= self._reserved + self._unsent
        self._reserved = self._unsent = 0
