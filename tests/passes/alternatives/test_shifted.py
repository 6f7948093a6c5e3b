"""Grouped convolutions as shifted multiply-adds, and products of single rows, against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lepton_xla.passes.alternatives import shifted, single_row


def equation(fn, *operands):
    """The only equation of a function of arrays."""
    (eqn,) = jax.make_jaxpr(fn)(*operands).eqns
    return eqn


def convolved(image, window, strides, padding, lhs_dilation, rhs_dilation, groups):
    """A convolution of [batch, channels, ...] by [outputs, inputs, ...], position by position in float64."""
    for axis, (dilation, (low, high)) in enumerate(zip(lhs_dilation, padding, strict=True), start=2):
        spread = np.zeros((*image.shape[:axis], (image.shape[axis] - 1) * dilation + 1, *image.shape[axis + 1 :]))
        spread[(slice(None),) * axis + (slice(None, None, dilation),)] = image
        widths = [(0, 0)] * image.ndim
        widths[axis] = (max(low, 0), max(high, 0))
        spread = np.pad(spread, widths)
        keep = slice(max(-low, 0), spread.shape[axis] - max(-high, 0))
        image = spread[(slice(None),) * axis + (keep,)]
    sizes = window.shape[2:]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(sizes, rhs_dilation, strict=True)]
    counts = [
        (image.shape[axis + 2] - reach[axis]) // strides[axis] + 1 if image.shape[axis + 2] >= reach[axis] else 0
        for axis in range(len(sizes))
    ]
    out = np.zeros((image.shape[0], window.shape[0], *counts))
    depth, each = window.shape[1], window.shape[0] // groups
    for place in itertools.product(*map(range, counts)):
        steps = zip(place, strides, reach, rhs_dilation, strict=True)
        cut = tuple(slice(at * stride, at * stride + end, dilation) for at, stride, end, dilation in steps)
        seen = image[(slice(None), slice(None), *cut)]
        for output in range(window.shape[0]):
            group = output // each
            part = seen[:, group * depth : (group + 1) * depth]
            out[(slice(None), output, *place)] = (part * window[output]).sum(tuple(range(1, part.ndim)))
    return out


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    several = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    groups, depth, each = (
        draw(st.integers(2, 4)),
        draw(st.sampled_from([1, 1, 1, 2])),
        draw(st.sampled_from([1, 1, 2, 3])),
    )
    if (groups, depth) == (4, 2):
        depth = 1
    order = lambda: tuple(draw(st.permutations(range(rank + 2))))  # noqa: E731
    return {
        "image": (draw(st.integers(1, 2)), groups * depth, *several(2, 5)),
        "window": (groups * each, depth, *several(1, 3)),
        "strides": several(1, 3),
        "padding": tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(rank)),
        "lhs_dilation": several(1, 2),
        "rhs_dilation": several(1, 2),
        "specs": (order(), order(), order()),
        "groups": groups,
        "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16", "int8"])),
    }


@settings(max_examples=20)
@given(convolutions(), st.booleans())
def test_a_grouped_convolution_is_the_sum_over_positions(case, channels_last):
    random = np.random.default_rng(0)
    draw = lambda shape: random.integers(-8, 8, shape).astype(np.float64)  # noqa: E731
    image, window = draw(case["image"]), draw(case["window"])
    geometry = (case["strides"], case["padding"], case["lhs_dilation"], case["rhs_dilation"], case["groups"])
    numbers = lax.ConvDimensionNumbers(*case["specs"])
    laid = [
        jnp.asarray(np.transpose(array, np.argsort(spec)), case["dtype"])
        for array, spec in zip((image, window), numbers, strict=False)
    ]

    def convolve(image, window):
        return lax.conv_general_dilated(
            image,
            window,
            case["strides"],
            case["padding"],
            case["lhs_dilation"],
            case["rhs_dilation"],
            numbers,
            case["groups"],
            preferred_element_type=jnp.int32 if case["dtype"] == "int8" else jnp.float32,
        )

    eqn = equation(convolve, *laid)
    if not shifted.fits(eqn):
        assert 0 in eqn.outvars[0].aval.shape
        return
    expected = np.transpose(convolved(image, window, *geometry), np.argsort(numbers.out_spec))
    dtype = eqn.outvars[0].aval.dtype
    found = jax.jit(lambda *at: shifted.convolve(eqn.params, *at, dtype, channels_last=channels_last))(*laid)
    assert (found.shape, found.dtype) == (eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)  # small integers: every sum is exact


def depthwise(image, window, **changes):
    return lax.conv_general_dilated(
        image,
        window,
        **{
            "window_strides": (1, 1),
            "padding": "SAME",
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
            "feature_group_count": image.shape[3],
            **changes,
        },
    )


@pytest.mark.parametrize(("dtype", "worst"), [("float32", 3e-7), ("bfloat16", 4e-3), ("float16", 5e-4)])
def test_sums_are_as_exact_as_the_result(dtype, worst):
    random = np.random.default_rng(0)
    image = jnp.asarray(random.standard_normal((1, 7, 7, 8)), dtype)
    window = jnp.asarray(random.standard_normal((5, 5, 1, 8)), dtype)
    found = shifted.convolve(equation(depthwise, image, window).params, image, window, image.dtype)
    assert found.dtype == dtype
    wide = [np.asarray(array, np.float64) for array in (image, window)]
    geometry = ((1, 1), ((2, 2), (2, 2)), (1, 1), (1, 1), 8)
    expected = convolved(wide[0].transpose(0, 3, 1, 2), wide[1].transpose(3, 2, 0, 1), *geometry).transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(found, np.float64) - expected).max() < worst * np.abs(expected).max()


@pytest.mark.parametrize(
    ("image", "window", "changes"),
    [
        ((2, 4, 4, 4), (3, 3, 4, 4), {"feature_group_count": 1}),
        ((2, 4, 4, 4), (3, 3, 4, 4), {"feature_group_count": 1, "batch_group_count": 2}),
        ((2, 4, 4, 4), (12, 12, 1, 4), {}),  # more terms than are worth compiling
        ((2, 4, 4, 64), (3, 3, 32, 4), {"feature_group_count": 2}),
        ((2, 4, 4, 4), (3, 3, 1, 4), {"padding": "VALID", "rhs_dilation": (4, 4)}),  # no outputs
    ],
)
def test_others_are_left_to_xla(image, window, changes):
    assert not shifted.fits(equation(lambda *at: depthwise(*at, **changes), jnp.zeros(image), jnp.zeros(window)))
    complex_image = jnp.zeros((2, 4, 4, 4), jnp.complex64)
    assert not shifted.fits(equation(depthwise, complex_image, jnp.zeros((3, 3, 1, 4), jnp.complex64)))


@pytest.mark.parametrize(
    ("left", "right", "numbers"),
    [
        ((1, 8), (8, 5), (((1,), (0,)), ((), ()))),
        ((8,), (8, 5), (((0,), (0,)), ((), ()))),
        ((8, 5), (8,), (((0,), (0,)), ((), ()))),
        ((5, 8), (1, 1, 8), (((1,), (2,)), ((), ()))),
        ((3, 1, 8), (3, 8, 5), (((2,), (1,)), ((0,), (0,)))),
        ((2, 8, 5), (2, 8, 1), (((1,), (1,)), ((0,), (0,)))),
        ((1, 1, 4, 2), (4, 2, 3, 2), (((2, 3), (0, 1)), ((), ()))),
    ],
)
def test_a_single_row_is_multiplied_as_two_or_in_float32(left, right, numbers):
    random = np.random.default_rng(0)
    operands = [jnp.asarray(random.integers(-4, 4, shape), jnp.bfloat16) for shape in (left, right)]
    eqn = equation(lambda *at: lax.dot_general(*at, numbers, preferred_element_type=jnp.float32), *operands)
    assert single_row.fits(eqn)
    assert "pad" in str(jax.make_jaxpr(lambda *at: single_row.padded(eqn, *at))(*operands))
    wide = [jnp.asarray(operand, jnp.float32) for operand in operands]
    for way in (single_row.padded, single_row.widened):
        found = way(eqn, *operands)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, lax.dot_general(*wide, numbers))


@pytest.mark.parametrize(
    ("left", "right", "dtype"),
    [((2, 8), (8, 5), "bfloat16"), ((1, 8), (8, 5), "float32"), ((1, 8), (8, 1), "bfloat16"), ((8,), (8,), "bfloat16")],
)
def test_other_products_are_left_to_xla(left, right, dtype):
    assert not single_row.fits(equation(jnp.dot, jnp.zeros(left, dtype), jnp.zeros(right, dtype)))
