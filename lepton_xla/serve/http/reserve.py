"""Connections that get one answer: those beyond the limits, which may ask for health, and those that took a wrong turn.

An orchestrator that cannot reach the health of a server takes it for dead, and ends one that only has much to do. So a
few connections beyond the limits are accepted. Where more come, the oldest is closed for each new one: however many
there are, few files are open for them, and a new connection always has its chance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.exchange import Head
from lepton_xla.serve.http.hub import Hub

RESERVED = 64
"""Connections beyond the limits that are kept until they are answered, and as many in a TLS handshake."""

HANDSHAKE_S = 2.0
"""How long a TLS handshake beyond the limits may take."""

# How long TLS may take to say goodbye on a connection that has to make room.
_GOODBYE_S = 0.1


class LastConnection(Connection):
    """A connection that is closed by its first answer. It does not count towards the limits.

    Args:
        hub: as of any connection.
        refusal: what every request gets.
        answered: paths of which it gets an answer all the same.
    """

    __slots__ = ("_answered", "_refusal")

    def __init__(self, hub: Hub, refusal: RefusedError, answered: AbstractSet[bytes] = frozenset()) -> None:
        super().__init__(hub)
        self._refusal = refusal
        self._answered = answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        super()._leave_address()
        hub = self._hub
        hub.last += 1
        hub.reserve[self] = None
        if len(hub.reserve) > RESERVED:
            oldest = next(iter(hub.reserve))
            del hub.reserve[oldest]
            oldest.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._hub.last -= 1
        self._hub.reserve.pop(self, None)

    def _leave_address(self) -> None:
        pass  # it has left

    def make_room(self) -> None:
        """Refuses what has not been asked yet, and closes without waiting for the client to close too."""
        self._fail(self._refusal.bare())
        self._transport.close()
        if not self._transport.can_write_eof():
            asyncio.get_running_loop().call_later(_GOODBYE_S, self._part)

    def _is_answered(self, target: bytes) -> bool:
        return target.partition(b"?")[0] in self._answered

    def consider(self, target: bytes, headers: dict[bytes, bytes]) -> None:
        """Only health may be asked here, without a body."""
        with_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        if with_body or not self._is_answered(target):
            raise self._refusal.bare()

    def dispatch(self, head: Head, body: bytes, trace: bytes | None) -> None:
        """Has it handled if it asks for health."""
        if body or not self._is_answered(head.target):
            self._hub.buffered_bytes -= len(body)
            self._fail(self._refusal.bare(), head.method)
            return
        super().dispatch(Head(head.method, head.target, head.headers, keep_alive=False, old=head.old), body, trace)
