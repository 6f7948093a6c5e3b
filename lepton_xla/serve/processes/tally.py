"""The sum of what all workers have counted."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from lepton_xla.serve.observe.metrics import added
from lepton_xla.serve.observe.server_metrics import lasting
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import Child

# How long a scrape waits for workers that do not report.
_WAIT_S = 0.5


@dataclasses.dataclass(slots=True)
class _Inquiry:
    """A worker that asked for the counts of the others, and those that have not reported yet."""

    asker: Child
    number: int
    missing: set[Child]


class Tally:
    """Collects the counts of workers for the one that is asked for them, and keeps those of workers that ended.

    Args:
        workers: all of them.
    """

    def __init__(self, workers: Sequence[Child]) -> None:
        self._workers = workers
        self._retired: dict[str, Any] = {}
        self._inquiries: dict[int, _Inquiry] = {}
        self._asked = 0

    def count(self, asker: Child, number: int) -> None:
        """Asks the other workers for their counts, on behalf of the one that wants to show the total."""
        self._asked += 1
        missing = {child for child in self._workers if child.ready and child is not asker}
        self._inquiries[self._asked] = _Inquiry(asker, number, missing)
        for child in missing:
            child.send(control.Count(self._asked))
        asyncio.get_running_loop().call_later(_WAIT_S, self._answer, self._asked)
        self.counted(asker, self._asked)

    def counted(self, child: Child, number: int) -> None:
        """Notes that a worker has reported; number 0 is a report that nobody asked for."""
        inquiry = self._inquiries.get(number)
        if inquiry is not None:
            inquiry.missing.discard(child)
            if not inquiry.missing:
                self._answer(number)

    def retire(self, child: Child) -> None:
        """Keeps the counts of a worker that ended, so that no sum ever falls."""
        self._retired = added(self._retired, lasting(child.counts))
        child.counts = {}
        for number, inquiry in tuple(self._inquiries.items()):
            if inquiry.asker is child:
                del self._inquiries[number]
            else:
                self.counted(child, number)

    def _answer(self, number: int) -> None:
        inquiry = self._inquiries.pop(number, None)
        if inquiry is not None:
            total = self._retired
            for child in self._workers:
                if child is not inquiry.asker:
                    total = added(total, child.counts)
            for message in control.in_pieces(total, inquiry.number):
                inquiry.asker.send(message)
