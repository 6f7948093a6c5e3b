"""Models of operations that XLA compiles in ways of their own: saved, loaded and run as `jax.jit` runs them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.modelspec import ModelSpec, load_named

MODELS = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

import lepton_xla as lx

random = np.random.default_rng(11)
weights = {
    "gate": random.standard_normal((6, 3)).astype(np.float32),
    "experts": random.standard_normal((3, 6, 6)).astype(np.float32),
}
KEY = jax.random.key(3)


def make(fn, shape=("batch", 6)):
    inputs = {"x": lx.TensorSpec(shape, "float32")}
    return lx.ModelSpec(fn=fn, weights=weights, inputs=inputs, buckets={"batch": (1, 4)})


def routing(w, x):
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ w["gate"]), 2)
    order = jnp.argsort(chosen, axis=-1)
    gates, chosen = jnp.take_along_axis(gates, order, 1), jnp.take_along_axis(chosen, order, 1)
    return jnp.einsum("bkd,bk->bd", jnp.einsum("bi,bkio->bko", x, w["experts"][chosen]), gates)


def top_p(w, x):
    order = jnp.argsort(-x, axis=-1)
    share = jax.nn.softmax(jnp.take_along_axis(x, order, -1))
    kept = jnp.cumsum(share, -1) - share < 0.7
    return jnp.take_along_axis(jnp.where(kept, share, 0.0), jnp.argsort(order, -1), -1)


def doubled(w, x):
    small = lambda y: (jnp.abs(y).max(-1) < 100).any()
    return jax.lax.while_loop(small, lambda y: jnp.where(jnp.abs(y).max(-1, keepdims=True) < 100, y * 2, y), x + 1e-3)


gram = lambda x: x @ x.mT + 9 * jnp.eye(6)[None]
square = ("batch", 6, 6)
sort = make(lambda w, x: jnp.sort(x, -1))
argsort = make(lambda w, x: jnp.argsort(x, -1))
median = make(lambda w, x: jnp.median(x, -1))
quantile = make(lambda w, x: jnp.quantile(x, jnp.array([0.1, 0.8]), axis=-1).T)
top_k = make(lambda w, x: jax.lax.top_k(x, 2))
moe = make(routing)
top_p = make(top_p)
cholesky = make(lambda w, x: jnp.linalg.cholesky(gram(x)), square)
eigh = make(lambda w, x: jnp.linalg.eigh(gram(x))[0], square)
fft = make(lambda w, x: jnp.abs(jnp.fft.fft(x)))
solve = make(lambda w, x: jax.vmap(lambda a, b: cg(lambda v: a @ v, b)[0])(gram(x), x[:, 0]), square)
noise = make(lambda w, x: x + jax.random.permutation(KEY, jax.random.normal(KEY, (1, 6)), 1))
loop = make(doubled)
complex = make(lambda w, x: (jax.lax.complex(x, x[:, ::-1]) ** 2).imag)
"""
NAMES = (
    "sort", "argsort", "median", "quantile", "top_k", "moe", "top_p", "cholesky", "eigh", "fft", "solve", "noise",
    "loop", "complex",
)  # fmt: skip


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory):
    file = tmp_path_factory.mktemp("odd") / "odd_models.py"
    file.write_text(MODELS)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_odd_models_are_compiled_saved_loaded_and_run(cli, odd_models, tmp_path, name):
    path = tmp_path / f"{name}.lepton"
    cli.ok("compile", f"{odd_models}:{name}", "-o", path)
    spec = load_named(f"{odd_models}:{name}", ModelSpec)
    shape = tuple(3 if dim == "batch" else dim for dim in spec.inputs["x"].shape)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = jax.tree.leaves(jax.jit(spec.fn)(spec.weights, x))
    servable = lx.load(path)
    assert servable.route == "executables"
    np.save(tmp_path / "x.npy", x)
    printed = json.loads(cli.ok("predict", path, "--input", f"x={tmp_path / 'x.npy'}"))
    for found in (servable(x=x), printed):
        for out, wanted in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)


def test_code_that_jax_had_in_its_cache_is_compiled_anew(odd_models, tmp_path):
    """Code that was read from bytes and is written once more has lost a sort's comparison (jaxlib 0.12)."""
    code = f"""
import sys
import jax, numpy as np
import lepton_xla as lx
from lepton_xla.modelspec import ModelSpec, load_named
jax.config.update("jax_compilation_cache_dir", {str(tmp_path / "cache")!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
spec = load_named(sys.argv[1], ModelSpec)
for name in ("first", "second"):
    lx.compile(spec.program(), spec.buckets).save({str(tmp_path)!r} + f"/{{name}}.lepton")
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    found = lx.load({str(tmp_path)!r} + f"/{{name}}.lepton")(x=-x)["output"]
    assert (found == np.sort(-x, -1)).all()
assert jax.config.jax_enable_compilation_cache
jax.jit(lambda x: jax.numpy.sort(x * 3))(x)
import os
assert os.listdir({str(tmp_path / "cache")!r}), "JAX's cache is in use again"
"""
    run = [sys.executable, "-W", "ignore", "-c", code, f"{odd_models}:sort"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
