"""Patterns, shares and methods compared with NumPy in float64; bit-identical on 1, 2 and 8 devices."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lepton_xla.errors import ModelError, RecipeError, UnsupportedError
from lepton_xla.passes import prune
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.pruning.masks import Pattern, Regrowth, find_masks, group_masks
from lepton_xla.passes.pruning.scores import element_scores
from lepton_xla.passes.pruning.shares import erk_densities, rule_shares
from lepton_xla.passes.pruning.targets import plan_targets
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def parse(rule, sites=".*", more=""):
    return Recipe.parse(f'{more}\n[[prune]]\nsites = "{sites}"\n{rule}', name="test")


def masks_of(program, rule, **more):
    return {
        path: np.asarray(mask) for path, mask in prune(program, resolve(parse(rule, **more), program)).masks.items()
    }


def dense(weight, inputs=None):
    rows = TensorSpec(("batch", inputs or weight.shape[0]), "float32")
    return trace(lambda w, x: x @ w["w"], {"w": weight}, {"x": rows})


def groups_of(scores, kept, of):
    """N:M along the rows of [K, N]: the largest of each group, of equal ones the last."""
    mask = np.zeros(scores.shape, bool)
    for start in range(0, scores.shape[0], of):
        part = np.asarray(scores[start : start + of], np.float64)
        order = np.argsort(part, axis=0, kind="stable")[of - kept :]
        np.put_along_axis(mask[start : start + of], order, values=True, axis=0)
    return mask


def rank(scores, dropped):
    order = np.argsort(scores, axis=None, kind="stable")
    keep = np.ones(scores.size, bool)
    keep[order[:dropped]] = False
    return keep.reshape(scores.shape)


# Patterns.


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (1, 2), (4, 8)])
def test_groups_keep_the_largest_of_each(kept, of):
    weight = array(16, 6)
    mask = masks_of(dense(weight), f'pattern = "{kept}:{of}"')["w"]
    np.testing.assert_array_equal(mask, groups_of(np.abs(weight), kept, of))
    assert (mask.reshape(16 // of, of, 6).sum(1) == kept).all()


@settings(max_examples=10)
@given(st.integers(1, 7), st.integers(2, 8), st.floats(0, 1), st.integers(0, 3))
def test_groups_never_drop_more_than_the_pattern_and_equal_ones_in_order(kept, of, sparsity, seed):
    pattern = Pattern("n_m", of, kept=min(kept, of - 1))
    scores = np.random.default_rng(seed).integers(0, 3, (of * 2, 3)).astype(np.float32)
    mask = group_masks(jnp.asarray(scores), pattern, sparsity)
    left = of - min(round(sparsity * of), of - pattern.kept)
    np.testing.assert_array_equal(mask, groups_of(scores, left, of))


def test_channels_go_by_their_mean_magnitude():
    weight = np.asarray(array(12, 10))
    mask = masks_of(dense(jnp.asarray(weight)), 'pattern = "channel"\nsparsity = 0.4')["w"]
    keep = rank(np.abs(weight.astype(np.float64)).mean(0), 4)
    np.testing.assert_array_equal(mask, np.broadcast_to(keep, weight.shape))


def test_blocks_go_by_their_mean_magnitude():
    weight = np.asarray(array(12, 10))
    mask = masks_of(dense(jnp.asarray(weight)), 'pattern = "block:4x2"\nsparsity = 0.4')["w"]
    means = np.abs(weight.astype(np.float64)).reshape(3, 4, 5, 2).mean((1, 3))
    np.testing.assert_array_equal(mask, np.kron(rank(means, 6), np.ones((4, 2), bool)))


# The matrix of every kind of product.


def convolve(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def convolution(weight, groups=1):
    image = TensorSpec(("batch", 5, 5, weight.shape[2] * groups), "float32")
    return trace(lambda w, x: convolve(x, w["w"], groups), {"w": weight}, {"x": image})


def test_a_convolutions_groups_are_of_input_channels():
    weight = array(3, 3, 8, 5)
    mask = masks_of(convolution(weight), 'pattern = "2:4"')["w"]
    for row in range(3):
        for column in range(3):
            np.testing.assert_array_equal(mask[row, column], groups_of(np.abs(weight[row, column]), 2, 4))


def test_a_convolutions_channels_are_its_outputs():
    weight = np.asarray(array(3, 3, 4, 8))
    mask = masks_of(convolution(jnp.asarray(weight), groups=2), 'pattern = "channel"\nsparsity = 0.5')["w"]
    keep = rank(np.abs(weight.astype(np.float64)).mean((0, 1, 2)), 4)
    np.testing.assert_array_equal(mask, np.broadcast_to(keep, weight.shape))


def test_a_transposed_weights_groups_are_of_what_is_summed_over():
    weight = array(6, 8)
    program = trace(lambda w, x: x @ w["w"].T, {"w": weight}, {"x": TensorSpec(("batch", 8), "float32")})
    np.testing.assert_array_equal(masks_of(program, 'pattern = "2:4"')["w"], groups_of(np.abs(weight.T), 2, 4).T)


def test_a_batched_products_channels_are_of_each_batch():
    weight = np.asarray(array(3, 8, 6))
    program = trace(
        lambda w, x: jnp.einsum("bek,ekn->ben", x, w["w"]),
        {"w": jnp.asarray(weight)},
        {"x": TensorSpec(("b", 3, 8), "float32")},
    )
    mask = masks_of(program, 'pattern = "channel"\nsparsity = 0.5')["w"]
    keep = rank(np.abs(weight.astype(np.float64)).mean(1), 9)
    np.testing.assert_array_equal(mask, np.broadcast_to(keep[:, None], weight.shape))


@pytest.mark.parametrize("rule", ["sparsity = 0.5", 'pattern = "2:4"', 'pattern = "channel"\nsparsity = 0.5'])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacked_layers_are_pruned_one_by_one_wherever_their_axis_is(axis, rule):
    stack = array(3, 8, 8) * jnp.asarray([1.0, 10.0, 100.0]).reshape(3, 1, 1)

    def fn(w, x):
        layers = jnp.moveaxis(w["w"], axis, 0)
        return lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)[0]

    program = trace(fn, {"w": jnp.moveaxis(stack, 0, axis)}, {"x": TensorSpec(("batch", 8), "float32")})
    mask = np.moveaxis(masks_of(program, rule)["w"], axis, 0)
    for step in range(3):
        np.testing.assert_array_equal(mask[step], masks_of(dense(stack[step]), rule)["w"])


def two_cuts(w, x):
    x = lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w["w"][:2])[0]
    x = lax.scan(lambda x, layer: (jnp.tanh(layer @ x.T).T, None), x, w["w"][2:])[0]
    return x + jnp.sum(w["w"])  # read as a whole, so that its parts are no weights


def test_layers_that_are_cut_from_a_stack_which_is_read_as_a_whole_are_one_weight():
    program = trace(two_cuts, {"w": array(3, 8, 8)}, {"x": TensorSpec(("batch", 8), "float32")})
    mask = masks_of(program, "sparsity = 0.25")["w"]
    assert ((~mask).sum((1, 2)) == 16).all()


# Shares.


def erk_of_the_paper(shapes, sparsity):
    """As RigL's authors compute it: what would be denser than whole is made whole, one maximum after the other."""
    size = [float(np.prod(shape)) for shape in shapes]
    raw = [sum(shape) / np.prod(shape) for shape in shapes]
    whole = set()
    while True:
        rest = [index for index in range(len(shapes)) if index not in whole]
        free = sum(size[i] * (1 - sparsity) for i in rest) - sum(size[i] * sparsity for i in whole)
        factor = free / sum(raw[i] * size[i] for i in rest)
        if max(raw[i] for i in rest) * factor <= 1 + 1e-9:
            return [1.0 if i in whole else factor * raw[i] for i in range(len(shapes))]
        whole |= {i for i in rest if raw[i] == max(raw[j] for j in rest)}


@settings(max_examples=80)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=4),
    st.floats(0, 0.99),
)
def test_erk_is_that_of_the_paper(shapes, sparsity):
    sizes, ratios = [int(np.prod(s)) for s in shapes], [sum(s) / np.prod(s) for s in shapes]
    wanted = erk_of_the_paper(shapes, sparsity)
    np.testing.assert_allclose(erk_densities(sizes, ratios, sparsity), wanted, rtol=1e-5)
    traced = erk_densities(sizes, ratios, jnp.float32(sparsity))
    np.testing.assert_allclose(np.asarray(traced), wanted, rtol=1e-3, atol=1e-5)


def test_erk_spares_small_weights_and_keeps_the_whole_share():
    def fn(w, x):
        return jnp.tanh(convolve(x, w["conv"])).mean((1, 2)) @ w["wide"] @ w["head"]

    weights = {"conv": array(3, 3, 4, 16), "wide": array(16, 200), "head": array(200, 6)}
    program = trace(fn, weights, {"x": TensorSpec(("b", 5, 5, 4), "float32")})
    masks = masks_of(program, 'sparsity = 0.7\ndistribution = "erk"')
    wanted = erk_of_the_paper([(4, 16, 3, 3), (16, 200), (200, 6)], 0.7)
    for name, density in zip(("conv", "wide", "head"), wanted, strict=True):
        assert masks[name].sum() == masks[name].size - round((1 - density) * masks[name].size)
    total = sum(mask.size for mask in masks.values())
    assert abs(sum(mask.sum() for mask in masks.values()) - 0.3 * total) < 2


# Methods.


def test_deviation_drops_what_is_below_so_many_standard_deviations():
    weight = np.asarray(array(40, 30) + 0.3)
    mask = masks_of(dense(jnp.asarray(weight)), 'method = "deviation:1.5"')["w"]
    np.testing.assert_array_equal(mask, np.abs(weight) >= 1.5 * weight.astype(np.float64).std())


def test_random_drops_so_many_anywhere_and_what_is_zero_first():
    weight = np.asarray(array(10, 10)) * (np.arange(10) > 0)[:, None]
    program = dense(jnp.asarray(weight))
    plan = resolve(parse('method = "random"\nsparsity = 0.5'), program)
    first, again, other = (np.asarray(prune(program, plan, seed=seed).masks["w"]) for seed in (0, 0, 1))
    assert (~first).sum() == 50
    assert not first[0].any()
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_weights_of_one_shape_are_not_pruned_at_the_same_places():
    shape = {"x": TensorSpec(("batch", 10), "float32")}
    program = trace(lambda w, x: x @ w["a"] @ w["b"], {"a": array(10, 10), "b": array(10, 10)}, shape)
    masks = masks_of(program, 'method = "random"\nsparsity = 0.5')
    assert (masks["a"] != masks["b"]).mean() > 0.3


def test_saliency_needs_gradients():
    program = dense(array(10, 10))
    with pytest.raises(RecipeError, match=r"weight 'w': method = 'saliency' needs gradients: train with"):
        masks_of(program, 'method = "saliency"\nsparsity = 0.5')
    (target,) = plan_targets(resolve(parse('method = "saliency"\nsparsity = 0.5'), program), program.weights)
    weight, gradient = array(10, 10), array(10, 10, seed=1)
    scores = {"w": element_scores(target, weight, gradient=gradient)}
    found = find_masks([target], scores, rule_shares([target]))["w"]
    np.testing.assert_array_equal(found, rank(np.abs(np.asarray(weight) * np.asarray(gradient)), 50))


def test_regrowth_replaces_a_share_of_what_is_kept():
    program = dense(array(10, 10))
    (target,) = plan_targets(resolve(parse("sparsity = 0.6"), program), program.weights)
    weight, promise = np.asarray(program.weights["w"]), np.abs(np.asarray(array(10, 10, seed=1)))
    old = rank(np.abs(weight), 50)
    scores = {"w": jnp.asarray(np.where(old, np.abs(weight), 0))}
    regrowth = Regrowth({"w": jnp.asarray(old)}, {"w": jnp.asarray(promise)}, 0.3)
    found = np.asarray(find_masks([target], scores, {"w": jnp.float32(0.6)}, regrowth=regrowth)["w"])
    retained = rank(np.abs(weight), 100 - 28)  # 40 stay, of which 12 are new
    grown = rank(np.where(retained, np.inf, promise), 60)
    np.testing.assert_array_equal(found, grown)
    assert found.sum() == 40


# What does not fit.


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        ('pattern = "2:4"', (10, 6), "site 'w' .*groups of 4 do not divide its 10 rows"),
        ('pattern = "block:4x1"\nsparsity = 0.5', (10, 6), "groups of 4 do not divide its 10 rows"),
        ('pattern = "block:2x4"\nsparsity = 0.5', (10, 6), "blocks of 4 columns do not divide its 6 output channels"),
    ],
)
def test_a_pattern_that_does_not_divide_names_site_and_size(rule, shape, message):
    program = dense(array(*shape))
    with pytest.raises(UnsupportedError, match=message) as caught:
        resolve(parse(rule), program)
    assert "\n" not in str(caught.value)
    plan = resolve(parse(rule, more='on_unsupported = "keep"'), program)
    small = prune(program, plan)
    assert not small.masks
    assert "do not divide" in small.history[-1].sites[0].reason


def test_groups_do_not_straddle_a_convolutions_positions():
    with pytest.raises(UnsupportedError, match="groups of 4 do not divide its 2 input channels"):
        resolve(parse('pattern = "2:4"'), convolution(array(2, 2, 2, 3)))


def test_a_weight_used_in_two_layouts_has_no_one_matrix():
    program = trace(lambda w, x: x @ w["w"] @ w["w"].T, {"w": array(8, 8)}, {"x": TensorSpec(("b", 8), "float32")})
    with pytest.raises(UnsupportedError, match="its weight is used in two layouts, at 'w' and 'w#1'"):
        resolve(parse('pattern = "2:4"'), program)
    assert (~masks_of(program, "sparsity = 0.5")["w"]).sum() == 32


def test_a_pattern_needs_the_whole_weight():
    program = trace(two_cuts, {"w": array(3, 8, 8)}, {"x": TensorSpec(("batch", 8), "float32")})
    with pytest.raises(UnsupportedError, match="its weight is broadcast or cut before use"):
        resolve(parse('pattern = "channel"\nsparsity = 0.5'), program)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [('pattern = "channel"\nsparsity = 0.9', (8, 4)), ("sparsity = 0.99", (3, 4))],
)
def test_nothing_left_of_a_weight_is_refused(rule, shape):
    with pytest.raises(RecipeError, match=r"weight 'w' of shape .* would leave nothing of it; lower its sparsity"):
        masks_of(dense(array(*shape)), rule)


def test_nothing_left_of_one_layer_is_refused():
    stack = jnp.stack([array(8, 8), 1e-3 * array(8, 8, seed=1)])
    program = trace(
        lambda w, x: lax.scan(lambda x, layer: (x @ layer, None), x, w["w"])[0],
        {"w": stack},
        {"x": TensorSpec(("b", 8), "float32")},
    )
    with pytest.raises(RecipeError, match=r"weight 'w' of shape \(2, 8, 8\): prune 50% global would leave nothing"):
        masks_of(program, 'sparsity = 0.5\ndistribution = "global"')


def test_a_weight_of_zeros_loses_the_first_and_an_empty_one_is_no_weight():
    mask = np.ravel(masks_of(dense(jnp.zeros((4, 4))), "sparsity = 0.5")["w"])
    np.testing.assert_array_equal(mask, np.arange(16) >= 8)
    for rule in ("sparsity = 0.5", 'sparsity = 0.5\npattern = "channel"', 'sparsity = 0.5\ndistribution = "erk"'):
        with pytest.raises(UnsupportedError, match=r"site 'w' .*: not pruned: its weight is empty"):
            masks_of(dense(jnp.zeros((4, 0))), rule)


def test_a_weight_of_whole_numbers_is_refused_by_its_own_dtype():
    whole = trace(
        lambda w, x: x @ w["w"].astype(jnp.float32),
        {"w": jnp.ones((4, 4), jnp.int32)},
        {"x": TensorSpec(("batch", 4), "float32")},
    )
    with pytest.raises(UnsupportedError, match=r"site 'w' .*: not pruned: its weight is int32"):
        masks_of(whole, "sparsity = 0.5")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    with pytest.raises(ModelError, match="weight 'w' is not finite"):
        masks_of(dense(array(8, 4).at[2, 3].set(value)), "sparsity = 0.5")


def test_embeddings_are_pruned_where_the_rule_is_for_them_alone():
    def fn(w, x):
        return jnp.take(w["table"], x, axis=0) @ w["dense"]

    program = trace(fn, {"table": array(10, 8), "dense": array(8, 4)}, {"x": TensorSpec(("b",), "int32")})
    assert set(masks_of(program, "sparsity = 0.5", more='on_unsupported = "keep"')) == {"dense"}
    assert (~masks_of(program, "sparsity = 0.25", sites="table")["table"]).sum() == 20
    with pytest.raises(UnsupportedError, match="not for embeddings"):
        resolve(parse('pattern = "2:4"', sites="table"), program)


# Sharding.


def test_masks_are_the_same_bits_on_any_mesh():
    script = pathlib.Path(__file__).with_name("sharded_masks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["all", "alike"]


def test_what_is_cut_over_devices_is_pruned_there():
    mesh = jax.make_mesh((2,), ("d",))
    weight = array(16, 8)
    program = dense(weight)
    cut = program.replace(weights={"w": jax.device_put(weight, jax.NamedSharding(mesh, jax.P("d", None)))})
    plan = resolve(parse("sparsity = 0.4"), program)
    small = prune(cut, plan)
    assert small.weights["w"].sharding.spec == jax.P("d", None)
    np.testing.assert_array_equal(small.masks["w"], prune(program, plan).masks["w"])
