"""Zeros stay exactly zero in every format and granularity: trained with masks, quantized, saved, loaded."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_xla as lx
from lepton_xla.passes import fake_quant, masked, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import FORMATS
from lepton_xla.recipe import Recipe

ROWS, COLUMNS = 12, 6
NAMES = ("int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4", "codebook16")
KINDS = [f"{name}/{how}" for name, how in itertools.product(NAMES, ("channel", "tensor", "group4"))]


def block(kind):
    """The rule of one weight; in groups, scales are searched where they can be."""
    name, how = kind.split("/")
    searched = 'weight_range = "mse"' if how == "group4" and not FORMATS[name].learned else ""
    text = f'[[quantize]]\nsites = "{kind}"\nweights = "{name}"\nactivations = "none"\n{searched}\n'
    return text + f'granularity = "{how.replace("group", "group:")}"\n'


def side_by_side(weights, x):
    return jnp.stack([x @ weights[kind] for kind in KINDS], 1)


# One program with a weight of each kind, so that everything is compiled once.
PROGRAM = trace(
    side_by_side,
    {kind: jnp.ones((ROWS, COLUMNS)) for kind in KINDS},
    {"x": TensorSpec(("batch", ROWS), "float32")},
)
PLAN = resolve(Recipe.parse("\n".join(map(block, KINDS)), name="every kind"), PROGRAM)
UNIT = jnp.eye(ROWS)  # the product with it is the weight as it is used


@jax.jit
def train(weights, masks):
    """A few steps with masks and rounding; the weights after them, and as they were used in the last."""
    fn = masked(fake_quant(side_by_side, PLAN), masks)
    loss = lambda weights: jnp.mean((fn(weights, UNIT) - 0.3) ** 2)  # noqa: E731

    def step(_, weights):
        return optax.apply_updates(weights, jax.tree.map(lambda g: -0.5 * g, jax.grad(loss)(weights)))

    weights = jax.lax.fori_loop(0, 3, step, weights)
    return weights, fn(weights, UNIT)


@st.composite
def weights_and_masks(draw):
    """Weights of any spread and side, and masks of any share, of which some columns and rows have nothing."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (len(KINDS), ROWS, COLUMNS)
    values = random.standard_normal(shape) * 10.0 ** random.uniform(*draw(st.sampled_from([(0, 0), (-6, 6)])), shape)
    values = values + draw(st.sampled_from([0.0, 3.0, -3.0]))
    kept = random.random(shape) >= draw(st.sampled_from([0.1, 0.5, 0.9]))
    kept[:, :, 0] &= draw(st.booleans())
    kept[:, :4] &= draw(st.booleans())
    return (
        {kind: jnp.asarray(part, jnp.float32) for kind, part in zip(KINDS, values, strict=True)},
        {kind: jnp.asarray(part) for kind, part in zip(KINDS, kept, strict=True)},
    )


def assert_zero(used, masks, what):
    for kind, mask in masks.items():
        assert (np.asarray(used[kind])[~np.asarray(mask)] == 0).all(), f"{kind}: {what}"


def by_kind(stacked):
    return {kind: np.asarray(stacked)[:, index] for index, kind in enumerate(KINDS)}


@settings(max_examples=2)
@given(weights_and_masks())
def test_zeros_stay_zero_from_training_to_what_is_loaded(tmp_path_factory, drawn):
    weights, masks = drawn
    trained, used = train(weights, masks)
    assert_zero(by_kind(used), masks, "trained")
    held = {kind: jnp.where(masks[kind], trained[kind], 0.0) for kind in KINDS}
    small = quantize(PROGRAM.replace(weights=held, masks=masks), PLAN)
    assert_zero({kind: small.weights[kind].dequantize() for kind in KINDS}, masks, "lowered")
    for kind in KINDS:
        levels = small.weights[kind].codebook
        assert levels is None or masks[kind].all() or (np.asarray(levels) == 0).any(), f"{kind}: {levels}"
    path = tmp_path_factory.mktemp("zeros") / "it.lepton"
    lx.compile(small, {"batch": (ROWS,)}, name="it").save(path)
    loaded = by_kind(lx.load(path)(x=np.asarray(UNIT))["output"])
    assert_zero(loaded, masks, "loaded")
    # What is served is what was trained, and has not become zero everywhere.
    for kind, weight in by_kind(used).items():
        np.testing.assert_allclose(loaded[kind], weight, rtol=1e-6, atol=1e-6 * np.abs(weight).max())
        assert (loaded[kind] != 0).any() == (np.asarray(held[kind]) != 0).any()


@pytest.mark.parametrize("name", ["int8", "uint4"])
def test_rounding_at_random_keeps_zeros(name):
    kinds = {kind for kind in KINDS if kind.startswith(name)}
    text = "\n".join(block(kind) for kind in sorted(kinds))
    plan = resolve(Recipe.parse(text, name="some kinds"), PROGRAM)
    random = np.random.default_rng(0)
    weights = {kind: jnp.asarray(random.standard_normal((ROWS, COLUMNS)), jnp.float32) for kind in KINDS}
    masks = {kind: weights[kind] > 0.2 for kind in kinds}
    used = by_kind(masked(fake_quant(side_by_side, plan), masks)(weights, UNIT, key=jax.random.key(0)))
    assert_zero(used, masks, "at random")


def test_levels_that_are_trained_keep_the_one_that_is_zero():
    program = trace(lambda w, x: x @ w["w"], {"w": jnp.ones((ROWS, COLUMNS))}, PROGRAM.inputs)
    plan = resolve(Recipe.parse(block("codebook16/channel").replace("codebook16/channel", "w"), name="w"), program)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, COLUMNS)), jnp.float32)
    masks = {"w": jnp.abs(weight) > 0.5}
    stored = quantize(program.replace(weights={"w": jnp.where(masks["w"], weight, 0.0)}), plan).weights["w"]
    scales = {"w": {"scale": stored.scale, "codebook": stored.codebook}}
    fn = masked(fake_quant(program.fn, plan), masks)
    loss = lambda scales: jnp.mean((fn({"w": weight}, UNIT, scales=scales) - 1) ** 2)  # noqa: E731
    for rate in (0.1, 1.0):
        moved = jax.tree.map(lambda part, g, rate=rate: part - rate * g, scales, jax.grad(loss)(scales))
        levels = np.asarray(moved["w"]["codebook"])
        assert (levels != np.asarray(stored.codebook)).sum() > 5
        assert (np.diff(levels) < 0).any() == (rate == 1)  # then some have passed the one that is zero
        used = fn({"w": weight}, UNIT, scales=moved)
        assert (np.asarray(used)[~np.asarray(masks["w"])] == 0).all()
        held = program.replace(weights={"w": jnp.where(masks["w"], weight, 0.0)})
        np.testing.assert_array_equal(quantize(held, plan, scales=moved).weights["w"].dequantize(), used)
