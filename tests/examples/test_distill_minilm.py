"""The example runs to its end on made-up questions, says what is missing, and its student answers like its teacher."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import lepton_xla as lx

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["logits,labels", "logits,features"])
def test_the_student_is_half_as_large_and_has_learned(losses: str, tmp_path: pathlib.Path) -> None:
    script = ROOT / "examples" / "distill_minilm.py"
    steps = ["--teacher-steps", "150", "--steps", "100", "--losses", losses, "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *steps],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "LEPTON_DATA": str(tmp_path / "nothing")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BANKING77, train.csv and test.csv, in" in done.stdout.splitlines()[0]
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["student"]["bytes"] < 0.7 * found["teacher"]["bytes"]
    assert found["student in int8"]["bytes"] < found["student"]["bytes"]
    assert found["teacher"]["accuracy"] > 0.5
    assert found["student"]["accuracy"] > found["student before"]["accuracy"]
    assert found["student"]["accuracy"] > found["teacher"]["accuracy"] - 0.1
    assert lx.load(tmp_path / "student.lepton").outputs["output"].shape == ("batch", 4)
    assert (tmp_path / "made-up-150" / "answers" / "manifest.json").exists() == ("features" not in losses)


@pytest.mark.slow
def test_one_command_distils_rounds_and_compiles_the_student(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "small.lepton")

    def leptonx(*arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "lepton_xla", *arguments, "--json"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "LEPTON_DATA": str(tmp_path / "nothing")},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    example = "examples/distill_minilm.py"
    trained = leptonx("train", f"{example}:small", "--recipe", "int8", "--steps", "60", "-o", path)
    assert trained["weights_bytes"] < 0.4 * trained["weights_bytes_float"]
    judged = leptonx("eval", f"{example}:whole", path)
    assert judged["float"]["accuracy"] > 0.5
    assert judged["difference"]["accuracy"] > -0.1
