"""Answers that take a while: some work is awaited, and its result is the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol import metadata

_log = logging.getLogger("lepton_xla.serve")

STATUS = {"invalid": 400, "missing": 404, "conflict": 409, "failed": 503, "large": 507}
"""HTTP status by kind of `RepositoryError`, whichever route it is of."""


class Later:
    """Answers when some work is done.

    Args:
        metrics: the server's counters.
        refuse: answers with an error.
    """

    def __init__(self, metrics: ServerMetrics, refuse: Callable[[Exchange, HTTPError], object]) -> None:
        self._metrics = metrics
        self._refuse = refuse
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, exchange: Exchange, work: Coroutine[Any, Any, Any], failed: str) -> None:
        """Answers with what `work` returns, or with the error that it raises, which `failed` begins."""
        task = asyncio.get_running_loop().create_task(self._run(exchange, work, failed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, exchange: Exchange, work: Coroutine[Any, Any, Any], failed: str) -> None:
        try:
            result = await work
        except HTTPError as error:
            self._refuse(exchange, error.bare())
        except RepositoryError as error:
            self._refuse(exchange, HTTPError(STATUS[error.kind], f"{failed}, {error}"))
        except Exception:
            _log.exception("%s", failed)
            self._refuse(exchange, HTTPError(500, f"{failed}, internal error"))
        else:
            if not exchange.answered:
                self._metrics.codes[200] += 1
                exchange.answer(200, msgspec.json.encode(metadata.Done() if result is None else result))
