"""Shrinking as a recipe asks for it: between folding and pruning, with the plan made for what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.errors import CalibrationError, RecipeError
from lepton_xla.passes import cost
from lepton_xla.recipe import ShrinkRule

WEIGHTS = {f"w{k}": jnp.asarray(np.random.default_rng(k).standard_normal(shape), jnp.float32)
           for k, shape in enumerate([(6, 64), (64, 32), (32, 3)])}  # fmt: skip
PROGRAM = lx.trace(
    lambda w, x: jax.nn.relu(jax.nn.relu(x @ w["w0"]) @ w["w1"]) @ w["w2"],
    WEIGHTS,
    {"x": lx.TensorSpec(("batch", 6), "float32")},
)


def recipe(shrink, rest=""):
    return lx.Recipe.parse(f"measure = false\n[shrink]\n{shrink}\n{rest}", name="mine")


def test_fold_shrink_prune_quantize():
    rest = '[[prune]]\nsites = "w1"\nsparsity = 0.5\n[[quantize]]\nsites = ".*"\nactivations = "none"\n'
    small = lx.optimize(PROGRAM, recipe("flops = 0.5\nround_to = 8\nprotect = 'w2.*'", rest))
    assert [report.name for report in small.history] == ["fold", "shrink", "prune", "lower"]
    shapes = {path: weight.shape for path, weight in small.weights.items()}
    assert (shapes["w0"][1] % 8, shapes["w2"]) == (0, (32, 3))
    assert shapes["w0"][1] == shapes["w1"][0] < 40
    assert small.masks["w1"].shape == shapes["w1"]
    metrics = small.history[1].metrics
    assert metrics["flops_after"] <= 0.5 * metrics["flops_before"]
    assert metrics["flops_before"] == cost(PROGRAM, {"batch": 1}).flops
    assert small.fn(small.weights, jnp.ones((2, 6))).shape == (2, 3)


def test_calibration_reaches_the_ranking():
    batches = [{"x": np.ones((2, 6), np.float32)}]
    asked = recipe("sparsity = 0.5\nimportance = 'activation'\nprotect = ['w1.1.']")
    small = lx.optimize(PROGRAM, asked, calibration=iter(batches))
    hidden = np.maximum(np.ones((1, 6)) @ np.asarray(WEIGHTS["w0"], np.float64), 0)[0]
    stays = np.sort(np.argsort(-hidden, kind="stable")[:32])
    np.testing.assert_array_equal(small.weights["w1"], np.asarray(WEIGHTS["w1"])[stays])
    with pytest.raises(CalibrationError, match="'activation' needs calibration data"):
        lx.optimize(PROGRAM, asked)


@pytest.mark.parametrize(
    ("shrink", "message"),
    [
        ("", "recipe 'mine': shrink takes one of sparsity, flops, bytes, latency_ms; none given"),
        ("sparsity = 0.5\nbytes = 0.5", "sparsity and bytes given"),
        ("flops = 1.5", "flops = 1.5 is not in"),
        ("flops = 0.5\nimportance = 'luck'", "shrink.importance = 'luck': expected one of l1, l2, "),
        ("flops = 0.5\nsites = '.*'", "shrink: unknown key 'sites'; keys are sparsity, "),
    ],
)
def test_malformed_tables(shrink, message):
    with pytest.raises(RecipeError, match=message):
        recipe(shrink)


def test_taylor_is_for_python_alone():
    says = r"importance = 'taylor' needs a loss, .* lx.passes.shrink\(program, importance='taylor', loss="
    with pytest.raises(RecipeError, match=f"recipe 'mine': shrink.{says}") as caught:
        recipe("flops = 0.5\nimportance = 'taylor'")
    assert "\n" not in str(caught.value)
    made = lx.Recipe(name="made", shrink=ShrinkRule(flops=0.5, importance="taylor"))
    with pytest.raises(CalibrationError, match=says):
        lx.optimize(PROGRAM, made, calibration=[{"x": np.ones((2, 6), np.float32)}])


def test_patterns_that_match_nothing():
    with pytest.raises(RecipeError, match="protect = 'w9' matches none of the groups"):
        lx.optimize(PROGRAM, recipe("sparsity = 0.5\nprotect = 'w9'"))
