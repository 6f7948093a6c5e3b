"""Whose turn it is at a device: deficit round robin on measured time. Pure logic: no thread and no clock.

Deficit round robin (Shreedhar and Varghese, 1996) with the smallest quantum that lets anyone run, paid for afterwards:
nobody knows what a batch takes before it has run. Each share has an account of device time over weight, and whoever
waits and has had the least is next. So of shares that all wait, none is ever ahead of another by more than one batch of
its own, and each gets its weight's part of the time, whatever its batches take.

A share that did not wait for a while gets no credit for it: it starts level with the share that had the last turn, and
so is next as soon as the batch that runs has ended (start-time fair queueing: Goyal, Vin and Cheng, 1997).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

type Turn = Callable[[bool], float | None]
"""Runs one batch, or finds that there is none.

It is given whether it is on the event loop. The result is the seconds of device time, or None on the event loop if the
batch is too long to run there: the device's thread calls again.
"""


class Share:
    """One model's place at a device.

    Attributes:
        turn: called when it may run.
        ended: called when it will get no turn any more.
        weight: its part of the time, beside the weights of others that wait.
        short: whether all its batches may run on the event loop.
        waiting: whether it waits for a turn.
        used_s: seconds of device time so far.
        turns: number of turns so far.
    """

    __slots__ = ("again", "ended", "finish", "gone", "short", "turn", "turns", "used_s", "waiting", "weight")

    def __init__(self, turn: Turn, ended: Callable[[], object], weight: float = 1.0, *, short: bool = False) -> None:
        self.turn = turn
        self.ended = ended
        self.weight = weight
        self.short = short
        self.waiting = False
        self.gone = False
        self.again = False  # asked during its own turn
        self.finish = 0.0  # the account: time had, over weight
        self.used_s = 0.0
        self.turns = 0


class Shares:
    """The shares that wait, and the one whose turn it is. Not thread-safe.

    Attributes:
        holder: whose turn it is; None if the device is free.
        waiting: the shares that wait, as a heap.
        long: number of waiting shares whose batches may be too long for the event loop.
        turns: number of turns that were given so far.
    """

    __slots__ = ("_asked", "_level", "holder", "long", "turns", "waiting")

    def __init__(self) -> None:
        self.holder: Share | None = None
        self.long = 0
        self.turns = 0
        self.waiting: list[tuple[float, bool, int, Share]] = []
        self._level = 0.0  # the account of the share that had the last turn, as its turn began
        self._asked = 0

    def ask(self, share: Share) -> None:
        """Has a share wait for a turn, or for another one during its own."""
        if share.waiting or share.gone:
            return
        share.waiting = True
        if share is self.holder:
            share.again = True
        else:
            if share.finish < self._level:
                share.finish = self._level
            self._push(share, again=False)

    def _push(self, share: Share, *, again: bool) -> None:
        # Of equal accounts, one that comes new is next, then the one that has waited longest.
        self._asked += 1
        self.long += not share.short
        heappush(self.waiting, (share.finish, again, self._asked, share))

    def next(self) -> Share | None:
        """Gives the turn to the share that has had the least; None if nobody waits or it is somebody's turn."""
        if self.holder is not None:
            return None
        while self.waiting:
            share = heappop(self.waiting)[3]
            self.long -= not share.short
            if not share.gone:
                share.waiting = False
                self._level = share.finish
                self.holder = share
                self.turns += 1
                return share
        return None

    def charge(self, seconds: float) -> None:
        """Ends the turn, which took so much device time."""
        share = self.holder
        assert share is not None
        self.holder = None
        share.turns += 1
        share.used_s += seconds
        share.finish += seconds / share.weight
        if share.again:
            share.again = False
            self._push(share, again=True)
        elif not self.waiting:
            self._level = share.finish  # the device is idle: who comes next starts level with who ran last

    def leave(self, share: Share) -> None:
        """Gives a share no turn any more. One that it has goes on to its end."""
        share.gone = True
        share.again = False
