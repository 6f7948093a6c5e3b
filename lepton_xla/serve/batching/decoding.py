"""Decodes the sequences of one model together, on a thread of its own, and tells their tokens on the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from lepton_xla.generation.engine import Engine
from lepton_xla.generation.slots import Generation
from lepton_xla.serve.errors import HTTPError

_log = logging.getLogger("lepton_xla.serve")

# Without work for so long, the thread ends; the next request starts another.
_IDLE_S = 10.0


class Decoding:
    """Runs the sequences of one model.

    Args:
        engine: the model.
        max_waiting: largest number of sequences that wait for a slot.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self._max_waiting = max_waiting
        # What the thread is to do before its next step; the event loop never waits for a step.
        self._orders: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._running = False
        self._open = 0

    def submit(self, sequence: Generation) -> None:
        """Have a sequence generated. Its `told` is called on this event loop.

        Raises:
            HTTPError: 503 if too many wait.
        """
        if self._open >= self._max_waiting + self.engine.steps.slots:
            raise HTTPError(503, f"more than {self._max_waiting} prompts wait for this model")
        self._open += 1
        loop, told = asyncio.get_running_loop(), sequence.told

        def tell(each: Generation, token: int | None, text: str) -> None:
            if token is None:
                self._open -= 1
            told(each, token, text)

        def from_thread(*pieces: Any) -> None:
            try:
                loop.call_soon_threadsafe(tell, *pieces)
            except RuntimeError:  # the loop has ended, and nobody listens
                _log.debug("a token came after the server had stopped")

        sequence.told = from_thread
        self._order(lambda: self.engine.add(sequence))

    def cancel(self, sequence: Generation) -> None:
        """Give a sequence up. Its slot is free for the step after the one that runs."""
        self._order(lambda: self.engine.cancel(sequence))

    def _order(self, order: Callable[[], object]) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="lepton-generate", daemon=True).start()

    def _run(self) -> None:
        busy = False
        while True:
            with self._changed:
                if not busy and not self._orders and not self._changed.wait_for(lambda: self._orders, _IDLE_S):
                    self._running = False
                    return
            try:
                while self._orders:
                    self._orders.popleft()()
                busy = self.engine.step()
            except Exception as error:  # a step tells its own errors: this is a fault of ours, and nobody may wait
                _log.exception("a step of generation failed")
                self.engine.abandon(error)
                busy = False
