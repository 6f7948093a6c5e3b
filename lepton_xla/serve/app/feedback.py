"""The route that takes feedback, in whichever process the answer was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lepton_xla.serve.app.later import Later
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.monitor.feedback import divide, rows_of, unknown_answer
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol import monitoring


class Others(Protocol):
    """The other processes of this server, one of which may have answered."""

    async def judge(self, model: str, labels: monitoring.RightAnswers) -> int:
        """Has labels judged where the answers were given; returns the rows, or raises `HTTPError`."""
        ...


class FeedbackPage:
    """Answers feedback.

    Args:
        metrics: the server's counters, which know what judges.
        refuse: answers with an error.
        others: the other processes; None if this is all of the server.
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        refuse: Callable[[Exchange, HTTPError], object],
        others: Others | None,
    ) -> None:
        self._metrics = metrics
        self._others = others
        self._later = Later(metrics, refuse)

    def take(self, model: ModelHandle, exchange: Exchange) -> None:
        """Takes the labels of a request: all of them, or none."""
        self._later.answer(exchange, self._judge(model, monitoring.feedback(exchange.body)), "feedback failed")

    async def _judge(self, model: ModelHandle, labels: monitoring.RightAnswers) -> monitoring.FeedbackTaken:
        name = model.signature.name
        judges = self._metrics.judges(name)
        if not judges:
            raise HTTPError(
                501, "this model takes no feedback: it has no output with classes, or the server keeps none"
            )
        parts, rest = divide(judges, labels)
        # Held here until the others have counted theirs: all of the labels are taken, or none.
        for judge, held in parts:
            judge.check(held)
        rows = rows_of(parts)
        if rest:
            if self._others is None:
                raise unknown_answer()
            rows += await self._others.judge(name, rest)
        for judge, held in parts:
            judge.settle(held)
        return monitoring.FeedbackTaken(rows)
