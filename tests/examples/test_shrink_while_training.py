"""The example runs to its end with few steps: the network is physically smaller, and as good."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("steps", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_most_of_the_training_runs_on_a_small_network(steps: int) -> None:
    summary = ROOT / "build" / "shrink_while_training" / "summary.json"
    summary.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "shrink_while_training.py", "--steps", str(steps), "--seeds", "1"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(summary.read_text(encoding="utf-8"))
    assert found["parameters_before"] >= 1_000_000
    assert found["parameters_after"] <= 100_000
    assert found["step_time_ratio"] < 0.6
    assert found["accuracy"] > 0.9
    assert re.search(r"step after / before shrinking 0\.\d\d, whole run .*, accuracy [+-]\d+\.\d\d points", done.stdout)
    if steps > 1000:
        assert found["run_time_ratio"] < 0.8
        assert found["accuracy_difference_points"] > -1
