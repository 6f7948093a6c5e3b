"""Alternatives are chosen by a clock, here a fake one, and the choice holds in all later passes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lepton_xla as lx
from lepton_xla.passes import cast, rewrite
from lepton_xla.passes.alternatives.autotuning import XLA, autotune
from lepton_xla.passes.quantization.measurement import Timing
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import QTensor
from lepton_xla.recipe import Recipe

module = sys.modules["lepton_xla.passes.alternatives.autotuning"]
SIZES = [{"batch": 1}, {"batch": 4}]
IMAGES = {"x": TensorSpec(("batch", 6, 6, 4), "float32")}
SHIFTED = "shifted multiply-adds"


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def convolution(x, w, **changes):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": w.shape[-1], **changes}
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", **options)


def two_layers():
    weights = {"depthwise": array(3, 3, 1, 4), "pointwise": array(1, 1, 4, 4, seed=1)}
    fn = lambda w, x: convolution(convolution(x, w["depthwise"]), w["pointwise"], feature_group_count=1)  # noqa: E731
    return trace(fn, weights, IMAGES)


def primitives(fn, *args):
    names = []

    def note(_context, eqn, values):
        names.append(eqn.primitive.name)
        del values

    jax.eval_shape(rewrite(fn, {"*": note}, on_unknown="keep"), *args)
    return names


def convolutions(program, batch=2):
    return primitives(program.fn, program.weights, *program.abstract_inputs({"batch": batch})).count(
        "conv_general_dilated"
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that tells the time by a function's operations and the batch; it gives how many were timed together."""

    def install(microseconds):
        seen = []

        def time_programs(functions, inputs, timer=None, budget_s=0.0):
            seen.append(len(functions))
            batch = inputs[0].shape[0]
            return [microseconds(primitives(fn, weights, *inputs), batch) for fn, weights in functions]

        monkeypatch.setattr(module, "time_programs", time_programs)
        return seen

    return install


def shifted_is_fast(names, _batch):
    return 100.0 if "conv_general_dilated" in names and "pad" not in names else 10.0


def test_what_is_faster_is_taken_and_reported(clock):
    seen = clock(shifted_is_fast)
    program, lines = two_layers(), []
    tuned = autotune(program, sizes=SIZES, progress=lines.append)
    assert (convolutions(program), convolutions(tuned)) == (2, 1)
    assert seen == [2, 2, 2, 2]  # the operation alone at two sizes, the whole program at two
    assert lines == ["ways to compute depthwise"] * 2 + ["the whole program at batch 1", "the whole program at batch 4"]
    (report,) = tuned.history
    (site,) = report.sites
    assert (report.name, site.site, site.action) == ("autotune", "depthwise", SHIFTED)
    assert site.reason == "0.10 of the time of XLA's own"
    assert site.metrics == {"timings": [{"sizes": at, "float_us": {XLA: 100.0, SHIFTED: 10.0}} for at in SIZES]}
    assert report.metrics["whole_program"][1] == {"sizes": {"batch": 4}, "before_us": 100.0, "autotuned_us": 10.0}
    x = array(3, 6, 6, 4, seed=2)
    np.testing.assert_allclose(tuned.fn(tuned.weights, x), program.fn(program.weights, x), rtol=1e-5, atol=1e-5)


def slow_at_four(names, batch):
    return 200.0 if "pad" in names and batch == 4 else shifted_is_fast(names, batch)


def slow_together(names, batch):
    return 400.0 if {"pad", "conv_general_dilated"} <= set(names) else shifted_is_fast(names, batch)


@pytest.mark.parametrize(
    ("microseconds", "reason"),
    [
        (slow_at_four, f"{SHIFTED} would take 2.00 of the time at batch 4"),
        (slow_together, "alone another way is faster, but not in the whole program"),
        (lambda names, _batch: 98.0 if "pad" in names else 100.0, f"{SHIFTED} would take 0.98 of the time at batch 1"),
    ],
)
def test_what_is_slower_anywhere_or_faster_by_noise_is_not_taken(clock, microseconds, reason):
    clock(microseconds)
    program = two_layers()
    tuned = autotune(program, sizes=SIZES)
    assert tuned.fn is program.fn
    (site,) = tuned.history[0].sites
    assert (site.action, site.reason) == (XLA, reason)


@pytest.mark.parametrize("loser", ["conv_general_dilated", "dot_general"])
def test_what_one_operation_loses_in_the_whole_program_does_not_cost_the_gain_of_another(monkeypatch, loser):
    def model(w, x):
        return convolution(x, w["depthwise"]).reshape(x.shape[0], -1)[:1].astype(jnp.bfloat16) @ w["dense"]

    weights = {"depthwise": array(3, 3, 1, 4), "dense": array(144, 8, seed=1).astype(jnp.bfloat16)}
    program = trace(model, weights, IMAGES)

    def time_programs(functions, inputs, *_):
        if len(inputs) > 1:  # an operation alone
            return [100.0] + [10.0] * (len(functions) - 1)
        return [microseconds(str(jax.make_jaxpr(fn)(weights, *inputs))) for fn, weights in functions]

    def microseconds(text):
        own = {
            "conv_general_dilated": "conv_general_dilated" in text,
            "dot_general": "bf16[2,144]" not in text and "f32[144,8]" not in text,
        }
        return sum(100.0 if kept else (300.0 if name == loser else 10.0) for name, kept in own.items())

    monkeypatch.setattr(module, "time_programs", time_programs)
    tuned = autotune(program, sizes=SIZES)
    (report,) = tuned.history
    lost = {site.site: site.reason for site in report.sites if site.action == XLA}
    names = {"conv_general_dilated": "depthwise", "dot_general": "dense"}
    assert lost == {names[loser]: "alone another way is faster, but not in the whole program"}
    assert len(report.sites) == 2
    x = array(3, 6, 6, 4, seed=2)
    np.testing.assert_allclose(tuned.fn(tuned.weights, x), program.fn(program.weights, x), rtol=0.05, atol=0.1)


def test_a_program_without_such_operations_is_not_touched_or_timed(clock):
    seen = clock(shifted_is_fast)
    program = trace(lambda w, x: x @ w["a"], {"a": array(6, 8)}, {"x": TensorSpec(("batch", 6), "float32")})
    assert autotune(program, sizes=SIZES) is program
    assert autotune(two_layers(), sizes=[]).history == ()
    assert seen == []


def test_what_xla_cannot_run_is_no_candidate():
    # XLA:CPU has this product of one row, and not that of two.
    numbers = (((1,), (0,)), ((0,), (2,)))
    multiply = lambda w, x: lax.dot_general(x, w["a"], numbers, preferred_element_type=jnp.float32)  # noqa: E731
    inputs = {"x": TensorSpec((2, 8, 5), "bfloat16")}
    program = trace(multiply, {"a": jnp.zeros((8, 1, 2), jnp.bfloat16)}, inputs)
    (site,) = autotune(program, sizes=[{}]).history[0].sites
    assert set(site.metrics["timings"][0]["float_us"]) == {XLA, "in float32"}


def test_single_rows_are_padded_where_that_is_faster(clock):
    clock(lambda names, _batch: 10.0 if "pad" in names else 100.0)
    program = trace(lambda w, x: x @ w["a"], {"a": array(6, 8)}, {"x": TensorSpec(("batch", 6), "float32")})
    narrow = autotune(cast(program, "bfloat16"), sizes=SIZES)
    shapes = lambda batch: str(narrow.jaxpr({"batch": batch}))  # noqa: E731
    assert "bf16[2,6]" in shapes(1)
    assert "bf16[2,6]" not in shapes(4)
    assert [(site.site, site.action) for site in narrow.history[-1].sites] == [("a", "row padded to two")]
    own = trace(  # a model that is bfloat16 of its own
        lambda w, x: x @ w["a"], {"a": jnp.ones((6, 8), jnp.bfloat16)}, {"x": TensorSpec(("batch", 6), "bfloat16")}
    )
    tuned = autotune(own, sizes=SIZES)
    assert "pad" in primitives(tuned.fn, tuned.weights, *tuned.abstract_inputs({"batch": 1}))
    for batch in (1, 4):
        x = jnp.ones((batch, 6), jnp.bfloat16)
        np.testing.assert_array_equal(tuned.fn(tuned.weights, x), np.full((batch, 8), 6.0))


def test_a_row_times_a_transposed_table_reads_the_table_as_it_is(clock):
    def logits(w, x):
        return jnp.tanh(x @ w["a"]) @ w["table"].T

    weights = {"a": array(6, 6), "table": array(24, 6, seed=1)}
    program = trace(logits, weights, {"x": TensorSpec(("batch", 6), "float32")})
    seen = clock(lambda names, _batch: 100.0 if "transpose" in names else 50.0)
    tuned = autotune(program, sizes=SIZES)
    assert seen == [2, 2, 2], "only the table's product of one row has another way"
    assert [(site.site, site.action) for site in tuned.history[0].sites] == [("table", "without the transpose")]
    for batch in (1, 4):
        x = array(batch, 6, seed=2)
        assert ("transpose" in primitives(tuned.fn, tuned.weights, x)) == (batch == 4)
        expected = np.tanh(np.float64(x) @ np.float64(weights["a"])) @ np.float64(weights["table"]).T
        np.testing.assert_allclose(tuned.fn(tuned.weights, x), expected, rtol=1e-5, atol=1e-5)


def test_a_table_that_is_contracted_as_it_is_has_no_other_way(clock):
    seen = clock(lambda names, _batch: 50.0)
    fn = lambda w, x: lax.dot_general(x, w["table"], (((1,), (1,)), ((), ())))  # noqa: E731
    program = trace(fn, {"table": array(24, 6)}, {"x": TensorSpec(("batch", 6), "float32")})
    assert autotune(program, sizes=SIZES) is program
    assert seen == []


def stacked(w, x):
    """Two depthwise convolutions, one after the other, in a `scan` inside of a `jit`, with rematerialization."""
    step = jax.checkpoint(lambda x, window: (jnp.tanh(convolution(x, window)), None))
    return jax.jit(lambda w, x: lax.scan(step, x, w)[0])(w["windows"], x)


def test_inside_containers_under_vmap_and_with_derivatives(clock):
    clock(shifted_is_fast)
    program = trace(stacked, {"windows": array(2, 3, 3, 1, 4)}, IMAGES)
    tuned = autotune(program, sizes=SIZES)
    assert [site.site for site in tuned.history[0].sites] == ["windows"]
    assert convolutions(tuned) == 0
    x = array(3, 6, 6, 4, seed=2)
    np.testing.assert_allclose(tuned.fn(tuned.weights, x), program.fn(program.weights, x), rtol=1e-5, atol=1e-5)
    loss = lambda fn: jax.grad(lambda w: jnp.sum(jnp.square(fn(w, x))))(program.weights)["windows"]  # noqa: E731
    np.testing.assert_allclose(loss(tuned.fn), loss(program.fn), rtol=1e-4, atol=1e-4)
    several = jnp.stack([x, -x])
    np.testing.assert_allclose(
        jax.vmap(tuned.fn, in_axes=(None, 0))(tuned.weights, several),
        jax.vmap(program.fn, in_axes=(None, 0))(program.weights, several),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_vmapped_depthwise_convolution_is_one_too(clock):
    clock(shifted_is_fast)
    fn = lambda w, x: jax.vmap(convolution, in_axes=(None, 0))(x, w["windows"])  # noqa: E731
    program = trace(fn, {"windows": array(2, 3, 3, 1, 4)}, IMAGES)
    tuned = autotune(program, sizes=SIZES)
    assert convolutions(tuned) == 0
    x = array(3, 6, 6, 4, seed=2)
    np.testing.assert_allclose(tuned.fn(tuned.weights, x), program.fn(program.weights, x), rtol=1e-5, atol=1e-5)


def test_sharded_images_and_channels_are_not_gathered(clock):
    clock(shifted_is_fast)
    program = trace(lambda w, x: convolution(x, w["depthwise"]), {"depthwise": array(3, 3, 1, 4)}, IMAGES)
    tuned = autotune(program, sizes=SIZES)
    x = array(4, 6, 6, 4, seed=2)
    expected = program.fn(program.weights, x)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    for image, window in ((jax.P("d"), jax.P()), (jax.P(None, None, None, "d"), jax.P(None, None, None, "d"))):
        weights = {"depthwise": jax.device_put(program.weights["depthwise"], jax.NamedSharding(mesh, window))}
        placed = jax.device_put(x, jax.NamedSharding(mesh, image))
        compiled = jax.jit(tuned.fn).lower(weights, placed).compile()
        assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
        np.testing.assert_allclose(compiled(weights, placed), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_is_the_same_compiled_or_from_the_portable_program(clock, tmp_path):
    clock(shifted_is_fast)
    program = two_layers()
    tuned = lx.optimize(program, Recipe.load("float"), buckets={"batch": (1, 2)})
    assert [report.name for report in tuned.history] == ["fold", "autotune"]
    lx.compile(tuned, {"batch": (1, 2)}).save(tmp_path / "net.lepton")
    x = np.asarray(array(2, 6, 6, 4, seed=2))
    expected = program.fn(program.weights, x)
    loaded = lx.load(tmp_path / "net.lepton")
    np.testing.assert_allclose(loaded(x=x)["output"], expected, rtol=1e-5, atol=1e-5)
    symbolic = jax.export.symbolic_shape("b, 6, 6, 4")
    exported = jax.export.export(jax.jit(tuned.fn))(tuned.weights, jax.ShapeDtypeStruct(symbolic, jnp.float32))
    assert exported.mlir_module().count("stablehlo.convolution") == 1
    np.testing.assert_allclose(exported.call(tuned.weights, x), expected, rtol=1e-5, atol=1e-5)


def test_of_sizes_that_nobody_named_those_that_the_model_takes_are_timed(clock):
    clock(shifted_is_fast)

    def pairs(w, x):  # of an even batch
        return convolution(x, w["depthwise"]).reshape(x.shape[0] // 2, 2, -1).sum(1).repeat(2, axis=0)

    tuned = lx.optimize(trace(pairs, {"depthwise": array(3, 3, 1, 4)}, IMAGES), Recipe.load("float"))
    (site,) = tuned.history[-1].sites
    assert [timing["sizes"] for timing in site.metrics["timings"]] == [{"batch": 32}]


@pytest.mark.parametrize("stride", [1, 2])
def test_spatial_dimensions_may_be_symbolic(clock, stride):
    clock(shifted_is_fast)
    fn = lambda w, x: lax.conv_general_dilated(  # noqa: E731
        x, w["w"], (stride,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
    )
    program = trace(fn, {"w": array(3, 1, 4)}, {"x": TensorSpec(("batch", 8, 4), "float32")})
    tuned = autotune(program, sizes=SIZES)
    symbolic = jax.export.symbolic_shape("b, s, 4", constraints=["s >= 3"])
    exported = jax.export.export(jax.jit(tuned.fn))(tuned.weights, jax.ShapeDtypeStruct(symbolic, jnp.float32))
    assert "stablehlo.convolution" not in exported.mlir_module()
    x = array(2, 7, 4, seed=2)
    np.testing.assert_allclose(exported.call(tuned.weights, x), fn(program.weights, x), rtol=1e-5, atol=1e-5)


def test_quantized_weights_stay_small_and_what_is_unpacked_on_loading_is_tuned_too(clock, monkeypatch):
    clock(shifted_is_fast)
    recipe = Recipe.parse('[[quantize]]\nsites = ".*"\nactivations = "none"', name="stored")
    monkeypatch.setattr(
        sys.modules["lepton_xla.passes.quantization.integer_arithmetic"],
        "time_programs",
        lambda functions, _inputs, timer=None: [5.0, 1.0, 9.0][: len(functions)],
    )
    program = two_layers()
    small = lx.optimize(program, recipe, buckets={"batch": (1, 4)})
    assert isinstance(small.weights["depthwise"], QTensor)
    assert convolutions(small) == 1
    assert small.expansion is not None
    loaded = small.expansion.expand(small.weights)
    x = array(4, 6, 6, 4, seed=2)
    assert primitives(small.expansion.fn, loaded, x).count("conv_general_dilated") == 1
    np.testing.assert_allclose(small.expansion.fn(loaded, x), small.fn(small.weights, x), rtol=1e-5, atol=1e-5)
    expected = np.asarray(program.fn(program.weights, x))
    assert np.abs(small.fn(small.weights, x) - expected).max() < 0.05 * np.abs(expected).max()
    assert [site.site for site in small.history[-1].sites] == ["depthwise"]


def test_codes_are_compared_with_the_best_of_float(clock, monkeypatch):
    clock(shifted_is_fast)
    timed = lambda wanted, _timer: [Timing(dict(at), 100.0, 50.0, None) for _, _, at in wanted]  # noqa: E731
    monkeypatch.setattr(sys.modules["lepton_xla.passes.quantization.integer_arithmetic"], "compare", timed)
    whole = []

    def time_programs(functions, inputs, timer=None, budget_s=0.0):
        whole.append([primitives(fn, weights, *inputs).count("conv_general_dilated") for fn, weights in functions])
        return [100.0 - index for index in range(len(functions))]

    monkeypatch.setattr(
        sys.modules["lepton_xla.passes.quantization.integer_arithmetic"], "time_programs", time_programs
    )
    small = lx.optimize(two_layers(), Recipe.parse('[[quantize]]\nsites = ".*"', name="q"), buckets={"batch": (1, 4)})
    lowered = next(report for report in small.history if report.name == "quantize")
    ratios = {site.site: site.metrics["integer_over_float"] for site in lowered.sites}
    assert ratios == pytest.approx({"depthwise": 5.0, "pointwise": 0.5})
    # Every program is timed as it will be in the end: its depthwise convolution is none any more.
    assert {count for counts in whole for count in counts} == {1}
