"""Executes the batches of one model: copies their rows in, runs the model, and gives the outputs' bytes."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lepton_xla.errors import LeptonError, ServeError
from lepton_xla.profiles import Profile
from lepton_xla.serve.batching.costs import Key, Measured
from lepton_xla.serve.batching.tickets import Batch, Part, Ticket
from lepton_xla.serve.protocol.signature import LoadedModel, Signature, Tensor
from lepton_xla.serve.protocol.wire import InferRequest

_log = logging.getLogger("lepton_xla.serve")

# Runs per size at start. The first is the warm-up; the median of the others is the cost. Short runs are repeated more
# often, because a busy machine disturbs them most.
_LEAST_RUNS, _MOST_RUNS = 5, 101
_ENOUGH_S, _MOST_S = 0.02, 0.5
# The same where there is little time.
_HASTY_RUNS, _HASTY_S = 2, 0.005
# Runs per size of a model that should take as long as another, and how much longer or shorter it may take.
_SAME_RUNS, _SAME = 3, 2.0
# Seconds of runs that beside other models share a turn.
_TURN_S = 1e-3

_ALIGNMENT = 64
# Outputs up to this size are copied once per batch: slicing `bytes` is faster than slicing a `memoryview`.
_SMALL_BYTES = 1 << 16


type Run = Callable[[Callable[[], object]], object]
"""Calls a function, somewhere, and returns when it has returned; raises what it raises."""


def _at_once(function: Callable[[], object]) -> None:
    function()


class Timed(Protocol):
    """What executions took, see `Engine`: an engine, or what is kept of one that is gone."""

    @property
    def measured(self) -> Measured: ...
    @property
    def busy_processors(self) -> float: ...


class Timing(NamedTuple):
    """What is kept of an engine's times; the fields are the attributes of `Engine`."""

    measured: Measured
    busy_processors: float


class Work(Ticket, kw_only=True, eq=False):
    """A ticket that the engine can run.

    Attributes:
        request: the decoded request.
    """

    request: InferRequest


class Completion[T: Work]:
    """A batch that ran, or failed.

    Attributes:
        batch: the batch.
        outputs: C-contiguous arrays in signature order, padding rows included; None if it failed, empty if it did not
            run because all its requests were closed.
        started_s: when the engine took it.
        staged_s: when its rows were copied.
        finished_s: when it had its outputs.
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
        """The bytes of each requested output of a part, without padding.

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


class _Arrays:
    """Input arrays, and how many of their rows may hold something."""

    __slots__ = ("__weakref__", "arrays", "used")

    def __init__(self, tensors: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self.arrays = [_aligned(shape, dtype) for shape, dtype in tensors]
        self.used = 0


class Staging:
    """Input arrays that engines share, of which only one runs at a time: those of one device.

    Of many models that take turns, the arrays of each would be gone from the processor's cache when its turn comes.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[tuple[Any, ...], _Arrays] = weakref.WeakValueDictionary()

    def arrays(self, tensors: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> _Arrays:
        """Arrays of these shapes and dtypes; those that somebody has already, if there are some."""
        key = tuple(tensors)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = _Arrays(tensors)
        return found


class _Stage:
    """The input arrays of one combination of compiled sizes. Batches reuse them.

    Attributes:
        run: runs the model on them, where it can be bound to them.
    """

    def __init__(self, signature: Signature, size: int, key: Key, staging: Staging) -> None:
        self.sizes = signature.sizes(size, key)
        self._held = staging.arrays([(tensor.at(self.sizes), tensor.dtype) for tensor in signature.inputs])
        self.arrays = self._held.arrays
        self._inputs = signature.inputs
        self._batched = signature.batch is not None
        self._views = [(_bytes_of(array), array.nbytes // size) for array in self.arrays]
        self.run: Callable[[], Sequence[np.ndarray]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays)

    def fill(self, batch: Batch[Any]) -> None:
        """Copies the rows in and zeroes the padding."""
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
        held = self._held
        if held.used > batch.rows:
            for array in self.arrays:
                array[batch.rows : held.used] = 0
        held.used = batch.rows

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
        self._held.used = batch.size


def _window(tensor: Tensor, sizes: dict[str, int], offset: int, rows: int, batched: bool) -> tuple[slice, ...]:
    """The slice of a padded array that holds the rows of a part."""
    inner = tuple(slice(0, size) for size in tensor.at(sizes))
    return (slice(offset, offset + rows), *inner[1:]) if batched else inner


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros at an address that XLA:CPU reads in place; it copies arrays at others."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


class Engine[T: Work]:
    """Runs the batches of a model one by one, on the thread that calls. `Device` says whose batch is next.

    Args:
        model: the model.
        signature: its signature.
        clock: seconds, monotonic.
        staging: of engines that never run at the same time as this one; None for arrays of its own.

    Attributes:
        profile: of the model's known data, if it has one.
        saw: called with the inputs, outputs and real rows of each batch; the inputs are overwritten afterwards.
        busy_processors: mean number of processors that the executions of `warm_up` kept busy; about 0 where another
            device does the work.
        measured: what `warm_up` has given.
    """

    def __init__(
        self,
        model: LoadedModel,
        signature: Signature,
        clock: Callable[[], float] = time.monotonic,
        staging: Staging | None = None,
    ) -> None:
        self._staging = staging or Staging()
        self._model = model
        self._signature = signature
        self._clock = clock
        self._stages: dict[tuple[int, Key], _Stage] = {}
        self.profile: Profile | None = getattr(model, "profile", None)
        self.saw: Callable[[Sequence[np.ndarray], Sequence[np.ndarray], int], object] | None = None
        self.busy_processors = 0.0
        self.measured: Measured = {}
        self._rest: list[tuple[Key, int]] = []

    def warm_up(
        self,
        run: Run | None = None,
        like: Timed | None = None,
        *,
        same_code: bool = False,
        same_program: bool = False,
        within_s: float = math.inf,
    ) -> Measured:
        """Runs and times every compiled size on zeros.

        Args:
            run: calls a function on the device, between batches of other models: see `Device.guest`. Without, this is
                all that runs.
            like: of a model that was measured before and that should take as long. Where a few runs do not say
                otherwise, its times are taken.
            same_code: whether that one runs the same code. Then the smallest size is run, and all times are taken.
            same_program: whether its code was made from the same program. Then each size is run once, and all times are
                taken.
            within_s: sizes that would take longer are left for `warm_up_rest`, and their times are estimated.

        Returns:
            Seconds of an execution, by key and batch size: the median, or, while others run, nearly the least, since
            the rest waited for the interpreter.

        Raises:
            ServeError: if an output differs from the signature.
        """
        model: Any = self._model
        if getattr(model, "stepper", None) is not None:
            with contextlib.suppress(LeptonError):  # whoever asks it to generate is told
                _ = model.generator  # reads the tokenizer, for which the event loop has no time
        if like is not None and like.measured and same_code:
            self._measure(self._signature.bucket_sizes[0], next(self._signature.shape_keys()), run or _at_once, 1)
            self.busy_processors, self.measured = like.busy_processors, like.measured
            return self.measured
        if like is not None and like.measured and same_program:
            for key in self._signature.shape_keys():
                for size in self._signature.bucket_sizes:
                    self._measure(size, key, run or _at_once, 0)
            self.busy_processors, self.measured = like.busy_processors, like.measured
            return self.measured
        costs: dict[Key, dict[int, float]] = {}
        timed_s = used_s = 0.0
        end_s = self._clock() + within_s
        per_byte_s = 0.0  # of the first size, which is always run
        self._rest.clear()
        known = {} if like is None else like.measured
        for key in self._signature.shape_keys():
            costs[key] = {}
            for size in self._signature.bucket_sizes:
                before = known.get(key, {}).get(size)
                if before is not None:
                    least = min(self._measure(size, key, run or _at_once, _SAME_RUNS)[0])
                    if before / _SAME <= least <= before * _SAME:
                        costs[key][size] = before
                        continue
                expected = per_byte_s * self._stage(size, key).nbytes
                if expected and self._clock() + (1 + _HASTY_RUNS) * expected > end_s:
                    costs[key][size] = expected
                    self._rest.append((key, size))
                    continue
                times, used = self._measure(size, key, run or _at_once, hasty=math.isfinite(within_s))
                typical = statistics.median(times) if run is None else sorted(times)[len(times) // 10]
                costs[key][size] = max(typical, 1e-9)
                per_byte_s = costs[key][size] / max(self._stage(size, key).nbytes, 1)
                timed_s += sum(times)
                used_s += used
        self.busy_processors = like.busy_processors if like is not None and not timed_s else used_s / max(timed_s, 1e-9)
        self.measured = costs
        return costs

    def warm_up_rest(self, run: Run, learn: Callable[[Key, int, float], object]) -> None:
        """Runs and times what `warm_up` left.

        Args:
            run: as for `warm_up`.
            learn: told of each: key, batch size, seconds.

        Raises:
            ServeError: as `warm_up`.
        """
        while self._rest:
            key, size = self._rest[0]
            learn(key, size, min(self._measure(size, key, run, _SAME_RUNS)[0]))
            del self._rest[0]

    def _measure(
        self, size: int, key: Key, run: Run, most: int = _MOST_RUNS, *, hasty: bool = False
    ) -> tuple[list[float], float]:
        """Seconds of each timed execution, and processor seconds of all of them."""
        least, enough_s = (_HASTY_RUNS, _HASTY_S) if hasty else (_LEAST_RUNS, _ENOUGH_S)
        stage = self._stage(size, key)
        times: list[float] = []
        used = 0.0

        def first() -> None:
            outputs = self._model.run(stage.sizes, stage.arrays)
            expected = [(tensor.at(stage.sizes), tensor.dtype) for tensor in self._signature.outputs]
            actual = [(array.shape, array.dtype) for array in outputs]
            if actual != expected:
                raise ServeError(f"at {stage.sizes} the model gives {actual}, but its signature says {expected}")

        def timed() -> None:
            nonlocal used
            before, spent = time.process_time(), 0.0
            while not spent or (spent < _TURN_S and not enough()):
                start = self._clock()
                self._model.run(stage.sizes, stage.arrays)
                times.append(self._clock() - start)
                spent += times[-1]
            used += time.process_time() - before

        def enough() -> bool:
            return len(times) >= most or sum(times) >= (_MOST_S if len(times) < least else enough_s)

        run(first)
        while not enough():
            run(timed)
        return times, used

    @property
    def model(self) -> LoadedModel:
        """What it runs. It may run on another thread too."""
        return self._model

    @property
    def nbytes(self) -> int:
        """Bytes of the model, if it tells, and of the arrays that batches are put together in, shared or not."""
        staged = sum(stage.nbytes for stage in tuple(self._stages.values()))
        return staged + getattr(self._model, "nbytes", 0)

    def check(self) -> None:
        """Runs the smallest size on zeros. Raises what the model raises."""
        first = self._signature.bucket_sizes[0], next(self._signature.shape_keys())
        stage = _Stage(self._signature, *first, Staging())
        for array in self._model.run(stage.sizes, stage.arrays):
            np.asarray(array)

    def free(self) -> None:
        """Lets go of the model and the arrays. Nothing may run any more."""
        del self._model
        self._stages.clear()

    def execute(self, batch: Batch[T]) -> Completion[T]:
        """Runs one batch on the calling thread. A failure is in the completion, never raised. Not reentrant."""
        started = staged = self._clock()
        if not batch.wanted:
            return Completion(batch, (), started, started, started)
        try:
            stage = self._stage(batch.size, batch.key)
            stage.fill(batch)
            staged = self._clock()
            found = self._model.run(stage.sizes, stage.arrays) if stage.run is None else stage.run()
            outputs = [np.ascontiguousarray(array) for array in found]
            batched = self._signature.batch is not None
            finished = self._clock()
            if self.saw is not None:
                self.saw(stage.arrays, outputs, batch.rows)
            return Completion(batch, outputs, started, staged, finished, batched=batched)
        except Exception:
            # Whatever the model raises fails this batch only.
            _log.exception("a batch of %d rows at size %d failed", batch.rows, batch.size)
            return Completion(batch, None, started, staged, self._clock())

    def _stage(self, size: int, key: Key) -> _Stage:
        stage = self._stages.get((size, key))
        if stage is None:
            stage = self._stages[size, key] = _Stage(self._signature, size, key, self._staging)
            bind: Any = getattr(self._model, "bind", None)
            if bind is not None:
                stage.run = bind(stage.sizes, stage.arrays)
        return stage
