"""Requests in, results out: the queue and the engine of one model, joined on the event loop.

The app hands over calls and is called back; it does not know where they run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic

from lepton_xla.serve.batcher import Batcher, Part
from lepton_xla.serve.engine import Completion, Engine, Work
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.metrics import Metrics
from lepton_xla.serve.signature import Signature
from lepton_xla.serve.wire import InferRequest

_log = logging.getLogger("lepton_xla.serve")


class Call(Work):
    """A request on its way through the scheduler: what came, and what is told when it is done.

    Attributes:
        left: rows whose results are not there yet.
        pieces: results of a request that was split over batches, as they come.
    """

    __slots__ = ("left", "pieces")

    def __init__(self, request: InferRequest, arrival_s: float) -> None:
        super().__init__(request, arrival_s)
        self.left = self.rows
        self.pieces: list[bytearray] | None = None

    def finish(self, outputs: Sequence[memoryview]) -> None:
        """Told the bytes of each output that was asked for. They are only good until it returns."""
        raise NotImplementedError

    def fail(self, refusal: RefusedError) -> None:
        """Told why there is no result."""
        raise NotImplementedError


class Scheduler:
    """Runs calls in batches on an engine of this process. Everything but the engine's thread is on the event loop.

    Args:
        signature: the model's.
        batcher: the queue.
        engine: takes the batches, one at a time.
        metrics: what is counted.
        loop: the event loop.
    """

    def __init__(
        self,
        signature: Signature,
        batcher: Batcher[Call],
        engine: Engine[Call],
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._outputs = signature.outputs
        self._batcher = batcher
        self._engine = engine
        self._metrics = metrics
        self._loop = loop
        self._busy = False
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def max_rows(self) -> int:
        """Most rows of one request."""
        return self._batcher.max_rows

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue now."""
        return self._batcher.rows

    def start(self) -> None:
        """Starts the engine's thread."""

        def post(completion: Completion[Call]) -> None:
            self._loop.call_soon_threadsafe(self._completed, completion)

        self._engine.start(post)

    def stop(self, timeout_s: float) -> None:
        """Ends the engine's thread after the batches it has."""
        self._engine.stop(timeout_s)

    def submit(self, call: Call) -> None:
        """Queues a call; `finish` or `fail` is told of its end, unless it is cancelled first.

        Raises:
            RefusedError: 503 where the queue is full.
        """
        if not self._batcher.add(call):
            self._metrics.rejected += 1
            raise RefusedError(503, "the queue is full")
        if not self._scheduled:
            # After the sockets that are readable now: what arrived together runs together, without a delay.
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def cancel(self, call: Call) -> None:
        """Forgets a call: nobody waits for it any more."""
        self._metrics.cancelled += 1
        self._batcher.cancel(call)

    def _pump(self) -> None:
        """Hands the next batch to the engine, or sees to it that it happens in time."""
        self._scheduled = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = monotonic()
        batch = self._batcher.next_batch(now, not self._busy)
        if batch is not None:
            self._busy = True
            self._engine.submit(batch)
        elif self._batcher.wake_at is not None:
            self._timer = self._loop.call_later(self._batcher.wake_at - now, self._pump)

    def _completed(self, completion: Completion[Call]) -> None:
        """Takes a finished batch, starts the next and tells those who wait."""
        self._busy = False
        self._pump()
        metrics, batch = self._metrics, completion.batch
        metrics.batch(
            batch.rows,
            batch.size,
            completion.staged_s - completion.started_s,
            completion.finished_s - completion.started_s,
        )
        for part in batch.parts:
            call = part.ticket
            if call.cancelled:
                continue
            try:
                self._complete_part(completion, part)
            except Exception:
                _log.exception("an answer could not be written")
                call.fail(RefusedError(500, "internal error"))

    def _complete_part(self, completion: Completion[Call], part: Part[Call]) -> None:
        call = part.ticket
        if completion.outputs is None:
            self._metrics.failures += 1
            self._batcher.cancel(call)
            call.fail(RefusedError(500, "inference failed"))
            return
        outputs = [completion.rows(part, index, self._outputs[index]) for index, _ in call.request.plan.outputs]
        if part.rows == call.rows:
            self._metrics.queue_s.observe(completion.started_s - call.arrival_s)
            call.finish(outputs)
            return
        if call.pieces is None:
            self._metrics.queue_s.observe(completion.started_s - call.arrival_s)
            call.pieces = [bytearray(len(output) // part.rows * call.rows) for output in outputs]
        for piece, output in zip(call.pieces, outputs, strict=True):
            row_bytes = len(piece) // call.rows
            piece[part.start * row_bytes : (part.start + part.rows) * row_bytes] = output
        call.left -= part.rows
        if not call.left:
            call.finish([memoryview(piece) for piece in call.pieces])
