"""Beam search: the most likely continuations of one prompt, side by side, each in a slot of its own.

As in Hugging Face transformers: a continuation's score is the sum of its tokens' log-probabilities, divided by the
number of its tokens (the one that ends it included) to the power of the length penalty. The search is over when as many
continuations have ended as there are beams, and none that goes on has a better score than the worst of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Beam:
    """A continuation.

    Attributes:
        tokens: its tokens, without the one that ended it.
        total: the sum of their log-probabilities.
        score: by which those that have ended are compared.
        ended: whether a token ended it.
    """

    tokens: tuple[int, ...]
    total: float
    score: float = 0.0
    ended: bool = False


class Beams:
    """The beams of one sequence.

    Args:
        count: of beams.
        length_penalty: above 0 longer continuations are preferred, below 0 shorter ones.
        limit: largest number of tokens.
        end_tokens: tokens that end a continuation.

    Attributes:
        live: those that go on, the best first; none when the search is over.

    >>> beams = Beams(2, 1.0, limit=2, end_tokens=())
    >>> beams.advance(np.log([[0.5, 0.4, 0.1]])), [beam.tokens for beam in beams.live]
    ([0, 0], [(0,), (1,)])
    >>> beams.advance(np.log([[0.4, 0.3, 0.3], [0.9, 0.1, 1e-9]])), beams.best.tokens
    ([], (1, 0))
    """

    def __init__(self, count: int, length_penalty: float, limit: int, end_tokens: Sequence[int]) -> None:
        self._count, self._penalty, self._limit = count, length_penalty, limit
        self._ends = frozenset(end_tokens)
        self._ended: list[Beam] = []
        self.live = [Beam((), 0.0)]

    @property
    def best(self) -> Beam:
        """The best continuation that has ended."""
        return self._ended[0]

    def advance(self, logits: np.ndarray) -> list[int]:
        """Take the next token of each beam.

        Args:
            logits: of each of `live`, `[beams, tokens]`.

        Returns:
            Of which beam before each beam of `live` now is the continuation.

        Raises:
            ValueError: if a logit is no number, or no token is possible.
        """
        values = logits.astype(np.float64)
        most = values.max(-1, keepdims=True)
        if not np.isfinite(most).all():  # NaN, or infinities only
            raise ValueError("the model gives logits that are no numbers")
        chances = values - most - np.log(np.exp(values - most).sum(-1, keepdims=True))
        totals = chances + np.array([[beam.total] for beam in self.live])
        parents, beams = list[int](), list[Beam]()
        length = len(self.live[0].tokens) + 1
        for rank, place in enumerate(_largest(totals.ravel(), self._count * (1 + len(self._ends)))):
            parent, token = divmod(int(place), totals.shape[1])
            tokens, total = self.live[parent].tokens, float(totals[parent, token])
            if token in self._ends:
                # One that ends counts if it is among the best, as if it went on.
                if rank < self._count:
                    self._end(Beam(tokens, total, total / length**self._penalty, ended=True))
            elif len(beams) < self._count and np.isfinite(total):
                parents.append(parent)
                beams.append(Beam((*tokens, token), total))
        if length == self._limit:
            for beam in beams:
                self._end(dataclasses.replace(beam, score=beam.total / length**self._penalty))
            beams = []
        elif (
            beams
            and len(self._ended) == self._count
            and beams[0].total / length**self._penalty <= self._ended[-1].score
        ):
            beams = []
        self.live = beams
        return parents[: len(beams)]

    def _end(self, beam: Beam) -> None:
        self._ended.append(beam)
        self._ended.sort(key=lambda each: -each.score)  # stable: of equal ones, the one that came first
        del self._ended[self._count :]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values, the largest first; of equal ones, the first.

    >>> _largest(np.array([1.0, 3.0, 2.0, 3.0]), 3)
    array([1, 3, 2])
    """
    if count < len(values):
        edge = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= edge)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]
