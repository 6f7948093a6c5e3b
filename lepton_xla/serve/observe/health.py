"""Whether a server can answer infer requests, and whether a new process could where it cannot.

*Ready* says whether to send requests here, *live* whether to keep the process. Neither has to do with load: a queue
that is full is a server at work, and restarting it would give its work to the next.

That batches fail says little by itself, for a client may send nothing but what the model cannot take, and must not be
able to make a server unready for all. So after a few failures in a row the server asks the engine to run zeros, with
which the model was warmed up, beside the batches. While that fails, the server is not ready, and asks again. When it
has failed for a minute the process is not live any more: what a device has lost (a sticky error of a GPU, say), only a
new process gets back. The same goes for an execution that does not end, and at once for an engine whose thread has.
What waits then gets 503, for nobody knows when it would be answered.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import Protocol

from lepton_xla.serve.observe.metrics import Metrics

_log = logging.getLogger("lepton_xla.serve")

_SUSPICIOUS = 3
"""Failed executions in a row, none having succeeded in between, after which the engine is asked."""

_HOPELESS_S = 60.0
"""So long without a way to run anything, and the process is given up."""

STALL_S = 30.0
"""An execution that takes so much longer than a hundred of those at load will not end."""


class Runner(Protocol):
    """What is watched: the `Scheduler`."""

    @property
    def alive(self) -> bool:
        """Whether there is a thread to run what has to run."""
        ...

    @property
    def running(self) -> bool:
        """Whether an execution has begun and not ended."""
        ...

    def check(self) -> None:
        """Runs zeros, on any thread; raises what the model raises."""
        ...

    def give_up(self) -> None:
        """Fails what waits for a run."""
        ...


class Health:
    """Watches a scheduler, from its event loop.

    Args:
        runner: the scheduler.
        metrics: what it counts.
        stall_s: an execution that takes so long will not end.

    Attributes:
        live: whether waiting may help; else only a new process does.
        reason: why infer requests cannot be answered; empty where they can.
    """

    def __init__(self, runner: Runner, metrics: Metrics, stall_s: float = STALL_S) -> None:
        self._runner = runner
        self._metrics = metrics
        self._stall_s = stall_s
        self._good = self._failed = self._streak = 0
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
        """Looks at what happened since the last time; to be called about twice a second."""
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
