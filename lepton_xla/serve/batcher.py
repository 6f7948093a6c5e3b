"""Which requests run together, and when: pure logic, told the time, with no thread, socket or clock of its own.

The queue is first in, first out. A batch is the longest run of requests at its head that may share an execution, cut
to the compiled size with the least cost per real row (the rule of TensorFlow's `MINIMIZE_TPU_COST_PER_REQUEST`
padding policy). A request larger than the largest size is split over batches; the caller rejoins its parts. Delay is
measured from the arrival of the oldest request, never from the last.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence

type Key = tuple[int, ...]
"""Sizes of the dimensions other than the batch; only requests with equal keys share an execution."""

type Costs = Mapping[Key, Mapping[int, float]]
"""Seconds of one execution, by key and compiled batch size."""

# Fewer cancelled tickets than this are not worth a walk of the queue.
_SWEEP = 64


class Ticket:
    """A request in the queue; what it is a request for is in a class that inherits from this one.

    Attributes:
        rows: rows it brings, at least one.
        key: what it may share a batch with.
        arrival_s: when it came.
        taken: rows already handed out in batches.
        cancelled: set (by `Batcher.cancel`) when nobody wants the answer any more.
    """

    __slots__ = ("arrival_s", "cancelled", "key", "rows", "taken")

    def __init__(self, rows: int, key: Key, arrival_s: float) -> None:
        self.rows = rows
        self.key = key
        self.arrival_s = arrival_s
        self.taken = 0
        self.cancelled = False


# One is made a request, and a frozen dataclass takes three times as long to make.
@dataclasses.dataclass(slots=True)
class Part[T: Ticket]:
    """Rows `[start, start + rows)` of a ticket, at row `offset` of the batch."""

    ticket: T
    start: int
    rows: int
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class Batch[T: Ticket]:
    """What one execution takes.

    Attributes:
        parts: in queue order; their rows fill the batch from row zero without gaps.
        rows: real rows, at most `size`.
        size: the compiled size to run; the rows beyond `rows` are padding.
        key: sizes of the other dimensions.
    """

    parts: tuple[Part[T], ...]
    rows: int
    size: int
    key: Key


class Batcher[T: Ticket]:
    """A bounded queue of requests that gives batches of compiled sizes.

    Args:
        ladder: compiled batch sizes, ascending.
        max_delay_s: how long the oldest request may wait for company while the engine is idle. Zero runs at once.
        max_rows: rows the queue holds; a request that does not fit is refused. A request of more rows than this can
            never fit.
        costs: measured seconds per execution; without them the smallest size that holds all waiting rows is taken.

    Attributes:
        rows: live rows waiting.
        wake_at: when to ask `next_batch` again though nothing arrives; None when an arrival or a finished batch is
            the only thing that can change its answer.
    """

    def __init__(
        self, ladder: Sequence[int], *, max_delay_s: float = 0.0, max_rows: int = 4096, costs: Costs | None = None
    ) -> None:
        self.ladder = tuple(ladder)
        self.max_delay_s = max_delay_s
        self.max_rows = max_rows
        self.costs: Costs = costs if costs is not None else {}
        self.rows = 0
        self.wake_at: float | None = None
        self._queue: deque[T] = deque()
        self._cancelled = 0

    def __len__(self) -> int:
        """Requests waiting, those cancelled but not yet swept included."""
        return len(self._queue)

    def add(self, ticket: T) -> bool:
        """Queues a request; False if it does not fit, and then it is not queued."""
        rows = self.rows + ticket.rows
        if rows > self.max_rows:
            return False
        self.rows = rows
        self._queue.append(ticket)
        return True

    def cancel(self, ticket: T) -> None:
        """Forgets a request: rows of it that were not handed out never will be. Calling it twice is harmless."""
        if ticket.cancelled:
            return
        ticket.cancelled = True
        if ticket.taken < ticket.rows:
            self.rows -= ticket.rows - ticket.taken
            self._cancelled += 1
            # Swept when it reaches the head, or when the dead outnumber the living.
            if self._cancelled > _SWEEP and 2 * self._cancelled > len(self._queue):
                self._queue = deque(ticket for ticket in self._queue if not ticket.cancelled)
                self._cancelled = 0

    def next_batch(self, now: float, idle: bool) -> Batch[T] | None:
        """The next batch, if it should start now.

        Args:
            now: the time, on the clock of `Ticket.arrival_s`.
            idle: whether the engine can take a batch.

        Returns:
            None if nothing waits, the engine is busy, or waiting longer may fill the batch; see `wake_at`.
        """
        self.wake_at = None
        queue = self._queue
        while queue and queue[0].cancelled:
            queue.popleft()
            self._cancelled -= 1
        if not queue or not idle:
            return None
        head = queue[0]
        waiting, closed = self._waiting(head.key)
        if self.max_delay_s > 0 and waiting < self.ladder[-1] and not closed:
            due = head.arrival_s + self.max_delay_s
            if now < due:
                self.wake_at = due
                return None
        size = self._size(waiting, head.key)
        return self._take(size, head.key)

    def _waiting(self, key: Key) -> tuple[int, bool]:
        """Rows at the head that share `key`, up to the largest size, and whether another key ends the run."""
        rows = 0
        for ticket in self._queue:
            if ticket.cancelled:
                continue
            if ticket.key != key:
                return rows, True
            rows += ticket.rows - ticket.taken
            if rows >= self.ladder[-1]:
                return self.ladder[-1], False
        return rows, False

    def _size(self, waiting: int, key: Key) -> int:
        costs = self.costs.get(key)
        if not costs:
            return next((size for size in self.ladder if size >= waiting), self.ladder[-1])
        best, best_cost = self.ladder[-1], float("inf")
        for size in self.ladder:
            cost = costs[size] / min(waiting, size)
            # Equal cost: the larger size finishes more rows at once.
            if cost <= best_cost:
                best, best_cost = size, cost
            if size >= waiting:
                break
        return best

    def _take(self, size: int, key: Key) -> Batch[T]:
        queue = self._queue
        parts: list[Part[T]] = []
        filled = 0
        while queue and filled < size:
            ticket = queue[0]
            if ticket.cancelled:
                queue.popleft()
                self._cancelled -= 1
                continue
            if ticket.key != key:
                break
            rows = min(ticket.rows - ticket.taken, size - filled)
            parts.append(Part(ticket, ticket.taken, rows, filled))
            ticket.taken += rows
            filled += rows
            if ticket.taken == ticket.rows:
                queue.popleft()
        self.rows -= filled
        return Batch(tuple(parts), filled, size, key)
