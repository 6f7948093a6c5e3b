"""Connects the queue and the engine of one model on the event loop.

The app submits calls and is called back. It does not know where they run.

Short batches run on the event loop itself, between reading requests and writing answers: handing them to another thread
would take longer. Other batches run on the device's thread, which takes the next batch itself: the device does not wait
for the event loop, and a batch contains every request that has arrived by then. With several models, `Device` says
whose batch is next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any

from lepton_xla.serve.batching.admission import Admission
from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Key
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.batching.engine import Completion, Engine, Work
from lepton_xla.serve.batching.rejections import Rejections
from lepton_xla.serve.batching.tickets import Batch, Part, Reason
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.observe.metrics import COSTS, Metrics
from lepton_xla.serve.observe.observer import Times
from lepton_xla.serve.protocol.signature import Signature
from lepton_xla.serve.protocol.wire import RequestSpec

_log = logging.getLogger("lepton_xla.serve")

# A batch that took at most this long at load runs on the event loop, unless it has become far slower there. Times on
# the engine's thread do not count: most of them is waiting for the interpreter.
_SHORT_S = 2.5e-4
# The same on a single core that the model runs on: a second thread gains nothing, since each request that arrives
# would interrupt the batch.
_SHORT_ON_ONE_CORE_S = 5e-3
_FAR_LONGER = 4


class Call(Work, kw_only=True, eq=False):
    """A request in the scheduler, with its callbacks.

    Attributes:
        pieces: results so far, if the request is split over batches.
        missing: rows without a result, if it is split.
        times: when its batch ran; None before.
    """

    pieces: list[bytearray] | None = None
    missing: int = 0
    times: Times | None = None

    def finish(self, outputs: Sequence[bytes | memoryview]) -> None:
        """Takes the bytes of each requested output. They are only valid until this returns."""
        raise NotImplementedError

    def fail(self, refusal: HTTPError) -> None:
        """Takes the reason why there is no result."""
        raise NotImplementedError


class Scheduler:
    """Runs calls in batches on an engine. Everything except `_turn` runs on the event loop.

    Args:
        signature: the model's.
        batcher: the queue.
        engine: runs the batches.
        metrics: the model's counters.
        loop: the event loop.
        device: deals out turns.
        weight: the model's part of the device's time, beside the weights of other models that have work.
        levels: number of priority levels. Requests without a priority are on the middle level, the lower of two.
        default_timeout_s: for requests without a timeout; None waits for ever.
        max_timeout_s: upper bound of all timeouts; None for none.
        rate: requests per second; None for no bound.
        max_concurrency: requests that may be under way; None for no bound.
        cores: number of cores that this process may use.

    Attributes:
        share: the model's place at the device.
        shed: while the queue is full, gives the error for a request that repeats the last one refused, or None if it
            may fit now. None while the queue takes requests.
    """

    def __init__(
        self,
        signature: Signature,
        batcher: Batcher[Call],
        engine: Engine[Call],
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        device: Device,
        *,
        weight: float = 1.0,
        levels: int = 1,
        default_timeout_s: float | None = None,
        max_timeout_s: float | None = None,
        rate: float | None = None,
        max_concurrency: int | None = None,
        cores: int,
    ) -> None:
        self._outputs = signature.outputs
        self._batcher = batcher
        self._costs = batcher.costs
        short_s = _SHORT_ON_ONE_CORE_S if cores == 1 and engine.busy_processors > 0.5 else _SHORT_S
        self._short = {(key, size) for key, size, seconds in batcher.costs if seconds <= short_s}
        self._longest_s = _FAR_LONGER * short_s
        self._engine = engine
        self._metrics = metrics
        self._loop = loop
        self._levels = levels
        self._level = levels // 2
        self._max_timeout_s = inf if max_timeout_s is None else max_timeout_s
        self._timeout_s = min(inf if default_timeout_s is None else default_timeout_s, self._max_timeout_s)
        self._lock = threading.Lock()  # of the batcher
        self._ended = False
        self._device = device
        self.share = device.join(
            self._turn, self._end_soon, weight, short=all((key, size) in self._short for key, size, _ in batcher.costs)
        )
        self._handed: Batch[Call] | None = None  # formed on the event loop, to run on the device's thread
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = inf
        self.shed: Callable[[RequestSpec], HTTPError | None] | None = None
        self._full: RequestSpec | None = None
        self._rejections = Rejections(metrics, self._drain_s)
        self._admission: Admission | None = None
        if rate is not None or max_concurrency is not None:
            self._admission = Admission(rate, max_concurrency, self._drain_s)

    @property
    def max_rows(self) -> int:
        """Most rows of one request."""
        return self._batcher.max_rows

    def learn(self, key: Key, size: int, seconds: float) -> None:
        """Takes in what an execution outside of the queue took, from any thread."""
        with self._lock:
            self._costs.learn(key, size, seconds)

    @property
    def engine(self) -> Engine[Call]:
        """What runs the batches."""
        return self._engine

    @property
    def device(self) -> Device:
        """What the model runs on, among others."""
        return self._device

    @property
    def max_delay_s(self) -> float:
        """The batching delay."""
        return self._batcher.max_delay_s

    @property
    def alive(self) -> bool:
        """Whether the device's thread is alive and serves this model."""
        return self._device.alive and not self._ended

    @property
    def running(self) -> bool:
        """Whether an execution is running."""
        return self._batcher.running

    @property
    def busy(self) -> bool:
        """Whether a call waits or runs."""
        return self._batcher.running or self._batcher.pending

    @property
    def queue_rows(self) -> int:
        """Rows that wait."""
        return self._batcher.rows

    def check(self) -> None:
        """Runs the model on zeros, in its turn, for a thread that may wait. Raises what the model raises."""
        with self._device.guest(self.share.weight) as run:
            run(self._engine.check)

    def figures(self) -> dict[str, Any]:
        """The gauges that `Metrics` shows: the queue, and the predicted cost of executions."""
        costs: dict[str, dict[str, float]] = {}  # by shape, and by batch size
        for key, size, seconds in self._costs:
            costs.setdefault("x".join(map(str, key)), {})[str(size)] = seconds
        return {"queue_rows": self._batcher.rows, "queue_requests": len(self._batcher), COSTS: costs}

    def stop(self) -> None:
        """Gives the model no turn any more. A batch that runs goes on to its end."""
        self._device.leave(self.share)

    def free(self) -> None:
        """Lets go of the model, once stopped: a scheduler is part of cycles, and weights must not wait for those."""
        self._engine.free()

    def give_up(self) -> None:
        """Fails every call that waits or runs."""
        with self._lock:
            calls = self._batcher.clear()
        for call in calls:
            self._metrics.failures += 1
            self._fail(call, _stopped())

    def _end_soon(self) -> None:
        """Called on any thread when the model gets no turn any more."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._ended = True
        self.give_up()

    # In.

    def submit(self, call: Call) -> None:
        """Queues a call. Calls its `finish` or `fail` later, unless it is cancelled first.

        The call fails at once with 400 for an unknown priority, 429 or 503 beyond the model's own limits, 503 if the
        queue is full or the engine has stopped, 504 if its timeout is too short to run it. Errors go to `fail`, not to
        `raise`: raising takes as long as everything else here, and an overloaded server refuses as often as it answers.
        """
        if self._ended:
            self._metrics.rejected += 1
            call.fail(_stopped())
            return
        spec = call.request.spec
        call.level = spec.priority - 1 if spec.priority else self._level
        if call.level >= self._levels:
            call.fail(HTTPError(400, f"parameter 'priority' must be 0 to {self._levels}, not {spec.priority}"))
            return
        if self._admission is not None and (refusal := self._admission.refusal(call)) is not None:
            self._metrics.rejected += 1
            call.fail(refusal)
            return
        timeout = self._timeout_s if spec.timeout_s is None else min(spec.timeout_s, self._max_timeout_s)
        if timeout != inf:
            call.deadline_s = call.arrival_s + timeout
            if call.deadline_s < self._alarm_s:
                self._set_alarm(call.deadline_s)
        with self._lock:
            reason = self._batcher.add(call)
        if reason is not None:
            if reason is Reason.FULL and timeout == inf:
                self._full, self.shed = spec, self._shed
            self._fail(call, self._rejections.error(reason))
            return
        self.shed = None
        if self._batcher.dropped:
            self._tell_dropped()
        self._pump_soon()

    def _shed(self, spec: RequestSpec) -> HTTPError | None:
        """Rejects at once a request identical to the last one rejected, unless there is room for it now."""
        batcher = self._batcher
        if spec is not self._full or batcher.rows + spec.rows <= batcher.max_rows:
            return None
        return self._rejections.error(Reason.FULL)

    def cancel(self, call: Call) -> None:
        """Drops a call whose client has gone."""
        self._metrics.cancelled += 1
        if self._admission is not None:
            self._admission.end(call)
        with self._lock:
            self._batcher.cancel(call)

    def _drain_s(self, now: float) -> float:
        with self._lock:
            return self._batcher.drain_s(now)

    def _tell_dropped(self) -> None:
        """Fails the calls that the batcher has dropped."""
        with self._lock:
            dropped, self._batcher.dropped = self._batcher.dropped, []
        for call, reason in dropped:
            self._fail(call, self._rejections.error(reason))

    def _fail(self, call: Call, refusal: HTTPError) -> None:
        if self._admission is not None:
            self._admission.end(call)
        call.fail(refusal)

    # Time.

    def _set_alarm(self, when: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = when
        # Rounded up to the milliseconds of the event loop: never too early.
        delay = math.ceil(max(when - monotonic(), 0.0) * 1e3) * 1e-3
        self._alarm = self._loop.call_later(delay, self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_s = None, inf
        with self._lock:
            self._batcher.expire(monotonic())
            first = self._batcher.next_deadline()
        if first != inf:
            self._set_alarm(first)
        if self._batcher.dropped:
            self._tell_dropped()
        if self._batcher.pending:
            self._pump_soon()

    # Out.

    def _pump_soon(self) -> None:
        """Asks for a turn, after all sockets that are readable now: requests that arrived together share a batch."""
        if not self.share.waiting:
            batcher = self._batcher
            self._device.ask(self.share, full=batcher.rows >= batcher.bucket_sizes[-1])

    def _turn(self, on_loop: bool) -> float | None:
        """Runs the next batch, if there is one and it may run here; see `shares.Turn`."""
        return self._turn_on_loop() if on_loop else self._turn_on_thread()

    def _turn_on_loop(self) -> float | None:
        with self._lock:
            batch = self._batcher.next_batch(monotonic())
        seconds = 0.0
        if batch is None:
            self._look()
        elif (batch.key, batch.size) in self._short and self._costs.of(batch.key, batch.size) <= self._longest_s:
            completion = self._engine.execute(batch)
            seconds = completion.finished_s - completion.started_s
            with self._lock:
                failed = self._settle(completion)
            self._completed(completion, failed)
        else:
            self._handed = batch
            return None
        if self._batcher.dropped:
            self._tell_dropped()
        return seconds

    def _turn_on_thread(self) -> float:
        batch, self._handed = self._handed, None
        if batch is None:
            with self._lock:
                batch = self._batcher.next_batch(monotonic())
        if batch is None:
            self._call_soon(self._look)
            return 0.0
        completion = self._engine.execute(batch)
        with self._lock:
            failed = self._settle(completion)
            pending = self._batcher.pending
        # After a hard stop nobody waits for this batch, nor for others.
        if self._call_soon(self._completed, completion, failed) and pending:
            self._device.ask_again(self.share)
        return completion.finished_s - completion.started_s

    def _call_soon(self, function: Callable[..., object], *args: Any) -> bool:
        """Calls a function on the event loop; false if that is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            _log.warning("a batch finished after the server had stopped")
            return False
        return True

    def _look(self) -> None:
        """After a turn without a batch: sets the alarm for one that waits for others to fill it."""
        wake_at = self._batcher.wake_at
        if wake_at is not None and wake_at < self._alarm_s:
            self._set_alarm(wake_at)
        if self._batcher.dropped:
            self._tell_dropped()

    # Back.

    def _settle(self, completion: Completion[Call]) -> list[Call]:
        """Reports a batch to the batcher; returns the calls that failed."""
        batch, now = completion.batch, completion.finished_s
        if completion.outputs is None:
            return self._batcher.fail(batch, now)
        self._batcher.finish(batch, now, now - completion.started_s if completion.outputs else None)
        return []

    def _completed(self, completion: Completion[Call], failed: list[Call]) -> None:
        """Calls back the calls of a finished batch."""
        if completion.outputs:
            metrics, batch = self._metrics, completion.batch
            metrics.batch(
                batch.rows,
                batch.size,
                completion.staged_s - completion.started_s,
                completion.finished_s - completion.started_s,
                len(batch.parts),
            )
            times = Times(
                completion.started_s, completion.staged_s, completion.finished_s, batch.rows, batch.size
            )  # fmt: skip
            started, waits = completion.started_s, []
            for part in batch.parts:
                call = part.ticket
                if call.closed:
                    continue
                call.times = times
                if not part.start:
                    waits.append(started - call.arrival_s)
                try:
                    results = completion.results(part, self._outputs)
                    if part.rows == call.rows:
                        call.finish(results)
                    else:
                        self._join(call, part, results)
                except Exception:
                    self._broken(call)
                if self._admission is not None and not call.missing:
                    self._admission.end(call)
            metrics.waited(waits)
            metrics.output_s += (monotonic() - completion.finished_s) * len(batch.parts)
        elif completion.outputs is None:
            self._metrics.failed_batches += 1
        for call in failed:
            self._metrics.failures += 1
            self._fail(call, HTTPError(500, "inference failed"))
        if self._batcher.dropped:
            self._tell_dropped()
        if self._batcher.pending:
            self._pump_soon()

    def _broken(self, call: Call) -> None:
        """Fails a call whose answer could not be written. Call it in the exception handler."""
        _log.exception("an answer could not be written")
        with self._lock:
            self._batcher.cancel(call)
        self._fail(call, HTTPError(500, "internal error"))

    def _join(self, call: Call, part: Part[Call], outputs: Sequence[bytes | memoryview]) -> None:
        """Copies the result of a part of a split call into place."""
        if call.pieces is None:
            call.pieces = [bytearray(len(output) // part.rows * call.rows) for output in outputs]
            call.missing = call.rows
        for piece, output in zip(call.pieces, outputs, strict=True):
            row_bytes = len(piece) // call.rows
            piece[part.start * row_bytes : (part.start + part.rows) * row_bytes] = output
        call.missing -= part.rows
        if not call.missing:
            call.finish([memoryview(piece) for piece in call.pieces])


def _stopped() -> HTTPError:
    return HTTPError(503, "the engine has stopped")
