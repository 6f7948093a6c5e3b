"""Thompson sampling on right and wrong answers, and what is known of versions that were asked with known probability.

Thompson sampling sends each request to an arm with the probability that it is the best one, given what was seen. Those
probabilities are computed now and then and hold in between, so the propensity of every answer is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 4096
# How often the estimates may be wrong, and about how many rows the bounds are tightest at.
_ALPHA, _TIGHTEST_ROWS = 0.05, 1000.0


class Rewards(NamedTuple):
    """Answers of one arm that had feedback."""

    right: float
    wrong: float


def propensities(rewards: Mapping[str, Rewards], least: float = 0.0, seed: int = 0) -> dict[str, float]:
    """The probability of each arm to be the best, which is the share of the requests that it gets.

    Args:
        rewards: arm -> what was seen of it; the prior is uniform.
        least: the smallest share of an arm.
        seed: of the draws.

    Source:
        Thompson, "On the likelihood that one unknown probability exceeds another in view of the evidence of two
        samples", 1933.

    >>> found = propensities({"3": Rewards(90, 10), "4": Rewards(60, 40)}, least=0.05)
    >>> {arm: round(share, 2) for arm, share in found.items()}
    {'3': 0.95, '4': 0.05}
    """
    arms = list(rewards)
    draw = np.random.default_rng(seed)
    chances = np.stack([draw.beta(1 + rewards[arm].right, 1 + rewards[arm].wrong, _DRAWS) for arm in arms])
    best = np.bincount(chances.argmax(axis=0), minlength=len(arms)) / _DRAWS
    shares = least + (1 - least * len(arms)) * best
    rounded = [round(float(share), 6) for share in shares]
    rounded[int(shares.argmax())] += 1 - math.fsum(rounded)
    return dict(zip(arms, rounded, strict=True))


class Estimate(NamedTuple):
    """What an arm's accuracy would be if it got all requests, by the answers that it gave with known propensity.

    Attributes:
        value: the estimate; NaN without answers.
        error: its standard error.
        rows: that it is of.
    """

    value: float
    error: float
    rows: float


def off_policy(sums: Sequence[float]) -> Estimate:
    """The self-normalized estimate by inverse propensities.

    Args:
        sums: over rows with feedback, of 1, 1/p, 1/p^2, r/p and r/p^2; p is the propensity, r 1 for a right answer.

    Source:
        Swaminathan and Joachims, "The self-normalized estimator for counterfactual learning", 2015.

    >>> off_policy([4, 8.0, 16.0, 6.0, 12.0])  # four rows at 1/2, three of them right
    Estimate(value=0.75, error=0.21650635094610965, rows=4)
    """
    rows, weights, squares, right, right_squares = sums
    if not weights:
        return Estimate(math.nan, math.inf, 0.0)
    value = right / weights
    variance = (right_squares * (1 - 2 * value) + value * value * squares) / weights**2
    return Estimate(value, math.sqrt(max(variance, 0.0)), rows)


def surely_best(estimates: Mapping[str, Estimate]) -> str | None:
    """The arm that is better than each other one by what may be said at every moment, however often one looks; or None.

    Source:
        Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence
        sequences", 2021 (theorem 2.2).

    >>> good, bad = Estimate(0.95, 0.004, 3000), Estimate(0.9, 0.01, 900)
    >>> surely_best({"3": bad, "4": good}), surely_best({"3": good, "4": Estimate(0.94, 0.01, 600)})
    ('4', None)
    """
    known = {arm: each for arm, each in estimates.items() if each.rows}
    if len(known) < len(estimates) or not known:
        return None
    best = max(known, key=lambda arm: known[arm].value)
    seen = sum(each.rows for each in known.values()) / _TIGHTEST_ROWS
    errors_apart = math.sqrt(2 * (1 + 1 / seen) * math.log(math.sqrt(1 + seen) / _ALPHA))
    for arm, each in known.items():
        # No error at all is that of a few rows which were all alike.
        error = math.hypot(max(known[best].error, 1 / known[best].rows), max(each.error, 1 / each.rows))
        if arm != best and not known[best].value - each.value > errors_apart * error:  # nor where one is no number
            return None
    return best
