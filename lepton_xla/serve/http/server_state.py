"""What the connections of a server share: limits, handler, counts."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.date import DATE
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.limits import Limits


class OpenConnection(Protocol):
    """A connection, as the state sees it."""

    @property
    def unanswered(self) -> int:
        """Number of requests read whose answers are not written yet."""
        ...

    @property
    def owing(self) -> bool:
        """Whether a request has no answer yet, or its answer has not left the process."""
        ...

    def quiet_s(self, now: float) -> float:
        """Seconds since the last answer; -1 while a request is read or answered."""
        ...

    def fileno(self) -> int:
        """The descriptor of its socket."""
        ...

    def end(self) -> None:
        """Closes it if it is idle."""
        ...

    def give_up(self, refusal: HTTPError) -> None:
        """Answers every open request with an error, and closes."""
        ...

    def abort(self) -> None:
        """Closes at once."""
        ...

    def sweep(self, now: float) -> None:
        """Closes it if a time limit has passed."""
        ...


class Reserved(OpenConnection, Protocol):
    """A connection beyond the limits, which gets one answer."""

    def make_room(self) -> None:
        """Refuses what has not been asked yet, and closes."""
        ...


@dataclasses.dataclass(slots=True)
class ServerState:
    """What the connections of a server share.

    Attributes:
        handler: takes every complete request, on the event loop; must answer it sooner or later.
        admit: told of a head before its body is read; raises `HTTPError` for one that may not bring any.
        invite: told of a head that waits to be told that its body is welcome; raises `HTTPError` where it is not.
        refused: told of errors answered that no handler saw, such as 400 for malformed HTTP.
        limits: the bounds.
        always: paths that are answered whatever the limits say.
        draining: set once for every connection to be closed by its next answer.
        connections: those open.
        arriving: how many are on their way, such as in a TLS handshake, and not among them yet.
        last: how many of them are closed by their first answer, and do not count towards the limits.
        reserve: those of them that may still be asking, oldest first.
        addresses: how many of both come from each client address.
        buffered_bytes: of all connections, bodies that are arriving or not answered yet, what was read and waits for
            its turn, and answers that are to come or not sent.
        heads: parsed heads by their bytes. Clients repeat them, and a hit costs a hundredth of a parse.
    """

    handler: Callable[[Exchange], None]
    limits: Limits
    admit: Callable[[Head], object] = lambda head: None
    invite: Callable[[Head], object] = lambda head: None
    refused: Callable[[HTTPError], None] = lambda refusal: None
    always: frozenset[bytes] = frozenset()
    draining: bool = False
    connections: set[OpenConnection] = dataclasses.field(default_factory=set[OpenConnection])
    arriving: int = 0
    last: int = 0
    reserve: dict[Reserved, None] = dataclasses.field(default_factory=dict[Reserved, None])
    addresses: Counter[str] = dataclasses.field(default_factory=Counter[str])
    buffered_bytes: int = 0
    heads: dict[bytes, Head] = dataclasses.field(default_factory=dict[bytes, Head])

    @property
    def open(self) -> int:
        """Number of connections, those in a handshake included."""
        return len(self.connections) + self.arriving

    def full(self, address: str) -> HTTPError | None:
        """The reason to refuse another connection, or None.

        Args:
            address: of the client; empty on a Unix socket, where all of them share one.
        """
        limits = self.limits
        if self.open - self.last >= limits.max_connections:
            return HTTPError(503, "too many connections")
        if address and self.addresses[address] >= limits.max_connections_per_address:
            return HTTPError(503, "too many connections from this address")
        return None

    @property
    def in_flight(self) -> int:
        """Number of requests without an answer, or whose answer waits for an earlier one."""
        return sum(connection.unanswered for connection in self.connections)

    def figures(self) -> dict[str, float]:
        """The gauges that `Metrics` shows."""
        return {"in_flight": self.in_flight, "connections": self.open, "buffered_bytes": self.buffered_bytes}

    def sweep(self, now: float) -> None:
        """Enforces the time limits and updates the `Date` of answers. Call it about once a second."""
        DATE.tick(time.time())
        for connection in tuple(self.connections):
            connection.sweep(now)
