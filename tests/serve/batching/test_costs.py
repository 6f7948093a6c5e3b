import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.serve.batching.costs import Costs

SIZES = (1, 4, 8)
MEASURED = {(): {1: 1.0, 4: 2.0, 8: 3.0}}


def table(costs, key=()):
    return {size: seconds for found, size, seconds in costs if found == key}


def test_what_was_measured_is_what_it_costs():
    costs = Costs(SIZES, {(4,): {1: 1.0, 4: 2.0, 8: 3.0}, (8,): {1: 2.0, 4: 4.0, 8: 6.0}})
    assert costs.of((8,), 4) == 4.0
    assert table(costs, (4,)) == {1: 1.0, 4: 2.0, 8: 3.0}
    assert len(list(costs)) == 6


def test_what_was_not_measured_is_free_and_the_smallest_size_that_holds_it_is_taken():
    costs = Costs(SIZES)
    assert [costs.size((3,), rows) for rows in (1, 2, 4, 5, 8, 100)] == [1, 4, 4, 8, 8, 8]
    assert costs.seconds((3,), 100) == 0.0
    costs.learn((3,), 4, 2.0)
    assert costs.of((3,), 4) == 2.0


@given(
    st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3),
    st.integers(1, 30),
)
def test_size_has_the_least_cost_per_real_row(seconds, rows):
    costs = Costs(SIZES, {(): dict(zip(SIZES, seconds, strict=True))})
    per_row = {size: cost / min(size, rows) for size, cost in zip(SIZES, seconds, strict=True)}
    assert per_row[costs.size((), rows)] == min(per_row.values())


@given(st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3), st.integers(1, 60), st.sampled_from(SIZES))
def test_seconds_is_what_running_them_one_batch_after_the_other_takes(seconds, rows, changed):
    costs = Costs(SIZES, {(): dict(zip(SIZES, seconds, strict=True))})
    for _ in range(30):
        costs.learn((), changed, 0.1)
    expected, left = 0.0, rows
    while left > 0:
        size = costs.size((), left)
        expected += costs.of((), size)
        left -= size
    assert costs.seconds((), rows) == pytest.approx(expected)


def test_one_outlier_moves_an_estimate_little():
    costs = Costs(SIZES, MEASURED)
    rng = random.Random(0)
    for _ in range(300):
        costs.learn((), 4, rng.gauss(2.0, 0.05))
    costs.learn((), 4, 1000.0)
    assert costs.of((), 4) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("now", [0.4, 10.0])
def test_a_real_change_is_followed_within_fifty_runs(now):
    costs = Costs(SIZES, MEASURED)
    rng = random.Random(0)
    for _ in range(300):
        costs.learn((), 4, rng.gauss(2.0, 0.05))
    for _ in range(50):
        costs.learn((), 4, rng.gauss(now, 0.05 * now))
    assert costs.of((), 4) == pytest.approx(now, rel=0.1)


def test_sizes_that_do_not_run_follow_those_that_do():
    costs = Costs(SIZES, MEASURED)
    for seconds in [3.0] * 500 + [6.0] * 100:
        costs.learn((), 8, seconds)
    assert costs.of((), 1) == pytest.approx(2.0, rel=0.1)
    assert costs.of((), 4) == pytest.approx(4.0, rel=0.1)


def test_what_was_wrong_at_load_says_nothing_about_other_sizes():
    costs = Costs(SIZES, MEASURED)
    for _ in range(10):
        costs.learn((), 8, 0.3)
    assert costs.of((), 8) < 0.8
    assert costs.of((), 1) == 1.0


def serve(true, at_load, rows, runs=5000):
    """Batches of `rows` waiting rows, chosen as the estimates go; seconds per row, as a share of the least possible."""
    bucket_sizes = tuple(true)
    costs = Costs(bucket_sizes, {(): at_load})
    rng = random.Random(0)
    spent = done = 0
    for _ in range(runs):
        size = costs.size((), rows)
        costs.learn((), size, true[size] * rng.lognormvariate(0, 0.1))
        spent += true[size]
        done += min(size, rows)
    return spent / done / min(true[size] / min(size, rows) for size in bucket_sizes)


TRUE = {size: 1 + 0.02 * size for size in (1, 2, 4, 8, 16, 32, 64)}


@pytest.mark.parametrize("rows", [3, 20, 64])
@pytest.mark.parametrize("wrong", [{64: 20.0}, {16: 20.0, 32: 20.0, 64: 20.0}, {8: 0.1}, {1: 0.01, 64: 50.0}])
def test_a_wrong_measurement_at_load_costs_little_in_the_end(wrong, rows):
    at_load = {size: seconds * wrong.get(size, 1.0) for size, seconds in TRUE.items()}
    assert serve(TRUE, at_load, rows) < 1.1


def test_a_smallest_size_that_looked_bad_at_load_is_tried_too():
    true = {size: 0.1 + 0.1 * size for size in TRUE}
    assert serve(true, true | {1: 4.0}, 1) < 1.1


@pytest.mark.parametrize("rows", [3, 20, 64])
def test_trying_sizes_again_costs_little(rows):
    """Of a size that is three times as dear per row as the others, as where it no longer fits a cache."""
    cliff = {**{size: 0.1 + 0.1 * size for size in TRUE}, 64: 20.0}
    assert serve(cliff, cliff, rows) < 1.025


def test_a_size_that_was_slow_for_a_while_gets_another_chance():
    """Four rows: size 4 looks bad after a slow spell, and would never run again if its estimate stayed."""
    costs = Costs(SIZES, MEASURED)
    for _ in range(100):
        for size, seconds in ((4, 50.0), (1, 1.0), (8, 3.0)):
            costs.learn((), size, seconds)
    assert costs.size((), 4) != 4
    runs = 0
    while costs.size((), 4) != 4 or costs.of((), 4) > 2.2:
        size = costs.size((), 4)
        costs.learn((), size, MEASURED[()][size])
        runs += 1
        assert runs < 1500
    assert runs > 100
