"""Decides which requests share a batch, and when it runs. Pure logic: no thread, no socket, and the caller's clock.

It never waits while the engine is idle (unless `max_delay_s` is set), and forms each batch as late as possible.

*Order.* By priority level, then by deadline, then by arrival. Two rules prevent starvation: a request without a
deadline counts as due `PATIENCE_S` after its arrival, and while lower levels wait, every eighth batch starts with their
most urgent request. Requests further back fill the rest of a batch if they can share it. A full queue drops the newest
requests of lower levels to admit one of a higher level, but leaves each level an eighth of the queue.

*Size.* The compiled size with the least cost per real row (see `costs`), if that meets the deadline of the first
request. If not, a smaller size, unless more rows wait than one batch holds: then the request expires, because a smaller
batch would delay the others. A request larger than the largest size is split over batches.

*Deadlines.* A request that cannot meet its deadline behind those ahead of it is refused on arrival, as in Clockwork
(Gujarati et al., OSDI 2020). A request whose deadline passes while it waits or runs is dropped.

*Other dimensions.* Requests with different keys run in separate batches, unless padding the smaller key to the larger
takes less time in total.

*Failures.* A failed batch runs again in halves, down to single requests, so that one bad request does not fail its
neighbours. `Retries` bounds this.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import inf

from lepton_xla.serve.batching import forecast
from lepton_xla.serve.batching.costs import Costs, Key
from lepton_xla.serve.batching.queue import Queue
from lepton_xla.serve.batching.retries import Retries
from lepton_xla.serve.batching.tickets import Batch, Part, Reason, Ticket

# Batches that a level may start in a row while lower levels wait.
_TURNS = 7


class Batcher[T: Ticket]:
    """A bounded queue of requests that forms batches of compiled sizes.

    Args:
        bucket_sizes: compiled batch sizes, ascending.
        costs: seconds per execution, told of each that finishes; without, each is free until it has run.
        levels: number of priority levels.
        max_delay_s: batching delay: how long the oldest request may wait for others while the engine is idle.
        max_rows: rows the queue holds. A request of more rows than this can never fit.
        max_bytes: memory of the requests that wait; a single one may exceed it.

    Attributes:
        rows: live rows waiting.
        nbytes: memory of the live requests waiting.
        wake_at: when to ask `next_batch` again though nothing arrives or finishes; None if there is no need.
        dropped: requests that will get no result, and why, since the caller last emptied it. `add`, `next_batch`,
            `finish`, `fail` and `expire` put them there.
    """

    def __init__(
        self,
        bucket_sizes: Sequence[int],
        *,
        costs: Costs | None = None,
        levels: int = 1,
        max_delay_s: float = 0.0,
        max_rows: int = 4096,
        max_bytes: int = 1 << 30,
    ) -> None:
        self.bucket_sizes = tuple(bucket_sizes)
        self.costs = costs if costs is not None else Costs(bucket_sizes)
        self.max_delay_s = max_delay_s
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.rows = 0
        self.nbytes = 0
        self.wake_at: float | None = None
        self.dropped: list[tuple[T, Reason]] = []
        self._levels: list[dict[Key, Queue[T]]] = [{} for _ in range(levels)]
        self._queues: list[Queue[T]] = []
        self._turns = 0
        self._next_turns = 0
        self._running: Batch[T] | None = None
        self._free_at = -inf
        self._flying: set[T] = set()
        self._retries: Retries[T] = Retries(bucket_sizes)

    @property
    def running(self) -> bool:
        """Whether a batch is running."""
        return self._running is not None

    def __len__(self) -> int:
        """Number of waiting requests, closed ones not yet removed included."""
        return sum(map(len, self._queues))

    @property
    def pending(self) -> bool:
        """Whether anything waits to run."""
        return self.rows > 0 or bool(self._retries.waiting)

    # In.

    def add(self, ticket: T) -> Reason | None:
        """Queues a request, or returns the reason why not."""
        if ticket.deadline_s != inf:
            reason = forecast.hopeless(self._queues, self.costs, ticket, self._free_at)
            if reason is not None:
                return reason
        rows = self.rows + ticket.rows
        nbytes = self.nbytes + ticket.nbytes
        if rows > self.max_rows or (nbytes > self.max_bytes and self.rows):
            if not self._make_room(ticket, rows - self.max_rows, nbytes - self.max_bytes):
                return Reason.FULL
            rows = self.rows + ticket.rows
            nbytes = self.nbytes + ticket.nbytes
        queue = self._levels[ticket.level].get(ticket.key)
        if queue is None:
            queue = self._open(ticket)
        if ticket.deadline_s == inf:
            queue.plain.append(ticket)
        else:
            queue.add_dated(ticket)
        queue.rows += ticket.rows
        self.rows = rows
        self.nbytes = nbytes
        return None

    def _open(self, ticket: T) -> Queue[T]:
        queue: Queue[T] = Queue(ticket.level, ticket.key)
        self._levels[ticket.level][ticket.key] = queue
        self._queues.append(queue)
        self._queues.sort(key=lambda queue: queue.level)
        return queue

    def _make_room(self, ticket: T, rows: int, nbytes: int) -> bool:
        """Drops the newest requests of lower levels to free so much, or drops nothing. Leaves each level its share."""
        victims: list[T] = []
        for level in range(len(self._levels) - 1, ticket.level, -1):
            queues = self._levels[level].values()
            if not queues:
                continue
            spare = sum(queue.rows for queue in queues) - self.max_rows // (_TURNS + 1)
            for victim in (
                victim for queue in queues for tickets in (queue.plain, queue.dated) for victim in reversed(tickets)
            ):
                if victim.closed or victim.taken or victim.rows > spare:
                    continue
                victims.append(victim)
                spare -= victim.rows
                rows -= victim.rows
                nbytes -= victim.nbytes
                if rows <= 0 and nbytes <= 0:
                    for each in victims:
                        self._drop(each, Reason.OUTRANKED)
                    return True
        return False

    def cancel(self, ticket: T) -> None:
        """Drops a request: its remaining rows never run. Calling it twice is harmless."""
        if ticket.closed:
            return
        ticket.closed = True
        rows = ticket.rows - ticket.taken
        if rows:
            self.rows -= rows
            self.nbytes -= ticket.nbytes
            self._levels[ticket.level][ticket.key].close(rows)
        self._flying.discard(ticket)

    def _drop(self, ticket: T, reason: Reason) -> None:
        self.cancel(ticket)
        self.dropped.append((ticket, reason))

    def clear(self) -> list[T]:
        """Closes and returns every request, running ones too. A batch that runs still counts as running.

        What was here before is not relied on: it may be a fault in it that ended the engine.
        """
        parts = [part for batch in (*self._retries.clear(), self._running) if batch is not None for part in batch.parts]
        waiting = [ticket for queue in self._queues for ticket in (*queue.plain, *queue.dated)]
        live = dict.fromkeys(ticket for ticket in (*(part.ticket for part in parts), *waiting) if not ticket.closed)
        for ticket in live:
            ticket.closed = True
        self._levels = [{} for _ in self._levels]
        self._queues = []
        self._flying.clear()
        self.rows = self.nbytes = 0
        return list(live)

    # Deadlines.

    def next_deadline(self) -> float:
        """The earliest time at which `expire` may have something to do."""
        first = inf
        for queue in self._queues:
            if queue.dated:
                first = min(first, queue.first_deadline_s())
        for ticket in self._flying:
            first = min(first, ticket.deadline_s)
        return first

    def expire(self, now: float) -> None:
        """Drops the requests whose deadline has passed, running ones too."""
        for queue in self._queues:
            while queue.dated and queue.first_deadline_s() <= now:
                self._drop(queue.dated[0], Reason.EXPIRED)
        for ticket in [ticket for ticket in self._flying if ticket.deadline_s <= now]:
            self._drop(ticket, Reason.EXPIRED)

    def drain_s(self, now: float) -> float:
        """Predicted seconds until everything that waits now has run."""
        return max(self._free_at - now, 0.0) + forecast.drain_s(self._queues, self.costs)

    # Out.

    def next_batch(self, now: float) -> Batch[T] | None:
        """The next batch, if it should start now. It counts as running until `finish` or `fail`.

        Args:
            now: the time, on the clock of `Ticket.arrival_s`.

        Returns:
            None if nothing waits, a batch is running, or waiting longer may fill the batch; see `wake_at`.
        """
        self.wake_at = None
        if self._running is not None:
            return None
        if self._retries.waiting:
            batch = self._retries.next_batch()
            if batch is not None:
                return self._start(batch, now)
        while self.rows:
            queue = self._queues[0] if len(self._queues) == 1 else self._first_queue()
            head = queue.first()[0]
            key, waiting = queue.key, queue.rows
            other: Key | None = None
            if len(self._queues) > 1:
                waiting, largest = forecast.waiting_rows(self._queues, key), self.bucket_sizes[-1]
                if waiting < self.rows and waiting < largest:
                    key, waiting, other = forecast.join(self._queues, self.costs, largest, head, waiting, now)
            if self.max_delay_s > 0 and waiting == self.rows and self._delay(waiting, key, now):
                return None
            size = self.costs.size(key, waiting)
            if head.deadline_s != inf and not forecast.meets(self.costs, head, key, size, now):
                sizes = () if self.rows > self.bucket_sizes[-1] else self.bucket_sizes
                size = forecast.urgent_size(self.costs, sizes, head, key, size, now)
                if not size:
                    self._drop(head, Reason.EXPIRED)
                    continue
            batch = self._take(queue, other, size, key, now)
            if batch.parts:
                self._turns = self._next_turns
                return self._start(batch, now)
        return None

    def _first_queue(self) -> Queue[T]:
        """The queue of the request that starts the next batch."""
        queues = [queue for queue in self._queues if queue.rows]
        level = queues[0].level
        self._next_turns = 0
        if queues[-1].level > level:
            if self._turns >= _TURNS:
                return min((queue for queue in queues if queue.level > level), key=Queue.due_s)
            self._next_turns = self._turns + 1
        return min((queue for queue in queues if queue.level == level), key=Queue.due_s)

    def _delay(self, waiting: int, key: Key, now: float) -> bool:
        """Whether to wait for more requests to share the batch; sets `wake_at`."""
        if waiting >= self.bucket_sizes[-1]:
            return False
        last = self.costs.of(key, self.bucket_sizes[-1])
        due = inf
        for queue in self._queues:
            queue.first()
            for ticket in (*queue.dated, *islice(queue.plain, 1)):
                if not ticket.closed:
                    due = min(due, ticket.arrival_s + self.max_delay_s, ticket.deadline_s - last)
        if now >= due:
            return False
        self.wake_at = due
        return True

    def _take(self, queue: Queue[T], other: Key | None, size: int, key: Key, now: float) -> Batch[T]:
        batch: Batch[T] = Batch([], 0, size, key)
        finish = now + self.costs.of(key, size)
        self._fill(batch, queue, finish)
        if len(self._queues) > 1:
            for mate in (queue.key, other):
                for each in self._queues:
                    if each.key == mate and batch.rows < size:
                        self._fill(batch, each, finish)
        self.rows -= batch.rows
        return batch

    def _fill(self, batch: Batch[T], queue: Queue[T], finish: float) -> None:
        """Moves rows of a queue into a batch, and drops requests that the batch would be too late for."""
        parts, filled, size = batch.parts, batch.rows, batch.size
        before = filled
        tickets = queue.first()
        while filled < size:
            if queue.dated or not tickets or tickets[0].closed:
                tickets = queue.first()
                if not tickets:
                    break
            ticket = tickets[0]
            rows = ticket.rows
            if ticket.deadline_s != inf:
                if ticket.deadline_s <= finish:
                    self._drop(ticket, Reason.EXPIRED)
                    continue
                self._flying.add(ticket)
                batch.dated = True
            if ticket.taken or rows > size - filled:
                rows = min(rows - ticket.taken, size - filled)
            parts.append(Part(ticket, ticket.taken, rows, filled))
            ticket.taken += rows
            filled += rows
            if ticket.taken == ticket.rows:
                tickets.popleft()
                self.nbytes -= ticket.nbytes
        queue.rows -= filled - before
        batch.rows = filled

    def _start(self, batch: Batch[T], now: float) -> Batch[T]:
        self._running = batch
        self._free_at = now + self.costs.of(batch.key, batch.size)
        return batch

    # Back.

    def finish(self, batch: Batch[T], now: float, seconds: float | None) -> None:
        """Reports that a batch has run. Its tickets that are still open after this have their results.

        Args:
            batch: the batch.
            now: the time.
            seconds: what it took; None if it was not run because it was not `wanted`.
        """
        self._stop(now)
        if seconds is not None:
            self._retries.succeeded()
            self.costs.learn(batch.key, batch.size, seconds)
        if batch.dated:
            for part in batch.parts:
                ticket = part.ticket
                if ticket.deadline_s <= now and not ticket.closed:
                    self._drop(ticket, Reason.EXPIRED)
                self._flying.discard(ticket)

    def fail(self, batch: Batch[T], now: float) -> list[T]:
        """Reports that a batch has failed.

        Returns:
            The tickets that fail for it, closed now; the others run again.
        """
        self._stop(now)
        if self._retries.add(batch):
            return []
        failed = [part.ticket for part in batch.parts if not part.ticket.closed]
        for ticket in failed:
            self.cancel(ticket)
        return failed

    def _stop(self, now: float) -> None:
        self._running = None
        self._free_at = now
