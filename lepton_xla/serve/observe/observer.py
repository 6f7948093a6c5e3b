"""Observers of single requests: the access log, which takes a sample, and tracing.

A server without observers pays nothing for this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple, Protocol, runtime_checkable

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.http.response import Response
from lepton_xla.serve.observe.refusals import template_of
from lepton_xla.serve.protocol.wire import InferRequest

GONE = 499
"""Status of a request whose client went away before the answer; nginx' number for it."""


class Times(NamedTuple):
    """When a batch ran, on the monotonic clock, and its size.

    Attributes:
        started_s: when the engine took it.
        staged_s: when its rows were copied.
        finished_s: when the outputs were ready.
        rows: rows without padding.
        size: rows with padding.
    """

    started_s: float
    staged_s: float
    finished_s: float
    rows: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A request that has ended. Times are seconds on the monotonic clock.

    Attributes:
        exchange: request and answer.
        route: its path with parameter names in place of their values.
        status: status of the answer; `GONE` if the client went away first.
        answer_bytes: size of the answer's header fields and body, without status line, `Date` and `Connection`.
        ended_s: when it was answered.
        request: the decoded infer request; None for other requests and those that could not be decoded.
        times: when its last batch ran; None if none did.
    """

    exchange: Exchange
    route: str
    status: int
    answer_bytes: int
    ended_s: float
    request: InferRequest | None
    times: Times | None


class Observer(Protocol):
    """Observes some requests."""

    def wants(self, exchange: Exchange) -> bool:
        """Whether to observe this request. Called for every request, so it must be cheap."""
        ...

    def saw(self, seen: Seen) -> None:
        """Called at the end of an observed request, before its answer is sent."""
        ...


@runtime_checkable
class Inference(Protocol):
    """The `work` of an infer request.

    Attributes:
        request: the decoded request.
        times: when its batch ran; None until then.
    """

    request: InferRequest
    times: Times | None


class Watch:
    """The watcher of an exchange: tells observers how it ended.

    Args:
        observers: those that want this exchange.
    """

    __slots__ = ("_observers",)

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def answered(self, exchange: Exchange, response: Response) -> None:
        """Tells observers about the answer."""
        self._end(exchange, response.status, response.nbytes)

    def gone(self, exchange: Exchange) -> None:
        """Tells observers that the client went away."""
        self._end(exchange, GONE, 0)

    def _end(self, exchange: Exchange, status: int, answer_bytes: int) -> None:
        request, times = None, None
        if isinstance(exchange.work, Inference):
            request, times = exchange.work.request, exchange.work.times
        seen = Seen(exchange, template_of(exchange.head), status, answer_bytes, monotonic(), request, times)
        for observer in self._observers:
            observer.saw(seen)


def watching(handle: Callable[[Exchange], None], observers: Sequence[Observer]) -> Callable[[Exchange], None]:
    """What handles exchanges and has observers see those that they want; `handle` itself where there are none."""

    def watched(exchange: Exchange) -> None:
        wanted = [observer for observer in observers if observer.wants(exchange)]
        if wanted:
            exchange.watcher = Watch(wanted)
        handle(exchange)

    return watched if observers else handle
