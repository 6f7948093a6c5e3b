"""Requests that a model's own limits refuse before they are queued: too many a second, or too many under way."""

from __future__ import annotations

import math
from collections.abc import Callable

from lepton_xla.serve.batching.tickets import Ticket
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.rates import Rate


class Admission:
    """Admits requests to one model.

    Args:
        rate: requests per second, bursts of as many as one second has; None for no bound.
        max_concurrency: requests that may be under way, waiting ones included; None for no bound.
        drain_s: predicts, at a time, the seconds until the queue has run.
    """

    def __init__(self, rate: float | None, max_concurrency: int | None, drain_s: Callable[[float], float]) -> None:
        self._rate = Rate(rate)
        self._most = math.inf if max_concurrency is None else max_concurrency
        self._drain_s = drain_s
        self._open: set[Ticket] = set()

    def refusal(self, ticket: Ticket) -> HTTPError | None:
        """Admits a request, or gives the error: 503 for too many under way, 429 for too many a second."""
        now = ticket.arrival_s
        if len(self._open) >= self._most:
            wait = min(max(math.ceil(self._drain_s(now)), 1), 60)
            return HTTPError(503, "too many requests to this model are under way", f"Retry-After: {wait}")
        early = self._rate.take(now)
        if early:
            return HTTPError(429, "too many requests to this model", f"Retry-After: {max(1, math.ceil(early))}")
        self._open.add(ticket)
        return None

    def end(self, ticket: Ticket) -> None:
        """A request has its answer, or needs none. Calling it twice is harmless."""
        self._open.discard(ticket)
