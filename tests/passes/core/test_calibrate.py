"""Calibrated ranges compared with NumPy, inside and outside of control flow; unusable batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from lepton_xla.errors import CalibrationError
from lepton_xla.passes import calibrate, find_sites
from lepton_xla.passes.core.plans import Plan, SitePlan
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import FORMATS
from lepton_xla.quant.observers import BINS, Histogram, estimate_range
from lepton_xla.recipe import Recipe

INT8 = FORMATS["int8"]

ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def batches(number=3, rows=5):
    return [{"x": array(rows + k, 6, seed=10 + k)} for k in range(number)]


def ranges(program, data, calibration="absmax", aggregate="pooled", *, shared=False):
    text = f'[[quantize]]\nsites = ".*"\ndynamic = false\ncalibration = "{calibration}"\naggregate = "{aggregate}"'
    plan = resolve(Recipe.parse(text, name="static"), program) if not shared else shared_plan(program, text)
    return calibrate(program, plan, data)


def shared_plan(program, text):
    """A plan of sites inside shard_map, which are not stored as integers but can be trained with static scales."""
    recipe = Recipe.parse(text, name="static")
    return Plan(recipe, tuple(SitePlan(site, None, recipe.quantize[0]) for site in find_sites(program)))


def two_layers():
    return trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": array(6, 8), "b": array(8, 3, seed=1)}, ROWS)


def activations(program, data):
    """What meets `a` and what meets `b`, batch by batch, in NumPy."""
    inputs = [np.asarray(batch["x"], np.float32) for batch in data]
    return inputs, [np.asarray(jnp.tanh(x @ program.weights["a"])) for x in inputs]


@pytest.mark.parametrize("calibration", ["absmax", "percentile:100", "percentile:99.5", "percentile:50"])
def test_ranges_of_batches_and_of_all_they_hold(calibration):
    program, data = two_layers(), batches()
    percentile = float(calibration.partition(":")[2] or 100)

    def joined(aggregate, values, method):
        ranges = [np.percentile(np.abs(value), percentile, method=method) for value in values]
        if aggregate == "pooled":
            return np.percentile(np.abs(np.concatenate([value.ravel() for value in values])), percentile, method=method)
        if aggregate == "ema:0.75":
            return 0.75 * (0.75 * ranges[0] + 0.25 * ranges[1]) + 0.25 * ranges[2]
        return {"max": np.max, "mean": np.mean}[aggregate](ranges)

    for aggregate in ("pooled", "max", "mean", "ema:0.75"):
        found = ranges(program, iter(data), calibration, aggregate)
        assert list(found) == ["a", "b"]
        for name, values in zip("ab", activations(program, data), strict=True):
            assert found[name].shape == ()
            assert found[name].dtype == jnp.float32
            # A bin is at most 1/1024 of the largest value.
            width = 1e-6 if percentile == 100 else max(np.abs(value).max() for value in values) / 1024
            assert joined(aggregate, values, "lower") - width <= found[name]
            assert found[name] <= joined(aggregate, values, "higher") + width


def reference_histogram(values):
    """Counted in float64, at the smallest power of two that is above all of them."""
    magnitudes = np.abs(np.asarray(values, np.float64))
    exponent = int(np.frexp(magnitudes.max())[1])
    index = np.floor(magnitudes / 2.0**exponent * BINS).astype(int)[magnitudes > 0]
    counts = np.bincount(index, minlength=BINS)
    return Histogram(exponent + 126, int(np.sum(magnitudes == 0)), counts, magnitudes.max())


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile:97"])
def test_growing_ranges_are_judged_in_one_pass(method):
    program = two_layers()
    data = [{"x": batch["x"] * scale} for batch, scale in zip(batches(5, 40), (1, 0.01, 300, 2, 40), strict=True)]
    expected = [
        estimate_range(method, reference_histogram(np.concatenate([value.ravel() for value in values])), INT8)
        for values in activations(program, data)
    ]
    found = ranges(program, iter(data), method)
    np.testing.assert_allclose([found["a"], found["b"]], expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile:97"])
def test_ranges_of_each_batch_are_as_fine_whatever_came_before(method):
    program = two_layers()
    data = [{"x": batch["x"] * scale} for batch, scale in zip(batches(3, 40), (1e4, 1, 0.01), strict=True)]
    expected = [
        np.mean([estimate_range(method, reference_histogram(value), INT8) for value in values])
        for values in activations(program, data)
    ]
    found = ranges(program, iter(data), method, "mean")
    np.testing.assert_allclose([found["a"], found["b"]], expected, rtol=1e-6)


def test_a_batch_runs_once_when_its_range_is_known():
    runs = []

    def fn(w, x):
        jax.debug.callback(lambda: runs.append(1))
        return x @ w["w"]

    program = trace(fn, {"w": array(6, 3)}, ROWS)
    ranges(program, [{"x": array(5, 6)}] * 4, "mse")
    jax.effects_barrier()
    assert len(runs) == 5  # the first is run again, at the level it turned out to need


def all_of_it(values):
    return estimate_range("mse", reference_histogram(np.concatenate([np.ravel(value) for value in values])), INT8)


def whole(*shape, seed=0, top=9):
    """Whole numbers, on which arithmetic is exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-top, top + 1, shape), jnp.float32)


def whole_layer(x, w):
    return jnp.clip(x @ w, -40, 40)


def whole_batches(number):
    return [{"x": whole(5 + k, 6, seed=20 + k)} for k in range(number)]


def test_histograms_leave_scan_one_a_step():
    def fn(w, x):
        def over_layers(x, _):
            return lax.scan(lambda x, w: (whole_layer(x, w), None), x, w["stack"])[0], None

        return lax.scan(over_layers, x, None, length=2)[0]

    stack = whole(3, 6, 6, top=1)
    data = whole_batches(2)
    seen = [[], [], []]
    for batch in data:
        x = batch["x"]
        for step in (0, 1, 2, 0, 1, 2):
            seen[step].append(np.asarray(x))
            x = whole_layer(x, stack[step])
    found = ranges(trace(fn, {"stack": stack}, ROWS), data, "mse")["stack"]
    np.testing.assert_allclose(found, [all_of_it(values) for values in seen], rtol=1e-6)


def test_histograms_leave_while_cond_and_repeated_use():
    def fn(w, x):
        x = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, whole_layer(s[1], w["loop"])), (0, x))[1]
        return lax.cond(x[0, 0] > 0, lambda: x @ w["yes"], lambda: x @ w["no"])

    weights = {"loop": whole(6, 6, top=1), "yes": array(6, 3, seed=2), "no": array(6, 3, seed=3)}
    data = [{"x": sign * batch["x"]} for batch in whole_batches(6) for sign in (1, -1)]
    seen = {"loop": [], "yes": [], "no": []}
    for batch in data:
        x = batch["x"]
        for _ in range(3):
            seen["loop"].append(np.asarray(x))
            x = whole_layer(x, weights["loop"])
        seen["yes" if x[0, 0] > 0 else "no"].append(np.asarray(x))
    found = ranges(trace(fn, weights, ROWS), data, "mse")
    for name, values in seen.items():
        np.testing.assert_allclose(found[name], all_of_it(values), rtol=1e-6)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
@pytest.mark.parametrize("check_vma", [True, False])
def test_histograms_leave_shard_map_whole(spec, check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, x):
        def body(w, x):
            product = jnp.maximum(x, -2) @ w
            return lax.psum(product, "x") if spec == P(None, "x") else product

        specs = (P("x") if spec == P(None, "x") else P(), spec)
        out = P("x") if spec == P("x") else P()
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check_vma)(w["w"], x)

    program = trace(fn, {"w": array(6, 3)}, ROWS)
    data = [{"x": array(8, 6, seed=k)} for k in range(3)]
    found = ranges(program, data, "mse", shared=True)["w"]
    np.testing.assert_allclose(found, all_of_it([np.maximum(batch["x"], -2) for batch in data]), rtol=1e-6)


def test_sharded_inputs_have_one_histogram():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("x"))

    def fn(w, x):
        return lax.with_sharding_constraint(x, sharding) @ w["w"]

    data = [{"x": array(8, 6, seed=k)} for k in range(3)]
    found = ranges(trace(fn, {"w": array(6, 3)}, ROWS), data, "mse")["w"]
    np.testing.assert_allclose(found, all_of_it([batch["x"] for batch in data]), rtol=1e-6)


def test_inputs_sharded_by_type_have_one_histogram():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):

        def fn(w, x):
            return jax.sharding.reshard(x, P("x")) @ w["w"]

        data = [{"x": array(8, 6, seed=k)} for k in range(3)]
        found = ranges(trace(fn, {"w": array(6, 3)}, ROWS), data, "mse")["w"]
    np.testing.assert_allclose(found, all_of_it([batch["x"] for batch in data]), rtol=1e-6)


def test_a_percentile_that_falls_on_zeros():
    program = trace(lambda w, x: jnp.maximum(x, 0) @ w["w"], {"w": array(6, 3)}, ROWS)
    assert ranges(program, batches(), "percentile:99")["w"] > 0
    with pytest.raises(CalibrationError, match=r"site 'w' has no range .*so many that percentile:20 falls on them"):
        ranges(program, batches(), "percentile:20")


def test_only_static_sites_are_measured():
    program = two_layers()
    text = '[[quantize]]\nsites = "a"\ndynamic = false\n[[quantize]]\nsites = "b"\n'
    assert set(calibrate(program, resolve(Recipe.parse(text, name="t"), program), batches())) == {"a"}


def test_narrow_models_have_float32_ranges():
    spec = {"x": TensorSpec(("batch", 6), "bfloat16")}
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 4).astype(jnp.bfloat16)}, spec)
    data = [{"x": array(5, 6).astype(jnp.bfloat16)}]
    found = ranges(program, data)["w"]
    assert found.dtype == jnp.float32
    assert found == np.abs(np.asarray(data[0]["x"], np.float32)).max()


def layer(x, w):
    return 1.5 * jnp.sin(x @ w)


def steps_seen(x, stack, times=1):
    """The largest input of each layer, the whole stack run several times."""
    seen = np.zeros(len(stack))
    for _ in range(times):
        for step, w in enumerate(stack):
            seen[step] = max(seen[step], np.abs(x).max())
            x = np.asarray(layer(x, w))
    return seen


@pytest.mark.parametrize("reverse", [False, True])
def test_one_range_a_step(reverse):
    def fn(w, x):
        return lax.scan(lambda x, w: (layer(x, w), None), x, w["stack"], reverse=reverse)[0]

    stack = array(3, 6, 6)
    found = ranges(trace(fn, {"stack": stack}, ROWS), batches(2))["stack"]
    order = stack[::-1] if reverse else stack
    expected = np.max([steps_seen(batch["x"], order) for batch in batches(2)], axis=0)
    np.testing.assert_allclose(found, expected[::-1] if reverse else expected, rtol=1e-5)


@pytest.mark.parametrize("stacked_inside", [True, False])
def test_two_scans_of_which_one_steps_over_the_weight(stacked_inside):
    def fn(w, x):
        def over_layers(x, _):
            return lax.scan(lambda x, w: (layer(x, w), None), x, w["stack"])[0], None

        def over_time(x, w):
            return lax.scan(lambda x, _: (layer(x, w), None), x, None, length=4)[0], None

        if stacked_inside:
            return lax.scan(over_layers, x, None, length=4)[0]
        return lax.scan(over_time, x, w["stack"])[0]

    stack = array(3, 6, 6)
    (batch,) = batches(1)
    found = ranges(trace(fn, {"stack": stack}, ROWS), [batch])["stack"]
    if stacked_inside:
        expected = steps_seen(batch["x"], stack, times=4)
    else:
        expected = np.max(steps_seen(batch["x"], [w for w in stack for _ in range(4)]).reshape(3, 4), axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_two_stacked_axes():
    def fn(w, x):
        def outer(x, w):
            return lax.scan(lambda x, w: (layer(x, w), None), x, w)[0], None

        return lax.scan(outer, x, w["stack"])[0]

    stack = array(2, 3, 6, 6)
    (batch,) = batches(1)
    found = ranges(trace(fn, {"stack": stack}, ROWS), [batch])["stack"]
    expected = steps_seen(batch["x"], stack.reshape(6, 6, 6)).reshape(2, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_weight_that_no_scan_steps_over_has_one_range():
    def fn(w, x):
        return lax.scan(lambda x, _: (layer(x, w["w"]), None), x, None, length=4)[0]

    w = array(6, 6)
    (batch,) = batches(1)
    found = ranges(trace(fn, {"w": w}, ROWS), [batch])["w"]
    assert found.shape == ()
    np.testing.assert_allclose(found, steps_seen(batch["x"], [w] * 4).max(), rtol=1e-5)


def test_while_takes_the_largest():
    def fn(w, x):
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, layer(s[1], w["w"]) * 3.0), (0, x))[1]

    w = array(6, 6)
    (batch,) = batches(1)
    expected, x = 0.0, batch["x"]
    for _ in range(3):
        expected, x = max(expected, np.abs(x).max()), 3.0 * layer(x, w)
    np.testing.assert_allclose(ranges(trace(fn, {"w": w}, ROWS), [batch])["w"], expected, rtol=1e-5)


def branching(w, x):
    return lax.cond(x[0, 0] > 0, lambda: x @ w["yes"], lambda: x @ w["no"])


def test_a_branch_that_no_batch_takes():
    program = trace(branching, {"yes": array(6, 3), "no": array(6, 3)}, ROWS)
    positive, negative = ({"x": array(4, 6).at[0, 0].set(sign)} for sign in (1.0, -1.0))
    with pytest.raises(CalibrationError, match=r"site 'no' has no range .* not reached"):
        ranges(program, [positive])
    found = ranges(program, [positive, {"x": 2 * negative["x"]}])
    np.testing.assert_allclose(found["no"], 2 * np.abs(negative["x"]).max())
    np.testing.assert_allclose(found["yes"], np.abs(positive["x"]).max())


def test_zeros_give_no_range():
    with pytest.raises(CalibrationError, match="site 'a' has no range"):
        ranges(two_layers(), [{"x": jnp.zeros((3, 6))}])

    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.maximum(x @ w, 0), None), x, w["stack"])[0]

    dead = trace(fn, {"stack": array(3, 6, 6).at[0].set(0)}, ROWS)
    with pytest.raises(CalibrationError, match=r"site 'stack' has no range .*at step 1, 2 of its scan"):
        ranges(dead, batches(1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration data is empty"),
        (iter(()), "calibration data is empty"),
        (None, "calibration data is a NoneType, not a list of batches"),
        ({"x": array(3, 6)}, "calibration data is a dict, not a list of batches"),
        (["x"], "batch 0 is a str, not a dict"),
        ([array(3, 6)], "batch 0 is a .*, not a dict"),
        ([{"y": array(3, 6)}], r"batch 0 has inputs \['y'\]; the program takes \['x'\]"),
        ([{"x": array(3, 6), 1: 2}], r"has inputs \['1', 'x'\]"),
        ([{}], r"has inputs \[\]"),
        ([{"x": np.zeros((3, 6))}], r"expected float32\[batch, 6\], got float64\[3, 6\]"),
        ([{"x": np.zeros((3, 6), np.int32)}], "got int32"),
        ([{"x": [[1.0] * 6]}], "got float64"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "input 'x' is not an array"),
        ([{"x": np.zeros(6, np.float32)}], r"got float32\[6\]"),
        ([{"x": np.zeros((3, 7), np.float32)}], r"got float32\[3, 7\]"),
        ([{"x": np.zeros((0, 6), np.float32)}], "input 'x' is empty"),
        ([{"x": array(3, 6).at[1, 1].set(jnp.nan)}], "holds NaN or infinity"),
        ([{"x": array(3, 6)}, {"x": array(3, 6).at[1, 1].set(-jnp.inf)}], "batch 1, input 'x' holds NaN"),
        ([{"x": array(3, 6) * 1e38}], "the activation of site 'b' is not finite"),
    ],
)
def test_data_that_cannot_be_used(data, message):
    # The second product overflows for huge inputs only.
    program = trace(lambda w, x: (x * 1e3 @ w["a"]) @ w["b"], {"a": array(6, 8), "b": array(8, 3)}, ROWS)
    if "site 'b'" in message:
        program = trace(lambda w, x: (x @ w["a"]) @ w["b"], {"a": 100 * array(6, 8), "b": array(8, 3)}, ROWS)
    with pytest.raises(CalibrationError, match=message) as caught:
        ranges(program, data)
    assert "\n" not in str(caught.value)


def test_sizes_of_one_name_must_agree_within_a_batch():
    specs = {"x": TensorSpec(("batch", 6), "float32"), "y": TensorSpec(("batch", 6), "float32")}
    program = trace(lambda w, x, y: (x + y) @ w["w"], {"w": array(6, 3)}, specs)
    with pytest.raises(CalibrationError, match=r"input 'y': expected float32\[batch, 6\], got float32\[4, 6\]"):
        ranges(program, [{"x": array(3, 6), "y": array(4, 6)}])
    found = ranges(program, [{"y": array(n, 6), "x": array(n, 6)} for n in (3, 4)])
    np.testing.assert_allclose(found["w"], 2 * np.abs(array(4, 6)).max(), rtol=1e-6)


def test_weights_are_arguments_not_constants():
    program = two_layers()
    assert jax.tree.structure(ranges(program, batches())) == jax.tree.structure({"a": 0, "b": 0})
