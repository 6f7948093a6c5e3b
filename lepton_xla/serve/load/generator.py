"""A load generator for one prebuilt request: an open loop of Poisson arrivals, or a closed loop of connections.

In the open loop requests become due whether or not earlier ones have their answers, as those of independent users do,
and latency counts from when a request was due, not from when it could be sent: a server that stalls makes all requests
of that time late, and they count as late (G. Tene, "How NOT to Measure Latency": coordinated omission).

One process, one core, no JAX: an `asyncio.Protocol` a connection, one unanswered request on each, no task a request.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import gc
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from time import monotonic

import numpy as np
import uvloop

from lepton_xla.serve.client.endpoint import Endpoint
from lepton_xla.serve.client.transport import Answer, Channel, connected
from lepton_xla.serve.load.result import BROKEN, NO_CONNECTION, TIMED_OUT, Load, Result

_BLOCK = 4096  # arrivals drawn at once
_SWEEP_S = 0.05
_AGAIN_S = 0.1  # before a connection of the closed loop that had no answer asks again


class _Alarm:
    """A timer of the kernel's, for loops count in milliseconds and requests are due in between.

    By ctypes, because `os.timerfd_create` came with Python 3.13 only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._file: int = self._library.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        # struct itimerspec: interval in seconds and nanoseconds, then the time.
        self._spec = (ctypes.c_long * 4)()
        self._loop = loop
        loop.add_reader(self._file, ring)

    def set(self, when: float) -> None:
        """Rings at `when` on the monotonic clock; at once if that is past. Silences the ring before."""
        seconds = int(when)
        self._spec[2] = seconds
        self._spec[3] = int((when - seconds) * 1e9)
        self._library.timerfd_settime(self._file, 1, self._spec, None)

    def close(self) -> None:
        """Gives the timer back."""
        self._loop.remove_reader(self._file)
        os.close(self._file)


class _TimedChannel(Channel):
    """A connection of the generator."""

    __slots__ = ("due", "generator")

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.due = -1.0  # of the request on its way; negative without one

    def answered(self, answer: Answer) -> None:
        self.generator.finish(self, answer.status)

    def failed(self, error: Exception) -> None:
        self.generator.finish(self, BROKEN)

    def lost(self) -> None:
        self.generator.forget(self)


class Generator:
    """Sends one request over and over and notes when its answers come. Used once, on its event loop.

    Args:
        target: the server.
        request: the bytes of the request.
        load: how often.
        seed: of the arrivals.

    Attributes:
        due: when each measured request was due, on the monotonic clock.
        latencies: seconds until its answer.
        statuses: of the answers.
        unanswered: requests that are due and have no answer yet.
    """

    def __init__(self, target: Endpoint, request: bytes, load: Load, seed: int = 0) -> None:
        self.load = load
        self.due = array.array("d")
        self.latencies = array.array("d")
        self.statuses = array.array("h")
        self.unanswered = 0
        self.began = self.ends = 0.0
        self._target = target
        self._request = request
        self._random = np.random.default_rng(seed)
        self._lags = array.array("d")
        self._idle: list[_TimedChannel] = []
        self._pool: set[_TimedChannel] = set()
        self._queue: deque[float] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._most = self._answered = self._good = 0
        self._times: list[float] = []
        self._at = 0
        self._alarm: _Alarm | None = None
        self._loop: asyncio.AbstractEventLoop

    async def run(self, watch: Callable[[Generator], None] = lambda generator: None, every_s: float = 0.5) -> Result:
        """Runs the load to its end, or to a `stop`.

        Args:
            watch: called now and then; what it takes is missing to the load.
            every_s: how often.
        """
        load, loop = self.load, asyncio.get_running_loop()
        self._loop = loop
        starts = monotonic()
        self.began = starts + load.warmup_s
        self.ends = self.began + load.seconds
        used = time.process_time()
        if load.rate is None:
            for _ in range(load.connections):
                self._arrive(starts)
        else:
            self._alarm = _Alarm(loop, self._tick)
            self._schedule(starts)
        try:
            next_watch = starts + every_s
            while (now := monotonic()) < self.ends or self.unanswered:
                await asyncio.sleep(_SWEEP_S)
                self._sweep(monotonic())
                if now < self.began:
                    used = time.process_time()
                if now >= next_watch:
                    next_watch = now + every_s
                    watch(self)
            return self._result(used)
        finally:
            if self._alarm is not None:
                self._alarm.close()
            for task in self._opening:
                task.cancel()
            for connection in tuple(self._pool):
                connection.abort()
            await asyncio.sleep(0)

    def stop(self) -> None:
        """Ends the load now; what is on its way is still waited for."""
        self.ends = min(self.ends, monotonic())

    # Arrivals.

    def _schedule(self, after: float) -> None:
        """Draws the next arrivals."""
        assert self.load.rate is not None
        gaps = self._random.exponential(1 / self.load.rate, _BLOCK)
        self._times = (after + np.cumsum(gaps)).tolist()
        self._at = 0
        self._wake(self._times[0])

    def _wake(self, when: float) -> None:
        assert self._alarm is not None
        self._alarm.set(when if when < self.ends else self.ends + 1e6)

    def _tick(self) -> None:
        """Sends all that is due."""
        now = min(monotonic(), self.ends)
        times, at = self._times, self._at
        while at < _BLOCK and times[at] <= now:
            self._arrive(times[at])
            at += 1
        self._at = at
        if at < _BLOCK:
            self._wake(times[at])
        else:
            self._schedule(times[-1])

    def _arrive(self, due: float) -> None:
        self.unanswered += 1
        if due >= self.began:
            self._lags.append(monotonic() - due)
        if self._idle:
            self._send(self._idle.pop(), due)
            return
        self._queue.append(due)
        self._open_if_needed()

    def _send(self, connection: _TimedChannel, due: float) -> None:
        connection.due = due
        connection.send(self._request)

    # Connections.

    def _open_if_needed(self) -> None:
        opening = len(self._opening)
        if opening < len(self._queue) and opening + len(self._pool) < self.load.connections:
            task = self._loop.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> None:
        async with asyncio.timeout(self.load.timeout_s):
            connection = await connected(lambda: _TimedChannel(self), self._target)
        if not connection.open:
            raise ConnectionResetError
        self._pool.add(connection)
        self._most = max(self._most, len(self._pool))
        self._free(connection)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        if error is not None and self._queue:
            self._note(self._queue.popleft(), NO_CONNECTION)
        self._open_if_needed()

    def _free(self, connection: _TimedChannel) -> None:
        """Gives a connection the request that has waited longest for one, if there is any."""
        connection.due = -1.0
        if not connection.open:
            return
        if self._queue:
            self._send(connection, self._queue.popleft())
        else:
            self._idle.append(connection)

    def forget(self, connection: _TimedChannel) -> None:
        """Takes out a connection that is gone."""
        self._pool.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._open_if_needed()

    # Answers.

    def finish(self, connection: _TimedChannel, status: int) -> None:
        """Notes what came of the request of a connection, and uses the connection again."""
        due = connection.due
        self._free(connection)
        self._note(due, status)

    def _note(self, due: float, status: int) -> None:
        now = monotonic()
        self.unanswered -= 1
        if self.began <= due:
            self.due.append(due)
            self.latencies.append(now - due)
            self.statuses.append(status)
        if self.began <= now < self.ends and status > 0:
            self._answered += 1
            self._good += status == 200
        if self.load.rate is None and now < self.ends:
            if status > 0:
                self._arrive(now)
            else:
                self._loop.call_later(_AGAIN_S, self._arrive_again)

    def _arrive_again(self) -> None:
        now = monotonic()
        if now < self.ends:
            self._arrive(now)

    def _sweep(self, now: float) -> None:
        """Gives up what has waited too long."""
        patience = self.load.timeout_s
        while self._queue and now - self._queue[0] > patience:
            self._note(self._queue.popleft(), TIMED_OUT)
        for connection in tuple(self._pool):
            if connection.due >= 0 and now - connection.due > patience:
                due, connection.due = connection.due, -1.0
                connection.abort()
                self._note(due, TIMED_OUT)

    def _result(self, used_before: float) -> Result:
        seconds = max(1e-9, min(self.ends, monotonic()) - self.began)
        return Result(
            load=self.load,
            seconds=seconds,
            due_s=np.array(self.due) - self.began,
            latency_s=np.array(self.latencies),
            status=np.array(self.statuses),
            lag_s=np.array(self._lags),
            answered=self._answered,
            good=self._good,
            most_connections=self._most,
            cores=(time.process_time() - used_before) / seconds,
        )


def generate(
    target: Endpoint,
    request: bytes,
    load: Load,
    *,
    watch: Callable[[Generator], None] = lambda generator: None,
    interruptible: bool = False,
) -> Result:
    """Runs a load on an event loop of its own.

    Args:
        target: the server.
        request: the bytes of a request, from `Endpoint.request`.
        load: how often.
        watch: called twice a second, for a display.
        interruptible: whether SIGINT ends the load early instead of the process (main thread only).
    """

    async def main() -> Result:
        generator = Generator(target, request, load)
        if interruptible:
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, generator.stop)
        return await generator.run(watch)

    # The garbage collector's pauses would be taken for the server's, and requests leave it nothing to do.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    finally:
        if collecting:
            gc.enable()
