"""What follows a convolution by a kernel becomes part of it, and the function stays the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.kernels import convolution
from lepton_xla.kernels.convolution import Epilogue, Geometry
from lepton_xla.passes.alternatives.fusing import fuse

GEOMETRY = Geometry((1, 1))


def conv(x, weight):
    return convolution.convolve(x, weight, GEOMETRY)


def biased(x, weight, bias):
    return conv(x, weight) + jnp.reshape(bias, (1, 1, 1, -1))


def gated(x):
    return x * jax.nn.sigmoid(x)


def twice_read(x, w, b, r):
    y = biased(x, w, b)
    return nn.relu(y) + jnp.sum(y)


# A function of image, weight, bias and residual; the epilogue that its convolution gets; whether that has a bias and a
# residual; and the names of elementwise operations that are left.
CASES = {
    "bias": (lambda x, w, b, r: biased(x, w, b), Epilogue(), (True, False), set()),
    "relu": (lambda x, w, b, r: nn.relu(biased(x, w, b)), Epilogue("clamp", 0.0), (True, False), set()),
    "relu6": (lambda x, w, b, r: nn.relu6(biased(x, w, b)), Epilogue("clamp", 0.0, 6.0), (True, False), set()),
    "clip": (
        lambda x, w, b, r: jax.lax.clamp(-1.0, biased(x, w, b), 2.0),
        Epilogue("clamp", -1.0, 2.0), (True, False), set(),
    ),
    "no bias": (lambda x, w, b, r: nn.relu(conv(x, w)), Epilogue("clamp", 0.0), (False, False), set()),
    "silu": (lambda x, w, b, r: nn.silu(biased(x, w, b)), Epilogue("silu"), (True, False), set()),
    "swish by hand": (lambda x, w, b, r: gated(biased(x, w, b)), Epilogue("silu"), (True, False), set()),
    "swish by division": (
        lambda x, w, b, r: (lambda y: y / (1 + jnp.exp(-y)))(biased(x, w, b)), Epilogue("silu"), (True, False), set(),
    ),
    "residual": (lambda x, w, b, r: r + biased(x, w, b), Epilogue(), (True, True), set()),
    "residual, then relu": (
        lambda x, w, b, r: nn.relu(biased(x, w, b) + r), Epilogue("clamp", 0.0), (True, True), set(),
    ),
    "relu, then residual": (
        lambda x, w, b, r: nn.relu(biased(x, w, b)) + r, Epilogue("clamp", 0.0, add_first=False), (True, True), set(),
    ),
    "relu, residual, relu": (
        lambda x, w, b, r: nn.relu(nn.relu(biased(x, w, b)) + r),
        Epilogue("clamp", 0.0, add_first=False), (True, True), {"max"},
    ),
    "two residuals": (lambda x, w, b, r: biased(x, w, b) + r + r, Epilogue(), (True, True), {"add"}),
    "another activation": (lambda x, w, b, r: jnp.tanh(biased(x, w, b)), Epilogue(), (True, False), {"tanh"}),
    "relu and silu": (
        lambda x, w, b, r: nn.silu(nn.relu(biased(x, w, b))),
        Epilogue("clamp", 0.0), (True, False), {"logistic", "mul"},
    ),
    "read twice": (twice_read, Epilogue(), (True, False), {"max", "add", "reduce_sum"}),
    "added to itself": (lambda x, w, b, r: (lambda y: y + y)(conv(x, w)), Epilogue(), (False, False), {"add"}),
    "a bound that is computed": (
        lambda x, w, b, r: jnp.maximum(conv(x, w), r[0, 0, 0, 0]), Epilogue(), (False, False), {"max"},
    ),
    "empty bounds": (
        lambda x, w, b, r: jax.lax.max(jax.lax.min(conv(x, w), -1.0), 1.0),
        Epilogue("clamp", high=-1.0), (False, False), {"max"},
    ),
    "bounds apart": (
        lambda x, w, b, r: jax.lax.clamp(2.0, jax.lax.clamp(0.0, conv(x, w), 1.0), 6.0),
        Epilogue("clamp", 0.0, 1.0), (False, False), {"clamp"},
    ),
}  # fmt: skip


def operands(size=(2, 3, 4, 5), columns=7):
    random = np.random.default_rng(0)
    shapes = (size, (1, 1, size[3], columns), (columns,), (*size[:3], columns))
    return [jnp.asarray(random.standard_normal(shape).astype(np.float32)) for shape in shapes]


def flat(jaxpr):
    """All equations, those inside of others too."""
    for eqn in jaxpr.eqns:
        inner = [value.jaxpr for value in eqn.params.values() if hasattr(value, "jaxpr")]
        if eqn.primitive.name in convolution.PRIMITIVES or not inner:
            yield eqn
        for each in inner:
            yield from flat(each)


@pytest.mark.parametrize(("fn", "epilogue", "has", "left"), CASES.values(), ids=list(CASES))
def test_chains(fn, epilogue, has, left):
    given = operands()
    fused = jax.make_jaxpr(fuse(fn))(*given)
    equations = list(flat(fused.jaxpr))
    (kernel,) = [eqn for eqn in equations if eqn.primitive.name == "convolution"]
    assert kernel.params["epilogue"] == epilogue
    *_, bias, residual = kernel.invars
    assert (bias.aval.shape == (7,), residual.aval.ndim == 4) == has
    others = {eqn.primitive.name for eqn in equations} - {
        "convolution",
        "reshape",
        "squeeze",
        "slice",
        "broadcast_in_dim",
    }
    assert others == left
    np.testing.assert_allclose(fuse(fn)(*given), fn(*given), rtol=1e-6, atol=1e-6)


def test_two_convolutions_that_are_added():
    """One of them adds the other; each keeps its own bias."""

    def fn(x, w, b, r):
        return nn.relu(biased(x, w, b) + biased(x, 2 * w, b + 1))

    given = operands()
    equations = [eqn for eqn in flat(jax.make_jaxpr(fuse(fn))(*given).jaxpr) if eqn.primitive.name == "convolution"]
    assert sorted(eqn.invars[-1].aval.ndim for eqn in equations) == [1, 4]
    assert all(eqn.invars[-2].aval.shape == (7,) for eqn in equations)
    np.testing.assert_allclose(fuse(fn)(*given), fn(*given), rtol=1e-6, atol=1e-6)


def test_a_chain_of_residual_blocks_and_an_output_in_the_middle():
    def fn(x, w, b, r):
        first = nn.relu(biased(x, w, b))
        second = biased(first, jnp.reshape(jnp.eye(7), (1, 1, 7, 7)), b) + first
        return second, nn.relu(second)

    given = operands()
    for got, expected in zip(fuse(fn)(*given), fn(*given), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_fusing_twice_changes_nothing_more():
    fn, *_ = CASES["residual, then relu"]
    given = operands()
    once, again = (
        [
            (eqn.primitive.name, eqn.params)
            for eqn in flat(jax.make_jaxpr(made)(*given).jaxpr)
            if eqn.outvars[0].aval.ndim > 1
        ]
        for made in (fuse(fn), fuse(fuse(fn)))
    )
    assert once == again


def test_an_image_that_is_gated_and_a_residual_too():
    """Also where it was not fused in one go."""
    image, factors = jnp.ones((2, 3, 4, 5)), jnp.full((2, 1, 1, 5), 0.5)

    def fn(x, gate):
        gated_image = x * gate
        return conv(gated_image, jnp.reshape(jnp.eye(5), (1, 1, 5, 5))) + gated_image

    np.testing.assert_array_equal(fuse(fuse(fn))(image, factors), fn(image, factors))


def test_what_is_read_more_than_once(autotuned):
    def plain(x, weight):
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def fn(x, weight, bias, gate):
        out, image, small = plain(x, weight), x * gate, x[:1, :1, :1]
        one = plain(small, weight)
        return {
            "gated, a residual": plain(image, weight) + image,
            "gated, a result": image,
            "gated by itself": plain(small * small, weight),
            "bias, read again": nn.relu(a := out + bias) + a,
            "one pixel, added to itself": one + one,
            "one pixel, a bias of others": plain(x, 2 * weight) + one,
            "one pixel, the weight too": plain(one, jnp.broadcast_to(one, weight.shape)) + one,
            "silu, times what it is of": (y := plain(x, 3 * weight)) * nn.silu(y),
            "bounded by itself": jnp.maximum(z := plain(x, 4 * weight), z),
            "residual is gated": (r := plain(x, 5 * weight)) + plain(r * gate, weight),
        }

    random = np.random.default_rng(0)
    shapes = (2, 3, 4, 6), (1, 1, 6, 6), (1, 1, 1, 6), (2, 1, 1, 6)
    names = autotuned(fn, *(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes))
    assert "conv_general_dilated" not in names
