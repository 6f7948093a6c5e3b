"""Shrinking: the smaller model equals the original with the removed weights set to zero, in every framework."""

import itertools
import sys

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lepton_xla as lx
from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.errors import CalibrationError, RecipeError, UnsupportedError
from lepton_xla.passes import cost, find_groups, find_sites, fold, prune, quantize, shrink
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGES = {"image": TensorSpec(("batch", 8, 8, 3), "float32")}
TOKENS = {"tokens": TensorSpec(("batch", 5), "int32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def untrivial(tree, seed=1):
    """The tree's arrays replaced by random ones, no two elements of one the same, variances positive."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        positive = "var" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.uniform(0.5, 2, leaf.shape) if positive else rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(random, tree)


def masked(program, small):
    """The program's weights, all that the small one lacks set to zero: told by the values, which are all different."""
    weights = {}
    for path, weight in program.weights.items():
        stays = np.isin(weight, small.weights[path])
        assert stays.sum() == small.weights[path].size, path
        weights[path] = jnp.where(stays, weight, jnp.zeros_like(weight))
    return weights


def assert_equals_masked(program, small, *inputs, tolerance=2e-5):
    got = jax.tree.leaves(jax.jit(small.fn)(small.weights, *inputs))
    expected = jax.tree.leaves(jax.jit(program.fn)(masked(program, small), *inputs))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b))))


def shapes(program):
    return {path: weight.shape for path, weight in program.weights.items()}


def units(program):
    """Group name -> units, of those that may lose some."""
    return {group.name: group.units for group in find_groups(program).removable}


@pytest.fixture
def lenient():
    """Promotion as users have it, where a framework's own layers need it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Residual(nn.Module):
    """Batch norms, a strided block with a projection, branches joined, pooled and flattened."""

    @nn.compact
    def __call__(self, image, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(image)))
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(norm()(nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            x = nn.relu((x if stride == 1 else nn.Conv(width, (1, 1), strides=2)(x)) + y)
        x = jnp.concatenate([nn.Conv(4, (1, 1))(x), nn.sigmoid(nn.Conv(6, (3, 3))(x))], -1)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.tanh(nn.Dense(10)(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(x)


def linen(module, inputs, *arrays):
    return from_linen(module, untrivial(jax.eval_shape(module.init, jax.random.key(0), *arrays)), inputs)


@pytest.fixture(scope="module")
def residual():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return linen(Residual(), IMAGES, array(1, 8, 8, 3))


def test_residual_network_equals_the_masked_one(residual, lenient):
    small = shrink(residual, sparsity=0.5)
    assert_equals_masked(residual, small, array(2, 8, 8, 3))
    new = shapes(small)
    assert (new["params/Conv_0/kernel"], new["params/Conv_1/kernel"]) == ((3, 3, 3, 4), (3, 3, 4, 4))
    # The joined branches lose 2 of 4 and 3 of 6 channels at each of four places.
    assert new["params/Dense_0/kernel"] == (2 * 2 * (2 + 3), 5)
    assert new["batch_stats/BatchNorm_0/var"] == new["params/BatchNorm_2/scale"] == (4,)
    assert [site.name for site in find_sites(small)] == [site.name for site in find_sites(residual)]
    assert cost(small, {"batch": 1}).flops < 0.35 * cost(residual, {"batch": 1}).flops


def test_groups_of_the_residual_network(residual):
    groups = find_groups(residual)
    first = groups["params/Conv_0/kernel[3]"]
    assert set(first.paths) == {
        "params/Conv_0/kernel", "params/Conv_1/kernel", "params/Conv_2/kernel", "params/Conv_3/kernel",
        "params/Conv_5/kernel", *(f"params/BatchNorm_{k}/{name}" for k in (0, 2) for name in ("scale", "bias")),
        *(f"batch_stats/BatchNorm_{k}/{name}" for k in (0, 2) for name in ("mean", "var")),
    }  # fmt: skip
    # 27 made, 8 * 9 * 3 more of the block's (one made, two read), 12 of the projection's, 8 vectors.
    assert (first.units, first.kind, first.parameters) == (8, "channels", 27 + 72 + 72 + 108 + 12 + 8)
    assert groups["params/Dense_1/kernel[1]"].protected == "it is part of the program's output"
    text = str(groups)
    assert "params/Conv_0/kernel[3]" in text
    assert f"{len(groups)} groups, {len(groups.removable)} of which may lose units" in text
    with pytest.raises(KeyError, match="no group 'x'"):
        groups["x"]


def test_a_shrunk_program_shrinks_prunes_and_quantizes():
    rows = array(4, 6)
    small = shrink(shrink(fold(mlp((6, 32, 32, 3))), sparsity=0.25), sparsity=0.25)
    assert shapes(small)["w1"] == (18, 18)
    recipe = Recipe.parse('measure = false\n[[prune]]\nsites = ".*"\nsparsity = 0.5\n', name="p")
    pruned = prune(small, resolve(recipe, small))
    again = shrink(pruned, sparsity=0.3)
    assert {path: mask.shape for path, mask in again.masks.items()} == {
        path: shapes(again)[path] for path in pruned.masks
    }
    for path, mask in again.masks.items():
        np.testing.assert_array_equal(np.asarray(again.weights[path]) != 0, mask)
    recipe_of_codes = Recipe.parse('measure = false\n[[quantize]]\nsites = ".*"\nactivations = "none"\n', name="q")
    stored = quantize(again, resolve(recipe_of_codes, again))
    assert stored.weights_bytes < 0.5 * again.weights_bytes
    expected = jax.jit(again.fn)(again.weights, rows)
    np.testing.assert_allclose(
        jax.jit(stored.fn)(stored.weights, rows), expected, atol=0.05 * float(jnp.abs(expected).max())
    )
    assert [report.name for report in stored.history] == ["fold", "shrink", "shrink", "prune", "shrink", "quantize"]


def test_a_folded_program_shrinks(residual, lenient):
    folded = fold(residual)
    small = shrink(folded, sparsity=0.5)
    assert shapes(small)["params/Conv_0/kernel:bias"] == (4,)
    assert_equals_masked(folded, small, array(2, 8, 8, 3))


def test_a_shrunk_program_compiles_saves_and_loads(residual, lenient, tmp_path):
    image = np.asarray(array(3, 8, 8, 3))
    small = shrink(residual, sparsity=0.5)
    lx.compile(small, buckets={"batch": (1, 4)}).save(tmp_path / "small.lepton")
    loaded = lx.load(tmp_path / "small.lepton")
    np.testing.assert_allclose(
        loaded(image=image)["output"], jax.jit(small.fn)(small.weights, image), rtol=1e-4, atol=1e-4
    )


def test_symbolic_sizes_stay_symbolic(residual, lenient):
    small = shrink(residual, sparsity=0.5)
    (batch,) = jax.export.symbolic_shape("batch")
    given = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    exported = jax.export.export(jax.jit(small.fn))(small.weights, given)
    for size in (1, 3):
        image = array(size, 8, 8, 3)
        np.testing.assert_allclose(
            exported.call(small.weights, image), jax.jit(small.fn)(small.weights, image), rtol=1e-4, atol=1e-5
        )


def test_a_sharded_batch_and_vmap(residual, lenient):
    small = shrink(residual, sparsity=0.5)
    images = array(4, 8, 8, 3)
    expected = jax.jit(small.fn)(small.weights, images)
    mesh = jax.make_mesh((2,), ("data",))
    placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    out = jax.jit(small.fn)(small.weights, placed)
    assert out.sharding.spec[0] == "data"
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    one_by_one = jax.jit(jax.vmap(lambda image: small.fn(small.weights, image[None])[0]))(images)
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-4, atol=1e-5)


# Scanned layers.


def block(x, layer, heads):
    batch, seq, _ = x.shape
    qkv = jnp.einsum("bsd,de->bse", x, layer["qkv"]) + layer["bias"][None, None]
    query, key, value = (qkv.reshape(batch, seq, 3, heads, -1)[:, :, k] for k in range(3))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) * 0.5, -1)
    x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(batch, seq, -1) @ layer["out"]
    return x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]


def scanned_weights(layers=3, width=8):
    sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 16), "down": (16, width)}
    made = {name: 0.4 * array(layers, *shape, seed=k) for k, (name, shape) in enumerate(sizes.items())}
    return {"layers": {**made, "bias": array(layers, 3 * width, seed=9)}, "head": array(width, 4, seed=10)}


def scanned(weights, x, heads=4):
    def step(x, layer):
        return jax.checkpoint(lambda x: block(x, layer, heads))(x), None

    x, _ = lax.scan(step, x, weights["layers"])
    return x @ weights["head"]


def test_scanned_layers_lose_as_many_but_not_the_same():
    inputs = {"x": TensorSpec(("batch", "seq", 8), "float32")}
    weights = scanned_weights()
    # The unit to lose differs from layer to layer.
    up = np.array(weights["layers"]["up"])
    for layer in range(3):
        up[layer, :, layer] *= 1e-3
    weights["layers"]["up"] = jnp.asarray(up)
    program = trace(scanned, weights, inputs)
    groups = find_groups(program)
    assert {group.name: (group.kind, group.steps, group.units) for group in groups.removable} == {
        "layers/qkv[2.0]": ("heads", (3,), 4),
        "layers/qkv[2.1]": ("units", (3,), 2),
        "layers/up[2]": ("units", (3,), 16),
    }
    small = shrink(program, sparsity=1 / 16, protect="layers/qkv.*")
    assert shapes(small)["layers/up"] == (3, 8, 15)
    for layer in range(3):
        np.testing.assert_array_equal(small.weights["layers/up"][layer], np.delete(up[layer], layer, -1))
    assert_equals_masked(program, shrink(program, sparsity=0.5), array(2, 5, 8))


def test_layers_that_share_what_is_scanned_lose_the_same():
    def fn(weights, x):
        def step(x, layer):
            hidden = jax.nn.relu(x @ layer["up"]) * weights["gate"]
            return x + hidden @ layer["down"], hidden

        return lax.scan(step, x, weights["layers"])[0]

    weights = {"layers": {"up": array(3, 6, 8), "down": array(3, 8, 6, seed=1)}, "gate": array(8, seed=2)[None]}
    program = trace(fn, weights, ROWS)
    assert [group.steps for group in find_groups(program).removable] == [()]
    small = shrink(program, sparsity=0.5)
    assert_equals_masked(program, small, array(2, 6))


def test_carried_hidden_state_and_loops():
    def fn(weights, x):
        def cell(state, row):
            return jnp.tanh(row @ weights["in"] + state @ weights["again"]), state

        state, seen = lax.scan(cell, jnp.zeros((x.shape[0], 8)), jnp.stack([x, 2 * x, -x]))
        state = lax.fori_loop(0, 3, lambda _, s: s * 0.5 + seen[1] @ weights["again"], state)
        state = lax.cond(x[0, 0] > 0, lambda s: s, lambda s: -s, state)
        return state @ weights["out"]

    program = trace(fn, {"in": array(6, 8), "again": 0.3 * array(8, 8, seed=1), "out": array(8, 3, seed=2)}, ROWS)
    assert units(program) == {"in[1]": 8}
    small = shrink(program, sparsity=0.5)
    assert shapes(small) == {"in": (6, 4), "again": (4, 4), "out": (4, 3)}
    assert_equals_masked(program, small, array(2, 6))
    assert_equals_masked(program, small, -array(2, 6))


# Frameworks.


class Bert(nn.Module):
    """Heads by Flax's own attention, layer norms, a table that is also the last product."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(11, 8)
        x = table(tokens) + nn.Embed(5, 8)(jnp.arange(5))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2, qkv_features=12)(x))
        x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(10)(x))))
        return table.attend(x)


def test_bert_like(lenient):
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    program = linen(Bert(), TOKENS, tokens)
    groups = find_groups(program)
    attention = "params/MultiHeadDotProductAttention_0"
    assert {group.name: group.units for group in groups.removable} == {
        f"{attention}/query/kernel[1]": 2,
        f"{attention}/query/kernel[2]": 6,
        f"{attention}/value/kernel[2]": 6,
        "params/Dense_1/kernel[1]": 10,
    }
    width = groups["params/Embed_0/embedding[1]"]
    assert width.protected == "a mean over it is divided by the constant 8"
    assert groups["params/Embed_0/embedding[0]"].protected == "`gather` takes positions of it"
    small = shrink(program, sparsity=0.5)
    assert shapes(small)[f"{attention}/query/kernel"] == (8, 1, 3)
    assert_equals_masked(program, small, tokens)


def test_depthwise_and_grouped_convolutions(lenient):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image):
            x = nn.relu(nn.Conv(8, (1, 1))(image))
            x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8)(x))  # two channels of each channel
            x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=4)(x))
            return nn.Conv(2, (1, 1))(x)

    program = linen(Net(), IMAGES, array(1, 8, 8, 3))
    # 8 channels are 4 groups of 2, each of which makes 2 channels; the 24 are 4 groups of 6.
    assert units(program) == {
        "params/Conv_0/kernel[3.0]": 4, "params/Conv_0/kernel[3.1]": 2,
        "params/Conv_1/kernel[3.2]": 2, "params/Conv_2/kernel[3.1]": 6,
    }  # fmt: skip
    small = shrink(program, sparsity=0.5)
    assert shapes(small)["params/Conv_2/kernel"] == (3, 3, 1, 6)
    assert_equals_masked(program, small, array(2, 8, 8, 3))


def test_nnx(lenient):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.hidden, self.head = nnx.Linear(8, 10, rngs=rngs), nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, image):
            x = nnx.silu(self.norm(self.conv(image))).mean((1, 2))
            return self.head(nnx.relu(self.hidden(x)))

    program = from_nnx(Net(nnx.Rngs(0)), IMAGES)
    program = program.replace(weights=untrivial(program.weights))
    small = shrink(program, sparsity=0.5)
    assert shapes(small)["conv/kernel"] == (3, 3, 3, 4)
    assert_equals_masked(program, small, array(2, 8, 8, 3))


def test_equinox_channels_first_and_vmapped(lenient):
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        hidden: eqx.nn.Linear
        head: eqx.nn.Linear

        def __call__(self, image):
            x = jax.nn.relu(self.conv(jnp.moveaxis(image, -1, 0)))
            x = x.reshape(8, 4, 2, 4, 2).max((2, 4)).reshape(-1)
            return self.head(jax.nn.elu(self.hidden(x)))

    keys = jax.random.split(jax.random.key(0), 3)
    model = Net(eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]), eqx.nn.Linear(128, 10, key=keys[1]),
                eqx.nn.Linear(10, 2, key=keys[2]))  # fmt: skip
    weights, rest = eqx.partition(model, eqx.is_array)
    program = trace(lambda weights, image: jax.vmap(eqx.combine(weights, rest))(image), weights, IMAGES)
    small = shrink(program, sparsity=0.5)
    assert shapes(small)["hidden/weight"] == (5, 4 * 16)
    assert_equals_masked(program, small, array(2, 8, 8, 3))


def test_haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 10, 3])(x)))
    weights = untrivial(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 6))))
    program = trace(network.apply, weights, ROWS)
    small = shrink(program, sparsity=0.5)
    assert shapes(small)["mlp/~/linear_1/w"] == (4, 5)
    assert_equals_masked(program, small, array(2, 6))


# Operations one at a time, between two dense layers of 8 hidden units: what may go, and that the result is right.


def scaled_by(vector):
    return lambda h: h * jnp.asarray(vector, jnp.float32)[None]


RAGGED_SUM = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
TABLE = np.linspace(0.5, 2, 8, dtype=np.float32)
BETWEEN = {
    "relu6": (lambda h: jnp.minimum(jax.nn.relu(h), 6.0), {"a[1]": 8}),
    "softplus": (jax.nn.softplus, {"a[1]": 8}),
    "constant table": (scaled_by(TABLE), {"a[1]": 8}),
    "constant table in jit": (jax.jit(lambda h: h + TABLE[None]), {"a[1]": 8}),
    "uniform table": (scaled_by(np.full(8, 3.0)), {"a[1]": 8}),
    "halves swapped": (lambda h: jnp.concatenate([h[:, 4:], h[:, :4]], -1), {"a[1.0]": 4, "a[1.1]": 4}),
    "rotary": (lambda h: h * 0.5 + jnp.concatenate([-h[:, 4:], h[:, :4]], -1) * TABLE[None], {"a[1]": 4}),
    "split": (lambda h: jnp.concatenate(jnp.split(h, [3, 5], -1)[::-1], -1), {"a[1.0]": 3, "a[1.1]": 2, "a[1.2]": 3}),
    "gated": (lambda h: jnp.concatenate([h[:, :4] * jax.nn.sigmoid(h[:, 4:])] * 2, -1), {"a[1]": 4}),
    "heads": (lambda h: jnp.tanh(h.reshape(-1, 2, 4)).swapaxes(1, 2).reshape(-1, 8), {"a[1.0]": 2, "a[1.1]": 4}),
    "softmax over heads": (lambda h: jax.nn.softmax(h.reshape(-1, 2, 4), 1).reshape(-1, 8), {"a[1.1]": 4}),
    "cumsum over heads": (lambda h: jnp.cumsum(h.reshape(-1, 2, 4), 1).reshape(-1, 8), {"a[1.1]": 4}),
    "zeros padded on": (lambda h: jnp.pad(h, ((0, 0), (2, 1)))[:, 2:10], {"a[1]": 8}),
    "repeated": (lambda h: jnp.tile(h[:, None], (1, 1, 1))[:, 0], {"a[1]": 8}),
    "joined and cut into heads": (
        lambda h: jnp.tanh(jnp.concatenate([h[:, 4:], h[:, :4]], -1).reshape(-1, 4, 2)).swapaxes(1, 2).reshape(-1, 8),
        {"a[1.0]": 2, "a[1.1]": 2, "a[1.2]": 2},
    ),
    "tiled": (lambda h: jnp.tile(h, (1, 3)).reshape(-1, 3, 8)[:, 1] + jnp.tile(h, (2, 1))[: len(h)], {"a[1]": 8}),
    "tiled heads": (lambda h: jnp.tile(h.reshape(-1, 2, 4), (1, 2, 1)).reshape(-1, 16)[:, 4:12], {"a[1]": 4}),
    "stacked": (lambda h: jnp.stack([h, jax.nn.sigmoid(h), 2 * h], 1).prod(1), {"a[1]": 8}),
    "stacked and flattened": (lambda h: jnp.stack([h[:, :4], jnp.exp(h[:, 4:])], -1).reshape(-1, 8), {"a[1]": 4}),
    "unstacked": (
        lambda h: jnp.concatenate([part * part for part in jnp.unstack(h.reshape(-1, 2, 4), axis=1)[::-1]], -1),
        {"a[1.1]": 4},
    ),
    "where": (lambda h: jnp.where(h > 1, h, jnp.zeros_like(h)), {"a[1]": 8}),
    "sum of squares": (lambda h: h * lax.rsqrt(jnp.sum(h * h, -1, keepdims=True) + 1.0), {"a[1]": 8}),
    "written into": (lambda h: lax.dynamic_update_slice(jnp.ones((1, *h.shape)), h[None], (0, 0, 0))[0], {"a[1]": 8}),
    "barrier": (lambda h: lax.optimization_barrier((h, h))[1], {"a[1]": 8}),
    "squared norm": (lambda h: h * jnp.einsum("bi,bi->b", h, h)[:, None], {"a[1]": 8}),
    "scattered": (lambda h: jnp.zeros((h.shape[0] + 1, 8)).at[1:].add(h)[1:], {"a[1]": 8}),
    "summed over after a tile": (lambda h: h * jnp.tile(h, (1, 2)).sum(-1, keepdims=True), {"a[1]": 8}),
    # What depends on position or count keeps all.
    "summed over after a tile of exps": (
        lambda h: h * jnp.tile(jnp.exp(h), (1, 2)).sum(-1, keepdims=True),
        "`reduce_sum` runs over it where removed units would not be zero",
    ),
    "exps to experts that are no weights": (
        lambda h: h * lax.ragged_dot(jnp.exp(h), jnp.ones((2, 8, 1)), jnp.asarray([1, 1], jnp.int32)),
        "`ragged_dot_general` sums over it where removed units would not be zero",
    ),
    "summed over after a stack with ones": (
        lambda h: h * jnp.stack([h, jnp.ones_like(h)], 1).sum((1, 2))[:, None],
        "`reduce_sum` runs over it where removed units would not be zero",
    ),
    "unstacked itself": (lambda h: jnp.stack(jnp.unstack(h, axis=1)[::-1], 1), "`unstack` takes each position of it"),
    "ragged sums": (
        lambda h: h @ jnp.sum(
            lax.ragged_dot_general(h, h, jnp.asarray([1, 1], jnp.int32), RAGGED_SUM), 0
        ),
        "`ragged_dot_general` depends on it",
    ),
    "sorted": (lambda h: jnp.sort(h, -1), "`sort` runs along it"),
    "cumsum": (lambda h: jnp.cumsum(h, -1), "`cumsum` runs along it"),
    "reversed": (lambda h: h[:, ::-1], "`rev` runs along it"),
    "fft": (lambda h: jnp.fft.fft(h).real, "`fft` depends on it"),
    "iota": (lambda h: h * lax.broadcasted_iota(jnp.float32, h.shape, 1), "`iota` counts along it"),
    "softmax": (lambda h: jax.nn.softmax(h, -1), "`reduce_max` runs over it"),
    "norm": (lambda h: h - h.mean(-1, keepdims=True), "a mean over it is divided by the constant 8"),
    "sum of exps": (
        lambda h: h / jnp.sum(jnp.exp(h), -1, keepdims=True),
        "`reduce_sum` runs over it where removed units would not be zero",
    ),
    "product of exps": (
        lambda h: h * jnp.einsum("bi,bi->b", jnp.exp(h), jnp.exp(h))[:, None],
        "`dot_general` sums over it where removed units would not be zero",
    ),
    "callback": (
        lambda h: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h, vmap_method="sequential"),
        "`pure_callback` depends on it",
    ),
    "ones padded on": (
        lambda h: h * jnp.sum(jnp.pad(h[None], ((1, 0), (0, 0), (0, 0)), constant_values=1.0), (0, 2))[:, None],
        "`reduce_sum` runs over it where removed units would not be zero",
    ),
    "ones elsewhere": (
        lambda h: h * jnp.sum(jnp.where(h > 1, h, jnp.ones_like(h)), -1, keepdims=True),
        "`reduce_sum` runs over it where removed units would not be zero",
    ),
    "no longer zero in the second round": (
        lambda h: lax.fori_loop(
            0, 2, lambda _, c: (jnp.exp(c[0]), c[1] * jnp.sum(c[0], -1, keepdims=True)), (h, h)
        )[1],
        "`reduce_sum` runs over it where removed units would not be zero",
    ),
    "every other": (lambda h: jnp.concatenate([h[:, ::2], h[:, 1::2]], -1), "takes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_between_two_layers(name):
    between, expected = BETWEEN[name]
    weights = {"a": array(6, 8), "b": array(8, 3, seed=1), "bias": array(8, seed=2)}
    program = trace(lambda w, x: between(x @ w["a"] + w["bias"][None]) @ w["b"], weights, ROWS)
    groups = find_groups(program)
    if isinstance(expected, str):
        (reason,) = {group.protected for group in groups if group.name.startswith("a[1")}
        assert expected in reason
        assert shapes(shrink(program, sparsity=0.5)) == shapes(program)
        return
    assert units(program) == expected
    small = shrink(program, sparsity=0.5)
    assert sum(np.prod(shape) for shape in shapes(small).values()) < 80
    assert_equals_masked(program, small, array(2, 6, seed=3))


def mixture(weights, x, counts):
    """Experts by `ragged_dot`: the first `counts[0]` rows go to the first, and so on."""
    hidden = jax.nn.relu(x @ weights["in"])
    hidden = jax.nn.gelu(lax.ragged_dot(hidden, weights["up"], counts)) + 0.1 * hidden[:, :1]
    return lax.ragged_dot(jax.nn.softplus(hidden), weights["down"], counts) @ weights["out"]


def test_a_mixture_of_experts():
    weights = {
        "in": array(6, 8), "up": array(3, 8, 12, seed=1), "down": array(3, 12, 10, seed=2), "out": array(10, 4, seed=3),
    }  # fmt: skip
    program = trace(mixture, weights, {**ROWS, "counts": TensorSpec((3,), "int32")})
    assert units(program) == {"in[1]": 7, "up[2]": 12, "down[2]": 10}
    small = shrink(program, sparsity=0.5)
    assert shapes(small) == {"in": (6, 5), "up": (3, 5, 6), "down": (3, 6, 5), "out": (5, 4)}
    for counts in ([1, 0, 3], [2, 2, 0], [0, 1, 1]):
        assert_equals_masked(program, small, array(4, 6, seed=4), jnp.asarray(counts, jnp.int32))
    groups = find_groups(program)
    assert not [group for group in groups if "[0]" in group.name]  # the experts themselves stay


def test_a_mean_that_is_counted_is_kept_but_a_sum_of_what_is_zero_is_not():
    def fn(weights, x, count):
        h = x @ weights["a"]
        return (h / (jnp.sum(h * h, -1, keepdims=True) / count + 1)) @ weights["b"]

    weights = {"a": array(6, 8), "b": array(8, 3, seed=1)}
    assert units(trace(lambda w, x: fn(w, x, 8), weights, ROWS)) == {}
    assert units(trace(lambda w, x: fn(w, x, 5), weights, ROWS)) == {"a[1]": 8}


def test_an_output_along_an_axis_that_is_repeated_is_not_zero_there():
    def fn(weights, x):
        h = x @ weights["a"]  # zero at a removed unit, but h + 1-wide term is not
        return jnp.sum(h + jnp.sum(x, -1, keepdims=True), -1) @ jnp.ones((x.shape[0], 2))

    program = trace(fn, {"a": array(6, 8)}, {"x": TensorSpec((2, 6), "float32")})
    assert "would not be zero" in find_groups(program)["a[1]"].protected


def test_a_flattened_axis_is_zero_only_where_all_its_parts_are():
    def fn(weights, x):
        spread = (x @ weights["a"])[:, :, None] * jnp.exp(weights["e"])[None, None]
        flat = spread.reshape(x.shape[0], -1)
        return (flat * jnp.sum(flat * flat, -1, keepdims=True)) @ weights["b"]

    program = trace(fn, {"a": array(6, 8), "e": array(4), "b": array(32, 3, seed=1)}, ROWS)
    assert units(program) == {}


def test_layers_that_are_also_used_outside_lose_the_same():
    def fn(weights, x):
        step = lambda x, layer: x + jax.nn.relu(x @ layer["up"]) @ layer["down"]  # noqa: E731
        x = step(x, jax.tree.map(lambda leaf: leaf[0], weights))
        return lax.scan(lambda x, layer: (step(x, layer), None), x, weights)[0]

    program = trace(fn, {"up": array(3, 6, 8), "down": array(3, 8, 6, seed=1)}, ROWS)
    assert [group.steps for group in find_groups(program).removable] == [()]
    assert_equals_masked(program, shrink(program, sparsity=0.5), array(2, 6))


# Choosing.


def mlp(widths=(6, 8, 8, 3), seed=0):
    weights = {f"w{k}": array(*shape, seed=seed + k) for k, shape in enumerate(itertools.pairwise(widths))}

    def fn(weights, x):
        for k in range(len(widths) - 2):
            x = jax.nn.relu(x @ weights[f"w{k}"])
        return x @ weights[f"w{len(widths) - 2}"]

    return trace(fn, weights, ROWS)


@pytest.mark.parametrize(("importance", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_averaged_over_the_weights_of_a_group(importance, power):
    program = mlp((6, 8, 3))
    program = program.replace(weights={**program.weights, "w1": 100 * program.weights["w1"]})
    made, read = (np.asarray(program.weights[name], np.float64) for name in ("w0", "w1"))
    scores = [(np.abs(made) ** power).sum(0) ** (1 / power), (np.abs(read) ** power).sum(1) ** (1 / power)]
    stays = np.sort(np.argsort(-sum(score / score.mean() for score in scores))[:5])
    small = shrink(program, sparsity=0.375, importance=importance)
    np.testing.assert_array_equal(small.weights["w0"], made[:, stays].astype(np.float32))
    np.testing.assert_array_equal(small.weights["w1"], read[stays].astype(np.float32))


def test_taylor_and_activations_follow_the_data():
    program = mlp((6, 8, 3))
    batches = [{"x": array(5, 6, seed=k)} for k in (3, 4)]
    loss = lambda weights, batch: jnp.sum(program.fn(weights, batch["x"]) ** 2)  # noqa: E731
    w0, w1 = (np.asarray(program.weights[name], np.float64) for name in ("w0", "w1"))
    hidden = [np.maximum(np.asarray(batch["x"], np.float64) @ w0, 0) for batch in batches]
    by_activation = np.mean([np.abs(h).mean(0) for h in hidden], 0)
    small = shrink(program, sparsity=0.5, importance="activation", calibration=batches)
    stays = np.sort(np.argsort(-by_activation)[:4])
    np.testing.assert_array_equal(small.weights["w1"], w1[stays].astype(np.float32))
    # A unit's weights times their gradients, by hand: for both weights it is the sum of h times the gradient at h.
    taylor = np.mean([np.abs((h * (2 * (h @ w1) @ w1.T)).sum(0)) for h in hidden], 0)
    small = shrink(program, sparsity=0.5, importance="taylor", calibration=batches, loss=loss)
    stays = np.sort(np.argsort(-taylor)[:4])
    np.testing.assert_array_equal(small.weights["w1"], w1[stays].astype(np.float32))


def test_importance_by_the_scale_of_the_norm(residual, lenient):
    small = shrink(residual, sparsity=0.5, importance="scale", protect=["params/Conv_(4|6|7).*", "params/Dense_0/.*"])
    scale = np.abs(np.asarray(residual.weights["params/BatchNorm_1/scale"]))
    np.testing.assert_array_equal(
        small.weights["params/BatchNorm_1/scale"],
        np.asarray(residual.weights["params/BatchNorm_1/scale"])[np.sort(np.argsort(-scale)[:4])],
    )
    with pytest.raises(
        RecipeError, match="'params/Conv_6/kernel\\[3\\]' cannot be ranked, as it has no scale of a norm"
    ):
        shrink(residual, sparsity=0.5, importance="scale", protect=["params/Conv_4.*"])


def test_global_scope_takes_the_smallest_anywhere():
    program = mlp((6, 8, 8, 3))
    # Half of the first layer's units hardly matter, all of the second's do.
    quiet = jnp.where(jnp.arange(8) < 5, 1e-3, 1.0)
    weights = {"w0": program.weights["w0"] * quiet[None], "w1": program.weights["w1"] * quiet[:, None]}
    program = program.replace(weights={**program.weights, **weights})
    small = shrink(program, sparsity=5 / 16, scope="global")
    assert shapes(small) == {"w0": (6, 3), "w1": (3, 8), "w2": (8, 3)}
    assert shapes(shrink(program, sparsity=5 / 16)) == {"w0": (6, 6), "w1": (6, 6), "w2": (6, 3)}
    lines = {
        site.site: (site.action, site.reason)
        for site in shrink(program, sparsity=14 / 16, scope="global").history[-1].sites
    }
    assert lines["w0[1]"] == lines["w1[1]"] == ("8 -> 1 units", "its last one: something of every group stays")
    with pytest.raises(
        RecipeError, match=r"takes 15 of 16 units, but only 14 can go: one unit .* of 'w0.1.' .8., 'w1.1.' .8."
    ) as caught:
        shrink(program, sparsity=15 / 16, scope="global")
    assert "\n" not in str(caught.value)
    # As large a share as there is takes all but one of each group.
    assert shapes(shrink(program, sparsity=1 - 2**-40)) == {"w0": (6, 1), "w1": (1, 1), "w2": (1, 3)}


def test_round_to(residual, lenient):
    small = shrink(residual, sparsity=0.6, round_to=4)
    kept = {site.site: site.metrics["kept"] for site in small.history[-1].sites if site.metrics}
    assert kept["params/Conv_0/kernel[3]"] == 4
    assert kept["params/Conv_4/kernel[3]"] == 8 or kept["params/Conv_3/kernel[3]"] == 8
    assert kept["params/Conv_7/kernel[3]"] == 4  # 3 of 6 would stay
    reasons = {site.site: site.reason for site in shrink(residual, sparsity=0.6, round_to=10).history[-1].sites}
    assert reasons["params/Conv_0/kernel[3]"] == "round_to = 10 leaves no fewer"  # of 8
    assert not reasons["params/Conv_4/kernel[3]"] or not reasons["params/Conv_3/kernel[3]"]  # of 12
    program = trace(scanned, scanned_weights(), {"x": TensorSpec(("batch", 5, 8), "float32")})
    small = shrink(program, sparsity=0.5, round_to=4, protect=r"layers/qkv\[2.1\]")
    assert shapes(small)["layers/out"] == (3, 4, 8)  # two heads of two


@pytest.mark.parametrize("target", [{"flops": 0.5}, {"bytes": 0.4}])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_targets_are_reached_and_not_overdone(target, scope):
    program = mlp((6, 64, 64, 3))
    small = shrink(program, scope=scope, sizes={"batch": 2}, **target)
    ((name, wanted),) = target.items()
    reached = {
        "flops": cost(small, {"batch": 2}).flops / cost(program, {"batch": 2}).flops,
        "bytes": small.weights_bytes / program.weights_bytes,
    }[name]
    assert 0.9 * wanted < reached <= wanted
    assert small.history[-1].metrics["weights_bytes_after"] == small.weights_bytes


def test_a_target_that_needs_nothing_removes_nothing():
    program = mlp()
    assert shapes(shrink(program, flops=1.0)) == shapes(program)


def test_latency_is_measured(monkeypatch):
    program = mlp((6, 64, 64, 3))

    def fake(functions, inputs, timer=None):
        ((_, weights),) = functions
        assert inputs[0].shape == (2, 6)
        return [10.0 * sum(leaf.size for leaf in weights.values())]

    monkeypatch.setattr(sys.modules[shrink.__module__], "time_programs", fake)
    small = shrink(program, latency_ms=20, sizes={"batch": 2})
    assert 15 < 0.01 * sum(leaf.size for leaf in small.weights.values()) <= 20


def test_protected_by_the_user():
    program = mlp()
    small = shrink(program, sparsity=0.5, protect=r"w0\[1\]")
    assert shapes(small) == {"w0": (6, 8), "w1": (8, 4), "w2": (4, 3)}
    assert shapes(shrink(program, sparsity=0.5, protect=["w2"])) == {"w0": (6, 4), "w1": (4, 8), "w2": (8, 3)}
    (kept,) = [site for site in small.history[-1].sites if site.site == "w0[1]"]
    assert (kept.action, kept.reason) == ("kept 8 units", r"by the pattern 'w0\\[1\\]'")


def test_training_goes_on():
    program = mlp((6, 8, 8, 3))
    small = shrink(program, sparsity=0.5)
    x, y = array(16, 6, seed=5), array(16, 3, seed=6)
    loss = lambda fn, weights: jnp.mean((fn(weights, x) - y) ** 2)  # noqa: E731
    gradients = jax.grad(lambda weights: loss(small.fn, weights))(small.weights)
    full = masked(program, small)
    expected = jax.grad(lambda weights: loss(program.fn, weights))(full)
    for path, gradient in gradients.items():
        held = np.asarray(expected[path])[np.asarray(full[path]) != 0].reshape(gradient.shape)
        np.testing.assert_allclose(gradient, held, rtol=1e-4, atol=1e-6)


def test_derivatives_of_ones_own_go_on():
    @jax.custom_vjp
    def slowed(h):
        return 2 * h

    # What is kept for the derivative has another shape than anything in the function itself.
    slowed.defvjp(lambda h: (2 * h, jnp.stack([h, jnp.ones_like(h)])), lambda kept, g: (jnp.where(kept[0] > 0, g, 0),))
    weights = {"a": array(6, 8), "b": array(8, 8, seed=1), "c": array(8, 3, seed=2)}
    program = trace(lambda w, x: slowed(jax.nn.relu(x @ w["a"]) @ w["b"]) @ w["c"], weights, ROWS)
    small = shrink(program, sparsity=0.5)
    full = masked(program, small)
    # At 0 the derivative of relu is 0; that of max(x, 0), of which it is made, would be a half.
    x = array(4, 6).at[0].set(0)
    loss = lambda fn: lambda weights, x: jnp.sum((fn(weights, x) - 1) ** 2)  # noqa: E731
    got, got_x = jax.jit(jax.grad(loss(small.fn), (0, 1)))(small.weights, x)
    expected, expected_x = jax.jit(jax.grad(loss(program.fn), (0, 1)))(full, x)
    np.testing.assert_allclose(got_x, expected_x, rtol=1e-4, atol=1e-5)
    assert not np.any(got_x[0])
    for path, gradient in got.items():
        held = np.asarray(expected[path])[np.asarray(full[path]) != 0].reshape(gradient.shape)
        np.testing.assert_allclose(gradient, held, rtol=1e-4, atol=1e-5)


def test_weights_stay_on_their_devices():
    program = mlp((6, 8, 3))
    mesh = jax.make_mesh((2,), ("model",))
    spread = NamedSharding(mesh, PartitionSpec(None, "model"))
    program = program.replace(weights={**program.weights, "w0": jax.device_put(program.weights["w0"], spread)})
    assert shrink(program, sparsity=0.5).weights["w0"].sharding == spread
    uneven = shrink(program, sparsity=3 / 8).weights["w0"]
    assert uneven.sharding == NamedSharding(mesh, PartitionSpec())


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes exactly one of sparsity, flops, bytes, latency_ms; none given"),
        ({"sparsity": 0.5, "flops": 0.5}, "sparsity and flops given"),
        ({"sparsity": 1.0}, r"sparsity = 1.0 is not in \[0, 1\): at least one unit"),
        ({"flops": 0.0}, r"flops = 0.0 is not in \(0, 1\]"),
        ({"flops": 1.5}, r"flops = 1.5 is not in \(0, 1\]"),
        ({"flops": float("nan")}, r"flops = nan is not in \(0, 1\]"),
        ({"bytes": "half"}, r"bytes = half is not in \(0, 1\]"),
        ({"latency_ms": -1}, "latency_ms = -1"),
        ({"latency_ms": float("inf")}, r"latency_ms = inf is not in \(0, inf\)"),
        ({"sparsity": 0.5, "round_to": 0}, "round_to = 0 is not a whole number of at least 1"),
        ({"sparsity": 0.5, "round_to": 1.5}, "round_to = 1.5 is not a whole number"),
        ({"sparsity": 0.5, "scope": "all"}, "scope = 'all': expected 'local' or 'global'"),
        ({"sparsity": 0.5, "importance": "l0"}, "importance = 'l0'; there are l1, l2, scale, taylor, activation"),
        ({"flops": 0.5, "sizes": {"batch": 0}}, r"no operations to take a share of at sizes {'batch': 0}"),
        ({"flops": 0.5, "round_to": 9}, r"flops = 0.5 cannot be reached; the least is 1, one unit \(or round_to\)"),
        ({"sparsity": 0.5, "protect": "nothing"}, "protect = 'nothing' matches none of the groups: w0"),
        ({"sparsity": 0.5, "protect": "("}, "is not a regular expression"),
        (
            {"flops": 0.01, "protect": "w0"},
            r"flops = 0.01 cannot be reached; the least is 0\.\d+, .* Protected groups: 'w0\[1\]': by the pattern 'w0'",
        ),
        ({"sparsity": 0.5, "importance": "scale"}, r"group 'w0\[1\]' cannot be ranked, as it has no scale of a norm"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(RecipeError, match=message):
        shrink(mlp(), **arguments)


def test_what_importance_needs():
    with pytest.raises(CalibrationError, match="'activation' needs calibration data"):
        shrink(mlp(), sparsity=0.5, importance="activation")
    with pytest.raises(CalibrationError, match="'taylor' needs a loss"):
        shrink(mlp(), sparsity=0.5, importance="taylor", calibration=[{"x": array(2, 6)}])
    with pytest.raises(CalibrationError, match=r"the loss is of shape \(2,\); it has to be a scalar"):
        shrink(
            mlp(), sparsity=0.5, importance="taylor", calibration=[{"x": array(2, 6)}], loss=lambda w, b: b["x"][:, 0]
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_units_of_a_weight_that_is_not_finite_are_not_ranked(value):
    program = mlp()
    broken = program.replace(weights=program.weights | {"w1": program.weights["w1"].at[2, 3].set(value)})
    with pytest.raises(lx.ModelError, match="weight 'w1' is not finite, so its elements cannot be ranked"):
        shrink(broken, sparsity=0.5)


def test_weights_without_elements_and_weights_of_zeros():
    program = mlp()
    empty = program.replace(weights=program.weights | {"w0": jnp.zeros((6, 0)), "w1": jnp.zeros((0, 8))})
    assert shapes(shrink(empty, sparsity=0.5)) == {"w0": (6, 0), "w1": (0, 4), "w2": (4, 3)}
    small = shrink(program.replace(weights=jax.tree.map(jnp.zeros_like, program.weights)), sparsity=0.5)
    assert shapes(small) == {"w0": (6, 4), "w1": (4, 4), "w2": (4, 3)}


def test_a_quantized_program_is_refused():
    recipe = Recipe.parse('measure = false\n[[quantize]]\nsites = ".*"\nactivations = "none"\n', name="q")
    stored = quantize(mlp(), resolve(recipe, mlp()))
    with pytest.raises(UnsupportedError, match="'w0' is quantized; shrink a program before"):
        shrink(stored, sparsity=0.5)


def test_a_program_that_ties_units_at_some_sizes_only_is_refused_there():
    def fn(weights, x):
        hidden = jax.nn.relu(x @ weights["w0"])
        return (jnp.sort(hidden, -1) if x.shape[0] == 5 else hidden) @ weights["w1"]

    program = trace(fn, {"w0": array(6, 8), "w1": array(8, 3, seed=1)}, ROWS)
    small = shrink(program, sparsity=0.5, sizes={"batch": 2})
    assert small.fn(small.weights, array(2, 6)).shape == (2, 3)
    with pytest.raises(UnsupportedError, match=r"other sizes .* w0\[1\] cannot lose what was removed: `sort` runs"):
        small.fn(small.weights, array(5, 6))


def test_groups_are_drawn(tmp_path):
    groups = find_groups(mlp())
    groups.draw(str(tmp_path / "groups.svg"))
    assert "w1" in (tmp_path / "groups.svg").read_text()
    with pytest.raises(lx.LeptonError, match="cannot be written"):
        groups.draw(str(tmp_path / "groups.nothing"))


@pytest.mark.parametrize("step", [1, 2])
def test_what_only_larger_inputs_need_stays(step):
    """Positions that the sizes given do not reach are read at others, which may have to be even."""

    def fn(weights, x):
        if x.shape[1] % step:
            raise TypeError("an odd length")
        hidden = jax.nn.relu(x @ weights["w0"] + weights["place"][None, : x.shape[1]])
        return hidden @ weights["w1"]

    weights = {"w0": array(6, 8), "place": array(64, 8, seed=1), "w1": array(8, 3, seed=2)}
    program = trace(fn, weights, {"x": TensorSpec(("batch", "length", 6), "float32")})
    groups = find_groups(program, sizes={"batch": 1, "length": 4})
    (place,) = (group for group in groups if group.name.startswith("place[0"))
    assert place.protected.startswith("at larger sizes of the inputs, place[0] cannot lose what was removed: ")
    small = shrink(program, sparsity=0.5, sizes={"batch": 1, "length": 4})
    assert shapes(small) == {"w0": (6, 4), "place": (64, 4), "w1": (4, 3)}
    whole = {path: np.asarray(weight) for path, weight in weights.items()}
    kept = [int(np.flatnonzero((unit == whole["w0"].T).all(1))[0]) for unit in np.asarray(small.weights["w0"]).T]
    for length in (2, 4, 8, 64):
        x = array(2, length, 6, seed=length)
        hidden = np.maximum(np.asarray(x) @ whole["w0"][:, kept] + whole["place"][:length, kept], 0)
        np.testing.assert_allclose(small.fn(small.weights, x), hidden @ whole["w1"][kept], rtol=1e-4, atol=1e-4)
