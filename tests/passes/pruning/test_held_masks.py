"""Masks only grow: pruned elements stay exactly zero in every sequence of pruning passes."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_xla as lx
from lepton_xla.passes import prune, shrink, sparsegpt, wanda
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.pruning.held import block_quotas
from lepton_xla.train import Regrow, finalize, sparsify
from lepton_xla.train.schedules import Schedule, one_shot, periodic, polynomial

SIZES = {"a": (16, 24), "stack": (2, 24, 24), "b": (24, 8)}


def model(seed=0):
    rng = np.random.default_rng(seed)
    weights = {name: jnp.asarray(rng.standard_normal(shape), "float32") for name, shape in SIZES.items()}

    def fn(w, x):
        x, _ = jax.lax.scan(lambda x, k: (jax.nn.relu(x @ k), None), jax.nn.relu(x @ w["a"]), w["stack"])
        return x @ w["b"]

    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 16), "float32")})


BATCHES = [{"x": np.random.default_rng(7).standard_normal((40, 16)).astype(np.float32)}]


def pruned(program, text):
    plan = resolve(lx.Recipe.parse(f'[[prune]]\nsites = ".*"\n{text}', name="test"), program)
    for method, by in (("wanda", wanda), ("sparsegpt", sparsegpt)):
        if method in text:
            return by(program, plan, BATCHES)
    return prune(program, plan)


def sparsity_of(program):
    return {path: round(1 - float(mask.mean()), 6) for path, mask in program.masks.items()}


def assert_grown(before, after):
    for path, mask in after.masks.items():
        earlier = np.asarray(before.masks.get(path, True))
        assert not (np.asarray(mask) & ~earlier).any(), path
        assert (np.asarray(after.weights[path])[~np.asarray(mask)] == 0).all(), path
    assert before.masks.keys() <= after.masks.keys()


RULES = [
    "sparsity = 0.3", "sparsity = 0.7", 'sparsity = 0.4\ndistribution = "global"', 'sparsity = 0.5\nmethod = "random"',
    'sparsity = 0.3\ndistribution = "erk"', 'pattern = "2:4"', 'sparsity = 0.3\npattern = "block:4x2"',
    'sparsity = 0.3\npattern = "channel"', 'method = "deviation:0.5"', 'sparsity = 0.4\nmethod = "wanda"',
    'pattern = "2:4"\nmethod = "wanda"',
]  # fmt: skip


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
def test_held_elements_count(method):
    """30 % after 50 % is 50 %, 70 % after it is 70 %; the first half is chosen by what none of the methods looks at."""
    half = pruned(model(), 'sparsity = 0.5\nmethod = "random"')
    assert set(sparsity_of(half).values()) == {0.5}
    less, more = (pruned(half, f'sparsity = {share}\nmethod = "{method}"') for share in (0.3, 0.7))
    for after in (less, more):
        assert_grown(half, after)
    if method == "wanda":  # it drops the same number of each output, of which more may be held already
        for after, share in ((less, 0.3), (more, 0.7)):
            held, gone = (1 - np.asarray(each.masks["a"]).sum(0) / 16 for each in (half, after))
            np.testing.assert_array_equal(gone, np.maximum(held, round(share * 16) / 16))
        return
    assert set(sparsity_of(less).values()) == {0.5}
    for path, share in sparsity_of(more).items():
        assert abs(share - 0.7) <= 0.5 / np.prod(SIZES[path][-2:])
    if method == "magnitude":  # what goes besides is the smallest of what there was
        left, gone = np.asarray(more.masks["a"]), np.asarray(half.masks["a"]) & ~np.asarray(more.masks["a"])
        weight = np.abs(np.asarray(half.weights["a"]))
        assert weight[gone].max() <= weight[left].min()


def test_a_pattern_over_an_unstructured_mask_drops_its_own_and_what_was_held():
    half = pruned(model(), 'sparsity = 0.5\nmethod = "random"')
    for method in ("magnitude", "wanda", "sparsegpt"):
        after = pruned(half, f'pattern = "2:4"\nmethod = "{method}"')
        assert_grown(half, after)
        kept = np.asarray(after.masks["a"]).reshape(4, 4, 24).sum(1)
        held = np.asarray(half.masks["a"]).reshape(4, 4, 24).sum(1)
        np.testing.assert_array_equal(kept, np.minimum(held, 2))


@settings(max_examples=3)
@given(st.lists(st.sampled_from(RULES), min_size=2, max_size=3), st.integers(0, 9))
def test_any_sequence_of_passes(rules, seed):
    programs = [model(seed)]
    for rule in rules:
        with contextlib.suppress(lx.RecipeError):  # where nothing would be left of a weight
            programs.append(pruned(programs[-1], rule))
    for before, after in itertools.pairwise(programs):
        assert_grown(before, after)
    small = shrink(programs[-1], sparsity=0.25)
    for path, mask in small.masks.items():
        assert (np.asarray(small.weights[path])[~np.asarray(mask)] == 0).all()
        assert mask.shape == small.weights[path].shape
    assert_grown(small, pruned(small, "sparsity = 0.2"))


def test_a_recipe_with_several_blocks_and_optimize_again():
    half = pruned(model(), 'sparsity = 0.5\nmethod = "random"')
    blocks = (
        '[[prune]]\nsites = "a"\nsparsity = 0.2\n[[prune]]\nsites = "stack"\npattern = "2:4"\nmethod = "wanda"\n'
        '[[prune]]\nsites = "b"\nsparsity = 0.6\nmethod = "sparsegpt"\n[[quantize]]\nsites = ".*"'
    )
    after = lx.optimize(half, lx.Recipe.parse(f"measure = false\n{blocks}", name="test"), calibration=BATCHES)
    for path, mask in after.masks.items():
        assert not (np.asarray(mask) & ~np.asarray(half.masks[path])).any()
    assert sparsity_of(after)["a"] == 0.5
    assert 0.5 < sparsity_of(after)["stack"] < 0.75
    assert abs(sparsity_of(after)["b"] - 0.6) < 0.005


TRAINING = {
    "from nothing": ("sparsity = 0.5", polynomial(0, 3, every=1), {}),
    "less is asked": ("sparsity = 0.3", periodic(0, every=2), {}),
    "it falls": ("sparsity = 0.5", optax.linear_schedule(0.6, 0.2, 4), {}),
    "once": ("sparsity = 0.6", one_shot(1), {}),
    "saliency": ('sparsity = 0.6\nmethod = "saliency"', polynomial(0, 3, every=1), {}),
    "global": ('sparsity = 0.6\ndistribution = "global"', polynomial(0, 3, every=1), {}),
    "erk": ('sparsity = 0.6\ndistribution = "erk"', polynomial(0, 3, every=1), {}),
    "2:4": ('pattern = "2:4"', polynomial(0, 3, every=1), {}),
    "block": ('sparsity = 0.6\npattern = "block:4x2"', polynomial(0, 3, every=1), {}),
    "channel": ('sparsity = 0.6\npattern = "channel"', polynomial(0, 3, every=1), {}),
    "deviation": ('method = "deviation:0.3"', periodic(0, every=1), {}),
    "straight through": ("sparsity = 0.6", polynomial(0, 3, every=1), {"straight_through": True}),
    "straight through 2:4": ('pattern = "2:4"', polynomial(0, 3, every=1), {"straight_through": True}),
    "straight through global": (
        'sparsity = 0.6\ndistribution = "global"', polynomial(0, 3, every=1), {"straight_through": True}
    ),
    "RigL": ("sparsity = 0.6", polynomial(0, 3, every=1), {"regrow": Regrow("gradient")}),
    "SET": ('sparsity = 0.6\npattern = "block:4x2"', polynomial(0, 3, every=1), {"regrow": Regrow("random")}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING)
def test_sparsify_goes_on_from_masks(name):
    rule, schedule, more = TRAINING[name]
    held = pruned(model(), 'pattern = "2:4"' if "2:4" in name else 'sparsity = 0.5\nmethod = "random"')
    if name == "SET":
        held = pruned(model(), 'sparsity = 0.5\npattern = "block:4x2"')
    plan = resolve(lx.Recipe.parse(f'[[prune]]\nsites = ".*"\n{rule}', name="test"), held)
    if not isinstance(schedule, Schedule):
        schedule = Schedule.of(schedule, every=1, end=3)
    optimizer = sparsify(optax.sgd(0.05), plan, schedule=schedule, masks=held.masks, **more)
    state, params = optimizer.init(held.weights), held.weights
    step = jax.jit(optimizer.update)
    exchanged = bool(more)
    for number in range(5):
        rng = np.random.default_rng(number)
        gradients = {k: jnp.asarray(rng.standard_normal(v.shape), v.dtype) for k, v in params.items()}
        before = {path: np.asarray(mask) for path, mask in state.masks.items()}
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        total = [sum(mask.sum() for mask in masks.values()) for masks in (before, state.masks)]
        assert total[1] <= total[0]
        for path, mask in state.masks.items():
            if not exchanged:
                assert not (np.asarray(mask) & ~before[path]).any(), (name, number, path)
            if "straight_through" not in more:
                assert (np.asarray(params[path])[~np.asarray(mask)] == 0).all()
    weights, masks = finalize(params, state)
    after = held.replace(weights=weights, masks=masks)
    for path, mask in masks.items():
        assert (np.asarray(weights[path])[~np.asarray(mask)] == 0).all()
    if not exchanged:
        assert_grown(held, after)
    if rule.startswith("sparsity = 0.6") and "erk" not in name and "channel" not in name and "block" not in rule:
        assert abs(sum((~m).sum() for m in masks.values()) / sum(m.size for m in masks.values()) - 0.6) < 0.01


def test_blocks_lose_what_is_held_and_an_equal_share_of_the_rest():
    kept = np.ones((6, 10), bool)
    kept[:2, :5] = False  # 10 of the 20 of the first block are held
    np.testing.assert_array_equal(block_quotas(jnp.asarray(kept), 0.5, 2), [14, 8, 8])
    np.testing.assert_array_equal(block_quotas(jnp.asarray(kept), 0.1, 2), [10, 0, 0])
    np.testing.assert_array_equal(block_quotas(jnp.asarray(kept), 0.5, 4), [22, 8])
