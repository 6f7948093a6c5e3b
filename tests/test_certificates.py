"""Certificates: the accuracy that is promised, and the evidence in feedback against it."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from lepton_xla.certificates import _FALLS, Evidence, promise


def test_evidence_is_the_sum_over_all_times_that_a_fall_may_have_begun():
    # Shiryaev and Roberts: of every row, the likelihood ratio of all rows since, averaged over the falls bet on.
    promised, rows = 0.9, [1, 1, 0, 1, 0, 0, 1, 0]
    evidence = Evidence(promised)
    for right in rows:
        evidence.add(right, 1 - right)
    bets = [promised - fall for fall in _FALLS if promised - fall > 0]
    ratios = np.array([[bet / promised if row else (1 - bet) / (1 - promised) for row in rows] for bet in bets])
    expected = np.mean([sum(np.prod(each[begin:]) for begin in range(len(rows))) for each in ratios])
    assert evidence.value == pytest.approx(expected, rel=1e-9)


def test_a_promise_that_holds_is_rarely_called_broken():
    random = np.random.default_rng(0)
    rows, looks, runs = 10, 500, 200
    broken = 0
    for _ in range(runs):
        evidence = Evidence(0.9)
        for right in random.binomial(rows, 0.9, looks):
            evidence.add(int(right), rows - int(right))
            if evidence.value > 10_000:
                broken += 1
                break
    # By Ville's inequality at most looks / 10,000 = 5 % of the runs, and some binomial luck.
    assert broken <= binom.ppf(0.999, runs, looks / 10_000)


@pytest.mark.parametrize(("accuracy", "within"), [(0.8, 700), (0.6, 120)])
def test_a_fall_is_found_after_a_long_good_time(accuracy, within):
    random = np.random.default_rng(1)
    evidence = Evidence(0.9)
    for right in random.binomial(10, 0.96, 3000):
        evidence.add(int(right), 10 - int(right))
    assert evidence.value < 100
    rows = 0
    while evidence.value < 10_000:
        right = int(random.binomial(10, accuracy))
        evidence.add(right, 10 - right)
        rows += 10
    assert rows <= within


def test_evidence_stays_a_number():
    for promised in (0.0, 1e-4, 0.5, 1.0):
        evidence = Evidence(promised)
        evidence.add(0, 10_000_000)
        assert math.isfinite(evidence.value)
        evidence.add(10_000_000, 0)
        assert math.isfinite(evidence.value)
    assert Evidence(0.9).value == 0


def test_what_is_promised_holds_for_19_of_20_test_sets():
    # Hand-worked: the exact lower limit of 95 of 100 at 97.5 % is 0.887 (Clopper and Pearson's tables).
    assert promise(95, 100, 0.0) == pytest.approx(0.8872, abs=1e-4)
    assert promise(95, 100, 2.0) == pytest.approx(0.8672, abs=1e-4)
    assert promise(95, 100, -3.0) == promise(95, 100, 0.0)
    assert promise(0, 100, 0.0) == 0.0
    random = np.random.default_rng(2)
    kept = [promise(int(right), 400, 0.0) <= 0.9 for right in random.binomial(400, 0.9, 2000)]
    assert np.mean(kept) >= 0.96
