"""Code for other CPUs in one artifact: which is chosen, that answers are equal, and what is refused."""

import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.instruction_sets import needed_features
from lepton_xla.compiler.opening import read_manifest
from lepton_xla.compiler.storage import Store
from lepton_xla.compiler.targets import add_targets, check_targets
from lepton_xla.environment.machine import cpu_features

AVX2, AVX512 = ("avx2" in cpu_features(), "avx512f" in cpu_features())
ROWS = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)


@pytest.fixture
def here(monkeypatch):
    """This machine's fingerprint, with two features more than nothing, and without a cap."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr("lepton_xla.compiler.fingerprint.cpu_features", lambda: ("avx", "avx2", "avx512f"))
    return Fingerprint.of()


def capped(here, cap, *needs):
    return msgspec.structs.replace(here, cpu_features="", cap=cap, needs=" ".join(needs))


def test_the_best_code_is_chosen(here, monkeypatch):
    narrow, wide = capped(here, "AVX2", "avx2"), capped(here, "AVX512", "avx2", "avx512f")
    assert here.best([narrow, here, wide]) == here
    assert here.best([narrow, wide]) == wide
    assert here.best([wide, narrow]) == wide
    assert here.best([narrow, capped(here, "AVX512", "avx512f", "avx512_vnni")]) == narrow
    assert here.best([capped(here, "AVX2", "sse4a")]) == here
    other = msgspec.structs.replace(narrow, jaxlib="0.1")
    assert here.best([other]) == here
    assert here.best([msgspec.structs.replace(narrow, machine="aarch64")]) == here
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    under = Fingerprint.of()
    assert under.best([narrow, wide, here]) == narrow
    assert under.best([wide, here]) == under
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2 --xla_cpu_enable_fast_math=true")
    assert Fingerprint.of().best([narrow]) == Fingerprint.of()


def test_what_code_needs_is_read_from_it():
    assert needed_features(b"nothing") is None
    text = ",".join(["+avxvnni", "+sse3", "+bmi", "+bmi2", "+sha", "+prefer-256-bit", *["-avx512f"] * 20])
    assert needed_features(b"\x00" + text.encode() + b"\x00") == {"avx_vnni", "pni", "bmi1", "bmi2"}


@pytest.mark.parametrize(("name", "said"), [("avx2", "there is no target 'avx2'"), ("cpu-avx512", "lacks avx512f")])
def test_targets_that_there_are_not(monkeypatch, name, said):
    monkeypatch.setattr("lepton_xla.compiler.targets.cpu_features", lambda: ("avx2",))
    with pytest.raises(lx.CompileError, match=said):
        check_targets(["aarch64", name])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact with weights of which int8 and float products are made, saved."""
    draw = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in (("w", (32, 64)), ("v", (64, 4)))
    }
    program = lx.trace(
        lambda w, x: jnp.tanh(x @ w["w"]) @ w["v"], weights, {"x": lx.TensorSpec(("batch", 32), "float32")}
    )
    small = lx.optimize(program, lx.Recipe.load("int8").replace({"measure": False}), buckets={"batch": (1, 8)})
    path = tmp_path_factory.mktemp("targets") / "net.lepton"
    lx.compile(small, {"batch": (1, 8)}).save(path)
    return path


def loaded(path, cap):
    """The answers of a process whose XLA keeps to a cap, and whether it compiled."""
    code = (
        "import sys, numpy as np, lepton_xla as lx\n"
        "model = lx.load(sys.argv[1])\n"
        "np.save(sys.argv[2], model(x=np.load(sys.argv[3]))['output'])\n"
        "print(model.route)"
    )
    rows, out = path.parent / "rows.npy", path.parent / "out.npy"
    np.save(rows, ROWS)
    environ = os.environ | {"XLA_FLAGS": f"--xla_cpu_max_isa={cap}" if cap else "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, path, out, rows], env=environ, capture_output=True, text=True, check=True
    )
    return np.load(out), done.stdout.strip()


@pytest.mark.skipif(not AVX2, reason="this CPU has no AVX2")
def test_the_same_artifact_answers_equally_under_a_cap(artifact, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    (target,) = add_targets(artifact, ["cpu-avx2"])
    assert target.route == "executables"
    sets = read_manifest(Store(artifact)).executables.values()
    (needs,) = [entry.target.needs.split() for entry in sets if entry.target.cap == "AVX2"]
    assert "avx2" in needs
    assert not [name for name in needs if name.startswith("avx512")]
    whole, whole_route = loaded(artifact, "")
    narrow, route = loaded(artifact, "AVX2")
    assert (whole_route, route) == ("executables", "executables")
    np.testing.assert_allclose(narrow, whole, rtol=1e-5, atol=1e-5)
    assert lx.verify(artifact).extra == ()


@pytest.mark.slow
@pytest.mark.skipif(not AVX512, reason="this CPU has no AVX-512")
def test_code_for_avx512_is_taken_where_there_is_none_for_just_this_machine(artifact, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    path = shutil.copytree(artifact, tmp_path / "net.lepton")
    add_targets(path, ["cpu-avx512", "cpu-avx2"])
    # As on another machine: what was compiled for this one is not there.
    expected, _ = loaded(path, "")
    monkeypatch.setattr("lepton_xla.compiler.fingerprint.cpu_features_digest", lambda: "0" * 16)
    model = lx.load(path)
    assert model.route == "executables"
    np.testing.assert_allclose(model(x=ROWS)["output"], expected, rtol=1e-5, atol=1e-5)
    targets = [entry.target for entry in model.manifest.executables.values()]
    assert Fingerprint.of().best(targets).cap == "AVX512"


def test_a_program_that_is_not_for_a_platform_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lepton_xla.compiler.portable._PLATFORMS", ("cpu",))
    program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    lx.compile(program, {"batch": (1,)}).save(tmp_path / "only.lepton")
    assert add_targets(tmp_path / "only.lepton", ["aarch64"])[0].route == "stablehlo"
    with pytest.raises(lx.CompileError, match=r"target 'tpu': the portable program of .* is only for cpu"):
        add_targets(tmp_path / "only.lepton", ["tpu"])
