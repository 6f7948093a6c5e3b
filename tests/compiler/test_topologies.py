"""Executables for devices that are not here: beside this machine's in one artifact."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.compiler import _xla
from lepton_xla.sharding import Rules

RULES = Rules([("up", (None, "model")), ("down", ("model",))])
X = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(scope="module")
def program():
    random = np.random.default_rng(0)
    weights = {
        path: jnp.asarray(random.standard_normal(shape) / 4, jnp.float32)
        for path, shape in (("up", (16, 32)), ("down", (32, 8)))
    }
    return lx.trace(
        lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"], weights, {"x": lx.TensorSpec(("batch", 16), "float32")}
    )


def expected(program):
    up, down = (np.asarray(program.weights[name], np.float64) for name in ("up", "down"))
    return np.tanh(X @ up) @ down


@pytest.mark.parametrize("recipe", [None, "int4-weight-only"])
def test_one_artifact_runs_here_and_there(program, recipe, tmp_path, monkeypatch):
    """The devices of the topology are two of this process, so what was compiled for them can be run."""
    asked = []
    monkeypatch.setattr(_xla, "topology_devices", lambda name: asked.append(name) or jax.devices())
    if recipe is not None:
        program = lx.optimize(program, lx.Recipe.load(recipe), buckets={"batch": (2, 4)})
    wanted = np.asarray(jax.jit(program.fn)(program.weights, X)) if recipe else expected(program)
    artifact = lx.compile(program, {"batch": (2, 4)}, mesh="data=1,model=2", rules=RULES, topology="v5e:1x2")
    assert set(asked) == {"v5e:1x2"}
    np.testing.assert_allclose(artifact.servable()(x=X)["output"], wanted, rtol=1e-5, atol=1e-6)
    manifest = artifact.save(tmp_path / "both.lepton")
    assert sorted(entry.target.device_count for entry in manifest.executables.values()) == [1, 2]
    lx.verify(tmp_path / "both.lepton")

    there = lx.load(tmp_path / "both.lepton")
    assert (there.route, len(there.runtime.devices.all)) == ("executables", 2)
    np.testing.assert_allclose(there(x=X)["output"], wanted, rtol=1e-5, atol=1e-6)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    here = lx.load(tmp_path / "both.lepton")
    assert (here.route, len(here.runtime.devices.all)) == ("executables", 1)
    np.testing.assert_allclose(here(x=X)["output"], wanted, rtol=1e-5, atol=1e-6)
    assert there.weights_bytes < 0.6 * here.weights_bytes


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (None, "topology 'v5e:1x2' has 2 devices; give a mesh, such as 'data=-1'"),
        ("data=3", "takes 3 devices"),
        ("data=2", "bucket batch=1 cannot be split over data=2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(program, mesh, said, monkeypatch):
    monkeypatch.setattr(_xla, "topology_devices", lambda _: jax.devices())
    with pytest.raises(lx.ShardingError, match=said):
        lx.compile(program, {"batch": (1,)}, mesh=mesh, topology="v5e:1x2")


def test_a_mesh_of_this_machine_is_not_of_the_topology(program, monkeypatch):
    monkeypatch.setattr(_xla, "topology_devices", lambda _: jax.devices())
    with pytest.raises(lx.ShardingError, match="give the mesh as text"):
        lx.compile(program, {"batch": (2,)}, mesh=lx.sharding.mesh("data=2"), topology="v5e:1x2")


@pytest.mark.skipif(HAS_COMPILER, reason="TPU's compiler is installed")
def test_without_its_compiler_a_topology_is_refused(program):
    with pytest.raises(lx.CompileError, match=r"topology 'v5e:2x2': .* pip install 'jax\[tpu\]'"):
        lx.compile(program, {"batch": (2,)}, mesh="model=4", topology="v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs the package libtpu")
def test_code_for_a_tpu_is_made_without_one(program, tmp_path):
    artifact = lx.compile(program, {"batch": (2, 8)}, mesh="data=2,model=2", rules=RULES, topology="v5e:2x2")
    manifest = artifact.save(tmp_path / "tpu.lepton")
    (tpu,) = (entry for entry in manifest.executables.values() if entry.target.platform == "tpu")
    assert (tpu.target.device_kind, tpu.target.device_count) == ("TPU v5 lite", 4)
    assert set(tpu.files) == {"batch=2", "batch=8"}
    with pytest.raises(lx.CompileError, match="topology 'v5e:nothing'"):
        lx.compile(program, {"batch": (2,)}, topology="v5e:nothing")
