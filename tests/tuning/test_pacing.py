"""A search keeps to its minutes, on a clock that only the steps move."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trainings import SPEC
from test_tune import FEW, PROGRAM, Watch, X, found

import lepton_xla as lx
from lepton_xla.passes.quantization.measurement import Timing
from lepton_xla.recipe import to_toml
from lepton_xla.tuning import CHOICES, Budget, Constraints, Trial, costs, scores, searching
from lepton_xla.tuning.candidates import Estimates
from lepton_xla.tuning.choices import find_groups
from lepton_xla.tuning.costs import stored_weights
from lepton_xla.tuning.journals import Journal
from lepton_xla.tuning.judging import Drop
from lepton_xla.tuning.pacing import Pace, TimeUpError
from lepton_xla.tuning.scores import output_errors
from lepton_xla.tuning.trainings import Trainer

MINUTES = 10


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    ticks = Clock()
    monkeypatch.setattr(searching, "Pace", lambda minutes: Pace(minutes, ticks))
    return ticks


@pytest.fixture
def paced(clock, monkeypatch):
    """Runs a search whose trials have two steps; gives what was found, and when each trial began."""
    groups, _ = find_groups(PROGRAM, FEW)
    made_up = {"error": [0.0, 1e-3, 1e-2, 1e-1], "bytes": [400.0, 100.0, 50.0, 25.0], "us@0": [0.0] * 4}
    made_up["memory"] = made_up["operations"] = made_up["bytes"]
    arrays = {kind: [np.array(each)] * len(groups) for kind, each in made_up.items()}
    estimates = Estimates(groups, arrays, dict.fromkeys(made_up, 0.0) | {"us@0": 100.0})
    monkeypatch.setattr(searching, "estimated", lambda *_a, **_k: estimates)

    def run(seconds, **changes):
        each, began = iter(seconds), []

        def measure(self, recipe, _max_drop, say, *, train=None, **described):
            began.append(clock.now)
            half = next(each, 10.0) / 2
            if train is not None:
                train()
            for line in ("evaluate", "time calls"):
                clock.now += half
                say(line)
            drop = Drop(0.0, -1.0, 1.0, 300, 0)
            measured = {"judged": 1.0, "reported": drop, "bytes": 500 - len(began), "memory": 500, "output_error": 0.1}
            trial = Trial(recipe.name, to_toml(recipe), **described)
            return dataclasses.replace(trial, us=(80.0,), float_us=(100.0,), seconds=clock.now - began[-1], **measured)

        monkeypatch.setattr(searching.Workshop, "measure", measure)
        return found(**{"budget": Budget(MINUTES), **changes}), began

    return run


def test_no_trial_begins_that_would_not_end(paced, clock):
    tuned, began = paced([170.0] * 50)
    assert began == [0, 170, 340]
    assert (clock.now, tuned.seconds, tuned.stopped) == (510, 510, "time")
    assert tuned.skipped == ("further candidates",)


def test_presets_leave_half_of_the_time(paced, clock):
    presets = ("int8", "int8-weight-only", "int4-weight-only")
    tuned, _ = paced([200.0] * 9, presets=presets)
    assert [trial.origin == "preset" for trial in tuned.trials] == [True, False, False]
    assert tuned.skipped[-1] == "presets: int8-weight-only, int4-weight-only"
    clock.now = 0.0
    tuned, _ = paced([400.0] * 9, presets=presets)
    assert [trial.origin for trial in tuned.trials] == ["preset"]
    assert tuned.skipped[0] == "all candidates but presets"


def test_a_trial_that_takes_far_longer_than_the_last_is_given_up(paced, clock):
    tuned, _ = paced([100.0, 1200.0])
    assert (clock.now, len(tuned.trials), tuned.stopped) == (700, 1, "time")


def test_one_is_measured_however_long_it_takes(paced, clock):
    tuned, _ = paced([5000.0])
    assert (clock.now, len(tuned.trials)) == (5000, 1)


def test_time_is_left_to_build_the_best_again(paced, clock):
    paced([170.0] * 9, budget=Budget(MINUTES, rebuild=True))
    assert clock.now == 340


def test_a_training_that_would_not_end_is_given_up_early(paced, clock, monkeypatch):
    pytest.importorskip("optuna")
    seen, compiling = [], 0.0

    def train(self, recipe, settings, check, at):
        clock.now += compiling
        for share in (0.125, 0.25, 1.0):
            clock.now += 100 * share
            seen.append(share)
            at(share)

    monkeypatch.setattr(Trainer, "train", train)
    given = {"training": SPEC, "budget": Budget(MINUTES, trials=1, trainings=9)}
    tuned, _ = paced([10.0, *[20.0] * 9], **given)
    trained = sum(bool(trial.training) for trial in tuned.trials)
    assert trained == 3  # each takes 157.5 s, from 10 s on
    assert clock.now <= 600
    assert "6 of 9 trainings" in tuned.skipped
    clock.now = 0.0
    seen.clear()
    tuned, _ = paced([550.0, *[20.0] * 9], **given)
    assert seen == [0.125, 0.25]  # 37.5 s for a quarter: 150 s would end beyond 11 minutes
    assert not any(trial.training for trial in tuned.trials)
    assert "9 of 9 trainings" in tuned.skipped
    clock.now, compiling = 0.0, 200.0
    tuned, _ = paced([10.0, 20.0], **{**given, "budget": Budget(MINUTES, trials=1, trainings=1)})
    assert clock.now == 10 + 200 + 137.5 + 20  # compiling is not taken for steps, of which an eighth would be 212 s
    assert any(trial.training for trial in tuned.trials)


def test_what_looks_best_is_trained_for_all_the_time_that_is_left(paced, clock, monkeypatch):
    pytest.importorskip("optuna")
    trained = []

    def train(self, recipe, settings, check, at):
        trained.append((clock.now, settings["steps"], settings["channels"]))
        for share in (0.125, 1.0):
            clock.now += 80 * settings["steps"] * (share - (0.125 if share == 1.0 else 0))
            at(share)
        check(9.0)

    monkeypatch.setattr(Trainer, "train", train)
    # Nothing is as small as it should be, and what is measured later is smaller.
    limits = Constraints(max_drop=5.0, max_bytes=300)
    tuned, _ = paced([100.0, *[20.0] * 9], training=SPEC, constraints=limits, budget=Budget(MINUTES, trials=1))
    starts, steps, channels = zip(*trained, strict=True)
    assert starts == (100, 200, 300)  # to half of the rest, 350 s, as long as they are expected to end by then
    assert steps == (1, 1, 3.0)
    assert channels == (0.15, 0.0, 0.0)
    assert 500 < clock.now <= 600
    assert tuned.stopped == "time"
    assert [trial.training["steps"] for trial in tuned.trials if trial.training] == list(steps)
    # One that is small enough, and lost too much, gets the same formats again.
    clock.now = 0.0
    limits = Constraints(max_drop=0.5, max_bytes=600)
    tuned, _ = paced([100.0, *[20.0] * 9], training=SPEC, constraints=limits, budget=Budget(MINUTES, trials=1))
    *_, short, long = [trial for trial in tuned.trials if trial.training]
    assert (long.training["steps"], long.choices) == (3.0, short.choices)
    assert long.recipe.partition("\n")[2] == short.recipe.partition("\n")[2]
    # All are small enough: where the drop is to be least, the best still has more to learn; otherwise others are tried.
    for objective, most in (("metric", 3.0), ("bytes", 1.0)):
        clock.now = 0.0
        limits = Constraints(max_drop=5.0, max_bytes=600)
        given = {"training": SPEC, "constraints": limits, "budget": Budget(MINUTES, trials=1), "objective": objective}
        tuned, _ = paced([100.0, *[20.0] * 9], **given)
        assert max(trial.training["steps"] for trial in tuned.trials if trial.training) == most


@pytest.mark.parametrize("longest", [40.0, 700.0, 5000.0])
def test_minutes_hold_within_a_candidate_however_long_each_step_takes(clock, monkeypatch, longest):
    random, steps = np.random.default_rng(0), []

    def step(kind, share=1.0):
        steps.append(kind)
        clock.now += share * longest * random.uniform(0.5, 1.0)

    def measure(self, recipe, _max_drop, say, **described):
        for line in ("evaluate", "time calls"):
            step("candidate", 0.5)
            say(line)
        measured = {"judged": 1.0, "reported": Drop(0.0, -1.0, 1.0, 300, 0), "bytes": 500 - len(steps), "memory": 500}
        trial = Trial(recipe.name, to_toml(recipe), **described, **measured)
        return dataclasses.replace(trial, us=(80.0,), float_us=(100.0,), seconds=longest)

    class Probed:  # each probe ends by fetching what it found
        def __getattr__(self, name):
            return getattr(jax, name)

        def device_get(self, found):
            step("probe")
            return jax.device_get(found)

    monkeypatch.setattr(searching.Workshop, "measure", measure)
    monkeypatch.setattr(costs, "quantize", lambda *a, store=costs.quantize: step("format", 0.1) or store(*a))
    monkeypatch.setattr(scores, "jax", Probed())
    monkeypatch.setattr(
        costs, "compare", lambda wanted, _: step("products") or [Timing({}, 9.0, 8.0, None)] * len(wanted)
    )
    given = {
        "presets": ("int8", "int4-weight-only"),
        "choices": (CHOICES[0], CHOICES[2], CHOICES[1]),
        "data": [{"x": X[:64]}] * 2,
    }
    tuned = found(budget=Budget(MINUTES, trials=9), **given)
    assert clock.now <= 60 * MINUTES + 1.1 * longest
    assert tuned.trials[0].origin == "preset"
    assert tuned.skipped or tuned.stopped == "done"
    assert {"format", "candidate"} <= set(steps)
    if longest == 40:
        assert set(steps) == {"format", "candidate", "probe", "products"}


def test_formats_that_there_is_no_time_for_are_told():
    clock = Clock()
    groups, plans = find_groups(PROGRAM, CHOICES[:4])

    def store(minutes):
        clock.now = 0.0
        pace = Pace(minutes, clock)

        def progress(*_):
            clock.now += 1.0

        return list(stored_weights(PROGRAM, groups, plans, progress, pace)), pace.skipped

    assert (
        store(0.1)
        == (  # 15 % are a second
            ["float", "int8 x int8"],
            [f"choices, which no weight gets: {', '.join(repr(choice.name) for choice in CHOICES[2:4])}"],
        )
    )
    assert store(10) == ([choice.name for choice in CHOICES[:4]], [])


def test_formats_are_stored_in_the_order_of_the_choices():
    # A table that rows are looked up in takes int8 once, whatever activations do, and comes first.
    weights = {"table": jnp.ones((8, 8)), "q": jnp.ones((8, 8))}
    program = lx.trace(lambda w, x: w["table"][x] @ w["q"], weights, {"x": lx.TensorSpec(("batch",), "int32")})
    groups, plans = find_groups(program, CHOICES[:4])
    assert [each.name for each in groups[0].choices] == ["float", "int8 x int8", "int4"]
    assert list(stored_weights(program, groups, plans)) == ["float", "int8 x int8", "int8", "int4"]


def test_scoring_stops_in_time():
    clock = Clock()
    pace = Pace(1, clock)
    groups, plans = find_groups(PROGRAM, FEW[:2])
    stored = stored_weights(PROGRAM, groups, plans)
    batches = [{"x": X[i : i + 50]} for i in range(0, 600, 50)]

    def progress(*_):  # as each batch begins
        clock.now += 5.0

    # Of 60 s a fifth, and the last goes beyond.
    some = output_errors(PROGRAM, groups, plans, batches, stored, progress=progress, pace=pace)
    assert pace.skipped == ["scores by 9 of 12 batches of calibration data"]
    assert all(np.all((each[1:] > 0) & (each[1:] < 0.1)) for each in some)


def test_timing_stops_in_time(monkeypatch):
    clock, calls = Clock(), []
    pace = Pace(1, clock)

    def compare(wanted, timer):
        calls.append(len(wanted))
        clock.now += 7.0
        return [Timing({}, 10.0, 8.0, None, kernel_us=2.0)] * len(wanted)

    monkeypatch.setattr(costs, "compare", compare)
    monkeypatch.setattr(costs, "AT_ONCE", 1)
    groups, plans = find_groups(PROGRAM, CHOICES[:2])
    how = {"unpacks": True, "progress": lambda *_: None, "pace": pace}
    (times,) = costs.times_of_choices(PROGRAM, groups, plans, [{"batch": 2}], Watch(1.0), **how)
    assert calls == [1, 1]
    assert [each.tolist() for each in times] == [[0, -16], [0, 0]]
    assert pace.skipped == ["times of 1 products, which are taken to be those of float"]


def test_a_step_may_go_a_tenth_beyond():
    clock = Clock()
    pace = Pace(1, clock)
    clock.now = 65.0
    pace.check()
    with pytest.raises(TimeUpError, match="the time was up"):
        pace.check(rest_s=2.0)
    assert not pace.fits("trial")
    assert math.isinf(Pace.endless()._whole_s)


def test_what_time_was_short_for_is_measured_again_if_there_is_more(tmp_path):
    path, calls = tmp_path / "a.jsonl", []

    def run(minutes, left_out):
        pace = Pace(minutes, Clock())

        def measure():
            calls.append(minutes)
            pace.skip("half") if left_out else None
            return minutes

        return Journal(path, {}).within("scores", pace, measure), pace.skipped

    assert run(1, True) == (1, ["half"])
    assert run(1, True) == run(0.5, True) == (1, ["half"])  # no time for more, and it is told again
    assert run(2, False) == run(9, True) == (2, [])
    assert calls == [1, 2]
