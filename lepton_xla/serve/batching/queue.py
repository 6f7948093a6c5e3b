"""Waiting requests of one level and key, in order of urgency."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from operator import attrgetter

from lepton_xla.serve.batching.costs import Key
from lepton_xla.serve.batching.tickets import PATIENCE_S, Ticket

# Fewer closed tickets than this are not removed early.
_SWEEP = 64

_deadline = attrgetter("deadline_s")


class Queue[T: Ticket]:
    """The tickets of one level and key: those without a deadline as they came, the others by their deadline.

    Attributes:
        level, key: of all its tickets.
        rows: live rows waiting.
        plain: tickets without a deadline.
        dated: tickets with one, earliest first, and in order of arrival among equals.
    """

    __slots__ = ("_closed", "dated", "key", "level", "plain", "rows")

    def __init__(self, level: int, key: Key) -> None:
        self.level = level
        self.key = key
        self.rows = 0
        self.plain: deque[T] = deque()
        self.dated: deque[T] = deque()
        self._closed = 0

    def add_dated(self, ticket: T) -> None:
        """Adds a ticket with a deadline. Append others to `plain`."""
        dated = self.dated
        if not dated or dated[-1].deadline_s <= ticket.deadline_s:
            dated.append(ticket)
        else:
            dated.insert(bisect_right(dated, ticket.deadline_s, key=_deadline), ticket)

    def close(self, rows: int) -> None:
        """A ticket with so many waiting rows was closed."""
        self.rows -= rows
        self._closed += 1
        # It is removed when it is first, or when most tickets are closed.
        if self._closed > _SWEEP and 2 * self._closed > len(self):
            self.plain = deque(ticket for ticket in self.plain if not ticket.closed)
            self.dated = deque(ticket for ticket in self.dated if not ticket.closed)
            self._closed = 0

    def __len__(self) -> int:
        """Number of tickets, closed ones not yet removed included."""
        return len(self.plain) + len(self.dated)

    def first(self) -> deque[T]:
        """`plain` or `dated`: the one whose first open ticket is more urgent. It may be empty."""
        plain, dated = self.plain, self.dated
        while plain and plain[0].closed:
            plain.popleft()
            self._closed -= 1
        if not dated:
            return plain
        while dated and dated[0].closed:
            dated.popleft()
            self._closed -= 1
        if dated and (not plain or dated[0].deadline_s <= plain[0].arrival_s + PATIENCE_S):
            return dated
        return plain

    def due_s(self) -> float:
        """When its most urgent ticket is due. The queue must have waiting rows."""
        return self.first()[0].due_s

    def first_deadline_s(self) -> float:
        """The earliest deadline."""
        self.first()
        return self.dated[0].deadline_s if self.dated else math.inf

    def rows_before(self, due_s: float) -> int:
        """Number of rows due before a new ticket; approximate if requests differ in size."""
        tickets = len(self)
        if not tickets:
            return 0
        dated, plain = self.dated, self.plain
        last_too = dated and dated[-1].deadline_s <= due_s
        before = len(dated) if last_too else bisect_right(dated, due_s, key=_deadline)
        if plain:
            # Tickets without a deadline are in order of arrival; the position among them is interpolated.
            first, last = plain[0].due_s, plain[-1].due_s
            if last <= due_s:
                before += len(plain)
            elif first <= due_s:
                before += int(len(plain) * (due_s - first) / (last - first))
        return self.rows * before // tickets
