"""The int8 product in every layout, compared with an exact NumPy reference in integers."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import pairs
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from lepton_xla.passes import find_sites
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.quantization import eligibility, products
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import FORMATS, absmax_scale, encode
from lepton_xla.recipe import Recipe

BATCHED = (((2,), (1,)), ((0,), (0,)))
LETTERS = "abcdefghij"
HERE = Target("cpu")


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def scale_of(absmax):
    return None if absmax is None else absmax_scale(absmax, FORMATS["int8"])


def only_site(fn, activation, weight):
    spec = TensorSpec(activation.shape, activation.dtype.name)
    (site,) = find_sites(trace(lambda w, x: fn(x, w["w"]), {"w": weight}, {"x": spec}))
    return site


def quantized(values, axes):
    """Codes and scales in float64, by the definition: scale = absmax / 127, nearest code, ties to even."""
    values = np.asarray(values, np.float64)
    scale = np.max(np.abs(values), axis=axes, keepdims=True) / 127
    scale = np.where(scale == 0, 1, scale)
    return np.rint(values / scale).astype(np.int64), scale


def dot_reference(site, act, weight, act_scale):
    """The sum over codes in int64, and the scale of each element of the result."""
    numbers = site.params["dimension_numbers"]
    operands, scales = [None, None], [None, None]
    side, other = site.weight_operand, 1 - site.weight_operand
    operands[side], scales[side] = weight
    operands[other], scales[other] = act[0], act_scale
    (contract, batch), names = numbers, [None, None]
    fresh = iter(LETTERS)
    names = [[None] * operands[0].ndim, [None] * operands[1].ndim]
    for left, right in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        names[0][left] = names[1][right] = next(fresh)
    names = [[name or next(fresh) for name in side] for side in names]
    lead = [names[0][axis] for axis in batch[0]]
    free = [[n for k, n in enumerate(names[s]) if k not in (*contract[s], *batch[s])] for s in range(2)]
    equation = f"{''.join(names[0])},{''.join(names[1])}->{''.join(lead + free[0] + free[1])}"
    codes = np.einsum(equation, operands[0], operands[1])
    ones = [np.ones(operand.shape) for operand in operands]
    # Scales are constant along contracted axes, so their products are what one contracted element has.
    spread = [scale * one for scale, one in zip(scales, ones, strict=True)]
    for s in range(2):
        spread[s] = np.mean(spread[s], axis=tuple(contract[s]), keepdims=True)
    keep = [[n for k, n in enumerate(names[s]) if k not in contract[s]] for s in range(2)]
    squeezed = [np.squeeze(spread[s], axis=tuple(contract[s])) for s in range(2)]
    factor = np.einsum(f"{''.join(keep[0])},{''.join(keep[1])}->{''.join(lead + free[0] + free[1])}", *squeezed)
    return codes, factor


DOTS = {
    "x @ W": (lambda x, w: x @ w, (7, 12), (12, 5)),
    "x @ W.T": (lambda x, w: x @ w.T, (7, 12), (5, 12)),
    "one row": (lambda x, w: x @ w, (1, 12), (12, 5)),
    "one vector": (lambda x, w: x @ w, (12,), (12, 5)),
    "weight on the left": (lambda x, w: lax.dot_general(w, x, (((0,), (2,)), ((), ()))), (2, 7, 12), (12, 5)),
    "einsum": (lambda x, w: jnp.einsum("ij,bkj->bik", w, x), (2, 7, 12), (5, 12)),
    "heads": (lambda x, w: jnp.einsum("btd,dhk->bthk", x, w), (2, 3, 12), (12, 4, 5)),
    "heads back": (lambda x, w: jnp.einsum("bthk,hkd->btd", x, w), (2, 3, 4, 5), (4, 5, 6)),
    "contracted in another order": (lambda x, w: jnp.einsum("bhtk,khd->btd", x, w), (2, 4, 3, 5), (5, 4, 6)),
    "free on both sides, weight left": (
        lambda x, w: lax.dot_general(w, x, (((1,), (2,)), ((), ()))),
        (2, 3, 12, 4),
        (5, 12, 6),
    ),
    "batched": (lambda x, w: lax.dot_general(x, w, BATCHED), (3, 7, 12), (3, 12, 5)),
    "batched, weight left": (lambda x, w: lax.dot_general(w, x, (((2,), (1,)), ((1,), (2,)))), (4, 12, 3), (5, 3, 12)),
    "two batch axes": (lambda x, w: jnp.einsum("abti,baio->abto", x, w), (2, 3, 4, 6), (3, 2, 6, 5)),
    "nothing contracted": (lambda x, w: lax.dot_general(x, w, (((), ()), ((), ()))), (3,), (4,)),
}  # fmt: skip


SCALES = [("channel", False), ("tensor", True)]


@pytest.mark.parametrize(("name", "scales"), pairs(DOTS, SCALES, whole=("x @ W", "batched")))
def test_dot(name, scales):
    granularity, static = scales
    fn, act_shape, weight_shape = DOTS[name]
    act, weight = array(*act_shape, seed=1), array(*weight_shape, seed=2)
    act = act.at[..., :1].multiply(7.0)  # rows of different magnitudes
    site = only_site(fn, act, weight)
    laid = lay_out(weight, site.layout)
    stored = products.store(site, laid, "int8", granularity)
    assert stored.values.dtype == jnp.int8

    contract = site.params["dimension_numbers"][0]
    batch_axes = site.params["dimension_numbers"][1][site.weight_operand]
    per_tensor = tuple(axis for axis in range(laid.ndim) if axis not in batch_axes)
    weight_axes = per_tensor if granularity == "tensor" else tuple(contract[site.weight_operand])
    reference = quantized(laid, weight_axes)
    act_contract = tuple(contract[1 - site.weight_operand])
    absmax = jnp.float32(1.7) if static else None
    if static:
        scale = np.full((1,) * act.ndim, 1.7 / 127)
        codes = np.clip(np.rint(np.asarray(act, np.float64) / scale), -127, 127).astype(np.int64)
    else:
        codes, scale = quantized(act, act_contract)
    total, factor = dot_reference(site, (codes,), reference, scale)
    for pad in (False, True):
        got = products.quantized_dot(site, act, stored, "int8", scale_of(absmax), pad_single=pad, target=HERE)
        assert got.shape == site.output.shape
        np.testing.assert_allclose(got, total * factor, rtol=3e-6, atol=1e-7)
    # And it is the float product, to what eight bits can hold.
    if not static:
        operands = (act, laid) if site.weight_operand == 1 else (laid, act)
        exact = lax.dot_general(*operands, site.params["dimension_numbers"])
        assert np.abs(np.asarray(got) - exact).max() < 0.05 * np.abs(exact).max()

    restored = products.restore(site, stored)
    assert restored.shape == laid.shape
    np.testing.assert_allclose(restored, reference[0] * reference[1], rtol=1e-6, atol=1e-9)
    # The codes are as XLA's fast path wants them: contracted axes first, no transpose left.
    batch = len(site.params["dimension_numbers"][1][0])
    assert stored.values.ndim == batch + 2
    jaxpr = str(
        jax.make_jaxpr(
            lambda a, s: products.quantized_dot(site, a, s, "int8", scale_of(absmax), pad_single=False, target=HERE)
        )(act, stored)
    )
    assert jaxpr.count("preferred_element_type=int32") == 1
    if name in ("x @ W", "x @ W.T"):
        assert "transpose" not in jaxpr


CONVS = {
    "NHWC": ((3, 8, 9, 4), (3, 2, 4, 5), {"padding": "SAME"}, ("NHWC", "HWIO", "NHWC")),
    "NCHW": ((3, 4, 8, 9), (5, 4, 3, 2), {"padding": "VALID"}, ("NCHW", "OIHW", "NCHW")),
    "mixed": ((3, 8, 9, 4), (5, 4, 3, 2), {"padding": "VALID"}, ("NHWC", "OIHW", "NCHW")),
    "strided": ((3, 9, 9, 4), (3, 3, 4, 5), {"padding": "SAME", "window_strides": (2, 3)}, ("NHWC", "HWIO", "NHWC")),
    "dilated": ((2, 9, 9, 4), (3, 3, 4, 5), {"padding": "SAME", "rhs_dilation": (2, 1)}, ("NHWC", "HWIO", "NHWC")),
    "transposed": (
        (2, 5, 5, 4), (3, 3, 4, 5), {"padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)}, ("NHWC", "HWIO", "NHWC"),
    ),
    "grouped": ((2, 6, 6, 6), (3, 3, 2, 9), {"padding": "SAME", "feature_group_count": 3}, ("NHWC", "HWIO", "NHWC")),
    "depthwise": ((2, 6, 6, 6), (3, 3, 1, 6), {"padding": "SAME", "feature_group_count": 6}, ("NHWC", "HWIO", "NHWC")),
    "1-D": ((2, 9, 4), (3, 4, 5), {"padding": "SAME"}, ("NWC", "WIO", "NWC")),
    "3-D": ((2, 4, 5, 6, 3), (2, 2, 2, 3, 4), {"padding": "SAME"}, ("NDHWC", "DHWIO", "NDHWC")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "scales"), pairs(CONVS, SCALES, whole=("NHWC", "grouped")))
def test_conv(name, scales):
    granularity, static = scales
    act_shape, weight_shape, options, layout = CONVS[name]
    options = {"window_strides": (1,) * (len(act_shape) - 2)} | options
    fn = lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)  # noqa: E731
    act = array(*act_shape, seed=1).at[0].multiply(5.0)
    weight = array(*weight_shape, seed=2)
    site = only_site(fn, act, weight)
    stored = products.store(site, weight, "int8", granularity)
    out_channel, batch = layout[1].index("O"), layout[0].index("N")
    assert stored.shape == (weight.size // weight.shape[out_channel], weight.shape[out_channel])
    weight_axes = None if granularity == "tensor" else tuple(k for k in range(weight.ndim) if k != out_channel)
    weight_codes, weight_scale = quantized(weight, weight_axes)
    absmax = jnp.float32(1.7) if static else None
    if static:
        act_scale = np.full((1,) * act.ndim, 1.7 / 127)
        codes = np.clip(np.rint(np.asarray(act, np.float64) / act_scale), -127, 127)
    else:
        codes, act_scale = quantized(act, tuple(k for k in range(act.ndim) if k != batch))
    # Integers of this size and number are exact in float32, whatever the order of the sum.
    assert 127 * 127 * weight[..., 0].size < 2**24
    total = np.asarray(fn(jnp.asarray(codes, jnp.float32), jnp.asarray(weight_codes, jnp.float32)), np.float64)
    np.testing.assert_array_equal(total, np.rint(total))
    shape = np.ones(act.ndim, int)
    shape[layout[2].index("N")] = -1
    out_shape = np.ones(act.ndim, int)
    out_shape[layout[2].index("C")] = -1
    expected = total * act_scale.reshape(shape) * weight_scale.reshape(out_shape)
    got = products.quantized_dot(site, act, stored, "int8", scale_of(absmax), pad_single=False, target=HERE)
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-7)
    np.testing.assert_allclose(products.restore(site, stored), weight_codes * weight_scale, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_keep_their_dtype(dtype):
    act, weight = array(5, 12, seed=1).astype(dtype), array(12, 6, seed=2).astype(dtype)
    site = only_site(lambda x, w: x @ w, act, weight)
    stored = products.store(site, weight, "int8", "channel")
    got = products.quantized_dot(site, act, stored, "int8", None, pad_single=False, target=HERE)
    assert got.dtype == jnp.dtype(dtype)
    assert products.restore(site, stored).dtype == jnp.dtype(dtype)
    (codes, scale), (weight_codes, weight_scale) = quantized(act, (1,)), quantized(weight, (0,))
    expected = (codes @ weight_codes) * scale * weight_scale
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-3)


def test_large_activations_of_float16_do_not_overflow():
    act, weight = jnp.full((3, 4), 60000.0, jnp.float16), jnp.full((4, 2), 1e-4, jnp.float16)
    site = only_site(lambda x, w: x @ w, act, weight)
    got = products.quantized_dot(
        site, act, products.store(site, weight, "int8", "channel"), "int8", None, pad_single=False, target=HERE
    )
    np.testing.assert_allclose(np.asarray(got, np.float64), 24.0, rtol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_wider_than_its_operands(dtype):
    act, weight = array(5, 12, seed=1).astype(dtype), array(12, 6, seed=2).astype(dtype)
    site = only_site(lambda x, w: lax.dot(x, w, preferred_element_type=jnp.float32), act, weight)
    stored = products.store(site, weight, "int8", "channel")
    assert products.quantized_dot(site, act, stored, "int8", None, pad_single=False, target=HERE).dtype == jnp.float32


def test_zero_rows_and_channels_are_exactly_zero():
    act, weight = array(4, 6).at[1].set(0), array(6, 5, seed=1).at[:, 2].set(0)
    site = only_site(lambda x, w: x @ w, act, weight)
    stored = products.store(site, weight, "int8", "channel")
    got = np.asarray(products.quantized_dot(site, act, stored, "int8", None, pad_single=False, target=HERE))
    assert (got[1] == 0).all()
    assert (got[:, 2] == 0).all()
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("rows", "depth"), [(4, 6), (200, 64)])  # few, and so many that XLA:CPU compares vectors
def test_a_broken_row_stays_broken_and_alone(rows, depth):
    act, weight = array(rows, depth).at[1, 3].set(jnp.nan), array(depth, 5, seed=1)
    site = only_site(lambda x, w: x @ w, act, weight)
    stored = products.store(site, weight, "int8", "channel")
    got = np.asarray(products.quantized_dot(site, act, stored, "int8", None, pad_single=False, target=HERE))
    assert np.isnan(got[1]).all()
    assert np.isfinite(np.delete(got, 1, axis=0)).all()


@pytest.mark.parametrize(
    ("fn", "act", "weight", "reason"),
    [
        (lambda x, w: x @ w, (3, 4), (4, 5), None),
        (
            lambda x, w: lax.conv_general_dilated(w, x, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")),
            (2, 4, 5), (3, 9, 4), "left operand",
        ),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2
            ),
            (4, 9, 4), (3, 4, 6), "batch groups",
        ),
        (lambda x, w: jnp.take(w, jnp.zeros(3, int), axis=0) + jnp.sum(x), (3, 4), (7, 5), None),
        (lambda x, w: x @ w, (3, 4), (4, 0), r"its weight, of shape [4, 0], has no elements"),
        (lambda x, w: x @ w, (3, 0), (0, 5), r"its weight, of shape [0, 5], has no elements"),
        (lambda x, w: lax.ragged_dot(x, w, jnp.asarray([1, 2])), (3, 4), (2, 4, 5), "ragged_dot"),
    ],
)  # fmt: skip
def test_what_is_unsupported_says_why(fn, act, weight, reason):
    found = eligibility.unsupported(only_site(fn, array(*act), array(*weight)))
    assert found is None if reason is None else reason in found


def test_integers_are_unsupported():
    act, weight = array(3, 4), array(4, 5)
    for a, w, reason in ((act.astype(int), weight.astype(int), "weight is int32"),):
        assert reason in eligibility.unsupported(only_site(lambda x, w: x @ w, a, w))
    mixed = only_site(lambda x, w: x.astype(jnp.int8) @ w.astype(jnp.int8), act, weight)
    assert eligibility.unsupported(mixed) is not None
    assert eligibility.unsupported(only_site(lambda x, w: (x @ x.T) + jnp.sum(w), act, weight)) == (
        "dot_general of two activations"
    )


def test_dynamic_scales_are_per_row_and_example():
    act = jnp.asarray([[1.0, -2.0], [100.0, 50.0]])
    site = only_site(lambda x, w: x @ w, act, array(2, 3))
    scale = products.activation_scale(site, act, "int8", None)
    np.testing.assert_allclose(scale, [[2 / 127], [100 / 127]], rtol=1e-6)
    np.testing.assert_array_equal(encode(act, scale, FORMATS["int8"]), [[64, -127], [127, 64]])
    assert products.row_count(site) == 2
    assert products.activation_axes(site) == (1,)


# Products of two activations.

PAIRS = {
    "scores": ("bhqd,bhkd->bhqk", (((3,), (3,)), ((0, 1), (0, 1))), (2, 3, 5, 8), (2, 3, 4, 8)),
    "heads inside": ("bqhd,bkhd->bhqk", (((3,), (3,)), ((0, 2), (0, 2))), (2, 5, 3, 8), (2, 4, 3, 8)),
    "mixing": ("bhqk,bhkd->bhqd", (((3,), (2,)), ((0, 1), (0, 1))), (2, 3, 5, 4), (2, 3, 4, 8)),
    "batch axes elsewhere": ("qdb,dbk->bqk", (((1,), (0,)), ((2,), (1,))), (5, 8, 3), (8, 3, 4)),
    "two axes summed over": ("qij,kji->qk", (((1, 2), (2, 1)), ((), ())), (5, 3, 4), (6, 4, 3)),
    "several free axes": ("acd,bde->acbe", (((2,), (1,)), ((), ())), (2, 3, 8), (4, 8, 5)),
    "one row": ("qd,dk->qk", (((1,), (0,)), ((), ())), (1, 8), (8, 5)),
    "one column": ("qd,d->q", (((1,), (0,)), ((), ())), (3, 8), (8,)),
    "vectors": ("d,d->", (((0,), (0,)), ((), ())), (8,), (8,)),
    "nothing summed over": ("q,k->qk", (((), ()), ((), ())), (4,), (5,)),
}  # fmt: skip


def pair_site(numbers, left, right):
    specs = {name: TensorSpec(side.shape, side.dtype.name) for name, side in (("left", left), ("right", right))}
    (site,) = find_sites(trace(lambda w, a, b: lax.dot_general(a, b, numbers), {"unused": array(1)}, specs))
    return site


@pytest.mark.parametrize("name", PAIRS)
def test_a_product_of_two_activations(name):
    equation, numbers, left_shape, right_shape = PAIRS[name]
    spread = lambda shape, seed: array(*shape, seed=seed) * jnp.exp(2 * array(*shape[:-1], 1, seed=seed + 9))  # noqa: E731
    left, right = spread(left_shape, 1), spread(right_shape, 2)
    (codes, scale), (right_codes, right_scale) = (
        quantized(side, tuple(axes)) for side, axes in zip((left, right), numbers[0], strict=True)
    )
    expected = np.einsum(equation, codes * scale, right_codes * right_scale)
    site = pair_site(numbers, left, right)
    for pad in (False, True):
        got = products.quantized_dot_pair(site, left, right, "int8", pad_single=pad, target=HERE)
        assert got.shape == site.output.shape
        np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6 * np.abs(expected).max())
    jaxpr = str(
        jax.make_jaxpr(lambda a, b: products.quantized_dot_pair(site, a, b, "int8", pad_single=False, target=HERE))(
            left, right
        )
    )
    assert jaxpr.count("preferred_element_type=int32") == 1
    free = [size for axis, size in enumerate(left_shape) if axis not in (*numbers[0][0], *numbers[1][0])]
    assert products.row_count(site) == np.prod(free)


MIXING = PAIRS["mixing"][1]


@jax.jit
def mixed(left, right):
    return products.quantized_dot_pair(
        pair_site(MIXING, left, right), left, right, "int8", pad_single=False, target=HERE
    )


@given(st.integers(0, 2**31), st.integers(-30, 30))
def test_rounding_errs_by_half_a_step_and_rows_do_not_see_each_other(seed, exponent):
    left, right = (array(*shape, seed=seed + k) for k, shape in enumerate(PAIRS["mixing"][2:]))
    got = np.asarray(mixed(left, right), np.float64)
    exact = [np.asarray(side, np.float64) for side in (left, right)]
    steps = [np.abs(exact[0]).max(-1, keepdims=True) / 127, np.abs(exact[1]).max(-2, keepdims=True) / 127]
    bound = np.abs(exact[0]) @ np.broadcast_to(steps[1] / 2, right.shape)
    bound += np.broadcast_to(steps[0] / 2, left.shape) @ (np.abs(exact[1]) + steps[1] / 2)
    assert (np.abs(got - exact[0] @ exact[1]) <= bound * 1.0001 + 1e-6).all()
    # A power of two changes scales only, and those of one row.
    changed = np.asarray(mixed(left.at[1, 2, 3].multiply(2.0**exponent), right), np.float64)
    np.testing.assert_array_equal(changed[1, 2, 3], got[1, 2, 3] * 2.0**exponent)
    changed[1, 2, 3] = got[1, 2, 3]
    np.testing.assert_array_equal(changed, got)


def test_zeros_and_broken_values_of_two_activations_stay_where_they_are():
    left, right = (array(*shape, seed=k) for k, shape in enumerate(PAIRS["mixing"][2:]))
    got = np.asarray(mixed(left.at[0, 1, 2].set(0), right.at[1, 0, :, 3].set(0)))
    assert (got[0, 1, 2] == 0).all()
    assert (got[1, 0, :, 3] == 0).all()
    assert (got != 0).sum() == got.size - 8 - 5
    got = np.asarray(mixed(left.at[0, 1, 2, 0].set(jnp.nan), right.at[1, 0, 1, 3].set(jnp.nan)))
    assert np.isnan(got[0, 1, 2]).all()
    assert np.isnan(got[1, 0, :, 3]).all()
    assert np.isnan(got).sum() == 8 + 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_products_of_two_activations_keep_their_dtype(dtype):
    left, right = (array(*shape, seed=k).astype(dtype) * 50 for k, shape in enumerate(PAIRS["mixing"][2:]))
    got = mixed(left, right)
    assert got.dtype == jnp.dtype(dtype)
    (codes, scale), (right_codes, right_scale) = quantized(left, (3,)), quantized(right, (2,))
    expected = (codes * scale) @ (right_codes * right_scale)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=1)


def rule(options):
    return Recipe.parse(f'[[quantize]]\nsites = ".*"\n{options}', name="test").quantize[0]


@pytest.mark.parametrize(
    ("fn", "options", "reason"),
    [
        (lambda a, b: a @ b, 'products = "all"', None),
        (lambda a, b: a @ b, "", "products = 'weights' leaves float"),
        (lambda a, b: a @ b, 'products = "all"\nactivations = "none"', "activations = 'none' leaves float"),
        (lambda a, b: a.astype(jnp.int8) @ b.astype(jnp.int8), 'products = "all"', "one of them int8"),
        (lambda a, b: lax.ragged_dot(a, b[None], jnp.asarray([2])), 'products = "all"', "ragged_dot_general of two"),
        (
            lambda a, b: lax.conv_general_dilated(
                a[None], b[:, None], (1,), "SAME", dimension_numbers=("NWC", "IWO", "NWC")
            ),
            'products = "all"', "conv_general_dilated of two activations",
        ),
    ],
)  # fmt: skip
def test_which_products_of_two_activations_are_left(fn, options, reason):
    specs = {"a": TensorSpec((3, 4), "float32"), "b": TensorSpec((4, 5), "float32")}
    (site,) = find_sites(trace(lambda w, a, b: fn(a, b), {"unused": array(1)}, specs))
    found = eligibility.unsupported(site, rule(options))
    assert found is None if reason is None else reason in found


def test_sums_that_int32_may_not_hold_stay_float():
    ones = jax.ShapeDtypeStruct((2, 133_144), jnp.float32)
    site = pair_site((((1,), (1,)), ((), ())), ones, ones)
    assert eligibility.float_reason(site, rule('products = "all"'), Target("cpu")) == ""
    ones = jax.ShapeDtypeStruct((2, 133_145), jnp.float32)
    site = pair_site((((1,), (1,)), ((), ())), ones, ones)
    assert "it sums over 133145 products, which int32 may not hold, so it stays float" in eligibility.float_reason(
        site, rule('products = "all"'), Target("cpu")
    )
    small = rule('products = "all"\nweights = "int4"\nactivations = "int4"')
    assert eligibility.float_reason(site, small, Target("cpu")) == ""
    specs = {"x": TensorSpec((2, 133_145), "float32")}
    (site,) = find_sites(trace(lambda w, x: x @ w["w"], {"w": jnp.ones((133_145, 1))}, specs))
    assert "int32 may not hold, so only the weight is stored small" in eligibility.float_reason(
        site, rule(""), Target("cpu")
    )


def dots_of(fn, *args):
    return [eqn for eqn in jax.make_jaxpr(fn)(*args).eqns if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize(("depth", "expected"), [(5, 32), (16, 32), (31, 32), (32, 32), (40, 40)])
def test_short_sums_of_integers_are_filled_up_with_zeros(depth, expected):
    """Some kernels of XLA's for GPUs count a sum of 16 int8 products or fewer twice."""
    act, weight = array(6, depth, seed=1), array(depth, 7, seed=2)
    site = only_site(lambda x, w: x @ w, act, weight)
    stored = products.store(site, weight, "int8", "channel")
    product = lambda a: products.quantized_dot(site, a, stored, "int8", None, pad_single=False, target=HERE)  # noqa: E731
    (dot,) = dots_of(product, act)
    assert [var.aval.shape for var in dot.invars] == [(6, expected), (expected, 7)]
    (codes, scale), (weight_codes, weight_scale) = quantized(act, (1,)), quantized(weight, (0,))
    np.testing.assert_allclose(product(act), (codes @ weight_codes) * scale * weight_scale, rtol=3e-6, atol=1e-7)
    in_place = lambda a: products.multiply_in_place(  # noqa: E731
        site,
        (encode(a, jnp.float32(scale), FORMATS["int8"]), stored.codes()),
        (jnp.float32(scale), stored.scale),
        (0, 1),
    )
    (dot,) = dots_of(in_place, act)
    assert [var.aval.shape for var in dot.invars] == [(6, expected), (expected, 7)]
    np.testing.assert_allclose(in_place(act), product(act), rtol=1e-6, atol=1e-7)


def test_sums_of_unknown_length_are_filled_up_for_any():
    size = jax.export.symbolic_shape("k")[0]
    filled = jax.eval_shape(lambda c: products._deepened(c, (1,)), jax.ShapeDtypeStruct((4, size), jnp.int8))
    assert filled.shape == (4, size + 31)
    several = products._deepened(jnp.ones((2, 3, 5), jnp.int8), (1, 2))
    assert several.shape == (2, 7, 5)
    assert int(several.sum()) == 30


@pytest.mark.parametrize("name", ["x @ W", "x @ W.T", "batched"])
@pytest.mark.parametrize("format_name", ["int8", "fp8_e4m3"])
def test_a_weight_that_lies_by_columns_is_multiplied_as_it_lies(name, format_name):
    functions = {
        "x @ W": (lambda x, w: x @ w, (4, 48), (48, 40)),
        "x @ W.T": (lambda x, w: x @ w.T, (4, 48), (40, 48)),
        "batched": (lambda x, w: jnp.einsum("bmk,bkn->bmn", x, w), (3, 4, 48), (3, 48, 40)),
    }
    fn, act_shape, weight_shape = functions[name]
    act, weight = array(*act_shape, seed=1), array(*weight_shape, seed=2)
    site = only_site(fn, act, weight)
    weight = lay_out(weight, site.layout)

    def product(a, stored):
        return products.quantized_dot(site, a, stored, format_name, None, pad_single=False, target=HERE)

    by_rows = products.store(site, weight, format_name, "channel")
    by_columns = products.for_product(by_rows)
    assert by_columns.values.shape[-2:] == (40, 48)
    assert by_columns.shape == by_rows.shape
    np.testing.assert_array_equal(products.restore(site, by_columns), products.restore(site, by_rows))
    jaxpr = jax.make_jaxpr(product)(act, by_columns).jaxpr
    (dot,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general")
    assert dot.invars[1] in jaxpr.invars  # no transpose in between
    exact = format_name == "int8"
    np.testing.assert_allclose(product(act, by_columns), product(act, by_rows), rtol=0 if exact else 1e-6, atol=0)
    packed = products.store(site, weight, "int4", "channel")
    assert products.for_product(packed) is packed


@pytest.mark.parametrize(("sizes", "operands"), [((4, 8, 8), "bfloat16"), ((4, 32, 40), "float8_e4m3fn")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_of_small_matrices_is_multiplied_as_bfloat16(sizes, operands, dtype):
    """XLA multiplies those in float16 on GPUs, where 448 by 448 is infinite."""
    rows, depth, columns = sizes
    act, weight = array(rows, depth, seed=1).astype(dtype), array(depth, columns, seed=2).astype(dtype)
    site = only_site(lambda x, w: x @ w, act, weight)
    stored = products.store(site, weight, "fp8_e4m3", "channel")
    product = lambda a: products.quantized_dot(site, a, stored, "fp8_e4m3", None, pad_single=False, target=HERE)  # noqa: E731
    (dot,) = dots_of(product, act)
    assert [var.aval.dtype.name for var in dot.invars] == [operands] * 2
    assert dot.outvars[0].aval.dtype == (dtype if operands == "float8_e4m3fn" else "float32")
    got = product(act)
    assert got.dtype == jnp.dtype(dtype)
    exact = np.asarray(act, np.float64) @ np.asarray(weight, np.float64)
    assert np.abs(np.asarray(got, np.float64) - exact).max() < 0.06 * np.abs(exact).max()


def test_where_integers_have_no_convolution_it_stays_float():
    fn = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    site = only_site(fn, array(2, 6, 6, 4), array(3, 3, 4, 5))
    (rule,) = Recipe.parse('[[quantize]]\nsites = ".*"', name="test").quantize
    assert eligibility.float_reason(site, rule, Target("cpu")) == ""
    assert eligibility.float_reason(site, rule, Target("gpu")).startswith(
        "the platform 'gpu' has no convolution of integers"
    )


def test_sums_wait_for_their_conversion_where_a_library_multiplies(monkeypatch):
    monkeypatch.setattr(products, "LIBRARY_ROWS", 8)
    site = only_site(lambda x, w: x @ w, array(8, 40), array(40, 7))
    stored = products.store(site, array(40, 7, seed=2), "int8", "channel")
    for platform, rows, barriers in (("gpu", 7, 0), ("gpu", 8, 1), ("cpu", 8, 0)):
        product = functools.partial(products.quantized_dot, site, pad_single=False, target=Target(platform))
        jaxpr = str(jax.make_jaxpr(lambda a, product=product: product(a, stored, "int8", None))(array(rows, 40)))
        assert jaxpr.count("optimization_barrier") == barriers


def test_a_grouped_convolutions_two_matrices_hold_the_same_columns():
    """Groups side by side, as codes are stored, or apart, as each group multiplies its own channels."""
    kernel = array(3, 2, 2, 6)  # two positions by two, two channels of each of three groups, six outputs
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(w, x):
        return lax.conv_general_dilated(x, w["k"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=3)

    (site,) = find_sites(trace(fn, {"k": kernel}, {"x": TensorSpec(("batch", 5, 4, 6), "float32")}))
    flat = np.asarray(kernel).reshape(12, 6)
    np.testing.assert_array_equal(matrix.code_matrix(site, kernel), flat)
    apart = matrix.weight_matrix(site, kernel)
    np.testing.assert_array_equal(apart, [flat[:, 2 * group : 2 * group + 2] for group in range(3)])
    np.testing.assert_array_equal(matrix.weight_operand(site, apart), kernel)
    np.testing.assert_array_equal(matrix.as_stored(site, apart), flat)
    np.testing.assert_array_equal(matrix.from_stored(site, jnp.asarray(flat)), apart)
