"""Folding removes batch norms and duplicate work, and keeps results."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.passes import find_sites, fold, precompute, prune, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import Program, TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGES = {"image": TensorSpec(("batch", 8, 8, 4), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def untrivial(tree, seed=1):
    """The tree's arrays replaced by random ones, variances positive."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        return jnp.asarray(
            rng.uniform(0.2, 3, leaf.shape) if "var" in jax.tree_util.keystr(path) else rng.standard_normal(leaf.shape),
            leaf.dtype,
        )

    return jax.tree_util.tree_map_with_path(random, tree)


@pytest.fixture
def lenient():
    """Promotion as users have it, where a framework's own layers need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def row(vector):
    return jnp.reshape(vector, (1, -1))


def norm(y, w):
    return (y - row(w["mean"])) * row(w["gamma"] * lax.rsqrt(w["var"] + 1e-3)) + row(w["beta"])


def norm_weights(size, *lead):
    return {
        "mean": array(*lead, size, seed=2),
        "var": jnp.abs(array(*lead, size, seed=3)) + 0.1,
        "gamma": array(*lead, size, seed=4),
        "beta": array(*lead, size, seed=5),
    }


def dense_norm(fn, specs=ROWS, **more):
    return trace(fn, {"w": array(6, 5), **norm_weights(5), **more}, specs)


def folded_sites(program):
    return [site.site for site in program.history[-1].sites]


def assert_same(program: Program, folded: Program, batches=(3, 1), rtol=2e-5):
    """The folded program gives the original's numbers, at sizes that the fold did not look at, too."""
    for batch in batches:
        inputs = [
            array(*(batch if isinstance(dim, str) else dim for dim in spec.shape), seed=batch).astype(spec.dtype)
            for spec in program.inputs.values()
        ]
        expected = jax.jit(program.fn)(program.weights, *inputs)
        got = jax.jit(folded.fn)(folded.weights, *inputs)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.abs(b).max() > 0.01
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# Arithmetic.


@pytest.mark.parametrize("bias", [True, False])
def test_dense_and_norm_against_float64(bias):
    program = dense_norm(lambda w, x: norm(x @ w["w"] + (row(w["bias"]) if bias else 0.0), w), bias=array(5, seed=9))
    folded = fold(program)
    assert sorted(folded.weights) == ["w", "w:bias"]
    w = {name: np.asarray(leaf, np.float64) for name, leaf in program.weights.items()}
    x = np.random.default_rng(7).standard_normal((4, 6)).astype(np.float32)
    scale = w["gamma"] / np.sqrt(w["var"] + 1e-3)
    expected = (x @ w["w"] + (w["bias"] if bias else 0) - w["mean"]) * scale + w["beta"]
    np.testing.assert_allclose(folded(folded.weights, jnp.asarray(x)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(folded.weights["w"], w["w"] * scale, rtol=1e-5)
    shift = ((w["bias"] if bias else 0) - w["mean"]) * scale + w["beta"]
    np.testing.assert_allclose(folded.weights["w:bias"], shift, rtol=1e-4, atol=1e-6)
    assert [str(site.name) for site in find_sites(folded)] == ["w"]


@pytest.mark.parametrize(
    ("fn", "kept"),
    [
        (lambda w, x: (row(w["beta"]) - x @ w["w"]) * row(w["gamma"]), {"w", "w:bias"}),
        (lambda w, x: row(w["beta"]) - x @ w["w"], {"w", "w:bias"}),
        (lambda w, x: (x @ w["w"] + row(w["beta"])) / row(w["var"]), {"w", "w:bias"}),
        (lambda w, x: (x @ w["w"] - row(w["beta"])) / row(w["var"]) - row(w["mean"]), {"w", "w:bias"}),
        (lambda w, x: 0.25 * (x @ w["w"]), {"w"}),
        (lambda w, x: row(w["gamma"]) * (3.0 - (x @ w["w"] + 1.0) / 0.5), {"w", "w:bias"}),
        (lambda w, x: jnp.tanh(x @ w["w"].T.T * row(w["gamma"])), {"w"}),
        (lambda w, x: lax.dot_general(x, w["w"].T, (((1,), (1,)), ((), ()))) * row(w["gamma"]), {"w"}),
        (lambda w, x: norm(norm(x @ w["w"], w), w), {"w", "w:bias"}),
        (lambda w, x: (x @ w["w"]).T * w["gamma"].reshape(-1, 1) + w["beta"].reshape(-1, 1), {"w", "w:bias"}),
        (lambda w, x: (x @ w["w"]).reshape(-1, 1, 5, 1)[:, 0] * w["gamma"].reshape(1, -1, 1), {"w"}),
        (lambda w, x: jax.jit(norm)(x @ w["w"], {k: w[k] for k in ("mean", "var", "gamma", "beta")}), {"w", "w:bias"}),
    ],
)
def test_affine_forms(fn, kept):
    program = dense_norm(fn)
    folded = fold(program)
    assert set(folded.weights) == kept
    assert folded_sites(folded) == ["w"]
    assert_same(program, folded)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ w["w"] + row(w["beta"]),  # a bias alone is no gain
        lambda w, x: 1.0 / (x @ w["w"]),
        lambda w, x: row(w["gamma"]) / (x @ w["w"]),
        lambda w, x: jnp.tanh(x @ w["w"]) * row(w["gamma"]),
        lambda w, x: jnp.sum(jnp.tanh((x @ w["w"]).reshape(-1) * w["long"][: 5 * x.shape[0]])),
        lambda w, x: (x @ w["w"][:, :1]) * row(w["gamma"]),
        lambda w, x: (x @ w["one"]) * row(w["gamma"]),
        lambda w, x: (x @ w["w"]) * jnp.sum(x, axis=1, keepdims=True),
        lambda w, x: (x @ w["w"]) * w["by_row"][: x.shape[0]],
        lambda w, x: (lambda y: norm(y, w) + y)(x @ w["w"]),
        lambda w, x: (lambda y: y + jax.jit(norm)(y, w))(x @ w["w"]),
        lambda w, x: (lambda y: jax.jit(norm)(y, w) + y)(x @ w["w"]),
        lambda w, x: (lambda y: (y * row(w["gamma"]), y))(x @ w["w"]),
        lambda w, x: (lambda y: (y * row(w["gamma"])) * (y * row(w["beta"])))(x @ w["w"]),
        lambda w, x: (x @ w["w"]) * row(w["gamma"]) + jnp.sum(w["w"]),  # the weight is read elsewhere
        lambda w, x: (x @ w["w"]) * row(w["gamma"]) + x[:, :5] @ w["w"][:5],
        lambda w, x: (x @ w["w"]) * row(w["gamma"]) + (jnp.tanh(x) @ w["w"]),
    ],
)
def test_what_must_not_fold(fn):
    program = dense_norm(fn, by_row=array(16, 5, seed=8), one=array(6, 1), long=array(99))
    folded = fold(program)
    assert folded_sites(folded) == []
    ahead = precompute(program)  # a slice of a weight is one itself
    for name, weight in folded.weights.items():
        np.testing.assert_array_equal(weight, ahead.weights[name])
    assert_same(program, folded)


def test_a_chain_folds_up_to_the_value_that_is_read_twice():
    def fn(w, x):
        y = (x @ w["w"]) * row(w["gamma"])
        return (y + row(w["beta"])) * row(w["mean"]) + y

    program = dense_norm(fn)
    folded = fold(program)
    assert set(folded.weights) == {"w", "beta", "mean"}
    np.testing.assert_allclose(folded.weights["w"], program.weights["w"] * row(program.weights["gamma"]), rtol=1e-6)
    assert_same(program, folded)


@pytest.mark.parametrize("before", [True, False])
def test_what_looks_like_a_channel_vector_at_one_size_only(before):
    def fn(w, x):
        positions = w["positions"][: x.shape[0]]  # one row of it has the shape of a bias
        return norm(x @ w["w"] + positions, w) if before else norm(x @ w["w"], w) + positions

    program = dense_norm(fn, {"x": TensorSpec(("seq", 6), "float32")}, positions=array(40, 5, seed=6))
    folded = fold(program)
    assert folded_sites(folded) == ([] if before else ["w"])
    assert_same(program, folded, batches=(3, 1, 2, 8))


def test_a_shape_that_depends_on_the_input_size_is_taken_anew():
    def fn(w, x):
        y = lax.conv_general_dilated(x, w["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y * w["gamma"].reshape(1, 1, 1, -1) + w["beta"].reshape(1, 1, 1, -1)).sum(1)

    weights = {"kernel": array(3, 3, 4, 5), "gamma": array(5, seed=1), "beta": array(5, seed=2)}
    program = trace(fn, weights, {"image": TensorSpec((2, "height", 8, 4), "float32")})
    folded = fold(program)
    assert folded_sites(folded) == ["kernel"]
    assert_same(program, folded, batches=(7, 8, 9, 10))


# Frameworks.


class LinenNet(nn.Module):
    use_bias: bool = True
    groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Conv(8, (3, 3), feature_group_count=self.groups, use_bias=self.use_bias, dtype=self.dtype)(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        y = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, dtype=self.dtype)(x)  # depthwise
        x = x + nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(y)
        x = nn.Dense(6, use_bias=self.use_bias, dtype=self.dtype)(x.mean((1, 2)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x)


def linen(**options):
    module = LinenNet(**options)
    dtype = options.get("dtype", "float32")
    variables = untrivial(module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4), dtype)))
    return from_linen(module, variables, {"image": TensorSpec(("batch", 8, 8, 4), dtype)})


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"groups": 4}, {"dtype": "bfloat16"}])
def test_linen(options):
    program = linen(**options)
    folded = fold(program)
    names = [f"params/{name}/kernel" for name in ("Conv_0", "Conv_1", "Dense_0")]
    assert folded_sites(folded) == names
    assert [site.name for site in find_sites(folded)] == [*names, "params/Dense_1/kernel"]
    assert set(folded.weights) == {
        *names, *(f"{name}:bias" for name in names), "params/Dense_1/kernel", "params/Dense_1/bias",
    }  # fmt: skip
    assert_same(program, folded, rtol=2e-5 if "dtype" not in options else 0.05)
    metrics = folded.history[-1].metrics
    assert metrics["equations_after"] < metrics["equations_before"]
    assert metrics["weights_bytes_after"] < metrics["weights_bytes_before"]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, image):
        x = nnx.relu(self.norm(self.conv(image)))
        return self.norm_2(self.dense(x.mean((1, 2))))


def test_nnx():
    module = NnxNet(nnx.Rngs(0))
    program = from_nnx(module, IMAGES)
    program = program.replace(weights=untrivial(program.weights))
    folded = fold(program)
    assert set(folded.weights) == {"conv/kernel", "conv/kernel:bias", "dense/kernel", "dense/kernel:bias"}
    assert_same(program, folded)


@pytest.mark.usefixtures("lenient")
def test_haiku():
    def forward(image, train=False):
        x = hk.Conv2D(6, 3)(image)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=train))
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x.mean((1, 2))), is_training=train)

    transformed = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = transformed.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), True)

    def fn(weights, image):
        return transformed.apply(weights["params"], weights["state"], image)[0]

    program = trace(fn, untrivial({"params": params, "state": state}), IMAGES)
    folded = fold(program)
    assert folded_sites(folded) == ["params/conv2_d/w", "params/linear/w"]
    assert not [name for name in folded.weights if "batch_norm" in name]
    assert_same(program, folded)


@pytest.mark.usefixtures("lenient")
def test_equinox():
    conv = eqx.nn.Conv2d(4, 6, 3, key=jax.random.key(0))
    model, state = eqx.nn.make_with_state(lambda: (conv, eqx.nn.BatchNorm(6, "batch", mode="ema")))()
    arrays, static = eqx.partition((*eqx.nn.inference_mode(model), state), eqx.is_array)

    def fn(weights, image):
        conv, norm, state = eqx.combine(weights, static)

        def one(image):
            return norm(conv(image), state)[0]

        return jax.vmap(one, axis_name="batch")(image)

    program = trace(fn, untrivial(arrays), {"image": TensorSpec(("batch", 4, 8, 8), "float32")})
    program = program.replace(
        weights={
            name: jnp.abs(leaf) + 0.1 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.zeros_like(leaf)
            for name, leaf in program.weights.items()
        }
    )
    folded = fold(program)
    assert len(folded_sites(folded)) == 1
    assert_same(program, folded)


# Control flow.


def test_inside_scan_nothing_folds():
    def fn(w, x):
        def body(carry, _):
            return (norm(carry @ w["square"], w), None)

        return lax.scan(body, norm(x @ w["w"], w), None, length=3)[0]

    program = dense_norm(fn, square=array(5, 5, seed=7))
    folded = fold(program)
    assert folded_sites(folded) == ["w"]
    assert {"square", "mean", "var", "gamma", "beta", "w", "w:bias"} == set(folded.weights)
    assert_same(program, folded)


def test_stacked_layers_stay():
    def fn(w, x):
        def body(carry, layer):
            return (jnp.tanh(norm(carry @ layer["w"], layer)), None)

        return lax.scan(body, x, w)[0]

    program = trace(fn, {"w": array(3, 6, 6), **norm_weights(6, 3)}, ROWS)
    folded = fold(program)
    assert folded_sites(folded) == []
    assert folded.weights.keys() == program.weights.keys()
    assert_same(program, folded)


@pytest.mark.parametrize("kind", ["scan", "cond", "while"])
def test_an_expression_of_weights_read_inside_and_after_control_flow(kind):
    def fn(w, x):
        double = row(w["beta"] * 2)
        y, a, b = x @ w["w"], jnp.sin(x[:, :5]), jnp.cos(x[:, :5])
        if kind == "scan":
            y = lax.scan(lambda carry, _: (carry + double + a * b, None), y, None, length=2)[0]
        elif kind == "cond":
            y = lax.cond(x[0, 0] > 0, lambda y: y + double + a * b, lambda y: y - double, y)
        else:

            def step(state):
                return (state[0] + 1, state[1] * (a * b) + double)

            y = lax.while_loop(lambda state: state[0] < 3, step, (0, y))[1]
        return y + double + a * b

    program = dense_norm(fn)
    assert_same(program, fold(program))


def test_custom_derivatives_and_remat_are_seen_through():
    @jax.custom_vjp
    def affine(y, w):
        return norm(y, w)

    affine.defvjp(lambda y, w: (norm(y, w), None), lambda _, g: (g, None))
    program = dense_norm(lambda w, x: jax.checkpoint(lambda y: affine(y, w))(x @ w["w"]))
    folded = fold(program)
    assert folded_sites(folded) == ["w"]
    assert_same(program, folded)


# Double work.


def test_dead_and_common_code_drops():
    def fn(w, x):
        dead = jnp.exp(x @ w["unused"])
        a, b = jnp.tanh(x @ w["w"]), jnp.tanh(x @ w["w"])
        del dead
        return a + b

    program = dense_norm(fn, unused=array(6, 9))
    folded = fold(program)
    metrics = folded.history[-1].metrics
    # dot, tanh, dot, tanh, add and the dead dot and exp; dot, tanh, add stay.
    assert (metrics["equations_before"], metrics["equations_after"]) == (7, 3)
    assert set(folded.weights) == {"w"}
    assert_same(program, folded)


def test_equations_that_differ_in_a_parameter_are_not_merged():
    program = dense_norm(
        lambda w, x: (jnp.sum(x @ w["w"], axis=0), jnp.sum(x @ w["w"], axis=1), (x @ w["w"]) + 1.0, (x @ w["w"]) + 2.0)
    )
    assert_same(program, fold(program))


def test_arithmetic_on_weights_is_done_once():
    def fn(w, x):
        shared = w["beta"]
        for _ in range(40):
            shared = shared + shared * 0.5
        return x @ w["w"] + row(shared)

    program = dense_norm(fn)
    folded = fold(program)
    assert folded.history[-1].metrics["equations_after"] <= folded.history[-1].metrics["equations_before"]


# With other passes.


@pytest.mark.usefixtures("lenient")
def test_masks_follow_their_weight():
    recipe = Recipe.parse('on_unsupported = "keep"\n[[prune]]\nsites = ".*"\nsparsity = 0.5', name="half")
    for options in ({}, {"dtype": "bfloat16"}):
        program = linen(**options)
        pruned = prune(program, resolve(recipe, program))
        folded = fold(pruned)
        for name, mask in folded.masks.items():
            assert mask.dtype == bool
            assert mask.shape == folded.weights[name].shape
            assert np.mean(mask) == pytest.approx(0.5, abs=0.02)
            assert not np.asarray(folded.weights[name], np.float32)[~np.asarray(mask)].any()

    transposed = dense_norm(lambda w, x: norm(x @ w["w"].T, w), w=array(5, 6, seed=3))
    folded = fold(prune(transposed, resolve(recipe, transposed)))
    assert folded.masks["w"].shape == folded.weights["w"].shape == (6, 5)
    assert not np.asarray(folded.weights["w"])[~np.asarray(folded.masks["w"])].any()


def test_fold_then_lower_and_fold_again():
    program = linen()
    folded = fold(program)
    assert_same(program, fold(folded))
    plan = resolve(Recipe.load("int8"), folded)
    lowered = quantize(folded, plan)
    assert {site.site for site in lowered.history[-1].sites} == {site.name for site in find_sites(folded)}
    again = fold(lowered)
    image = array(5, 8, 8, 4, seed=11)
    expected = jax.jit(lowered.fn)(lowered.weights, image)
    np.testing.assert_allclose(jax.jit(again.fn)(again.weights, image), expected, rtol=1e-5, atol=1e-5)
    error = np.abs(expected - jax.jit(program.fn)(program.weights, image)).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_history_grows_by_one_report():
    program = linen()
    folded = fold(fold(program))
    assert [report.name for report in folded.history] == ["fold", "fold"]
    assert folded.history[1].sites == ()


def test_what_is_removed_takes_its_mask_along():
    weights = {"used": jnp.eye(6), "dead": jnp.ones((2, 2))}
    program = trace(lambda w, x: x @ w["used"], weights, {"x": TensorSpec(("batch", 6), "float32")})
    masks = {path: weight > 0 for path, weight in weights.items()}
    assert set(fold(program.replace(masks=masks)).masks) == {"used"}
