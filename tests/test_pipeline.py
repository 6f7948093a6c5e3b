"""Recipes from end to end on a small convolutional network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from cases import pairs

from lepton_xla.adapters import from_linen
from lepton_xla.errors import CalibrationError, CompileError, ModelError, RecipeError, UnsupportedError
from lepton_xla.optimization import pipeline
from lepton_xla.optimization.pipeline import apply_plan, grid, optimize, plan_for
from lepton_xla.passes import fold
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import QTensor
from lepton_xla.recipe import Recipe, presets

KERNELS = [f"params/{name}/kernel" for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1")]


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3))(image)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(32, (3, 3))(x)))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def net():
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    statistics = jax.tree.map(lambda leaf: 0.5 + jax.random.uniform(jax.random.key(1), leaf.shape), variables)
    variables = {"params": variables["params"], "batch_stats": statistics["batch_stats"]}
    return from_linen(Net(), variables, {"image": TensorSpec(("batch", 8, 8, 1), "float32")})


@pytest.fixture(scope="module")
def images():
    return array(16, 8, 8, 1, seed=5)


def run(program, images):
    return np.asarray(jax.jit(program.fn)(program.weights, images), np.float64)


def error(program, reference, images):
    """Root mean square of the difference, as a share of the reference's."""
    expected = run(reference, images)
    return np.sqrt(np.mean((run(program, images) - expected) ** 2) / np.mean(expected**2))


def preset(name, **changes):
    return msgspec.structs.replace(Recipe.load(name), **changes)


# What each preset does, given data to calibrate on; without, what needs it is left out, but for calibration itself.
PASSES = {
    "float": ["fold"],
    "int8": ["fold", "smoothquant", "gptq", "quantize"],
    "int8-static": ["fold", "calibrate", "quantize"],
    "int8-weight-only": ["fold", "gptq", "quantize"],
    "int4-weight-only": ["fold", "gptq", "quantize"],
    "int4-channel-weight-only": ["fold", "gptq", "quantize"],
    "w4a4": ["fold", "smoothquant", "gptq", "quantize"],
    "fp8": ["fold", "gptq", "quantize"],
    "fp8-weight-only": ["fold", "gptq", "quantize"],
    "nf4-weight-only": ["fold", "gptq", "quantize"],
    "codebook16": ["fold", "gptq", "quantize"],
    "prune50": ["fold", "prune"],
    "int8-prune50": ["fold", "prune", "quantize"],
    "codebook16-prune90": ["fold", "prune", "quantize"],
    "shrink50": ["fold", "shrink"],
    "int8-shrink50": ["fold", "shrink", "smoothquant", "gptq", "quantize"],
}
NEEDS_DATA = {"smoothquant", "gptq"}
# What rounding may lose on random weights, beside what is left of the network in float.
LOSS = {
    "float": 1e-6,
    "prune50": 1e-6,
    "shrink50": 1e-6,
    "int8": 0.05,
    "int8-static": 0.08,
    "int8-weight-only": 0.05,
    "int8-prune50": 0.05,
    "int8-shrink50": 0.05,
    "fp8": 0.12,
    "fp8-weight-only": 0.12,
    "codebook16-prune90": 0.25,
    "int4-weight-only": 0.3,
    "int4-channel-weight-only": 0.3,
    "nf4-weight-only": 0.3,
    "codebook16": 0.3,
    "w4a4": 0.6,
}
SPARSITY = {"prune50": 0.5, "int8-prune50": 0.5, "codebook16-prune90": 0.9}


def test_every_preset_is_tested():
    assert set(PASSES) == set(LOSS) == set(presets())


@pytest.fixture(scope="module")
def left_in_float(net):
    """The network in float without what a preset takes away: pruned weights are zero, and so are removed units."""
    folded, cut = fold(net), optimize(net, preset("shrink50", measure=False))

    def kept(weights, path):
        """1 for each row of a weight, or element of a bias, that `shrink` left."""
        rows = np.asarray(weights[path]).reshape(len(weights[path]), -1)[:, 0]
        return np.isin(rows, np.asarray(cut.weights[path])).astype(np.float32)

    def make(name, small):
        weights = dict(folded.weights)
        for path, mask in small.masks.items():
            weights[path] *= np.asarray(mask, np.float32)
        if "shrink" in name:
            for conv in ("params/Conv_0/kernel", "params/Conv_1/kernel"):
                units = kept(weights, f"{conv}:bias")
                weights |= {
                    conv: weights[conv] * units[None, None, None],
                    f"{conv}:bias": weights[f"{conv}:bias"] * units,
                }
            weights["params/Dense_1/kernel"] *= kept(weights, "params/Dense_1/kernel")[:, None]
        return dataclasses.replace(folded, weights=weights)

    return make


@pytest.mark.parametrize("name", PASSES)
def test_a_preset_end_to_end(net, images, left_in_float, name):
    data = [{"image": images}] if "calibrate" in PASSES[name] else None
    small = optimize(net, preset(name, measure=False), calibration=data)
    done = [report.name for report in small.history]
    assert [pass_ for pass_ in done if pass_ != "skipped"] == [
        pass_ for pass_ in PASSES[name] if pass_ not in NEEDS_DATA
    ]
    assert ("skipped" in done) == bool(NEEDS_DATA & set(PASSES[name]))
    assert small.inputs == net.inputs
    assert small.outputs == net.outputs
    left = left_in_float(name, small)
    assert error(small, left, images) < LOSS[name]
    assert (error(left, net, images) > 0.3) == ("prune" in name or "shrink" in name)
    assert not [path for path in small.weights if "batch_stats" in path]
    for path in KERNELS:
        weight = small.weights[path]
        assert isinstance(weight, QTensor) == ("quantize" in PASSES[name])
    if "int8" in name or "fp8" in name:
        assert small.weights_bytes < (0.14 if "shrink" in name else 0.27) * net.weights_bytes
    if "shrink" in PASSES[name]:
        metrics = next(report.metrics for report in small.history if report.name == "shrink")
        assert 0.2 < metrics["flops_after"] / metrics["flops_before"] <= 0.5  # in steps of eight channels
    assert set(small.masks) == (set(KERNELS) if name in SPARSITY else set())
    if name in SPARSITY:
        dropped = sum(int(np.sum(~np.asarray(mask))) for mask in small.masks.values())
        assert dropped == round(SPARSITY[name] * sum(mask.size for mask in small.masks.values()))
        for path in KERNELS:
            weight = small.weights[path]
            values = weight.dequantize() if isinstance(weight, QTensor) else weight
            assert np.sum(np.asarray(values) == 0) >= np.sum(~np.asarray(small.masks[path]))


@pytest.mark.parametrize("name", ["int8", "int4-weight-only", "fp8"])
def test_a_preset_with_data_loses_less(net, images, name):
    recipe = preset(name, measure=False)
    small = optimize(net, recipe, calibration=[{"image": images}])
    assert [report.name for report in small.history] == PASSES[name]
    assert error(small, net, images) < 0.9 * error(optimize(net, recipe), net, images)


def test_measured_for_real(net, images):
    lines = []
    small = optimize(net, Recipe.load("int8"), buckets={"batch": (1, 4)}, progress=lines.append)
    report = small.history[-1]
    assert {site.site for site in report.sites} == set(KERNELS)
    for site in report.sites:
        assert [timing["sizes"] for timing in site.metrics["timings"]] == [{"batch": 1}, {"batch": 4}]
        assert site.action in ("int8 x int8", "int8 weights")
        assert bool(site.reason) == (site.action == "int8 weights")
    assert lines[:3] == ["precompute", "fold", f"quantize {KERNELS[0]}"]
    assert 1e-4 < error(small, net, images) < 0.05


STATIC = '[[quantize]]\nsites = ".*"\ndynamic = false\ncalibration = "percentile:99.99"'


def test_static_scales_from_calibration(net, images):
    recipe = Recipe.parse("measure = false\n[[prune]]\nsites = '.*'\nsparsity = 0.2\n" + STATIC, name="static")
    small = optimize(net, recipe, calibration=iter([{"image": images[:8]}, {"image": images[8:]}]))
    assert [report.name for report in small.history] == ["fold", "prune", "calibrate", "quantize"]
    ranges = {site.site: site.metrics["absmax"] for site in small.history[2].sites}
    assert set(ranges) == set(KERNELS)
    for path in KERNELS:
        np.testing.assert_allclose(small.weights[path + ":act_absmax"], ranges[path])
    float_pruned = optimize(net, Recipe.parse("[[prune]]\nsites = '.*'\nsparsity = 0.2", name="pruned"))
    assert 1e-4 < error(small, float_pruned, images) < 0.08


@pytest.mark.parametrize("calibration", [None, [], [{"picture": 1}]])
def test_static_scales_need_data(net, calibration):
    with pytest.raises(CalibrationError, match="calibration"):
        optimize(net, Recipe.parse("measure = false\n" + STATIC, name="static"), calibration=calibration)


def test_the_two_halves_are_the_whole(net, images):
    recipe = preset("int8-prune50", measure=False)
    folded, plan = plan_for(net, recipe)
    assert [report.name for report in folded.history] == ["fold"]
    assert [planned.site.name for planned in plan.sites] == KERNELS
    halves, whole = apply_plan(folded, plan), optimize(net, recipe)
    np.testing.assert_array_equal(run(halves, images), run(whole, images))


def test_without_folding_the_norms_stay(net, images):
    small = optimize(net, preset("int8", measure=False, fold=False))
    assert [report.name for report in small.history] == ["skipped", "quantize"]
    assert [path for path in small.weights if "batch_stats" in path]
    assert 1e-4 < error(small, net, images) < 0.05


def test_a_recipe_that_asks_for_nothing_folds_only(net, images):
    small = optimize(net, Recipe.parse("", name="nothing"))
    assert [report.name for report in small.history] == ["fold"]
    np.testing.assert_allclose(run(small, images), run(net, images), rtol=0, atol=1e-5)


def test_what_is_kept_everywhere_is_in_the_reports():
    program = trace(
        lambda w, ids: jnp.take(w["table"], ids, axis=0), {"table": array(9, 4)}, {"ids": TensorSpec(("b",), "int32")}
    )
    small = optimize(program, Recipe.load("int8-prune50"), buckets={"b": (2,)})
    assert [report.name for report in small.history] == ["fold", "prune", "quantize"]
    assert [(site.action, site.reason) for report in small.history[1:] for site in report.sites] == [
        ("kept", "an embedding"),
        ("int8 weights", ""),
    ]
    with pytest.raises(UnsupportedError, match="table"):
        optimize(program, preset("int8-prune50", on_unsupported="error"))


def test_a_recipe_that_does_not_fit(net):
    with pytest.raises(RecipeError, match="matches none of the program's 4 sites"):
        optimize(net, Recipe.parse('[[quantize]]\nsites = "Dense.*"', name="wrong"))


def test_grid():
    specs = {"a": TensorSpec(("batch", "seq"), "int32"), "b": TensorSpec(("batch",), "float32")}
    program = trace(lambda w, a, b: b * w["w"] + a.sum(1).astype(jnp.float32), {"w": jnp.float32(2)}, specs)
    assert grid(program, {"seq": (16,), "batch": (1, 8)}) == [{"batch": 1, "seq": 16}, {"batch": 8, "seq": 16}]
    assert grid(program, {"seq": (3, 4)}) == [
        {"batch": size, "seq": seq} for size in pipeline.DEFAULT_SIZES for seq in (3, 4)
    ]
    fixed = trace(lambda w, x: x * w["w"], {"w": jnp.float32(2)}, {"x": TensorSpec((3,), "float32")})
    assert grid(fixed, None) == [{}]


@pytest.mark.parametrize(
    ("buckets", "message"), [({"bach": (1,)}, "'bach'"), ({"batch": ()}, "'batch'"), ({"batch": (0,)}, "'batch'")]
)
def test_buckets_that_do_not_fit(net, buckets, message):
    with pytest.raises(CompileError, match=message):
        optimize(net, Recipe.load("int8"), buckets=buckets)


# What cannot be used is said in one line, whichever step meets it.

NEED_DATA = {
    "static": ("", "dynamic = false"),
    "searched": ("", "dynamic = false\ncalibration = 'mse'"),
    "gptq": ("rounding = 'gptq'", ""),
    "smooth": ("rescale = 'smooth:0.5'", ""),
    "awq": ("rescale = 'awq'", ""),
    "bias": ("correct_bias = true", ""),
}


def dense(fn=None, **weights):
    fn = fn or (lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"])
    given = {"up": array(6, 8), "down": array(8, 3)} | weights
    return trace(fn, given, {"x": TensorSpec(("batch", 6), "float32")})


def with_need(need, rules=""):
    top, keys = NEED_DATA[need]
    return Recipe.parse(f"measure = false\n{top}\n[[quantize]]\nsites = '.*'\n{keys}\n{rules}", name="need")


X = np.asarray(array(4, 6))


BAD_DATA = {  # what is said -> of what
    "recipe 'need' has .*needs? calibration data": None,
    "calibration data is empty": (),
    "calibration data is a int, not a list of batches": 3,
    "calibration data is a str, not a list of batches": "x",
    "calibration data is a dict, not a list of batches": {"x": X},
    "calibration batch 0 is a ndarray, not a dict": X,
    r"calibration batch 0 has inputs \[\]; the program takes \['x'\]": [{}],
    r"calibration batch 0 has inputs \['y'\]": [{"y": X}],
    r"calibration batch 0 has inputs \['x', 'y'\]": [{"x": X, "y": X}],
    r"expected float32\[batch, 6\], got float32\[6\]": [{"x": X[0]}],
    r"got float32\[4, 5\]": [{"x": X[:, :5]}],
    r"got float64\[4, 6\]": [{"x": X.astype(np.float64)}],
    r"got bool\[4, 6\]": [{"x": X > 0}],
    r"got <U1\[1, 6\]": [{"x": [["a"] * 6]}],
    "input 'x' is not an array": [{"x": [[1.0], [1.0, 2.0]]}],
    "input 'x' is empty": [{"x": X[:0]}],
    "calibration batch 1, input 'x' holds NaN or infinity": [{"x": X}, {"x": X * np.nan}],
}


@pytest.mark.parametrize(("message", "need"), pairs(BAD_DATA, NEED_DATA, whole=list(BAD_DATA)[:2]))
def test_calibration_data_that_cannot_be_used(message, need):
    data = BAD_DATA[message]
    with pytest.raises(CalibrationError, match=message) as caught:
        optimize(dense(), with_need(need), calibration=data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("need", NEED_DATA)
def test_an_infinite_activation(need):
    program = dense(lambda w, x: jnp.tanh((x * 1e30 * 1e30) @ w["up"]) @ w["down"])
    with pytest.raises(CalibrationError, match="the activation of site 'up' is not finite on the calibration data"):
        optimize(program, with_need(need), calibration=[{"x": X}])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("top", ["", "equalize = true", "rounding = 'gptq'", "rescale = 'awq'", "cast = 'float16'"])
def test_a_weight_that_is_not_finite(top, broken):
    recipe = Recipe.parse(f"measure = false\n{top}\n[[quantize]]\nsites = '.*'\nweight_range = 'mse'", name="r")
    program = dense(down=array(8, 3).at[2, 1].set(broken))
    with pytest.raises(ModelError, match=r"'down' .*not finite|'down' cannot be quantized: it holds NaN or infinity"):
        optimize(program, recipe, calibration=[{"x": X}])


TOPS = ["", *(top for top, _ in NEED_DATA.values() if top), "equalize = true"]
RULES = [
    "",
    "weights = 'int4'\nactivations = 'none'\ngranularity = 'group:~3'\nweight_range = 'mse'",
    "weights = 'uint4'\nactivations = 'none'\nweight_range = 'mse'",
    "weights = 'nf4'\nactivations = 'none'",
]


@pytest.mark.parametrize(("top", "rules"), pairs(TOPS, RULES, whole=("", "rounding = 'gptq'")))
def test_a_channel_of_zeros(top, rules):
    program = dense(up=array(6, 8).at[:, 2].set(0))
    recipe = Recipe.parse(f"measure = false\n{top}\n[[quantize]]\nsites = '.*'\n{rules}", name="zeros")
    small = optimize(program, recipe, calibration=[{"x": X}])
    stored = small.weights["up"]
    np.testing.assert_array_equal(stored.dequantize()[:, 2], 0)
    np.testing.assert_array_equal(np.asarray(stored.scale, np.float32)[:, 2], 1)
    assert np.isfinite(run(small, X)).all()


def test_a_recipe_made_in_python_is_checked_too(net):
    rules = Recipe.parse('[[quantize]]\nsites = ".*"', name="python").quantize
    for change, message in [
        ({"weights": "int3"}, r"quantize\[0\].weights = 'int3': expected one of int8, int4, "),
        ({"weights": "nf4"}, r"quantize\[0\].activations = 'int8': there is no quantized product with weights = 'nf4'"),
        ({"granularity": "row"}, r"quantize\[0\].granularity"),
        ({"sites": "("}, r"quantize\[0\].sites = '\(' is not a regular expression"),
    ]:
        changed = tuple(msgspec.structs.replace(rule, **change) for rule in rules)
        with pytest.raises(RecipeError, match=f"recipe 'python': .*{message}"):
            optimize(net, Recipe(name="python", quantize=changed))
    with pytest.raises(
        RecipeError, match=r"optimize: recipe = 'int8' is a str, not a Recipe; Recipe.load and Recipe.parse read one"
    ):
        optimize(net, "int8")
