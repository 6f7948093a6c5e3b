"""Convolutions of codes hand codes on, and the numbers stay the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.kernels import convolution
from lepton_xla.kernels.convolution import Geometry
from lepton_xla.passes.alternatives.fusing import biased, fuse
from lepton_xla.passes.alternatives.passing import pass_codes
from lepton_xla.quant import quantize

POINT, AROUND = Geometry((1, 1)), Geometry((3, 3), padding=((1, 1), (1, 1)))


def operands(channels=6):
    random = np.random.default_rng(0)
    kinds = {"wide": channels, "each": 9, "narrow": channels}
    weights = {
        name: quantize(jnp.asarray(random.standard_normal((terms, channels)) / 2, jnp.float32), "int8")
        for name, terms in kinds.items()
    }
    x = jnp.asarray(random.standard_normal((2, 5, 4, channels)), jnp.float32)
    return x, weights, jnp.asarray([3.0, 2.0, 4.0], jnp.float32)


def conv(x, weight, geometry, range_=None):
    return convolution.convolve_codes(x, weight, geometry, None if range_ is None else range_ / 127)


def block(x, w, ranges, last=None):
    """As MobileNetV2 has them."""
    y = nn.relu6(conv(x, w["wide"], POINT, ranges[0]))
    y = nn.relu6(biased(conv(y, w["each"], AROUND, ranges[1]), ranges[0] + jnp.zeros(y.shape[-1])))
    return conv(y, w["narrow"], POINT, ranges[2]) + x


def read_twice(x, w, ranges):
    y = nn.relu6(conv(x, w["wide"], POINT, ranges[0]))
    return conv(y, w["each"], AROUND, ranges[1]) + y


def an_output(x, w, ranges):
    y = nn.relu6(conv(x, w["wide"], POINT, ranges[0]))
    return y, conv(y, w["each"], AROUND, ranges[1])


def dynamic(x, w, ranges):
    return conv(nn.relu6(conv(x, w["wide"], POINT, ranges[0])), w["each"], AROUND)


def two_scales(x, w, ranges):
    y = conv(x, w["wide"], POINT, ranges[0])
    return conv(y, w["each"], AROUND, ranges[1]) + conv(y, w["narrow"], POINT, ranges[2])


def one_scale(x, w, ranges):
    y, scale = conv(x, w["wide"], POINT, ranges[0]), jnp.reshape(ranges[1] / 127, (1,))
    first, second = ((w["each"], AROUND), (w["narrow"], POINT))
    return convolution.convolve_codes(y, *first, scale) + convolution.convolve_codes(y, *second, scale)


def gated(x, w, ranges):
    """As EfficientNet has it."""
    y = nn.relu6(conv(x, w["wide"], POINT, ranges[0]))
    y = nn.relu6(conv(y, w["each"], AROUND, ranges[1]))
    return conv(nn.sigmoid(y.mean((1, 2), keepdims=True)) * y, w["narrow"], POINT, ranges[2]) + x


def gated_only(x, w, ranges):
    """What is gated is the only reader of a convolution's floats: they are not the codes that it would round."""
    y = conv(x, w["wide"], POINT, ranges[0])
    return conv(y * x[:, :1, :1], w["narrow"], POINT, ranges[2])


def gated_and_read(x, w, ranges):
    y = conv(x, w["wide"], POINT, ranges[0]) * x[:, :1, :1]
    return conv(y, w["narrow"], POINT, ranges[2]) + y


def gated_each(x, w, ranges):
    """With a filter a channel, and with the scale of each example: not by the kernel."""
    return conv(x * x[:, :1, :1], w["each"], AROUND, ranges[2]) + conv(x * x[:, :1, 1:2], w["narrow"], POINT)


def kinds(fn, *given):
    """Of the images that convolutions read and write."""
    found = [eqn for eqn in jax.make_jaxpr(fn)(*given).jaxpr.eqns if eqn.primitive.name == "integer_convolution"]
    return [(str(eqn.invars[0].aval.dtype), str(eqn.outvars[0].aval.dtype)) for eqn in found]


FLOATS, FIRST, MIDDLE, LAST = (
    ("float32", "float32"), ("float32", "uint8"), ("uint8", "uint8"), ("uint8", "float32"),
)  # fmt: skip
CASES = [
    (block, [FIRST, MIDDLE, LAST]),
    (lambda *given: block(block(*given), *given[1:]), [FIRST, MIDDLE, LAST] * 2),
    (read_twice, [FLOATS, FLOATS]),
    (an_output, [FLOATS, FLOATS]),
    (dynamic, [FLOATS, FLOATS]),
    (two_scales, [FLOATS] * 3),
    (one_scale, [FIRST, LAST, LAST]),
    (gated, [FIRST, LAST, FLOATS]),
    (gated_only, [FLOATS, FLOATS]),
    (gated_and_read, [FLOATS, FLOATS]),
    (gated_each, [FLOATS, FLOATS]),
]


@pytest.mark.parametrize(("fn", "expected"), CASES)
def test_what_is_passed_on(fn, expected):
    given = operands()
    fused = fuse(fn)
    made = pass_codes(fused)
    assert kinds(made, *given) == expected
    assert kinds(fused, *given) == [FLOATS] * len(expected)
    for got, wanted in zip(*(jax.tree.leaves(jax.jit(each)(*given)) for each in (made, fused)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_by_kernels_too(kernels):
    """What they compute with floats in between: what has a bias is not in the middle between two codes here."""
    given = operands(38)
    fused = fuse(block)
    np.testing.assert_array_equal(jax.jit(pass_codes(fused))(*given), jax.jit(fused)(*given))


GATES = [(gated, 1), (gated_only, 1), (gated_and_read, 0), (gated_each, 0), (block, 0)]


@pytest.mark.parametrize(("fn", "gates"), GATES)
def test_gates_are_taken_by_kernels(kernels, fn, gates):
    given = operands(38)
    made = pass_codes(fuse(fn))
    equations = jax.make_jaxpr(made)(*given).jaxpr.eqns
    taken = [eqn for eqn in equations if eqn.primitive.name == "integer_convolution" and eqn.invars[5].aval.ndim == 4]
    assert len(taken) == gates
    got, wanted = jax.jit(made)(*given), jax.jit(fn)(*given)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)  # XLA contracts sums of products
