"""Cross-layer equalization: ranges follow the paper's formula, the function is unchanged, pairs are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_xla.errors import RecipeError
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.rounding import round_to_nearest
from lepton_xla.passes.rescaling.equalization import equalize, pair_factor
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
ALL = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'\nactivations = 'none'", name="all")
PER_TENSOR = Recipe.parse("[[quantize]]\nsites = '.*'\nactivations = 'none'\ngranularity = 'tensor'", name="tensor")


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def uneven(*shape, axis=-1, seed=0):
    """A weight whose channels along one axis have magnitudes that differ a lot."""
    rng = np.random.default_rng(seed)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return jnp.asarray(rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(sizes)), jnp.float32)


def row(vector):
    return jnp.reshape(vector, (1, -1))


def equalized(program, x, recipe=ALL, **options):
    changed = equalize(program, resolve(recipe, program), **options)
    want = program.fn(program.weights, x)
    np.testing.assert_allclose(changed.fn(changed.weights, x), want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))
    return changed, {site.site: (site.action, site.reason) for site in changed.history[-1].sites}


def mlp(w, x):
    x = jax.nn.relu(x @ w["a"] + row(w["bias"]))
    return jax.nn.relu(x @ w["b"].T) @ w["c"]


def weights():
    return {
        "a": uneven(6, 8, seed=1),
        "bias": array(8, seed=2),
        "b": uneven(7, 8, axis=0, seed=3),
        "c": array(7, 3, seed=4),
    }


def test_a_pair_by_the_formula():
    given = {"a": uneven(6, 8, seed=1), "bias": array(8, seed=2), "b": array(8, 3, seed=3)}
    fn = lambda w, x: jax.nn.relu(x @ w["a"] + row(w["bias"])) @ w["b"]  # noqa: E731
    changed, became = equalized(trace(fn, given, ROWS), array(9, 6))
    assert became == {
        "a": ("kept", "its activation comes from outside"),
        "b": ("equalized with a", ""),
    }
    first, second = (np.asarray(given[name], np.float64) for name in "ab")
    factor = np.sqrt(np.abs(first).max(0) / np.abs(second).max(1))
    np.testing.assert_allclose(changed.weights["a"], first / factor, rtol=1e-5)
    np.testing.assert_allclose(changed.weights["bias"], np.asarray(given["bias"]) / factor, rtol=1e-5)
    np.testing.assert_allclose(changed.weights["b"], second * factor[:, None], rtol=1e-5)


def test_a_chain_comes_to_equal_ranges():
    changed, became = equalized(trace(mlp, weights(), ROWS), array(9, 6), rounds=200, tolerance=1e-5)
    assert became["b"] == ("equalized with a", "")
    assert became["c"] == ("equalized with b", "")
    now = {name: np.abs(np.asarray(leaf)) for name, leaf in changed.weights.items()}
    np.testing.assert_allclose(now["a"].max(0), now["b"].max(0), rtol=1e-3)
    np.testing.assert_allclose(now["b"].max(1), now["c"].max(1), rtol=1e-3)
    assert 1 < changed.history[-1].metrics["rounds"] < 200


def test_per_tensor_rounding_loses_less():
    # Weights of even ranges, made uneven in a way that leaves the function as it is.
    spread = jnp.exp(2 * array(8, seed=3))
    given = {"a": array(6, 8, seed=1) * row(spread), "b": array(8, 3, seed=2) / spread.reshape(-1, 1)}
    program, x = trace(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], given, ROWS), array(50, 6)
    changed, _ = equalized(program, x, PER_TENSOR)
    want = program.fn(program.weights, x)
    errors = []
    for candidate in (changed, program):
        rounded, _ = round_to_nearest(candidate, resolve(PER_TENSOR, candidate))
        errors.append(np.linalg.norm(rounded.fn(rounded.weights, x) - want))
    assert errors[0] < 0.3 * errors[1]


def test_convolutions_and_depthwise_ones():
    numbers = ("NHWC", "HWIO", "NHWC")
    given = {"a": uneven(3, 3, 4, 8, seed=1), "b": uneven(3, 3, 1, 8, seed=2), "c": array(1, 1, 8, 5, seed=3)}

    def conv(x, w, groups=1):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    def fn(w, x):
        x = jax.nn.relu(conv(x, w["a"]))
        return conv(jax.nn.relu(conv(x, w["b"], 8)), w["c"])

    program = trace(fn, given, {"x": TensorSpec(("batch", 5, 5, 4), "float32")})
    changed, became = equalized(program, array(2, 5, 5, 4), rounds=100, tolerance=1e-5)
    assert (became["b"][0], became["c"][0]) == ("equalized with a", "equalized with b")
    now = {name: np.abs(np.asarray(leaf)).max((0, 1)) for name, leaf in changed.weights.items()}
    np.testing.assert_allclose(now["a"].max(0), now["b"][0], rtol=1e-3)
    np.testing.assert_allclose(now["b"][0], now["c"].max(1), rtol=1e-3)


def test_each_step_of_a_stack():
    given = {"a": uneven(3, 6, 8, seed=1), "b": array(3, 8, 6, seed=2)}
    fn = lambda w, x: lax.scan(lambda x, v: (jnp.tanh(jax.nn.relu(x @ v["a"]) @ v["b"]), None), x, w)[0]  # noqa: E731
    changed, became = equalized(trace(fn, given, ROWS), array(9, 6))
    assert became["b"] == ("equalized with a", "")
    now = {name: np.abs(np.asarray(leaf)) for name, leaf in changed.weights.items()}
    np.testing.assert_allclose(now["a"].max(1), now["b"].max(2), rtol=1e-4)


@pytest.mark.parametrize(
    ("between", "reason"),
    [(jnp.tanh, "a `tanh` stands before it"), (lambda h: jax.nn.relu(h) + h, "is also read elsewhere")],
)
def test_what_is_not_homogeneous_is_kept(between, reason):
    given = {"a": uneven(6, 8, seed=1), "b": array(8, 3, seed=2)}
    changed, became = equalized(trace(lambda w, x: between(x @ w["a"]) @ w["b"], given, ROWS), array(9, 6))
    assert became["b"][0] == "kept"
    assert reason in became["b"][1]
    np.testing.assert_array_equal(changed.weights["b"], given["b"])


def test_dead_channels_and_bad_rounds():
    given = weights()
    given["a"] = given["a"].at[:, 2].set(0)
    given["b"] = given["b"].at[:, 3].set(0)
    changed, _ = equalized(trace(mlp, given, ROWS), array(9, 6), rounds=1)
    assert all(np.all(np.isfinite(leaf)) for leaf in changed.weights.values())
    np.testing.assert_array_equal(changed.weights["a"][:, 3], given["a"][:, 3])
    np.testing.assert_array_equal(pair_factor(jnp.asarray([0.0, 4.0, 4.0]), jnp.asarray([1.0, 0.0, 1.0])), [1, 1, 2])
    with pytest.raises(RecipeError, match="0 rounds"):
        equalize(trace(mlp, given, ROWS), resolve(ALL, trace(mlp, given, ROWS)), rounds=0)
