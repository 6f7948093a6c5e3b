"""Observed requests: samples for the access log, and those that are traced.

What is not watched costs nothing: a server that watches no requests uses `App` itself, and of a watched one only the
answers' way out is led through here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple, Protocol

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.observe.refusals import template_of
from lepton_xla.serve.protocol.wire import InferRequest

GONE = 499
"""Status of a request whose client went away before the answer, as in nginx."""


class Times(NamedTuple):
    """When a batch ran, of the monotonic clock, and with what.

    Attributes:
        started_s: when the engine took it.
        staged_s: when its rows were copied.
        finished_s: when the outputs were there.
        rows: real rows.
        size: rows with padding.
    """

    started_s: float
    staged_s: float
    finished_s: float
    rows: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A finished request. Times are in seconds of the monotonic clock.

    Attributes:
        exchange: request and answer.
        route: its path with the names of parameters in it.
        status: of the answer.
        answer_bytes: of the whole answer.
        ended_s: when it was given.
        request: what came, of an infer request that could be read.
        times: of the batch that it ran in, the last one if there were several; None where it is not known.
    """

    exchange: Exchange
    route: str
    status: int
    answer_bytes: int
    ended_s: float
    request: InferRequest | None
    times: Times | None


class Observer(Protocol):
    """Observes some of the requests."""

    def wants(self, exchange: Exchange) -> bool:
        """Whether to observe this request. Called for every request, so it must be cheap."""
        ...

    def saw(self, seen: Seen) -> None:
        """Takes a finished request that it wanted, before the answer leaves."""
        ...


class Tap:
    """Sits between an observed request and its connection.

    Attributes:
        request: what came, once it is read.
        times: of its batch, once it has run.
    """

    __slots__ = ("_connection", "_exchange", "_observers", "request", "times")

    def __init__(self, exchange: Exchange, observers: Sequence[Observer]) -> None:
        self._exchange = exchange
        self._observers = observers
        self._connection, exchange.connection = exchange.connection, self
        self.request: InferRequest | None = None
        self.times: Times | None = None

    def flush(self) -> None:
        """The exchange has its answer."""
        payload = self._exchange.payload
        assert payload is not None
        self._end(int(payload[9:12]), len(payload))
        self._connection.flush()

    def reserve(self, nbytes: int) -> None:
        """Reserves memory for the answer."""
        self._connection.reserve(nbytes)

    def hold(self, held: bool) -> None:
        """Starts or stops holding back the requests after it."""
        self._connection.hold(held)

    def abandoned(self) -> None:
        """The client went away."""
        self._end(GONE, 0)

    def _end(self, status: int, answer_bytes: int) -> None:
        exchange = self._exchange
        exchange.connection = self._connection
        seen = Seen(
            exchange, template_of(exchange.head), status, answer_bytes, monotonic(), self.request, self.times
        )  # fmt: skip
        for observer in self._observers:
            observer.saw(seen)
