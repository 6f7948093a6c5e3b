"""Connections that get one answer: beyond the limits they may ask for health; plain HTTP on a TLS port gets an error.

An orchestrator that gets no answer to a health check takes the server for dead, and kills one that is only busy. So the
server accepts a few connections beyond the limits, and closes the oldest of them for each new one. However many come,
few files are open for them, and every new connection can ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.exchange import Head
from lepton_xla.serve.http.server_state import ServerState

RESERVED = 64
"""Number of connections kept beyond the limits, and of TLS handshakes beyond them."""

HANDSHAKE_S = 2.0
"""Time limit of a TLS handshake beyond the limits."""

# Time for the TLS close_notify of a connection that makes room.
_GOODBYE_S = 0.1


class LastConnection(Connection):
    """A connection that is closed by its first answer. It does not count towards the limits.

    Args:
        state: shared by all connections.
        refusal: the answer to every request,
        answered: except to those for these paths.
    """

    __slots__ = ("_answered", "_refusal")

    def __init__(self, state: ServerState, refusal: HTTPError, answered: AbstractSet[bytes] = frozenset()) -> None:
        super().__init__(state)
        self._refusal = refusal
        self._answered = answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        super()._leave_address()
        state = self._state
        state.last += 1
        state.reserve[self] = None
        if len(state.reserve) > RESERVED:
            oldest = next(iter(state.reserve))
            del state.reserve[oldest]
            oldest.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._state.last -= 1
        self._state.reserve.pop(self, None)

    def _leave_address(self) -> None:
        pass  # `connection_made` has done it

    def make_room(self) -> None:
        """Refuses a request that has not come yet, and closes without waiting for the client."""
        self._fail(self._refusal.bare())
        self._transport.close()
        if not self._transport.can_write_eof():
            asyncio.get_running_loop().call_later(_GOODBYE_S, self._part)

    def _is_answered(self, target: bytes) -> bool:
        return target.partition(b"?")[0] in self._answered

    def consider(self, target: bytes, headers: dict[bytes, bytes]) -> None:
        """Refuses everything except health checks without a body."""
        with_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        if with_body or not self._is_answered(target):
            raise self._refusal.bare()

    def dispatch(self, head: Head, body: bytes, trace: bytes | None) -> None:
        """Passes health checks to the handler, and refuses everything else."""
        if body or not self._is_answered(head.target):
            self._state.buffered_bytes -= len(body)
            self._fail(self._refusal.bare(), head.method)
            return
        super().dispatch(Head(head.method, head.target, head.headers, keep_alive=False, old=head.old), body, trace)
