"""Killed or told to end in an evaluation or a save: state and evaluations are those of an undisturbed run."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import lepton_xla as lx

ROOT = pathlib.Path(__file__).parents[2]


def run(folder, kill=None):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), LEPTON_CACHE="off")
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "test-cache"))
    environment.pop("KILL", None)
    if kill is not None:
        environment["KILL"] = kill
    command = [sys.executable, str(ROOT / "tests" / "train" / "killable.py"), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def complete(folder):
    return sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    done = run(tmp_path_factory.mktemp("undisturbed") / "run")
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_goes_on(folder, undisturbed):
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.strip()) == 64
    assert again.stdout == undisturbed
    assert complete(folder)[-1] == 10
    assert not list(folder.glob("*tmp*"))  # what the killed process left is gone


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    ["save:KILL:0", "save:KILL:0.02", "save:KILL:0.05", "save:KILL:0.1", "save:KILL:0.3", "between:KILL:0",
     "evaluate:KILL:0"],
)  # fmt: skip
def test_killed(tmp_path, undisturbed, place):
    folder = tmp_path / "run"
    killed = run(folder, place)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    struck = (tmp_path / "run.struck").read_text()
    if place == "save:KILL:0":
        assert struck == ""  # it died before its first checkpoint was complete
    if place.startswith(("between", "evaluate")):
        assert struck == "4"
    check_goes_on(folder, undisturbed)


@pytest.mark.parametrize(
    ("place", "saved"),
    [("evaluate:TERM:0", [6]), pytest.param("save:TERM:0.05", range(4, 10), marks=pytest.mark.slow)],
)
def test_told_to_end(tmp_path, undisturbed, place, saved):
    folder = tmp_path / "run"
    told = run(folder, place)
    assert told.returncode == lx.train.Preempted(0).code == 75, told.stderr
    assert told.stdout == ""
    assert complete(folder)[-1] in saved
    check_goes_on(folder, undisturbed)
