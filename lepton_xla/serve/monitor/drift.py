"""How far the distribution of seen rows is from the known one, on the same bins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lepton_xla.profiles import Profile

# Of a normal distribution, beyond which there is a hundred-millionth: many features are looked at, and often.
_DEVIATIONS = 5.612


class Drift(NamedTuple):
    """How far a feature has drifted.

    Attributes:
        psi: population stability index; below 0.1 is commonly called stable, above 0.2 a shift.
        ks: Kolmogorov-Smirnov distance between the two distributions, at the edges of the bins.
        missing: share of values that are not finite.
        noise: the index that chance makes of so many rows without any drift, which one in a hundred million exceeds.
    """

    psi: float
    ks: float
    missing: float
    noise: float = 0.0

    @property
    def shift(self) -> float:
        """How far the index is beyond that; negative where chance may have made it."""
        return self.psi - self.noise


def drift(known: Sequence[int], seen: Sequence[int]) -> Drift:
    """Compares two histograms of the same bins; the last bin holds values that are not finite.

    Half a row is added to each bin, so that empty ones do not make the index infinite.

    Source:
        Siddiqi, "Credit Risk Scorecards", 2006 (population stability index).

    >>> drift([50, 50, 0], [50, 50, 0]).psi, drift([90, 10, 0], [10, 90, 0]).ks
    (0.0, 0.8)
    """
    counts = np.array([known, seen], np.float64)
    shares = (counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True)
    psi = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    finite = counts[:, :-1]
    cumulative = finite.cumsum(axis=1) / np.maximum(finite.sum(axis=1, keepdims=True), 1)
    ks = float(np.abs(cumulative[1] - cumulative[0]).max()) if finite.any(axis=1).all() else 0.0
    return Drift(psi, ks, float(counts[1, -1] / max(counts[1].sum(), 1)), _noise(counts))


def _noise(counts: np.ndarray) -> float:
    """The index's quantile where both histograms are of one distribution: that of chi-squared, over the harmonic rows.

    Source:
        Yurdakul and Naranjo, "Statistical properties of the population stability index", 2020; the quantile by Wilson
        and Hilferty, 1931.
    """
    rows = counts.sum(axis=1)
    degrees = max(1, int(counts.any(axis=0).sum()) - 1)
    spread = 2 / (9 * degrees)
    quantile = degrees * (1 - spread + _DEVIATIONS * math.sqrt(spread)) ** 3
    return float(quantile * (1 / rows).sum()) if rows.all() else math.inf


def drifts(profile: Profile, seen: Mapping[str, Sequence[int]]) -> dict[str, Drift]:
    """The drift of each feature of a profile that has been seen."""
    return {
        feature.name: drift(feature.counts, seen[feature.name])
        for feature in profile.features
        if any(seen.get(feature.name, ()))
    }
