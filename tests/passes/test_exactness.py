"""No pass moves a program by more than its own rounding explains, whatever its weights are: floats, integers, masks.

Each pass is compared with the float function, on random programs and on cases for each way in which a factor once went
where it was lost. `random_graphs` makes weights that int8 stores exactly, so that rounding passes have nothing to lose.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from random_graphs import inputs, random_graph

from lepton_xla.passes import cast, fake_quant, fold, prune, quantize
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.bias_correction import correct_bias
from lepton_xla.passes.quantization.gptq import gptq
from lepton_xla.passes.quantization.rounding import round_to_nearest
from lepton_xla.passes.rescaling.awq import awq
from lepton_xla.passes.rescaling.equalization import equalize
from lepton_xla.passes.rescaling.factors import fitted
from lepton_xla.passes.rescaling.scaling import scale_groups
from lepton_xla.passes.rescaling.smoothquant import smooth
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

WEIGHTS = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'\nactivations = 'none'", name="weights")
BOTH = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'", name="both")
PRUNED = Recipe.parse("on_unsupported = 'keep'\n[[prune]]\nsites = '.*'\nsparsity = 0.4", name="pruned")


def outputs(fn, weights, x):
    return np.asarray(jax.jit(fn)(weights, x), np.float64)


def assert_alike(got, want, continuous=True, tolerance=3e-4):
    """Equal up to float rounding; where a program has jumps, all but the few elements that rounding pushed over one."""
    errors = np.abs(got - want) / (np.max(np.abs(want)) + 1e-3)
    assert (np.max(errors) if continuous else np.quantile(errors, 0.9)) < tolerance


@pytest.mark.parametrize("seed", [59])
def test_passes_that_are_exact_in_real_arithmetic(seed):
    graph, x, data = random_graph(seed), inputs(seed), [{"x": inputs(seed + 10**6, 8)}]
    program = graph.program
    plan, want = resolve(WEIGHTS, program), outputs(program.fn, program.weights, x)
    for changed in (fold(program), equalize(program, plan), smooth(program, plan, data), awq(program, plan, data)):
        assert_alike(outputs(changed.fn, changed.weights, x), want, graph.continuous)


@pytest.mark.parametrize("seed", [3])
def test_passes_that_round_what_needs_no_rounding(seed):
    graph, x, data = random_graph(seed), inputs(seed), [{"x": inputs(seed + 10**6, 8)}]
    program = graph.program
    plan, want = resolve(WEIGHTS, program), outputs(program.fn, program.weights, x)
    rounded = round_to_nearest(program, plan)[0]
    for changed in (
        gptq(program, plan, data)[0],
        correct_bias(program, rounded, plan, data),
        quantize(program, plan, sizes=[]),
        program.replace(fn=fake_quant(program.fn, plan)),
    ):
        assert_alike(outputs(changed.fn, changed.weights, x), want, graph.continuous)
    both = resolve(BOTH, program)
    lowered = quantize(program, both, sizes=[])
    faked = outputs(fake_quant(program.fn, both), program.weights, x)
    assert_alike(outputs(lowered.fn, lowered.weights, x), faked, graph.continuous)
    pruned = prune(program, resolve(PRUNED, program))
    ahead = precompute(program)  # as `prune` does for weights that are computed from weights
    held = {name: jnp.where(mask, ahead.weights[name], 0) for name, mask in pruned.masks.items()}
    masked = outputs(ahead.fn, ahead.weights | held, x)
    assert_alike(outputs(pruned.fn, pruned.weights, x), masked, graph.continuous)


# One case for each way in which a factor was lost. All are a product, something, and a second product, `x` being
# [batch, 4, 4]: as many positions as channels.


def row(vector):
    return jnp.asarray(vector, jnp.float32)[None, None]


def column(vector):
    return jnp.broadcast_to(vector[:, None], (4, 4))[None]


def carried(vector):
    """A vector that a scan carries, and changes, while a product has it for a bias."""
    return lax.scan(lambda c, _: (c * 0.5, None), vector, None, length=2)[0]


BETWEEN = {
    "a boolean mask": ("bool", lambda h, v: h * row(v)),
    "an integer scale": ("int32", lambda h, v: h * row(v)),
    "an integer bias": ("int32", lambda h, v: h + row(v)),
    "fixed point": ("int8", lambda h, v: h + row(v) / 64),
    "a float read as an integer": ("float32", lambda h, v: h + row(v.astype("int32"))),
    "a bias of positions": ("float32", lambda h, v: h + column(v)),
    "a scale of positions": ("float32", lambda h, v: h * column(v)),
    "a bias that is also carried": ("float32", lambda h, v: (h + row(v)) * (1 + jnp.sum(carried(v)))),
    "a bias that chooses a branch": (
        "int32",
        lambda h, v: lax.cond(v[0] > 1, lambda y: y, lambda y: y * 2, h + row(v)),
    ),
    "the larger of a value and a bias": ("float32", lambda h, v: jnp.maximum(h, row(v))),
    "a gate": ("bool", lambda h, v: jnp.where(v[None, None], h, h * h)),
    "a step": ("float32", lambda h, v: jnp.floor(h + row(v))),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_factor_goes_only_where_it_is_held(case):
    dtype, between = BETWEEN[case]
    rng = np.random.default_rng(5)
    # Channels of very different sizes, so that factors are far from 1.
    spread = np.exp(2 * rng.standard_normal(4))
    vector = np.array([1.7, -1.3, 0.6, 2.4])
    weights = {
        "first": jnp.asarray(rng.standard_normal((4, 4)) * spread, jnp.float32),
        "second": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "v": jnp.asarray(vector > 0 if dtype == "bool" else np.ceil(vector) if dtype != "float32" else vector, dtype),
    }
    fn = lambda w, x: between(x @ w["first"], w["v"]) @ w["second"]  # noqa: E731
    program = trace(fn, weights, {"x": TensorSpec(("batch", 4, 4), "float32")})
    x, plan = inputs(1), resolve(WEIGHTS, program)
    want, data = outputs(program.fn, program.weights, x), [{"x": inputs(2, 8)}]
    for changed in (fold(program), equalize(program, plan), smooth(program, plan, data)):
        assert_alike(outputs(changed.fn, changed.weights, x), want, tolerance=1e-5)
        assert changed.weights.get("v", weights["v"]).dtype == weights["v"].dtype
    if dtype != "float32":
        rounded = round_to_nearest(program, plan)[0]
        corrected = correct_bias(program, rounded, plan, data)
        np.testing.assert_array_equal(corrected.weights["v"], weights["v"])


def test_a_mask_is_named_as_the_reason():
    weights = {"first": jnp.ones((4, 4)), "second": jnp.ones((4, 3)), "keep": jnp.arange(4) < 3}
    fn = lambda w, x: (x @ w["first"] + row(w["keep"])) @ w["second"]  # noqa: E731
    program = trace(fn, weights, {"x": TensorSpec(("batch", 4, 4), "float32")})
    report = smooth(program, resolve(WEIGHTS, program), [{"x": inputs(0)}]).history[-1]
    assert {site.site: site.reason for site in report.sites}["second"] == "'keep' is bool, which holds no factor"


@pytest.mark.parametrize(
    ("dtype", "reason"), [("int8", "its weight is int8 already"), ("bool", "its weight is bool, no float")]
)
def test_the_weight_of_a_product_that_is_no_float_is_kept(dtype, reason):
    weights = {"first": jnp.ones((4, 4)), "second": jnp.asarray(np.eye(4, 3), dtype)}
    fn = lambda w, x: x @ w["first"] @ w["second"].astype("float32")  # noqa: E731
    program = trace(fn, weights, {"x": TensorSpec(("batch", 4, 4), "float32")})
    plan, data = resolve(WEIGHTS, program), [{"x": inputs(0)}]
    assert plan["second"].not_quantized == reason
    for changed in (smooth(program, plan, data), gptq(program, plan, data)[0]):
        assert changed.weights["second"] is program.weights["second"]


def test_a_float_that_is_read_as_an_integer_is_not_narrowed():
    weights = {"w": jnp.full((4, 3), 301.0)}
    program = trace(
        lambda w, x: x @ w["w"].astype("int32").astype("float32"), weights, {"x": TensorSpec((2, 4), "float32")}
    )
    report = cast(program, "bfloat16").history[-1]
    assert [(site.action, site.reason) for site in report.sites] == [("kept", "it becomes int32 before site 'w'")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_on_narrow_weights_round_nothing(dtype):
    rng = np.random.default_rng(0)
    first, second = (
        jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(4)), dtype) for shape in 2 * [(4, 4)]
    )
    fn = lambda w, x: jax.nn.relu(x @ w["first"].astype("float32")) @ w["second"].astype("float32")  # noqa: E731
    program = trace(fn, {"first": first, "second": second}, {"x": TensorSpec(("batch", 4, 4), "float32")})
    x, plan = inputs(0), resolve(WEIGHTS, program)
    want = outputs(program.fn, program.weights, x)
    for changed in (equalize(program, plan), smooth(program, plan, [{"x": x}])):
        assert any((changed.weights[name] != program.weights[name]).any() for name in program.weights)
        assert_alike(outputs(changed.fn, changed.weights, x), want, tolerance=1e-6)


def test_a_factor_stays_within_what_a_dtype_holds():
    """Row 0 would overflow float16, row 1 fall below its normal numbers; row 2 has room for all of it."""
    weights = {"w": jnp.asarray(np.array([[30000.0], [1e-4], [1.0]]), "float16")}
    fn = lambda w, x: x @ w["w"].astype("float32")  # noqa: E731
    program = trace(fn, weights, {"x": TensorSpec(("batch", 3), "float32")})
    (group,), _ = scale_groups(program, resolve(WEIGHTS, program))
    sites = {site.name: site for site in find_sites(program)}
    factor = fitted(program.weights, sites, group, jnp.asarray([64.0, 1 / 64, 64.0]))
    np.testing.assert_array_equal(factor, [1, 1, 64])


def test_folding_stops_where_a_narrow_weight_would_overflow():
    weights = {"w": jnp.full((4, 2), 30000.0, "float16"), "scale": jnp.asarray([4.0, 0.5], "float16")}
    fn = lambda w, x: x @ w["w"] * w["scale"][None]  # noqa: E731
    program = trace(fn, weights, {"x": TensorSpec(("batch", 4), "float16")})
    x = np.full((1, 4), 0.1, np.float16)
    folded = fold(program)
    np.testing.assert_array_equal(folded.fn(folded.weights, x), program.fn(weights, x))
