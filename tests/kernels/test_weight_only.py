"""The product with a weight's codes, against NumPy in float64, on every instruction set that this machine has."""

import hashlib
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import ON_ONE_CORE, here

from lepton_xla.kernels import installation, weight_only
from lepton_xla.quant import FORMATS, QTensor, quantize

NAMES = ["int8", "int4", "nf4", "codebook16", "codebook8"]


def stored(rows, columns, name, groups=1, seed=0, per_channel=True):
    """A weight of random codes, all values of a code among them."""
    rng = np.random.default_rng(seed)
    form = FORMATS[name]
    if form.bits == 8:
        values = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    else:
        high = min(len(form.levels) or 1 << form.bits, 16)
        halves = rng.integers(0, high, (2, -(-rows // 2), columns))
        values = (halves[0] | halves[1] << 4).astype(np.uint8)
    dtype = jnp.bfloat16 if groups > 1 else jnp.float32
    scale = jnp.asarray(rng.uniform(0.5, 2, (groups, columns if per_channel else 1)), dtype)
    codebook = jnp.sort(jnp.asarray(rng.standard_normal(1 << form.bits), jnp.float32)) if form.learned else None
    return QTensor(jnp.asarray(values), scale, name, rows, codebook=codebook)


def array(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounds():
    """Whether the kernels in use round activations."""
    return importlib.import_module("lepton_xla_kernels").variant() == "avx512"


def check(got, x, weight):
    """Within rounding of the product in float64: of float32 sums, and of activations (and looked up values) to 16 bits.

    Errors of 16 bits are independent and less than half a step each: seven times their deviation bounds the sum, where
    that is less than what they could add up to. What is looked up is off by up to four times as much of the largest.
    """
    values, exact = np.asarray(weight.dequantize(), np.float64), x.astype(np.float64)
    bound = 1e-6 * (np.abs(exact) @ np.abs(values)) + 1e-30
    is_integer = FORMATS[weight.format].kind == "int"
    if (is_integer or len(x) == 1) and rounds():
        largest = np.abs(exact).max(axis=1, keepdims=True, initial=0)
        sizes = np.abs(values) if is_integer else np.full_like(values, 4 * np.abs(values).max(initial=0))
        most, likely = sizes.sum(axis=0) / 65000, np.sqrt((sizes**2).sum(axis=0)) / 16200
        bound += largest * np.minimum(most, likely)
    assert got.shape == (x.shape[0], weight.shape[1])
    assert got.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(got, np.float64) - exact @ values) <= bound)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 19),
    depth=st.integers(1, 90),
    groups=st.integers(1, 5),
    columns=st.integers(1, 300),
    name=st.sampled_from(NAMES),
    per_channel=st.booleans(),
)
def test_every_shape_is_multiplied(variants, rows, depth, groups, columns, name, per_channel):
    x, weight = array(rows, depth * groups), stored(depth * groups, columns, name, groups, 0, per_channel)
    for _ in variants():
        check(weight_only.multiply(jnp.asarray(x), weight), x, weight)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_products_that_are_spread_over_threads(variants, name):
    x, weight = array(129, 777), stored(777, 1531, name)  # several parts both ways, the last ones of one row
    for _ in variants():
        check(weight_only.multiply(jnp.asarray(x), weight), x, weight)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 8, 0), (3, 0, 8)])
def test_no_rows_no_columns_no_depth(variants, name, shape):
    rows, depth, columns = shape
    weight = stored(depth, columns, name)
    for _ in variants():
        got = weight_only.multiply(jnp.zeros((rows, depth), jnp.float32), weight)
        assert got.shape == (rows, columns)
        assert not got.any()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rows_of_zeros_nan_and_infinities_stay_in_their_rows(variants, name):
    x, weight = array(12, 300), stored(300, 21, name)
    plain = x.copy()
    plain[1] = 0
    x[1], x[5, 200], x[9, 2], x[10, :2] = 0, np.nan, np.inf, (np.inf, -np.inf)
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ np.asarray(weight.dequantize(), np.float64)
    others = [row for row in range(12) if row not in (5, 9, 10)]
    for _ in variants():
        got = np.asarray(weight_only.multiply(jnp.asarray(x), weight))
        check(got[others], x[others], weight)
        assert not got[1].any()
        # What a row gives depends on no other row, to the last bit.
        np.testing.assert_array_equal(got[others], np.asarray(weight_only.multiply(jnp.asarray(plain), weight))[others])
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))


@pytest.mark.parametrize(("size", "scale"), [(1e34, 1e-30), (1e29, 1.0), (1e-34, 1.0)])
def test_the_largest_and_smallest_values_stay(variants, size, scale):
    """The scale is applied to sums, so sums of codes times activations must fit; in integers too."""
    weight = QTensor(jnp.full((300, 5), 127, jnp.int8), jnp.full((1, 5), scale, jnp.float32), "int8", 300)
    x = np.full((5, 300), size, np.float32)
    x[1] *= -1
    for rows in (2, 5):
        for _ in variants():
            check(weight_only.multiply(jnp.asarray(x[:rows]), weight), x[:rows], weight)


@pytest.mark.parametrize("size", [1e-30, 2e-15, 9e14, 1e30])
def test_one_row_of_small_or_large_numbers_is_as_exact_as_others(variants, size):
    """The steps of both are small then, and so is their product."""
    codebook = jnp.linspace(-0.02, 0.02, 16, dtype=jnp.float32)
    weight = QTensor(jnp.full((32, 5), 0xF0, jnp.uint8), jnp.ones((1, 1)), "codebook16", 64, codebook=codebook)
    x = np.repeat(np.array([[size, 2 * size]], np.float32), 32, axis=1)
    wanted = np.full((1, 5), 0.64 * size)
    for _ in variants():
        np.testing.assert_allclose(weight_only.multiply(jnp.asarray(x), weight), wanted, rtol=2e-4)


def test_transformations(kernels):
    x, weight = jnp.asarray(array(3, 4, 66)), stored(66, 37, "int4", 3)
    expected = x @ weight.dequantize()
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), weight)
    for made in (
        jax.vmap(lambda part: weight_only.multiply(part, weight))(x),
        jax.vmap(weight_only.multiply)(x, several),
        jax.lax.map(lambda part: weight_only.multiply(part, weight), x),
        jax.lax.scan(lambda _, part: (_, weight_only.multiply(*part)), 0, (x, several))[1],
        jax.jit(jax.vmap(lambda part: weight_only.multiply(part, weight), in_axes=1, out_axes=1))(x),
    ):
        np.testing.assert_allclose(made, expected, rtol=0, atol=5e-3)


def test_what_is_lowered_calls_the_kernel_only_where_it_may(kernels, monkeypatch):
    x, weight = jnp.asarray(array(3, 66)), stored(66, 37, "int4", 3)

    def text():
        return jax.jit(lambda x: weight_only.multiply(x, weight)).lower(x).as_text()

    assert installation.PREFIX in text()
    with installation.without_kernels():
        assert installation.PREFIX not in text()
    monkeypatch.setenv(installation.VARIABLE, "off")
    assert installation.PREFIX not in text()
    np.testing.assert_allclose(weight_only.multiply(x, weight), x @ weight.dequantize(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{1: (9, 4)}, {2: (1, 3)}, {2: (3, 4)}, {2: (0, 4)}, {3: (5,)}, {4: (1, 4)}],
)
def test_operands_that_do_not_fit_are_refused(kernels, wrong):
    call = jax.ffi.ffi_call(f"{installation.PREFIX}weight_only_8", jax.ShapeDtypeStruct((2, 4), jnp.float32))
    shapes = [(2, 8), (8, 4), (1, 4), (4,), (2, 4)]
    kinds = ("f4", "i1", "f4", "f4", "f4")
    operands = [jnp.zeros(wrong.get(at, shapes[at]), kind) for at, kind in enumerate(kinds)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(jax.jit(lambda *given: call(*given, activation=np.int64(0)))(*operands))


def digest():
    """Of a product that is spread over threads, where there are several."""
    got = weight_only.multiply(jnp.asarray(array(70, 700)), stored(700, 1000, "int4"))
    return hashlib.sha256(np.asarray(got).tobytes()).hexdigest()


def test_the_number_of_threads_changes_nothing(kernels):
    limited = [sys.executable, "-c", ON_ONE_CORE.format(here=here(), module="test_weight_only")]
    out = subprocess.run(limited, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest()


def test_a_quantized_weight_is_multiplied(kernels):
    matrix = jnp.asarray(array(128, 64))
    for name, granularity in (("int8", "channel"), ("int8", "tensor"), ("int4", "group:32"), ("nf4", "group:64")):
        x = array(5, 128)
        weight = quantize(matrix, name, granularity)
        check(weight_only.multiply(jnp.asarray(x), weight), x, weight)
