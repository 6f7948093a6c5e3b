"""What the costs predict of waiting requests: whether deadlines can be met, and what is worth running together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lepton_xla.serve.batching.costs import Costs, Key
from lepton_xla.serve.batching.queue import Queue
from lepton_xla.serve.batching.tickets import Reason, Ticket


def waiting_rows[T: Ticket](queues: Iterable[Queue[T]], key: Key) -> int:
    """Number of waiting rows of a key."""
    return sum(queue.rows for queue in queues if queue.key == key)


def drain_s[T: Ticket](queues: Sequence[Queue[T]], costs: Costs) -> float:
    """Seconds to run everything that waits."""
    return sum(costs.seconds(key, waiting_rows(queues, key)) for key in {queue.key for queue in queues})


def hopeless[T: Ticket](queues: Iterable[Queue[T]], costs: Costs, ticket: T, free_at: float) -> Reason | None:
    """The reason why an arriving request cannot meet its deadline, or None.

    Args:
        queues: what waits.
        costs: seconds per execution.
        ticket: the request.
        free_at: when the batch that runs will be done.
    """
    now = ticket.arrival_s
    rows: dict[Key, int] = {ticket.key: ticket.rows}
    for queue in queues:
        if queue.rows and queue.level <= ticket.level:
            ahead = queue.rows if queue.level < ticket.level else queue.rows_before(ticket.deadline_s)
            rows[queue.key] = rows.get(queue.key, 0) + ahead
    finish = max(free_at, now)
    for key, count in rows.items():
        finish += costs.seconds(key, count)
    if finish < ticket.deadline_s:
        return None
    alone = now + costs.seconds(ticket.key, ticket.rows)
    return Reason.OVERLOADED if alone < ticket.deadline_s else Reason.TOO_SHORT


def meets(costs: Costs, head: Ticket, key: Key, size: int, now: float) -> bool:
    """Whether a request that starts a batch of this size now meets its deadline."""
    rows = head.rows - head.taken
    seconds = costs.of(key, size) if rows <= size else costs.seconds(key, rows)
    return now + seconds < head.deadline_s


def urgent_size(costs: Costs, sizes: Sequence[int], head: Ticket, key: Key, size: int, now: float) -> int:
    """The largest of the sizes below `size` that meets the deadline of `head`; 0 for none."""
    for smaller in reversed(sizes):
        if smaller < size and head.rows - head.taken <= smaller and meets(costs, head, key, smaller, now):
            return smaller
    return 0


def join[T: Ticket](
    queues: Sequence[Queue[T]], costs: Costs, largest: int, head: T, waiting: int, now: float
) -> tuple[Key, int, Key | None]:
    """Chooses whether requests of another key share the batch: the key to run, its waiting rows, and the other key.

    Sharing costs padding and saves a run; it is chosen if it takes less time in total.

    Args:
        queues: what waits.
        costs: seconds per execution.
        largest: the largest compiled size.
        head: the request that starts the batch.
        waiting: rows of its key that wait, fewer than `largest`.
        now: the time.
    """
    key = head.key
    best: tuple[Key, int, Key | None] = (key, waiting, None)
    most = 0.0
    alone = costs.seconds(key, waiting)
    for other in {queue.key for queue in queues if queue.rows}:
        wide = max(key, other)
        if other == key or any(size > limit for size, limit in zip(min(key, other), wide, strict=True)):
            continue
        rows = waiting_rows(queues, other)
        room = costs.size(wide, waiting) - waiting  # padding rows, which others may use at no cost
        for joining in {min(rows, largest - waiting), min(rows, room)}:
            if joining < 1:
                continue
            apart = alone + costs.seconds(other, rows) - costs.seconds(other, rows - joining)
            together = costs.seconds(wide, waiting + joining)
            if apart - together > most and now + together < head.deadline_s:
                most = apart - together
                best = (wide, waiting + joining, other)
    return best
