"""Fake quantization at a site against float64, its gradient, and where it composes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_xla.errors import CalibrationError
from lepton_xla.passes import calibrate, fake_quant
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def recipe(options="", sites=".*"):
    return Recipe.parse(f'on_unsupported = "keep"\n[[quantize]]\nsites = "{sites}"\n{options}', name="test")


def rounded(values, axes=None, scale=None):
    values = np.asarray(values, np.float64)
    if scale is None:
        scale = np.max(np.abs(values), axis=axes, keepdims=True) / 127
    return np.clip(np.rint(values / scale), -127, 127) * scale


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("activations", ["dynamic", "static", "none"])
def test_one_product(granularity, activations):
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    options = f'granularity = "{granularity}"\n'
    options += {"dynamic": "", "static": "dynamic = false", "none": 'activations = "none"'}[activations]
    plan = recipe(options).resolve(program)
    x = array(4, 6, seed=3)
    ranges = {"w": jnp.float32(1.5)} if activations == "static" else None
    act = {
        "dynamic": lambda: rounded(x, 1),
        "static": lambda: rounded(x, scale=1.5 / 127),
        "none": lambda: np.asarray(x, np.float64),
    }[activations]()
    expected = act @ rounded(program.weights["w"], 0 if granularity == "channel" else None)
    got = fake_quant(program.fn, plan, ranges)(program.weights, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_static_without_a_range_names_the_site():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    plan = recipe("dynamic = false").resolve(program)
    for ranges in (None, {}, {"other": jnp.float32(1)}):
        with pytest.raises(CalibrationError, match="site 'w' has static activation scales"):
            fake_quant(program.fn, plan, ranges)(program.weights, array(3, 6))


def test_unplanned_sites_stay_float():
    program = trace(lambda w, x: (x @ w["a"]) @ w["b"], {"a": array(6, 5), "b": array(5, 4)}, ROWS)
    plan = recipe(sites="b").resolve(program)
    x = array(3, 6, seed=2)
    hidden = np.asarray(x, np.float64) @ np.asarray(program.weights["a"], np.float64)
    expected = rounded(hidden, 1) @ rounded(program.weights["b"], 0)
    np.testing.assert_allclose(fake_quant(program.fn, plan)(program.weights, x), expected, rtol=1e-4, atol=1e-4)


def test_what_a_plan_keeps_stays_float():
    """A weight used in two layouts is kept by the plan, so it is not rounded in training either."""
    tied = trace(
        lambda w, ids: jnp.take(w["t"], ids, axis=0) @ w["t"],
        {"t": array(9, 9)},
        {"ids": TensorSpec(("b",), "int32")},
    )
    ids = jnp.asarray([1, 5, 2])
    np.testing.assert_array_equal(
        fake_quant(tied.fn, recipe().resolve(tied))(tied.weights, ids), tied(tied.weights, ids)
    )


@pytest.mark.parametrize("static", [False, True])
def test_a_scan_has_a_scale_a_step(static):
    def fn(w, x):
        return lax.scan(lambda x, w: (2.0 * jnp.sin(x @ w), None), x, w["stack"])[0]

    program = trace(fn, {"stack": array(3, 6, 6) * jnp.asarray([1.0, 10.0, 0.1]).reshape(3, 1, 1)}, ROWS)
    plan = recipe("dynamic = false" if static else "").resolve(program)
    x = array(4, 6, seed=3)
    ranges = calibrate(program, plan, [{"x": x}]) if static else None
    got = fake_quant(fn, plan, ranges)(program.weights, x)
    expected = np.asarray(x, np.float64)
    for step, w in enumerate(program.weights["stack"]):
        act = rounded(expected, scale=float(ranges["stack"][step]) / 127) if static else rounded(expected, 1)
        expected = 2 * np.sin(act @ rounded(w, 0))
    # A code may fall on the other side of a tie; most of the result must agree to rounding.
    assert np.median(np.abs(got - expected)) < 1e-4
    assert np.abs(got - expected).max() < 0.1


def test_gradient_is_straight_through():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    plan = recipe().resolve(program)
    x, upstream = array(4, 6, seed=3), array(4, 5, seed=4)
    quantized = fake_quant(program.fn, plan)
    by_weight, by_input = jax.grad(lambda w, x: jnp.sum(quantized(w, x) * upstream), (0, 1))(program.weights, x)
    g = np.asarray(upstream, np.float64)
    np.testing.assert_allclose(by_weight["w"], rounded(x, 1).T @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_input, g @ rounded(program.weights["w"], 0).T, rtol=1e-4, atol=1e-5)


def test_static_gradient_is_zero_where_saturated():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    plan = recipe("dynamic = false").resolve(program)
    x = array(4, 6, seed=3)
    quantized = fake_quant(program.fn, plan, {"w": jnp.float32(1.0)})
    by_input = jax.grad(lambda x: jnp.sum(quantized(program.weights, x)))(x)
    inside = np.abs(np.asarray(x)) < 127.5 / 127
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(np.asarray(by_input) != 0, inside)


def test_composes_with_jit_vmap_grad_and_remat():
    def fn(w, x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w["a"]))(x) @ w["b"])

    program = trace(fn, {"a": array(6, 5), "b": array(5, 4)}, ROWS)
    quantized = fake_quant(fn, recipe().resolve(program))
    xs = array(3, 4, 6, seed=5)
    one_by_one = [jax.grad(quantized)(program.weights, x)["a"] for x in xs]
    together = jax.jit(jax.vmap(jax.grad(quantized), (None, 0)))(program.weights, xs)["a"]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), rtol=1e-5, atol=1e-6)
    assert np.isfinite(together).all()
    assert "remat" in str(jax.make_jaxpr(quantized)(program.weights, xs[0]))


def test_trains_to_where_it_is_quantized():
    """Gradient descent through the rounding lowers the quantized loss."""
    x, target = array(32, 6, seed=1), array(32, 3, seed=2)
    program = trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((6, 3))}, ROWS)
    quantized = fake_quant(program.fn, recipe().resolve(program))
    loss = jax.jit(jax.value_and_grad(lambda w: jnp.mean((quantized(w, x) - target) ** 2)))
    weights, first = program.weights, None
    for _ in range(60):
        value, gradient = loss(weights)
        first = value if first is None else first
        weights = jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradient)
    best = np.linalg.lstsq(np.asarray(x), np.asarray(target), rcond=None)[1].sum() / target.size
    assert loss(weights)[0] < 1.02 * best < first
