"""`fake_quant` of a whole training loss equals the loss of the quantized model: value, metrics, state, gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes import calibrate, fake_quant, initial_scales, resolve
from lepton_xla.recipe import Recipe
from lepton_xla.train import Model

FEATURES = {"x": lx.TensorSpec(("batch", 6), "float32")}


class Net(nn.Module):
    """Batch norm and dropout between two products, the second one rematerialized."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        x = nn.Dropout(0.25, deterministic=not train)(nn.relu(x))
        return nn.remat(nn.Dense)(3)(x)


@pytest.fixture(scope="module")
def model():
    variables = Net().init(jax.random.key(0), jnp.ones((1, 6)))
    return lx.train.from_linen(Net(), variables, FEATURES)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((16, 6)), jnp.float32)
    return {"x": images, "label": jnp.asarray(rng.integers(0, 3, 16), jnp.int32)}


def loss_of(model, apply):
    """A training loss with a penalty, on a batch that is looked at twice."""
    plain = lx.train.supervised(Model(apply, model.weights, model.state, model.program))

    def loss(weights, batch, key, state):
        first, metrics, state = plain(weights, batch, jax.random.fold_in(key, 0), state)
        second, _, state = plain(weights, batch, jax.random.fold_in(key, 1), state)
        penalty = sum(jnp.sum(leaf * leaf) for leaf in weights.values())
        return first + second + 0.01 * penalty, metrics | {"first": first, "classes": 3.0}, state

    return loss


def quantized_apply(model, plan, ranges=None, scales=None):
    """The model's `apply`, quantized by itself."""

    def joined(every, key, *inputs):
        weights, state = ({path: every[path] for path in part} for part in (model.weights, model.state))
        return model.apply(weights, state, key, *inputs)

    run = fake_quant(joined, plan, ranges)

    def apply(weights, state, key, *inputs):
        return run({**weights, **state}, key, *inputs, scales=scales)

    return apply


def assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_a_loss_is_quantized_like_its_model(model, batch, way):
    recipe = Recipe.load("int8")
    recipe = recipe.replace({"quantize.0.dynamic": False}) if way == "static" else recipe
    plan = resolve(recipe, model.program)
    ranges = calibrate(model.program, plan, [{"x": batch["x"]}]) if way == "static" else None
    wrap = jax.checkpoint if way == "static" else lambda fn: fn
    got = wrap(fake_quant(loss_of(model, model.apply), plan, ranges))
    expected = loss_of(model, quantized_apply(model, plan, ranges))
    key = jax.random.key(3)
    values = []
    for loss in (got, expected, loss_of(model, model.apply)):
        step = jax.jit(jax.value_and_grad(lambda *args, loss=loss: _aux(loss(*args)), has_aux=True))
        values.append(step(model.weights, batch, key, model.state))
    assert_same(values[0], values[1])
    assert abs(values[0][0][0] - values[2][0][0]) > 1e-4  # something was rounded


def _aux(outs):
    value, metrics, state = outs
    return value, (metrics, state)


def test_trained_scales_get_their_gradients_through_a_loss(model, batch):
    plan = resolve(Recipe.load("int8").replace({"quantize.0.dynamic": False}), model.program)
    ranges = calibrate(model.program, plan, [{"x": batch["x"]}])
    scales = initial_scales(model.program.weights, plan, ranges)
    key = jax.random.key(1)

    def through_loss(scales):
        return fake_quant(loss_of(model, model.apply), plan, ranges)(
            model.weights, batch, key, model.state, scales=scales
        )[0]

    def through_model(scales):
        apply = quantized_apply(model, plan, ranges, scales)
        return loss_of(model, apply)(model.weights, batch, key, model.state)[0]

    got, expected = (jax.jit(jax.grad(fn))(scales) for fn in (through_loss, through_model))
    assert_same(got, expected)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(got))


def test_a_step_begins_the_rounding_of_a_loss(model, batch):
    plan = resolve(Recipe.load("int8"), model.program)
    weights_alone = resolve(Recipe.load("int8-weight-only"), model.program)
    loss, key = loss_of(model, model.apply), jax.random.key(2)
    staged = jax.jit(functools.partial(fake_quant(loss, plan, start=3, delay=2), model.weights, batch, key))
    stages = [jax.jit(fn) for fn in (loss, fake_quant(loss, weights_alone), fake_quant(loss, plan))]
    expected = [fn(model.weights, batch, key, model.state) for fn in stages]
    for step, stage in ((2, 0), (3, 1), (4, 1), (5, 2)):
        assert_same(staged(model.state, step=jnp.int32(step)), expected[stage])
    assert len({float(outs[0]) for outs in expected}) == 3


def test_pairs_that_a_loss_does_not_have_by_name_are_refused():
    program = lx.trace(lambda w, x: (x @ w["w"]) @ x.T, {"w": jnp.eye(6)}, FEATURES)
    recipe = Recipe.parse('[[quantize]]\nsites = ".*"\nproducts = "all"', name="all")
    plan = resolve(recipe, program)

    def loss(scope, weights, x):
        with jax.named_scope(scope):
            return program.fn(weights, x).sum()

    x = jnp.ones((2, 6)) / 3
    assert jnp.isfinite(fake_quant(program.fn, plan)(program.weights, x)).all()
    with pytest.raises(UnsupportedError, match="none of the plan's products of two activations"):
        fake_quant(functools.partial(loss, "elsewhere"), plan)(program.weights, x)
