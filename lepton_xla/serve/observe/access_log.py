"""The access log: a line for one request in so many."""

from __future__ import annotations

import logging
import random
from typing import Any

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.observe.logs import ACCESS
from lepton_xla.serve.observe.observer import Seen
from lepton_xla.serve.observe.refusals import ids

_log = logging.getLogger(ACCESS)


class AccessLog:
    """Writes a line for a share of the requests: what was asked and answered, never paths, payloads or tokens.

    Args:
        share: of the requests, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._random = random.Random().random  # noqa: S311 (it chooses lines of a log)

    def wants(self, exchange: Exchange) -> bool:
        """Whether a request is of the share."""
        return self._random() < self._share

    def saw(self, seen: Seen) -> None:
        """Writes the line."""
        exchange, times = seen.exchange, seen.times
        fields: dict[str, Any] = {
            "method": exchange.head.method.decode("latin-1"),
            "route": seen.route,
            "status": seen.status,
            "request_bytes": len(exchange.body),
            "answer_bytes": seen.answer_bytes,
            "ms": round((seen.ended_s - exchange.started_s) * 1e3, 3),
        }
        request_id = None
        if seen.request is not None:
            request_id = seen.request.spec.id
            fields["rows"] = seen.request.spec.rows
        if times is not None:
            fields |= {
                "batch_rows": times.rows,
                "batch_size": times.size,
                "queue_ms": round((times.started_s - exchange.started_s) * 1e3, 3),
                "compute_ms": round((times.finished_s - times.started_s) * 1e3, 3),
            }
        _log.info("request", extra={"fields": fields | ids(exchange, request_id)})
