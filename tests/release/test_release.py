"""What is released: the wheel and the source distribution, installed into empty environments outside of this folder.

In each the demo passes; without extras, an artifact is loaded and served, and what is missing is said. It
installs JAX three times.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = pathlib.Path(__file__).resolve().parents[2]
UV = shutil.which("uv") or shutil.which("uv", path=str(ROOT / "build" / "tools" / "bin"))
TIMEOUT_S = 900

LOADS = """
import json, sys, numpy as np, lepton_xla as lx
model = lx.load("digits.lepton")
rows = np.load("rows.npy")
outputs = model(image=rows)["output"]
np.save("outputs.npy", outputs)
print(json.dumps({"route": model.route, "file": lx.__file__, "jax": "jax" in sys.modules}))
"""
ERRORS = """
import lepton_xla as lx
def said(make):
    try:
        make()
    except lx.LeptonError as error:
        print(type(error).__name__, error)
spec = {"x": lx.TensorSpec(("batch", 2), "float32")}
said(lambda: lx.train)
said(lambda: lx.from_linen(object(), {}, spec))
said(lambda: lx.from_nnx(object(), spec))
said(lambda: lx.tuning)
"""


def run(*command, cwd, **variables):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LEPTON", "XLA"))}
    environ |= {"JAX_PLATFORMS": "cpu", "LEPTON_CACHE": "off"} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution, built from this folder."""
    if UV is None:
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--python", sys.executable, "--out-dir", folder, ROOT, cwd=folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The folder of the source distribution, whose examples are what users get."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(built[1]) as archive:
        archive.extractall(folder, filter="data")
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Makes an environment with a requirement and nothing else; returns its folder."""

    def make(requirement):
        folder = tmp_path_factory.mktemp("environment") / "venv"
        run(UV, "venv", "--quiet", "--python", sys.executable, folder, cwd=folder.parent)
        run(UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python", requirement, cwd=folder.parent)
        return folder

    return make


@pytest.fixture(scope="module")
def demo(built, unpacked, environment):
    """The environment of the wheel, in which the demo has passed, and what the demo wrote."""
    venv = environment(f"{built[0]}[examples]")
    run(venv / "bin" / "python", unpacked / "examples" / "demo.py", cwd=venv.parent)
    return venv, unpacked / "build" / "demo"


def check(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["requests_ok"] == summary["requests"] == 1000
    assert summary["accuracy_optimized"] > 0.97


def test_the_wheel_passes_the_demo_and_finds_no_fault(demo):
    venv, folder = demo
    check(folder)
    found = json.loads(run(venv / "bin" / "leptonx", "doctor", "--json", cwd=venv.parent))
    assert found["ok"], found
    assert str(venv) in run(venv / "bin" / "python", "-c", "import lepton_xla; print(lepton_xla.__file__)", cwd=folder)


def test_the_source_distribution_passes_the_demo(built, unpacked, environment, tmp_path):
    venv = environment(f"{built[1]}[examples]")
    shutil.copytree(unpacked / "examples", tmp_path / "examples")
    run(venv / "bin" / "python", tmp_path / "examples" / "demo.py", cwd=tmp_path)
    check(tmp_path / "build" / "demo")


def test_without_extras_artifacts_are_loaded_and_served(built, demo, environment, tmp_path):
    venv = environment(str(built[0]))
    python, leptonx = venv / "bin" / "python", venv / "bin" / "leptonx"
    listed = json.loads(run(UV, "pip", "list", "--python", python, "--format", "json", cwd=tmp_path))
    assert not {package["name"] for package in listed} & {"flax", "optax", "orbax-checkpoint", "grain"}

    shutil.copytree(demo[1] / "digits.lepton", tmp_path / "digits.lepton")
    run(
        demo[0] / "bin" / "python", "-c",
        f"import sys; sys.path.insert(0, {str(demo[1].parents[1] / 'examples')!r})\n"
        "import digits, numpy as np, lepton_xla as lx\n"
        "rows = digits.data()[2][:40]; np.save('rows.npy', rows)\n"
        "np.save('expected.npy', lx.load('digits.lepton')(image=rows)['output'])",
        cwd=tmp_path,
    )  # fmt: skip
    told = json.loads(run(python, "-c", LOADS, cwd=tmp_path))
    assert (told["route"], told["jax"], str(venv) in told["file"]) == ("executables", False, True)
    assert (tmp_path / "outputs.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()

    training = "MissingPackageError lx.train needs the package orbax: pip install 'lepton-xla[train]'"
    flax = "MissingPackageError a Flax module needs the package flax: pip install 'lepton-xla[flax]'"
    assert run(python, "-c", ERRORS, cwd=tmp_path).splitlines() == [training, flax, flax, training]

    with subprocess.Popen(
        [leptonx, "serve", "digits.lepton", "--port", "0", "--json"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
    ) as server:  # fmt: skip
        try:
            url = next(event["url"] for event in map(json.loads, server.stdout) if event.get("event") == "listening")
            tensor = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8, 1], "data": [0.0] * 64}
            body = json.dumps({"inputs": [tensor]}).encode()
            with urllib.request.urlopen(f"{url}/v2/models/digits/infer", body, timeout=30) as answer:
                assert json.load(answer)["outputs"][0]["shape"] == [1, 10]
        finally:
            server.terminate()
            server.communicate(timeout=60)  # it says that it stopped, which has to be read
    assert server.returncode == 0
