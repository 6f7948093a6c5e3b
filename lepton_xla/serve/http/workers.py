"""Threads that decode and encode long bodies while the event loop goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange

_log = logging.getLogger("lepton_xla.serve")

_THREADS = 2


class Workers:
    """Runs work on a few threads, and returns results to the event loop. Call it on the event loop only.

    Args:
        max_bytes: of bodies being worked on or waiting; more are refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "lepton-codec")
        self._max_bytes = max_bytes
        self._bytes = 0

    def run[T](
        self, size: int, work: Callable[[], T], done: Callable[[T], object], failed: Callable[[HTTPError], object]
    ) -> None:
        """Runs `work` on a thread, then `done` with its result, or `failed`, on the event loop.

        Args:
            size: bytes of the body.
            work: may raise a `HTTPError`; any other exception is logged and becomes one with status 500.
            done: gets the result; may raise as `work` does.
            failed: gets the error.

        Raises:
            HTTPError: 503 if too much is waiting.
        """
        if self._bytes and self._bytes + size > self._max_bytes:
            raise HTTPError(503, "too many large requests are being read or written")
        self._bytes += size
        loop = asyncio.get_running_loop()

        def finish(result: T | None, refusal: HTTPError | None) -> None:
            self._bytes -= size
            if refusal is not None:
                failed(refusal)
                return
            try:
                done(result)  # type: ignore[arg-type]
            except HTTPError as error:
                failed(error)
            except Exception:
                _log.exception("a request could not be handled")
                failed(HTTPError(500, "internal error"))

        def task() -> None:
            result: T | None = None
            refusal: HTTPError | None = None
            try:
                result = work()
            except HTTPError as error:
                refusal = error.bare()
            except Exception:
                _log.exception("a request could not be handled")
                refusal = HTTPError(500, "internal error")
            try:
                loop.call_soon_threadsafe(finish, result, refusal)
            except RuntimeError:
                _log.warning("a request was read or written after the server had stopped")

        self._pool.submit(task)

    def read[T](
        self,
        exchange: Exchange,
        work: Callable[[], T],
        begin: Callable[[T], object],
        refuse: Callable[[Exchange, HTTPError], object],
    ) -> None:
        """Reads a long body on a thread. The connection keeps the answers in order.

        Args:
            exchange: the request.
            work: reads it; see `run`.
            begin: gets what was read, unless the client has gone.
            refuse: answers with an error.
        """

        def done(result: T) -> None:
            # An exchange whose client has gone counts as answered.
            if not exchange.answered:
                begin(result)
            exchange.connection.hold(False)

        def failed(refusal: HTTPError) -> None:
            refuse(exchange, refusal)
            exchange.connection.hold(False)

        exchange.connection.hold(True)
        try:
            self.run(len(exchange.body), work, done, failed)
        except HTTPError as refusal:
            failed(refusal)

    def close(self) -> None:
        """Accepts no more work. What runs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
