"""Readiness and liveness: whether the model can answer, and if not, whether only a new process could.

*Ready* tells clients whether to send requests here, *live* tells an orchestrator whether to keep the process. Neither
depends on load: a server with a full queue works, and restarting it would only move its load to another.

Failed batches alone prove little: a client may send only input that the model cannot take, and must not make the server
unready for others. So after a few failures in a row the engine runs the model on zeros, as in the warm-up, between
batches. While that fails the server is not ready and tries again. After a minute of failures the process is not live:
some errors of a device (a sticky GPU error) need a new process. The same holds for an execution that does not end, and
at once for an engine whose thread has ended. Waiting requests then get 503.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import Protocol

from lepton_xla.serve.observe.metrics import Metrics

_log = logging.getLogger("lepton_xla.serve")

_SUSPICIOUS = 3
"""Failed executions in a row after which the engine is tested on zeros."""

_HOPELESS_S = 60.0
"""Seconds of not being ready after which the process is not live."""

STALL_S = 30.0
"""Seconds, beyond a hundred executions as timed at load, after which an execution counts as stuck."""


class Runner(Protocol):
    """What health watches: the `Scheduler`."""

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is alive."""
        ...

    @property
    def running(self) -> bool:
        """Whether an execution is running."""
        ...

    def check(self) -> None:
        """Runs the model on zeros, on any thread. Raises what the model raises."""
        ...

    def give_up(self) -> None:
        """Fails every call that waits or runs."""
        ...


class Health:
    """Watches a scheduler. Call it on the event loop.

    Args:
        runner: the scheduler.
        metrics: the scheduler's counters.
        stall_s: an execution that takes longer counts as stuck.

    Attributes:
        live: false if only a new process would help.
        reason: why infer requests cannot be answered; empty if they can.
    """

    def __init__(self, runner: Runner, metrics: Metrics, stall_s: float = STALL_S) -> None:
        self._runner = runner
        self._metrics = metrics
        self._stall_s = stall_s
        # Counters outlive handles: what an earlier handle of this version did is not this one's.
        self._good, self._failed = metrics.batch_rows.count, metrics.failed_batches
        self._streak = 0
        self._asking: threading.Thread | None = None
        self._asked_s = -math.inf
        self._refuted = False
        self._moved_s = -math.inf
        self._broken_s = math.inf
        self.live = True
        self.reason = ""

    @property
    def ready(self) -> bool:
        """Whether infer requests can be answered."""
        return not self.reason

    def check(self, now: float) -> None:
        """Evaluates what happened since the last call. Call it about twice a second."""
        good, failed = self._metrics.batch_rows.count, self._metrics.failed_batches
        if good != self._good:
            self._streak = 0
            self._refuted = False
        else:
            self._streak += failed - self._failed
        if (good, failed) != (self._good, self._failed) or not self._runner.running:
            self._moved_s = now
        self._good, self._failed = good, failed
        asking = self._asking is not None and self._asking.is_alive()
        if (self._streak >= _SUSPICIOUS or self._refuted) and not asking:
            self._asked_s = now
            self._asking = threading.Thread(target=self._ask, name="lepton-health", daemon=True)
            self._asking.start()
        self._judge(now, min(self._moved_s, self._asked_s if asking else now))

    def _ask(self) -> None:
        try:
            self._runner.check()
        except Exception as error:
            if not self._refuted:
                _log.error("the model fails on zeros too: %s", error)
            self._refuted = True
        else:
            self._refuted = False
            self._streak = 0

    def _judge(self, now: float, moved_s: float) -> None:
        dead = not self._runner.alive
        if dead:
            reason = "the engine's thread has ended"
        elif now - moved_s > self._stall_s:
            reason = f"an execution has not ended for {self._stall_s:g} s"
        elif self._refuted:
            reason = "the model fails, whatever it is given"
        else:
            reason = ""
        if reason and reason != self.reason:
            _log.error("not ready: %s", reason)
        elif self.reason and not reason:
            _log.info("ready again")
        self.reason = reason
        self._broken_s = min(self._broken_s, now) if reason else math.inf
        live = not dead and now - self._broken_s < _HOPELESS_S
        if self.live and not live:
            _log.critical("not live: only a new process would help")
        self.live = live
        if not live:
            self._runner.give_up()
