"""SmoothQuant: factors follow the formula, are folded where possible, and keep the float function."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.errors import CalibrationError, RecipeError
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.rounding import round_to_nearest
from lepton_xla.passes.rescaling.smoothquant import smooth, smooth_factor
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGES = {"x": TensorSpec(("batch", 6, 6, 4), "float32")}
ALL = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'\nactivations = 'none'", name="all")


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def outliers(*shape, seed=0):
    """Values whose last axis has magnitudes that differ a lot."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape[-1])), jnp.float32)


def row(vector):
    return jnp.reshape(vector, (1, -1))


def smoothed(program, *inputs, recipe=ALL, **options):
    """The smoothed program, its float function compared, and what became of each product."""
    plan = resolve(recipe, program)
    changed = smooth(program, plan, [{"x": x} for x in inputs], **options)
    for x in inputs:
        want = jax.tree.leaves(program.fn(program.weights, x))
        got = jax.tree.leaves(changed.fn(changed.weights, x))
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(jnp.max(jnp.abs(b))))
    reports = {site.site: site for site in changed.history[-1].sites}
    assert reports.keys() >= {entry.site.name for entry in plan.sites if entry.quantize is not None}
    return changed, {name: (site.action, site.reason) for name, site in reports.items()}


def formula(x, *weights, alpha=0.5):
    """The paper's equation 4 in float64; weights [K, N]."""
    act = np.abs(np.asarray(x, np.float64)).reshape(-1, x.shape[-1]).max(0)
    weight = np.max([np.abs(np.asarray(w, np.float64)).max(1) for w in weights], axis=0)
    alive = (act > 0) & (weight > 0)
    return np.where(alive, np.where(alive, act, 1) ** alpha / np.where(alive, weight, 1) ** (1 - alpha), 1)


def layer_norm(x, w):
    centered = x - jnp.mean(x, -1, keepdims=True)
    normal = centered * lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-6)
    return normal * row(w["gamma"]) + row(w["beta"])


def attention_weights(*lead):
    return {
        "gamma": outliers(*lead, 6, seed=1),
        "beta": outliers(*lead, 6, seed=2),
        "q": array(*lead, 6, 5, seed=3),
        "k": array(*lead, 5, 6, seed=4),
        "v": array(*lead, 6, 5, seed=5),
    }


def attention(w, x):
    normal = layer_norm(x, w)
    return normal @ w["q"] + normal @ w["k"].T, normal @ w["v"]


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_products_after_a_norm_share_a_factor_in_its_scale_and_shift(alpha):
    weights, x = attention_weights(), array(20, 6)
    program = trace(attention, weights, ROWS)
    changed, became = smoothed(program, x[:10], x[10:], alpha=alpha)
    assert became == dict.fromkeys("qkv", ("factor folded into gamma, beta", ""))
    factor = formula(layer_norm(x, weights), weights["q"], weights["k"].T, weights["v"], alpha=alpha)
    for name, want in (
        ("gamma", weights["gamma"] / factor),
        ("beta", weights["beta"] / factor),
        ("q", weights["q"] * factor[:, None]),
        ("k", weights["k"] * factor[None]),
        ("v", weights["v"] * factor[:, None]),
    ):
        np.testing.assert_allclose(changed.weights[name], want, rtol=1e-4)
    assert changed.weights.keys() == program.weights.keys()


def test_it_makes_activations_easier_to_quantize():
    weights, x = attention_weights(), array(20, 6)
    program = trace(attention, weights, ROWS)
    changed, _ = smoothed(program, x)

    def spread(program):
        values = np.abs(layer_norm(x, program.weights)).max(0)
        return values.max() / values.min()

    assert spread(changed) < 0.5 * spread(program)


def mlp(w, x):
    return jax.nn.relu(x @ w["up"] + row(w["bias"])) @ w["down"]


def test_a_product_before_takes_the_factor_up_through_relu_and_bias():
    weights = {"up": outliers(6, 8, seed=1), "bias": array(8, seed=2), "down": array(8, 3, seed=3)}
    x = array(20, 6)
    changed, became = smoothed(trace(mlp, weights, ROWS), x)
    assert became["down"] == ("factor folded into up, bias", "")
    assert became["up"] == ("activation multiplied", "its activation comes from outside")
    hidden = jax.nn.relu(x @ weights["up"] + row(weights["bias"]))
    down, up = formula(hidden, weights["down"]), formula(x, weights["up"])
    np.testing.assert_allclose(changed.weights["down"], weights["down"] * down[:, None], rtol=1e-4)
    np.testing.assert_allclose(changed.weights["bias"], weights["bias"] / down, rtol=1e-4)
    np.testing.assert_allclose(changed.weights["up"], weights["up"] * up[:, None] / down[None], rtol=1e-4)
    np.testing.assert_allclose(changed.weights["up:input_factor"], 1 / up, rtol=1e-4)


def test_a_gate_takes_its_factor_up_in_the_linear_branch():
    weights = {"gate": array(6, 8, seed=1), "up": outliers(6, 8, seed=2), "down": array(8, 3, seed=3)}
    fn = lambda w, x: (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]  # noqa: E731
    changed, became = smoothed(trace(fn, weights, ROWS), array(20, 6))
    assert became["down"] == ("factor folded into up", "")
    assert became["gate"][0] == became["up"][0] == "activation multiplied"
    # One vector for both, so that a compiler sees that they multiply the same thing.
    assert set(changed.weights) == {*weights, "gate:input_factor"}


NOT_FOLDED = {
    "gelu": (lambda w, x: jax.nn.gelu(x @ w["up"]) @ w["down"], "a `mul` before it"),
    "tanh": (lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"], "a `tanh` stands before it"),
    "read elsewhere": (lambda w, x: ((h := x @ w["up"]) @ w["down"], h), "its activation is also read elsewhere"),
    "residual": (lambda w, x: ((h := x @ w["up"]) + jnp.tanh(h)) @ w["down"], "is also read elsewhere"),
    "shared bias": (
        lambda w, x: ((x @ w["up"]) + row(w["bias"])) @ w["down"] + jnp.sum(w["bias"]),
        "'bias' is also used elsewhere",
    ),
    "heads": (
        lambda w, x: jnp.einsum("bhd,hdn->bn", (x @ w["up"]).reshape(-1, 2, 4), w["down"].reshape(2, 4, 3)),
        "sever",
    ),
    "square": (lambda w, x: ((h := x @ w["up"]) * h) @ w["down"], "is also read elsewhere"),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_where_nothing_takes_the_factor_up_the_activation_is_multiplied(name):
    fn, reason = NOT_FOLDED[name]
    weights = {"up": outliers(6, 8, seed=1), "bias": array(8, seed=2), "down": array(8, 3, seed=3)}
    program = trace(fn, weights, ROWS)
    x = array(20, 6)
    changed, became = smoothed(program, x)
    assert became["down"][0] == "activation multiplied"
    assert reason in became["down"][1] or name == "gelu"
    assert "down:input_factor" in changed.weights
    left, became = smoothed(program, x, unmultiplied=["down"])
    assert became["down"] == ("kept", "it is computed in float, where multiplying its activation brings nothing")
    assert "down:input_factor" not in left.weights
    np.testing.assert_array_equal(left.weights["down"], weights["down"])


def test_a_product_that_is_not_planned_takes_part_where_it_shares_the_activation():
    recipe = Recipe.parse("[[quantize]]\nsites = 'q'\nactivations = 'none'", name="q")
    changed, became = smoothed(trace(attention, attention_weights(), ROWS), array(20, 6), recipe=recipe)
    assert became["q"] == ("factor folded into gamma, beta", "")
    assert not np.allclose(changed.weights["v"], attention_weights()["v"])


def test_a_weight_used_twice_is_kept():
    program = trace(lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"], {"w": array(6, 6)}, ROWS)
    changed, became = smoothed(program, array(4, 6))
    assert became == dict.fromkeys(("w", "w#1"), ("kept", "its weight is also used elsewhere"))
    np.testing.assert_array_equal(changed.weights["w"], program.weights["w"])


def stack(w, x):
    def step(x, w):
        a, b = attention(w, x)
        return x + (a * b) @ w["out"], None

    return lax.scan(step, x, w)[0]


def test_each_step_of_a_stack_has_its_own_factor():
    weights = attention_weights(3) | {"out": array(3, 5, 6, seed=7, scale=0.1)}
    x = array(20, 6)
    changed, became = smoothed(trace(stack, weights, ROWS), x)
    assert became["q"] == ("factor folded into gamma, beta", "")
    assert became["out"] == ("factor folded into q, k", "")  # the linear side of the product of both
    state = x
    for step in range(3):
        w = {name: leaf[step] for name, leaf in weights.items()}
        factor = formula(layer_norm(state, w), w["q"], w["k"].T, w["v"])
        np.testing.assert_allclose(changed.weights["gamma"][step], w["gamma"] / factor, rtol=1e-3)
        a, b = attention(w, state)
        state = state + (a * b) @ w["out"]


def test_a_stack_that_multiplies():
    weights = {"w": array(3, 6, 6, seed=1, scale=0.5)}
    program = trace(lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["w"])[0], weights, ROWS)
    x = outliers(20, 6)
    changed, became = smoothed(program, x)
    assert became == {"w": ("activation multiplied", "its activation comes from outside of the scan")}
    assert changed.weights["w:input_factor"].shape == (3, 6)
    np.testing.assert_allclose(changed.weights["w:input_factor"][0], 1 / formula(x, weights["w"][0]), rtol=1e-4)


def test_a_norm_that_all_steps_share_is_not_folded_into():
    weights = {"gamma": outliers(6, seed=1), "beta": array(6, seed=2), "w": array(3, 6, 6, seed=3, scale=0.3)}
    fn = lambda w, x: lax.scan(lambda x, v: (layer_norm(x, w) @ v, None), x, w["w"])[0]  # noqa: E731
    _, became = smoothed(trace(fn, weights, ROWS), array(20, 6))
    assert became["w"] == ("activation multiplied", "'gamma' is not stacked as its weight is")


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions(groups):
    weights = {
        "first": outliers(3, 3, 4, 8, seed=1),
        "bias": array(8, seed=2),
        "second": array(3, 3, 8 // groups, 8, seed=3),
    }

    def fn(w, x):
        hidden = jax.nn.relu(conv(x, w["first"]) + w["bias"].reshape(1, 1, 1, -1))
        pooled = lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return conv(pooled, w["second"], groups)

    x = array(2, 6, 6, 4)
    changed, became = smoothed(trace(fn, weights, IMAGES), x)
    assert became["second"] == ("factor folded into first, bias", "")
    assert became["first"][0] == "activation multiplied"
    hidden = jax.nn.relu(conv(x, weights["first"]) + weights["bias"].reshape(1, 1, 1, -1))
    pooled = lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    kernel = np.asarray(weights["second"])
    per_channel = np.abs(kernel).max((0, 1)).reshape(8 // groups, groups, -1).max(2).T.reshape(-1)
    act = np.abs(np.asarray(pooled)).max((0, 1, 2))
    np.testing.assert_allclose(changed.weights["bias"], weights["bias"] / np.sqrt(act / per_channel), rtol=1e-4)


def test_batched_products_multiply():
    fn = lambda w, x: jnp.einsum("bgk,gkn->bgn", x.reshape(-1, 2, 3), w["w"])  # noqa: E731
    changed, became = smoothed(trace(fn, {"w": array(2, 3, 4)}, ROWS), outliers(20, 6))
    assert became == {"w": ("activation multiplied", "its inputs are several axes")}
    assert changed.weights["w:input_factor"].shape == (6,)


def test_dead_channels_keep_a_factor_of_one():
    weights = attention_weights()
    weights["gamma"] = weights["gamma"].at[1].set(0)
    weights["beta"] = weights["beta"].at[1].set(0)
    for name in "qv":
        weights[name] = weights[name].at[2].set(0)
    weights["k"] = weights["k"].at[:, 2].set(0)
    changed, _ = smoothed(trace(attention, weights, ROWS), array(20, 6))
    np.testing.assert_array_equal(changed.weights["q"][1], weights["q"][1])
    np.testing.assert_array_equal(changed.weights["gamma"][2], weights["gamma"][2])
    factor = smooth_factor(jnp.asarray([0.0, 1e30, 1e-30, 3.0]), jnp.asarray([1.0, 1e-30, 1e30, 0.0]), 0.5)
    assert np.all(np.isfinite(factor))
    assert np.all(np.asarray(factor) > 0)
    assert factor[0] == factor[3] == 1


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(3, name="down")(nn.relu(x))


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(self.norm(x))))


def equinox_program():
    keys = jax.random.split(jax.random.key(0))
    model = eqx.nn.Sequential(
        [
            eqx.nn.LayerNorm(6),
            eqx.nn.Linear(6, 8, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(8, 3, key=keys[1]),
        ]
    )
    weights, rest = eqx.partition(model, eqx.is_array)
    return trace(lambda weights, x: jax.vmap(eqx.combine(weights, rest))(x), weights, ROWS)


PROGRAMS = {
    "linen": lambda: from_linen(LinenNet(), LinenNet().init(jax.random.key(0), jnp.zeros((1, 6))), ROWS),
    "nnx": lambda: from_nnx(NNXNet(), ROWS),
    "equinox": equinox_program,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_frameworks(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = PROGRAMS[name]()
        changed, became = smoothed(program, outliers(20, 6))
    assert len(became) == 2
    for action, reason in became.values():
        assert action.startswith("factor folded into ")
        assert action.count(",") == 1
        assert reason == ""
    assert changed.weights.keys() == program.weights.keys()


def test_it_composes_with_itself_and_with_rounding():
    program = trace(mlp, {"up": outliers(6, 8, seed=1), "bias": array(8), "down": array(8, 3, seed=3)}, ROWS)
    x = array(20, 6)
    once, _ = smoothed(program, x)
    twice, _ = smoothed(once, 3 * x, x)
    assert twice.weights.keys() == once.weights.keys()
    assert twice.history[-1].sites[0].action == "factor folded into up:input_factor"
    rounded, _ = round_to_nearest(twice, resolve(ALL, twice))
    want = program.fn(program.weights, x)
    got = rounded.fn(rounded.weights, x)
    assert 0 < np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


def test_bad_input():
    program = trace(mlp, {"up": array(6, 8), "bias": array(8), "down": array(8, 3)}, ROWS)
    with pytest.raises(RecipeError, match=r"alpha = 1\.5 is not in"):
        smooth(program, resolve(ALL, program), [{"x": array(2, 6)}], alpha=1.5)
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        smooth(program, resolve(ALL, program), [])
