"""Pruning while training, against the same training written down in NumPy."""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import lepton_xla as lx
from lepton_xla.errors import ModelError, RecipeError, UnsupportedError
from lepton_xla.passes import fake_quant, masked
from lepton_xla.passes.planning import resolve
from lepton_xla.quant import FORMATS
from lepton_xla.train import (
    PruneRule,
    Regrow,
    SparsityState,
    finalize,
    masks_of,
    one_shot,
    periodic,
    polynomial,
    sparsify,
)

RATE = 0.05


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


# A linear model, whose gradient is one line.
X, Y = array(32, 12), array(32, 6, seed=1)
START = {"w": array(12, 6, seed=2), "bias": array(6, seed=3)}


def loosely(optimizer):
    """An optimizer of optax's that mixes dtypes, as some do; the rest of a test is strict."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def adam():
    return loosely(optax.adam(RATE))


def linear(params, x):
    return x @ params["w"] + params["bias"][None]


def loss(params, fn=linear):
    return jnp.mean((fn(params, X) - Y) ** 2)


def gradient_of(w, bias):
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    error = 2 * (x @ w + bias - y) / y.size
    return x.T @ error, error.sum(0)


def trained(optimizer, steps, params=None, through=False):
    """States after each step, by one function that is compiled once."""
    params = START if params is None else params
    state = optimizer.init(params)
    compiles = 0

    @jax.jit
    def step(params, state):
        nonlocal compiles
        compiles += 1
        fn = masked(linear, masks_of(state), straight_through=True) if through else linear
        updates, state = optimizer.update(jax.grad(loss)(params, fn), state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for _ in range(steps):
        params, state = step(params, state)
        history.append((params, state))
    assert compiles == 1
    return history


def keep(scores, dropped):
    order = np.argsort(scores, axis=None, kind="stable")
    mask = np.ones(scores.size, bool)
    mask[order[:dropped]] = False
    return mask.reshape(scores.shape)


def numpy_training(steps, sparsities, choose, through=False):
    """SGD in float64: `sparsities[step]` where masks are found anew, by `choose(w, gradient, mask, dropped)`."""
    w, bias = (np.asarray(START[name], np.float64) for name in ("w", "bias"))
    mask = np.ones(w.shape, bool)
    for step in range(steps):
        used = w * mask if through else w
        gradient, of_bias = gradient_of(used, bias)
        old = mask
        if step in sparsities:
            mask = choose(w, gradient, mask, round(sparsities[step] * w.size))
        moved = w - RATE * (gradient if through else gradient * old)
        w = moved if through else np.where(mask & old, moved, 0)
        bias = bias - RATE * of_bias
        yield w, mask


def cubic(step, begin, end, final):
    return final - final * (1 - (step - begin) / (end - begin)) ** 3


def assert_same_training(history, reference):
    for (params, state), (w, mask) in zip(history, reference, strict=True):
        np.testing.assert_array_equal(masks_of(state)["w"], mask)
        np.testing.assert_allclose(params["w"], w, rtol=1e-4, atol=1e-6)


def test_gradual_pruning_by_magnitude():
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.8}, schedule=polynomial(2, 9, every=3))
    history = trained(optimizer, 12)
    found = {step: cubic(step, 2, 9, 0.8) for step in (2, 5, 8, 9)}
    assert_same_training(history, numpy_training(12, found, lambda w, g, m, n: keep(np.abs(w), n)))
    assert [int((np.asarray(params["w"]) == 0).sum()) for params, _ in history][-1] == round(0.8 * 72)
    np.testing.assert_allclose(
        [float(state.sparsity["w"]) for _, state in history[8:]], [cubic(8, 2, 9, 0.8)] + 3 * [0.8]
    )


def test_by_saliency_all_at_once():
    rule = PruneRule(sites="w", sparsity=0.5, method="saliency")
    history = trained(sparsify(optax.sgd(RATE), [rule], schedule=one_shot(3)), 6)
    assert_same_training(history, numpy_training(6, {3: 0.5}, lambda w, g, m, n: keep(np.abs(w * g), n)))


METHODS, PATTERNS = ("magnitude", "saliency", "random"), ("unstructured", "2:4", "block:4x2", "channel")
SCHEDULES = {
    "periodic": (periodic(0, every=2), {0: 0.5, 2: 0.5, 4: 0.5}),
    "polynomial": (polynomial(0, 4, initial=0.25, power=1.0, every=2), {0: 0.25, 2: 0.375, 4: 0.5}),
}


def pattern_mask(scores, pattern, share):
    """What stays of `[8, 4]`, by means of what is dropped together."""
    if pattern == "unstructured":
        return keep(scores, round(share * 32))
    if pattern == "2:4":
        groups = [keep(column, round(share * 4)) for part in (scores[:4], scores[4:]) for column in part.T]
        return np.concatenate([np.stack(groups[:4], 1), np.stack(groups[4:], 1)])
    if pattern == "channel":
        return np.broadcast_to(keep(scores.mean(0), round(share * 4)), (8, 4))
    blocks = keep(scores.reshape(2, 4, 2, 2).mean((1, 3)), round(share * 4))
    return np.repeat(np.repeat(blocks, 4, 0), 2, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_pattern_by_each_method_on_each_schedule(name):
    schedule, found = SCHEDULES[name]
    pairs = dict(enumerate(itertools.product(METHODS, PATTERNS)))
    rules = [
        PruneRule(sites=str(k), method=method, pattern=pattern, sparsity=None if pattern == "2:4" else 0.5)
        for k, (method, pattern) in pairs.items()
    ]
    params = {str(k): array(8, 4, seed=k) for k in pairs}
    gradients = {str(k): array(8, 4, seed=100 + k) for k in pairs}
    optimizer = sparsify(optax.sgd(0.0), rules, schedule=schedule)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    masks = {str(k): np.ones((8, 4), bool) for k in pairs}
    for number in range(6):
        if number in found:
            for k, (method, pattern) in pairs.items():
                weight, gradient = (np.asarray(tree[str(k)], np.float64) for tree in (params, gradients))
                scores = np.abs(weight * (gradient if method == "saliency" else 1))
                masks[str(k)] = pattern_mask(scores, pattern, found[number])
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for k, (method, pattern) in pairs.items():
            mask, weight = np.asarray(state.masks[str(k)]), np.asarray(params[str(k)])
            np.testing.assert_array_equal(weight == 0, ~mask)
            if method == "random":  # as many, in the same pattern
                np.testing.assert_array_equal(mask, pattern_mask(mask * 1.0, pattern, 1 - masks[str(k)].mean()))
            else:
                np.testing.assert_array_equal(mask, masks[str(k)], err_msg=f"step {number}: {method} {pattern}")


def test_straight_through_lets_dropped_elements_come_back():
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.6}, schedule=periodic(every=4), straight_through=True)
    history = trained(optimizer, 30, through=True)
    found = dict.fromkeys(range(0, 30, 4), 0.6)
    assert_same_training(history, numpy_training(30, found, lambda w, g, m, n: keep(np.abs(w), n), through=True))
    masks = [np.asarray(masks_of(state)["w"]) for _, state in history]
    assert (masks[-1] & ~masks[0]).any()
    params, state = history[-1]
    clean, kept = finalize(params, state)
    np.testing.assert_array_equal(clean["w"], np.where(masks[-1], params["w"], 0))
    np.testing.assert_array_equal(kept["w"], masks[-1])
    assert np.abs(params["w"]).min() > 0


def test_rigl_is_that_of_the_paper():
    """Of what is kept the smallest go, f(t) = a / 2 (1 + cos(pi t / T)) of it; as many with large gradients come."""
    fraction = lambda step: 0.4 / 2 * (1 + np.cos(np.pi * min(step, 20) / 20))  # noqa: E731
    found = dict.fromkeys(range(0, 20, 4), 0.5)
    asked = iter(found)

    def choose(w, gradient, mask, dropped):
        replaced = round(fraction(next(asked)) * (w.size - dropped))
        retained = keep(np.abs(w) * mask, dropped + replaced)
        return keep(np.where(retained, np.inf, np.abs(gradient)), dropped)

    regrow = Regrow("gradient", lambda step: optax.cosine_decay_schedule(0.4, 20)(step.astype(jnp.float32)))
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.5}, schedule=periodic(end=19, every=4), regrow=regrow)
    history = trained(optimizer, 19)
    assert_same_training(history, numpy_training(19, found, choose))
    masks = [np.asarray(masks_of(state)["w"]) for _, state in history]
    assert all(mask.sum() == 36 for mask in masks)
    assert (masks[-1] & ~masks[0]).any()


def test_set_replaces_the_smallest_by_any():
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.5}, schedule=periodic(every=2), regrow=Regrow("random", 0.25), seed=1)
    history = trained(optimizer, 7)
    for (params, state), (_, after) in itertools.pairwise(history):
        old, new = np.asarray(masks_of(state)["w"]), np.asarray(masks_of(after)["w"])
        assert new.sum() == 36
        if (old == new).all():
            continue
        magnitudes = np.where(old, np.abs(params["w"]), np.inf)
        smallest = np.argsort(magnitudes, axis=None)[:9]  # a quarter of the 36 goes, unless drawn again
        assert set(np.flatnonzero(old & ~new)) <= set(smallest)
        assert (~old & new).sum() == (old & ~new).sum() > 4


def test_what_comes_back_begins_at_zero_whatever_the_momentum():
    optimizer = sparsify(adam(), {"w": 0.5}, schedule=periodic(every=2), regrow=Regrow("random", 0.5))
    back = 0
    for (_, before), (params, state) in itertools.pairwise(trained(optimizer, 9)):
        new = np.asarray(masks_of(state)["w"]) & ~np.asarray(masks_of(before)["w"])
        assert (np.asarray(params["w"])[new] == 0).all()
        back += new.sum()
    assert back > 20


def test_other_schedules_give_the_sparsity_of_all_rules():
    history = trained(sparsify(optax.sgd(RATE), {"w": None}, schedule=optax.linear_schedule(0.25, 0.9, 1000)), 2)
    assert (~np.asarray(masks_of(history[0][1])["w"])).sum() == 18


def test_moments_get_no_gradient_of_what_is_dropped():
    history = trained(sparsify(adam(), {"w": 0.5}, schedule=one_shot()), 60)
    params, state = history[-1]
    dropped = ~np.asarray(state.masks["w"])
    moments = np.asarray(state.inner[0].mu["w"])
    assert np.abs(moments[dropped]).max() < 1e-2 * np.abs(moments[~dropped]).max()
    assert (np.asarray(params["w"])[dropped] == 0).all()


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")])
def test_zeros_are_exact_in_every_dtype(kinds):
    params = {"w": START["w"].astype(kinds[0])}
    optimizer = sparsify(optax.scale(-0.1), {"w": 0.5}, schedule=one_shot())
    updates, state = optimizer.update({"w": array(12, 6).astype(kinds[1])}, optimizer.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        after = optax.apply_updates(params, updates)["w"]
    assert after.dtype == kinds[0]
    assert (np.asarray(after)[~np.asarray(state.masks["w"])] == 0).all()
    assert (np.asarray(after) == 0).sum() == 36


# Where it is used.


def test_inside_other_transformations_and_train_states():
    optimizer = optax.MultiSteps(sparsify(adam(), {"w": 0.5}, schedule=one_shot()), 2)
    state = TrainState.create(apply_fn=linear, params=START, tx=optimizer)
    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):
            state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    clean, masks = finalize(state.params, state.opt_state)
    np.testing.assert_array_equal(clean["w"], state.params["w"])
    assert (np.asarray(clean["w"]) == 0).sum() == (~np.asarray(masks["w"])).sum() == 36


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(4)(nn.Embed(5, 8)(jnp.zeros(x.shape[0], int)) + x.mean((1, 2)))


def test_flax_modules_and_what_is_left_out():
    image = array(2, 6, 6, 4)
    params = Network().init(jax.random.key(0), image)["params"]
    state = sparsify(adam(), {".*": 0.5}, schedule=one_shot()).init(params)
    assert set(state.masks) == {"Conv_0/kernel", "Dense_0/kernel"}
    named = sparsify(adam(), {".*(bias|embedding)": 0.5}, schedule=one_shot()).init(params)
    assert set(named.masks) == {"Conv_0/bias", "Dense_0/bias", "Embed_0/embedding", "LayerNorm_0/bias"}


def test_a_matrix_with_a_vectors_name_is_pruned():
    """`b` of LoRA, `bias` of an attention; the shapes of others say which are vectors of stacked layers or of heads."""
    lora = {"a": array(16, 8), "b": array(8, 4), "attention": {"bias": array(6, 6)}}
    assert set(sparsify(adam(), {".*": 0.5}, schedule=one_shot()).init(lora).masks) == {"a", "b", "attention/bias"}
    stacked = {
        "dense": {"kernel": array(3, 8, 4), "bias": array(3, 4)},
        "norm": {"scale": array(3, 8)},
        "heads": {"kernel": array(8, 2, 4), "bias": array(2, 4)},
        "lora": {"a": array(3, 8, 2), "b": array(3, 2, 8)},
    }
    masks = sparsify(adam(), {".*": 0.5}, schedule=one_shot()).init(stacked).masks
    assert set(masks) == {"dense/kernel", "heads/kernel", "lora/a", "lora/b"}


def test_nnx_optimizers():
    model = nnx.Linear(12, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sparsify(optax.sgd(RATE), {"kernel": 0.5}, schedule=one_shot()), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model))
    assert (np.asarray(model.kernel[...]) == 0).sum() == 36
    assert (np.asarray(model.bias[...]) != 0).all()


def layers(w, x):
    x, _ = lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, w["stack"])
    return x @ w["head"].T


def program():
    return lx.trace(
        layers,
        {"stack": array(3, 8, 8) * jnp.asarray([1.0, 2.0, 4.0]).reshape(3, 1, 1), "head": array(5, 8, seed=1)},
        {"x": lx.TensorSpec(("batch", 8), "float32")},
    )


PLANS = {
    "2:4": 'pattern = "2:4"',
    "erk": 'sparsity = 0.5\ndistribution = "erk"',
    "global": 'sparsity = 0.5\ndistribution = "global"',
    "block": 'sparsity = 0.5\npattern = "block:4x1"',
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_prune_as_at_once_and_masks_go_back_into_the_program(name):
    model = program()
    plan = resolve(lx.Recipe.parse(f'[[prune]]\nsites = ".*"\n{PLANS[name]}', name="test"), model)
    optimizer = sparsify(optax.sgd(0.0), plan, schedule=one_shot())
    still = jax.tree.map(jnp.zeros_like, model.weights)
    updates, state = optimizer.update(still, optimizer.init(model.weights), model.weights)
    weights, masks = finalize(optax.apply_updates(model.weights, updates), state)
    at_once = lx.passes.prune(model, plan)
    for path, mask in at_once.masks.items():
        np.testing.assert_array_equal(masks[path], mask)
        np.testing.assert_array_equal(weights[path], at_once.weights[path])
    back = model.replace(weights=weights, masks=masks)
    held = masked(back.fn, back.masks)(back.weights, array(4, 8))
    np.testing.assert_allclose(held, back.fn(back.weights, array(4, 8)), rtol=1e-6)


def gates_and_heads(w, x):
    q, k = jnp.split(w["qk"], 2, axis=1)
    return (jnp.tanh(x @ q) * (x @ k)) @ jnp.concatenate([w["i"], w["f"].T[::-1]], axis=1)


MADE = {"qk": array(8, 12), "i": array(6, 4, seed=1), "f": array(5, 6, seed=2), "bias": array(4)}


def made_plan(fn, rule, weights=MADE):
    model = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 8), "float32")})
    return model, resolve(lx.Recipe.parse(f'[[prune]]\nsites = ".*"\n{rule}', name="test"), model)


@pytest.mark.parametrize("rule", ["sparsity = 0.5", 'pattern = "1:2"'])
def test_a_plans_computed_weights_are_pruned_in_the_weights_they_are_made_of(rule):
    model, plan = made_plan(gates_and_heads, rule)
    optimizer = sparsify(optax.sgd(0.1), plan, schedule=one_shot(at=1))
    params, state = model.weights, optimizer.init(model.weights)
    step = jax.jit(lambda params, state: optimizer.update(jax.tree.map(jnp.ones_like, params), state, params))
    for _ in range(3):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    before = {path: np.asarray(leaf, np.float64) - 0.1 for path, leaf in MADE.items()}  # when the masks are found

    def chosen(matrix):
        if "1:2" in rule:
            return groups(matrix)
        return keep(np.abs(matrix), matrix.size // 2)

    def groups(matrix):
        pairs = np.abs(matrix).reshape(-1, 2, matrix.shape[1])
        return (pairs == pairs.max(1, keepdims=True)).reshape(matrix.shape)

    gates = chosen(np.concatenate([before["i"], before["f"].T[::-1]], axis=1))
    halves = [chosen(half) for half in np.split(before["qk"], 2, axis=1)]
    wanted = {"qk": np.concatenate(halves, axis=1), "i": gates[:, :4], "f": gates[::-1, 4:].T}
    weights, masks = finalize(params, state)
    assert set(masks) == set(wanted)
    for path, mask in wanted.items():
        np.testing.assert_array_equal(masks[path], mask)
        np.testing.assert_allclose(weights[path], np.where(mask, MADE[path] - 0.3, 0), rtol=1e-5)
    ahead = lx.passes.precompute(model.replace(weights=weights, masks=masks))
    np.testing.assert_array_equal(ahead.masks["concatenate:f+i"], gates)
    np.testing.assert_array_equal(ahead.masks["split.2:qk"], halves[1])


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda w, x: x @ jnp.tanh(w["qk"]), "'tanh:qk', which is computed from qk, which changes their values"),
        (
            lambda w, x: x @ jnp.concatenate([w["qk"], w["qk"][:, ::-1]], 1),
            "'concatenate:qk', which is computed from qk, some elements of which ('qk') are pruned more than once",
        ),
        (
            lambda w, x: x @ w["qk"] + x @ w["qk"][::-1],
            "'rev:qk', which is computed from qk, some elements of which ('qk') are pruned more than once",
        ),
    ],
    ids=["changed", "taken twice", "pruned twice"],
)
def test_a_computed_weight_whose_mask_cannot_be_carried_is_refused(fn, message):
    model, plan = made_plan(fn, "sparsity = 0.5")
    with pytest.raises(ModelError, match=re.escape(message) + ".*by rules that name them"):
        sparsify(optax.sgd(0.1), plan, schedule=one_shot()).init(model.weights)


def test_a_patterns_schedule_drops_ever_more_of_each_group():
    rule = PruneRule(sites="w", pattern="1:4")
    history = trained(sparsify(optax.sgd(RATE), [rule], schedule=polynomial(0, 6, power=1.0, every=2)), 8)
    kept = [np.asarray(masks_of(state)["w"]).reshape(3, 4, 6).sum(1) for _, state in history[::2]]
    assert [set(np.ravel(part)) for part in kept] == [{4}, {3}, {2}, {1}]


def test_a_pattern_is_never_made_sparser_than_it_says():
    rule = PruneRule(sites="w", pattern="2:4")
    history = trained(sparsify(optax.sgd(RATE), [rule], schedule=lambda step: 0.99), 1)
    assert (np.asarray(masks_of(history[0][1])["w"]).reshape(3, 4, 6).sum(1) == 2).all()


def kept_by(params, rule, gradients=None, **more):
    """Masks after one step with these rules."""
    _, state = run(params, [rule], grads=gradients, **more)
    return {path: np.asarray(mask) for path, mask in masks_of(state).items()}


def test_ranked_together_the_largest_of_each_weight_stays():
    params = {"large": array(12, 6), "small": array(6, 5, seed=1, scale=1e-3), "zero": jnp.zeros((3, 4))}
    masks = kept_by(params, PruneRule(sites=".*", sparsity=0.6, distribution="global"))
    best = np.abs(np.asarray(params["small"]))
    np.testing.assert_array_equal(masks["small"], best == best.max())
    assert masks["zero"].sum() == 1
    dropped = round(0.6 * 114)
    np.testing.assert_array_equal(masks["large"], keep(np.abs(np.asarray(params["large"])), dropped - 29 - 11))
    masks = kept_by(params, PruneRule(sites=".*", distribution="global"), schedule=lambda step: 0.999)
    assert [mask.sum() for mask in masks.values()] == [1, 1, 1]
    # Where each weight has something left anyhow, nothing is another.
    params = {"large": array(12, 6), "small": array(6, 5, seed=1)}
    masks = kept_by(params, PruneRule(sites=".*", sparsity=0.6, distribution="global"))
    together = keep(np.abs(np.concatenate([np.ravel(leaf) for leaf in params.values()])), round(0.6 * 102))
    np.testing.assert_array_equal(np.concatenate([np.ravel(mask) for mask in masks.values()]), together)


def test_ranked_together_something_of_each_layer_and_each_pattern_stays():
    weights = {"stack": jnp.stack([array(8, 8), 1e-3 * array(8, 8, seed=1), 1e-6 * array(8, 8, seed=2)])}
    model = lx.trace(lambda w, x: lax.scan(lambda x, k: (x @ k, None), x, w["stack"])[0], weights, program().inputs)
    for pattern, unit in (("unstructured", 1), ("channel", 8), ("block:4x2", 8)):
        text = f'[[prune]]\nsites = ".*"\nsparsity = 0.75\ndistribution = "global"\npattern = "{pattern}"'
        plan = resolve(lx.Recipe.parse(text, name="test"), model)
        _, state = run(weights, plan)
        assert masks_of(state)["stack"].sum((1, 2)).tolist() == [48 - 2 * unit, unit, unit]


def test_all_that_is_replaced_leaves_something_of_each_weight():
    params = {"large": array(12, 6), "small": array(6, 5, seed=1, scale=1e-3)}
    gradients = {"large": jnp.ones((12, 6)), "small": jnp.zeros((6, 5))}
    rule = PruneRule(sites=".*", sparsity=0.5, distribution="global")
    masks = kept_by(params, rule, gradients, schedule=periodic(every=1), regrow=Regrow("gradient", 1.0))
    assert (masks["large"].sum(), masks["small"].sum()) == (50, 1)


def test_a_factor_no_element_reaches_leaves_the_largest():
    masks = kept_by(START, PruneRule(sites="w", method="deviation:100"))
    magnitudes = np.abs(np.asarray(START["w"]))
    np.testing.assert_array_equal(masks["w"], magnitudes == magnitudes.max())


def test_training_goes_on_from_masks():
    masks = {"w": jnp.asarray(keep(np.abs(np.asarray(START["w"])), 30))}
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.5}, schedule=polynomial(3, 5), masks=masks)
    history = trained(optimizer, 6)
    np.testing.assert_array_equal(masks_of(history[0][1])["w"], masks["w"])
    assert (np.asarray(history[0][0]["w"]) == 0).sum() == 30
    assert (np.asarray(history[-1][0]["w"]) == 0).sum() == 36


# Quantization. The product with the unit matrix shows the quantized weight itself.


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_masked_then_quantized_keeps_zeros_in_every_format(name):
    model = lx.trace(lambda w, x: x @ w["w"], {"w": array(16, 6)}, {"x": lx.TensorSpec(("batch", 16), "float32")})
    text = f'[[quantize]]\nsites = ".*"\nweights = "{name}"\nactivations = "none"'
    plan = resolve(lx.Recipe.parse(text, name="test"), model)
    mask = jnp.asarray(keep(np.abs(np.asarray(model.weights["w"])), 40))
    weights = {"w": model.weights["w"] + 0.5}
    seen = masked(fake_quant(model.fn, plan), {"w": mask})(weights, jnp.eye(16))
    assert (np.asarray(seen)[~np.asarray(mask)] == 0).all()
    assert (np.asarray(seen)[np.asarray(mask)] != 0).mean() > 0.3


# Devices and checkpoints.


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_on_two_devices_masks_are_the_same_and_no_weight_is_gathered(kind):
    weights = program().weights | {"head": array(6, 8, seed=1)}
    model = lx.trace(layers, weights, {"x": lx.TensorSpec(("batch", 8), "float32")})
    text = '[[prune]]\nsites = "stack"\nsparsity = 0.5\n[[prune]]\nsites = "head"\nsparsity = 0.5\npattern = "channel"'
    plan = resolve(lx.Recipe.parse(text, name="test"), model)
    gradients = {"stack": array(3, 8, 8, seed=4), "head": array(6, 8, seed=5)}
    optimizer = sparsify(adam(), plan, schedule=periodic(every=1))

    def step(weights, state, gradients):
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    alone = jax.jit(step)(weights, optimizer.init(weights), gradients)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    place = {
        "stack": jax.NamedSharding(mesh, jax.P(None, "d", None)),
        "head": jax.NamedSharding(mesh, jax.P("d", None)),
    }
    with jax.set_mesh(mesh):
        cut = jax.device_put(weights, place)
        state = optimizer.init(cut)
        assert state.masks["stack"].sharding.spec == jax.P(None, "d", None)
        compiled = jax.jit(step).lower(cut, state, jax.device_put(gradients, place)).compile()
        after, state = compiled(cut, state, jax.device_put(gradients, place))
    assert not re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    for path, mask in alone[1].masks.items():
        np.testing.assert_array_equal(state.masks[path], mask)
        np.testing.assert_allclose(after[path], alone[0][path], rtol=1e-6)
        assert state.masks[path].sharding.is_equivalent_to(place[path], mask.ndim)


def test_a_checkpoint_of_two_devices_goes_on_on_one_and_on_another_mesh(tmp_path):
    optimizer = sparsify(adam(), {"w": 0.7}, schedule=polynomial(0, 8, every=2), regrow=Regrow("random", 0.2))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    mesh = jax.make_mesh((2,), ("d",))
    place = {"w": jax.NamedSharding(mesh, jax.P("d", None)), "bias": jax.NamedSharding(mesh, jax.P())}
    params = jax.device_put(START, place)
    state = optimizer.init(params)
    for _ in range(5):
        params, state = step(params, state)
    assert len(state.masks["w"].sharding.device_set) == 2
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "five", saved)
    whole, last = START, optimizer.init(START)
    for _ in range(9):
        whole, last = step(whole, last)
    one, other = jax.sharding.SingleDeviceSharding(jax.devices()[0]), jax.make_mesh((2,), ("other",))
    columns = lambda leaf: jax.NamedSharding(other, jax.P(None, "other") if leaf.ndim == 2 else jax.P())  # noqa: E731
    for place in (lambda _leaf: one, columns):
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), saved)  # noqa: B023
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "five", like)
        assert isinstance(restored["state"], SparsityState)
        for before, after in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(before, after)
        params, state = restored["params"], restored["state"]
        assert state.masks["w"].sharding == place(state.masks["w"])
        for _ in range(4):
            params, state = step(params, state)
        np.testing.assert_array_equal(state.masks["w"], last.masks["w"])
        np.testing.assert_allclose(params["w"], whole["w"], rtol=1e-4, atol=1e-6)


# What does not fit.


def run(params, rules, schedule=one_shot(), grads=None, state=None, **more):  # noqa: B008
    optimizer = sparsify(optax.sgd(RATE), rules, schedule=schedule, **more)
    state = optimizer.init(params) if state is None else state
    return optimizer.update(jax.tree.map(jnp.zeros_like, params) if grads is None else grads, state, params)


def rule(**parts):
    return [PruneRule(**({"sites": "w"} | parts))]


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"rules": {"w": 1.0}}, RecipeError, r"prune\[0\].sparsity = 1.0: expected a share in \[0, 1\)"),
        ({"rules": {"w": -0.1}}, RecipeError, "sparsity = -0.1"),
        ({"rules": {"w": float("nan")}}, RecipeError, r"prune\[0\].sparsity = nan: expected a share in \[0, 1\)"),
        ({"rules": {"w": "half"}}, RecipeError, r"prune\[0\].sparsity = half: expected a share in \[0, 1\)"),
        ({"rules": {"w": None}}, RecipeError, r"prune\[0\].sparsity is missing"),
        ({"rules": {"(": 0.5}}, RecipeError, r"prune\[0\].sites = '\(' is not a regular expression: missing \)"),
        ({"rules": rule(sparsity=0.5, pattern="rows")}, RecipeError, r"prune\[0\]: Expected .* at `\$.pattern`"),
        ({"rules": rule(sparsity=0.5, method="l0")}, RecipeError, r"prune\[0\]: Expected .* at `\$.method`"),
        ({"rules": rule(sparsity=0.5, distribution="all")}, RecipeError, "value 'all' - at `.*distribution`"),
        ({"rules": [0.5]}, RecipeError, r"rules = \[0.5\]: expected a plan, {regular expression: sparsity}, or a list"),
        ({"rules": {"w": 0.5}, "schedule": 0.5}, RecipeError, "schedule = 0.5: expected a Schedule, or a function"),
        ({"rules": {}}, RecipeError, "no rule prunes anything"),
        ({"rules": {"v": 0.5}}, RecipeError, "sites = 'v' matches none of the weights bias, w"),
        (
            {"rules": {"w": 0.999}},
            RecipeError,
            r"weight 'w' of shape \(12, 6\): prune 99.9% uniform would leave",
        ),
        (
            {"rules": rule(sparsity=0.95, pattern="channel")},
            RecipeError,
            "would leave nothing of it; lower its sparsity",
        ),
        (
            {
                "rules": rule(sites=".", sparsity=0.98, distribution="global"),
                "params": {"w": array(6, 6), "v": array(6, 6)},
            },
            RecipeError,
            "sites = '.': prune 98% global would not leave one of each of the weights v, w; lower its sparsity",
        ),
        (
            {"rules": rule(pattern="2:5")},
            UnsupportedError,
            r"weight 'w' of shape \(12, 6\): .* divide its 12 rows",
        ),
        ({"rules": rule(sparsity=0.5, method="wanda")}, RecipeError, "method = 'wanda' prunes a trained model once"),
        ({"rules": rule(pattern="2:4"), "regrow": Regrow()}, RecipeError, "fixes which elements are kept"),
        ({"rules": {"w": 0.5}, "regrow": Regrow(), "straight_through": True}, RecipeError, "leave regrow out"),
        (
            {"rules": {"w": 0.5}, "masks": {"w": jnp.ones((6, 12), bool)}},
            ModelError,
            "the mask of weight 'w' has shape",
        ),
        ({"rules": {"w": 0.5}, "masks": {"bias": jnp.ones(6, bool)}}, ModelError, "mask 'bias' has no weight"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(parts, error, message):
    with pytest.raises(error, match=message) as caught:
        run(**({"params": START} | parts))
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_pruned():
    with pytest.raises(ModelError, match="weight 'w' is int32; only weights of floats are pruned"):
        run({"w": jnp.ones((4, 4), jnp.int32)}, {"w": 0.5})
    with pytest.raises(ModelError, match="weight 'w' is not finite"):
        run({"w": array(4, 4).at[0, 0].set(jnp.nan)}, {"w": 0.5})
    with pytest.raises(ModelError, match=r"weight 'w' of shape \(0, 4\) is empty; there is nothing to prune"):
        run({"w": jnp.zeros((0, 4))}, {"w": 0.5})
    _, state = run(START | {"empty": jnp.zeros((3, 0))}, {".*": 0.5})
    assert set(state.masks) == {"w"}
    plan = resolve(lx.Recipe.parse('[[prune]]\nsites = "head"\nsparsity = 0.5', name="test"), program())
    with pytest.raises(ModelError, match=r"the plan prunes weight 'head', which is not among bias, w; give the tree"):
        run(START, plan)
    with pytest.raises(ModelError, match=r"weight 'head' has shape \(6, 8\), which it has not in the plan's program"):
        run(program().weights | {"head": array(6, 8)}, plan)


# An optimizer's state, as a checkpoint may hold it, and weights or rules that it was not made for.
MORE = START | {"v": array(4, 6)}
RESTORED = {
    "another shape": (
        START,
        START | {"w": array(4, 6)},
        "w",
        r"the mask of weight 'w' has shape \(12, 6\), .* \(4, 6\)",
    ),
    "another name": (START, {"v": START["w"]}, "v", "mask 'w' has no weight; the weights are v"),
    "one weight more": (START, MORE, "w|v", r"has no mask of weight 'v' of shape \(4, 6\), .*it has masks of w"),
    "one weight less": (MORE, START, "w|v", "mask 'v' has no weight; the weights are bias, w"),
    "a rule less": (
        MORE,
        MORE,
        "w",
        r"has a mask of weight 'v' of shape \(4, 6\), which no rule prunes; .* has masks of v, w",
    ),
}


@pytest.mark.parametrize("name", RESTORED)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_state_of_other_weights_or_rules_is_refused(name, wrap):
    before, params, rule, message = RESTORED[name]
    state = sparsify(optax.sgd(RATE), {"w|v": 0.5}, schedule=one_shot()).init(before)
    optimizer = sparsify(optax.sgd(RATE), {rule: 0.5}, schedule=one_shot())
    update = wrap(lambda params, state: optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params))
    with pytest.raises(ModelError, match=message) as caught:
        update(params, state)
    assert "\n" not in str(caught.value)


def test_masks_restored_onto_other_shapes_are_refused(tmp_path):
    _, state = run(START, {"w": 0.5})
    message = r"the mask of weight 'w' has shape \(12, 6\), the weight \(4, 6\)"
    with pytest.raises(ModelError, match=message):
        finalize({"w": array(4, 6)}, state)
    with pytest.raises(ModelError, match=message):
        masked(linear, masks_of(state))(START | {"w": array(4, 6)}, array(3, 4))
    # A checkpoint that is restored without saying into what is a tree of dicts and arrays.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "state")
    with pytest.raises(
        ModelError, match=r"its state is a dict, not a SparsityState; restore a checkpoint into the tree"
    ):
        run(START, {"w": 0.5}, state=found)


def test_a_weight_that_breaks_while_training_stays_visible():
    _, state = run(START, {"w": 0.5})
    broken = START | {"w": START["w"].at[2, 3].set(jnp.nan)}
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.5}, schedule=periodic(every=1))
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, broken), optimizer.init(START), broken)
    assert bool(state.masks["w"][2, 3])
    with pytest.raises(ModelError, match="weight 'w' is not finite"):
        finalize(broken, state)


def test_calls_that_cannot_work():
    optimizer = sparsify(optax.sgd(RATE), {"w": 0.5}, schedule=one_shot())
    with pytest.raises(ModelError, match="so its update needs them"):
        optimizer.update(START, optimizer.init(START))
    with pytest.raises(ModelError, match="exactly one state made by sparsify, found 0"):
        masks_of(optax.adam(0.1).init(START))
    for make in (lambda: Regrow("magic"), lambda: Regrow(share=1.5)):
        with pytest.raises(RecipeError, match="Regrow"):
            make()
