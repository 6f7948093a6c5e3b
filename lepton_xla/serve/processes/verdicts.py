"""Feedback for answers that other workers gave: the supervisor finds them, and has them judge."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.monitor.feedback import unknown_answer
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import Child
from lepton_xla.serve.protocol.monitoring import RightAnswers

# How long to wait for a worker that does not say what it knows.
_WAIT_S = 2.0


class Verdicts:
    """Asks workers who gave the answers, and then these to judge them.

    Args:
        workers: all of them.
    """

    def __init__(self, workers: Sequence[Child]) -> None:
        self._workers = workers
        self._waiting: dict[tuple[Child, int], asyncio.Future[control.Judged | None]] = {}
        self._numbers = itertools.count(1)

    async def judge(self, asker: Child, model: str, labels: RightAnswers) -> int:
        """Has labels judged by the other workers: all of them, or none.

        Args:
            asker: the worker that does not know these answers.
            model: the model's name.
            labels: request id -> the right class of each row.

        Returns:
            How many rows were judged.

        Raises:
            HTTPError: as `Feedback.check`; 503 if a worker that may know an answer does not say.
        """
        others = [child for child in self._workers if child.ready and child is not asker]
        found = await asyncio.gather(*(self._ask(child, model, labels, count=False) for child in others))
        rest, ids, parts = dict(labels), list(labels), list[tuple[Child, RightAnswers]]()
        for child, judged in zip(others, found, strict=True):
            known = [] if judged is None else [ids[index] for index in judged.known if ids[index] in rest]
            if known:
                _check(judged)
                parts.append((child, {request_id: rest.pop(request_id) for request_id in known}))
        if rest and None in found:
            raise HTTPError(503, "a worker that may have answered does not say; try again", "Retry-After: 1")
        if rest:
            raise unknown_answer()
        counted = await asyncio.gather(*(self._ask(child, model, part, count=True) for child, part in parts))
        return sum(_check(judged).rows for judged in counted)

    def judged(self, child: Child, judged: control.Judged) -> None:
        """A worker has said what it knows."""
        waiting = self._waiting.pop((child, judged.number), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(judged)

    def gone(self, child: Child) -> None:
        """A worker has ended."""
        for key in [key for key in self._waiting if key[0] is child]:
            self._waiting.pop(key).set_result(None)

    async def _ask(self, child: Child, model: str, labels: RightAnswers, *, count: bool) -> control.Judged | None:
        """What a worker says; None if it does not."""
        key = (child, next(self._numbers))
        waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
        for message in control.labels_in_pieces(key[1], model, labels, count=count):
            child.send(message)
        try:
            return await asyncio.wait_for(waiting, _WAIT_S)
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(key, None)


def _check(judged: control.Judged | None) -> control.Judged:
    if judged is None:
        raise HTTPError(
            503, "the worker that answered has not judged the feedback in time; try again", "Retry-After: 1"
        )
    if judged.status:
        raise HTTPError(judged.status, judged.error)
    return judged
