"""Embeddings looked up by every form of gather: Equinox's under `vmap`, which keeps the rows' dimension, among them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from jax import lax

import lepton_xla as lx
from lepton_xla.passes.core.costs import cost
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.fake_quantization import fake_quant
from lepton_xla.passes.shrinking.removal import shrink

V, D = 50, 16
TABLE = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
RECIPE = lx.Recipe.parse('measure = false\n[[quantize]]\nsites = ".*"\nactivations = "none"', name="codes")


def nearest():
    """The table as int8 with one scale a row, in float64."""
    scale = np.abs(TABLE.astype(np.float64)).max(1, keepdims=True) / 127
    return np.rint(TABLE / scale).clip(-127, 127) * scale


def equinox(w, ids):
    return jax.vmap(jax.vmap(eqx.nn.Embedding(weight=w["table"])))(ids)


def program_of(fn):
    return lx.trace(fn, {"table": TABLE}, {"ids": lx.TensorSpec(("batch", 3), "int32")})


def test_equinox_embeddings_are_stored_in_codes_and_looked_up_there(tmp_path):
    program = program_of(equinox)
    (site,) = find_sites(program)
    assert (site.name, site.kind, cost(program).sites[0].kind) == ("table", "gather", "gather")
    small = lx.optimize(program, RECIPE)
    assert small.weights_bytes < 0.35 * program.weights_bytes
    assert small.weights["table"].values.shape == (V, D)  # a row in one piece
    ids = np.random.default_rng(1).integers(0, V, (2, 3)).astype(np.int32)
    np.testing.assert_allclose(small(small.weights, ids), nearest()[ids], rtol=1e-2, atol=1e-6)
    trained = fake_quant(program, resolve(RECIPE, program))
    np.testing.assert_allclose(trained(program.weights, ids), small(small.weights, ids), rtol=1e-6)
    gradient = jax.grad(lambda w: trained(w, ids).sum())(program.weights)["table"]
    np.testing.assert_array_equal(gradient, np.bincount(ids.ravel(), minlength=V)[:, None] * np.ones((1, D)))
    lx.compile(small, {"batch": (1, 4)}).save(tmp_path / "a.lepton")
    found = lx.load(tmp_path / "a.lepton")(ids=ids)["output"]
    np.testing.assert_allclose(found, nearest()[ids], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize(
    ("offsets", "collapsed", "index_map"),
    [((2,), (0,), (0,)), ((0,), (0,), (0, 1)), ((2, 3), (), (0, 1)), ((0, 2), (), (1, 0)), ((1, 3), (), (0,))],
)
def test_every_form_of_lookup(mode, offsets, collapsed, index_map):
    """Against XLA's own gather from the rounded table, places outside of it included."""
    numbers = lax.GatherDimensionNumbers(offsets, collapsed, index_map)
    ids = np.array([[0, 7, V - 1], [-1, V, 3]] if mode != "promise_in_bounds" else [[0, 7, V - 1], [4, 9, 3]], np.int32)
    columns = np.array([[0, 0, 0], [0, 0, 1]] if mode != "promise_in_bounds" else np.zeros((2, 3)), np.int32)
    by_axis = {0: ids, 1: columns}

    def fn(w, ids):
        index = jnp.stack([ids if axis == 0 else columns for axis in index_map], -1)
        return lax.gather(w["table"], index, numbers, (1, D), mode=mode)

    program = lx.trace(fn, {"table": TABLE}, {"ids": lx.TensorSpec((2, 3), "int32")})
    small = lx.optimize(program, msgspec.structs.replace(RECIPE, fold=False))
    assert small.weights_bytes < 0.35 * program.weights_bytes
    stored = small.weights["table"]
    rounded = np.asarray(stored.dequantize(np.float32)).T
    index = np.stack([by_axis[axis] for axis in index_map], -1)
    expected = lax.gather(jnp.asarray(rounded), jnp.asarray(index), numbers, (1, D), mode=mode)
    np.testing.assert_allclose(small(small.weights, ids), expected, rtol=1e-6)
    trained = fake_quant(program, resolve(RECIPE, program))
    np.testing.assert_allclose(trained(program.weights, ids), expected, rtol=1e-2, atol=1e-6)


def test_channels_behind_such_an_embedding_can_be_removed():
    head = np.random.default_rng(2).standard_normal((D, 4)).astype(np.float32)
    program = lx.trace(
        lambda w, ids: jnp.tanh(equinox(w, ids)) @ w["head"],
        {"table": TABLE, "head": head},
        {"ids": lx.TensorSpec(("batch", 3), "int32")},
    )
    small = shrink(program, sparsity=0.5, round_to=1)
    assert (small.weights["table"].shape, small.weights["head"].shape) == ((V, D // 2), (D // 2, 4))
    ids = np.random.default_rng(1).integers(0, V, (2, 3)).astype(np.int32)
    kept = [list(map(tuple, TABLE.T)).index(tuple(column)) for column in np.asarray(small.weights["table"]).T]
    expected = np.tanh(TABLE.astype(np.float64)[ids][..., kept]) @ head[kept]
    np.testing.assert_allclose(small(small.weights, ids), expected, rtol=1e-4, atol=1e-5)
