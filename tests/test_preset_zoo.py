"""Every preset on models that are odd: none refuses, what can be done is done, and the report says what was not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.optimization.pipeline import plan_for
from lepton_xla.passes.planning import resolve
from lepton_xla.recipe import presets

_rng = np.random.default_rng(0)


def array(*shape, scale=1.0):
    return jnp.asarray(scale * _rng.standard_normal(shape), jnp.float32)


def floats(*shape):
    return {"x": lx.TensorSpec(("batch", *shape), "float32")}


def conv(x, kernel, groups=1):
    letters = "NHWC" if x.ndim == 4 else "NWC"
    numbers = (letters, letters[1:-1] + "IO", letters)
    ones = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(x, kernel, ones, "SAME", dimension_numbers=numbers, feature_group_count=groups)


TOKENS = {"x": lx.TensorSpec(("batch", 5), "int32")}
ZOO = {
    "weights of size one": (lambda w, x: x @ w["k"] * w["s"], {"k": array(1, 1), "s": array()}, floats(1)),
    "one tiny layer": (
        lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"],
        {"a": array(32, 32), "b": array(32, 2, scale=1e-4)},
        floats(32),
    ),
    "depthwise": (
        lambda w, x: conv(jax.nn.relu(conv(x, w["d"], 8)), w["p"]),
        {"d": array(3, 3, 1, 8), "p": array(1, 1, 8, 4)},
        floats(5, 5, 8),
    ),
    "embedding": (lambda w, x: w["table"][x] @ w["table"].T, {"table": array(11, 6)}, TOKENS),
    "1-D convolution": (lambda w, x: conv(x, w["k"]), {"k": array(3, 4, 6)}, floats(7, 4)),
    "grouped convolution": (lambda w, x: conv(x, w["k"], 2), {"k": array(3, 3, 4, 6)}, floats(4, 4, 8)),
    "no product": (lambda w, x: x * w["scale"][None] + w["shift"], {"scale": array(3), "shift": array()}, floats(3)),
    "no weights": (lambda w, x: jnp.tanh(x), {}, floats(3)),
    "a step that is tiny": (
        lambda w, x: jax.lax.scan(lambda x, k: (jax.nn.relu(x @ k), None), x, w["k"])[0],
        {"k": jnp.stack([array(4, 4), array(4, 4, scale=1e-5)])},
        floats(4),
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_no_preset_refuses(name):
    """Each preset is planned on each model; one that prunes most, and one that shrinks, does so."""
    fn, weights, inputs = ZOO[name]
    program = lx.trace(fn, weights, inputs)
    folded, _ = plan_for(program, lx.Recipe.load("float").replace(measure=False))
    for preset in presets():
        recipe = lx.Recipe.load(preset).replace(measure=False)
        assert recipe.on_unsupported == "keep"
        plan = resolve(recipe, folded)
        if preset not in ("codebook16-prune90", "shrink50"):
            continue
        small, plan = plan_for(program, recipe)
        if any(entry.prune for entry in plan.sites):
            small = lx.passes.prune(small, plan)
        assert jax.eval_shape(small.fn, small.weights, jnp.ones((2, *inputs["x"].shape[1:]), inputs["x"].dtype))
        for path, mask in small.masks.items():  # something of every weight, and of every step of a stack, is left
            steps = np.asarray(mask).reshape(2 if "step" in name else 1, -1)
            assert steps.any(1).all(), (preset, path)


@pytest.mark.parametrize(
    ("preset", "name"), list(zip(presets(), itertools.islice(itertools.cycle(ZOO), 6, None), strict=False))
)
def test_each_preset_on_one_model_and_each_model_by_one_preset(preset, name):
    fn, weights, inputs = ZOO[name]
    program = lx.trace(fn, weights, inputs)
    spec = inputs["x"]
    x = jnp.arange(5, dtype=jnp.int32)[None] if spec.dtype == "int32" else array(1, *spec.shape[1:])
    data = [{"x": np.asarray(x)}] if preset == "int8-static" else None
    small = lx.optimize(program, lx.Recipe.load(preset).replace(measure=False), calibration=data)
    wanted, found = program.fn(program.weights, x), small.fn(small.weights, x)
    loses = "prune" in preset or "shrink" in preset
    assert jnp.linalg.norm(found - wanted) <= (1.01 if loses else 0.4) * jnp.linalg.norm(wanted)
    lines = lx.passes.weights_report(small).sites
    assert sum(line.bytes_before for line in lines) == program.weights_bytes
    assert sum(line.bytes_after for line in lines) == small.weights_bytes


def test_what_was_kept_is_in_the_report():
    fn, weights, inputs = ZOO["one tiny layer"]
    reports = lx.optimize(lx.trace(fn, weights, inputs), lx.Recipe.load("prune50")).history
    sites = {site.site: site for site in reports[-1].sites}
    assert sites["b"].reason == "its largest is all that stays: something of every weight does"
    assert sites["b"].metrics["sparsity"] == 1 - 1 / 64
    assert sites["a"].metrics["sparsity"] == pytest.approx((1088 / 2 - 63) / 1024)
    fn, weights, inputs = ZOO["no product"]
    history = lx.optimize(lx.trace(fn, weights, inputs), lx.Recipe.load("int8")).history
    (skipped,) = [report for report in history if report.name == "skipped"]
    assert skipped.metrics == {"left out, as the program has no product": "quantize"}
    uniform = lx.Recipe.parse('on_unsupported = "keep"\n[[prune]]\nsites = ".*"\nsparsity = 0.9', name="test")
    fn, weights, inputs = ZOO["weights of size one"]
    plan = resolve(uniform, lx.trace(fn, weights, inputs))
    assert plan["k"].kept == "not pruned: prune 90% uniform would leave nothing of it"


def test_shrinking_goes_as_far_as_it_can():
    """Of 16 x 8 + 8 x 4 + 4 x 128 multiplications only the first two lose units: the last layer makes the output."""
    weights = {"a": array(16, 8), "b": array(8, 4), "c": array(4, 128)}
    fn = lambda w, x: jax.nn.relu(jax.nn.relu(x @ w["a"]) @ w["b"])[..., :4] @ w["c"][:4]  # noqa: E731
    fixed = lambda w, x: jnp.sort(jax.nn.relu(jax.nn.relu(x @ w["a"]) @ w["b"]), -1) @ w["c"]  # noqa: E731
    program = lx.trace(fixed, weights, floats(16))
    with pytest.raises(lx.RecipeError, match=r"flops = 0.5 cannot be reached; the least is .* `sort` runs along it"):
        lx.passes.shrink(program, flops=0.5)
    small = lx.optimize(program, lx.Recipe.load("shrink50").replace({"shrink.round_to": 1}, measure=False))
    assert {path: leaf.shape for path, leaf in small.weights.items()} == {"a": (16, 1), "b": (1, 4), "c": (4, 128)}
    report = next(report for report in small.history if report.name == "shrink")
    assert report.metrics["not_reached"].startswith("flops = 0.5 cannot be reached; the least is 0.788")
    assert "`sort` runs along it" in report.metrics["not_reached"]
    whole = lx.passes.shrink(lx.trace(fn, weights, floats(16)), sparsity=0.95, scope="global", on_unsupported="keep")
    assert whole.weights["a"].shape == (16, 1)
    assert "only" in whole.history[-1].metrics["not_reached"]


def integers_inside(w, x):
    counts = jnp.round(jax.nn.relu(x @ w["a"]) @ w["b"]).astype(jnp.int32)
    return x + (counts @ w["i"] @ w["j"]).astype(jnp.float32)


def test_a_group_of_integers_is_left_and_named():
    numbers = {"i": jnp.ones((8, 12), jnp.int32), "j": jnp.ones((12, 8), jnp.int32)}
    program = lx.trace(integers_inside, {"a": array(8, 16), "b": array(16, 8), **numbers}, floats(8))
    why = r"none of its weights is of floats: i \(int32\), j \(int32\)"
    with pytest.raises(lx.RecipeError, match=rf"group 'i\[1\]' cannot be ranked, as {why}; name it under protect"):
        lx.passes.shrink(program, sparsity=0.5)
    small = lx.passes.shrink(program, sparsity=0.5, on_unsupported="keep")
    assert {path: leaf.shape for path, leaf in small.weights.items()} == {
        "a": (8, 8), "b": (8, 4), "i": (4, 12), "j": (12, 8)
    }  # fmt: skip
    left = next(site for site in small.history[-1].sites if site.site == "i[1]")
    assert (left.action, left.reason) == ("kept 12 units", "none of its weights is of floats: i (int32), j (int32)")


def test_an_already_quantized_program_is_not_shrunk_and_says_so():
    fn, weights, inputs = ZOO["one tiny layer"]
    int8 = lx.optimize(lx.trace(fn, weights, inputs), lx.Recipe.load("int8-weight-only").replace(measure=False))
    again = lx.optimize(int8, lx.Recipe.load("shrink50").replace(measure=False, fold=False))
    assert "is quantized" in again.history[-1].metrics["shrink left out"]
