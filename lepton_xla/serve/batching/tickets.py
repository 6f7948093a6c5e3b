"""Requests as the batcher sees them, and batches."""

from __future__ import annotations

import dataclasses
import enum
import math

import msgspec

from lepton_xla.serve.batching.costs import Key

# Beside requests with deadlines, one without counts as due this long after its arrival: else an endless stream of
# deadlines would starve it.
PATIENCE_S = 1.0


class Reason(enum.Enum):
    """Why a request gets no result."""

    FULL = enum.auto()
    """The queue has no room for it."""
    OUTRANKED = enum.auto()
    """A request of a higher level took its place in a full queue."""
    OVERLOADED = enum.auto()
    """The requests ahead of it run past its deadline."""
    TOO_SHORT = enum.auto()
    """Running it alone takes longer than its timeout."""
    EXPIRED = enum.auto()
    """Its deadline passed, or is too near for another run."""


# Every request makes a ticket and a part; msgspec makes them faster than `__init__`.
class Ticket(msgspec.Struct, eq=False):
    """A request in the queue. Subclasses add what it requests.

    Attributes:
        rows: number of rows, at least one.
        key: sizes of the other dimensions; equal keys may share a batch.
        arrival_s: when it arrived.
        deadline_s: when its answer becomes useless; infinity for never.
        level: priority level; 0 is the highest.
        nbytes: memory it holds while it waits.
        taken: rows already in batches.
        closed: whether it needs no answer any more: cancelled, refused or failed.
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
        """Sort key within a level."""
        return self.arrival_s + PATIENCE_S if self.deadline_s == math.inf else self.deadline_s


class Part[T: Ticket](msgspec.Struct, eq=False):
    """Rows `[start, start + rows)` of a ticket, at row `offset` of the batch."""

    ticket: T
    start: int
    rows: int
    offset: int


class Budget:
    """Number of runs left to find the requests that made a batch fail."""

    __slots__ = ("runs",)

    def __init__(self, runs: int) -> None:
        self.runs = runs


@dataclasses.dataclass(slots=True)
class Batch[T: Ticket]:
    """The rows of one execution.

    Attributes:
        parts: in order of urgency; their rows fill the batch from row zero without gaps.
        rows: real rows, at most `size`.
        size: the compiled size; rows beyond `rows` are padding.
        key: sizes of the other dimensions, no smaller than those of any of its tickets.
        dated: whether one of its tickets has a deadline.
        budget: of the failed batch that it is a half of, if it is one.
    """

    parts: list[Part[T]]
    rows: int
    size: int
    key: Key
    dated: bool = False
    budget: Budget | None = None

    @property
    def wanted(self) -> bool:
        """Whether any of its tickets is open."""
        for part in self.parts:  # noqa: SIM110 (nearly always the first one is, and a generator takes longer)
            if not part.ticket.closed:
                return True
        return False
