"""HTTP errors of requests that get no result."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

from lepton_xla.serve.batching.tickets import Reason
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.observe.metrics import Metrics

_LONGEST_RETRY_S = 60
# How long a predicted `Retry-After` is reused. It is in whole seconds.
_PREDICTED_S = 0.01

# Status and message. 503: overload, try again; 504: the deadline.
_ERRORS: dict[Reason, tuple[int, str]] = {
    Reason.FULL: (503, "the queue is full"),
    Reason.OUTRANKED: (503, "the queue is full, and others have a higher priority"),
    Reason.OVERLOADED: (503, "too much waits for an answer within the request's timeout"),
    Reason.TOO_SHORT: (504, "the request's timeout is shorter than running it takes"),
    Reason.EXPIRED: (504, "the request's timeout has passed"),
}


class Rejections:
    """Makes and counts the errors. An overloaded server makes many, so those for overload are reused for a moment.

    Args:
        metrics: counts them.
        drain_s: predicts, at a time, the seconds until the queue has run.
    """

    def __init__(self, metrics: Metrics, drain_s: Callable[[float], float]) -> None:
        self._metrics = metrics
        self._drain_s = drain_s
        self._made: dict[Reason, HTTPError] = {}
        self._retry_after = ""
        self._until_s = -math.inf

    def error(self, reason: Reason) -> HTTPError:
        """The error for a reason, counted once."""
        status, message = _ERRORS[reason]
        if status != 503:
            self._metrics.expired += 1
            return HTTPError(status, message)
        self._metrics.rejected += 1
        now = monotonic()
        if now >= self._until_s:
            seconds = min(max(math.ceil(self._drain_s(now)), 1), _LONGEST_RETRY_S)
            self._retry_after = f"Retry-After: {seconds}"
            self._until_s = now + _PREDICTED_S
            self._made.clear()
        error = self._made.get(reason)
        if error is None:
            error = self._made[reason] = HTTPError(status, message, self._retry_after)
        return error
