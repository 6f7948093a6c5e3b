"""How often models were asked for of late, which says which one to evict."""

from __future__ import annotations

import math
from collections.abc import Mapping

_REQUESTS = 8
"""Per loaded model: in so many requests to all of them, what was counted before loses half of its weight."""


class Popularity:
    """Counts of requests by model, each with a weight that halves while others are asked for.

    Where all are asked for equally often, the lowest is the one used least recently. Time is counted in requests, so a
    night without any changes nothing. A weight is kept as its logarithm plus the halvings so far, which does not change
    as time goes by.

    >>> popularity = Popularity()
    >>> for names in ("aab", "c"):
    ...     popularity.note({name: names.count(name) for name in names}, 3)
    >>> sorted("abcd", key=popularity.of)  # c once, b once before, and d never
    ['d', 'b', 'c', 'a']
    """

    def __init__(self) -> None:
        self._halvings = 0.0
        self._weights: dict[str, float] = {}

    def note(self, requests: Mapping[str, int], loaded: int) -> None:
        """Adds requests by model, while so many models are loaded."""
        self._halvings += sum(requests.values()) / (_REQUESTS * max(loaded, 1))
        for name, count in requests.items():
            if count > 0:
                more, before = self._halvings + math.log2(count), self.of(name)
                high, low = max(more, before), min(more, before)
                self._weights[name] = high + math.log2(1 + 2 ** (low - high))

    def of(self, name: str) -> float:
        """To be compared with that of other models alone: the one with less is asked for less."""
        return self._weights.get(name, -math.inf)
