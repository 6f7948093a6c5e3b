"""One device, which executes one batch at a time, whichever model it is of.

Short batches run on the event loop, others on the device's thread. `Shares` decides who is next. While models wait
whose batches are too long for the event loop, the thread runs everything, so that the device does not wait for the
event loop between two batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait

from lepton_xla.errors import ServeError
from lepton_xla.serve.batching.engine import Staging
from lepton_xla.serve.batching.shares import Share, Shares, Turn

_log = logging.getLogger("lepton_xla.serve")

# On the event loop, further models get their turn without a look at the sockets for so long.
_BESIDE_SOCKETS_S = 2.5e-4
# While several models wait, and more begin to with each look at the sockets, batches gather requests for so long.
_GATHER_S = 2.5e-4
# How often a guest that waits for its turn looks whether there is a device still.
_LOOK_S = 1.0


class Device:
    """Deals the time of one device among models. Call it on the event loop, unless a method says otherwise.

    Args:
        clock: seconds, monotonic.
        number: which of the process's devices it is, counted from 0.

    Attributes:
        number: as given.
        staging: the input arrays of what runs here.
    """

    _loop: asyncio.AbstractEventLoop

    def __init__(self, clock: Callable[[], float] = time.monotonic, number: int = 0) -> None:
        self.number = number
        self.staging = Staging()
        self._clock = clock
        self._lock = threading.Lock()  # of the shares
        self._shares = Shares()
        self._members: set[Share] = set()
        self._scheduled = False
        self._more = False  # whether a member with room in its batch has begun to wait since the last look
        self._gathers_until: float | None = None
        self._handed: queue.SimpleQueue[Share | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread.

        Args:
            loop: the event loop that the device is used on.
        """
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="lepton-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Stops the thread after its batch, from any thread; returns whether it ended in time."""
        self._stopping = True
        if self._thread is None:
            return True
        self._handed.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Members.

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self._members)

    @property
    def turns(self) -> int:
        """Number of turns that were given so far; for any thread."""
        return self._shares.turns

    @property
    def running(self) -> bool:
        """Whether it is somebody's turn now; for any thread."""
        return self._shares.holder is not None

    def join(self, turn: Turn, ended: Callable[[], object], weight: float = 1.0, *, short: bool = False) -> Share:
        """Adds a member.

        Args:
            turn: called when it may run, on the event loop or on the device's thread.
            ended: called on any thread when it will get no turn any more, because of a fault or a stop.
            weight: its part of the time, beside the weights of others that wait.
            short: whether all its batches may run on the event loop.
        """
        share = Share(turn, ended, weight, short=short)
        with self._lock:
            self._members.add(share)
        return share

    def leave(self, share: Share) -> None:
        """Removes a member, from any thread. A batch that runs goes on to its end."""
        with self._lock:
            self._shares.leave(share)
            self._members.discard(share)

    def ask(self, share: Share, *, full: bool = False) -> None:
        """Has a member wait for a turn. It gets it after all sockets that are readable now.

        Args:
            share: the member.
            full: whether its next batch has no room for further requests.
        """
        with self._lock:
            self._shares.ask(share)
            free = self._shares.holder is None
        self._more = self._more or not full
        if free:
            self._pump_soon()

    def ask_again(self, share: Share) -> None:
        """Has a member wait for another turn, during its own, on any thread."""
        with self._lock:
            self._shares.ask(share)

    @contextlib.contextmanager
    def guest(self, weight: float) -> Generator[Callable[[Callable[[], object]], None]]:
        """Gives a function that runs others on the device, in their turn, and waits for them: for another thread.

        Args:
            weight: of all that is run so.

        Raises:
            ServeError: from that function, if the device has stopped; also what the functions raise.
        """
        work: list[tuple[Callable[[], object], Future[None]]] = []

        def turn(on_loop: bool) -> float | None:
            if on_loop:
                return None
            function, done = work.pop()
            began = self._clock()
            try:
                function()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)
            return self._clock() - began

        share = self.join(turn, lambda: None, weight)

        def run(function: Callable[[], object]) -> None:
            if not self.alive:
                function()
                return
            done: Future[None] = Future()
            work.append((function, done))
            self._loop.call_soon_threadsafe(self.ask, share)
            while not wait([done], _LOOK_S).done and self.alive:
                pass
            if not done.done():
                raise ServeError("the device has stopped")
            done.result()

        try:
            yield run
        finally:
            self.leave(share)

    # Turns, on the event loop.

    def _pump_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Gives turns on the event loop: to each that waits now, or for a while."""
        self._scheduled = False
        shares = self._shares
        waiting = len(shares.waiting)
        if waiting > 1 and self._gathers():
            self._pump_soon()
            return
        until = self._clock() + _BESIDE_SOCKETS_S if waiting > 1 else 0.0
        while True:
            with self._lock:
                share = shares.next()
            if share is None:
                return
            try:
                seconds = share.turn(True)
            except Exception:
                self._broken(share)
                seconds = 0.0
            if seconds is None:
                self._handed.put(share)
                return
            with self._lock:
                shares.charge(seconds)
            if not shares.waiting:
                return
            waiting -= 1
            if waiting < 1 or self._clock() >= until:
                self._pump_soon()
                return

    def _gathers(self) -> bool:
        """Whether the sockets are looked at once more before turns are given.

        Requests that come one by one would each be a batch of its own: of many models, each batch costs more than all
        else that is done for a request, and an answer that is written wakes a client to send the next one.
        """
        now, more, self._more = self._clock(), self._more, False
        if self._gathers_until is None:
            self._gathers_until = now + _GATHER_S
        if more and now < self._gathers_until:
            return True
        self._gathers_until = None
        return False

    # Turns, on the thread.

    def _run(self) -> None:
        try:
            while (handed := self._handed.get()) is not None and not self._stopping:
                share: Share | None = handed
                while share is not None and not self._stopping:
                    try:
                        seconds = share.turn(False) or 0.0
                    except Exception:
                        self._broken(share)
                        seconds = 0.0
                    share = self._next(seconds)
        finally:
            with self._lock:
                members = list(self._members)
            for member in members:
                member.ended()

    def _next(self, seconds: float) -> Share | None:
        """Ends a turn; returns the next share, unless the event loop runs all that wait."""
        with self._lock:
            self._shares.charge(seconds)
            if self._shares.long:
                return self._shares.next()
            if not self._shares.waiting:
                return None
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._pump)
        return None

    def _broken(self, share: Share) -> None:
        """A fault of the server, not of the model: the state of the member cannot be trusted. Others go on."""
        _log.exception("the engine has failed")
        self.leave(share)
        share.ended()
