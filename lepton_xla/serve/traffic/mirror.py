"""Asks a shadow what another version was asked, after that answer has been sent, and compares the two.

The shadow runs on a thread of its own, which steps back for those that serve. It has a quarter of the time while the
server has little to do, and else a small part: what is more is left out and counted. It neither waits in a queue of
requests nor takes a turn of the device.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lepton_xla.serve.batching.engine import Engine, Work
from lepton_xla.serve.batching.tickets import Batch, Part
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.priorities import step_back
from lepton_xla.serve.protocol.signature import Signature
from lepton_xla.serve.protocol.wire import InferRequest
from lepton_xla.serve.traffic.agreement import same_rows

_log = logging.getLogger("lepton_xla.serve")

# Requests that may wait for the shadow, and bytes of them and their answers.
_MOST_WAITING = 256
_MOST_BYTES = 32 << 20
# The shadow runs in at most these parts of the time, while others need it and while they do not; some is saved up.
_SHARE, _IDLE_SHARE = 0.01, 0.25
_SAVED_S = 0.02
# The server has little to do while its processors, one core's worth, and the model are busy for less of the time, and
# the shadow has a core, and the interpreter, for more of the time that it would use it.
_IDLE, _FREE = 0.5, 0.7
_LOOK_S = 0.25


class _Item(NamedTuple):
    """A request, and the answer that it had."""

    shadow: ModelHandle
    answered: Signature
    request: InferRequest
    outputs: list[bytes]
    nbytes: int


class Mirror:
    """Asks shadows. Call it on the event loop.

    Args:
        clock: seconds, monotonic.
        busy: processor seconds of this process.
        spent: processor seconds of the thread that calls.

    Attributes:
        rest_until_s: by the clock, until when no shadow is asked.
        left_out: requests that nobody has tried to ask since the last one; they count as a row each.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = time.process_time,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock = clock
        self._busy = busy
        self._spent = spent
        self._free = 1.0
        self._share = _SHARE
        self._looked: tuple[float, float, float] | None = None
        self.rest_until_s = 0.0
        self.left_out = 0
        self._ran_s = 0.0
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the bytes
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._allowance_s, self._last_s = _SAVED_S, clock()
        self._engines: weakref.WeakKeyDictionary[ModelHandle, Engine[Work]] = weakref.WeakKeyDictionary()
        self._foreign: weakref.WeakSet[ModelHandle] = weakref.WeakSet()

    def ask(
        self, shadow: ModelHandle, answered: ModelHandle, request: InferRequest, outputs: Sequence[bytes | memoryview]
    ) -> None:
        """Has a shadow asked, some time later or not at all.

        Args:
            shadow: who is asked.
            answered: who has answered.
            request: the request.
            outputs: the bytes of the outputs that it asked for; they need only be valid until this returns.
        """
        rows, now = request.spec.rows, self._clock()
        self._count(shadow, "dropped", self.left_out)
        self.left_out = 0
        if now < self.rest_until_s:
            self._count(shadow, "dropped", rows)
            return
        self._look(now, answered)
        nbytes = request.nbytes + sum(map(len, outputs))
        if not _is_like(shadow.signature, answered.signature):
            if shadow not in self._foreign:
                self._foreign.add(shadow)
                _log.warning(
                    "version %s of model %s takes other tensors than version %s, so it cannot be its shadow",
                    shadow.signature.version, shadow.signature.name, answered.signature.version,
                )  # fmt: skip
            self._count(shadow, "failed", rows)
            return
        with self._lock:
            full = self._waiting.qsize() >= _MOST_WAITING or self._bytes + nbytes > _MOST_BYTES
            if not full:
                self._bytes += nbytes
        if full or not self._allowed(now):
            self._count(shadow, "dropped", rows)
            if not full:
                self._release(nbytes)
            return
        self._waiting.put(_Item(shadow, answered.signature, request, [bytes(each) for each in outputs], nbytes))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lepton-shadow", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Asks nobody any more."""
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join(1.0)

    def _look(self, now: float, answered: ModelHandle) -> None:
        """Decides now and then whether the server has little to do."""
        if self._looked is not None and now - self._looked[0] < _LOOK_S:
            return
        busy_s, device_s = self._busy() - self._ran_s, answered.metrics.compute_s.total
        if self._looked is not None:
            seconds = now - self._looked[0]
            most = max(busy_s - self._looked[1], device_s - self._looked[2]) / seconds
            self._share = _IDLE_SHARE if most < _IDLE and self._free > _FREE else _SHARE
        self._looked = now, busy_s, device_s

    def _allowed(self, now: float) -> bool:
        with self._lock:
            self._allowance_s = min(_SAVED_S, self._allowance_s + self._share * (now - self._last_s))
            self._last_s = now
            if self._allowance_s > 0:
                return True
            self.rest_until_s = now - self._allowance_s / self._share
            return False

    def _count(self, shadow: ModelHandle, result: str, rows: int) -> None:
        with self._lock:
            shadow.metrics.shadow[result] += rows

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._bytes -= nbytes

    # On the thread.

    def _run(self) -> None:
        step_back()
        while (item := self._waiting.get()) is not None:
            started, spent = self._clock(), self._spent()
            try:
                if self._allowed(started):
                    self._compare(item)
                else:
                    self._count(item.shadow, "dropped", item.request.spec.rows)
            except Exception:
                # Whatever a shadow makes of it, nobody waits for it.
                _log.exception("a shadow could not be asked")
                self._count(item.shadow, "failed", item.request.spec.rows)
            seconds, used_s = self._clock() - started, self._spent() - spent
            self._free += 0.1 * (min(used_s / max(seconds, 1e-9), 1.0) - self._free)
            with self._lock:
                self._bytes -= item.nbytes
                self._allowance_s -= seconds
                self._ran_s += used_s
            del item  # or it would keep its model until the next comes

    def _compare(self, item: _Item) -> None:
        signature, spec = item.shadow.signature, item.request.spec
        engine = self._engines.get(item.shadow)
        if engine is None:
            model = item.shadow.scheduler.engine.model
            engine = self._engines[item.shadow] = Engine(model, signature, self._clock)
        sizes = signature.bucket_sizes
        work = Work(spec.rows, spec.key, 0.0, nbytes=item.nbytes, request=item.request)
        found: list[list[bytes]] = []
        for start in range(0, spec.rows, sizes[-1]):
            rows = min(spec.rows - start, sizes[-1])
            size = next(each for each in sizes if each >= rows)
            part = Part(work, start, rows, 0)
            completion = engine.execute(Batch([part], rows, size, spec.key))
            if completion.outputs is None:
                self._count(item.shadow, "failed", spec.rows)
                return
            found.append([bytes(each) for each in completion.results(part, signature.outputs)])
        outputs = [b"".join(parts) for parts in zip(*found, strict=True)]
        same = same_rows(signature, spec, item.outputs, outputs)
        self._count(item.shadow, "same", same)
        self._count(item.shadow, "different", spec.rows - same)


def _is_like(one: Signature, other: Signature) -> bool:
    """Whether a request that was read for one version can be given to another."""
    return (
        one.inputs == other.inputs
        and one.outputs == other.outputs
        and one.batch == other.batch
        and all(one.buckets[symbol] == other.buckets[symbol] for symbol in one.others)
    )
