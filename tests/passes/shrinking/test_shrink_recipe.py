"""Shrinking in recipes: between folding and pruning, with a plan for the shrunk program."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keeping import nothing_kept

import lepton_xla as lx
from lepton_xla.errors import CalibrationError, RecipeError
from lepton_xla.optimization import pipeline
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
    assert [report.name for report in small.history] == ["fold", "shrink", "prune", "quantize"]
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
        ("", "recipe 'mine': shrink takes exactly one of sparsity, flops, bytes, latency_ms; none given"),
        ("sparsity = 0.5\nbytes = 0.5", "sparsity and bytes given"),
        ("flops = 1.5", "flops = 1.5 is not in"),
        ("flops = 0.5\nround_to = []", "recipe 'mine': shrink: round_to is an empty list"),
        ("flops = 0.5\nround_to = [8, 0]", "round_to = 0 is not a whole number"),
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


@pytest.mark.parametrize(
    ("times", "fastest"),
    [
        ([[100, 60, 50, 40], [100, 60, 50, 40]], 32),
        ([[100, 60, 70, 80], [100, 60, 70, 80]], 4),
        ([[100, 20, 80, 40], [100, 120, 80, 104]], 8),  # the only one that is nowhere slower than the whole
        ([[100, 110, 120, 130], [100, 80, 60, 120]], 8),  # slower at one size each, but for the last
    ],
)
def test_of_several_multiples_the_fastest_is_taken(monkeypatch, times, fastest):
    asked = []

    def time_programs(functions, inputs, timer=None):
        asked.append(inputs[0].shape[0])
        assert [weights["w0"].shape[1] for _, weights in functions] == [64, *widths]
        return list(map(float, times[len(asked) - 1]))

    recipes = [recipe(f"flops = 0.6\nround_to = {multiple}") for multiple in (4, 8, 32)]
    widths = [lx.optimize(PROGRAM, each).weights["w0"].shape[1] for each in recipes]
    assert len(set(widths)) == 3
    monkeypatch.setattr(pipeline, "time_programs", time_programs)
    several = lx.Recipe.parse("[shrink]\nflops = 0.6\nround_to = [4, 8, 8, 32, 1000]", name="several")
    small = lx.optimize(PROGRAM, several, buckets={"batch": (1, 5)})
    assert asked == [1, 5]
    assert small.history[-1].metrics["round_to"] == fastest
    unmeasured = lx.optimize(PROGRAM, recipe("flops = 0.6\nround_to = [8, 4]"), buckets={"batch": (1, 5)})
    assert (unmeasured.history[-1].metrics["round_to"], asked) == (8, [1, 5])


def test_where_no_multiple_reaches_the_target_the_first_says_why():
    several = lx.Recipe.parse("[shrink]\nflops = 0.1\nround_to = [32, 64]", name="several")
    with pytest.raises(RecipeError, match=r"flops = 0.1 cannot be reached; the least is 0.522"):
        lx.optimize(PROGRAM, several)
    with nothing_kept(), contextlib.suppress(RecipeError):
        lx.optimize(PROGRAM, several)
