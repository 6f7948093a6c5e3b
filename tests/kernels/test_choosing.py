"""`quantize` chooses kernels by measurement, and an artifact carries them as far as they can run."""

import logging
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.kernels import installation
from lepton_xla.kernels.convolution import NUMBERS, Epilogue
from lepton_xla.passes.alternatives import autotuning
from lepton_xla.passes.alternatives.autotuning import Choices
from lepton_xla.passes.core.timing import Timer
from lepton_xla.passes.quantization import integer_arithmetic, measurement

ROWS = {"x": lx.TensorSpec(("batch", 24), "float32")}
SIZES = [{"batch": 1}, {"batch": 6}]
FLOAT_US = 100.0


def two_layers():
    rng = np.random.default_rng(0)
    weights = {name: jnp.asarray(rng.standard_normal((24, 24)) / 4, jnp.float32) for name in "ab"}
    return lx.trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], weights, ROWS)


def lower(program, preset="int8-weight-only", sizes=SIZES):
    return lx.passes.quantize(program, lx.passes.resolve(lx.Recipe.load(preset), program), sizes=sizes)


@pytest.fixture
def clock(monkeypatch):
    """`clock(kernel_us, program_us)`: times of kernels by site, or None to measure them, and of a program by the number
    of its kernels; `xla_us` is that of XLA's product of codes.
    """

    def set_to(kernel_us, program_us, xla_us=300.0):
        def compare(wanted, _timer):
            return [
                measurement.Timing(dict(at), FLOAT_US, xla_us, None, 0.0, kernel_us[site.name], at["batch"])
                for site, _, at in wanted
            ]

        def time_programs(functions, inputs, timer=None):
            return [
                program_us(
                    len(re.findall("(?:weight_only|integer)_product", str(jax.make_jaxpr(fn)(weights, *inputs))))
                )
                for fn, weights in functions
            ]

        if kernel_us is not None:
            monkeypatch.setattr(integer_arithmetic, "compare", compare)
        monkeypatch.setattr(integer_arithmetic, "time_programs", time_programs)
        monkeypatch.setattr(integer_arithmetic, "choose", lambda *_: Choices())
        monkeypatch.setattr(integer_arithmetic, "times_us", lambda _eqn, _timer, **_: [])

    return set_to


def sites(lowered):
    return {site.site: site for site in lowered.history[-1].sites}


def test_kernels_that_win_are_taken_and_the_report_says_so(kernels, clock):
    clock({"a": 25.0, "b": 50.0}, lambda count: FLOAT_US - 10 * count)
    program = two_layers()
    lowered = lower(program)
    assert {name: (site.outcome, site.reason) for name, site in sites(lowered).items()} == {
        "a": ("codes", "by a kernel: 0.25 of float's time"),
        "b": ("codes", "by a kernel: 0.50 of float's time"),
    }
    timing = sites(lowered)["a"].metrics["timings"][1]
    assert (timing["sizes"], timing["kernel_us"], timing["integer_us"]) == ({"batch": 6}, 25.0, 300.0)
    assert lowered.expansion is None  # nothing is left to unpack
    x = np.random.default_rng(1).standard_normal((6, 24)).astype(np.float32)
    weights = {name: np.asarray(leaf.dequantize(), np.float64) for name, leaf in lowered.weights.items()}
    expected = np.tanh(x @ weights["a"]) @ weights["b"]
    np.testing.assert_allclose(jax.jit(lowered.fn)(lowered.weights, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel_us", "program_us"),
    [
        ({"a": 130.0, "b": 200.0}, lambda count: FLOAT_US - 10 * count),  # each alone is slower
        ({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US + 10 * count),  # the whole program is slower
    ],
)
def test_kernels_that_lose_are_not_taken(kernels, clock, kernel_us, program_us):
    clock(kernel_us, program_us)
    lowered = lower(two_layers())
    assert {site.outcome for site in sites(lowered).values()} == {"changed"}
    assert all("the whole program no faster" in site.reason for site in sites(lowered).values())


def test_kernels_are_not_used_for_the_rows_at_which_they_lose_in_the_whole_program(kernels, clock, monkeypatch):
    """Each alone takes a quarter of the time; with codes the program wins at both sizes, with kernels more at one."""
    clock({"a": 25.0, "b": 25.0}, None, xla_us=60.0)

    def time_programs(functions, inputs, timer=None):
        def us(text):
            if "weight_only_product" in text:
                return 90.0
            return FLOAT_US if "i8[" not in text else 80.0 if inputs[0].shape[0] == 6 else 99.0

        return [us(str(jax.make_jaxpr(fn)(weights, *inputs))) for fn, weights in functions]

    monkeypatch.setattr(integer_arithmetic, "time_programs", time_programs)
    lowered = lower(two_layers())
    assert {str(site.metrics["way"]) for site in sites(lowered).values()} == {"{'1': 'kernel', '6': 'XLA'}"}
    metrics = lowered.history[-1].metrics
    assert metrics["rows_without_kernels"] == [6]
    assert [timed["lowered_us"] for timed in metrics["whole_program"]] == [90.0, 80.0]
    for batch in (1, 6):
        text = str(jax.make_jaxpr(lowered.fn)(lowered.weights, jnp.ones((batch, 24))))
        assert text.count("weight_only_product") == (2 if batch == 1 else 0)


def test_kernels_that_win_clearly_are_not_timed_against_none(kernels, clock):
    """Without them, all weights may be unpacked at once, which takes as much memory as the float ones."""
    numbers = []

    def program_us(count):
        numbers.append(count)
        return FLOAT_US - 10 * count

    clock({"a": 25.0, "b": 25.0}, program_us)
    lowered = lower(two_layers())
    assert {site.outcome for site in sites(lowered).values()} == {"codes"}
    # At each size: the float program, with no site in codes, and with both in kernels.
    assert numbers == [0, 0, 2] * len(SIZES)
    assert "kernels" not in lowered.history[-1].metrics


def test_one_kernel_may_win_alone(kernels, clock):
    clock({"a": 25.0, "b": 130.0}, lambda count: FLOAT_US - 10 * count)
    lowered = lower(two_layers())
    assert {name: site.outcome for name, site in sites(lowered).items()} == {"a": "codes", "b": "changed"}


def test_without_kernels_or_sizes_nothing_changes(kernels, clock, monkeypatch):
    clock({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US - 10 * count)
    assert {site.outcome for site in sites(lower(two_layers(), sizes=())).values()} == {"changed"}
    monkeypatch.setenv(installation.VARIABLE, "off")
    assert {site.outcome for site in sites(lower(two_layers())).values()} == {"changed"}


@pytest.mark.parametrize("preset", ["int8-weight-only", "nf4-weight-only"])
def test_products_are_measured_and_checked(kernels, preset):
    """Whatever wins, all three ways are timed, and the kernel gives the product of the dequantized weight."""
    for site in sites(lower(two_layers(), preset, [{"batch": 6}])).values():
        (timing,) = site.metrics["timings"]
        assert all(math.isfinite(timing[name]) and timing[name] > 0 for name in ("float_us", "integer_us", "kernel_us"))
        assert timing["error"] < (5e-5 if preset == "int8-weight-only" else 1e-5)


def test_rows_decide_who_multiplies(kernels, clock, monkeypatch):
    """An int8 product of few rows by the kernel, and of many by XLA, in one program."""
    clock({}, lambda count: 50.0)

    def compare(wanted, _timer):
        kernel_us = {1: 20.0, 6: 80.0}
        return [
            measurement.Timing(dict(at), FLOAT_US, 40.0, None, 0.0, kernel_us[at["batch"]], at["batch"])
            for _, _, at in wanted
        ]

    monkeypatch.setattr(integer_arithmetic, "compare", compare)

    def time_programs(functions, inputs, timer=None):
        texts = [str(jax.make_jaxpr(fn)(weights, *inputs)) for fn, weights in functions]
        return [50.0 if "integer_product" in text else 100.0 for text in texts]

    monkeypatch.setattr(integer_arithmetic, "time_programs", time_programs)
    lowered = lower(two_layers(), "int8")
    assert {site.metrics["way"]["1"] for site in sites(lowered).values()} == {"kernel"}
    assert {site.reason for site in sites(lowered).values()} == {"by a kernel at 1 rows: 0.28 of float's time"}
    results = {}
    for rows in (1, 6):
        x = jax.ShapeDtypeStruct((rows, 24), jnp.float32)
        text = str(jax.make_jaxpr(lowered.fn)(lowered.weights, x))
        results[rows] = text.count("= integer_product["), text.count("preferred_element_type=int32")
    assert results == {1: (2, 0), 6: (0, 2)}
    x = np.random.default_rng(1).standard_normal((6, 24)).astype(np.float32)
    single = np.concatenate([jax.jit(lowered.fn)(lowered.weights, row[None]) for row in x])
    np.testing.assert_allclose(single, jax.jit(lowered.fn)(lowered.weights, x), rtol=0, atol=1e-6)


def test_what_follows_a_product_goes_to_the_kernel(kernels, clock):
    """The report names it, and the numbers stay those of the operations that it replaces."""
    clock({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US - 10 * count)
    plain = two_layers()
    weights = {**plain.weights, "bias": jnp.linspace(-1, 1, 24)}

    def fn(w, x):
        return x + jax.nn.gelu(x @ w["a"] + w["bias"][None], approximate=False) @ w["b"]

    lowered = lower(lx.trace(fn, weights, ROWS))
    assert {name: (site.reason, site.metrics["fused"]) for name, site in sites(lowered).items() if name in "ab"} == {
        "a": ("by a kernel with bias + gelu: 0.25 of float's time", "bias + gelu"),
        "b": ("by a kernel with residual: 0.25 of float's time", "residual"),
    }
    x = np.random.default_rng(1).standard_normal((6, 24)).astype(np.float32)
    text = str(jax.make_jaxpr(lowered.fn)(lowered.weights, x))
    assert [text.count(each) for each in ("erf", "= add ", "weight_only_product[")] == [0, 0, 2]
    exact = {name: leaf.dequantize() if name in "ab" else leaf for name, leaf in lowered.weights.items()}
    np.testing.assert_allclose(jax.jit(lowered.fn)(lowered.weights, x), fn(exact, x), rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("options", ["", "dynamic = false", 'granularity = "tensor"'])
def test_integer_products_are_measured_and_checked(kernels, clock, options):
    # On a busy machine the whole program may be slower with kernels at some size, whose times are then left out.
    clock(None, lambda count: FLOAT_US - 10 * count)
    program = two_layers()
    plan = lx.passes.resolve(lx.Recipe.parse(f'[[quantize]]\nsites = ".*"\n{options}', name="test"), program)
    ranges = {"a": jnp.float32(4), "b": jnp.float32(1)}
    lowered = lx.passes.quantize(program, plan, ranges, sizes=[{"batch": 1}, {"batch": 6}])
    for site in sites(lowered).values():
        for timing in site.metrics["timings"]:
            assert timing["kernel_us"] > 0
            assert timing["error"] < 1e-5


def test_a_wrong_kernel_is_told(kernels, clock, monkeypatch, caplog):
    clock({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US - 10 * count)
    right = integer_arithmetic.compare
    monkeypatch.setattr(
        integer_arithmetic,
        "compare",
        lambda wanted, timer: [
            measurement.Timing(found.sizes, found.float_us, 300.0, None, 0.5, 25.0) for found in right(wanted, timer)
        ],
    )
    lowered = lower(two_layers())
    assert {site.outcome for site in sites(lowered).values()} == {"changed"}
    assert "a kernel's product of codes is wrong by 50%" in caplog.text


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8"])
def test_a_sharded_weight_has_no_kernel(kernels, clock, recipe):
    clock({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US - 10 * count)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    program = two_layers()
    cut = jax.device_put(program.weights, jax.NamedSharding(mesh, jax.P(None, "model")))
    lowered = lower(program.replace(weights=cut), recipe)
    assert {site.outcome for site in sites(lowered).values()} == {"changed"}
    assert "_product" not in str(jax.make_jaxpr(lowered.fn)(lowered.weights, jnp.zeros((6, 24))))


def test_an_artifact_for_two_devices_calls_kernels(kernels, clock, tmp_path):
    clock({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US - 10 * count)
    lowered = lower(two_layers())
    manifest = lx.compile(lowered, {"batch": (6,)}, mesh="data=2").save(tmp_path / "two.lepton")
    assert [entry.target.kernels for entry in manifest.executables.values()] == [str(installation.INTERFACE)]
    loaded = lx.load(tmp_path / "two.lepton")
    assert loaded.route == "executables"
    x = np.random.default_rng(1).standard_normal((6, 24)).astype(np.float32)
    np.testing.assert_allclose(loaded(x=x)["output"], jax.jit(lowered.fn)(lowered.weights, x), rtol=0, atol=1e-3)


def test_an_artifact_runs_with_kernels_and_without(kernels, clock, tmp_path, monkeypatch, caplog):
    clock({"a": 25.0, "b": 25.0}, lambda count: FLOAT_US - 10 * count)
    lowered = lower(two_layers())
    manifest = lx.compile(lowered, {"batch": (1, 6)}).save(tmp_path / "with.lepton")
    assert [entry.target.kernels for entry in manifest.executables.values()] == [str(installation.INTERFACE)]
    x = np.random.default_rng(1).standard_normal((4, 24)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        here = lx.load(tmp_path / "with.lepton")
    assert (here.route, caplog.records) == ("executables", [])
    expected = here(x=x)["output"]
    monkeypatch.setenv(installation.VARIABLE, "off")
    with caplog.at_level(logging.WARNING):
        there = lx.load(tmp_path / "with.lepton", write_back=True)
    assert there.route == "stablehlo"
    assert f"kernels: '' here, '{installation.INTERFACE}' there" in caplog.text
    np.testing.assert_allclose(there(x=x)["output"], expected, rtol=0, atol=1e-4)
    # Now it has code for both.
    assert lx.load(tmp_path / "with.lepton").route == "executables"
    monkeypatch.setenv(installation.VARIABLE, "")
    again = lx.load(tmp_path / "with.lepton")
    assert again.route == "executables"
    np.testing.assert_array_equal(again(x=x)["output"], expected)


def test_an_artifact_without_kernels_loads_where_they_are(kernels, tmp_path):
    lx.compile(two_layers(), {"batch": (1,)}).save(tmp_path / "plain.lepton")
    assert lx.load(tmp_path / "plain.lepton").route == "executables"


def convolutions():
    """Two convolutions with biases and ReLU, and a residual."""
    rng = np.random.default_rng(0)
    weights = {name: jnp.asarray(rng.standard_normal((3, 3, 6, 6)) / 7, jnp.float32) for name in "ab"}
    weights["bias"] = jnp.asarray(rng.standard_normal(6), jnp.float32)

    def fn(w, x):
        for name in "ab":
            y = jax.lax.conv_general_dilated(x, w[name], (1, 1), "SAME", dimension_numbers=NUMBERS)
            x = jax.nn.relu(y + jnp.reshape(w["bias"], (1, 1, 1, 6)) + x)
        return x

    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 5, 5, 6), "float32")})


def images(count=3):
    return np.random.default_rng(1).standard_normal((count, 5, 5, 6)).astype(np.float32)


def epilogues(fn, weights, x, name):
    text = jax.make_jaxpr(fn)(weights, x)
    return [eqn.params["epilogue"] for eqn in text.jaxpr.eqns if eqn.primitive.name == name]


def test_convolutions_of_codes_by_kernels(kernels, clock, monkeypatch):
    """They get the activation that follows them, and the numbers of XLA's own operations."""
    clock({"a": 25.0, "b": 50.0}, lambda _count: FLOAT_US)
    monkeypatch.setattr(integer_arithmetic.selection, "fastest", lambda sets, _tried: sets[-1])
    program = convolutions()
    lowered = lower(program, "int8")
    assert {site.reason for site in sites(lowered).values()} == {
        "by a kernel: 0.25 of float's time", "by a kernel: 0.50 of float's time",
    }  # fmt: skip
    given_images = images()
    found = epilogues(lowered.fn, lowered.weights, given_images, "integer_convolution")
    assert found == [Epilogue("clamp", 0.0)] * 2
    monkeypatch.setattr(integer_arithmetic.eligibility, "has_kernel", lambda *_: False)
    plain = lx.passes.quantize(program, lx.passes.resolve(lx.Recipe.load("int8"), program))
    expected = jax.jit(plain.fn)(plain.weights, given_images)
    np.testing.assert_allclose(jax.jit(lowered.fn)(lowered.weights, given_images), expected, rtol=1e-5, atol=1e-5)


def inverted_block():
    """Wider, a filter a channel, narrower."""
    rng = np.random.default_rng(0)
    shapes = {"a": (1, 1, 6, 12), "b": (3, 3, 1, 12), "c": (1, 1, 12, 6)}
    weights = {name: jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32) for name, shape in shapes.items()}

    def fn(w, x):
        for name, groups in (("a", 1), ("b", 12), ("c", 1)):
            x = jax.nn.relu6(
                jax.lax.conv_general_dilated(
                    x, w[name], (1, 1), "SAME", dimension_numbers=NUMBERS, feature_group_count=groups
                )
            )
        return x

    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 5, 5, 6), "float32")})


@pytest.mark.parametrize("passing_us", [50.0, 150.0])
def test_convolutions_that_lose_alone_may_win_together(kernels, clock, monkeypatch, passing_us):
    """With static scales codes pass between them: that is tried as a whole, and taken if it wins."""
    clock(dict.fromkeys("abc", 400.0), None)

    def time_programs(functions, inputs, timer=None):
        texts = [str(jax.make_jaxpr(fn)(weights, *inputs)) for fn, weights in functions]
        return [passing_us if "u8[" in text else FLOAT_US + 10 * text.count("integer_convolution") for text in texts]

    monkeypatch.setattr(integer_arithmetic, "time_programs", time_programs)
    program, given_images = inverted_block(), images()
    plan = lx.passes.resolve(lx.Recipe.load("int8").replace({"quantize.0.dynamic": False}), program)
    ranges = {"a": jnp.float32(4), "b": jnp.float32(6), "c": jnp.float32(6)}
    lowered = lx.passes.quantize(program, plan, ranges, sizes=SIZES)
    wins = passing_us < FLOAT_US
    assert {site.outcome for site in sites(lowered).values()} == {"codes" if wins else "changed"}
    if not wins:
        return
    reason = "by a kernel: 4.00 of float's time alone; it takes and gives codes where its neighbours do"
    assert {(site.reason, *site.metrics["way"].values()) for site in sites(lowered).values()} == {
        (reason, "kernel", "kernel")
    }
    plain = lx.passes.quantize(program, plan, ranges)  # nothing timed: by XLA, with floats in between
    expected = jax.jit(plain.fn)(plain.weights, given_images)
    np.testing.assert_allclose(jax.jit(lowered.fn)(lowered.weights, given_images), expected, rtol=1e-5, atol=1e-5)


def test_convolutions_in_float_by_kernels(kernels, monkeypatch):
    """`autotune` times the kernel with what follows it, and takes it where it wins at every size."""
    program, given_images = convolutions(), images()
    times = {autotuning.XLA: 10.0, autotuning.KERNEL: 5.0}
    monkeypatch.setattr(autotuning, "_time_ways", lambda *_: times)
    monkeypatch.setattr(autotuning, "time_programs", lambda functions, *_: [10.0, 5.0][: len(functions)])
    tuned = lx.passes.autotune(program, sizes=SIZES)
    assert {site.action for site in tuned.history[-1].sites} == {autotuning.KERNEL}
    found = epilogues(tuned.fn, tuned.weights, given_images, "convolution")
    assert found == [Epilogue("clamp", 0.0)] * 2
    expected = jax.jit(program.fn)(program.weights, given_images)
    np.testing.assert_allclose(jax.jit(tuned.fn)(tuned.weights, given_images), expected, rtol=1e-5, atol=1e-5)
    times[autotuning.KERNEL] = 9.9
    monkeypatch.setattr(autotuning, "time_programs", lambda functions, *_: [10.0, 9.9][: len(functions)])
    assert lx.passes.autotune(program, sizes=SIZES).fn is program.fn


@pytest.mark.parametrize(("alone_us", "whole_us"), [(11.0, 5.0), (11.0, 9.5), (16.0, 5.0), (5.0, 5.0)])
def test_convolutions_in_float_that_are_no_faster_alone_may_be_together(kernels, monkeypatch, alone_us, whole_us):
    """All by kernels, and two of them by one: tried as a whole, if none is much slower alone, and taken if it wins."""
    program, given_images = inverted_block(), images()
    monkeypatch.setattr(autotuning, "_time_ways", lambda *_: {autotuning.XLA: 10.0, autotuning.KERNEL: alone_us})

    def time_programs(functions, inputs, timer=None):
        texts = [str(jax.make_jaxpr(fn)(weights, *inputs)) for fn, weights in functions]
        return [whole_us if "expanding" in text else 9.0 if "= convolution" in text else 10.0 for text in texts]

    monkeypatch.setattr(autotuning, "time_programs", time_programs)
    tuned = lx.passes.autotune(program, sizes=SIZES)
    (report,) = tuned.history
    taken = {(site.action, site.reason) for site in report.sites}
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(tuned.fn)(tuned.weights, given_images).eqns]
    if alone_us > 15:
        assert taken == {(autotuning.XLA, "a kernel would take 1.60 of the time at batch 1")}
        assert "whole_program" not in report.metrics
        return
    together = "alone XLA's own is as fast, but not in the whole program with all convolutions by kernels"
    assert taken == {(autotuning.KERNEL, together if alone_us > 10 else "0.50 of the time of XLA's own")}
    assert report.metrics["joined"] == (whole_us < 9)
    assert names.count("expanding") == (whole_us < 9)
    assert names.count("convolution") == (1 if whole_us < 9 else 3)
    expected = jax.jit(program.fn)(program.weights, given_images)
    np.testing.assert_allclose(jax.jit(tuned.fn)(tuned.weights, given_images), expected, rtol=1e-5, atol=1e-5)


def test_what_convolutions_are_timed_as(kernels):
    """Every way computes the same, the bias and ReLU6 that stand for what follows included."""
    program = convolutions()
    seen = []

    def time_programs(functions, inputs, *_):
        random = np.random.default_rng(0)
        given_arrays = [jnp.asarray(random.standard_normal(spec.shape), spec.dtype) for spec in inputs]
        seen.append([np.asarray(fn(weights, *given_arrays)) for fn, weights in functions])
        return [10.0, 5.0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(autotuning, "time_programs", time_programs)
        autotuning.choose(program, SIZES[:1], lambda _line: None, Timer())
    for xla, kernel in seen:
        np.testing.assert_allclose(kernel, xla, rtol=1e-5, atol=1e-5)
        assert xla.min() == 0
    assert seen


def test_convolutions_of_unpacked_weights_load_without_kernels(kernels, clock, tmp_path, monkeypatch):
    """Unpacking has code for here, the buckets have none: they are compiled for weights that code has unpacked."""
    clock({}, lambda _count: FLOAT_US)
    unpacked = lambda *_: (True, [], {})  # noqa: E731
    monkeypatch.setattr(integer_arithmetic.WholeProgram, "unpacking", unpacked)
    monkeypatch.setattr(autotuning, "_time_ways", lambda *_: {autotuning.XLA: 10.0, autotuning.KERNEL: 5.0})
    monkeypatch.setattr(autotuning, "time_programs", lambda functions, *_: [10.0, 5.0][: len(functions)])
    tuned = lx.passes.autotune(lower(convolutions()), sizes=SIZES)
    assert tuned.expansion is not None
    lx.compile(tuned, {"batch": (3,)}).save(tmp_path / "with.lepton")
    expected = lx.load(tmp_path / "with.lepton")(x=images())["output"]
    # A process that has not begun to use JAX loads compiled code without it.
    np.save(tmp_path / "x.npy", images())
    code = (
        "import numpy as np, lepton_xla as lx; there = lx.load('with.lepton'); "
        "np.save('y.npy', there(x=np.load('x.npy'))['output']); print(there.route)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, installation.VARIABLE: "off"}, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert ran.stdout.strip() == "stablehlo"
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=0, atol=1e-5)
