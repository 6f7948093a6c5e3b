"""Certificates: what was found of a compressed model when it was made, and how feedback tells that it does not hold.

The statement is a part of an artifact's manifest, so a signature of the artifact signs it.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

# By how much the rate of right answers may have fallen: the test bets on all of these at once, in equal parts.
_FALLS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 0.9)
# Logarithms beyond this are not told apart.
_MOST = 700.0

type Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured of a compressed model, on rows that chose nothing.

    Attributes:
        metric: the metric.
        float_value: that of the float model, on all rows.
        value: that of the compressed model, on all rows.
        drop: by how much it fell on the rows held back, in hundredths of the metric.
        low, high: the 95 % interval of the drop.
        rows: rows held back.
        all_rows: rows of `evaluate`.
        data: SHA-256 of these rows.
        weights_bytes: bytes of the compressed weights on disk.
        float_bytes: bytes of the float weights on disk.
        recipe: name of the recipe.
        promised: accuracy that the model has at least, with 95 % confidence, on rows like these; None where the metric
            is no share of right answers, so that feedback cannot tell.

    >>> made = dict(metric="accuracy", float_value=0.98, value=0.97, drop=0.9, low=0.1, high=1.7, rows=500)
    >>> made |= dict(all_rows=1000, data="0" * 64, weights_bytes=100, float_bytes=400, recipe="int8", promised=0.95)
    >>> print(Certificate(**made))
    accuracy 0.98 -> 0.97; +0.90 points lost (95 %: +0.10 to +1.70) on 500 rows held back; 100 of 400 bytes; ...
    """

    metric: Annotated[str, msgspec.Meta(max_length=256)]
    float_value: float
    value: float
    drop: float
    low: float
    high: float
    rows: Annotated[int, msgspec.Meta(ge=1)]
    all_rows: Annotated[int, msgspec.Meta(ge=1)]
    data: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    weights_bytes: Annotated[int, msgspec.Meta(ge=0)]
    float_bytes: Annotated[int, msgspec.Meta(ge=0)]
    recipe: Annotated[str, msgspec.Meta(max_length=256)]
    promised: Share | None = None

    def __str__(self) -> str:
        found = (
            f"{self.metric} {self.float_value:.6g} -> {self.value:.6g}; {self.drop:+.2f} points lost (95 %: "
            f"{self.low:+.2f} to {self.high:+.2f}) on {self.rows:,} rows held back; {self.weights_bytes:,} of "
            f"{self.float_bytes:,} bytes; data {self.data[:16]}"
        )
        return found if self.promised is None else f"{found}; promises {self.metric} of at least {self.promised:.4f}"


def promise(right: int, rows: int, high: float, *, confidence: float = 0.95) -> float:
    """An accuracy that a compressed model has at least: the float model's lower bound, less the drop's upper bound.

    Both bounds hold with half of the doubt each, so together they hold with the confidence.

    Args:
        right: rows that the float model answers right.
        rows: of so many.
        high: upper end of the drop's interval of that confidence, in points.
        confidence: of both together.

    Source:
        Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.

    >>> round(promise(980, 1000, 1.0), 4)
    0.9593
    """
    from scipy.stats import beta

    doubt = (1 - confidence) / 2
    lower = float(beta.ppf(doubt, right, rows - right + 1)) if right else 0.0
    return max(0.0, lower - max(high, 0.0) / 100)


class Evidence:
    """Evidence in feedback against a promised accuracy, which may be looked at after every row.

    For each fall of the accuracy that is bet on, the likelihood ratio of the fallen to the promised accuracy is a
    supermartingale while the promise holds. `value` is the mean of their Shiryaev-Roberts sums, so a good past does not
    hide a fall of today. While the promise holds it takes at least v looks, on average, to reach v.

    Args:
        promised: the accuracy.

    Source:
        Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", 2023.

    >>> evidence = Evidence(0.95)
    >>> evidence.add(960, 40), evidence.value < 100
    (None, True)
    >>> evidence.add(40, 60), evidence.value > 1e9
    (None, True)
    """

    def __init__(self, promised: float) -> None:
        fallen = [promised - fall for fall in _FALLS if promised - fall > 0] or [promised / 2]
        self._right = [math.log(rate / promised) if promised else 0.0 for rate in fallen]
        self._wrong = [math.log1p(-rate) - math.log1p(-min(promised, 1 - 1e-6)) for rate in fallen]
        self._sums = [-math.inf] * len(fallen)

    def add(self, right: int, wrong: int) -> None:
        """Take rows of feedback, as one look.

        Args:
            right, wrong: rows that were answered so.
        """
        if right + wrong:
            self._sums = [
                min(_MOST, _log_add(known, 0.0) + right * if_right + wrong * if_wrong)
                for known, if_right, if_wrong in zip(self._sums, self._right, self._wrong, strict=True)
            ]

    @property
    def value(self) -> float:
        """The evidence; 0 before any row."""
        return sum(math.exp(each) for each in self._sums) / len(self._sums)


def _log_add(one: float, other: float) -> float:
    large, small = max(one, other), min(one, other)
    return large + math.log1p(math.exp(small - large))
