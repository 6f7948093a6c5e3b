"""What is exported computes what the artifact does, and what a format cannot hold is refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from jax.interpreters import mlir
from jaxlib.mlir.dialects import stablehlo as dialects

import lepton_xla as lx
from lepton_xla.cli import main
from lepton_xla.compiler import _xla
from lepton_xla.compiler.manifest import manifest_to_json
from lepton_xla.compiler.opening import read_manifest
from lepton_xla.compiler.storage import Store
from lepton_xla.exporting import exports, stablehlo

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = np.random.default_rng(3).normal(size=(5, 16)).astype(np.float32)


def net(weights, x):
    return jnp.tanh(x @ weights["w"]) @ weights["v"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float artifact, and one with int8 products."""
    draw = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in (("w", (16, 32)), ("v", (32, 4)))
    }
    program = lx.trace(net, weights, {"x": lx.TensorSpec(("batch", 16), "float32")})
    small = lx.optimize(program, lx.Recipe.load("int8").replace({"measure": False}), buckets={"batch": (1, 8)})
    weight_only = lx.optimize(program, lx.Recipe.load("int8-weight-only"), buckets={"batch": (1, 8)})
    made = tmp_path_factory.mktemp("exports")
    for name, each in (("float", program), ("int8", small), ("weight-only", weight_only)):
        lx.compile(each, {"batch": (1, 8)}, name=name).save(made / f"{name}.lepton")
    np.savez(made / "rows.npz", x=ROWS)
    first, second = (np.asarray(weights[name], np.float64) for name in ("w", "v"))
    np.save(made / "expected.npy", np.tanh(ROWS.astype(np.float64) @ first) @ second)
    return made


@pytest.mark.parametrize("name", ["float", "int8"])
def test_stablehlo_computes_the_same_in_jax_alone(folder, tmp_path, name):
    artifact = folder / f"{name}.lepton"
    found = lx.export(artifact, tmp_path / "out", "stablehlo", rows={"x": ROWS})
    expected = lx.load(artifact)(x=ROWS)["output"]
    assert found.rows == 5
    assert found.differences["output"] <= 1e-5
    assert found.largest["output"] == pytest.approx(np.abs(expected).max())
    again = stablehlo.run(tmp_path / "out", {"x": ROWS[:3]})["output"]
    np.testing.assert_allclose(again, expected[:3], rtol=1e-5, atol=1e-5)
    if name == "float":
        np.testing.assert_allclose(again, np.load(folder / "expected.npy")[:3], rtol=1e-4, atol=1e-4)
    # Bytecode of StableHLO says which version it is.
    assert b"StableHLO_v1.13.0" in (tmp_path / "out" / stablehlo.MODULE).read_bytes()


def test_a_difference_is_measured_and_not_assumed(folder, tmp_path, monkeypatch):
    def write(model, path):
        run = stablehlo.write(model, path)
        return lambda inputs: {name: array + np.float32(0.5) for name, array in run(inputs).items()}

    monkeypatch.setitem(exports._WRITERS, "stablehlo", write)
    found = lx.export(folder / "float.lepton", tmp_path / "out", "stablehlo")
    assert found.rows == 8
    assert found.differences["output"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 2.0),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([1.0], [1.0, 2.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_differences(found, expected, difference):
    assert exports._difference(np.array(found), np.array(expected)) == difference


def test_what_cannot_be_exported_is_refused_by_name(folder, tmp_path, monkeypatch):
    artifact = folder / "float.lepton"
    said = "there is no format 'tf': expected stablehlo, saved-model, tflite, onnx, qonnx$"
    with pytest.raises(lx.UnsupportedError, match=said):
        lx.export(artifact, tmp_path / "out", "tf")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(lx.ArtifactError, match="taken exists"):
        lx.export(artifact, tmp_path / "taken", "stablehlo")
    assert (tmp_path / "taken").read_text() == "mine"
    with pytest.raises(lx.InputError, match="unknown input 'y'"):
        lx.export(artifact, tmp_path / "out", "stablehlo", rows={"y": ROWS})
    with pytest.raises(lx.InputError, match="input 'x': batch is 9; the program is for at most 8"):
        lx.export(artifact, tmp_path / "out", "stablehlo", rows={"x": np.zeros((9, 16), np.float32)})
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(lx.MissingPackageError, match=r"needs the package tensorflow: pip install 'lepton-xla\[tensorf"):
        lx.export(artifact, tmp_path / "out", "saved-model")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(lx.MissingPackageError, match=r"needs the package onnx: pip install 'lepton-xla\[onnx\]'"):
        lx.export(artifact, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
    fixed_sizes = shutil.copytree(artifact, tmp_path / "fixed_sizes.lepton")
    manifest = read_manifest(Store(fixed_sizes))
    fixed = tuple(msgspec.structs.replace(program, sizes={"batch": 1}) for program in manifest.programs)
    (fixed_sizes / "manifest.json").write_bytes(manifest_to_json(msgspec.structs.replace(manifest, programs=fixed)))
    with pytest.raises(lx.UnsupportedError, match="has a portable program for each size"):
        lx.export(fixed_sizes, tmp_path / "out", "stablehlo")


def test_what_is_there_stays_until_the_new_is_whole(folder, tmp_path, monkeypatch):
    artifact, target = folder / "float.lepton", tmp_path / "below" / "out"
    target.mkdir(parents=True)
    (target / "mine").write_text("mine")

    def fails(error):
        def write(model, path):
            path.mkdir()
            (path / "half").write_text("half")
            raise error

        return write

    full, lacking = OSError(28, "No space left on device"), lx.UnsupportedError("an operation is not there")
    for error, kind in ((full, lx.ArtifactError), (lacking, lx.UnsupportedError)):
        monkeypatch.setitem(exports._WRITERS, "stablehlo", fails(error))
        with pytest.raises(kind):
            lx.export(artifact, target, "stablehlo", overwrite=True)
        assert (target / "mine").read_text() == "mine"
        assert [path.name for path in target.parent.iterdir()] == ["out"]
    monkeypatch.undo()
    for renames in (True, False):  # and where the system cannot exchange two paths
        if not renames:
            monkeypatch.setattr(exports, "exchange", lambda first, second: False)
        lx.export(artifact, target, "stablehlo", overwrite=True)
        assert "mine" not in {path.name for path in target.iterdir()}
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_the_command_prints_differences(folder, tmp_path):
    def run(*args):
        return CliRunner().invoke(main, [str(arg) for arg in args])

    arguments = ("export", folder / "float.lepton", "--to", "stablehlo", "-o", tmp_path / "out")
    done = run(*arguments, "--rows", folder / "rows.npz", "--json")
    document = json.loads(done.stdout)
    assert (document["format"], document["rows"], list(document["differences"])) == ("stablehlo", 5, ["output"])
    again = run(*arguments)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    assert "largest difference" in run(*arguments, "--overwrite").stdout


def test_other_frameworks_get_no_composite_operations():
    sizes = jax.export.symbolic_shape("batch, length")
    gelu = jax.jit(lambda x: jax.nn.gelu(x, approximate=False))
    exported = jax.export.export(gelu, platforms=["cpu"])(jax.ShapeDtypeStruct((*sizes, 4), "float32"))
    assert "stablehlo.composite" in exported.mlir_module()
    with mlir.make_ir_context() as context:
        code = _xla.module_for_others(exported, "1.13.0")
        assert "stablehlo.composite" not in str(dialects.deserialize_portable_artifact(context, code))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tensorflow_and_litert_compute_the_same(folder, tmp_path):
    """In an environment of its own, since TensorFlow is 1.5 GB."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(ROOT / "build" / "tools" / "bin"))
    if uv is None:
        pytest.skip("uv is not installed")
    python = tmp_path / "venv" / "bin" / "python"
    version = f"jax=={jax.__version__}"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    wanted = [f"{ROOT}[tensorflow]", version]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *wanted], check=True)

    def run(*arguments):
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [python, "-m", "lepton_xla", "export", *map(str, arguments), "--rows", folder / "rows.npz", "--json"]
        return subprocess.run(
            command, cwd=tmp_path, env=environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
        )

    for name, to, limit in (
        ("float", "saved-model", 1e-4),
        ("int8", "saved-model", 1e-4),
        ("float", "tflite", 1e-4),
        ("weight-only", "tflite", 1e-3),
    ):
        done = run(folder / f"{name}.lepton", "--to", to, "-o", tmp_path / f"{name}-{to}")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["differences"]["output"] <= limit, (name, to)
    refused = run(folder / "int8.lepton", "--to", "tflite", "-o", tmp_path / "no.tflite")
    assert refused.returncode == 2
    assert "LiteRT cannot hold 'int8'" in refused.stderr
    assert not (tmp_path / "no.tflite").exists()
