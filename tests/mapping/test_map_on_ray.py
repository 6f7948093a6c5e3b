"""`leptonx map --ray`, where the extra `ray` is installed: Ray Data on this machine, an actor killed on the way."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import lepton_xla as lx

pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("ray.data", reason="needs the extra ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def actors():
    """Processes of Ray that run our actor."""
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"_Runner" in (entry / "cmdline").read_bytes():
                yield int(entry.name)


def test_the_same_bytes_as_one_process_although_an_actor_is_killed(tmp_path):
    weights = {"w": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
    program = lx.trace(lambda w, x: {"y": x @ w["w"]}, weights, {"x": lx.TensorSpec(("batch", 4), "float32")})
    lx.compile(program, {"batch": (1, 8)}).save(tmp_path / "m.lepton")
    x = np.random.default_rng(1).standard_normal((40_000, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x)
    command = [sys.executable, "-m", "lepton_xla", "map", "m.lepton", "a.npz"]
    options = ["--part-rows", "100", "--json"]
    subprocess.run([*command, "one.npz", *options], cwd=tmp_path, check=True, capture_output=True)
    ray = [*command, "ray.npz", *options, "--ray", "--processes", "2"]
    parts, killed = tmp_path / ".ray.npz.parts", []
    with subprocess.Popen(ray, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not killed:
            if parts.exists() and len(list(parts.glob("*.npz"))) > 20:
                killed = list(actors())[:1]
                for victim in killed:
                    os.kill(victim, signal.SIGKILL)
            time.sleep(0.01)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert killed
    assert json.loads(out)["rows"] == 40_000
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "ray.npz").read_bytes()
    with np.load(tmp_path / "ray.npz") as found:
        np.testing.assert_allclose(found["y"], x.astype(np.float64) @ weights["w"], atol=1e-5)
