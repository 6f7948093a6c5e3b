"""One network in Linen, NNX, Equinox and written by hand: pruned at once, while training, and shrunk, all the same."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_xla as lx
from lepton_xla.passes import prune, shrink
from lepton_xla.passes.planning import resolve
from lepton_xla.train import finalize, one_shot, sparsify

ROWS = {"x": lx.TensorSpec(("batch", 8), "float32")}
RANDOM = np.random.default_rng(0)
UP, DOWN = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((8, 8), (8, 4)))
SHIFT, X = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((8,), (3, 8)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="down")(nn.relu(nn.Dense(8, name="up")(x)))


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class EquinoxNet(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def linen():
    params = {"up": {"kernel": jnp.asarray(UP), "bias": jnp.asarray(SHIFT)}, "down": {"kernel": jnp.asarray(DOWN)}}
    variables = {"params": params}
    return lx.from_linen(LinenNet(), variables, ROWS), variables


def of_nnx():
    module = NnxNet()
    module.up.kernel[...], module.up.bias[...], module.down.kernel[...] = map(jnp.asarray, (UP, SHIFT, DOWN))
    return lx.from_nnx(module, ROWS), nnx.state(module, nnx.Param)


def equinox():
    keys = jax.random.split(jax.random.key(0))
    module = EquinoxNet(eqx.nn.Linear(8, 8, key=keys[0]), eqx.nn.Linear(8, 4, use_bias=False, key=keys[1]))
    arrays = tuple(map(jnp.asarray, (UP.T, SHIFT, DOWN.T)))
    module = eqx.tree_at(lambda m: (m.up.weight, m.up.bias, m.down.weight), module, arrays)
    weights, rest = eqx.partition(module, eqx.is_array)
    return lx.trace(lambda w, x: jax.vmap(eqx.combine(w, rest))(x), weights, ROWS), weights


def by_hand():
    weights = {"up": jnp.asarray(UP), "shift": jnp.asarray(SHIFT), "down": jnp.asarray(DOWN)}
    fn = lambda w, x: jax.nn.relu(x @ w["up"] + w["shift"][None]) @ w["down"]  # noqa: E731
    return lx.trace(fn, weights, ROWS), weights


def two_of_four(weight):
    """The two smallest of each four rows zero."""
    out = weight.copy()
    for start in (0, 4):
        order = np.argsort(np.abs(weight[start : start + 4]), axis=0)[:2]
        np.put_along_axis(out[start : start + 4], order, values=0.0, axis=0)
    return out


def network(up, down, shift=SHIFT):
    return np.maximum(X.astype(np.float64) @ up + shift, 0) @ down


@pytest.mark.parametrize("make", [linen, of_nnx, equinox, by_hand])
def test_pruned_and_shrunk_alike_in_every_framework(make):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        program, weights = make()
        plan = resolve(lx.Recipe.parse('[[prune]]\nsites = ".*"\npattern = "2:4"', name="test"), program)
        expected = network(two_of_four(UP), two_of_four(DOWN))
        small = prune(program, plan)
        np.testing.assert_allclose(small.fn(small.weights, X), expected, rtol=1e-4, atol=1e-5)

        # While training, on the framework's own tree of parameters.
        optimizer = sparsify(optax.sgd(0.0), plan, schedule=one_shot())
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
        trained, masks = finalize(optax.apply_updates(weights, updates), state)
        assert jax.tree.structure(trained) == jax.tree.structure(weights)
        assert masks.keys() == small.masks.keys()
        for path, mask in masks.items():
            np.testing.assert_array_equal(mask, small.masks[path])
        again = program.replace(weights=dict(zip(program.weights, jax.tree.leaves(trained), strict=True)))
        np.testing.assert_allclose(again.fn(again.weights, X), expected, rtol=1e-4, atol=1e-5)

        # The half of the hidden units with the largest norms, each weight's by its mean.
        norms = [np.sqrt((UP.astype(np.float64) ** 2).sum(0)), np.sqrt((DOWN.astype(np.float64) ** 2).sum(1))]
        stays = np.sort(np.argsort(-sum(norm / norm.mean() for norm in norms))[:4])
        small = shrink(program, sparsity=0.5)
        assert sum(leaf.size for leaf in small.weights.values()) == 8 * 4 + 4 + 4 * 4
        np.testing.assert_allclose(
            small.fn(small.weights, X), network(UP[:, stays], DOWN[stays], SHIFT[stays]), rtol=1e-4, atol=1e-5
        )
