"""Schedules against TFMOT's formula, and at which steps they are due."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lepton_xla.errors import RecipeError
from lepton_xla.train import Schedule, one_shot, periodic, polynomial


def due(schedule, steps):
    return [step for step in range(steps) if schedule.due(jnp.int32(step))]


def value(schedule, step, final=0.5):
    return float(schedule.sparsity(jnp.int32(step), jnp.float32(final)))


@pytest.mark.parametrize(("initial", "final", "power"), [(0.0, 0.5, 3.0), (0.2, 0.9, 1.0), (0.8, 0.5, 2.0)])
def test_polynomial_is_that_of_tfmot(initial, final, power):
    schedule = polynomial(1000, 10000, initial=initial, power=power)
    for step in (0, 999, 1000, 1001, 4321, 9999, 10000, 20000):
        share = min(1.0, max(0.0, (step - 1000) / (10000 - 1000)))
        wanted = (initial - final) * (1 - share) ** power + final
        np.testing.assert_allclose(value(schedule, step, final), wanted, rtol=1e-5, atol=1e-7)
    assert value(schedule, 10000, final) == np.float32(final)


def test_the_last_step_is_due_wherever_it_falls():
    assert due(polynomial(3, 12, every=4), 20) == [3, 7, 11, 12]
    assert due(polynomial(3, 11, every=4), 20) == [3, 7, 11]
    assert due(one_shot(5), 20) == [5]
    assert due(periodic(2, every=6), 20) == [2, 8, 14]
    assert due(periodic(2, 10, every=6), 20) == [2, 8, 10]
    assert value(one_shot(5), 5) == value(periodic(), 0) == 0.5


def test_any_function_of_the_step_is_a_schedule():
    schedule = Schedule.of(optax.linear_schedule(0.0, 0.9, 90), begin=10, end=90, every=20)
    assert due(schedule, 200) == [10, 30, 50, 70, 90]
    np.testing.assert_allclose([value(schedule, step) for step in (10, 50, 90)], [0.1, 0.5, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polynomial(10, 10), "polynomial schedule: begin = 10, end = 10"),
        (lambda: polynomial(0, 10, initial=1.0), "initial = 1"),
        (lambda: polynomial(0, 10, power=0.0), "power = 0"),
        (lambda: one_shot(-1), "schedule: begin = -1, end = -1, every = 100; expected whole numbers, 0 <= begin"),
        (lambda: periodic(5, 2), "begin = 5, end = 2"),
        (lambda: periodic(every=1.5), "every = 1.5; expected whole numbers"),
        (lambda: polynomial(0, 10, initial=float("nan")), "initial = nan"),
        (lambda: polynomial("0", 10), "begin = 0, end = 10"),
        (lambda: periodic(every=0), "every = 0"),
        (lambda: Schedule.of(lambda step: 1.0), r"the sparsity at step 0 is 1; expected a share in \[0, 1\)"),
        (lambda: Schedule.of(optax.linear_schedule(0.0, -0.2, 10), end=10), "at step 10 is -0.2"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(make, message):
    with pytest.raises(RecipeError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
