"""Weights of large models that passes change are kept in files."""

import gc
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.passes.core import memory


def mapped() -> list[range]:
    """Where files of ours are mapped in this process."""
    found = []
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        if tempfile.gettempdir() in line and "(deleted)" in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            found.append(range(start, end))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_large_array_moves_to_a_file_and_stays_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str):
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    array = jnp.arange(1 << 20).reshape(1024, 1024).astype(dtype)
    moved = memory.in_file(array, {"w": array})
    assert any(moved.unsafe_buffer_pointer() in each for each in mapped())
    np.testing.assert_array_equal(np.asarray(moved), np.asarray(array))
    assert (moved.dtype, moved.sharding, moved.committed) == (array.dtype, array.sharding, array.committed)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda a: a[:1])(moved)), np.asarray(array[:1]))
    before = len(mapped())
    del moved
    gc.collect()  # jaxlib lets go of what Python made when it collects
    assert len(mapped()) < before, "the file goes with the array"


def test_what_is_small_or_elsewhere_stays(monkeypatch: pytest.MonkeyPatch):
    array = jnp.ones((1024, 1024))
    assert memory.in_file(array, {"w": array}) is array, "a small model"
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    small = jnp.ones(1024)
    assert memory.in_file(small, {"w": array}) is small
    mesh = jax.make_mesh((2,), ("model",))
    cut = jax.device_put(array, jax.NamedSharding(mesh, jax.P("model")))
    assert memory.in_file(cut, {"w": cut}) is cut


def test_optimizing_a_large_model_gives_what_it_gives_in_memory(monkeypatch: pytest.MonkeyPatch):
    weights = {"one": jax.random.normal(jax.random.key(0), (512, 1024)), "two": jnp.ones((1024, 512))}
    program = lx.trace(
        lambda w, x: jax.nn.relu(x @ w["one"]) @ w["two"], weights, {"x": lx.TensorSpec(("batch", 512), "float32")}
    )
    batches = [{"x": np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)}]
    moved: list[int] = []

    def optimized():
        real = memory.in_file
        with monkeypatch.context() as patch:
            patch.setattr(memory, "in_file", lambda array, of: moved.append(array.nbytes) or real(array, of))
            recipe = lx.Recipe.parse(
                'rescale = "smooth:0.5"\nrounding = "gptq"\nmeasure = false\n[[quantize]]\nsites = ".*"\n'
                'weights = "int8"\nactivations = "int8"\n',
                name="both",
            )
            return lx.optimize(program, recipe, calibration=batches).weights

    in_memory = optimized()
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    in_files = optimized()
    assert len(moved) >= 2 * 2 * 2, "smoothing and rounding of two weights, twice"
    for one, two in zip(jax.tree.leaves(in_memory), jax.tree.leaves(in_files), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
