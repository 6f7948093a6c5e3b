"""The example runs to its end with little training, and each step makes the model smaller."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_each_step_is_a_row_and_the_artifact_is_small() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "compress.py", "--epochs", "2"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, last = done.stdout.splitlines()
    assert " ".join(header.split()) == "accuracy operations weights, bytes on disk, bytes ms of float"
    figures = {row[:28].strip(): [float(cell.strip("%").replace(",", "")) for cell in row[28:].split()] for row in rows}
    assert list(figures) == [
        "float",
        "shrunk to half",
        "trained on",
        "pruned while trained on",
        "in 4 bits, trained on",
    ]
    accuracy, operations, memory, disk = ({name: row[k] for name, row in figures.items()} for k in range(4))
    assert operations["shrunk to half"] <= operations["float"] / 2
    assert memory["shrunk to half"] < memory["float"] / 2
    assert accuracy["shrunk to half"] < accuracy["trained on"]
    assert disk["pruned while trained on"] < disk["trained on"] / 4
    assert disk["in 4 bits, trained on"] < disk["pruned while trained on"] / 2
    assert accuracy["in 4 bits, trained on"] > 80
    said = re.fullmatch(r"build/compress/digits\.lepton: accuracy (\S+)%, weights (\S+) times smaller", last)
    assert said is not None
    assert abs(float(said[1]) - accuracy["in 4 bits, trained on"]) < 0.5
    assert float(said[2]) > 40
