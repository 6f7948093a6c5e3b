"""Quantized programs: equal to the fake-quantized model, computed in integers, and reverted where that is slower."""

import dataclasses
import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import pairs
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lepton_xla import _compat, passes
from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.compiler import compile as compile_program
from lepton_xla.errors import CalibrationError, UnsupportedError
from lepton_xla.passes import calibrate, fake_quant, find_sites
from lepton_xla.passes import quantize as run_lower
from lepton_xla.passes.alternatives.autotuning import Choices
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization import measurement
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import QTensor
from lepton_xla.recipe import Recipe

lower_module = __import__("sys").modules["lepton_xla.passes.quantization.integer_arithmetic"]
ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def recipe(options="", sites=".*", head='on_unsupported = "keep"'):
    return Recipe.parse(f'{head}\n[[quantize]]\nsites = "{sites}"\n{options}', name="test")


def lowered_and_reference(program, chosen, batch):
    plan = resolve(chosen, program)
    static = any(p.quantize is not None and not p.quantize.dynamic for p in plan.sites)
    ranges = calibrate(program, plan, [batch]) if static else None
    return run_lower(program, plan, ranges), fake_quant(program.fn, plan, ranges), plan


def equations(program, sizes):
    """Every equation of the program's jaxpr, at any depth."""
    found = []

    def visit(jaxpr):
        for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
            found.append(eqn)
            for inner in _compat.inner_jaxprs(eqn):
                visit(inner)

    visit(program.jaxpr(sizes))
    return found


def products_of(program, sizes=None):
    """The dtypes of every product: operands and result."""
    return [
        tuple(var.aval.dtype.name for var in (*eqn.invars[:2], eqn.outvars[0]))
        for eqn in equations(program, sizes or {"batch": 4})
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    ]


INTEGER = ("int8", "int8", "int32")
FLOAT = ("float32", "float32", "float32")


# One site, every framework.


def linen_dense():
    module = nn.Dense(5)
    return from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 6))), ROWS)


def linen_conv():
    module = nn.Conv(5, (3, 3), strides=2)
    image = {"x": TensorSpec(("batch", 7, 7, 4), "float32")}
    return from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 7, 7, 4))), image)


def nnx_linear():
    return from_nnx(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), ROWS)


def equinox_linear():
    arrays, static = eqx.partition(eqx.nn.Linear(6, 5, key=jax.random.key(0)), eqx.is_array)
    return trace(lambda w, x: jax.vmap(eqx.combine(w, static))(x), arrays, ROWS)


def haiku_linear():
    module = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(5, with_bias=False)(x)))
    return trace(module.apply, module.init(jax.random.key(0), jnp.zeros((1, 6))), ROWS)


def plain(fn, **weights):
    return lambda: trace(fn, weights, ROWS)


SCAN = plain(
    lambda w, x: lax.scan(lambda c, s: (c, s[0] @ s[1]), 0, (jnp.stack([x, 9 * x, x * x]), w["w"]))[1].sum(0),
    w=array(3, 6, 5),
)
SINGLE = {
    "linen dense": linen_dense,
    "linen conv": linen_conv,
    "nnx": nnx_linear,
    "equinox": equinox_linear,
    "haiku": haiku_linear,
    "plain": plain(lambda w, x: x @ w["w"], w=array(6, 5)),
    "transposed": plain(lambda w, x: x @ w["w"].T, w=array(5, 6)),
    "heads": plain(lambda w, x: jnp.einsum("bd,dhk->bhk", x, w["w"]), w=array(6, 2, 3)),
    "weight on the left": plain(lambda w, x: jnp.einsum("oi,bi->bo", w["w"], x), w=array(5, 6)),
    "stacked": SCAN,
    "cond": plain(lambda w, x: lax.cond(x[0, 0] > 9, lambda x: x[:, :5], lambda x: x @ w["w"], x), w=array(6, 5)),
    "while": plain(
        lambda w, x: lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, s[1] @ w["w"]), (0, x))[1], w=array(6, 6)
    ),
    "remat": plain(lambda w, x: jax.checkpoint(lambda x: x @ w["w"])(x), w=array(6, 5)),
    "jit": plain(lambda w, x: jax.jit(lambda x, w: x @ w)(x, w["w"]), w=array(6, 5)),
    "custom derivative": plain(lambda w, x: jax.nn.relu(x @ w["w"]), w=array(6, 5)),
}  # fmt: skip


OPTIONS = {"dynamic": "", "static": 'granularity = "tensor"\ndynamic = false', "none": 'activations = "none"'}


@pytest.mark.parametrize(("name", "options"), pairs(SINGLE, OPTIONS, whole=("plain", "linen conv", "stacked")))
def test_one_site_is_fake_quantization_to_rounding(name, options):
    program, options = SINGLE[name](), OPTIONS[options]
    shape = [4 if isinstance(dim, str) else dim for dim in program.inputs["x"].shape]
    x = array(*shape, seed=3)
    lowered, reference, plan = lowered_and_reference(program, recipe(options), {"x": x})
    assert [entry.quantize is not None for entry in plan.sites] == [True]
    expected = np.asarray(jax.jit(reference)(program.weights, x), np.float64)
    got = np.asarray(jax.jit(lowered.fn)(lowered.weights, x), np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    exact = np.asarray(program(program.weights, x), np.float64)
    error = np.abs(got - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.04

    # Really stored, and really computed, in integers.
    (path,) = {site.site.path for site in plan.sites}
    assert lowered.weights[path].values.dtype == jnp.int8
    assert lowered.weights[path].values.size == program.weights[path].size
    assert lowered.weights[path].transposed is ("none" not in options and name != "linen conv")
    assert products_of(lowered) == [FLOAT if "none" in options else INTEGER]
    float_leaves = [leaf for leaf in jax.tree.leaves(lowered.weights) if leaf.dtype == jnp.float32]
    assert all(leaf.size < program.weights[path].size for leaf in float_leaves)
    (site,) = lowered.history[-1].sites
    assert site.site == plan.sites[0].site.name
    assert site.bytes_before == 4 * program.weights[path].size
    assert site.bytes_after < 0.5 * site.bytes_before
    assert lowered.history[-1].metrics["weights_bytes_after"] == lowered.weights_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_keep_their_dtype(dtype):
    spec = {"x": TensorSpec(("batch", 6), dtype)}
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5).astype(dtype)}, spec)
    lowered, reference, _ = lowered_and_reference(program, recipe(), {})
    x = array(4, 6, seed=3).astype(dtype)
    got, expected = lowered(lowered.weights, x), reference(program.weights, x)
    assert got.dtype == expected.dtype == jnp.dtype(dtype)
    # The fake one rounds its operands to the dtype before the product.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(expected, np.float64), atol=8 * float(jnp.finfo(dtype).eps)
    )
    assert lowered.outputs == program.outputs


# Whole networks.


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(20, 16)
        x = table(ids)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(7)(x.mean(1))


def transformer():
    module = Transformer()
    ids = jnp.zeros((1, 5), jnp.int32)
    specs = {"ids": TensorSpec(("batch", "seq"), "int32")}
    return from_linen(module, module.init(jax.random.key(0), ids), specs)


def test_a_transformer_stays_close_and_its_report_is_its_plan():
    program = transformer()
    plan = resolve(recipe(), program)
    lowered = run_lower(program, plan)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20, (6, 9)))
    expected = jax.jit(program.fn)(program.weights, ids)
    assert np.abs(jax.jit(lowered.fn)(lowered.weights, ids) - expected).max() < 0.05 * np.abs(expected).max()

    planned = {entry.site.name for entry in plan.sites if entry.quantize}
    kept = {entry.site.name: entry.not_quantized for entry in plan.sites if entry.not_quantized}
    assert len(planned) == 2 * 6 + 1 + 1
    assert len(kept) == 2 * 2
    reports = {site.site: site for site in lowered.history[-1].sites}
    table = {name for name, site in reports.items() if site.action == "int8 weights"}
    assert [plan[name].site.kind for name in table] == ["gather"]
    assert {name for name, site in reports.items() if site.action == "int8 x int8"} == planned - table
    assert {name: site.reason for name, site in reports.items() if site.action == "kept float"} == kept
    assert {name for name, leaf in lowered.weights.items() if isinstance(leaf, QTensor)} == {
        plan[name].site.path for name in planned
    }
    sizes = {"batch": 6, "seq": 9}
    assert products_of(lowered, sizes).count(INTEGER) == len(planned) - 1


def test_a_row_does_not_depend_on_its_neighbours():
    program = transformer()
    lowered = run_lower(program, resolve(recipe(), program))
    run = jax.jit(lowered.fn)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20, (5, 8)))
    alone = jnp.concatenate([run(lowered.weights, ids[row : row + 1]) for row in range(5)])
    for rows in range(1, 6):
        np.testing.assert_allclose(run(lowered.weights, ids[:rows]), alone[:rows], rtol=0, atol=1e-5)


def test_a_row_of_huge_values_does_not_coarsen_the_others():
    program = SINGLE["linen conv"]()
    lowered = run_lower(program, resolve(recipe(), program))
    x = array(3, 7, 7, 4, seed=3)
    beside_huge = lowered(lowered.weights, x.at[1].multiply(1e6))
    np.testing.assert_array_equal(beside_huge[::2], lowered(lowered.weights, x)[::2])


def stacked(w, x):
    return lax.scan(lambda x, w: (2.0 * jnp.sin(x @ w), None), x, w["stack"])[0]


def test_static_ranges_in_a_scan_are_per_step():
    scale = jnp.asarray([1.0, 0.02, 30.0]).reshape(3, 1, 1)
    program = trace(stacked, {"stack": array(3, 6, 6) * scale}, ROWS)
    x = array(4, 6, seed=3) * 50
    lowered, reference, _ = lowered_and_reference(program, recipe("dynamic = false"), {"x": x})
    ranges = lowered.weights["stack:act_absmax"]
    assert ranges.shape == (3,)
    assert lowered.weights["stack"].values.shape == (3, 6, 6)
    assert lowered.weights["stack"].scale.shape == (3, 1, 6)
    np.testing.assert_allclose(ranges[0], np.abs(x).max())
    assert ranges[1] <= 2
    difference = np.abs(lowered(lowered.weights, x) - reference(program.weights, x))
    assert np.median(difference) < 1e-4
    # New ranges take effect without a new trace.
    other = lowered.weights | {"stack:act_absmax": ranges * 100}
    assert np.abs(lowered(other, x) - lowered(lowered.weights, x)).max() > 0.01


def test_under_static_scales_not_a_number_is_zero_and_infinity_saturates():
    """In codes as in training. Under scales found at run time both show in their row."""
    program = SINGLE["plain"]()
    plan = resolve(recipe("dynamic = false"), program)
    x = array(4, 6, seed=3)
    ranges = calibrate(program, plan, [{"x": x}])
    largest = ranges["w"]
    broken = x.at[1, 2].set(jnp.nan).at[2, 4].set(jnp.inf).at[3, 0].set(-jnp.inf)
    meant = x.at[1, 2].set(0).at[2, 4].set(largest).at[3, 0].set(-largest)
    static, dynamic = run_lower(program, plan, ranges), run_lower(program, resolve(recipe(), program))
    for run in (static, program.replace(fn=fake_quant(program.fn, plan, ranges))):
        got, expected = (jax.jit(run.fn)(run.weights, rows) for rows in (broken, meant))
        np.testing.assert_array_equal(got, expected)
    shown = np.isnan(jax.jit(dynamic.fn)(dynamic.weights, broken)).all(1)
    np.testing.assert_array_equal(shown, [False, True, True, True])


def test_static_without_ranges_is_an_error():
    program = SINGLE["plain"]()
    with pytest.raises(CalibrationError, match="site 'w' has static activation scales"):
        run_lower(program, resolve(recipe("dynamic = false"), program))


# What is kept.


def tied(w, x):
    return jnp.take(w["table"], jnp.argmax(x, 1), axis=0) @ w["dense"] @ w["table"].T


def test_a_tied_embedding_is_stored_once():
    program = trace(tied, {"table": array(10, 6), "dense": array(6, 6, seed=1)}, ROWS)
    lowered = run_lower(program, resolve(recipe(), program))
    assert lowered.weights["table"].shape == (6, 10)
    assert lowered.weights["table"].values.shape == (10, 6)
    assert lowered.weights["table"].values.dtype == jnp.int8
    reports = {site.site: (site.action, site.reason) for site in lowered.history[-1].sites}
    assert reports == {"table": ("int8 weights", ""), "dense": ("int8 x int8", ""), "table#1": ("int8 x int8", "")}
    x = array(4, 6, seed=3)
    expected = program(program.weights, x)
    assert np.abs(lowered(lowered.weights, x) - expected).max() < 0.05 * np.abs(expected).max()


def test_a_table_used_in_two_layouts_is_kept_and_said_or_refused():
    def fn(w, x):
        return jnp.take(w["table"], jnp.argmax(x, 1), axis=0) @ w["table"]

    program = trace(fn, {"table": array(6, 6)}, ROWS)
    lowered = run_lower(program, resolve(recipe(), program))
    assert lowered.weights["table"].dtype == jnp.float32
    reports = {site.site: (site.action, site.reason) for site in lowered.history[-1].sites}
    assert reports["table#1"] == ("kept float", "its weight is used in two layouts, at 'table' and 'table#1'")
    with pytest.raises(UnsupportedError, match="site 'table'"):
        resolve(recipe(head=""), program)


def test_a_weight_used_twice_alike_is_stored_once():
    program = trace(lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"], {"w": array(6, 6)}, ROWS)
    x = array(4, 6, seed=3)
    lowered, reference, _ = lowered_and_reference(program, recipe("dynamic = false"), {"x": x})
    assert products_of(lowered) == [INTEGER, INTEGER]
    assert set(lowered.weights) == {"w", "w:act_absmax", "w#1:act_absmax"}
    np.testing.assert_allclose(
        lowered(lowered.weights, x), reference(program.weights, x), atol=2 / 127 * np.abs(array(6, 6)).max()
    )


@pytest.mark.parametrize("inside_scan", [False, True])
def test_a_site_in_shard_map_is_kept(inside_scan):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def fn(w, x):
        def local(x, w):
            if inside_scan:
                return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]
            return x @ w

        sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
        return sharded(x, w["in"]) @ w["out"]

    program = trace(fn, {"in": array(6, 6), "out": array(6, 4)}, ROWS)
    lowered = run_lower(program, resolve(recipe(), program))
    reports = {site.site: (site.action, site.reason) for site in lowered.history[-1].sites}
    assert reports["in"] == ("kept float", "it is inside shard_map, where the weight is one shard")
    assert reports["out"][0] == "int8 x int8"
    x = array(4, 6, seed=3)
    expected = program(program.weights, x)
    assert np.abs(lowered(lowered.weights, x) - expected).max() < 0.05 * np.abs(expected).max()


def test_lowering_twice_is_harmless():
    program = SINGLE["plain"]()
    once = run_lower(program, resolve(recipe(), program))
    twice = run_lower(once, resolve(recipe(), once))
    x = array(4, 6, seed=3)
    np.testing.assert_array_equal(twice(twice.weights, x), once(once.weights, x))
    assert [report.name for report in twice.history] == ["quantize", "quantize"]
    assert [site.action for site in twice.history[1].sites] == ["kept float"]
    assert products_of(twice) == [INTEGER]


def test_the_program_given_is_not_changed():
    program = SINGLE["plain"]()
    before = np.asarray(program.weights["w"])
    run_lower(program, resolve(recipe(), program))
    np.testing.assert_array_equal(program.weights["w"], before)
    assert program.history == ()


# Exported.


def test_symbolic_sizes_through_export():
    program = transformer()
    lowered = run_lower(program, resolve(recipe(), program))
    batch, seq = jax.export.symbolic_shape("batch, seq")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lowered.weights)
    leaves, treedef = jax.tree.flatten(shapes)
    flat = jax.jit(lambda leaves, ids: lowered.fn(jax.tree.unflatten(treedef, leaves), ids))
    exported = jax.export.export(flat)(leaves, jax.ShapeDtypeStruct((batch, seq), jnp.int32))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20, (3, 7)))
    got = exported.call(jax.tree.leaves(lowered.weights), ids)
    np.testing.assert_allclose(got, jax.jit(lowered.fn)(lowered.weights, ids), rtol=0, atol=1e-5)


# The measured revert.


def fake_clock(monkeypatch, site_us, program_us=None):
    """`site_us[site name] = (float, integer, padded)`; `program_us(products) -> us` of a whole program."""

    def compare(site, decision, sizes, _timer):
        del decision
        return measurement.Timing(dict(sizes), *site_us[site.name])

    def time_programs(functions, inputs, timer=None):
        times = []
        for fn, weights in functions:
            text = str(jax.make_jaxpr(fn)(weights, *inputs))
            times.append(
                (program_us or (lambda count: 100.0 - 10.0 * count))(text.count("preferred_element_type=int32"))
            )
        return times

    monkeypatch.setattr(lower_module, "compare", lambda wanted, timer: [compare(*each, timer) for each in wanted])
    monkeypatch.setattr(lower_module, "time_programs", time_programs)
    monkeypatch.setattr(lower_module, "choose", lambda *_: Choices())
    monkeypatch.setattr(lower_module, "times_us", lambda _eqn, _timer, **_: [])


def two_layers():
    return trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": array(6, 8), "b": array(8, 3, seed=1)}, ROWS)


SIZES = [{"batch": 1}, {"batch": 4}]


def test_what_is_faster_is_kept(monkeypatch):
    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 5.0, None)})
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert products_of(lowered) == [INTEGER, INTEGER]
    assert [site.metrics["integer_over_float"] for site in lowered.history[-1].sites] == [0.5, 0.5]
    assert len(lowered.history[-1].sites[0].metrics["timings"]) == 2
    assert [entry["lowered_us"] for entry in lowered.history[-1].metrics["whole_program"]] == [80.0, 80.0]


def test_what_is_slower_is_taken_back_and_stays_small(monkeypatch):
    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 30.0, None)})
    program = two_layers()
    plan = resolve(recipe("dynamic = false"), program)
    ranges = calibrate(program, plan, [{"x": array(4, 6)}])
    lowered = run_lower(program, plan, ranges, sizes=SIZES)
    assert products_of(lowered) == [INTEGER, FLOAT]
    assert all(isinstance(lowered.weights[name], QTensor) for name in ("a", "b"))
    assert set(lowered.weights) == {"a", "b", "a:act_absmax"}
    # Codes that are multiplied lie column by column; those that become floats first lie as float weights do.
    assert [lowered.weights[name].values.shape for name in ("a", "b")] == [(8, 6), (8, 3)]
    reports = {site.site: site for site in lowered.history[-1].sites}
    assert (reports["a"].action, reports["a"].reason) == ("int8 x int8", "")
    assert reports["b"].action == "int8 weights"
    assert "3.00 of float's time" in reports["b"].reason
    assert reports["b"].bytes_after < 0.5 * reports["b"].bytes_before


@pytest.mark.parametrize(("error", "words"), [(1.0, "wrong by 100% of the largest value"), (np.nan, "not finite")])
def test_what_is_wrong_on_this_platform_is_taken_back_however_fast(monkeypatch, caplog, error, words):
    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 5.0, None)})
    clock = lower_module.compare

    def faulty(wanted, timer):
        timings = zip(clock(wanted, timer), wanted, strict=True)
        return [dataclasses.replace(each, error=error if site.name == "a" else 0.0) for each, (site, *_) in timings]

    monkeypatch.setattr(lower_module, "compare", faulty)
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert products_of(lowered) == [FLOAT, INTEGER]
    report = next(site for site in lowered.history[-1].sites if site.site == "a")
    assert report.action == "int8 weights"
    assert words in report.reason
    assert "batch 1" in report.reason
    assert report.reason in caplog.text


def test_sites_that_win_alone_and_lose_together_are_taken_back(monkeypatch):
    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 5.0, None)}, lambda count: 100.0 + count)
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert products_of(lowered) == [FLOAT, FLOAT]
    assert all("does not make the whole program faster" in site.reason for site in lowered.history[-1].sites)
    assert lowered.history[-1].metrics["whole_program"][0]["lowered_us"] == 100.0


def test_a_win_within_the_noise_is_no_win(monkeypatch):
    fake_clock(monkeypatch, {"a": (10.0, 9.0, None), "b": (10.0, 9.0, None)}, lambda count: 100.0 - count)
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert products_of(lowered) == [FLOAT, FLOAT]


def test_the_set_that_is_fastest_is_chosen(monkeypatch):
    fake_clock(
        monkeypatch, {"a": (10.0, 2.0, None), "b": (10.0, 8.0, None)}, lambda count: {0: 100.0, 1: 50.0, 2: 80.0}[count]
    )
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert products_of(lowered) == [INTEGER, FLOAT]


@pytest.mark.parametrize("padded_us", [3.0, 9.0])
def test_single_rows_are_padded_where_that_is_faster(monkeypatch, padded_us):
    fake_clock(
        monkeypatch, {"a": (10.0, 5.0, padded_us), "b": (10.0, 5.0, padded_us)}, lambda count: 100 - 30.0 * count
    )
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    rows = {
        eqn.invars[0].aval.shape[0] for eqn in equations(lowered, {"batch": 1}) if eqn.primitive.name == "dot_general"
    }
    assert rows == ({2} if padded_us < 5 else {1})
    rows = {
        eqn.invars[0].aval.shape[0] for eqn in equations(lowered, {"batch": 4}) if eqn.primitive.name == "dot_general"
    }
    assert rows == {4}
    assert [site.metrics["single_rows_padded"] for site in lowered.history[-1].sites] == [padded_us < 5] * 2
    x = array(1, 6, seed=3)
    unpadded = run_lower(program, resolve(recipe(), program))
    np.testing.assert_allclose(lowered(lowered.weights, x), unpadded(unpadded.weights, x), rtol=1e-6)


def grouped(w, x):
    image = x.reshape(x.shape[0], 1, 1, 6)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(image, w["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3)
    return out.reshape(x.shape[0], -1)


def by_groups(w, x):
    return jnp.einsum("bgi,gio->bgo", x.reshape(x.shape[0], 3, 2), w["w"])


TINY_GROUPS = {
    "grouped": lambda: trace(grouped, {"w": array(1, 1, 2, 6)}, ROWS),
    "a matrix a group": lambda: trace(by_groups, {"w": array(3, 2, 2)}, ROWS),
}


@pytest.mark.parametrize("name", TINY_GROUPS)
def test_groups_too_small_for_integer_kernels_are_timed_like_any_other(monkeypatch, name):
    program = TINY_GROUPS[name]()
    plan = resolve(recipe(head=""), program)
    fake_clock(monkeypatch, {"w": (10.0, 30.0, None)})
    slow = run_lower(program, plan, sizes=SIZES)
    assert products_of(slow) == [FLOAT]
    assert isinstance(slow.weights["w"], QTensor)
    (site,) = slow.history[-1].sites
    assert (site.action, len(site.metrics["timings"])) == ("int8 weights", 2)
    assert site.metrics["integer_over_float"] == pytest.approx(3)
    assert site.reason.startswith("integer arithmetic takes 3.00 of float's time here, so only the weight")
    fake_clock(monkeypatch, {"w": (10.0, 5.0, None)})
    fast = run_lower(program, plan, sizes=SIZES)
    assert products_of(fast) == [INTEGER]
    assert [(site.action, site.reason) for site in fast.history[-1].sites] == [("int8 x int8", "")]


@pytest.mark.parametrize("name", [*TINY_GROUPS, "plain"])
def test_the_real_clock_reports_what_it_found(monkeypatch, name):
    monkeypatch.setattr("lepton_xla.passes.core.timing.ROUNDS", 3)
    program = (TINY_GROUPS | SINGLE)[name]()
    (site,) = run_lower(program, resolve(recipe(head=""), program), sizes=SIZES[:1]).history[-1].sites
    (timing,) = site.metrics["timings"]
    assert min(timing["float_us"], timing["integer_us"], site.metrics["integer_over_float"]) > 0
    assert (site.action, bool(site.reason)) in [("int8 x int8", False), ("int8 weights", True)]
    # Where a product has one row, padding it to two is tried too.
    assert (timing["padded_us"] is not None) == (name != "grouped")
    assert ("single_rows_padded" in site.metrics) == (site.action == "int8 x int8" and name != "grouped")


def test_a_site_that_is_not_there_at_a_size_is_not_timed_there(monkeypatch):
    def fn(w, x):
        return x @ w["a"] if x.shape[0] == 1 else jnp.tanh(x @ w["b"])

    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 5.0, None)}, lambda count: 100 - 30.0 * count)
    program = trace(fn, {"a": array(6, 3), "b": array(6, 3, seed=1)}, ROWS)
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    (site,) = lowered.history[-1].sites
    assert site.site == "b"
    assert len(site.metrics["timings"]) == 1


def test_weight_only_is_not_timed(monkeypatch):
    fake_clock(monkeypatch, {})
    program = two_layers()
    lowered = run_lower(program, resolve(recipe('activations = "none"'), program), sizes=SIZES)
    assert products_of(lowered) == [FLOAT, FLOAT]
    assert [(site.action, site.reason) for site in lowered.history[-1].sites] == [("int8 weights", "")] * 2


def test_progress_names_each_site(monkeypatch):
    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 5.0, None)})
    lines = []
    program = two_layers()
    run_lower(program, resolve(recipe(), program), sizes=SIZES, progress=lines.append)
    assert lines[:2] == ["a", "b"]


def test_sites_keep_their_shapes_at_any_size():
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program))
    assert [site.kind for site in find_sites(lowered)] == ["dot_general", "dot_general"]
    assert lowered.outputs == program.outputs


def clock_by_weights(monkeypatch, site_us, small_us, float_us):
    """A whole program takes `small_us` where any weight is still to be unpacked, else `float_us`."""
    fake_clock(monkeypatch, site_us)

    def time_programs(functions, inputs, timer=None):
        del inputs
        is_small = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
        return [
            small_us if any(map(is_small, jax.tree.leaves(weights, is_leaf=is_small))) else float_us
            for _, weights in functions
        ]

    monkeypatch.setattr(lower_module, "time_programs", time_programs)


def operations(fn, *args):
    """What XLA is given to compile, but for the name of the function."""
    return re.sub(r"^module @\S+", "module", jax.jit(fn).lower(*args).as_text())


@pytest.mark.parametrize("small_us", [90.0, 102.0, 140.0])
def test_weights_multiplied_in_float_are_unpacked_on_loading_where_that_is_faster(monkeypatch, small_us):
    clock_by_weights(monkeypatch, {}, small_us, 100.0)
    program = two_layers()
    lowered = run_lower(program, resolve(recipe('activations = "none"'), program), sizes=SIZES)
    assert all(isinstance(lowered.weights[name], QTensor) for name in ("a", "b"))
    assert (lowered.expansion is not None) == (small_us > 103)
    assert [bool(site.notes) for site in lowered.history[-1].sites] == [small_us > 103] * 2
    assert [entry["lowered_us"] for entry in lowered.history[-1].metrics["whole_program"]] == (
        [100.0 if small_us > 103 else small_us] * 2
    )
    if lowered.expansion is not None:
        unpacked = lowered.expansion.expand(lowered.weights)
        assert {name: leaf.dtype for name, leaf in unpacked.items()} == {"a": np.float32, "b": np.float32}
        x = array(3, 6, seed=5)
        want = lowered(lowered.weights, x)
        np.testing.assert_array_equal(
            jax.jit(lowered.expansion.fn)(unpacked, x), jax.jit(lowered.fn)(lowered.weights, x)
        )
        # What runs then is the float program, and so no slower.
        assert operations(lowered.expansion.fn, unpacked, x) == operations(program.fn, program.weights, x)
        servable = compile_program(lowered, {"batch": (1, 4)}).servable()
        np.testing.assert_allclose(servable(x=np.asarray(x))["output"], want, rtol=1e-5, atol=1e-6)
        assert servable.weights_bytes == 4 * (6 * 8 + 8 * 3)


def transposed_stack():
    """Weights that are laid out before their products: square, so that doing it twice is no error of shapes."""

    def fn(w, x):
        x, _ = jax.lax.scan(lambda x, step: (jnp.tanh(x @ step.T), None), x, w["stack"])
        return jnp.einsum("bi,ohi->boh", x @ w["square"].T, w["heads"])

    weights = {"stack": array(3, 6, 6), "square": array(6, 6, seed=1), "heads": array(2, 4, 6, seed=2)}
    return trace(fn, weights, ROWS)


@pytest.mark.parametrize("granularity", ["channel", "group:2"])
def test_what_is_unpacked_on_loading_is_laid_out_once(monkeypatch, granularity):
    clock_by_weights(monkeypatch, {}, 300.0, 100.0)
    program = transposed_stack()
    plan = resolve(recipe(f'activations = "none"\ngranularity = "{granularity}"'), program)
    lowered = run_lower(program, plan, sizes=SIZES)
    assert lowered.expansion is not None
    unpacked = lowered.expansion.expand(lowered.weights)
    assert not any(isinstance(leaf, QTensor) for leaf in unpacked.values())
    x = array(3, 6, seed=5)
    want = program(program.weights, x)
    got = jax.jit(lowered.expansion.fn)(unpacked, x)
    np.testing.assert_allclose(got, jax.jit(lowered.fn)(lowered.weights, x), rtol=1e-5, atol=1e-5)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    servable = compile_program(lowered, {"batch": (1, 4)}).servable()
    np.testing.assert_allclose(servable(x=np.asarray(x))["output"], got, rtol=1e-5, atol=1e-5)


def test_weights_stay_small_in_memory_where_the_recipe_says_so(monkeypatch):
    clock_by_weights(monkeypatch, {}, 300.0, 100.0)
    program = two_layers()
    plan = resolve(
        Recipe.parse('unpack = "never"\n[[quantize]]\nsites = ".*"\nactivations = "none"', name="r"), program
    )
    assert run_lower(program, plan, sizes=SIZES).expansion is None


def test_integer_sites_stay_packed_when_the_others_are_unpacked(monkeypatch):
    def site_clock(functions, inputs, timer=None):
        return [
            40.0 if "preferred_element_type=int32" in str(jax.make_jaxpr(fn)(weights, *inputs)) else 100.0
            for fn, weights in functions
        ]

    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 30.0, None)})
    monkeypatch.setattr(lower_module, "time_programs", site_clock)
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert lowered.expansion is None  # no faster, so nothing is gained by the memory
    sizes_of = lambda weights: {name: type(leaf).__name__ for name, leaf in weights.items()}  # noqa: E731
    times = iter([[100.0, 100.0, 40.0], [100.0, 100.0, 40.0], [100.0, 40.0, 60.0], [100.0, 40.0, 60.0]])
    monkeypatch.setattr(lower_module, "time_programs", lambda functions, inputs, timer=None: next(times))
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert lowered.expansion is not None
    assert sizes_of(lowered.expansion.expand(lowered.weights)) == {"a": "QTensor", "b": "ArrayImpl"}


def test_what_is_slower_at_one_size_is_taken_back_however_fast_at_another(monkeypatch):
    def uneven(functions, inputs, timer=None):
        batch = inputs[0].shape[0]
        integer = ["preferred_element_type=int32" in str(jax.make_jaxpr(fn)(w, *inputs)) for fn, w in functions]
        return [(110.0 if batch == 1 else 20.0) if flag else 100.0 for flag in integer]

    fake_clock(monkeypatch, {"a": (10.0, 5.0, None), "b": (10.0, 5.0, None)})
    monkeypatch.setattr(lower_module, "time_programs", uneven)
    program = two_layers()
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES)
    assert products_of(lowered) == [FLOAT, FLOAT]
    lowered = run_lower(program, resolve(recipe(), program), sizes=SIZES[1:])
    assert products_of(lowered) == [INTEGER, INTEGER]


def test_channels_that_are_all_zero_are_named_and_stay_zero():
    weights = {"a": array(6, 8).at[:, 2].set(0), "b": array(8, 3, seed=1)}
    program = trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], weights, ROWS)
    plan = resolve(Recipe.parse("[[quantize]]\nsites = '.*'", name="r"), program)
    small = run_lower(program, plan)
    notes = {site.site: site.notes for site in small.history[-1].sites}
    assert notes == {"a": ("1 of its 8 channels are all zero",), "b": ()}
    scale = np.asarray(small.weights["a"].scale)
    assert np.all(np.isfinite(scale))
    assert np.all(scale > np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(np.asarray(small.weights["a"].dequantize())[:, 2], 0)


def test_the_old_name_warns():
    with pytest.warns(DeprecationWarning, match=r"passes\.lower is now called quantize"):
        assert passes.lower is run_lower
