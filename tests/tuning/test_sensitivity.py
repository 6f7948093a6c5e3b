"""What one quantized weight does to a model, against the model written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_xla.errors import CalibrationError, InputError, ModelError, RecipeError
from lepton_xla.passes import fake_quant
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe
from lepton_xla.tuning import sensitivity

ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def recipe(*rules, extra=""):
    blocks = "".join(f"[[quantize]]\n{rule}\n" for rule in rules or ['sites = ".*"'])
    return Recipe.parse(f"{extra}\n{blocks}", name="tried")


WEIGHTS = {"a": array(6, 16), "b": array(16, 8, seed=1) * jnp.geomspace(0.01, 3, 8)[None], "c": array(8, 4, seed=2)}
DATA = [{"x": array(5, 6, seed=10)}, {"x": 2 * array(3, 6, seed=11)}]


def model(w, x):
    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"]


def program():
    return trace(model, WEIGHTS, ROWS)


def round_to_int8(values, axis):
    scale = np.abs(values).max(axis=axis, keepdims=True) / 127
    return np.clip(np.rint(values / np.where(scale == 0, 1, scale)), -127, 127) * scale


def reference(x, quantized, static=None):
    """The model in float64, some of its products on rounded operands: channels of weights, rows of activations."""
    values = np.asarray(x, np.float64)
    for name in "abc":
        weight = np.asarray(WEIGHTS[name], np.float64)
        if name in quantized:
            weight = round_to_int8(weight, 0)
            if static:
                scale = static[name] / 127
                values = np.clip(np.rint(values / scale), -127, 127) * scale
            else:
                values = round_to_int8(values, 1)
        values = values @ weight
        values = np.tanh(values) if name != "c" else values
    return values


def distances(quantized, static=None):
    pairs = [(reference(b["x"], ""), reference(b["x"], quantized, static)) for b in DATA]
    exact, rounded = (np.concatenate(side) for side in zip(*pairs, strict=True))
    cosines = np.sum(exact * rounded, axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    return np.linalg.norm(rounded - exact) / np.linalg.norm(exact), cosines.mean()


@pytest.mark.parametrize("static", [False, True])
def test_output_error_of_each_weight_alone(static):
    rule = 'sites = ".*"\n' + ("dynamic = false" if static else "")
    found = sensitivity(program(), recipe(rule), calibration=iter(DATA))
    ranges = None
    if static:
        inputs = {"a": [b["x"] for b in DATA]}
        inputs["b"] = [np.tanh(x @ WEIGHTS["a"]) for x in inputs["a"]]
        inputs["c"] = [np.tanh(x @ WEIGHTS["b"]) for x in inputs["b"]]
        ranges = {name: max(float(np.abs(value).max()) for value in values) for name, values in inputs.items()}
    assert found.metric == "output"
    assert {entry.sites for entry in found.sites} == {("a",), ("b",), ("c",)}
    for entry in (*found.sites, found.together):
        error, cosine = distances("".join(entry.sites), ranges)
        # Where float32 and float64 round to different codes, one of a thousand is off by one.
        np.testing.assert_allclose(entry.output_error, error, rtol=0.02)
        np.testing.assert_allclose(1 - entry.cosine, 1 - cosine, rtol=0.05, atol=2e-7)
        assert entry.drop == entry.output_error
    errors = [entry.output_error for entry in found.sites]
    assert errors == sorted(errors, reverse=True)
    assert found.together.sites == ("a", "b", "c")
    assert found.float_metrics == {}


@pytest.mark.parametrize(
    "rule",
    [
        'weights = "int4"\nactivations = "none"\ngranularity = "group:2"',
        'weights = "fp8_e4m3"\nactivations = "fp8_e4m3"',
        'weights = "nf4"\nactivations = "none"',
        'weights = "int8"\ndynamic = false\ncalibration = "mse"',
    ],
)
def test_every_rule_is_what_fake_quant_makes_of_it(rule):
    tried = recipe(f'sites = ".*"\n{rule}')
    found = sensitivity(program(), tried, calibration=DATA)
    plan = resolve(tried, program())
    from lepton_xla.passes import calibrate

    ranges = calibrate(program(), plan, DATA) if "false" in rule else None
    for entry in found.sites:
        only = Plan(tried, tuple(planned for planned in plan.sites if planned.site.name == entry.sites[0]))
        rounding = jax.jit(fake_quant(model, only, ranges))
        pairs = [(model(WEIGHTS, b["x"]), rounding(WEIGHTS, b["x"])) for b in DATA]
        exact, rounded = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(entry.output_error, error, rtol=1e-3)
        assert error > 1e-4


def test_a_metric_ranks_and_the_output_breaks_ties():
    calls = []

    def evaluate(predict):
        outputs = predict(x=DATA[0]["x"])["output"]
        calls.append(outputs)
        # Worse for the model in which `b` alone is rounded, and for no other.
        distance = {name: np.linalg.norm(outputs - reference(DATA[0]["x"], name)) for name in ("", *"abc", "abc")}
        only_b = min(distance, key=distance.__getitem__) == "b"
        return {"loss": 2.0 + only_b, "accuracy": 0.9 - 0.2 * only_b}

    found = sensitivity(program(), recipe(), calibration=DATA, evaluate=evaluate)
    assert found.metric == "accuracy"
    assert len(calls) == 5  # the float model, three weights, all of them
    np.testing.assert_allclose(calls[0], model(WEIGHTS, DATA[0]["x"]), rtol=1e-5)
    assert found.float_metrics == {"loss": 2.0, "accuracy": 0.9}
    assert found.sites[0].sites == ("b",)
    assert found.sites[0].drop == pytest.approx(0.2)
    assert found.sites[0].metrics == {"loss": 3.0, "accuracy": pytest.approx(0.7)}
    assert [entry.drop for entry in found.sites[1:]] == [0, 0]
    assert found.sites[1].output_error > found.sites[2].output_error
    loss = sensitivity(program(), recipe(), evaluate=evaluate, metric="loss", lower_is_better=True)
    assert (loss.sites[0].sites, loss.sites[0].drop) == (("b",), 1.0)
    assert loss.sites[0].output_error is None
    number = len(calls)
    assert sensitivity(program(), recipe(), calibration=DATA, evaluate=evaluate, metric="output").metric == "output"
    assert len(calls) == number


def test_a_metric_that_is_not_a_number_comes_first():
    results = iter([1.0, 0.5, math.nan, 0.9, 0.1])
    found = sensitivity(program(), recipe(), evaluate=lambda predict: {"score": next(results)})
    assert [entry.sites[0] for entry in found.sites] == ["b", "a", "c"]


def test_sites_of_one_weight_go_together_and_others_stay():
    def fn(w, x):
        return jnp.tanh(x @ w["shared"]) @ w["shared"] + (x @ w["own"]) * jnp.sum(x @ w["off"])

    weights = {"shared": array(6, 6), "own": array(6, 6, seed=1), "off": array(6, 6, seed=2)}
    tried = recipe('sites = ".*"\nexclude = "off"', extra='on_unsupported = "keep"')
    found = sensitivity(trace(fn, weights, ROWS), tried, calibration=DATA)
    assert {entry.sites for entry in found.sites} == {("shared", "shared#1"), ("own",)}
    sizes = {entry.sites[0]: (entry.bytes_before, entry.bytes_after) for entry in found.sites}
    assert sizes == dict.fromkeys(("shared", "own"), (6 * 6 * 4, 6 * 6 + 6 * 4))
    assert (found.together.bytes_before, found.together.bytes_after) == (288, 120)
    assert found.together.bytes_saved == 168


@pytest.mark.parametrize(
    ("products", "reason"),
    [
        ("weights", "dot_general of two activations, which products = 'weights' leaves float"),
        ("all", "a product of two activations; only weights are tested"),
    ],
)
def test_what_the_recipe_names_and_is_not_tried_is_said(products, reason):
    def fn(w, x):
        scores = x @ x.T
        return jax.nn.softmax(scores) @ (x @ w["w"])

    tried = recipe(f'sites = ".*"\nproducts = "{products}"', extra='on_unsupported = "keep"')
    found = sensitivity(trace(fn, {"w": array(6, 6)}, ROWS), tried, calibration=DATA, sizes=[{"batch": 2}])
    assert [entry.sites for entry in found.sites] == [("w",)]
    assert found.kept == {"dot_general#0": reason, "dot_general#1": reason}


@pytest.mark.parametrize("rule", ["", "dynamic = false"])
def test_a_stack_is_one_weight_inside_its_scan(rule):
    def fn(w, x):
        hidden = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["stack"])[0]
        return lax.cond(x[0, 0] > 100, lambda x: x, lambda x: x @ w["last"], hidden)

    weights = {"stack": array(3, 6, 6), "last": array(6, 6, seed=3)}
    made = trace(fn, weights, ROWS)
    tried = recipe(f'sites = ".*"\n{rule}')
    found = sensitivity(made, tried, calibration=DATA)
    plan = resolve(tried, made)
    from lepton_xla.passes import calibrate

    ranges = calibrate(made, plan, DATA) if rule else None
    for entry in found.sites:
        only = Plan(tried, tuple(planned for planned in plan.sites if planned.site.name in entry.sites))
        rounding = jax.jit(fake_quant(fn, only, ranges))
        pairs = [(fn(weights, b["x"]), rounding(weights, b["x"])) for b in DATA]
        exact, rounded = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
        expected = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(entry.output_error, expected, rtol=0.02)


def test_the_model_is_compiled_once_however_many_weights_there_are():
    def traces(layers):
        count = 0

        def fn(w, x):
            nonlocal count
            count += isinstance(x, jax.core.Tracer)
            for name in w:
                x = jnp.tanh(x @ w[name])
            return x

        weights = {f"w{k}": array(6, 6, seed=k) for k in range(layers)}
        sensitivity(trace(fn, weights, ROWS), recipe(extra="fold = false"), calibration=DATA)
        return count

    assert traces(6) == traces(2)


def test_products_are_timed_alone_where_they_have_codes():
    rules = ('sites = "a"', 'sites = ".*"\nactivations = "none"')
    found = sensitivity(program(), recipe(*rules), calibration=DATA, sizes=[{"batch": 2}, {"batch": 4}])
    by_name = {entry.sites[0]: entry for entry in found.sites}
    assert [timing.sizes for timing in by_name["a"].timings] == [{"batch": 2}, {"batch": 4}]
    ratios = [timing.integer_us / timing.float_us for timing in by_name["a"].timings]
    assert by_name["a"].latency_ratio == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert by_name["b"].timings == ()
    assert by_name["b"].latency_ratio is None
    document = found.to_json()
    assert document["sites"][0].keys() == document["together"].keys()
    assert document["metric"] == "output"


def test_progress_counts_every_run():
    told = []
    sensitivity(
        program(),
        recipe(),
        calibration=DATA,
        evaluate=lambda predict: {"m": 1.0},
        progress=lambda *step: told.append(step),
    )
    counted = [(done, total) for _, done, total in told if total]
    assert counted == [(done, 15) for done in range(15)]  # 5 settings: 2 batches each, evaluated once each
    assert ("run a", 1, 15) in told


def test_outputs_of_several_kinds():
    def fn(w, x):
        out = x @ w["a"]
        return {"logits": out, "label": jnp.argmax(out, axis=-1), "total": jnp.sum(out)}

    found = sensitivity(trace(fn, {"a": WEIGHTS["a"]}, ROWS), recipe(), calibration=DATA)
    assert 0 < found.sites[0].output_error < 0.05
    assert 0.99 < found.sites[0].cosine <= 1


def integers(w, x):
    return jnp.argmax(x @ w["a"], axis=-1)


def endless(w, x):
    return (x @ w["a"]) / 0


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (CalibrationError, "without evaluate needs calibration data", {"calibration": None}),
        (CalibrationError, "without evaluate needs calibration data", {"calibration": []}),
        (ModelError, "metric 'accuracy' needs a model with evaluate", {"metric": "accuracy"}),
        (
            ModelError,
            "no metric 'f1': evaluate returns m; 'output' is",
            {"metric": "f1", "evaluate": lambda p: {"m": 1}},
        ),
        (ModelError, "evaluate returns no metric", {"evaluate": lambda p: {}}),
        (RecipeError, "recipe 'none' quantizes no weight", {"recipe": Recipe(name="none")}),
        (CalibrationError, "batch 0 has inputs", {"calibration": [{"y": DATA[0]["x"]}]}),
        (ModelError, "the model has no float output .*: output", {"program": integers}),
        (ModelError, "outputs on calibration batch 0 are not finite", {"program": endless}),
        (InputError, "the model takes", {"evaluate": lambda predict: predict(y=1)}),
        (InputError, "input 'x' has dtype float64", {"evaluate": lambda predict: predict(x=np.zeros((2, 6)))}),
        (
            CalibrationError,
            "static activation scales",
            {"recipe": recipe('sites = "a"\ndynamic = false'), "calibration": None, "evaluate": lambda p: {"m": 1}},
        ),
    ],
)
def test_what_cannot_be_used(error, message, changes):
    given = {"program": model, "recipe": recipe('sites = "a"'), "calibration": DATA} | changes
    made = trace(given.pop("program"), WEIGHTS, ROWS)
    with pytest.raises(error, match=message) as caught:
        sensitivity(made, given.pop("recipe"), **given)
    assert "\n" not in str(caught.value)
