"""Wanda and SparseGPT compared with the papers' algorithms in NumPy float64, and in recipes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lepton_xla as lx
from lepton_xla.passes import sparsegpt, wanda
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.pruning.sparsegpt import Options, sparsegpt_values
from lepton_xla.passes.pruning.wanda import UNSEEN, wanda_mask
from lepton_xla.recipe.patterns import Pattern

DEPTH = 24
ROWS = {"x": lx.TensorSpec(("batch", DEPTH), "float32")}
PLAIN = Pattern.parse("unstructured")


def correlated(rows, depth=DEPTH, seed=0):
    """Inputs whose columns go together, of magnitudes that differ."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, depth // 3)) @ rng.standard_normal((depth // 3, depth))
    return (mixed + 0.1 * rng.standard_normal((rows, depth))) * np.exp(rng.standard_normal(depth))


def problem(depth=DEPTH, columns=7, seed=0):
    x = correlated(200, depth, seed)
    weight = np.random.default_rng(seed + 1).standard_normal((depth, columns)).astype(np.float32)
    return weight.astype(np.float64), x.T @ x / 200


def smallest_of_each_group(scores, kept, of):
    mask = np.ones(scores.shape, bool)
    for start in range(0, len(scores), of):
        order = np.argsort(scores[start : start + of], axis=0, kind="stable")[: of - kept]
        np.put_along_axis(mask[start : start + of], order, values=False, axis=0)
    return mask


def wanda_of_the_paper(weight, mean_square, sparsity):
    """Algorithm 1: in each output, the smallest |W| times the norm of the input."""
    metric = np.abs(weight) * np.sqrt(mean_square)[:, None]
    mask = np.ones(weight.shape, bool)
    order = np.argsort(metric, axis=0, kind="stable")[: round(sparsity * len(weight))]
    np.put_along_axis(mask, order, values=False, axis=0)
    return mask


def sparsegpt_of_the_paper(weight, gram, sparsity, block, groups=None, damping=0.01):
    """Algorithm 1, one row (the paper's column) at a time, with an explicit inverse."""
    rest, depth = weight.copy(), len(weight)
    dead = np.diag(gram) == 0
    damped = gram + np.diag(dead.astype(float)) + damping * np.mean(np.diag(gram)) * np.eye(depth)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    worth = np.where(dead, 0, 1 / np.diag(upper) ** 2)[:, None]
    mask = np.ones(weight.shape, bool)
    for row in range(depth):
        if groups is None and row % block == 0:
            part = rest[row : row + block] ** 2 * worth[row : row + block]
            ends = [round(sparsity * weight.shape[1] * end) for end in (row, row + len(part))]
            keep = np.ones(part.size, bool)
            keep[np.argsort(part, axis=None, kind="stable")[: ends[1] - ends[0]]] = False
            mask[row : row + block] = keep.reshape(part.shape)
        if groups is not None and row % groups[1] == 0:
            part = rest[row : row + groups[1]] ** 2 * worth[row : row + groups[1]]
            mask[row : row + groups[1]] = smallest_of_each_group(part, *groups)
        value = np.where(mask[row], rest[row], 0)
        rest[row:] -= np.outer(upper[row, row:], (rest[row] - value) / upper[row, row])
        rest[row] = value
    return rest, mask


def output_error(gram, difference):
    return np.sqrt(np.trace(difference.T @ gram @ difference))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_wanda_is_that_of_the_paper(sparsity):
    weight, gram = problem()
    found = wanda_mask(jnp.asarray(weight, jnp.float32), jnp.asarray(np.diag(gram), jnp.float32), PLAIN, sparsity)
    np.testing.assert_array_equal(found, wanda_of_the_paper(weight, np.diag(gram), sparsity))


def test_wanda_in_groups():
    weight, gram = problem()
    found = wanda_mask(
        jnp.asarray(weight, jnp.float32), jnp.asarray(np.diag(gram), jnp.float32), Pattern.parse("2:4"), 0.5
    )
    metric = np.abs(weight) * np.sqrt(np.diag(gram))[:, None]
    np.testing.assert_array_equal(found, smallest_of_each_group(metric, 2, 4))


VARIANTS = [
    ("unstructured", 0.5, 128),
    ("unstructured", 0.7, 5),
    ("unstructured", 0.3, 8),
    ("2:4", 0.5, 128),
    ("1:4", 0.75, 8),
]


@pytest.mark.parametrize(("pattern", "sparsity", "block"), VARIANTS)
def test_sparsegpt_is_that_of_the_paper(pattern, sparsity, block):
    weight, gram = problem()
    groups = None if pattern == "unstructured" else tuple(map(int, pattern.split(":")))
    want, kept = sparsegpt_of_the_paper(weight, gram, sparsity, block, groups)
    run = functools.partial(
        sparsegpt_values, pattern=Pattern.parse(pattern), sparsity=sparsity, options=Options(block=block)
    )
    with jax.enable_x64(True):
        values, mask = (np.asarray(part) for part in jax.jit(run)(jnp.asarray(weight), jnp.asarray(gram)))
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-9)
    assert (~mask).sum() == round(sparsity * weight.size)
    assert (values[~mask] == 0).all()
    # In float32 a choice that is nearly a tie may be another, and the rest makes up for it.
    values, mask = jax.jit(run)(jnp.asarray(weight, jnp.float32), jnp.asarray(gram, jnp.float32))
    assert np.mean(np.asarray(mask) != kept) < 0.02
    errors = [output_error(gram, weight - np.asarray(some, np.float64)) for some in (values, want)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=2e-2)


def test_inputs_never_seen_go_first_and_without_any_magnitudes_decide():
    weight, gram = problem()
    gram[3], gram[:, 3], gram[17], gram[:, 17] = 0, 0, 0, 0
    want, kept = sparsegpt_of_the_paper(weight, gram, 0.5, 128)
    run = functools.partial(sparsegpt_values, pattern=PLAIN, sparsity=0.5)
    with jax.enable_x64(True):
        values, mask = jax.jit(run)(jnp.asarray(weight), jnp.asarray(gram))
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-9)
    assert not kept[[3, 17]].any()
    values, mask = run(jnp.asarray(weight, jnp.float32), jnp.zeros((DEPTH, DEPTH)))
    order = np.argsort(np.abs(weight), axis=None)[: weight.size // 2]
    assert not np.ravel(mask)[order].any()
    np.testing.assert_allclose(values, np.where(mask, weight, 0), rtol=1e-6)


# Programs.


def convolution(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def network(w, x):
    hidden = jax.nn.relu(convolution(x.reshape(-1, 3, 2, 4), w["conv"])).reshape(x.shape[0], -1)
    hidden, _ = lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), hidden, w["stack"])
    return hidden @ w["head"].T


def program():
    weights = {"conv": array(2, 2, 4, 8), "stack": array(2, 16, 16, seed=1, scale=0.4), "head": array(5, 16, seed=2)}
    return lx.trace(network, weights, ROWS)


def data():
    rows = correlated(128).astype(np.float32)
    return [{"x": rows[:64]}, {"x": rows[64:]}]


def recipe(method, rule="sparsity = 0.5", more=""):
    return lx.Recipe.parse(f'{more}\n[[prune]]\nsites = ".*"\nmethod = "{method}"\n{rule}', name="test")


def inputs_of(whole):
    """What meets each weight, as matrices [M, K], in float64: of the convolution, and of each layer."""
    x = np.concatenate([batch["x"] for batch in data()]).astype(np.float64)
    w = {name: np.asarray(leaf, np.float64) for name, leaf in whole.weights.items()}
    image = x.reshape(-1, 3, 2, 4)
    patches = np.stack([image[:, top : top + 2].reshape(len(x), -1) for top in range(2)], 1)  # a window is 2 x 2
    found = {"conv": patches.reshape(-1, 16)}
    hidden = np.maximum(patches @ w["conv"].reshape(16, 8), 0).reshape(len(x), -1)
    for step in range(2):
        found[f"stack/{step}"] = hidden
        hidden = np.tanh(hidden @ w["stack"][step])
    return found | {"head": hidden}


def matrices(weights):
    w = {name: np.asarray(leaf, np.float64) for name, leaf in weights.items()}
    return {"conv": w["conv"].reshape(16, 8), "stack/0": w["stack"][0], "stack/1": w["stack"][1], "head": w["head"].T}


def test_wanda_on_a_program():
    whole = program()
    small = wanda(whole, resolve(recipe("wanda"), whole), data())
    inputs, masks = inputs_of(whole), matrices(small.masks)
    for name, weight in matrices(whole.weights).items():
        want = wanda_of_the_paper(weight, (inputs[name] ** 2).mean(0), 0.5)
        np.testing.assert_array_equal(masks[name] != 0, want)
        np.testing.assert_array_equal(matrices(small.weights)[name], np.where(want, weight, 0))
    assert small.history[-1].name == "wanda"
    assert {line.metrics["sparsity"] for line in small.history[-1].sites} == {0.5}


@pytest.mark.parametrize("rule", ["sparsity = 0.5", 'pattern = "2:4"'])
def test_sparsegpt_on_a_program(rule):
    whole = program()
    small = sparsegpt(whole, resolve(recipe("sparsegpt", rule), whole), data())
    inputs = inputs_of(whole)
    changed = 0.0
    for name, weight in matrices(whole.weights).items():
        gram = inputs[name].T @ inputs[name] / len(inputs[name])
        want, kept = sparsegpt_of_the_paper(weight, gram, 0.5, 128, (2, 4) if "2:4" in rule else None)
        got = matrices(small.weights)[name]
        assert np.mean((got != 0) != kept) < 0.03
        np.testing.assert_allclose(output_error(gram, weight - got), output_error(gram, weight - want), rtol=0.02)
        changed += np.abs(got - weight)[got != 0].max()
    assert changed > 0.1
    for line in small.history[-1].sites:
        assert line.metrics["output_error"] < 0.95 * line.metrics["magnitude_output_error"]
    for name, mask in small.masks.items():
        assert (np.asarray(small.weights[name])[~np.asarray(mask)] == 0).all()


def test_sequential_sparsegpt_sees_the_pruned_weights_before_it():
    whole = program()
    plan = resolve(recipe("sparsegpt", "sparsity = 0.6"), whole)
    apart, behind = (sparsegpt(whole, plan, data(), sequential=flag) for flag in (False, True))
    np.testing.assert_array_equal(apart.weights["conv"], behind.weights["conv"])
    assert np.abs(np.asarray(apart.weights["head"] - behind.weights["head"])).max() > 1e-3


def test_a_branch_without_data_is_pruned_by_magnitude_and_says_so():
    def fn(w, x):
        return lax.cond(x[0, 0] > 1e9, lambda x: x @ w["rare"], lambda x: x @ w["usual"], x)

    whole = lx.trace(fn, {"rare": array(DEPTH, 6), "usual": array(DEPTH, 6, seed=1)}, ROWS)
    for method in (wanda, sparsegpt):
        small = method(whole, resolve(recipe(method.__name__), whole), data())
        assert {line.site: line.reason for line in small.history[-1].sites} == {"rare": UNSEEN, "usual": ""}
        mask, magnitude = np.asarray(small.masks["rare"]), np.abs(np.asarray(whole.weights["rare"]))
        assert (~mask).sum() == DEPTH * 3
        for column in range(6) if method is wanda else [slice(None)]:  # each output by itself, or all together
            dropped, left = magnitude[:, column][~mask[:, column]], magnitude[:, column][mask[:, column]]
            assert dropped.max() <= left.min()


# Recipes.


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_through_the_pipeline_with_other_methods_beside(method):
    text = (
        f'{{}}[[prune]]\nsites = "head"\nsparsity = 0.25\n[[prune]]\nsites = ".*"\nmethod = "{method}"\nsparsity = 0.5'
    )
    chosen = lx.Recipe.parse(text.format("measure = false\n"), name="two")
    small = lx.optimize(program(), chosen, calibration=data())
    assert [report.name for report in small.history] == ["fold", "prune", method]
    assert (np.asarray(small.weights["head"]) == 0).sum() == 20
    with pytest.raises(lx.CalibrationError, match=f"has prune.method = '{method}', which needs calibration data"):
        lx.optimize(program(), chosen)
    skipping = lx.Recipe.parse(text.format('without_calibration = "skip"\n'), name="two")
    plain = lx.optimize(program(), skipping)
    assert [report.name for report in plain.history] == ["fold", "skipped", "prune", "autotune"]
    assert plain.history[1].metrics == {"by magnitude, for want of calibration data": method}
    assert (np.asarray(plain.weights["stack"]) == 0).sum() == 256


def test_pruned_then_quantized_keeps_its_zeros():
    text = 'measure = false\nrounding = "gptq"\n[[prune]]\nsites = ".*"\nmethod = "sparsegpt"\npattern = "2:4"\n'
    chosen = lx.Recipe.parse(text + '[[quantize]]\nsites = ".*"\nweights = "int4"\nactivations = "none"', name="both")
    small = lx.optimize(program(), chosen, calibration=data())
    assert [report.name for report in small.history] == ["fold", "sparsegpt", "gptq", "quantize"]
    codes = np.asarray(small.weights["stack"].dequantize(jnp.float32))
    assert (codes[~np.asarray(small.masks["stack"])] == 0).all()
