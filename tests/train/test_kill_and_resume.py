"""A run that is killed, or told to end, and started again ends with the bits of one that nothing disturbed."""

import signal

import pytest
from runs_of_killable import complete, ran

import lepton_xla as lx

LONG = {"LONG_COMPILE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    done = ran(tmp_path_factory.mktemp("undisturbed") / "run")
    assert done.code == 0, done.said
    assert done.steps == list(range(10))
    return done.digest


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("undisturbed") / "run", **LONG).digest


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def check(folder, undisturbed, strike, goes_on_at, **environ):
    """Strike a run, start it again, and compare its end with an undisturbed run's."""
    first = ran(folder, STRIKE=strike, **environ)
    number = signal.Signals[f"SIG{strike.split(':')[1]}"]
    assert first.code == (lx.train.Preempted(0).code if number == signal.SIGTERM else -number), first.said
    assert first.digest is None
    struck = folder.with_suffix(".struck").read_text()  # checkpoints that were complete then
    again = ran(folder, **environ)
    assert again.code == 0, again.said
    assert again.steps[0] in goes_on_at
    assert again.steps == list(range(again.steps[0], 10))
    assert again.digest == undisturbed
    assert complete(folder)[-1] == 10
    assert not list(folder.glob("*tmp*"))  # what the killed process left is gone
    return struck


@pytest.mark.parametrize(
    ("strike", "goes_on_at"),
    [
        ("again:KILL", {4, 8}),
        ("evaluate:TERM", {6}),
        *(slow(f"save:KILL:{delay}", {0, 4}) for delay in (0, 0.02, 0.05, 0.1, 0.3)),
        slow("between:KILL", {4}),
        slow("evaluate:KILL", {4}),
        slow("trace:KILL", {0}),
        slow("trace:TERM", {1}),
        slow("between:TERM", {7}),
        slow("save:TERM:0.05", range(4, 10)),
    ],
)
def test_ends_with_the_same_bits(tmp_path, undisturbed, strike, goes_on_at):
    struck = check(tmp_path / "run", undisturbed, strike, goes_on_at)
    if strike == "save:KILL:0":
        assert struck == ""  # it died before its first checkpoint was complete
    if strike in ("between:KILL", "evaluate:KILL"):
        assert struck == "4"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "goes_on_at"), [("KILL", {0}), ("TERM", {1})])
def test_while_xla_compiles(tmp_path, undisturbed_long, what, goes_on_at):
    """The signal comes half a second into XLA's compile, which takes several; SIGTERM is obeyed after a step."""
    check(tmp_path / "run", undisturbed_long, f"compile:{what}", goes_on_at, **LONG)
