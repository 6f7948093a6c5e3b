"""Quantized products of two activations: attention, compared with the same attention rounded in NumPy float64."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lepton_xla as lx
from lepton_xla import _compat
from lepton_xla.passes import awq, calibrate, correct_bias, equalize, fake_quant, gptq, prune, quantize, smooth
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing import Timer
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization import measurement
from lepton_xla.passes.quantization.rounding import round_to_nearest

HEADS, WIDTH, LAYERS = 2, 8, 2
SHAPE = (4, 5, WIDTH)
PAIR, BOTH = ".*dot_general#[0-9]", ".*"
LOWER = sys.modules[
    "lepton_xla.passes.quantization.integer_arithmetic"
]  # the module, which the package's function hides


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def attend(w, x):
    """x float [batch, seq, width]; multi-head attention without biases, and a residual."""
    batch, seq, _ = x.shape
    query, key, value = (
        jnp.reshape(x @ w[name], (batch, seq, HEADS, -1)).transpose(0, 2, 1, 3) for name in ("query", "key", "value")
    )
    scores = jax.nn.softmax(query @ key.transpose(0, 1, 3, 2) * 0.5, axis=-1)
    return x + (scores @ value).transpose(0, 2, 1, 3).reshape(batch, seq, -1) @ w["out"]


def layers(w, x):
    return lax.scan(lambda x, step: (attend(step, x), None), x, w)[0]


def make_weights(*lead):
    names = ("query", "key", "value", "out")
    return {name: array(*lead, WIDTH, WIDTH, seed=seed) / 2 for seed, name in enumerate(names)}


INPUTS = {"x": lx.TensorSpec(("batch", "seq", WIDTH), "float32")}
ONE = lx.trace(attend, make_weights(), INPUTS)
STACKED = lx.trace(layers, make_weights(LAYERS), INPUTS)
X = array(*SHAPE, seed=9)


def one_query(w, x):
    """The last position asks, as in decoding: one row."""
    scores = jax.nn.softmax(x[:, -1:] @ w["w"] @ x.transpose(0, 2, 1), axis=-1)
    return (scores @ x)[:, 0]


QUERY = lx.trace(one_query, {"w": array(WIDTH, WIDTH)}, INPUTS)


def rounded(values, axis):
    """What int8 holds of float64 values, one scale along the axis: absmax / 127, nearest code, ties to even."""
    scale = np.abs(values).max(axis, keepdims=True) / 127
    return np.rint(values / np.where(scale == 0, 1, scale)) * scale


def reference(weights, x, *, weighted, step=()):
    """Attention in float64: products of two activations of rounded operands, those with a weight too if `weighted`."""

    def linear(name, x):
        weight = np.asarray(weights[name], np.float64)[step]
        return rounded(x, -1) @ rounded(weight, 0) if weighted else x @ weight

    x = np.asarray(x, np.float64)
    batch, seq, _ = x.shape
    query, key, value = (
        linear(name, x).reshape(batch, seq, HEADS, -1).transpose(0, 2, 1, 3) for name in ("query", "key", "value")
    )
    scores = rounded(query, -1) @ rounded(key, -1).transpose(0, 1, 3, 2) * 0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares = shares / shares.sum(-1, keepdims=True)
    mixed = rounded(shares, -1) @ rounded(value, -2)
    return x + linear("out", mixed.transpose(0, 2, 1, 3).reshape(batch, seq, -1))


def recipe(sites=BOTH, options="", head=""):
    return lx.Recipe.parse(f'{head}\n[[quantize]]\nsites = "{sites}"\nproducts = "all"\n{options}', name="attention")


def run(program, *inputs):
    """The program's result, compiled: op by op, each operation would be compiled by itself."""
    return jax.jit(program.fn)(program.weights, *inputs)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@functools.cache
def served(name, sites=BOTH):
    """A program lowered as a recipe for these sites says, and what it gives for X: made once for all tests."""
    program = {"one": ONE, "stacked": STACKED}[name]
    small = quantize(program, resolve(recipe(sites), program))
    return small, np.asarray(run(small, X))


def products_in_codes(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("preferred_element_type=int32")


def left_operands(program, sizes):
    """Shape and dtype of the left operand of each product that is not inside of anything."""
    equations = _compat.open_jaxpr(program.jaxpr(sizes))[0].eqns
    return [eqn.invars[0].aval for eqn in equations if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize("sites", [PAIR, BOTH])
def test_attention_is_that_of_rounded_operands(sites):
    small, got = served("one", sites)
    assert products_in_codes(small.fn, small.weights, X) == (6 if sites == BOTH else 2)
    close(got, reference(ONE.weights, X, weighted=sites == BOTH))
    exact = np.asarray(run(ONE, X))
    assert 1e-3 < np.abs(got - exact).max() / np.abs(exact).max() < 0.03
    reports = {site.site: site for site in small.history[-1].sites}
    assert [(reports[name].action, reports[name].reason) for name in ("dot_general#0", "dot_general#1")] == [
        ("int8 x int8", ""), ("int8 x int8", ""),
    ]  # fmt: skip
    assert reports["dot_general#0"].bytes_before == reports["dot_general#0"].bytes_after == 0


def test_stacked_layers_in_a_scan():
    small, got = served("stacked")
    assert products_in_codes(small.fn, small.weights, X) == 6
    expected = X
    for step in range(LAYERS):
        expected = reference(STACKED.weights, expected, weighted=True, step=step)
    close(got, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_two_devices_that_share_a_batch(kind):
    small, alone = served("one")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        halves = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
        compiled = jax.jit(small.fn).lower(small.weights, halves).compile()
        got = compiled(small.weights, halves)
    assert len(got.sharding.device_set) == 2
    assert got.sharding.spec[0] == "data"
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))
    close(got, alone)


def test_inside_shard_map_scales_are_of_what_a_device_has(monkeypatch):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def fn(w, x):
        return jax.shard_map(attend, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(w, x)

    program = lx.trace(fn, ONE.weights, INPUTS)
    plan = resolve(recipe(head='on_unsupported = "keep"'), program)
    assert {entry.site.name for entry in plan.sites if entry.quantize} == {"dot_general#0", "dot_general#1"}
    # A product is timed, one row of a sequence padded too; how long the whole program takes is of no interest here.
    monkeypatch.setattr(LOWER, "time_programs", lambda functions, _inputs, timer=None: [1.0] * len(functions))
    one = resolve(recipe("dot_general#0"), program)
    small = quantize(program, one, sizes=[{"batch": 2, "seq": 1}, {"batch": 2, "seq": 5}])
    (timings,) = [site.metrics["timings"] for site in small.history[-1].sites]
    assert [timing["padded_us"] is None for timing in timings] == [False, True]
    small = quantize(program, plan)
    for seq in (1, 5):
        close(run(small, X[:, :seq]), reference(ONE.weights, X[:, :seq], weighted=False))


def masked(w, x, mask):
    """x float [batch, seq, width], mask float [batch, seq]: attention by one head to unmasked positions only."""
    x = x + w["positions"][None, : x.shape[1]]
    scores = x @ w["w"] @ x.transpose(0, 2, 1) + (1 - mask[:, None]) * -1e9
    return jax.nn.softmax(scores, axis=-1) @ x


@pytest.mark.parametrize(("sites", "batches", "length", "off"), [(BOTH, (1, 4), 5, 0.03), (PAIR, (4,), 8, 0.1)])
def test_compiled_saved_and_loaded(tmp_path, sites, batches, length, off):
    mask = lx.TensorSpec(("batch", "seq"), "float32")
    # Masked positions are the largest, so that scales are others in a longer bucket: rounding differs, and may.
    positions = array(8, WIDTH, seed=5) * jnp.where(jnp.arange(8) < 5, 1.0, 4.0)[:, None]
    program = lx.trace(masked, {"w": array(WIDTH, WIDTH) / 2, "positions": positions}, {**INPUTS, "mask": mask})
    small = lx.optimize(program, recipe(sites, head="measure = false"))
    artifact = lx.compile(small, {"batch": batches, "seq": (length,)}, name="attention")
    artifact.save(tmp_path / "attention.lepton")
    servable = lx.load(tmp_path / "attention.lepton")
    ones = np.ones(SHAPE[:2], np.float32)
    for rows, seq in ((1, 5), (4, 5), (3, 4)):
        x = X[:rows, :seq]
        got = servable(x=np.asarray(x), mask=ones[:rows, :seq])["output"]
        exact = np.asarray(run(program, x, ones[:rows, :seq]))
        assert 0 < np.abs(got - exact).max() < off * np.abs(exact).max()
        if (rows, seq) == (4, length):
            close(got, np.asarray(run(small, x, ones)))
    (lowered,) = (report for report in servable.manifest.reports if report["name"] == "quantize")
    actions = [site["action"] for site in lowered["sites"]]
    assert actions == ["int8 x int8"] * (3 if sites == BOTH else 2)


def test_single_rows_are_timed_padded_and_come_out_the_same(monkeypatch):
    program, plan = QUERY, resolve(recipe(), QUERY)
    times = itertools.count(100, -10)
    monkeypatch.setattr(LOWER, "time_programs", lambda functions, _inputs, timer=None: [next(times) for _ in functions])
    timing = measurement.Timing({"batch": 2, "seq": 5}, 9.0, 4.0, 2.0)
    monkeypatch.setattr(LOWER, "compare", lambda wanted, _timer: [timing] * len(wanted))
    small = quantize(program, plan, sizes=[{"batch": 2, "seq": 5}])
    pairs = {site.site: site for site in small.history[-1].sites if "dot_general" in site.site}
    assert [(site.action, site.metrics["single_rows_padded"]) for site in pairs.values()] == [("int8 x int8", True)] * 2
    rows = [left.shape[1] for left in left_operands(small, {"batch": 3, "seq": 5}) if left.ndim == 3]
    assert rows == [2, 2]
    close(run(small, X), np.asarray(run(quantize(program, plan), X)))


@pytest.mark.parametrize("integer_us", [5.0, 30.0])
def test_what_loses_stays_float_and_is_said(monkeypatch, integer_us):

    def compare(site, rule, at, _timer):
        assert (rule.weights, rule.activations, rule.dynamic) == ("int8", "int8", True)
        us = integer_us if site.name == "dot_general#0" else 5.0
        return lx.passes.quantization.measurement.Timing(dict(at), 10.0, us, None)

    def time_programs(functions, inputs, timer=None):
        return [100.0 - 10 * products_in_codes(fn, weights, *inputs) for fn, weights in functions]

    monkeypatch.setattr(LOWER, "compare", lambda wanted, timer: [compare(*each, timer) for each in wanted])
    monkeypatch.setattr(LOWER, "time_programs", time_programs)
    small = quantize(ONE, resolve(recipe(), ONE), sizes=[{"batch": 1, "seq": 5}, {"batch": 4, "seq": 5}])
    assert products_in_codes(small.fn, small.weights, X) == (6 if integer_us == 5 else 5)
    reports = {site.site: site for site in small.history[-1].sites}
    assert reports["dot_general#1"].action == "int8 x int8"
    assert len(reports["dot_general#0"].metrics["timings"]) == 2
    kept = ("kept float", "integer arithmetic takes 3.00 of float's time here, so it stays float")
    assert (reports["dot_general#0"].action, reports["dot_general#0"].reason) == (
        kept if integer_us == 30 else ("int8 x int8", "")
    )
    monkeypatch.setattr(LOWER, "time_programs", lambda functions, _inputs, timer=None: [100.0] * len(functions))
    small = quantize(ONE, resolve(recipe(PAIR), ONE), sizes=[{"batch": 1, "seq": 5}])
    assert products_in_codes(small.fn, small.weights, X) == 0
    assert small.history[-1].sites[1].action == "kept float"
    assert "does not make the whole program faster" in small.history[-1].sites[1].reason


def test_fp8_products_of_two_activations(monkeypatch):
    fp8 = recipe(PAIR, 'weights = "fp8_e4m3"\nactivations = "fp8_e4m3"')
    plan = resolve(fp8, ONE)
    small = quantize(ONE, plan)
    assert [(site.action, site.reason) for site in small.history[-1].sites] == [
        ("kept float", "the platform 'cpu' has no fp8 product, so it stays float")
    ] * 2
    np.testing.assert_array_equal(run(small, X), run(ONE, X))
    monkeypatch.setattr(lx.passes.quantization.products, "SAFE_FP8_VALUES", 0)
    timer = Timer(Target("gpu"))
    small = quantize(ONE, plan, timer=timer)
    dtypes = [left.dtype.name for left in left_operands(small, {"batch": 4, "seq": 5})]
    assert dtypes.count("float8_e4m3fn") == 2
    exact = np.asarray(run(ONE, X))
    assert 1e-3 < np.abs(np.asarray(run(small, X)) - exact).max() / np.abs(exact).max() < 0.1
    both = quantize(ONE, resolve(recipe(PAIR, 'weights = "fp8_e4m3"\nactivations = "fp8_e5m2"'), ONE), timer=timer)
    assert "no platform multiplies fp8_e5m2 by itself, so it stays float" in both.history[-1].sites[0].reason


def test_another_product_of_that_name_at_another_size_is_left():
    def fn(w, x):
        if x.shape[0] == 1:
            ids = x.astype(jnp.int8)
            return (ids[0] @ ids[0].T).astype(jnp.float32).sum() + x @ w["w"]
        return (x @ x.transpose(0, 2, 1)).sum() + x @ w["w"]

    program = lx.trace(fn, {"w": array(WIDTH, WIDTH)}, INPUTS)
    small = quantize(program, resolve(recipe(PAIR), program))
    assert products_in_codes(small.fn, small.weights, X) == 1
    assert products_in_codes(small.fn, small.weights, X[:1]) == 0
    np.testing.assert_array_equal(run(small, X[:1]), run(program, X[:1]))


# Training.


@pytest.mark.parametrize("name", ["one", "stacked"])
def test_training_computes_what_is_served(name):
    program = {"one": ONE, "stacked": STACKED}[name]
    trained = np.asarray(jax.jit(fake_quant(program.fn, resolve(recipe(), program)))(program.weights, X))
    close(trained, served(name)[1])
    with_weights_only = lx.Recipe.parse(f'on_unsupported = "keep"\n[[quantize]]\nsites = "{BOTH}"', name="weights")
    weights_only = jax.jit(fake_quant(program.fn, resolve(with_weights_only, program)))(program.weights, X)
    assert np.abs(weights_only - trained).max() > 1e-3 * np.abs(trained).max()


def test_the_gradient_is_that_of_the_rounded_operands_passed_straight_through():
    program = lx.trace(
        lambda w, x: w["c"] * (x @ x.transpose(0, 2, 1)), {"c": array(4, 5, 5)}, {"x": lx.TensorSpec(SHAPE, "float32")}
    )
    fn = fake_quant(program.fn, resolve(recipe(), program))
    got = jax.jit(jax.grad(lambda x: jnp.sum(fn(program.weights, x))))(X)
    c, x = (np.asarray(value, np.float64) for value in (program.weights["c"], X))
    expected = (c + c.transpose(0, 2, 1)) @ rounded(x, -1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    later = jax.jit(fake_quant(program.fn, resolve(recipe(), program), start=3))
    np.testing.assert_array_equal(later(program.weights, X, step=2), run(program, X))
    np.testing.assert_allclose(later(program.weights, X, step=3), jax.jit(fn)(program.weights, X), rtol=0, atol=1e-5)


# Plans.


def test_a_plan_says_what_becomes_of_products_of_two_activations():
    options = 'weights = "int4"\nactivations = "int8"\ngranularity = "group:4"\ndynamic = false\ncalibration = "mse"'
    plan = resolve(recipe(options=options), STACKED)
    name = next(entry.site.name for entry in plan.sites if entry.site.path is None)
    assert plan[name].describe() == "int8 x int8 activations dynamic"
    entry = next(entry for entry in plan.to_json() if entry["site"] == name)
    assert entry | {"site": ""} == {
        "site": "", "kind": "dot_general", "shape": None, "weight_bytes": 0, "repeats": LAYERS,
        "decision": "int8 x int8 activations dynamic", "kept": "", "weight": None, "computed_from": [],
    }  # fmt: skip
    assert f"{name}  dot_general  int8 x int8 activations dynamic" in str(plan)
    assert plan["query"].describe() == "int4 weights in groups of 4, int8 activations mse"
    left = lx.Recipe.parse(f'[[quantize]]\nsites = "{BOTH}"', name="left")
    with pytest.raises(lx.UnsupportedError, match=r"two activations, which products = 'weights' leaves float"):
        resolve(left, STACKED)


def test_a_static_recipe_takes_these_scales_at_run_time_and_calibrates_the_others():
    plan = resolve(recipe(options="dynamic = false"), STACKED)
    ranges = calibrate(STACKED, plan, [{"x": X}])
    assert set(ranges) == {"query", "key", "value", "out"}
    small = quantize(STACKED, plan, ranges)
    assert products_in_codes(small.fn, small.weights, X) == 6
    only = resolve(recipe(PAIR, "dynamic = false"), STACKED)
    assert calibrate(STACKED, only, [{"x": X}]) == {}
    # No site of the plan has a static range, so no data is asked for.
    alone = lx.optimize(STACKED, recipe(PAIR, "dynamic = false", "measure = false"))
    assert products_in_codes(alone.fn, alone.weights, X) == 2


DATA = [{"x": X}, {"x": 2 * X}]


def correct(program, plan):
    return correct_bias(program, round_to_nearest(program, plan)[0], plan, DATA)


OTHERS = {
    "smooth": lambda program, plan: smooth(program, plan, DATA),
    "awq": lambda program, plan: awq(program, plan, DATA, points=3),
    "equalize": equalize,
    "gptq": lambda program, plan: gptq(program, plan, DATA)[0],
    "round to nearest": lambda program, plan: round_to_nearest(program, plan)[0],
    "correct biases": correct,
    "prune": prune,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_prepares_weights_leaves_these_products_alone(name):
    head = 'on_unsupported = "keep"\n[[prune]]\nsites = ".*"\nsparsity = 0.5'
    with_pairs = resolve(recipe(head=head), QUERY)
    without = resolve(lx.Recipe.parse(f'{head}\n[[quantize]]\nsites = ".*"', name="without"), QUERY)
    changed, expected = (OTHERS[name](QUERY, plan) for plan in (with_pairs, without))
    assert jax.tree.structure(changed.weights) == jax.tree.structure(expected.weights)
    for got, want in zip(jax.tree.leaves(changed.weights), jax.tree.leaves(expected.weights), strict=True):
        np.testing.assert_array_equal(got, want)
    # And with nothing but these products in the plan, they have nothing to do.
    only = resolve(recipe(PAIR), QUERY)
    for leaf, want in zip(jax.tree.leaves(OTHERS[name](QUERY, only).weights), QUERY.weights.values(), strict=True):
        np.testing.assert_array_equal(leaf, want)


def test_all_of_it_at_once():
    head = 'rescale = "smooth:0.5"\nrounding = "gptq"\ncorrect_bias = true\nequalize = true\nmeasure = false'
    whole = recipe(options="dynamic = false", head=head)
    small = lx.optimize(QUERY, whole, calibration=DATA)
    assert products_in_codes(small.fn, small.weights, X) == 3
    exact = np.asarray(run(QUERY, X))
    assert np.abs(np.asarray(run(small, X)) - exact).max() < 0.1 * np.abs(exact).max()
