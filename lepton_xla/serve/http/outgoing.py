"""Memory on the way out of a connection: answers that are to come, and answers that the client has not read.

It counts against the bounds on what comes in, from before a request is handled: what its answer will take is set aside
then, and given back when the transport has it; what the transport cannot send yet counts until it is gone. A client
that asks on without reading has its further requests wait here, unhandled, and then is not read from. They also wait
while a long body is read on another thread, because the size of its answer is not known before.
"""

from __future__ import annotations

from collections import deque

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.http.heads import buffer_refusal
from lepton_xla.serve.http.hub import Hub

AHEAD_BYTES = 1 << 20
"""Of the answers of one connection, and of its bodies: beyond it no further request is handled, or read."""


class Outgoing:
    """What one connection has on its way out.

    Args:
        hub: what the connections share.

    Attributes:
        held: whether the size of an answer is not known yet.
        waiting: requests that are read and not handled yet, in their order.
    """

    __slots__ = ("_hub", "_reserved", "_running", "_unsent", "held", "waiting")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._reserved = self._unsent = 0
        self._running = self.held = False
        self.waiting: deque[Exchange] = deque()

    @property
    def full(self) -> bool:
        """Whether another request has to wait."""
        return self.held or self._reserved + self._unsent > AHEAD_BYTES

    def reserve(self, nbytes: int) -> None:
        """Sets so much aside for an answer, or gives it back where it is negative.

        Raises:
            RefusedError: 503 where the server holds too much already.
        """
        hub = self._hub
        if nbytes > 0 and hub.buffered_bytes + nbytes > hub.limits.max_buffered_bytes:
            raise buffer_refusal()
        hub.buffered_bytes += nbytes
        self._reserved += nbytes

    def count(self, unsent: int) -> None:
        """Told how much the transport holds."""
        self._hub.buffered_bytes += unsent - self._unsent
        self._unsent = unsent

    def handle(self, exchange: Exchange) -> None:
        """Has a request handled, now or when there is room for its answer."""
        if self.full or self.waiting:
            self.waiting.append(exchange)
        else:
            self._hub.handler(exchange)

    def go_on(self) -> None:
        """Has requests handled that there is room for now."""
        waiting = self.waiting
        if self._running:
            return  # an answer was there at once
        self._running = True
        try:
            while waiting and not self.full:
                exchange = waiting.popleft()
                if not exchange.answered:
                    self._hub.handler(exchange)
        finally:
            self._running = False

    def end(self) -> None:
        """Gives everything back: the connection is lost."""
        self.waiting.clear()
        self._hub.buffered_bytes -= self._reserved + self._unsent
        self._reserved = self._unsent = 0
