"""When the watchdog says that a run hangs, and whom it names. The clock is the test's."""

import pytest

from lepton_xla.errors import LaunchError
from lepton_xla.launch.heartbeat import Beat
from lepton_xla.launch.watchdog import Limits, Watchdog

LIMITS = Limits(10.0, compile_s=100.0, evaluate_s=50.0)


def beats(*steps_and_phases):
    return [None if each is None else Beat(each[0], 0, each[1]) for each in steps_and_phases]


def follow(*moments, running=None):
    """What the watchdog, which looks every quarter of a second, says first: (time, beats)."""
    count = len(moments[0][1])
    dog, now_s, seen = Watchdog(LIMITS, range(count), 0.0), 0.0, [None] * count
    for until_s, following in moments:
        while now_s <= until_s:
            text = dog.look(now_s, beats(*seen), running or [True] * count)
            if text:
                return text
            now_s += 0.25
        seen = following
    return dog.look(now_s, beats(*seen), running or [True] * count)


def test_steps_that_pass_are_progress():
    dog = Watchdog(LIMITS, [0], 0.0)
    for step in range(100):
        assert not dog.look(9.0 * step, beats((step, "step")), [True])


def test_a_step_that_stays_is_a_hang():
    steps = [(5, "step")]
    assert not follow((1.0, steps), (11.0, steps))
    text = follow((1.0, steps), (12.0, steps))
    assert text == "rank 0 hangs: no progress for 10.2 s, the limit is 10 s; it is at step 5 in phase step"


@pytest.mark.parametrize(
    ("phase", "limit_s"), [("start", 100), ("compile", 100), ("evaluate", 50), ("save", 50), ("step", 10), ("data", 10)]
)
def test_each_phase_has_its_limit(phase, limit_s):
    steps = [(5, phase)]
    assert not follow((1.0, steps), (0.5 + limit_s, steps))
    assert follow((1.0, steps), (1.5 + limit_s, steps))


def test_before_the_first_beat_the_limit_is_that_of_compiling():
    assert not follow((99.0, [None]))
    assert "has not told any progress yet" in follow((101.0, [None]))


def test_who_waits_for_one_behind_is_not_named():
    """Rank 0 could go on to step 22, and was still before rank 1 was; that one is not late yet as rank 0 would be."""
    first, then = [(22, "step"), (19, "step")], [(22, "step"), (20, "step")]
    text = follow((1.0, first), (3.0, then), (14.0, then))
    assert text.startswith("rank 1 hangs: no progress for 10.2 s, the limit is 10 s; it is at step 20 in phase step")


def test_the_one_behind_is_named():
    """Rank 1 sleeps in its data; rank 0 has begun the next step and waits for it."""
    seen = [(42, "step"), (41, "step"), (42, "step")]
    text = follow((1.0, [(41, "step")] * 3), (2.0, seen), (12.5, seen))
    assert text.startswith("rank 1 hangs: no progress for 10.2 s")
    assert text.endswith("rank 0 is at step 42 in phase step, rank 2 is at step 42 in phase step")


def test_of_several_at_one_step_the_one_without_a_batch_is_named():
    """Rank 1 sleeps in its data after an evaluation; rank 0, which was slower, waits for it in the step."""
    began = [(42, "evaluate"), (42, "data")]
    then = [(42, "step"), (42, "data")]
    text = follow((1.0, began), (2.0, then), (12.5, then))
    assert text.startswith("rank 1 hangs: no progress for 11.0 s, the limit is 10 s; it is at step 42 in phase data")
    text = follow((1.0, began[::-1]), (2.0, then[::-1]), (12.5, then[::-1]))
    assert text.startswith("rank 0 hangs")


def test_who_waits_for_one_that_compiles_does_not_hang():
    """Rank 1 compiles again, after another change of shape; rank 0 waits for it in a collective."""
    seen = [(42, "step"), (42, "compile")]
    assert not follow((1.0, seen), (100.5, seen))
    assert follow((1.0, seen), (102.0, seen)).startswith("rank 1 hangs: no progress for 100.2 s")


def test_a_compile_that_is_over_excuses_nobody():
    first = [(42, "step"), (42, "compile")]
    then = [(42, "step"), (42, "step")]
    assert not follow((1.0, first), (50.0, then), (59.5, then))
    assert follow((1.0, first), (50.0, then), (61.0, then)).startswith("rank 0 hangs")


def test_one_that_sleeps_while_another_evaluates_is_found():
    """Rank 1 never comes to the evaluation, in which rank 0 waits for it."""
    seen = [(42, "evaluate"), (42, "step")]
    assert not follow((1.0, seen), (50.5, seen))
    assert follow((1.0, seen), (52.0, seen)).startswith("rank 0 hangs")


def test_one_that_has_ended_is_not_watched():
    moments = [(1.0, [(42, "step"), (50, "step")]), (10.0, [(42, "step"), (51, "step")]), (15.0, [(42, "step")] * 2)]
    assert not follow(*moments, running=[False, True])
    assert follow(*moments).startswith("rank 0 hangs")


def test_a_process_of_a_larger_run_is_named_by_its_number_there():
    assert Watchdog(LIMITS, [7], 0.0).look(101.0, [None], [True]).startswith("rank 7 hangs")


def test_the_launchers_own_sleep_is_left_out():
    dog = Watchdog(LIMITS, [0], 0.0)
    assert not dog.look(1.0, beats((5, "step")), [True])
    dog.forgive(1000.0)  # a container was paused
    assert not dog.look(1005.0, beats((5, "step")), [True])
    assert dog.look(1011.5, beats((5, "step")), [True])


def test_limits():
    assert Limits(60.0) == Limits(60.0, 600.0, 600.0)
    assert Limits(60.0, 30.0).least_s == 30.0
    with pytest.raises(LaunchError, match="step_s must be above 0"):
        Limits(0.0)
    with pytest.raises(LaunchError, match="compile_s must be above 0"):
        Limits(1.0, -1.0)
