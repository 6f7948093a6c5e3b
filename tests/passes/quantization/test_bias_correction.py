"""Bias correction restores the mean of each output, however the bias is added."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_xla.adapters import from_linen
from lepton_xla.errors import CalibrationError
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.bias_correction import correct_bias
from lepton_xla.passes.quantization.gptq import gptq
from lepton_xla.passes.quantization.rounding import round_to_nearest
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
INT4 = Recipe.parse("[[quantize]]\nsites = '.*'\nactivations = 'none'\nweights = 'int4'", name="int4")


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def shifted(*shape, seed=0):
    """Inputs whose mean is not zero, so that rounding shifts the outputs."""
    return array(*shape, seed=seed) + 2


def row(vector):
    return jnp.reshape(vector, (1, -1))


def corrected(program, x, rounded=None):
    plan = resolve(INT4, program)
    rounded = rounded or round_to_nearest(program, plan)[0]
    changed = correct_bias(program, rounded, plan, [{"x": x[:4]}, {"x": x[4:]}])
    return rounded, changed, {site.site: site.action for site in changed.history[-1].sites}


def mean_error(program, changed, x, axes):
    return np.abs(np.mean(np.asarray(changed.fn(changed.weights, x) - program.fn(program.weights, x)), axes))


ONE_PRODUCT = {
    "bias": (lambda w, x: x @ w["w"] + row(w["b"]), (6, 5), (5,), "b corrected"),
    "none": (lambda w, x: x @ w["w"], (6, 5), (5,), "a bias added"),
    "transposed": (lambda w, x: row(w["b"]) + x @ w["w"].T, (5, 6), (5,), "b corrected"),
    "weight first": (lambda w, x: (w["w"] @ x.T).T, (5, 6), (5,), "a bias added"),
    "heads": (lambda w, x: jnp.einsum("mk,khd->mhd", x, w["w"]), (6, 2, 3), (5,), "a bias added"),
    "subtracted": (lambda w, x: x @ w["w"] - row(w["b"]), (6, 5), (5,), "a bias added"),
    "shared": (lambda w, x: x @ w["w"] + row(w["b"]) + jnp.sum(w["b"]), (6, 5), (5,), "a bias added"),
    "batched": (lambda w, x: jnp.einsum("mgk,gkn->mgn", x.reshape(-1, 2, 3), w["w"]), (2, 3, 4), (5,), "a bias added"),
}


@pytest.mark.parametrize("name", ONE_PRODUCT)
def test_the_mean_of_each_output_is_kept(name):
    fn, weight, bias, action = ONE_PRODUCT[name]
    program = trace(fn, {"w": array(*weight, seed=1), "b": array(*bias, seed=2)}, ROWS)
    x = shifted(12, 6)
    rounded, changed, became = corrected(program, x)
    assert became == {"w": action}
    assert mean_error(program, rounded, x, 0).max() > 0.05
    np.testing.assert_allclose(mean_error(program, changed, x, 0), 0, atol=2e-6)
    np.testing.assert_array_equal(changed.weights["w"], rounded.weights["w"])
    assert ("w:correction" in changed.weights) == (action == "a bias added")


def test_the_correction_is_the_paper_s():
    program = trace(ONE_PRODUCT["bias"][0], {"w": array(6, 5, seed=1), "b": array(5, seed=2)}, ROWS)
    x = shifted(12, 6)
    rounded, changed, _ = corrected(program, x)
    error = np.asarray(rounded.weights["w"], np.float64) - np.asarray(program.weights["w"], np.float64)
    want = np.asarray(program.weights["b"], np.float64) - np.asarray(x, np.float64).mean(0) @ error
    np.testing.assert_allclose(changed.weights["b"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(biased, groups):
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(w, x):
        y = lax.conv_general_dilated(x, w["w"], (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups)
        return y + w["b"].reshape(1, 1, 1, -1) if biased else y

    given = {"w": array(3, 3, 4 // groups, 6, seed=1), "b": array(6, seed=2)}
    program = trace(fn, given, {"x": TensorSpec(("batch", 5, 5, 4), "float32")})
    x = shifted(8, 5, 5, 4)
    rounded, changed, became = corrected(program, x)
    assert became == {"w": "b corrected" if biased else "a bias added"}
    assert mean_error(program, rounded, x, (0, 1, 2)).max() > 0.05
    np.testing.assert_allclose(mean_error(program, changed, x, (0, 1, 2)), 0, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_each_step_of_a_stack(biased):
    def step(x, w):
        y = x @ w["w"]
        return 0.3 * (y + row(w["b"]) if biased else y), None

    given = {"w": array(2, 6, 6, seed=1), "b": array(2, 6, seed=2)}
    program = trace(lambda w, x: lax.scan(step, x, w)[0], given, ROWS)
    x = shifted(12, 6)
    rounded, changed, became = corrected(program, x)
    assert became == {"w": "b corrected" if biased else "a bias added"}
    state = np.asarray(x, np.float64)
    for k in range(2):
        error = np.asarray(rounded.weights["w"][k] - given["w"][k], np.float64)
        shift = state.mean(0) @ error
        got = given["b"][k] - changed.weights["b"][k] if biased else -changed.weights["w:correction"][k, 0]
        np.testing.assert_allclose(got, shift, rtol=1e-3, atol=1e-5)
        state = 0.3 * (state @ np.asarray(given["w"][k], np.float64) + (np.asarray(given["b"][k]) if biased else 0))
    assert mean_error(program, changed, x, 0).max() < 0.5 * mean_error(program, rounded, x, 0).max()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(8, name="first")(x)))


def test_linen_after_gptq():
    program = from_linen(Net(), Net().init(jax.random.key(0), jnp.zeros((1, 6))), ROWS)
    x = shifted(12, 6)
    chosen, grids = gptq(program, resolve(INT4, program), [{"x": x}])
    rounded, changed, became = corrected(program, x, chosen)
    assert became == {f"params/{name}/kernel": f"params/{name}/bias corrected" for name in ("first", "last")}
    assert changed.weights.keys() == program.weights.keys()
    for path in grids:
        np.testing.assert_array_equal(changed.weights[path], rounded.weights[path])


def test_what_the_data_does_not_reach_is_kept():
    fn = lambda w, x: lax.cond(x[0, 0] > 99, lambda x: x @ w["a"], lambda x: x @ w["b"], x)  # noqa: E731
    program = trace(fn, {"a": array(6, 5), "b": array(6, 5)}, ROWS)
    _, changed, became = corrected(program, shifted(12, 6))
    assert became == {"a": "kept", "b": "a bias added"}
    assert "a:correction" not in changed.weights
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        correct_bias(program, program, resolve(INT4, program), [])
