"""The fused product of rounded rows and int8 codes, against NumPy in int64, bit for bit."""

import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import ON_ONE_CORE, here

from lepton_xla.kernels import installation, integer_product
from lepton_xla.quant import QTensor


def stored(depth, columns, *, per_channel=True, seed=0):
    """A weight [K, N] of random codes, column-major."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (columns, depth)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (1, columns if per_channel else 1)).astype(np.float32)
    return QTensor(jnp.asarray(codes), jnp.asarray(scale), "int8", depth, transposed=True)


def array(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(x, weight, static=None):
    """Rounded to float32 where the kernel does, and nowhere else."""
    if static is None:
        scale = np.abs(x).max(axis=1, keepdims=True, initial=0) * np.float32(1 / 127)
        scale = np.where(scale == 0, np.float32(1), np.maximum(scale, np.finfo(np.float32).tiny))
    else:
        scale = np.full((len(x), 1), static, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.clip(np.rint(np.nan_to_num(x / scale, nan=0.0)), -127, 127).astype(np.int64)
        total = codes @ np.asarray(weight.values, np.int64).T
        return total.astype(np.float32) * (scale * np.asarray(weight.scale))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    depth=st.integers(1, 200),
    columns=st.integers(1, 90),
    per_channel=st.booleans(),
    static=st.sampled_from([None, 0.02]),
    factors=st.booleans(),
)
def test_every_shape_is_multiplied(variants, rows, depth, columns, per_channel, static, factors):
    x, weight = array(rows, depth), stored(depth, columns, per_channel=per_channel)
    factor = array(depth, seed=2) if factors else None
    x[0] = 0
    given_scale = None if static is None else jnp.float32(static)
    for _ in variants():
        got = integer_product.multiply(jnp.asarray(x), weight, given_scale, None, factor)
        np.testing.assert_array_equal(got, reference(x if factor is None else x * factor, weight, static))


@pytest.mark.parametrize("shape", [(200, 300, 350), (5, 900, 700), (17, 2000, 130)])  # by rows, columns, panels
def test_products_that_are_spread_over_threads(variants, shape):
    rows, depth, columns = shape
    x, weight = array(rows, depth), stored(depth, columns)
    for _ in variants():
        np.testing.assert_array_equal(integer_product.multiply(jnp.asarray(x), weight), reference(x, weight))


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 8, 0), (3, 0, 8)])
def test_no_rows_no_columns_no_depth(variants, shape):
    rows, depth, columns = shape
    for _ in variants():
        got = integer_product.multiply(jnp.zeros((rows, depth), jnp.float32), stored(depth, columns))
        assert got.shape == (rows, columns)
        assert not got.any()


def test_nan_and_infinities(variants):
    """With a scale for each row they make the row NaN; with one for all, NaN is zero and infinity the largest code."""
    x, weight = array(6, 80), stored(80, 21)
    x[1, 3], x[2, 77], x[4, 0] = np.nan, np.inf, -np.inf
    for _ in variants():
        dynamic = np.asarray(integer_product.multiply(jnp.asarray(x), weight))
        assert np.isnan(dynamic[[1, 2, 4]]).all()
        np.testing.assert_array_equal(dynamic[[0, 3, 5]], reference(x[[0, 3, 5]], weight))
        static = integer_product.multiply(jnp.asarray(x), weight, jnp.float32(0.05))
        np.testing.assert_array_equal(static, reference(x, weight, 0.05))


def test_nan_shows_in_the_fallback(monkeypatch):
    """Of many rows too, whose largest magnitudes XLA:CPU finds with vectors."""
    monkeypatch.setenv(installation.VARIABLE, "off")
    x, weight = array(200, 64), stored(64, 7)
    x[0, 5] = np.nan
    found = np.asarray(jax.jit(lambda part: integer_product.multiply(part, weight))(x))
    assert np.isnan(found[0]).all()
    assert not np.isnan(found[1:]).any()


def test_extreme_magnitudes(variants):
    """Rows too small for a normal scale, and sums near the ends of int32, also of codes that are shifted."""
    x = np.stack([np.full(70_000, value, np.float32) for value in (1e-44, 1.0, -1.0, 3e38)])
    weight = QTensor(
        jnp.full((3, 70_000), 127, jnp.int8), jnp.ones((1, 1), jnp.float32), "int8", 70_000, None, None, True
    )
    for _ in variants():
        np.testing.assert_array_equal(integer_product.multiply(jnp.asarray(x), weight), reference(x, weight))


def test_ties_are_rounded_to_even(variants):
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.499]], np.float32)
    weight = QTensor(jnp.eye(8, dtype=jnp.int8), jnp.ones((1, 1), jnp.float32), "int8", 8, transposed=True)
    for _ in variants():
        got = integer_product.multiply(jnp.asarray(x), weight, jnp.float32(1))
        np.testing.assert_array_equal(got, [[127, 0, 2, 2, 0, -2, -2, 0]])


def test_transformations_and_the_fallback(kernels, monkeypatch):
    x, weight = array(3, 4, 66), stored(66, 37)
    expected = np.stack([reference(part, weight) for part in x])
    multiply = lambda part: integer_product.multiply(part, weight)  # noqa: E731
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), weight)
    for made in (
        jax.vmap(multiply)(x),
        jax.jit(jax.vmap(multiply, in_axes=1, out_axes=1))(x),
        jax.vmap(integer_product.multiply)(x, several),
        jax.lax.scan(lambda _, part: (_, integer_product.multiply(*part)), 0, (jnp.asarray(x), several))[1],
    ):
        np.testing.assert_array_equal(made, expected)
    assert installation.PREFIX in jax.jit(multiply).lower(x[0]).as_text()
    monkeypatch.setenv(installation.VARIABLE, "off")
    assert installation.PREFIX not in jax.jit(lambda part: multiply(part)).lower(x[0]).as_text()
    np.testing.assert_allclose(jax.jit(lambda x: jax.vmap(multiply)(x))(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "activation"),
    [
        ({1: (4, 9)}, 0),
        ({2: (1, 3)}, 0),
        ({2: (2, 4), 3: (1,)}, 0),
        ({3: (2,)}, 0),
        ({0: (3, 8)}, 0),
        ({4: (3,)}, 0),
        ({5: (3,)}, 0),
        ({6: (1, 4)}, 0),
        ({6: (2, 3)}, 0),
        ({}, 5),
        ({}, -1),
    ],
)
def test_operands_that_do_not_fit_are_refused(kernels, wrong, activation):
    call = jax.ffi.ffi_call(f"{installation.PREFIX}integer_product", jax.ShapeDtypeStruct((2, 4), jnp.float32))
    shapes = [(2, 8), (4, 8), (1, 4), (0,), (8,), (4,), (2, 4)]
    kinds = ("f4", "i1", "f4", "f4", "f4", "f4", "f4")
    operands = [jnp.zeros(wrong.get(at, shapes[at]), kind) for at, kind in enumerate(kinds)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(jax.jit(lambda *given: call(*given, activation=np.int64(activation)))(*operands))


def digest():
    """Of products that are spread over threads, where there are several."""
    found = [np.asarray(integer_product.multiply(array(rows, 700), stored(700, 1000))) for rows in (5, 90)]
    return hashlib.sha256(b"".join(part.tobytes() for part in found)).hexdigest()


def test_the_number_of_threads_changes_nothing(kernels):
    limited = [sys.executable, "-c", ON_ONE_CORE.format(here=here(), module="test_integer_product")]
    assert subprocess.run(limited, capture_output=True, text=True, check=True).stdout.strip() == digest()
