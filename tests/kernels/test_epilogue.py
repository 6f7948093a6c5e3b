"""Bias, activation and sum after a product by a kernel, against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_xla.kernels import integer_product, weight_only
from lepton_xla.kernels.epilogue import ACTIVATIONS, Epilogue
from lepton_xla.passes.quantization import epilogues
from lepton_xla.quant import quantize

EXACT = {
    "": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * np.exp(-np.logaddexp(0, -x)),
    "gelu": lambda x: x * 0.5 * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def array(*shape, seed=1, size=1.0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def multiplied(kind, x, weight, epilogue=None):
    if kind == "int8 x int8":
        return integer_product.multiply(jnp.asarray(x), weight, None, epilogue)
    return weight_only.multiply(jnp.asarray(x), weight, epilogue)


def stored(kind, depth, columns):
    weight = quantize(jnp.asarray(array(depth, columns, seed=5)), kind.partition(" ")[0])
    return weight.by_columns() if "x" in kind else weight


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["int8 x int8", "int8", "int4"]),
    rows=st.one_of(st.integers(0, 9), st.integers(10, 60)),
    depth=st.integers(0, 90),
    columns=st.integers(0, 140),
    biased=st.booleans(),
    activation=st.sampled_from(sorted(EXACT)),
    added=st.booleans(),
)
def test_every_epilogue(variants, kind, rows, depth, columns, biased, activation, added):
    x, weight = array(rows, depth), stored(kind, depth, columns)
    bias = array(columns, seed=2) if biased else None
    residual = array(rows, columns, seed=3) if added else None
    epilogue = Epilogue(
        None if bias is None else jnp.asarray(bias), activation, None if residual is None else jnp.asarray(residual)
    )
    for _ in variants():
        exact = np.asarray(multiplied(kind, x, weight), np.float64)
        exact = EXACT[activation](exact + (0 if bias is None else bias)) + (0 if residual is None else residual)
        got = multiplied(kind, x, weight, epilogue)
        assert got.shape == (rows, columns)
        np.testing.assert_allclose(got, exact, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("activation", sorted(EXACT))
def test_activations_everywhere(variants, activation):
    """On a grid over all magnitudes, infinities and NaN; a far negative input gives no trace of rounding."""
    values = np.concatenate(
        [np.linspace(-20, 20, 4001), np.geomspace(1e-30, 1e30, 200), -np.geomspace(1e-30, 1e30, 200)]
    )
    values = values.astype(np.float32)
    bias = jnp.asarray(np.concatenate([values, np.float32([np.nan, np.inf])]))
    weight = quantize(jnp.zeros((4, bias.size), jnp.float32), "int8")
    by_columns = weight.by_columns()
    with np.errstate(over="ignore"):
        exact = EXACT[activation](values.astype(np.float64))
    for _ in variants():
        got = np.asarray(multiplied("int8", np.ones((1, 4), np.float32), weight, Epilogue(bias, activation)))[0]
        np.testing.assert_allclose(got[:-2], exact, rtol=2e-6, atol=3e-6)
        assert np.isnan(got[-2])
        # Tiles of several rows, and of what is left of them.
        rows = np.asarray(
            multiplied("int8 x int8", np.ones((20, 4), np.float32), by_columns, Epilogue(bias, activation))
        )
        np.testing.assert_allclose(rows[0, :-2], exact, rtol=2e-6, atol=3e-6)
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[0], rows.shape))
        assert np.isnan(rows[0, -2])
        assert got[-1] == np.inf
        if activation:
            assert np.all(got[:-2][values < -20] == 0)


@pytest.mark.parametrize("kind", ["int8 x int8", "int8"])
def test_threads_and_the_fallback(kernels, kind):
    """Spread over threads, and in XLA's own operations."""
    x, weight = array(210, 300), stored(kind, 300, 350)
    epilogue = Epilogue(jnp.asarray(array(350)), "gelu", jnp.asarray(array(210, 350, seed=3)))
    exact = EXACT["gelu"](np.asarray(multiplied(kind, x, weight), np.float64) + array(350)) + array(210, 350, seed=3)
    np.testing.assert_allclose(multiplied(kind, x, weight, epilogue), exact, rtol=2e-6, atol=4e-6)
    np.testing.assert_allclose(epilogue.apply(multiplied(kind, x, weight)), exact, rtol=2e-6, atol=4e-6)


def test_several_batches(kernels):
    """`vmap` makes more rows of the activations and of what is added, whichever of them is batched."""
    x, weight = array(3, 4, 30), stored("int8 x int8", 30, 20)
    added, bias = array(3, 4, 20, seed=3), jnp.asarray(array(20))

    def one(x, added):
        return multiplied("int8 x int8", x, weight, Epilogue(bias, "relu", added))

    for axes in ((0, 0), (0, None), (None, 0)):
        operands = [jnp.asarray(each if axis == 0 else each[0]) for each, axis in zip((x, added), axes, strict=True)]
        got = jax.jit(jax.vmap(one, in_axes=axes))(*operands)
        parts = [
            one(*(each if axis is None else each[at] for each, axis in zip(operands, axes, strict=True)))
            for at in range(3)
        ]
        np.testing.assert_array_equal(got, np.stack(parts))


def test_factors_before_a_product_become_its_own(kernels):
    """A vector that multiplies the rows, and nothing else that does."""
    x, factor, weight = jnp.asarray(array(2, 3, 30)), jnp.asarray(array(30)), stored("int8 x int8", 30, 20)

    def fn(x, factor):
        return multiplied("int8 x int8", jnp.reshape(x * factor, (6, 30)), weight)

    def product(fn, *given):
        made = jax.make_jaxpr(fn)(*given)
        (found,) = [eqn for eqn in made.eqns if eqn.primitive is integer_product.PRIMITIVE]
        return found.invars[4].aval.shape, [eqn.primitive.name for eqn in made.eqns]

    for shape, expected in (((1, 1, 30), (30,)), ((2, 3, 30), (0,)), ((2, 3, 1), (0,))):
        given_factor = jnp.broadcast_to(factor[: shape[-1]], shape) if shape[0] == 2 else jnp.reshape(factor, shape)
        found = epilogues.fuse(lambda x, vector, shape=shape: fn(x, jnp.reshape(vector, shape)))
        operand = factor if shape == (1, 1, 30) else given_factor
        assert product(found, x, operand)[0] == expected
        np.testing.assert_array_equal(jax.jit(found)(x, operand), jax.jit(fn)(x, given_factor))


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu, lambda x: jax.nn.gelu(x, approximate=False)])
def test_what_an_activation_of_one_row_multiplies_is_no_factor(kernels, activation):
    first, second = stored("int8 x int8", 30, 20), stored("int8 x int8", 20, 8)

    def fn(x):
        return multiplied("int8 x int8", activation(multiplied("int8 x int8", x, first)), second)

    x = array(1, 30)
    np.testing.assert_allclose(jax.jit(epilogues.fuse(fn))(x), jax.jit(fn)(x), rtol=1e-5, atol=1e-5)


def test_activations_have_numbers():
    assert list(ACTIVATIONS) == ["", "relu", "silu", "gelu", "gelu_tanh"]  # as kernels/src/epilogue.h
