"""Confidence intervals of shares and of paired differences, and an exact test of paired answers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

# The 97.5 % quantile of the normal distribution: intervals cover 95 %.
_Z = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval.

    Attributes:
        low, high: its ends.
        method: how it was made.

    >>> from lepton_xla.evaluation import Interval
    >>> str(Interval(0.9, 0.95, "Wilson"))
    '0.9000 to 0.9500'
    """

    low: float
    high: float
    method: str

    def __str__(self) -> str:
        return f"{self.low:.4f} to {self.high:.4f}"


def share_interval(count: int, total: int) -> Interval:
    """The interval of a share by Wilson's score method (1927).

    >>> interval = share_interval(81, 263)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.2553, 0.3662)
    """
    if not total:
        return Interval(0.0, 1.0, "Wilson")
    share = count / total
    middle = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z / (1 + _Z**2 / total) * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half), "Wilson")


def paired_interval(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """The interval of the second share minus the first, of answers to the same rows.

    Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
    data" (1998), method 10.

    Args:
        both, only_first, only_second, neither: rows that are right by both, by one only, and by neither.

    >>> interval = paired_interval(36, 2, 12, 0)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.0569, 0.3404)
    """
    total = both + only_first + only_second + neither
    method = "Newcombe, paired"
    if not total:
        return Interval(-1.0, 1.0, method)
    first, second = (both + only_first) / total, (both + only_second) / total
    one, two = share_interval(both + only_first, total), share_interval(both + only_second, total)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    agreement = both * neither - only_first * only_second
    if agreement > 0:  # with the continuity correction
        agreement = max(agreement - total / 2, 0.0)
    phi = agreement / math.sqrt(product) if product else 0.0
    down, up = second - two.low, two.high - second
    first_down, first_up = first - one.low, one.high - first
    low = math.sqrt(max(0.0, down**2 - 2 * phi * down * first_up + first_up**2))
    high = math.sqrt(max(0.0, up**2 - 2 * phi * up * first_down + first_down**2))
    return Interval(second - first - low, second - first + high, method)


def bootstrap_interval(values: np.ndarray, *, paired: bool) -> Interval | None:
    """The interval of a metric by the percentiles of its values on resampled rows (Efron 1979).

    Args:
        values: the metric on each resample; or its difference, of both sides on the same resamples.
        paired: whether they are differences.

    Returns:
        The interval; None if the metric is undefined on too many resamples.

    >>> bootstrap_interval(np.linspace(0, 1, 1001), paired=False)
    Interval(low=0.025, high=0.975, method='bootstrap of rows')
    """
    finite = values[np.isfinite(values)]
    if len(finite) < 0.9 * len(values) or not len(finite):
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(round(float(low), 12), round(float(high), 12), f"{'paired ' if paired else ''}bootstrap of rows")


def sign_test(gained: int, lost: int) -> float:
    """The probability of at least so many gains in `gained + lost` fair coins (the exact test of McNemar, one-sided).

    >>> round(sign_test(3, 0), 6), sign_test(0, 0)
    (0.125, 1.0)
    """
    count = gained + lost
    return min(1.0, math.fsum(math.exp(_log_choose(count, k) - count * math.log(2)) for k in range(gained, count + 1)))


def _log_choose(count: int, k: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
