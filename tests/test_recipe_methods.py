"""The keys of a recipe that prepare float weights for rounding, through the whole pipeline."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.measurement import Timing
from lepton_xla.passes.rescaling.smoothquant import WORTHLESS

lower_module = sys.modules["lepton_xla.passes.quantization.integer_arithmetic"]

WIDTH = 32


def program(uneven: bool = False) -> lx.Program:
    """Uneven, the same function has hidden units of which some are a hundred times as large as others."""
    draw = np.random.default_rng(0).normal
    weights = {
        "scale": 1 + 0.1 * draw(size=WIDTH),
        "shift": 0.1 * draw(size=WIDTH),
        "up": draw(size=(WIDTH, 48)) / 6,
        "up_bias": 0.1 * draw(size=48),
        "down": draw(size=(48, 8)) / 7,
        "down_bias": 0.1 * draw(size=8),
    }
    if uneven:
        sizes = np.logspace(-1, 1, 48)
        weights["up"] *= sizes
        weights["up_bias"] *= sizes
        weights["down"] /= sizes[:, None]

    def fn(w, x):
        centred = x - x.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        hidden = jax.nn.relu((normal * w["scale"][None] + w["shift"][None]) @ w["up"] + w["up_bias"][None])
        return hidden @ w["down"] + w["down_bias"][None]

    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    return lx.trace(fn, arrays, {"x": lx.TensorSpec(("batch", WIDTH), "float32")})


def batches() -> list[dict[str, np.ndarray]]:
    """Correlated inputs with two channels far larger than the others, as transformers have them."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(64, 12)) @ rng.normal(size=(12, WIDTH))
    mixed[:, [3, 17]] *= 30
    return [{"x": mixed[start : start + 16].astype(np.float32)} for start in range(0, 64, 16)]


def error(
    text: str, *, data: list[dict[str, np.ndarray]] | None, formats: str, uneven: bool = False
) -> tuple[float, lx.Program]:
    recipe = lx.Recipe.parse(f'measure = false\n{text}\n[[quantize]]\nsites = ".*"\n{formats}', name="method")
    model = program(uneven)
    small = lx.optimize(model, recipe, calibration=data)
    x = np.concatenate([batch["x"] for batch in batches()])
    want, got = model(model.weights, x), jax.jit(small.fn)(small.weights, x)
    return float(np.linalg.norm(np.asarray(got - want)) / np.linalg.norm(np.asarray(want))), small


INT4 = 'weights = "int4"\nactivations = "none"'
TENSOR = 'weights = "int8"\nactivations = "none"\ngranularity = "tensor"'
INT8 = 'weights = "int8"\nactivations = "int8"'


@pytest.mark.parametrize(
    ("text", "formats", "share", "passes"),
    [
        ('rounding = "gptq"', INT4, 0.3, ["fold", "gptq", "quantize"]),
        ("correct_bias = true", INT4, 0.9, ["fold", "round", "bias_correction", "quantize"]),
        ('rounding = "gptq"\ncorrect_bias = true', INT4, 0.3, ["fold", "gptq", "bias_correction", "quantize"]),
        ('rescale = "awq"', INT4, 0.7, ["fold", "awq", "quantize"]),
        ('rescale = "smooth:0.5"', INT8, 0.75, ["fold", "smoothquant", "quantize"]),
        ("equalize = true", TENSOR, 0.1, ["fold", "equalize", "quantize"]),
    ],
)
def test_a_method_helps_and_leaves_its_report(text: str, formats: str, share: float, passes: list[str]) -> None:
    uneven = "equalize" in text
    plain, _ = error("", data=batches(), formats=formats, uneven=uneven)
    helped, small = error(text, data=batches(), formats=formats, uneven=uneven)
    assert helped < share * plain
    assert [report.name for report in small.history] == passes
    if formats == INT4:
        assert small.weights["up"].values.nbytes == WIDTH * 48 // 2


@pytest.mark.parametrize("text", ["", 'rounding = "gptq"', "correct_bias = true", 'rescale = "awq"'])
@pytest.mark.parametrize("granularity", ["channel", "group:~56"])
def test_a_searched_range_helps_beside_every_method(text: str, granularity: str) -> None:
    rng = np.random.default_rng(0)
    weights = {"up": jnp.asarray(rng.normal(size=(96, 64)), jnp.float32)}
    model = lx.trace(lambda w, x: jax.nn.relu(x @ w["up"]), weights, {"x": lx.TensorSpec(("batch", 96), "float32")})
    x = (rng.normal(size=(256, 24)) @ rng.normal(size=(24, 96)) + rng.normal(size=(256, 96))).astype(np.float32)

    def error_with(weight_range: str) -> float:
        rules = f'[[quantize]]\nsites = ".*"\n{INT4}\ngranularity = "{granularity}"\nweight_range = "{weight_range}"'
        recipe = lx.Recipe.parse(f"measure = false\n{text}\n{rules}", name="range")
        small = lx.optimize(model, recipe, calibration=[{"x": x}])
        assert small.weights["up"].scale.shape == ((1, 64) if granularity == "channel" else (2, 64))
        return float(jnp.linalg.norm(small(small.weights, x) - model(model.weights, x)))

    assert error_with("mse") < 0.93 * error_with("absmax")


@pytest.mark.parametrize(
    "text", ['rounding = "gptq"', "correct_bias = true", 'rescale = "smooth:0.3"', 'rescale = "awq"']
)
def test_without_data_it_is_an_error_or_left_out_as_the_recipe_says(text: str) -> None:
    with pytest.raises(lx.CalibrationError, match=f"has {text.split(' ')[0]}.*needs calibration data"):
        error(text, data=None, formats=INT4)
    plain, _ = error("", data=None, formats=INT4)
    skipped, small = error(f'{text}\nwithout_calibration = "skip"', data=None, formats=INT4)
    assert skipped == plain
    assert text.split(" ")[0] in str(small.history[1])


@pytest.mark.parametrize(
    ("text", "formats", "passes"),
    [
        ('cast = "bfloat16"', INT4, ["fold", "quantize", "cast"]),
        ('cast = "float16"\nrounding = "gptq"', INT4, ["fold", "gptq", "quantize", "cast"]),
        ('cast = "bfloat16"', INT8, ["fold", "quantize", "cast"]),
    ],
)
def test_what_is_left_in_float_is_narrowed_last(text: str, formats: str, passes: list[str]) -> None:
    plain, wide = error(text.partition("\n")[2], data=batches(), formats=formats)
    narrowed, small = error(text, data=batches(), formats=formats)
    assert [report.name for report in small.history] == passes
    assert narrowed < plain + 0.02
    assert (narrowed == plain) == (formats == INT8)  # there every product is one of integers
    np.testing.assert_array_equal(small.weights["up"].values, wide.weights["up"].values)
    assert small.weights["up_bias"].dtype == jnp.float32


def test_a_recipe_may_narrow_only() -> None:
    recipe = lx.Recipe.parse('cast = "float16"', name="half")
    assert "2 sites, products left in float are made float16" in str(resolve(recipe, program()))
    small = lx.optimize(program(), recipe)
    assert [report.name for report in small.history] == ["fold", "cast", "autotune"]
    assert small.weights["up"].dtype == jnp.float16
    assert [report.name for report in lx.optimize(program(), lx.Recipe.parse("", name="none")).history] == ["fold"]
    with pytest.raises(lx.RecipeError, match="cast = 'float8': expected one of none, bfloat16, float16"):
        lx.Recipe.parse('cast = "float8"', name="eighth")


@pytest.mark.parametrize("value", ["smooth", "smooth:2", "smooth:-1", "smooth:x", "quick"])
def test_an_unknown_rescaling_is_refused(value: str) -> None:
    with pytest.raises(lx.RecipeError, match=f"rescale = '{value}': expected none, awq or smooth:A"):
        lx.Recipe.parse(f'rescale = "{value}"', name="r")


def test_the_int8_preset_smooths_where_it_has_data() -> None:
    recipe = lx.Recipe.load("int8")
    names = [report.name for report in lx.optimize(program(), recipe, calibration=batches()).history]
    assert names == ["fold", "smoothquant", "gptq", "quantize"]
    names = [report.name for report in lx.optimize(program(), recipe).history]
    assert names == ["fold", "skipped", "quantize"]


def test_no_activation_is_multiplied_for_a_product_that_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """`two` reads what nothing before it can scale; without integers, float's own operations are all."""

    def fn(w, x):
        return jnp.tanh(x @ w["one"]) @ w["two"]

    rng = np.random.default_rng(2)
    weights = {"one": rng.normal(size=(WIDTH, 24)), "two": rng.normal(size=(24, 8))}
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    model = lx.trace(fn, arrays, {"x": lx.TensorSpec(("batch", WIDTH), "float32")})
    recipe = lx.Recipe.parse(f'rescale = "smooth:0.5"\n[[quantize]]\nsites = ".*"\n{INT8}', name="method")

    def clock(slow: set[str]) -> lx.Program:
        def compare(site, _rule, sizes, _timer):
            integer = 30.0 if site.name in slow else 5.0
            return Timing(dict(sizes), 10.0, integer, None)

        def time_programs(programs, _inputs, timer=None):
            return [10.0 - index for index, _ in enumerate(programs)]

        monkeypatch.setattr(lower_module, "compare", lambda wanted, timer: [compare(*each, timer) for each in wanted])
        monkeypatch.setattr(lower_module, "time_programs", time_programs)
        return lx.optimize(model, recipe, calibration=batches(), buckets={"batch": (1,)})

    small = clock(set())
    assert "two:input_factor" in small.weights
    small = clock({"two"})
    assert "one:input_factor" in small.weights
    assert "two:input_factor" not in small.weights
    reports = {site.site: site for site in small.history[-1].sites}
    assert reports["two"].action == "int8 weights"
    assert "3.00 of float's time" in reports["two"].reason
    kept = {site.site: site for site in small.history[-2].sites}["two"]
    assert (kept.action, kept.reason) == ("kept", WORTHLESS)
