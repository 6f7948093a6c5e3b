"""Bounds on a rate that hold at every moment, however often one looks: what may be decided on while data come in."""

from __future__ import annotations

import math
from collections.abc import Callable

_STEPS = 60


def rate_bounds(hits: float, trials: float, alpha: float = 0.05) -> tuple[float, float]:
    """Lower and upper bound of a rate, by the mixture of all rates (a uniform prior) as the alternative.

    With probability 1 - alpha the true rate is between them after every trial, so one may stop at any. An interval
    that is made for one look, such as Wilson's, is left sooner or later if one looks often enough.

    Args:
        hits: how often it happened.
        trials: out of how many.
        alpha: how often the bounds may be wrong.

    Source:
        Robbins, "Statistical methods related to the law of the iterated logarithm", 1970; Ville's inequality.

    >>> [round(bound, 3) for bound in rate_bounds(950, 1000)]
    [0.92, 0.972]
    >>> rate_bounds(0, 0)
    (0.0, 1.0)
    """
    if trials <= 0:
        return 0.0, 1.0
    misses = trials - hits
    mixture = math.lgamma(1 + hits) + math.lgamma(1 + misses) - math.lgamma(2 + trials)
    limit = mixture - math.log(1 / alpha)

    def excluded(rate: float) -> bool:
        likelihood = (hits * math.log(rate) if hits else 0.0) + (misses * math.log1p(-rate) if misses else 0.0)
        return likelihood <= limit

    middle = hits / trials
    lower = _edge(excluded, 0.0, middle) if hits else 0.0
    upper = _edge(excluded, 1.0, middle) if misses else 1.0
    return lower, upper


def _edge(excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where what is excluded begins, between a point that is and one that is not."""
    for _ in range(_STEPS):
        middle = (outside + inside) / 2
        if 0 < middle < 1 and not excluded(middle):
            inside = middle
        else:
            outside = middle
    return outside
