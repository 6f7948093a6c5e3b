"""What follows a product goes to the kernel, if nothing else reads what is between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.kernels import integer_product, weight_only
from lepton_xla.passes.quantization import epilogues
from lepton_xla.quant import quantize

ROWS, DEPTH, COLUMNS = (2, 8), 32, 48


@pytest.fixture(autouse=True)
def as_users_write():
    """A bias is added to a matrix."""
    with jax.numpy_rank_promotion("allow"):
        yield


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


WEIGHT = quantize(array(DEPTH, COLUMNS), "int8").by_columns()
OPERANDS = array(*ROWS, DEPTH, seed=1), array(COLUMNS, seed=2), array(*ROWS, COLUMNS, seed=3)


def product(x, weight=WEIGHT):
    """A product as `quantize` leaves it: of a matrix of rows."""
    with epilogues.of_site("layer (0)/w"):
        multiply = integer_product.multiply if weight.transposed else weight_only.multiply
        return multiply(x.reshape(-1, DEPTH), weight).reshape(*ROWS, COLUMNS)


def fused(fn, *operands):
    """What was found, after a check that the function still computes the same."""
    found = {}
    changed = epilogues.fuse(fn, found)
    expected, got = jax.jit(fn)(*operands), jax.jit(changed)(*operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, expected)
    return found.get("layer (0)/w"), str(jax.make_jaxpr(changed)(*operands))


SPELLINGS = {
    "relu": [jax.nn.relu, lambda x: jnp.maximum(x, 0)],
    "silu": [jax.nn.silu, lambda x: x / (1 + jnp.exp(-x)), lambda x: x * jax.nn.sigmoid(x)],
    "gelu": [
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2))),
        lambda x: x * jax.scipy.stats.norm.cdf(x),
    ],
    "gelu_tanh": [jax.nn.gelu, lambda x: x * jax.nn.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))],
}


@pytest.mark.parametrize(
    ("name", "spelling"), [(name, at) for name, each in SPELLINGS.items() for at in range(len(each))]
)
def test_activations_are_found_however_they_are_written(name, spelling):
    activation = SPELLINGS[name][spelling]
    found, text = fused(lambda x, b, h: activation(product(x) + b) + h, *OPERANDS)
    assert found == f"bias + {name} + residual"
    assert [text.count(each) for each in (" tanh ", " erf", " exp ", " logistic ", " max ", "= add ")] == [0] * 6


@pytest.mark.parametrize(
    "other",
    [
        jnp.tanh,
        lambda x: jax.nn.leaky_relu(x),
        lambda x: jnp.where(x > 0, x, 0),  # NaN becomes zero
        lambda x: x * jax.nn.sigmoid(1.702 * x),  # nearly GELU
        lambda x: (1.001 * x) * jax.nn.sigmoid(x),
        lambda x: x * jnp.mean(jax.nn.sigmoid(x)),
    ],
)
def test_other_functions_stay(other):
    assert fused(lambda x, b, h: other(product(x) + b) + h, *OPERANDS)[0] == "bias"


def test_parts_of_the_pattern():
    x, b, h = OPERANDS
    assert fused(lambda x: product(x) * 2, x)[0] is None
    assert fused(lambda x, b: b + product(x), x, b)[0] == "bias"
    assert fused(lambda x, h: h + product(x), x, h)[0] == "residual"
    assert fused(lambda x: jax.nn.relu(product(x)), x)[0] == "relu"
    assert fused(lambda x, b: jax.nn.relu(product(x)) + b, x, b)[0] == "relu"  # a vector after it is no bias
    assert fused(lambda x, b, h: product(x) + h + b, x, b, h)[0] == "residual"
    assert fused(lambda x, b: (product(x) + b).reshape(4, 4, COLUMNS) + 1.0, x, b)[0] == "bias"
    by_row = jnp.arange(16.0).reshape(*ROWS, 1)
    assert fused(lambda x, r: product(x) + r, x, by_row)[0] is None  # a number for each row
    assert fused(lambda x, b: product(x).swapaxes(0, 1) + b, x, b)[0] is None


def test_a_single_row():
    """In which a matrix that is added is as large as a bias."""
    x, b, h = OPERANDS[0][0, :1], OPERANDS[1], OPERANDS[2][0, :1]

    def one(x, b, h):
        with epilogues.of_site("layer (0)/w"):
            return jax.nn.relu(integer_product.multiply(x, WEIGHT) + b) + h

    assert fused(one, x, b, h)[0] == "bias + relu + residual"


def test_what_others_read_stays():
    x, b, h = OPERANDS
    biased = lambda x, b: product(x) + b  # noqa: E731
    assert fused(lambda x, b: (product(x), product(x) + b), x, b)[0] == "bias"  # two products

    def twice(x, b, h):
        y = biased(x, b)
        return jax.nn.relu(y) + h, y

    assert fused(twice, x, b, h)[0] == "bias"

    def gated(x, b, h):
        y = biased(x, b)
        return jax.nn.silu(y) * y + h  # the gate reads it too

    assert fused(gated, x, b, h)[0] == "bias"

    def later(x, b, h):
        wide = jax.nn.gelu(biased(x, b))
        return wide + h, wide.sum()

    assert fused(later, x, b, h)[0] == "bias + gelu_tanh"


def test_weights_alone_stacks_and_batches():
    x, b, h = OPERANDS
    weight = quantize(array(DEPTH, COLUMNS), "int4", "group:8")
    assert fused(lambda x, b, h: jax.nn.gelu(product(x, weight) + b) + h, x, b, h)[0] == "bias + gelu_tanh + residual"

    def stacked(x, b, h):
        def step(carry, bias):
            wide = product(carry[..., :DEPTH]) + bias
            return jax.nn.silu(wide) + carry, None

        return jax.lax.scan(step, h, jnp.stack([b, 2 * b]))[0]

    found, text = fused(stacked, x, b, h)
    assert (found, text.count(" logistic ")) == ("bias + silu + residual", 0)
    several = jnp.stack([x, 2 * x]), jnp.stack([h, -h])
    batched = jax.vmap(lambda x, h: jax.nn.relu(product(x) + b) + h)
    assert fused(lambda x, h: batched(x, h), *several)[0] == "bias + relu + residual"
    inside = jax.vmap(epilogues.fuse(lambda x, h: jax.nn.relu(product(x) + b) + h))
    np.testing.assert_allclose(inside(*several), batched(*several), rtol=0, atol=2e-5)
    one = jax.vmap(epilogues.fuse(lambda x, h: product(x) + h), in_axes=(0, None))
    np.testing.assert_allclose(one(several[0], h), jax.vmap(lambda x: product(x) + h)(several[0]), rtol=0, atol=2e-5)


def test_symbolic_sizes():
    """The rows of a product may be unknown; then it is by XLA in `quantize`, but nothing here depends on it."""
    b = OPERANDS[1]
    with epilogues.of_site("w"):
        fn = lambda x: jax.nn.relu(integer_product.multiply(x, WEIGHT) + b)  # noqa: E731
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(epilogues.fuse(fn)))(jax.ShapeDtypeStruct((rows, DEPTH), jnp.float32))
    x = OPERANDS[0].reshape(-1, DEPTH)
    np.testing.assert_allclose(exported.call(x), fn(x), rtol=0, atol=2e-5)


def test_two_products_that_are_added():
    """As in gates of LSTMs: the sum belongs to one of the products, and the other is what is added."""
    x, b, _ = OPERANDS
    assert fused(lambda x: product(x) + product(-2 * x), x)[0] is not None
    text = fused(lambda x, b: jnp.tanh(product(x) + b + product(-2 * x)), x, b)[1]
    assert text.count("= add ") == 0
    fused(lambda x: jax.nn.relu(product(-2 * x)) + jax.nn.silu(product(x)), x)


def test_a_bias_that_two_products_share():
    def both(x, b):
        row = b[None, None]
        return product(x) + row, jax.nn.relu(product(-2 * x) + row)

    x, b, _ = OPERANDS
    assert fused(both, x, b)[1].count("= add ") == 0


def test_bounds_far_away_stay():
    text = fused(lambda x: jnp.minimum(jax.nn.relu(product(x)), 65504.0), OPERANDS[0])[1]
    assert text.count(" min ") == 1
