"""The example runs to its end with little training, and its summary has what it promises."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow  # half a minute, most of it XLA's
def test_trains_a_small_student() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_digits.py", "--steps", "60"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((ROOT / "build" / "train_digits" / "summary.json").read_text())
    assert {"accuracy_float", "accuracy", "bytes_float", "bytes", "latency_ratio"} <= summary.keys()
    assert summary["bytes"] < summary["bytes_float"] / 4
    assert summary["accuracy"] > 0.8
    assert f"{summary['bytes']:,}" in done.stdout
