"""`leptonx learn` on files: the artifact, the report, the plot, and what is refused."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import learning_model
import pytest
from click.testing import CliRunner

import lepton_xla as lx
from lepton_xla.cli import main

TARGET = f"{pathlib.Path(learning_model.__file__)}:spec"


@pytest.fixture
def leptonx(bases, sampled, tmp_path):
    def run(*more, code=0):
        common = [
            "learn", TARGET, "--samples", sampled.folder, "--base", bases["int8"], "--folder", tmp_path / "learning",
            "--steps", "100",
        ]  # fmt: skip
        result = CliRunner().invoke(main, [str(each) for each in (*common, *more)], prog_name="leptonx")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr.splitlines()[-1]

    return run


def test_an_artifact_a_report_and_a_plot(leptonx, bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(600, 1, sign=-1.0))
    found = json.loads(leptonx("-o", tmp_path / "better.lepton", "--plot", tmp_path / "plot.png", "--json"))
    assert (found["phase"], found["path"]) == ("kept", str(tmp_path / "better.lepton"))
    assert sum(window["rows"] for window in found["accuracy"]) == 600
    x, labels = learning_model.rows(400, 99, sign=-1.0)
    better = lx.load(tmp_path / "better.lepton", base=lx.load(bases["int8"]))
    assert (better(x=x)["output"].argmax(-1) == labels).mean() > 0.9
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "exists; give another --output" in leptonx("-o", tmp_path / "better.lepton", code=2)


@pytest.mark.slow
def test_a_report_for_people_and_an_artifact_that_is_replaced(leptonx, bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(600, 1, sign=-1.0))
    shutil.copytree(bases["float"], tmp_path / "better.lepton")
    text = leptonx("-o", tmp_path / "better.lepton", "--overwrite")
    assert f"round 1: kept as {tmp_path / 'better.lepton'}" in text
    assert "accuracy of what was answered" in text
    assert lx.load(tmp_path / "better.lepton", base=lx.load(bases["int8"])).manifest.is_update


@pytest.mark.slow
def test_rounds_one_after_another_outlive_errors(bases, sampled, tmp_path):
    command = [
        sys.executable, "-m", "lepton_xla", "learn", TARGET, "--samples", sampled.folder, "--base", bases["int8"],
        "--folder", tmp_path / "learning", "--steps", "100", "--loop", "--every", "0.2s", "--json",
        "-o", tmp_path / "better.lepton", "--overwrite",
    ]  # fmt: skip
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = (line for line in process.stderr if line.startswith("leptonx: "))
            assert all("there are no samples of this model" in next(lines) for _ in range(2))
            sampled.add(*learning_model.rows(600, 1, sign=-1.0))
            until = time.monotonic() + 60
            while not (tmp_path / "learning/blobs/history.jsonl").exists():
                assert time.monotonic() < until
                time.sleep(0.05)
            assert any("0 labelled rows are new since round 1" in line for line in lines)
        finally:
            process.terminate()
        assert json.loads(process.stdout.read())["phase"] == "kept"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-o", "x.lepton"], "there are no samples of this model"),
        ([], "give --server to push the result, or --output"),
        (["--every", "10m"], "--every is for rounds one after another"),
        (["--loop", "-o", "x.lepton"], "--loop writes --output once a round; give --overwrite too"),
        (["--loop", "--every", "soon"], "--every 'soon': expected a duration such as 10s, 2m or 1h"),
        (["--loop", "--every", "0s"], "--every 0s: leave some time between rounds"),
        (["--direct", "-o", "x.lepton"], "--direct without --server changes nothing"),
        (["--server", "http://127.0.0.1:9", "-o", "x.lepton"], "give --server to push the result, or --output"),
        (["--fresh", "2", "-o", "x.lepton"], "fresh = 2.0; expected above 0 and at most 1"),
        (["--held-out", "0", "-o", "x.lepton"], "held_out = 0.0; expected above 0"),
        (["--server", "http://127.0.0.1:9", "--rollout", "none.json"], "none.json cannot be read"),
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9: no answer after"),
        (["--plot", "nowhere/plot.png", "-o", "x.lepton"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(leptonx, more, words):
    assert words in leptonx(*more, code=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        ("[]", "expected an object with stages, rollback, promote"),
        ('{"stages": 5}', "stages = 5; expected a list"),
        ('{"stages": [{"share": 2}]}', "the rollout cannot be asked for: Expected `float` < 1.0 - at"),
        ('{"rollback": ["sometimes"]}', "'sometimes' is no condition"),
    ],
)  # fmt: skip
def test_a_rollout_that_no_server_would_take_is_refused_before_anything_is_trained(leptonx, tmp_path, text, words):
    file = tmp_path / "rollout.json"
    file.write_text(text)
    assert words in leptonx("--server", "http://127.0.0.1:9", "--rollout", file, code=2)
