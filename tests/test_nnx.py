"""`from_nnx`: modules that write state when they are called are refused by name; those that hand it through are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_xla.adapters import from_nnx
from lepton_xla.errors import ModelError
from lepton_xla.program import TensorSpec

ROWS = {"x": TensorSpec((2, 4), "float32")}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Wrapped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = Block(rngs)


class Jitted(Wrapped):
    def __call__(self, x):
        return nnx.jit(lambda block, x: block(x))(self.block, x)


class Checkpointed(Wrapped):
    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class Stacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


@pytest.mark.parametrize("make", [Jitted, Checkpointed, Stacked])
def test_state_that_is_handed_through_has_not_changed(make):
    module = make(nnx.Rngs(0))
    program = from_nnx(module, ROWS)
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    module.eval()
    np.testing.assert_allclose(program(program.weights, x), module(x), rtol=1e-5)


class Decoder(nnx.Module):
    """Attention over a cache that each call writes: a second token would not see the first."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs)
        self.attention.init_cache((2, 8, 4))

    def __call__(self, x):
        return self.attention(x[:, None])


class Training(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(x, use_running_average=False)


class Counter(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Dict(calls=nnx.Variable(jnp.zeros((), jnp.int32)))

    def __call__(self, x):
        self.inner["calls"][...] += 1
        return x * self.inner["calls"][...].astype(x.dtype)


class Late(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        self.last = nnx.Cache(x)
        return self.linear(x)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Decoder, "'attention/cache_index', 'attention/cached_key', 'attention/cached_value'"),
        (Training, "'norm/mean', 'norm/var'"),
        (Counter, "'inner/calls'"),
        (Late, "'last'"),
    ],
)
def test_state_that_a_call_writes_is_refused_by_name(make, names):
    with pytest.raises(ModelError, match=f"writes its state {names}, but a program is stateless"):
        from_nnx(make(nnx.Rngs(0)), ROWS)


class Sampler(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs

    def __call__(self, x):
        return x + jax.random.normal(self.rngs.noise(), x.shape)


class Projection(nnx.Module):
    """Reads a key and advances no stream: the same numbers at each call, as in the module itself."""

    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs

    def __call__(self, x):
        return x @ jax.random.normal(self.rngs.default.key[...], (4, 4))


def test_outputs_that_draw_random_numbers_are_refused():
    with pytest.raises(ModelError, match="depend on random numbers from 'rngs/default/count'"):
        from_nnx(Sampler(nnx.Rngs(0)), ROWS)
    module = Projection(nnx.Rngs(0))
    program = from_nnx(module, ROWS)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(program(program.weights, x), module(x), rtol=1e-6)


def test_what_a_module_sows_is_dropped():
    class Sowing(Wrapped):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return self.block(x)

    module = Sowing(nnx.Rngs(0))
    with pytest.warns(DeprecationWarning, match="sow"):
        program = from_nnx(module, ROWS)
    assert not [name for name in program.weights if "seen" in name]


class TwoWays(Wrapped):
    def __call__(self, x):
        return self.block(x)

    def encode(self, x, *, twice=False):
        return self.block.linear(x) * (2 if twice else 1)


def test_another_method():
    module = TwoWays(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    program = from_nnx(module, ROWS, method="encode", twice=True)
    np.testing.assert_allclose(program(program.weights, x), 2 * module.block.linear(x), rtol=1e-6)
    with pytest.raises(ModelError, match="a TwoWays has no method 'decode'"):
        from_nnx(module, ROWS, method="decode")
    with pytest.raises(ModelError, match=r"from_nnx takes a flax\.nnx\.Module, not a dict"):
        from_nnx({}, ROWS)


def test_recurrent_modules():
    module = nnx.RNN(nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0)))
    program = from_nnx(module, {"x": TensorSpec(("batch", 5, 4), "float32")})
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(program(program.weights, x), module(x), rtol=1e-5, atol=1e-6)
