"""Multiply-adds by weights that are not zero, against counts by hand, and searches that limit them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lepton_xla as lx
from lepton_xla.errors import TuningError
from lepton_xla.quant import quantize
from lepton_xla.tuning import CHOICES, Constraints, Trial, Tuning
from lepton_xla.tuning.candidates import Candidates, Estimates
from lepton_xla.tuning.choices import find_groups
from lepton_xla.tuning.costs import stored_weights
from lepton_xla.tuning.operations import Operations, share_of_nonzeros

WEIGHTS = {
    "kernel": jnp.ones((3, 3, 2, 4)),
    "query": jnp.asarray(np.arange(1.0, 17.0).reshape(4, 4), jnp.float32),
    "table": jnp.ones((10, 4)),
}


def model(w, image, token):
    """A convolution, an embedding, a product with a weight and one of two activations."""
    layouts = ("NHWC", "HWIO", "NHWC")
    made = lax.conv_general_dilated(image, w["kernel"], (2, 2), "SAME", dimension_numbers=layouts)
    return (jnp.mean(made, (1, 2)) @ w["query"]) @ w["table"][token].T


PROGRAM = lx.trace(
    model, WEIGHTS, {"image": lx.TensorSpec(("batch", 8, 8, 2), "float32"), "token": lx.TensorSpec((5,), "int32")}
)


def test_operations_are_those_counted_by_hand():
    found = Operations.of(PROGRAM, {"batch": 2})
    convolution, query, activations = 2 * 4 * 4 * 4 * (3 * 3 * 2), 2 * 4 * 4, 2 * 5 * 4
    assert found.of_site["kernel"] == convolution
    assert found.by(PROGRAM.weights) == convolution + query + activations  # looking rows up multiplies nothing
    half = WEIGHTS["kernel"].at[..., :2].set(0)
    assert found.by({**WEIGHTS, "kernel": half}) == convolution // 2 + query + activations
    rounded = quantize(jnp.array([[127.0, 0.2], [1.0, 127.0], [0.0, 3.0], [9.0, 0.0]]), "int8", "tensor")
    assert share_of_nonzeros(rounded) == 5 / 8  # 0.2 rounds to zero
    assert found.by({**WEIGHTS, "query": rounded}) == convolution + round(query * 5 / 8) + activations


def test_each_choice_of_a_group_has_its_operations():
    groups, plans = find_groups(PROGRAM, (CHOICES[0], CHOICES[-1]))
    stored = stored_weights(PROGRAM, groups, plans)
    counted, rest = Operations.of(PROGRAM, {"batch": 1}).of_choices(groups, stored)
    by_site = {group.sites[0]: each.tolist() for group, each in zip(groups, counted, strict=True)}
    assert by_site["query"] == [16, 8]  # in float; half of the weights at zero
    assert rest == 5 * 4


def few(constraints, objective):
    costs = {
        "error": [np.array([0.0, 1e-4, 1e-3]), np.array([0.0, 1e-4, 2e-3])],
        "bytes": [np.array([80.0, 20.0, 40.0])] * 2,
        "memory": [np.array([80.0, 20.0, 40.0])] * 2,
        "operations": [np.array([100.0, 100.0, 50.0]), np.array([1000.0, 1000.0, 500.0])],
        "us@0": [np.zeros(3)] * 2,
        "us@1": [np.array([0.0, -4.0, 0.0])] * 2,
    }
    fixed = {"error": 0.0, "bytes": 0.0, "memory": 0.0, "operations": 10.0, "us@0": 10.0, "us@1": 20.0}
    return Candidates(Estimates([None] * 2, costs, fixed), constraints, objective)


def test_operations_are_limited_and_made_least():
    assert few(Constraints(max_drop=1.0), "bytes").within(1.0) == (1, 1)
    # Half of the second group's must go.
    assert few(Constraints(max_drop=1.0, max_operations=700), "bytes").within(1.0) == (1, 2)
    assert few(Constraints(max_drop=1.0), "operations").within(1.0) == (2, 2)
    assert few(Constraints(max_operations=1070), "metric").within(1.0) == (2, 0)
    # Channels that go take operations along: a quarter of 1110 is left.
    assert few(Constraints(max_operations=300), "metric").within(1.0, removed=0.5) == (0, 0)
    assert few(Constraints(max_drop=1.0), "bytes").expected((2, 2))["operations"] == 560


def test_each_size_has_its_own_limit_on_latency():
    # 10 and 20 us in float; each product in integers saves 4 us at the second size.
    assert few(Constraints(max_latency_ms=(0.011, 0.013)), "metric").within(1.0) == (1, 1)
    assert few(Constraints(max_latency_ms=(0.011, 0.017)), "metric").within(1.0) in {(0, 1), (1, 0)}
    # One product in integers takes 4 of 20 us at one of two sizes: a tenth of float's time, the mean of both.
    assert few(Constraints(min_speedup=1 / 0.91), "metric").within(1.0) in {(0, 1), (1, 0)}
    assert few(Constraints(min_speedup=1 / 0.81), "metric").within(1.0) == (1, 1)
    assert few(Constraints(min_speedup=1.0, max_bytes=200), "metric").within(1.0, removed=0.5) == (0, 0)
    slower = {"latency": 1.6}  # than (1 - 0.5): 0.8 of float's time
    assert few(Constraints(min_speedup=1 / 0.75), "metric").within(1.0, removed=0.5, more=slower) in {(0, 1), (1, 0)}
    trial = Trial("a", "", "chosen", {}, judged=0.0, us=(900.0, 3300.0), float_us=(1.0, 1.0), operations=120)
    assert trial.excess(Constraints(max_latency_ms=(1.0, 3.0))) == pytest.approx(0.1)
    assert trial.excess(Constraints(max_latency_ms=3.3)) == 0
    assert trial.excess(Constraints(max_operations=100)) == pytest.approx(0.2)
    half = dataclasses.replace(trial, us=(50.0,), float_us=(100.0,))
    assert (half.excess(Constraints(min_speedup=2.0)), half.excess(Constraints(min_speedup=3.0))) == (0, 0.5)
    with pytest.raises(TuningError, match=r"max_latency_ms = 0: expected a number above 0"):
        Constraints(max_latency_ms=[1.0, 0])
    with pytest.raises(TuningError, match="max_latency_ms = None: expected a number above 0"):
        Constraints(max_latency_ms=(0.5, None))  # pyright: ignore[reportArgumentType]


def test_the_best_at_operations_is_on_the_frontier():
    small, sparse = (
        Trial(name, "", "chosen", {}, judged=0.0, bytes=size, operations=count)
        for name, size, count in (("small", 100, 90), ("sparse", 200, 10))
    )
    found = Tuning(Constraints(0.5), "operations", "accuracy", {}, 800, sparse, sparse, (small, sparse))
    assert [trial.name for trial in found.frontier] == ["small", "sparse"]
