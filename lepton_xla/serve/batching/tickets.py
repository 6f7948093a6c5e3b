"""Requests as the batcher sees them, and the batches they leave the queue in."""

from __future__ import annotations

import dataclasses
import enum
import math

import msgspec

from lepton_xla.serve.batching.costs import Key

# A request without a deadline counts as due so long after it came where others have deadlines, so that an endless
# stream of those does not hold it up for ever.
PATIENCE_S = 1.0


class Reason(enum.Enum):
    """Why a request gets no result."""

    FULL = enum.auto()
    """The queue has no room for it."""
    OUTRANKED = enum.auto()
    """It left a full queue to one of a higher level."""
    OVERLOADED = enum.auto()
    """What is ahead of it takes until after its deadline."""
    TOO_SHORT = enum.auto()
    """Running it takes longer than its deadline leaves, whatever else waits."""
    EXPIRED = enum.auto()
    """Its deadline passed, or came too near for another run."""


# Tickets and parts are made for every request, and msgspec makes them in less time than `__init__` does.
class Ticket(msgspec.Struct, eq=False):
    """A request in the queue; what it is a request for is in a class that inherits from this one.

    Attributes:
        rows: rows it brings, at least one.
        key: what it may share a batch with.
        arrival_s: when it came.
        deadline_s: when its answer is no longer wanted; infinity if that never is.
        level: 0 goes first.
        nbytes: memory it holds while it waits.
        taken: rows handed out in batches.
        closed: whether nobody waits for its answer any more: cancelled, refused or failed.
    """

    rows: int
    key: Key
    arrival_s: float
    deadline_s: float = math.inf
    level: int = 0
    nbytes: int = 0
    taken: int = 0
    closed: bool = False

    @property
    def due_s(self) -> float:
        """What orders it among those of its level."""
        return self.arrival_s + PATIENCE_S if self.deadline_s == math.inf else self.deadline_s


class Part[T: Ticket](msgspec.Struct, eq=False):
    """Rows `[start, start + rows)` of a ticket, at row `offset` of the batch."""

    ticket: T
    start: int
    rows: int
    offset: int


class Budget:
    """Runs that are left to find out which requests of a failed batch made it fail."""

    __slots__ = ("runs",)

    def __init__(self, runs: int) -> None:
        self.runs = runs


@dataclasses.dataclass(slots=True)
class Batch[T: Ticket]:
    """What one execution takes.

    Attributes:
        parts: in the order they were due; their rows fill the batch from row zero without gaps.
        rows: real rows, at most `size`.
        size: the compiled size to run; the rows beyond `rows` are padding.
        key: sizes of the other dimensions; no smaller than those of any ticket in it.
        dated: whether a ticket in it has a deadline.
        budget: of the batch that it was a part of, if that failed.
    """

    parts: list[Part[T]]
    rows: int
    size: int
    key: Key
    dated: bool = False
    budget: Budget | None = None

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for a row of it."""
        return not all(part.ticket.closed for part in self.parts)
