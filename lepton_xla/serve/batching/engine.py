"""The thread that owns execution: it stages the rows of a batch, runs the servable and reports back."""

from __future__ import annotations

import logging
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_xla.errors import ServeError
from lepton_xla.serve.batching.costs import Key, Measured
from lepton_xla.serve.batching.tickets import Batch, Part, Ticket
from lepton_xla.serve.protocol.signature import Servable, Signature, Tensor
from lepton_xla.serve.protocol.wire import InferRequest

_log = logging.getLogger("lepton_xla.serve")

# Runs per size at start: the first is the warm-up, the median of the rest is the cost. Short ones are repeated, for
# they are what a busy machine disturbs.
_LEAST_RUNS, _MOST_RUNS = 5, 101
_ENOUGH_S, _MOST_S = 0.02, 0.5

_ALIGNMENT = 64
# Outputs up to this size are copied once for a batch: `bytes` are cut in less time than a `memoryview`.
_SMALL_BYTES = 1 << 16


class Work(Ticket, kw_only=True, eq=False):
    """A ticket that the engine can run.

    Attributes:
        request: what came.
    """

    request: InferRequest


class Completion[T: Work]:
    """A batch that ran, or failed.

    Attributes:
        batch: the batch.
        outputs: C-contiguous arrays in signature order, padding rows included; None if it failed, empty if it was not
            run because nobody waited for it any more.
        started_s: when the engine took it.
        staged_s: when its rows lay in the staging arrays.
        finished_s: when the outputs were there.
    """

    __slots__ = ("_batched", "_views", "batch", "finished_s", "outputs", "staged_s", "started_s")

    def __init__(
        self,
        batch: Batch[T],
        outputs: Sequence[np.ndarray] | None,
        started_s: float,
        staged_s: float,
        finished_s: float,
        *,
        batched: bool = False,
    ) -> None:
        self._batched = batched
        self.batch = batch
        self.outputs = outputs
        self.started_s = started_s
        self.staged_s = staged_s
        self.finished_s = finished_s
        self._views: list[tuple[bytes | memoryview, int]] = []
        for array in outputs or ():
            view = array.tobytes() if array.nbytes <= _SMALL_BYTES else _bytes_of(array)
            self._views.append((view, array.nbytes // batch.size))

    def results(self, part: Part[T], tensors: Sequence[Tensor]) -> list[bytes | memoryview]:
        """The bytes of each output that was asked for that belong to a part, without padding.

        Args:
            part: the part.
            tensors: the model's outputs.
        """
        spec = part.ticket.request.spec
        if spec.cut or spec.key != self.batch.key:
            return [self._window_of(part, index, tensors[index]) for index, _ in spec.outputs]
        start, stop = part.offset, part.offset + part.rows
        found: list[bytes | memoryview] = []
        for index, _ in spec.outputs:
            view, row_bytes = self._views[index]
            found.append(view[start * row_bytes : stop * row_bytes])
        return found

    def _window_of(self, part: Part[T], index: int, tensor: Tensor) -> memoryview:
        assert self.outputs is not None
        window = _window(tensor, part.ticket.request.spec.sizes, part.offset, part.rows, self._batched)
        return _bytes_of(np.ascontiguousarray(self.outputs[index][window]))


class _Stage:
    """The input arrays of one combination of compiled sizes, reused from batch to batch."""

    def __init__(self, signature: Signature, size: int, key: Key) -> None:
        self.sizes = signature.sizes(size, key)
        self.arrays = [_aligned(tensor.at(self.sizes), tensor.dtype) for tensor in signature.inputs]
        self._inputs = signature.inputs
        self._batched = signature.batch is not None
        self._views = [(_bytes_of(array), array.nbytes // size) for array in self.arrays]
        self._used = 0

    def fill(self, batch: Batch[Any]) -> None:
        """Copies the rows in and makes the padding zero."""
        if batch.key and any(part.ticket.request.spec.cut or part.ticket.key != batch.key for part in batch.parts):
            self._fill_cut(batch)
            return
        for index, (view, row_bytes) in enumerate(self._views):
            at = 0
            for part in batch.parts:
                source = part.ticket.request.tensors[index]
                size = part.rows * row_bytes
                if part.rows != part.ticket.rows:
                    source = source[part.start * row_bytes : part.start * row_bytes + size]
                view[at : at + size] = source
                at += size
        if self._used > batch.rows:
            for array in self.arrays:
                array[batch.rows : self._used] = 0
        self._used = batch.rows

    def _fill_cut(self, batch: Batch[Any]) -> None:
        for index, (tensor, array) in enumerate(zip(self._inputs, self.arrays, strict=True)):
            array[...] = 0
            for part in batch.parts:
                request: InferRequest = part.ticket.request
                sizes = request.spec.sizes
                source = np.frombuffer(request.tensors[index], tensor.dtype).reshape(tensor.at(sizes))
                if self._batched:
                    source = source[part.start : part.start + part.rows]
                array[_window(tensor, sizes, part.offset, part.rows, self._batched)] = source
        self._used = batch.size


def _window(tensor: Tensor, sizes: dict[str, int], offset: int, rows: int, batched: bool) -> tuple[slice, ...]:
    """Where the rows of a part lie in a padded array."""
    inner = tuple(slice(0, size) for size in tensor.at(sizes))
    return (slice(offset, offset + rows), *inner[1:]) if batched else inner


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros that start where XLA wants them: on the CPU it then reads them where they are, else it copies them."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


class Engine[T: Work]:
    """Runs batches one after the other, on a thread of its own or on the caller's.

    Args:
        servable: the model.
        signature: its signature.
        clock: seconds, monotonic.

    Attributes:
        busy_processors: how many of this machine's processors the executions that `warm_up` timed kept busy, on
            average. Next to none where another device does the work.
    """

    def __init__(self, servable: Servable, signature: Signature, clock: Callable[[], float] = time.monotonic) -> None:
        self._servable = servable
        self._signature = signature
        self._clock = clock
        self._stages: dict[tuple[int, Key], _Stage] = {}
        self._batches: queue.SimpleQueue[Batch[T] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self.busy_processors = 0.0

    def warm_up(self) -> Measured:
        """Runs every compiled size on zeros and measures it.

        Returns:
            Median seconds of one execution by key and batch size.

        Raises:
            ServeError: if an output is not what the signature says.
        """
        costs: dict[Key, dict[int, float]] = {}
        timed_s = used_s = 0.0
        for key in self._signature.shape_keys():
            costs[key] = {}
            for size in self._signature.bucket_sizes:
                times, used = self._measure(size, key)
                costs[key][size] = max(statistics.median(times), 1e-9)
                timed_s += sum(times)
                used_s += used
        self.busy_processors = used_s / max(timed_s, 1e-9)
        return costs

    def _measure(self, size: int, key: Key) -> tuple[list[float], float]:
        """Seconds of each timed execution, and of this process's processors for all of them."""
        stage = self._stage(size, key)
        outputs = self._servable.run(stage.sizes, stage.arrays)
        expected = [(tensor.at(stage.sizes), tensor.dtype) for tensor in self._signature.outputs]
        actual = [(array.shape, array.dtype) for array in outputs]
        if actual != expected:
            raise ServeError(f"at {stage.sizes} the model gives {actual}, but its signature says {expected}")
        times: list[float] = []
        used = time.process_time()
        while len(times) < _MOST_RUNS and sum(times) < (_MOST_S if len(times) < _LEAST_RUNS else _ENOUGH_S):
            start = self._clock()
            self._servable.run(stage.sizes, stage.arrays)
            times.append(self._clock() - start)
        return times, time.process_time() - used

    def start(self, post: Callable[[Completion[T]], Batch[T] | None], ended: Callable[[], object]) -> None:
        """Starts the thread.

        Args:
            post: gets every completion, on that thread, and gives the batch to run next, if there is one already.
            ended: told, on that thread, that it runs nothing any more, whatever the reason.
        """
        self._thread = threading.Thread(target=self._loop, args=(post, ended), name="lepton-engine", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch[T]) -> None:
        """Hands over a batch, from any thread; its completion is posted whatever happens."""
        self._batches.put(batch)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Runs the smallest size on zeros, between two batches, on the calling thread; raises what the model raises."""
        stage = _Stage(self._signature, self._signature.bucket_sizes[0], next(self._signature.shape_keys()))
        with self._turn:
            for array in self._servable.run(stage.sizes, stage.arrays):
                np.asarray(array)

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after the batches handed over; False if it did not end in time."""
        if self._thread is None:
            return True
        self._batches.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self, post: Callable[[Completion[T]], Batch[T] | None], ended: Callable[[], object]) -> None:
        try:
            while (batch := self._batches.get()) is not None:
                while batch is not None:
                    batch = post(self.execute(batch))
        except Exception:
            # A fault of this server, not of the model: what the queue holds cannot be relied on any more.
            _log.exception("the engine's thread has failed")
        finally:
            ended()

    def execute(self, batch: Batch[T]) -> Completion[T]:
        """Runs one batch on the calling thread; a failure is in the completion, never raised. One at a time."""
        started = staged = self._clock()
        if not batch.wanted:
            return Completion(batch, (), started, started, started)
        try:
            stage = self._stage(batch.size, batch.key)
            stage.fill(batch)
            staged = self._clock()
            with self._turn:
                outputs = [np.ascontiguousarray(array) for array in self._servable.run(stage.sizes, stage.arrays)]
            batched = self._signature.batch is not None
            return Completion(batch, outputs, started, staged, self._clock(), batched=batched)
        except Exception:
            # Whatever the model raises is this batch's problem: its requests are answered, the thread goes on.
            _log.exception("a batch of %d rows at size %d failed", batch.rows, batch.size)
            return Completion(batch, None, started, staged, self._clock())

    def _stage(self, size: int, key: Key) -> _Stage:
        stage = self._stages.get((size, key))
        if stage is None:
            stage = self._stages[size, key] = _Stage(self._signature, size, key)
        return stage
