"""Calibrated ranges against NumPy, inside and outside control flow, and batches that cannot be used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_xla.errors import CalibrationError
from lepton_xla.passes import calibrate
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def batches(number=3, rows=5):
    return [{"x": array(rows + k, 6, seed=10 + k)} for k in range(number)]


def ranges(program, data, calibration="absmax"):
    text = f'[[quantize]]\nsites = ".*"\ndynamic = false\ncalibration = "{calibration}"'
    return calibrate(program, Recipe.parse(text, name="static").resolve(program), data)


def two_layers():
    return trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": array(6, 8), "b": array(8, 3, seed=1)}, ROWS)


@pytest.mark.parametrize("calibration", ["absmax", "percentile:100", "percentile:99.5", "percentile:50"])
def test_largest_over_batches(calibration):
    program, data = two_layers(), batches()
    found = ranges(program, iter(data), calibration)
    percentile = float(calibration.partition(":")[2] or 100)
    inputs = [np.asarray(batch["x"], np.float64) for batch in data]
    hidden = [np.tanh(x @ np.asarray(program.weights["a"], np.float64)) for x in inputs]
    assert list(found) == ["a", "b"]
    for name, values in (("a", inputs), ("b", hidden)):
        assert found[name].shape == ()
        assert found[name].dtype == jnp.float32
        expected = max(np.percentile(np.abs(value), percentile) for value in values)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_only_static_sites_are_measured():
    program = two_layers()
    text = '[[quantize]]\nsites = "a"\ndynamic = false\n[[quantize]]\nsites = "b"\n'
    assert set(calibrate(program, Recipe.parse(text, name="t").resolve(program), batches())) == {"a"}


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
        ({"x": array(3, 6)}, "batch 0 is a str, not a dict"),
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
