"""The route of the audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from lepton_xla.errors import ServeError
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.observe.audit import Audit
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol.auditing import entries_asked

_log = logging.getLogger("lepton_xla.serve")


class AuditPage:
    """Answers with the latest changes. Any worker can: all write to one file.

    Args:
        path: the audit log; None if none is kept.
        metrics: the server's counters.
        refuse: answers with an error.

    Raises:
        ServeError: if the file cannot be written.
    """

    def __init__(
        self, path: Path | None, metrics: ServerMetrics, refuse: Callable[[Exchange, HTTPError], object]
    ) -> None:
        self._audit = None if path is None else Audit(path)
        self._metrics = metrics
        self._refuse = refuse
        self._tasks: set[asyncio.Task[None]] = set()

    def show(self, exchange: Exchange) -> None:
        """Answer a request when the file has been read, on another thread."""
        count = entries_asked(exchange.head.target)
        if self._audit is None:
            raise HTTPError(501, "this server keeps no audit log: start it with --audit-log")
        task = asyncio.get_running_loop().create_task(self._show(self._audit, exchange, count))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _show(self, audit: Audit, exchange: Exchange, count: int) -> None:
        try:
            entries = await asyncio.to_thread(audit.tail, count)
        except ServeError as error:
            _log.error("%s", error)
            self._refuse(exchange, HTTPError(500, "the audit log cannot be read"))
            return
        if not exchange.answered:
            self._metrics.codes[200] += 1
            exchange.answer(200, msgspec.json.encode(entries))
