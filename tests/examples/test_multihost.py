"""One run in several layouts of processes and devices, started by `leptonx launch local`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def losses(folder, processes, devices, name):
    """The losses of 20 steps, as they were written down."""
    log = folder / f"{name}.jsonl"
    launch = [sys.executable, "-m", "lepton_xla", "launch", "local", "--watchdog-s", "60"]
    launch += ["--processes", str(processes), "--devices", str(devices), "--", sys.executable]
    done = subprocess.run(
        [*launch, ROOT / "examples" / "multihost.py", "--steps", "20", "--log", log],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{processes * devices} devices, {processes} processes: accuracy" in done.stdout
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_layouts_train_the_same_model(tmp_path):
    alone = losses(tmp_path, 1, 1, "alone")
    assert len(alone) == 20
    assert alone[-1] < 0.1 * alone[0]
    assert losses(tmp_path, 1, 4, "devices") == pytest.approx(alone, rel=1e-4)
    both = losses(tmp_path, 2, 2, "both")
    assert both == pytest.approx(alone, rel=1e-4)
    assert losses(tmp_path, 2, 2, "again") == both  # one layout: bit for bit
