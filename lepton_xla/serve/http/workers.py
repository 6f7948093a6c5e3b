"""Threads for long work on bodies, so that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lepton_xla.serve.errors import RefusedError

_log = logging.getLogger("lepton_xla.serve")

_THREADS = 2


class Workers:
    """Runs work on a few threads, and hands what comes of it to the event loop. Used on the event loop only.

    Args:
        max_bytes: of bodies in hand and waiting; beyond them work is refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "lepton-codec")
        self._max_bytes = max_bytes
        self._bytes = 0

    def run[T](
        self, size: int, work: Callable[[], T], done: Callable[[T], object], failed: Callable[[RefusedError], object]
    ) -> None:
        """Runs `work` on a thread, then `done` with its result, or `failed`, on the event loop.

        Args:
            size: bytes it works on.
            work: may raise a `RefusedError`; any other exception is logged and becomes one with status 500.
            done: gets what it gave; may raise as `work`.
            failed: gets why there is nothing.

        Raises:
            RefusedError: 503 where too much waits.
        """
        if self._bytes and self._bytes + size > self._max_bytes:
            raise RefusedError(503, "too many large requests are being read or written")
        self._bytes += size
        loop = asyncio.get_running_loop()

        def finish(result: T | None, refusal: RefusedError | None) -> None:
            self._bytes -= size
            if refusal is not None:
                failed(refusal)
                return
            try:
                done(result)  # type: ignore[arg-type]
            except RefusedError as error:
                failed(error)
            except Exception:
                _log.exception("a request could not be handled")
                failed(RefusedError(500, "internal error"))

        def task() -> None:
            result: T | None = None
            refusal: RefusedError | None = None
            try:
                result = work()
            except RefusedError as error:
                refusal = error.bare()
            except Exception:
                _log.exception("a request could not be handled")
                refusal = RefusedError(500, "internal error")
            try:
                loop.call_soon_threadsafe(finish, result, refusal)
            except RuntimeError:
                _log.warning("a request was read or written after the server had stopped")

        self._pool.submit(task)

    def close(self) -> None:
        """Takes no more work; what runs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
