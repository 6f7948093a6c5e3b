"""Log lines of requests that got an error, so few that nobody can fill a disk with them."""

from __future__ import annotations

import logging
from typing import Any

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.observe.logs import Throttle
from lepton_xla.serve.protocol import routes

_log = logging.getLogger("lepton_xla.serve")

_LONGEST_ID = 128


class Refusals:
    """Tells of requests that got an error; of each status a few in ten seconds. All of them are counted in `Metrics`.

    Args:
        throttle: bounds the lines.
    """

    def __init__(self, throttle: Throttle | None = None) -> None:
        self._throttle = throttle or Throttle()

    def note(self, refusal: HTTPError, exchange: Exchange | None = None, request_id: str | None = None) -> None:
        """Told of one.

        Args:
            refusal: the error.
            exchange: its request, if it could be read as one.
            request_id: the client's.
        """
        status = refusal.status
        left_out = self._throttle.ask(status)
        if left_out is None:
            return
        fields: dict[str, Any] = {"status": status, "error": refusal.message}
        if exchange is not None:
            fields |= {"method": exchange.head.method.decode("latin-1"), "route": template_of(exchange.head)}
            fields |= ids(exchange, request_id)
        if left_out:
            fields["left_out"] = left_out
        level = logging.WARNING if status >= 500 or status in (401, 403) else logging.INFO
        _log.log(level, "request refused", extra={"fields": fields, "throttled": True})


def ids(exchange: Exchange, request_id: str | None) -> dict[str, str]:
    """What tells a request from others, as far as the client gave it."""
    given: dict[str, str] = {}
    if request_id is not None:
        given["request_id"] = request_id[:_LONGEST_ID]
    if exchange.trace is not None:
        given["trace_id"] = exchange.trace[3:35].decode()
    return given


def template_of(head: Head) -> str:
    """The path of a head's route with the names of its parameters in it, never what the client wrote."""
    try:
        route, parameters = routes.find(head.method, head.target)
    except HTTPError:
        return "none"
    return next(path for path in route.paths if all(f"{{{name}}}" in path for name in parameters))
