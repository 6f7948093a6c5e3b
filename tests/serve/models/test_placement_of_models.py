"""Where models go: decisions, and what becomes of thousands of them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.serve.models.placement import Evict, Held, Move, Put, Wait, next_step


def held(*models):
    """Models as (name, bytes, device, when used)."""
    return [Held(name, nbytes, (device,), used_s, idle=True) for name, nbytes, device, used_s in models]


@pytest.mark.parametrize(
    ("need", "models", "leaving", "step"),
    [
        (10, (), [0, 0], Put((0,))),
        (10, (("a", 1, 0, 0.0),), [0, 0], Put((1,))),
        (9, (("a", 1, 0, 0.0),), [0, 5], Put((0,))),  # what is on its way out is there still
        (10, (("a", 5, 0, 0.0), ("b", 5, 1, 0.0)), [0, 2], Move("b", 0)),
        (8, (("a", 5, 0, 0.0), ("b", 2, 1, 0.0)), [0, 2], Wait(leaves=True)),
        (7, (("a", 3, 0, 0.0), ("b", 4, 0, 0.0), ("c", 5, 1, 0.0)), [0, 0], Move("b", 1)),
        (6, (("a", 3, 0, 0.0), ("b", 4, 0, 0.0), ("c", 5, 1, 0.0)), [0, 0], Move("a", 1)),  # the smallest
        (8, (("a", 8, 0, 1.0), ("b", 9, 1, 2.0)), [0, 0], Evict("a")),
        (8, (("a", 4, 0, 1.0), ("c", 4, 0, 3.0), ("b", 9, 1, 2.0)), [0, 0], Evict("b")),  # not a and then c
        (5, (("a", 4, 0, 1.0), ("c", 4, 0, 3.0), ("b", 9, 1, 2.0)), [0, 0], Evict("a")),
    ],
)
def test_steps(need, models, leaving, step):
    assert next_step(need, 1, held(*models), leaving, 10) == step


def test_what_is_busy_stays_and_what_must_not_move_is_evicted():
    busy = [Held("a", 8, (0,), 0.0, idle=False), Held("b", 8, (1,), 0.0, idle=False)]
    assert next_step(8, 1, busy, [0, 0], 10) == Wait(leaves=False)
    stuck = [Held("a", 6, (0,), 0.0, idle=True, moves=False), Held("b", 4, (1,), 1.0, idle=True, moves=False)]
    assert next_step(8, 1, stuck, [0, 0], 10) == Evict("a")


def test_a_model_of_several_devices_needs_room_on_each_of_them():
    models = held(("a", 6, 0, 2.0), ("b", 6, 1, 1.0), ("c", 1, 2, 0.0))
    assert next_step(4, 2, models, [0, 0, 0], 10) == Put((0, 1))
    assert next_step(9, 2, models, [0, 0, 0], 10) == Evict("b")  # c is older, and in nobody's way
    (_, b, c) = models
    assert next_step(9, 2, [b, c], [0, 0, 0], 10) == Move("b", 2)
    wide = [Held("wide", 6, (0, 1), 0.0, idle=True)]
    assert next_step(9, 1, wide, [0, 0], 10) == Evict("wide")


def test_only_one_device_is_asked_for():
    assert next_step(0, 1, held(("a", 12, 0, 0.0)), [0, 0], 10, only=1) == Put((1,))
    assert next_step(0, 1, held(("a", 12, 0, 0.0)), [0, 0], 20, only=0) == Put((0,))


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 2), st.booleans(), st.booleans()), max_size=12),
    st.integers(1, 10), st.integers(1, 3),
)  # fmt: skip
def test_every_step_leads_to_room_within_the_budget_or_nothing_idle_is_left(drawn, need, span):
    budget, devices = 10, 3
    models, free = [], [budget] * devices
    for index, (nbytes, device, idle, moves) in enumerate(drawn):
        if free[device] >= nbytes:
            free[device] -= nbytes
            models.append(Held(str(index), nbytes, (device,), float(index), idle, moves))
    for count in itertools.count():
        assert count <= len(drawn) + 2, "it goes round in circles"
        step = next_step(need, span, models, [0] * devices, budget)
        taken = [sum(each.nbytes for each in models if number in each.devices) for number in range(devices)]
        assert max(taken) <= budget
        if isinstance(step, Put):
            assert all(taken[number] + need <= budget for number in step.devices)
            assert len(step.devices) == span
            break
        if isinstance(step, Wait):
            assert not step.leaves
            places = [range(span)] if span > 1 else [[number] for number in range(devices)]
            for place in places:  # all that is idle gone, there is no room still
                left = [
                    sum(each.nbytes for each in models if number in each.devices and not each.idle) for number in place
                ]
                assert max(left) + need > budget
            break
        (model,) = (each for each in models if each.name == step.name)
        models.remove(model)
        if isinstance(step, Move):
            assert model.moves
            models.append(Held(model.name, model.nbytes, (step.device,), model.used_s, model.idle, model.moves))
        else:
            assert model.idle
