"""Scales, codes and the straight-through gradient, against float64."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lepton_xla.quant import FORMATS, QTensor, absmax_scale, encode, fake_quantize, magnitude, quantize

INT8 = FORMATS["int8"]
TINY = float(np.finfo(np.float32).tiny)
round_to_int8 = lambda values, scale: fake_quantize(values, encode(values, scale, INT8), scale, INT8)  # noqa: E731
FLOATS = hnp.arrays(np.float32, (3, 4), elements=st.floats(allow_nan=False, allow_infinity=False, width=32))


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@settings(max_examples=150, deadline=None)
@given(FLOATS)
def test_scales_are_normal_and_codes_near_for_any_finite_input(values):
    stored = quantize(jnp.asarray(values), "int8")
    scale, codes = np.asarray(stored.scale, np.float64), np.asarray(stored.values, np.int64)
    assert scale.shape == (1, 4)
    assert np.isfinite(scale).all()
    assert (scale >= TINY).all()
    assert np.abs(codes).max() <= 127
    # What is above half of float32's largest number saturates there.
    largest = float(np.finfo(np.float32).max) / 2
    exact = np.clip(values.astype(np.float64), -largest, largest)
    assert (codes[exact == 0] == 0).all()
    error = np.abs(codes * scale - exact)
    # Half a step; with float32's own rounding of the quotient and of the scale.
    assert (error <= scale * (0.5 + 1e-4)).all()
    assert (np.sign(codes) * np.sign(exact) >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_extremes(dtype):
    largest = jnp.finfo(dtype).max
    tiny = jnp.finfo(dtype).smallest_subnormal
    absmax = jnp.asarray([0.0, largest, tiny, jnp.finfo(dtype).tiny, 1.0], dtype)
    scale = np.asarray(absmax_scale(absmax, INT8))
    assert scale.dtype == np.float32
    assert np.isfinite(scale).all()
    assert (scale >= TINY).all()
    assert scale[0] == 1
    np.testing.assert_allclose(scale[[1, 4]], [float(largest) / 127, 1 / 127], rtol=1e-6)
    np.testing.assert_array_equal(encode(jnp.asarray([-largest, largest, 0], dtype), scale[1], INT8), [-127, 127, 0])


def test_a_broken_value_shows():
    row = jnp.asarray([[1.0, jnp.nan], [1.0, 2.0], [1.0, jnp.inf]])
    scale = absmax_scale(magnitude(row, (1,)), INT8)
    np.testing.assert_array_equal(np.isfinite(scale).ravel(), [False, True, False])
    assert np.isnan(scale[0, 0])
    many = jax.jit(lambda x: absmax_scale(magnitude(x, (1,)), INT8))(jnp.ones((200, 64)).at[:100, 5].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(many).ravel(), np.arange(200) < 100)


def test_saturates_and_rounds_ties_to_even():
    values = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -1e9, 3.0e38, 0.0, -0.0])
    expected = [0, 2, 2, 0, -2, -2, 126, 127, 127, -127, 127, 0, 0]
    codes = encode(values, jnp.float32(1), INT8)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(round_to_int8(values, jnp.float32(1)), np.asarray(expected, np.float32))


@settings(max_examples=100, deadline=None)
@given(FLOATS, st.floats(2.0**-100, 2.0**100, width=32))
def test_fake_quantize_is_encode_and_dequantize(values, scale):
    scale = jnp.float32(scale)
    expected = QTensor(encode(jnp.asarray(values), scale, INT8), scale.reshape(1, 1), "int8", 3).dequantize()
    np.testing.assert_array_equal(jax.jit(round_to_int8)(values, scale), expected)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), None, ()])
def test_magnitude(axes):
    values = array(5, 7)
    expected = np.max(np.abs(np.asarray(values)), axis=axes if axes is None else tuple(axes), keepdims=True)
    np.testing.assert_array_equal(magnitude(values, axes), expected)


def test_magnitude_of_nothing_is_zero():
    assert magnitude(jnp.zeros((0, 3)), (0,)).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize_keeps_the_dtype_asked_for(dtype):
    weight = array(6, 5).astype(dtype)
    stored = quantize(weight, "int8")
    assert (stored.values.dtype, stored.scale.dtype, stored.shape) == (jnp.int8, jnp.float32, (6, 5))
    back = stored.dequantize(dtype)
    assert back.dtype == weight.dtype
    step = np.asarray(stored.scale, np.float64)
    rounding = np.abs(np.asarray(weight, np.float64)) * float(jnp.finfo(dtype).eps)
    difference = np.abs(np.asarray(back, np.float64) - np.asarray(weight, np.float64))
    assert (difference <= step / 2 * (1 + 1e-3) + rounding).all()


def test_is_a_pytree():
    stored = quantize(array(4, 6, 5), "int8")
    leaves, tree = jax.tree.flatten(stored)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
    again = jax.tree.unflatten(tree, leaves)
    assert again.format == "int8"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": stored})]
    assert paths == ["['w'].values", "['w'].scale"]
    expected = np.asarray(stored.dequantize())

    np.testing.assert_array_equal(jax.jit(lambda q: q)(stored).dequantize(), expected)
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(stored), expected)
    _, stepped = lax.scan(lambda carry, q: (carry, q.dequantize()), 0, stored)
    np.testing.assert_array_equal(stepped, expected)
    part = jax.tree.map(lambda leaf: leaf[2], stored)
    np.testing.assert_array_equal(part.dequantize(), expected[2])
    assert jax.eval_shape(lambda q: q, stored).shape == (4, 6, 5)


def test_gradient_passes_inside_and_stops_outside():
    values = jnp.asarray([0.3, -1.27, 1.274, 1.28, -5.0, 0.0])

    def total(values, scale):
        return jnp.sum(round_to_int8(values, scale) * jnp.arange(1.0, 7.0))

    by_value, by_scale = jax.grad(total, (0, 1))(values, jnp.float32(0.01))
    np.testing.assert_allclose(by_value, [1, 2, 3, 0, 0, 6], rtol=1e-6)
    assert by_scale == 0
    # The largest of a channel is on the last code, whichever way its quotient rounds: nothing saturates.
    weight = array(40, 30)
    through = jax.grad(lambda w: jnp.sum(round_to_int8(w, absmax_scale(magnitude(w, (0,)), INT8))))(weight)
    np.testing.assert_allclose(through, np.ones((40, 30)), rtol=1e-6)


def test_gradient_of_bfloat16_is_bfloat16():
    values = array(8).astype(jnp.bfloat16)
    grad = jax.grad(lambda v: jnp.sum(round_to_int8(v, jnp.float32(0.05)).astype(jnp.float32)))(values)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(jnp.float32), np.ones(8))


@pytest.mark.parametrize("name", ["int8", "uint8", "fp8_e4m3", "codebook256"])
def test_codes_that_lie_by_columns_stand_for_the_same_matrix(name):
    stored = quantize(array(6, 5), name)
    turned = stored.by_columns()
    assert turned.values.shape == (5, 6)
    assert turned.shape == (6, 5)
    np.testing.assert_array_equal(turned.codes(), stored.codes())
    np.testing.assert_array_equal(turned.by_rows().values, stored.values)
    assert turned.by_columns() is turned
    assert stored.by_rows() is stored
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(turned), stored.dequantize())
    index = jnp.asarray([3, 0, 3])
    np.testing.assert_array_equal(turned.columns(index).dequantize(), stored.columns(index).dequantize())
    steps = quantize(array(4, 6, 5), name).by_columns()
    assert steps.shape == (4, 6, 5)
    np.testing.assert_array_equal(jax.tree.map(lambda leaf: leaf[2], steps).dequantize(), steps.dequantize()[2])
