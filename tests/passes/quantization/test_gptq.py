"""GPTQ compared with the algorithm in NumPy float64, and with rounding to nearest."""

import contextlib
import functools
import importlib
import threading

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.errors import LeptonError, ModelError, RecipeError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.gptq import Options, gptq, gptq_values
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.passes.quantization.rounding import nearest, round_to_nearest
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import FORMATS, QTensor
from lepton_xla.quant import quantize as quantize_matrix
from lepton_xla.quant.grid import Grid, make_grid, matrix_codes
from lepton_xla.recipe import Recipe

module = importlib.import_module("lepton_xla.passes.quantization.gptq")
DEPTH = 24
ROWS = {"x": TensorSpec(("batch", DEPTH), "float32")}
INT8 = Recipe.parse("[[quantize]]\nsites = '.*'\nactivations = 'none'", name="int8")


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def correlated(rows, depth=DEPTH, seed=0):
    """Inputs whose columns go together, of magnitudes that differ."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, depth // 3)) @ rng.standard_normal((depth // 3, depth))
    return (mixed + 0.1 * rng.standard_normal((rows, depth))) * np.exp(rng.standard_normal(depth))


def problem(depth=DEPTH, columns=7, seed=0):
    x = correlated(200, depth, seed)
    return np.random.default_rng(seed + 1).standard_normal((depth, columns)), x.T @ x


def reference(weight, gram, bits, symmetric, group, act_order, damping):
    """Algorithm 1 of the paper, one row at a time, with an explicit inverse; scales from the weight as it is."""
    depth = weight.shape[0]
    group = group or depth
    codes, scales, zeros = np.zeros(weight.shape), np.zeros(weight.shape), np.zeros(weight.shape)
    stored = ml_dtypes.bfloat16 if group != depth else np.float32
    for start in range(0, depth, group):
        part = weight[start : start + group]
        if symmetric:
            scales[start : start + group] = (np.abs(part).max(0) / (2 ** (bits - 1) - 1)).astype(stored)
        else:
            low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
            scales[start : start + group] = ((high - low) / (2**bits - 1)).astype(stored)
            zeros[start : start + group] = np.rint(-low / scales[start])
    low, high = {8: (-127, 127), 4: (-8, 7)}[bits] if symmetric else (0, 2**bits - 1)
    damped = gram + damping * np.mean(np.diag(gram)) * np.eye(depth)
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(depth)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    rest = weight[order].copy()
    for step, row in enumerate(order):
        codes[row] = np.clip(np.rint(rest[step] / scales[row] + zeros[row]), low, high)
        error = (rest[step] - (codes[row] - zeros[row]) * scales[row]) / upper[step, step]
        rest[step:] -= np.outer(upper[step, step:], error)
    return codes, scales[::group], zeros[::group]


def output_error(gram, difference):
    return np.sqrt(np.trace(difference.T @ gram @ difference))


VARIANTS = [
    (4, True, 0, True, 128),
    (4, True, 8, False, 5),
    (4, False, 8, True, 8),
    (4, False, 0, False, 24),
    (8, True, 8, True, 8),
    (8, False, 0, True, 5),
]


def gptq_codes(weight, gram, *, bits=4, symmetric=True, group=0, act_order=True, damping=0.01, block=32):
    target = FORMATS[f"{'int' if symmetric else 'uint'}{bits}"]
    grid = make_grid(weight, target, f"group:{group}" if group else "channel")
    values = gptq_values(weight, gram, grid, target, Options(act_order, damping, block))
    return matrix_codes(values, grid, target).astype(jnp.int32), grid.scale, grid.zero_point


@pytest.mark.parametrize(("bits", "symmetric", "group", "act_order", "block"), VARIANTS)
def test_codes_are_those_of_the_paper(bits, symmetric, group, act_order, block):
    weight, gram = problem()
    weight = weight.astype(np.float32).astype(np.float64)
    want, scale, zero = reference(weight, gram, bits, symmetric, group, act_order, 0.01)
    run = functools.partial(
        gptq_codes, bits=bits, symmetric=symmetric, group=group, act_order=act_order, damping=0.01, block=block
    )
    with jax.enable_x64(True):
        got = jax.jit(run)(jnp.asarray(weight), jnp.asarray(gram))
        codes, scales, zeros = (None if part is None else np.asarray(part) for part in got)
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_allclose(scales.astype(np.float64), scale, rtol=1e-6)
    np.testing.assert_array_equal(np.zeros_like(zero) if zeros is None else zeros, zero)
    # In float32 a code near a tie may fall to the other side, and those after it make up for it.
    narrow = jax.jit(run)(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32))[0]
    assert np.mean(np.asarray(narrow) != want) < 0.02
    step = np.repeat(scale, DEPTH // scale.shape[0], 0)
    base = np.repeat(zero, DEPTH // zero.shape[0], 0)
    errors = [output_error(gram, weight - (np.asarray(some) - base) * step) for some in (narrow, want)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=2e-2)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_errs_less_than_rounding_to_nearest(bits, act_order):
    for seed in range(3):
        weight, gram = problem(48, 16, seed)
        codes, scale, _ = gptq_codes(
            jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32), bits=bits, act_order=act_order
        )
        scale = np.asarray(scale, np.float64)
        nearest = np.rint(weight / scale) * scale
        errors = [output_error(gram, weight - some) for some in (np.asarray(codes) * scale, nearest)]
        assert errors[0] < 0.9 * errors[1]


def test_rows_are_taken_in_the_order_of_their_inputs():
    # With act-order the largest input's row is rounded first, so to nearest.
    weight, gram = problem()
    largest = int(np.argmax(np.diag(gram)))
    codes, scale, _ = gptq_codes(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32), act_order=True)
    np.testing.assert_array_equal(codes[largest], np.rint(weight[largest] / np.asarray(scale[0])))
    moved, _, _ = gptq_codes(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32), act_order=False)
    np.testing.assert_array_equal(moved[0], np.rint(weight[0] / np.asarray(scale[0])))
    assert np.any(codes != moved)


def test_vmapped():
    problems = [problem(seed=seed) for seed in range(3)]
    weights, grams = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*problems, strict=True))
    run = functools.partial(gptq_codes, group=8, symmetric=False)
    together = jax.jit(jax.vmap(run))(weights, grams)
    for index in range(3):
        alone = run(weights[index], grams[index])
        assert np.mean(np.asarray(together[0][index]) != np.asarray(alone[0])) < 0.02
        np.testing.assert_allclose(together[1][index], alone[1], rtol=1e-6)


def test_inputs_never_seen_are_rounded_to_nearest():
    weight, gram = problem()
    gram[3] = gram[:, 3] = 0
    codes, scale, _ = gptq_codes(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32))
    np.testing.assert_array_equal(codes[3], np.rint(weight[3] / np.asarray(scale[0])))
    codes, scale, _ = gptq_codes(jnp.asarray(weight, jnp.float32), jnp.zeros((DEPTH, DEPTH)))
    np.testing.assert_array_equal(codes, np.rint(weight / np.asarray(scale)))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_gram_matrix(damping):
    x = correlated(5)  # fewer rows than columns
    weight, gram = problem()[0], x.T @ x
    codes, scale, _ = gptq_codes(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32), damping=damping)
    scale = np.asarray(scale, np.float64)
    assert np.all((codes >= -8) & (codes <= 7))
    errors = [
        output_error(gram, weight - some) for some in (np.asarray(codes) * scale, np.rint(weight / scale) * scale)
    ]
    assert errors[0] < errors[1]


def test_zero_columns_and_pruned_weights_stay_zero():
    weight, gram = problem()
    weight[:, 2] = 0
    _, scale, _ = gptq_codes(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32), symmetric=False)
    assert np.all(np.isfinite(scale))
    assert np.all(np.asarray(scale) > 0)
    mask = np.random.default_rng(5).random(weight.shape) < 0.5
    held, target = jnp.asarray(weight * mask, jnp.float32), FORMATS["int4"]
    grid = make_grid(held, target, "channel")
    values = gptq_values(held, jnp.asarray(gram, jnp.float32), grid, target, Options(), jnp.asarray(mask))
    np.testing.assert_array_equal(np.asarray(values)[~mask], 0)
    np.testing.assert_array_equal(np.asarray(values)[:, 2], 0)
    plain = np.asarray(nearest(held, grid, target), np.float64)
    assert output_error(gram, weight * mask - np.asarray(values)) < output_error(gram, weight * mask - plain)


@pytest.mark.parametrize("name", ["uint8", "fp8_e4m3", "nf4", "codebook8"])
def test_any_format_has_less_error_than_to_nearest(name):
    weight, gram = (jnp.asarray(part, jnp.float32) for part in problem())
    target = FORMATS[name]
    grid = make_grid(weight, target, "channel")
    if grid.codebook is not None:
        grid = Grid(grid.scale, None, grid.codebook)
    values = gptq_values(weight, gram, grid, target)
    np.testing.assert_allclose(nearest(values, grid, target), values, rtol=1e-6)
    errors = [
        output_error(np.asarray(gram), np.asarray(weight - some)) for some in (values, nearest(weight, grid, target))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_groups_that_do_not_divide():
    with pytest.raises(RecipeError, match="'group:7' does not divide the 24 rows"):
        gptq_codes(jnp.ones((24, 3)), jnp.eye(24), group=7)


# The pass.


def assert_on_grid(program, grids, plan):
    """Storing each planned weight at the scale handed over keeps it exactly."""
    planned = {entry.site.path: entry for entry in plan.sites if entry.quantize is not None}
    assert grids.keys() == planned.keys()
    for path, parts in grids.items():
        site, rule = planned[path].site, planned[path].quantize
        values = matrix.as_stored(site, matrix.stored_matrix(site, program.weights[path]))
        stored = quantize_matrix(values, rule.weights, rule.granularity, **parts)
        assert isinstance(stored, QTensor)
        np.testing.assert_array_equal(stored.scale, parts["scale"])
        np.testing.assert_array_equal(stored.dequantize(), values)


def errors_of(program, changed, site_name, x):
    del site_name
    want = np.asarray(program.fn(program.weights, x), np.float64)
    return np.linalg.norm(np.asarray(changed.fn(changed.weights, x), np.float64) - want)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="last")(jnp.tanh(nn.Dense(16, name="first")(x)))


class NNXNet(nnx.Module):
    def __init__(self):
        self.first, self.last = nnx.Linear(DEPTH, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def equinox_program():
    model = eqx.nn.MLP(DEPTH, 5, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    weights, rest = eqx.partition(model, eqx.is_array)
    return trace(lambda weights, x: jax.vmap(eqx.combine(weights, rest))(x), weights, ROWS)


def stacked_program():
    weights = {"w": array(3, DEPTH, DEPTH, seed=3, scale=0.2)}
    return trace(lambda w, x: lax.scan(lambda x, v: (jnp.tanh(x @ v.T), None), x, w["w"])[0], weights, ROWS)


def conv_program(groups=1):
    weights = {"w": array(3, 3, 4 // groups, 8, seed=3)}
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(w, x):
        x = x.reshape(-1, 3, 2, 4)
        return lax.conv_general_dilated(
            x, w["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    return trace(fn, weights, ROWS)


PROGRAMS = {
    "linen": lambda: from_linen(LinenNet(), LinenNet().init(jax.random.key(0), jnp.zeros((1, DEPTH))), ROWS),
    "nnx": lambda: from_nnx(NNXNet(), ROWS),
    "equinox": equinox_program,
    "stacked": stacked_program,
    "conv": conv_program,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_models(name):
    program = PROGRAMS[name]()
    plan = resolve(INT8, program)
    x = jnp.asarray(correlated(64), jnp.float32)
    changed, grids = gptq(program, plan, [{"x": x[:32]}, {"x": x[32:]}])
    assert_on_grid(changed, grids, plan)
    plain, plain_grids = round_to_nearest(program, plan)
    assert_on_grid(plain, plain_grids, plan)
    for path, parts in grids.items():
        np.testing.assert_array_equal(parts["scale"], plain_grids[path]["scale"])
        assert changed.weights[path].shape == program.weights[path].shape
        assert changed.weights[path].dtype == program.weights[path].dtype
    report = changed.history[-1]
    assert report.name == "gptq"
    assert {site.site for site in report.sites} == {entry.site.name for entry in plan.sites}
    for site in report.sites:
        assert 0 < site.metrics["output_error"] <= site.metrics["nearest_output_error"]
    # tanh of large sums is flat, so only whole models that are nearly linear are compared by what they give.
    if name == "conv":
        assert errors_of(program, changed, "w", x) < errors_of(program, plain, "w", x)
        np.testing.assert_allclose(
            errors_of(program, changed, "w", x) / np.linalg.norm(program.fn(program.weights, x)),
            report.sites[0].metrics["output_error"],
            rtol=1e-2,
        )


@pytest.mark.parametrize("feature_groups", [1, 2])
@pytest.mark.parametrize("options", ["", 'weight_range = "mse"'])
def test_groups_over_a_window_are_those_of_the_stored_codes(feature_groups, options):
    program = conv_program(feature_groups)
    rules = f"[[quantize]]\nsites = '.*'\nactivations = 'none'\nweights = 'int4'\ngranularity = 'group:6'\n{options}"
    plan = resolve(Recipe.parse(rules, name="groups"), program)
    x = jnp.asarray(correlated(64), jnp.float32)
    changed, grids = gptq(program, plan, [{"x": x}])
    stored, plain = quantize(changed, plan, scales=grids), quantize(program, plan)
    assert stored.weights["w"].scale.shape == (36 // feature_groups // 6, 8)
    np.testing.assert_array_equal(stored.weights["w"].scale, plain.weights["w"].scale)
    np.testing.assert_array_equal(stored(stored.weights, x), changed(changed.weights, x))
    assert errors_of(program, stored, "w", x) < 0.95 * errors_of(program, plain, "w", x)


def test_each_step_of_a_stack_is_the_core_on_its_own_inputs():
    program = stacked_program()
    x = jnp.asarray(correlated(64), jnp.float32)
    changed, grids = gptq(program, resolve(INT8, program), [{"x": x}])
    state = x
    for step in range(3):
        weight = program.weights["w"][step].T
        want = gptq_values(weight, state.T @ state / 64, Grid(grids["w"]["scale"][step]), FORMATS["int8"])
        got = changed.weights["w"][step].T
        assert np.mean(np.abs(got - want) > 1e-6) < 0.25  # float32 rounding, and columns that nearest serves better
        state = jnp.tanh(state @ weight)


def test_a_weight_used_twice_sees_the_inputs_of_both():
    program = trace(lambda w, x: (x @ w["w"], (x[:, ::-1] * 9) @ w["w"]), {"w": array(DEPTH, 5)}, ROWS)
    x = jnp.asarray(correlated(64), jnp.float32)
    changed, grids = gptq(program, resolve(INT8, program), [{"x": x}])
    rows = np.concatenate([x, x[:, ::-1] * 9]).astype(np.float64)
    gram = jnp.asarray(rows.T @ rows, jnp.float32)
    want = gptq_values(program.weights["w"], gram, Grid(grids["w"]["scale"]), FORMATS["int8"])
    assert np.mean(np.abs(changed.weights["w"] - want) > 1e-6) < 0.05


def test_sequential_sees_what_the_rounded_layers_give():
    program = PROGRAMS["linen"]()
    x = jnp.asarray(correlated(64), jnp.float32)
    plan = resolve(INT8, program)
    once, _ = gptq(program, plan, [{"x": x}])
    changed, grids = gptq(program, plan, [{"x": x}], sequential=True)
    first, last = "params/first/kernel", "params/last/kernel"
    np.testing.assert_array_equal(changed.weights[first], once.weights[first])
    hidden = jnp.tanh(x @ changed.weights[first] + changed.weights["params/first/bias"].reshape(1, -1))
    want = gptq_values(program.weights[last], hidden.T @ hidden, Grid(grids[last]["scale"]), FORMATS["int8"])
    assert np.mean(np.abs(changed.weights[last] - want) > 1e-6) < 0.1


def test_pruned_weights_stay_zero_in_the_pass():
    program = trace(lambda w, x: x @ w["w"], {"w": array(DEPTH, 5)}, ROWS)
    mask = jnp.asarray(np.random.default_rng(1).random((DEPTH, 5)) < 0.4)
    program = program.replace(weights={"w": jnp.where(mask, program.weights["w"], 0)}, masks={"w": mask})
    changed, _ = gptq(program, resolve(INT8, program), [{"x": jnp.asarray(correlated(64), jnp.float32)}])
    np.testing.assert_array_equal(np.asarray(changed.weights["w"])[~np.asarray(mask)], 0)


def test_weights_that_the_data_does_not_reach_are_reported():
    fn = lambda w, x: lax.cond(x[0, 0] > 1e9, lambda x: x @ w["a"], lambda x: x @ w["b"], x)  # noqa: E731
    program = trace(fn, {"a": array(DEPTH, 5), "b": array(DEPTH, 5)}, ROWS)
    plan = resolve(INT8, program)
    changed, _ = gptq(program, plan, [{"x": jnp.ones((2, DEPTH))}])
    reasons = {site.site: site.reason for site in changed.history[-1].sites}
    assert reasons == {"a": "to nearest where the calibration data does not reach it", "b": ""}
    np.testing.assert_array_equal(changed.weights["a"], round_to_nearest(program, plan)[0].weights["a"])


def test_kept_sites_are_in_the_report_and_bad_weights_are_named():
    recipe = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'\nactivations = 'none'", name="lenient")
    program = trace(lambda w, x: (x @ w["w"]) @ (x @ w["w"]).T, {"w": array(DEPTH, 5)}, ROWS)
    changed, _ = gptq(program, resolve(recipe, program), [{"x": jnp.ones((2, DEPTH))}])
    assert [site.action for site in changed.history[-1].sites].count("kept") == 1
    broken = program.replace(weights={"w": program.weights["w"].at[0, 0].set(jnp.nan)})
    with pytest.raises(ModelError, match="the weight of site 'w' is not finite"):
        gptq(broken, resolve(recipe, broken), [{"x": jnp.ones((2, DEPTH))}])
    with pytest.raises(LeptonError, match="calibration data is empty"):
        gptq(program, resolve(recipe, program), [])


def test_groups_in_the_pass():
    recipe = Recipe.parse(
        "[[quantize]]\nsites = '.*'\nactivations = 'none'\nweights = 'uint4'\ngranularity = 'group:8'", name="groups"
    )
    program = PROGRAMS["stacked"]()
    plan = resolve(recipe, program)
    changed, grids = gptq(program, plan, [{"x": jnp.asarray(correlated(64), jnp.float32)}])
    assert grids["w"]["scale"].shape == (3, 3, DEPTH)
    assert_on_grid(changed, grids, plan)
    metrics = changed.history[-1].sites[0].metrics
    assert metrics["output_error"] < 0.6 * metrics["nearest_output_error"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions(groups):
    program = conv_program(groups)
    plan = resolve(INT8, program)
    changed, grids = gptq(program, plan, [{"x": jnp.asarray(correlated(64), jnp.float32)}])
    assert_on_grid(changed, grids, plan)
    want = np.abs(np.asarray(program.weights["w"])).max((0, 1, 2)) / 127
    np.testing.assert_allclose(grids["w"]["scale"][0], want, rtol=1e-6)


def test_an_embedding_is_left_to_what_stores_it():
    recipe = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'\nactivations = 'none'", name="keep")
    program = trace(
        lambda w, x: jnp.take(w["table"], x, axis=0, mode="clip") @ w["w"],
        {"table": array(7, DEPTH), "w": array(DEPTH, 5)},
        {"x": TensorSpec(("batch",), "int32")},
    )
    changed, grids = gptq(program, resolve(recipe, program), [{"x": jnp.arange(7, dtype=jnp.int32)}])
    assert grids.keys() == {"w"}
    np.testing.assert_array_equal(changed.weights["table"], program.weights["table"])
    assert {site.site: site.action for site in changed.history[-1].sites} == {"table": "kept", "w": "int8 gptq"}


@pytest.mark.parametrize("device", [None, 1])
def test_weights_are_rounded_in_threads_only_where_these_have_the_settings_of_the_caller(monkeypatch, device):
    threads = set()
    plain = module._round
    monkeypatch.setattr(module, "_round", lambda *args: threads.add(threading.current_thread()) or plain(*args))
    program = trace(lambda w, x: x @ w["w"], {"w": array(DEPTH, 5)}, ROWS)
    with contextlib.nullcontext() if device is None else jax.default_device(jax.devices()[device]):
        gptq(program, resolve(INT8, program), [{"x": np.asarray(correlated(64), np.float32)}])
    assert (threading.current_thread() in threads) == (device is not None)


def test_a_few_columns_at_a_time_are_rounded_as_all_at_once(monkeypatch):
    mask = jnp.asarray(np.random.default_rng(4).random((DEPTH, 13)) < 0.6)
    weight = jnp.where(mask, array(DEPTH, 13, seed=3), 0)
    program = trace(lambda w, x: x @ w["w"], {"w": weight}, ROWS).replace(masks={"w": mask})
    options = 'weights = "uint4"\nactivations = "none"\ngranularity = "group:4"'
    plan = resolve(Recipe.parse(f"[[quantize]]\nsites = '.*'\n{options}", name="test"), program)
    data = [{"x": np.asarray(correlated(64), np.float32)}]
    whole, _ = gptq(program, plan, data)
    module._better_of_two.clear_cache()
    monkeypatch.setattr(module, "COLUMNS_AT_ONCE", 5)  # the last of three turns overlaps the one before
    parts, _ = gptq(program, plan, data)
    module._better_of_two.clear_cache()
    np.testing.assert_allclose(parts.weights["w"], whole.weights["w"], rtol=1e-6)
    for name in ("output_error", "nearest_output_error"):
        got, wanted = (each.history[-1].sites[0].metrics[name] for each in (parts, whole))
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_rounding_a_wide_weight_takes_few_copies_of_it():
    columns = 20 * module.COLUMNS_AT_ONCE + 1
    weight = jnp.zeros((32, columns))
    program = trace(lambda w, x: x @ w["w"], {"w": weight}, {"x": TensorSpec(("batch", 32), "float32")})
    (planned,) = resolve(INT8, program).sites
    gram = jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)
    ordered = (jax.ShapeDtypeStruct((1, 32), jnp.int32), gram)
    lowered = module._better_of_two.lower(
        weight, gram, ordered, None, like=Alike(planned.site), rule=planned.quantize, options=module.Options()
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 2 * weight.nbytes


def test_gram_matrices_that_fit_the_memory_are_held_at_a_time(monkeypatch):
    held = []
    plain = module._round

    def counted(*args):
        held.append(sum(leaf.shape == (1, DEPTH, DEPTH) for leaf in jax.live_arrays()))
        return plain(*args)

    def fn(w, x):
        for name in "abcd":
            x = jnp.tanh(x @ w[name])
        return x

    program = trace(fn, {name: array(DEPTH, DEPTH, seed=ord(name)) for name in "abcd"}, ROWS)
    plan = resolve(INT8, program)
    data = [{"x": np.asarray(correlated(64), np.float32)}]
    want, _ = gptq(program, plan, data)
    monkeypatch.setattr(module, "_round", counted)
    monkeypatch.setattr(module, "GRAM_LIMIT_BYTES", 2 * 4 * DEPTH**2)
    got, _ = gptq(program, plan, data)
    assert len(held) == 4
    assert max(held) <= 2
    for name in "abcd":
        np.testing.assert_array_equal(got.weights[name], want.weights[name])
