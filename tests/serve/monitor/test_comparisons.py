"""Rules about two versions, and bounds that hold at every look."""

import random

import pytest

from lepton_xla.errors import ServeError
from lepton_xla.serve.monitor.alerts import Subject
from lepton_xla.serve.monitor.certainty import rate_bounds
from lepton_xla.serve.monitor.comparisons import judge, parse_comparison
from lepton_xla.serve.monitor.history import History

BOUNDS = (0.01, 0.1, 1.0)


def subject(*, right=0, wrong=0, fast=0, slow=0, failures=0, same=0, different=0):
    """A version after ten seconds."""
    history = History()
    for second, share in ((0, 0), (10, 1)):
        feedback = {"right": right * share, "wrong": wrong * share, "labels": {}}
        history.add(
            second,
            {
                "feedback": feedback,
                "request_s": [fast * share, slow * share, 0, 0, 0.0],
                "failures": failures * share,
                "shadow": {"same": same * share, "different": different * share},
            },
        )
    return Subject(history, BOUNDS, None)


def holds(rule, version, stable):
    return judge(parse_comparison(rule), version, stable).holds


def test_the_stable_version_is_the_right_side():
    good, bad = subject(right=95, wrong=5), subject(right=90, wrong=10)
    assert holds("accuracy < stable - 4% over 100", bad, good) is True
    assert holds("accuracy < stable - 6% over 100", bad, good) is False
    assert holds("accuracy < stable - 4% over 101", bad, good) is None
    assert holds("accuracy >= stable over 100", good, good) is True
    assert holds("accuracy < 0.93 over 100", bad, good) is True
    assert judge(parse_comparison("accuracy < stable over 100"), bad, good).figures == {
        "accuracy": 0.9, "stable accuracy": 0.95,
    }  # fmt: skip


def test_latency_is_compared_by_a_factor_and_not_by_a_few_answers():
    fast, slow = subject(fast=1000), subject(fast=900, slow=100)
    assert holds("p99 > stable * 3", slow, fast) is True
    assert holds("p99 > stable * 30", slow, fast) is False
    assert holds("p99 > stable + 1s", slow, fast) is False
    # The 99th percentile of 99 answers is the slowest one.
    assert holds("p99 > stable * 3", subject(fast=98, slow=1), fast) is None
    assert holds("p90 > stable * 3", subject(fast=8, slow=2), fast) is True


def test_surely_asks_for_evidence():
    good = subject(right=9500, wrong=500)
    assert holds("accuracy < stable surely", subject(right=9, wrong=1), good) is False
    assert holds("accuracy < stable surely", subject(right=9000, wrong=1000), good) is True
    assert holds("accuracy > stable - 2% surely", subject(right=9500, wrong=500), good) is True
    assert holds("accuracy > stable surely", subject(right=9500, wrong=500), good) is False
    assert holds("errors > 1% surely", subject(fast=100, failures=10), good) is True
    assert holds("agreement < 0.9 surely", subject(same=500, different=500), good) is True
    assert holds("accuracy < stable surely", subject(), good) is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("accuracy < stable * 2%", "a factor has no unit"),
        ("agreement < stable", "compare it with a number"),
        ("p99 > 1s surely", "only accuracy, agreement and errors"),
        ("accuracy < stable for 1m surely", "need not be so for a time"),
        ("acuracy < stable", "unknown quantity 'acuracy'"),
        ("accuracy < stable - 1s", "has no unit 's'"),
        ("stable > accuracy", "is no condition"),
        ("accuracy < stable - 1% over 5m", "over a number of rows"),
    ],
)
def test_rules_that_do_not_parse(rule, message):
    with pytest.raises(ServeError, match=message) as caught:
        parse_comparison(rule)
    assert repr(rule) in str(caught.value)


def test_bounds_are_those_of_the_mixture():
    """With one success in one trial the mixture gives 1/2, so p is excluded where p <= alpha / 2."""
    lower, upper = rate_bounds(1, 1)
    assert lower == pytest.approx(0.025)
    assert upper == 1.0
    lower, upper = rate_bounds(0, 3)  # the mixture gives 1/4
    assert (lower, upper) == (0.0, pytest.approx(1 - (0.05 / 4) ** (1 / 3)))


def test_bounds_hold_at_every_look():
    """300 runs with a look after each of 400 trials: Wilson's interval, made for one look, misses in half of them."""
    missed = 0
    for seed in range(300):
        draw, hits = random.Random(seed), 0
        for trial in range(1, 401):
            hits += draw.random() < 0.9
            if trial % 5 == 0:
                lower, upper = rate_bounds(hits, trial)
                if not lower <= 0.9 <= upper:
                    missed += 1
                    break
    assert missed <= 0.05 * 300
