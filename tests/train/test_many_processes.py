"""Runs of several processes: other numbers of them, one that hangs, is told to end, or cannot write."""

import fcntl
import json

import pytest
from runs_of_killable import complete, ran

pytestmark = pytest.mark.slow

LONG = {"LONG_COMPILE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    done = ran(tmp_path_factory.mktemp("undisturbed") / "run", 2)
    assert done.code == 0, done.said
    return done.digest


def losses(log):
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {each["step"]: each["loss"] for each in records if each["kind"] == "train"}


def test_goes_on_with_another_number_of_processes(tmp_path):
    """With two, four and one process: the samples of Grain's iterator go on, and losses are those of one process."""

    def run(folder, processes, steps):
        log = tmp_path / f"{folder}.jsonl"
        done = ran(tmp_path / folder, processes, GRAIN="1", LOG=str(log), STEPS=str(steps))
        assert done.code == 0, done.said
        return done.samples

    whole = run("whole", 1, 18)
    assert len({number for batch in whole[:8] for number in batch}) == 64  # the first pass over the data
    parts = [run("parts", processes, steps) for processes, steps in ((2, 5), (4, 11), (1, 18))]
    assert [len(part) for part in parts] == [5, 6, 7]
    assert [batch for part in parts for batch in part] == whole
    expected = losses(tmp_path / "whole.jsonl")
    assert len(expected) == 18
    assert losses(tmp_path / "parts.jsonl") == pytest.approx(expected, rel=1e-4)


def test_each_may_give_its_own_rows(tmp_path, undisturbed):
    done = ran(tmp_path / "run", 2, LOCAL="1")
    assert (done.code, done.digest) == (0, undisturbed), done.said


def test_the_first_ones_evaluation_counts(tmp_path, undisturbed):
    """Otherwise they would keep other weights, and stop at other steps."""
    done = ran(tmp_path / "run", 2, UNEQUAL="1")
    assert (done.code, done.digest) == (0, undisturbed), done.said


def test_one_that_hangs_in_its_data_is_found_and_all_start_again(tmp_path, undisturbed):
    folder = tmp_path / "run"
    done = ran(folder, 2, ("--watchdog-s", 8, "--max-restarts", 2), STRIKE="between:HANG::1")
    assert done.code == 0, done.said
    assert "rank 1 hangs: no progress for" in done.said
    # The other one gives its devices the step after that, and waits.
    assert "the limit is 8 s; it is at step 6 in phase data; rank 0 is at step 7 in phase step" in done.said
    assert "restart 1 of 2" in done.said
    assert done.steps == [*range(8), *range(4, 10)]  # checkpoint 4 was the last
    assert done.digest == undisturbed


@pytest.mark.parametrize("strike", ["save:KILL:0.02:1", "again:KILL::0"])
def test_one_that_is_killed_in_a_save_and_all_start_again(tmp_path, undisturbed, strike):
    folder = tmp_path / "run"
    done = ran(folder, 2, ("--max-restarts", 1), STRIKE=strike)
    assert (done.code, done.digest) == (0, undisturbed), done.said
    assert f"rank {strike[-1]} was killed by SIGKILL; all are ended" in done.said
    assert not list(folder.glob("*tmp*"))


def test_one_that_always_hangs_is_given_up(tmp_path):
    launch = ("--watchdog-s", 6, "--max-restarts", 1)
    done = ran(tmp_path / "run", 2, launch, STRIKE="between:HANG::1", STRIKE_AGAIN="1")
    assert done.code == 124, done.said
    assert done.digest is None
    # The first restart got as far as checkpoint 4, so one more is made.
    assert done.said.count("rank 1 hangs") == done.said.count("all are ended") == 3
    assert complete(tmp_path / "run") == [4]


@pytest.mark.parametrize("rank", [":1", ""], ids=["one", "all"])
def test_told_to_end_in_an_evaluation(tmp_path, undisturbed, rank):
    folder = tmp_path / "run"
    told = ran(folder, 2, STRIKE=f"evaluate:TERM:{rank}")
    assert told.code == 75, told.said
    assert complete(folder)[-1] in range(7, 10)  # all agree on a step after the evaluation
    again = ran(folder, 2)
    assert (again.code, again.digest) == (0, undisturbed), again.said
    assert again.steps[0] == told.steps[-1] + 1


def test_told_to_end_or_killed_while_xla_compiles(tmp_path):
    expected = ran(tmp_path / "undisturbed", 2, **LONG)
    folder = tmp_path / "run"
    killed = ran(folder, 2, STRIKE="compile:KILL::1", **LONG)
    assert killed.code == 137, killed.said
    assert complete(folder) == []
    folder.with_suffix(".struck").unlink()
    told = ran(folder, 2, STRIKE="compile:TERM::1", **LONG)
    assert told.code == 75, told.said
    assert complete(folder)[-1] in (1, 2, 3)
    again = ran(folder, 2, **LONG)
    assert (again.code, again.digest) == (0, expected.digest), again.said
    assert again.steps[0] == told.steps[-1] + 1


@pytest.mark.parametrize(("rank", "limit"), [(0, 1 << 16), (1, 1 << 16), (1, 0)], ids=str)
def test_one_that_cannot_write_costs_all_one_checkpoint(tmp_path, undisturbed, rank, limit):
    """Its files may have so many bytes until step 7, so checkpoint 4 fails in a thread, or is not begun."""
    folder = tmp_path / "run"
    done = ran(folder, 2, STRIKE=f"before:{limit}::{rank}")
    assert (done.code, done.digest) == (0, undisturbed), done.said
    for reader in (0, 1):
        said = [
            line for line in done.said.splitlines() if line.startswith(f"[{reader}]") and "could not be saved" in line
        ]
        assert len(said) == 1, done.said
        assert f"could not be saved: process {rank}: " in said[0]
    assert complete(folder) == [8, 10]
    assert not list(folder.glob("*tmp*"))


def test_a_folder_in_use_is_refused_in_all(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "lepton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = ran(folder, 2)
    # The launcher ends the other one as soon as one has said it; without agreement the other waits for it.
    assert done.code == 1, done.said
    assert f"CheckpointError: process 0: {folder} is in use by another run" in done.said
    assert ran(folder, 2, STEPS="1").code == 0
