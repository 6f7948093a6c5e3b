"""SIGTERM: a run that is told to end saves its state first, and exits with a code of its own."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any, Self

import jax

# Exit code of a run that saved its state because it was told to end: start it again. EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75


class Preempted(SystemExit):
    """A run was told to end, and has saved its state if it keeps checkpoints. Exits with code 75 if nobody catches it.

    Attributes:
        step: steps done.

    >>> lx.train.Preempted(500).code
    75
    """

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return f"told to end after step {self.step}"


class Preemption:
    """Notices SIGTERM while it is entered. A second SIGTERM ends the process at once.

    In a run of several processes JAX's own service notices it, and all processes agree on the step. Outside of the main
    thread Python can install no handler, so a single process then notices nothing.

    >>> with Preemption() as preemption:
    ...     preemption.requested(step=10)
    False
    """

    def __init__(self) -> None:
        self._asked = False
        self._installed = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)
            self._installed = False

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Whether to save now and end. In a run of several processes each must ask once a step, with the same step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
