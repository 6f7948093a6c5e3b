"""The integer program, against all combinations tried one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.tuning.costs import refit
from lepton_xla.tuning.programming import choose_within, total


def brute_force(costs, objective, limits):
    """The least that any combination within the limits costs; None if there is none."""
    sizes = [len(each) for each in next(iter(costs.values()))]
    found = [
        sum(weight * total(costs, kind, picked) for kind, weight in objective.items())
        for picked in itertools.product(*map(range, sizes))
        if all(total(costs, kind, picked) <= limit for kind, limit in limits.items())
    ]
    return min(found, default=None)


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    scales = {"bytes": 1e5, "error": 1e-4, "us": 1.0}

    def costs(kind):
        values = st.integers(-20 if kind == "us" else 0, 20)
        return [scales[kind] * np.array([draw(values) for _ in range(size)], np.float64) for size in sizes]

    made = {kind: costs(kind) for kind in scales}
    objective, *others = draw(st.permutations(sorted(scales)))
    limits: dict[str, float] = {}
    for kind in others[: draw(st.integers(1, 2))]:
        least, most = (sum(float(side(each)) for each in made[kind]) / scales[kind] for side in (np.min, np.max))
        # Between whole numbers, so that no sum is at a limit but for rounding; one below the least has no solution.
        limits[kind] = scales[kind] * (draw(st.integers(int(least) - 1, int(most))) + 0.5)
    return made, {objective: 1.0}, limits


@settings(max_examples=150)
@given(problems())
def test_the_optimum_is_that_of_brute_force(problem):
    costs, objective, limits = problem
    picked, best = choose_within(costs, objective, limits), brute_force(costs, objective, limits)
    if best is None:
        assert picked is None
        return
    assert picked is not None
    assert all(total(costs, kind, picked) <= limit for kind, limit in limits.items())
    assert sum(weight * total(costs, kind, picked) for kind, weight in objective.items()) == pytest.approx(best)


def test_a_hundred_sites_are_solved_to_the_optimum_of_the_relaxation():
    random = np.random.default_rng(0)
    costs = {kind: [random.random(6) for _ in range(100)] for kind in ("bytes", "us", "error")}
    picked = choose_within(costs, {"error": 1.0}, {"bytes": 40.0, "us": 40.0})
    assert picked is not None
    assert total(costs, "bytes", picked) <= 40
    free = sum(each.min() for each in costs["error"])
    assert free < total(costs, "error", picked) < 0.5 * 100


def test_no_group_has_no_choice():
    assert choose_within({"bytes": []}, {"bytes": 1.0}, {"bytes": 0.0}) == ()
    assert choose_within({"bytes": []}, {"bytes": 1.0}, {"bytes": -1.0}) is None


def test_what_was_measured_corrects_what_each_choice_costs():
    random = np.random.default_rng(1)
    true = [random.random(3) for _ in range(4)]
    picks = [tuple(random.integers(0, 3, 4)) for _ in range(40)]
    measured = [total({"us": true}, "us", picked) for picked in picks]
    after = refit([np.zeros(3)] * 4, picks, measured)
    for picked in itertools.product(range(3), repeat=4):
        assert total({"us": after}, "us", picked) == pytest.approx(total({"us": true}, "us", picked), abs=0.02)
    assert [each.tolist() for each in refit(true, [], [])] == [each.tolist() for each in true]
