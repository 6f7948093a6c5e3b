"""The factor of a Gram matrix's inverse, and how often it is compiled."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.passes.core import matrix
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.error_feedback import LEAF, inverse_factor
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

# The package's `gptq` is the function.
gptq = importlib.import_module("lepton_xla.passes.quantization.gptq")


@pytest.mark.parametrize("size", [1, LEAF, LEAF + 1, 3 * LEAF - 5])
def test_it_is_the_factor_of_the_damped_inverse(size):
    rows = np.random.default_rng(size).normal(
        size=(size // 2 + 1, size)
    )  # fewer than columns: damping makes it regular
    gram = rows.T @ rows
    mean = np.mean(np.diag(gram))
    wanted = np.linalg.cholesky(np.linalg.inv(gram + 0.1 * mean * np.eye(size))).T
    found = np.asarray(inverse_factor(jnp.asarray(gram, jnp.float32), jnp.float32(mean), 0.1))
    np.testing.assert_array_equal(np.tril(found, -1), 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_mapped_one_at_a_time_is_not_batched(count):
    seen = []
    matrix.batched_map(lambda x: seen.append(type(x).__name__) or x @ x, (count,), jnp.ones((count, 3, 3)), at_once=1)
    assert not any("Batch" in name for name in seen)


def test_weights_of_one_depth_share_one_compiled_factorization():
    depth = 13
    weights = {name: jnp.ones((depth, columns)) for name, columns in (("a", 5), ("b", 7), ("c", 9))}
    program = trace(
        lambda w, x: [x @ w["a"], x @ w["b"], x @ w["c"]], weights, {"x": TensorSpec(("batch", depth), "float32")}
    )
    gptq._factor_small.clear_cache()
    plan = resolve(Recipe.load("int8-weight-only"), program)
    gptq.gptq(program, plan, [{"x": np.random.default_rng(0).normal(size=(8, depth)).astype(np.float32)}])
    assert gptq._factor_small._cache_size() == 1


@pytest.mark.parametrize("depth", [12, 20])
def test_damping_grows_for_those_matrices_that_need_it(monkeypatch, depth):
    """As inside the loop of `inverse_factor`, bit for bit, whether XLA optimizes the code more or less."""
    monkeypatch.setattr(gptq, "SMALL_DEPTH", 16)
    rng = np.random.default_rng(depth)
    rows = rng.normal(size=(2, 3, 7, depth)).astype(np.float32)
    gram = np.einsum("abmk,abml->abkl", rows, rows)
    gram[0, 1, 5, 5] = np.nan  # no damping helps
    gram[1, 2] -= 0.05 * np.mean(np.diagonal(gram[1, 2])) * np.eye(depth, dtype=np.float32)  # more damping does
    gram[1, 0, 3], gram[1, 0, :, 3] = 0, 0
    options = gptq.Options()
    orders, factors = gptq._all_ordered(jnp.asarray(gram), options)
    alone = jax.jit(functools.partial(gptq._ordered, options=options))
    for at in np.ndindex(2, 3):
        order, factor = alone(jnp.asarray(gram[at]))
        np.testing.assert_array_equal(orders[at], order)
        np.testing.assert_array_equal(factors[at], factor)
        assert np.isfinite(factors[at]).all() == (at != (0, 1))
