"""Magnitude pruning against a sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

from lepton_xla.errors import ModelError
from lepton_xla.passes import find_sites, magnitude_masks, masked, prune, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def recipe(sparsity=0.5, sites=".*", distribution="uniform", more=""):
    text = f'on_unsupported = "keep"\n[[prune]]\nsites = "{sites}"\nsparsity = {sparsity}\n'
    return Recipe.parse(f'{text}distribution = "{distribution}"\n{more}', name="test")


def pruned(program, chosen):
    return prune(program, resolve(chosen, program))


def smallest(values, dropped):
    """Mask without the `dropped` smallest magnitudes, the first of equal ones, NaN the largest."""
    order = np.argsort(np.abs(np.asarray(values, np.float64)).ravel(), kind="stable")
    keep = np.ones(order.size, bool)
    keep[order[:dropped]] = False
    return keep


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(width=32)),
    st.floats(0, 0.999),
)
def test_masks_are_a_stable_sort(values, sparsity):
    (mask,) = magnitude_masks([jnp.asarray(values)], sparsity)
    assert mask.shape == values.shape
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.ravel(mask), smallest(values, round(sparsity * values.size)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 0.999])
def test_exact_count_and_smallest(dtype, sparsity):
    values = array(33, 17).astype(dtype)
    (mask,) = magnitude_masks([values], sparsity)
    assert np.sum(~np.asarray(mask)) == round(sparsity * 33 * 17)
    magnitudes = np.abs(np.asarray(values, np.float64))
    if sparsity > 0:
        assert magnitudes[~np.asarray(mask)].max() <= magnitudes[np.asarray(mask)].min()


def test_equal_ones_go_in_order_and_nan_last():
    (mask,) = magnitude_masks([jnp.asarray([1.0, -1.0, 1.0, 2.0, -1.0, jnp.nan])], 0.5)
    assert mask.tolist() == [False, False, False, True, True, True]
    (mask,) = magnitude_masks([jnp.asarray([jnp.nan, jnp.nan, 0.0, jnp.inf])], 0.75)
    assert mask.tolist() == [False, True, False, False]


def test_subnormals_are_ranked_as_they_are():
    (mask,) = magnitude_masks([jnp.asarray(np.float32([3e-44, 1e-45, 2e-44, 0.0]))], 0.5)
    assert mask.tolist() == [True, False, True, False]


def test_several_weights_are_ranked_together():
    weights = [array(5, 4), 10 * array(3, seed=1), 0.1 * array(2, 2, 2, seed=2)]
    masks = magnitude_masks(weights, 0.4)
    flat = np.concatenate([np.ravel(weight) for weight in weights])
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks]), smallest(flat, round(0.4 * flat.size)))
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]


def network(w, x):
    hidden = jnp.tanh(x @ w["first"] + w["bias"][None])
    hidden = hidden * w["gain"][None] + jnp.take(w["table"], jnp.zeros(x.shape[0], int), axis=0)
    return jnp.tanh(hidden @ w["second"].T)


def net():
    weights = {
        "first": array(6, 8), "bias": array(8, seed=1), "gain": array(8, seed=2),
        "table": array(9, 8, seed=3), "second": 3 * array(5, 8, seed=4),
    }  # fmt: skip
    return trace(network, weights, ROWS)


def test_uniform_prunes_each_weight_and_nothing_else():
    program = net()
    small = pruned(program, recipe(0.25))
    assert set(small.masks) == {"first", "second"}
    for name in ("bias", "gain", "table"):
        np.testing.assert_array_equal(small.weights[name], program.weights[name])
    for name in ("first", "second"):
        weight, size = np.asarray(program.weights[name]), program.weights[name].size
        keep = smallest(weight, round(0.25 * size)).reshape(weight.shape)
        np.testing.assert_array_equal(small.masks[name], keep)
        np.testing.assert_array_equal(small.weights[name], np.where(keep, weight, 0))
    report = small.history[-1]
    assert {site.site: (site.action, site.metrics.get("sparsity")) for site in report.sites} == {
        "first": ("pruned", 0.25), "second": ("pruned", 0.25), "table": ("kept", None),
    }  # fmt: skip
    assert [site.reason for site in report.sites if site.site == "table"] == ["an embedding"]


def test_global_takes_more_where_magnitudes_are_small():
    program = net()
    small = pruned(program, recipe(0.5, distribution="global"))
    dropped = {name: np.sum(~np.asarray(mask)) for name, mask in small.masks.items()}
    assert sum(dropped.values()) == round(0.5 * (48 + 40))
    flat = np.concatenate([np.ravel(program.weights[name]) for name in ("first", "second")])
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(small.masks[name]) for name in ("first", "second")]), smallest(flat, 44)
    )
    assert dropped["first"] > dropped["second"]


def test_sparsity_zero_changes_nothing():
    program = net()
    small = pruned(program, recipe(0))
    assert all(np.asarray(mask).all() for mask in small.masks.values())
    for name, weight in program.weights.items():
        np.testing.assert_array_equal(small.weights[name], weight)


def test_stacked_layers_are_pruned_step_by_step():
    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["stack"])[0]

    stack = array(3, 6, 6) * jnp.asarray([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    small = pruned(trace(fn, {"stack": stack}, ROWS), recipe(0.5))
    for step in range(3):
        keep = smallest(stack[step], 18).reshape(6, 6)
        np.testing.assert_array_equal(small.masks["stack"][step], keep)


def test_a_weight_used_twice_is_pruned_once():
    def fn(w, x):
        return jnp.tanh(x @ w["w"]) @ w["w"]

    program = trace(fn, {"w": array(6, 6)}, ROWS)
    small = pruned(program, recipe(0.5))
    assert np.sum(np.asarray(small.weights["w"]) == 0) == 18
    assert [site.site for site in small.history[-1].sites] == ["w", "w#1"]


def test_pruning_again_and_more():
    program = net()
    half = pruned(program, recipe(0.5))
    more = pruned(half, recipe(0.75))
    assert not (np.asarray(more.masks["first"]) & ~np.asarray(half.masks["first"])).any()
    assert np.sum(np.asarray(more.weights["first"]) == 0) == 36


def test_masked_holds_the_zeros_in_value_and_gradient():
    program = pruned(net(), recipe(0.5))
    # Zeros no longer zero, and all so small that no tanh saturates, on whatever machine.
    tree = {name: 0.3 * leaf + 0.1 for name, leaf in program.weights.items()}
    held = masked(network, program.masks)
    x = array(4, 6, seed=9)
    expected = network({n: jnp.where(program.masks.get(n, True), w, 0.0) for n, w in tree.items()}, x)
    np.testing.assert_allclose(held(tree, x), expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(held(w, x) ** 2)))(tree)
    for name, mask in program.masks.items():
        mask = np.asarray(mask)
        assert (np.asarray(gradient[name])[~mask] == 0).all()
        assert (np.asarray(gradient[name])[mask] != 0).mean() > 0.9
    assert np.abs(gradient["bias"]).min() > 0


def test_masked_does_not_pass_a_broken_value_on():
    held = masked(lambda w: jnp.sum(w["w"]), {"w": jnp.asarray([True, False])})
    value, gradient = jax.value_and_grad(held)({"w": jnp.asarray([2.0, jnp.nan])})
    assert value == 2
    assert gradient["w"].tolist() == [1.0, 0.0]


def test_straight_through_gives_masked_elements_the_gradient_of_what_is_used():
    program = pruned(net(), recipe(0.5))
    tree = {name: leaf + 1.0 for name, leaf in program.weights.items()}
    x = array(4, 6, seed=9)

    def loss(fn):
        return lambda w: jnp.sum(fn(w, x) ** 2)

    through = jax.value_and_grad(loss(masked(network, program.masks, straight_through=True)))(tree)
    used = {n: jnp.where(program.masks.get(n, True), w, 0.0) for n, w in tree.items()}
    expected = jax.value_and_grad(loss(network))(used)
    np.testing.assert_allclose(through[0], expected[0], rtol=1e-6)
    for name in tree:
        np.testing.assert_allclose(through[1][name], expected[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"frist": jnp.ones((6, 8), bool)},
            "mask 'frist' has no weight; the weights are bias, first, gain, second, table",
        ),
        (
            {"first": jnp.ones((8, 6), bool)},
            r"the mask of weight 'first' has shape \(8, 6\), the weight \(6, 8\)",
        ),
    ],
)
def test_masks_of_another_model_are_refused(masks, message):
    with pytest.raises(ModelError, match=message):
        masked(network, masks)(net().weights, array(4, 6))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_zeros_survive_int8(granularity):
    more = f'[[quantize]]\nsites = ".*"\ngranularity = "{granularity}"'
    program = net()
    chosen = recipe(0.5, more=more)
    small = pruned(program, chosen)
    lowered = quantize(small, resolve(chosen, program))
    codes = np.asarray(lowered.weights["first"].codes())
    assert (codes[~np.asarray(small.masks["first"])] == 0).all()
    codes = np.asarray(lowered.weights["second"].codes())  # laid out as its product takes it
    assert (codes[~np.asarray(small.masks["second"]).T] == 0).all()
    assert {site.name for site in find_sites(small)} == {"first", "second", "table"}


def test_a_large_weight_is_quick():
    import time

    values = array(2000, 1500)
    start = time.perf_counter()
    magnitude_masks([values], 0.5)
    assert time.perf_counter() - start < 2
