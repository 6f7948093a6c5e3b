"""Drift and windows of counters, beside SciPy and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import ks_2samp

from lepton_xla.serve.monitor.drift import drift
from lepton_xla.serve.monitor.history import KEEP_S, History

counts = st.lists(st.integers(0, 500), min_size=3, max_size=12)


@given(st.data())
def test_psi_is_the_symmetric_divergence(data):
    known = data.draw(counts)
    seen = data.draw(st.lists(st.integers(0, 500), min_size=len(known), max_size=len(known)))
    p, q = ((np.array(each) + 0.5) / (np.array(each) + 0.5).sum() for each in (known, seen))
    assert math.isclose(drift(known, seen).psi, rel_entr(p, q).sum() + rel_entr(q, p).sum(), rel_tol=1e-9, abs_tol=1e-9)


def test_ks_is_scipys():
    rng = np.random.default_rng(0)
    known, seen = rng.integers(0, 6, 400), rng.integers(1, 7, 300)
    bins = [[*np.bincount(each, minlength=7).tolist(), 0] for each in (known, seen)]
    assert drift(*bins).ks == pytest.approx(ks_2samp(known, seen).statistic)


def test_missing_values_are_a_share():
    assert drift([10, 0], [6, 2]).missing == 0.25


def test_a_window_of_rows_is_the_latest_of_at_least_so_many():
    history = History()
    for second, rows in enumerate((0, 10, 10, 30, 70)):
        history.add(second, {"rows": rows, "list": [rows, 2 * rows], "deep": {"a": rows}})
    counted = history.last(40, lambda each: each["rows"])
    assert counted == {"rows": 40, "list": [40, 80], "deep": {"a": 40}}
    assert history.last(41, lambda each: each["rows"])["rows"] == 60
    assert history.last(71, lambda each: each["rows"]) is None


def test_a_window_of_time_says_how_long_it_was():
    history = History()
    assert history.over(5) is None
    for second in range(0, 30, 2):
        history.add(second, {"rows": second})
    assert history.over(5) == ({"rows": 6}, 6)
    assert history.over(1000) == ({"rows": 28}, 28)


def test_an_hour_is_kept_in_few_snapshots_and_no_window_is_short():
    history = History()
    for second in range(3 * int(KEEP_S)):
        history.add(second, {"rows": second})
    assert len(history._snapshots) < 400  # the memory of a server that runs for months
    for seconds in (1, 60, 600, 3000):
        counted, long = history.over(seconds)
        assert counted["rows"] == long
        assert seconds <= long <= seconds * 1.1 + 60


def test_a_model_that_is_idle_keeps_two_snapshots():
    history = History()
    for second in range(100):
        history.add(second, {"rows": 5})
    assert len(history._snapshots) == 2
    assert history.over(60)[0] == {"rows": 0}


def test_noise_is_what_chance_makes_of_so_many_rows():
    # Drawn from one distribution, of few and of many bins, with few and with many rows.
    random, found = np.random.default_rng(3), []
    for bins, known, seen in ((10, 1000, 500), (78, 1000, 500), (78, 200, 100)):
        shares = np.ones(bins) / bins
        draws = [[*random.multinomial(rows, shares), 0] for rows in (known, seen) for _ in range(100)]
        found = [drift(one, other) for one, other in zip(draws[:100], draws[100:], strict=True)]
        mean = (bins - 1) * (1 / known + 1 / seen)
        assert 0.6 < np.mean([each.psi for each in found]) / mean < 1.3
        assert max(each.shift for each in found) < 0
    assert drift([900, 100, 0], [100, 900, 0]).shift > 1
    assert drift([5, 5, 0], [0, 0, 0]).shift < 0, "nothing was seen"
