"""Runs failed batches again in halves, so that one bad request does not fail its neighbours."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lepton_xla.serve.batching.tickets import Batch, Budget, Part, Ticket


class Retries[T: Ticket]:
    """Halves of failed batches that wait to run.

    Of n requests one culprit is found in 2 log2(n) runs; a failed batch may take twice as many, which is enough for
    two. Where that does not do, the model fails whatever it is given, most likely, and nothing is halved until a run
    succeeds.

    Args:
        bucket_sizes: compiled batch sizes, ascending.

    Attributes:
        waiting: the halves.
    """

    def __init__(self, bucket_sizes: Sequence[int]) -> None:
        self._bucket_sizes = tuple(bucket_sizes)
        self.waiting: deque[Batch[T]] = deque()
        self._useful = True

    def add(self, batch: Batch[T]) -> bool:
        """Adds the halves of a failed batch; returns False if its requests fail for good."""
        if len(batch.parts) < 2 or not self._useful:
            return False
        budget = batch.budget or Budget(4 * (len(batch.parts) - 1).bit_length())
        if budget.runs < 2:
            self._useful = False
            return False
        budget.runs -= 2
        middle = len(batch.parts) // 2
        for half in (batch.parts[:middle], batch.parts[middle:]):
            self.waiting.append(Batch(half, 0, 0, batch.key, batch.dated, budget))
        return True

    def succeeded(self) -> None:
        """A batch ran without an error."""
        self._useful = True

    def clear(self) -> list[Batch[T]]:
        """Removes and returns the waiting halves."""
        waiting = list(self.waiting)
        self.waiting.clear()
        return waiting

    def next_batch(self) -> Batch[T] | None:
        """The next half to run, without requests closed meanwhile."""
        while self.waiting:
            batch = self.waiting.popleft()
            parts: list[Part[T]] = []
            for part in batch.parts:
                if not part.ticket.closed:
                    parts.append(Part(part.ticket, part.start, part.rows, batch.rows))
                    batch.rows += part.rows
            if parts:
                batch.parts = parts
                batch.size = next(size for size in self._bucket_sizes if size >= batch.rows)
                return batch
        return None
