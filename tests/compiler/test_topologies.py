"""Executables for devices that are not here: beside this machine's in one artifact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.sharding import Rules, topologies

RULES = Rules([("up", (None, "model")), ("down", ("model",))])
X = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
HAS_TPU_COMPILER = topologies.has_compiler("v5e:1x1")
HAS_GPU_COMPILER = topologies.has_compiler("h100:1")


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
    monkeypatch.setattr(topologies, "topology_devices", lambda name: asked.append(name) or jax.devices())
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
    monkeypatch.setattr(topologies, "topology_devices", lambda _: jax.devices())
    with pytest.raises(lx.ShardingError, match=said):
        lx.compile(program, {"batch": (1,)}, mesh=mesh, topology="v5e:1x2")


def test_a_mesh_of_this_machine_is_not_of_the_topology(program, monkeypatch):
    monkeypatch.setattr(topologies, "topology_devices", lambda _: jax.devices())
    with pytest.raises(lx.ShardingError, match="give the mesh as text"):
        lx.compile(program, {"batch": (2,)}, mesh=lx.sharding.mesh("data=2"), topology="v5e:1x2")


@pytest.mark.skipif(HAS_TPU_COMPILER, reason="TPU's compiler is installed")
def test_without_its_compiler_a_topology_is_refused(program):
    with pytest.raises(lx.CompileError, match=r"topology 'v5e:2x2': .* pip install 'jax\[tpu\]'"):
        lx.compile(program, {"batch": (2,)}, mesh="model=4", topology="v5e:2x2")


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="CUDA's compiler is installed")
def test_without_cudas_plugin_a_gpu_is_refused(program):
    with pytest.raises(lx.CompileError, match=r"topology 'h100:1': .* pip install 'jax\[cuda12\]'"):
        lx.compile(program, {"batch": (2,)}, topology="h100:1")


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:0", "h100:2x2x2", "b200:-1", "h200:1e9"])
def test_a_number_of_gpus_that_is_none_is_refused(program, name):
    with pytest.raises(lx.CompileError, match=f"topology '{name}': expected v5e:4x4, .* h100:8"):
        lx.compile(program, {"batch": (2,)}, topology=name)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="needs the package libtpu")
def test_code_for_a_tpu_is_made_without_one(program, tmp_path):
    artifact = lx.compile(program, {"batch": (2, 8)}, mesh="data=2,model=2", rules=RULES, topology="v5e:2x2")
    manifest = artifact.save(tmp_path / "tpu.lepton")
    (tpu,) = (entry for entry in manifest.executables.values() if entry.target.platform == "tpu")
    assert (tpu.target.device_kind, tpu.target.device_count) == ("TPU v5 lite", 4)
    assert set(tpu.files) == {"batch=2", "batch=8"}
    with pytest.raises(lx.CompileError, match="topology 'v5e:nothing'"):
        lx.compile(program, {"batch": (2,)}, topology="v5e:nothing")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU_COMPILER, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize(
    ("topology", "kind"),
    [("h100:4", "NVIDIA H100 80GB HBM3"), ("h200:4", "NVIDIA H200"), ("b200:2x2", "NVIDIA B200")],
)
def test_code_for_a_gpu_is_made_without_one(program, topology, kind, tmp_path):
    artifact = lx.compile(program, {"batch": (2, 8)}, mesh="data=2,model=2", rules=RULES, topology=topology)
    manifest = artifact.save(tmp_path / "gpu.lepton")
    (gpu,) = (entry for entry in manifest.executables.values() if entry.target.platform == "gpu")
    assert (gpu.target.device_kind, gpu.target.device_count) == (kind, 4)
    assert set(gpu.files) == {"batch=2", "batch=8"}
    assert b"\x7fELF" in (tmp_path / "gpu.lepton" / gpu.files["batch=8"]).read_bytes()  # a GPU's binary
    np.testing.assert_allclose(lx.load(tmp_path / "gpu.lepton")(x=X)["output"], expected(program), rtol=1e-5, atol=1e-6)
