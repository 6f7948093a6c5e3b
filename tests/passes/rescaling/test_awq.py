"""AWQ finds the exponent of a search in NumPy, reduces the rounding error, and keeps the float function."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from lepton_xla.errors import CalibrationError, RecipeError
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.rounding import round_to_nearest
from lepton_xla.passes.rescaling.awq import awq, awq_factor
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

DEPTH, GROUP = 16, 8
ROWS = {"x": TensorSpec(("batch", DEPTH), "float32")}
INT4 = Recipe.parse(
    f"[[quantize]]\nsites = '.*'\nactivations = 'none'\nweights = 'int4'\ngranularity = 'group:{GROUP}'", name="int4"
)


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def outliers(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape[-1])), jnp.float32)


def changed_by_awq(program, x, **options):
    changed = awq(program, resolve(INT4, program), [{"x": x}], **options)
    want = program.fn(program.weights, x)
    for a, b in zip(jax.tree.leaves(changed.fn(changed.weights, x)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
    return changed, {site.site: site for site in changed.history[-1].sites}


def rounded_error(program, reference, x):
    rounded, _ = round_to_nearest(program, resolve(INT4, program))
    want = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(reference.fn(reference.weights, x))])
    got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rounded.fn(rounded.weights, x))])
    return np.linalg.norm(got - want)


def searched(x, weights, points):
    """The paper's search in float64, scales of groups as they are stored."""
    x = np.asarray(x, np.float64)
    best = None
    for exponent in np.arange(points + 1) / points:
        factor = np.abs(x).mean(0) ** exponent
        factor /= np.sqrt(factor.max() * factor.min())
        error = 0.0
        for weight in weights:
            scaled = np.asarray(weight, np.float64) * factor[:, None]
            blocks = scaled.reshape(-1, GROUP, scaled.shape[1])
            scale = (np.abs(blocks).max(1, keepdims=True) / 7).astype(ml_dtypes.bfloat16).astype(np.float64)
            rounded = (np.clip(np.rint(blocks / scale), -7, 7) * scale).reshape(scaled.shape) / factor[:, None]
            error += np.sum((x @ (rounded - weight)) ** 2)
        if best is None or error < best[1]:
            best = exponent, error, factor
    return best


def test_the_exponent_and_factor_of_a_search():
    weights = {"q": array(DEPTH, 5, seed=1), "k": array(DEPTH, 7, seed=2)}
    program = trace(lambda w, x: (x @ w["q"], x @ w["k"]), weights, ROWS)
    x = outliers(40, DEPTH)
    changed, became = changed_by_awq(program, x, points=10)
    exponent, error, factor = searched(x, weights.values(), 10)
    assert 0 < exponent < 1
    total = sum(np.sum((np.asarray(x, np.float64) @ np.asarray(w, np.float64)) ** 2) for w in weights.values())
    for name in "qk":
        assert became[name].metrics["exponent"] == pytest.approx(exponent)
        assert became[name].metrics["output_error"] == pytest.approx(np.sqrt(error / total), rel=1e-2)
        assert became[name].action == "activation multiplied"
        np.testing.assert_allclose(changed.weights[name], weights[name] * factor[:, None], rtol=1e-4)
        np.testing.assert_allclose(changed.weights["q:input_factor"], 1 / factor, rtol=1e-4)
    assert rounded_error(changed, program, x) < 0.8 * rounded_error(program, program, x)


def test_it_folds_as_smoothquant_does():
    weights = {"gamma": outliers(DEPTH, seed=1), "q": array(DEPTH, 5, seed=2), "v": array(DEPTH, 6, seed=3)}

    def fn(w, x):
        normal = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * w["gamma"].reshape(1, -1)
        return normal @ w["q"], normal @ w["v"]

    program, x = trace(fn, weights, ROWS), array(40, DEPTH)
    changed, became = changed_by_awq(program, x)
    assert {site.action for site in became.values()} == {"factor folded into gamma"}
    assert changed.weights.keys() == program.weights.keys()
    assert rounded_error(changed, program, x) < rounded_error(program, program, x)


def test_each_step_of_a_stack():
    program = trace(
        lambda w, x: lax.scan(lambda x, v: (jnp.tanh(x @ v), None), x, w["w"])[0],
        {"w": 0.3 * array(3, DEPTH, DEPTH, seed=1)},
        ROWS,
    )
    changed, became = changed_by_awq(program, outliers(40, DEPTH))
    assert became["w"].action == "activation multiplied"
    assert changed.weights["w:input_factor"].shape == (3, DEPTH)
    assert became["w"].metrics["output_error"] < became["w"].metrics["nearest_output_error"]


def test_where_nothing_helps_nothing_changes():
    program = trace(lambda w, x: x @ w["w"], {"w": jnp.ones((DEPTH, 3))}, ROWS)
    changed, became = changed_by_awq(program, outliers(40, DEPTH))
    assert (became["w"].action, became["w"].reason) == ("kept", "no factor errs less")
    np.testing.assert_array_equal(changed.weights["w"], program.weights["w"])
    changed, became = changed_by_awq(
        trace(lambda w, x: x @ w["w"], {"w": array(DEPTH, 3)}, ROWS), array(9, DEPTH), multiply=False
    )
    assert became["w"].reason == "its activation comes from outside"


def test_dead_channels_and_bad_input():
    factor = np.asarray(awq_factor(jnp.asarray([0.0, 1.0, 4.0, 1e-30]), 0.5))
    assert np.all(np.isfinite(factor))
    assert np.all(factor > 0)
    assert factor[0] == 1
    np.testing.assert_array_equal(awq_factor(jnp.zeros(3), 0.5), 1)
    program = trace(lambda w, x: x @ w["w"], {"w": array(DEPTH, 3)}, ROWS)
    changed_by_awq(program, outliers(9, DEPTH).at[:, 3].set(0))
    with pytest.raises(RecipeError, match="0 exponents"):
        awq(program, resolve(INT4, program), [{"x": array(2, DEPTH)}], points=0)
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        awq(program, resolve(INT4, program), [])
