"""Rollouts: what goes on, what goes back, and what is decided when somebody or something interferes."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from fake_artifacts import make_artifact

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models import plans
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.protocol.traffic import RolloutRequest, Stage
from lepton_xla.serve.traffic.director import Director
from lepton_xla.serve.traffic.evidence import Tally, write_evidence

BOUNDS = (0.01, 0.1, 1.0)
STAGES = (Stage(shadow=0.2, answers=100), Stage(share=0.1, answers=300), Stage(share=0.5, answers=1500))


class Simulated:
    """A repository whose versions answer with given accuracies, and a director that looks at it.

    Attributes:
        repository: of one model, `m`, whose version 1 is stable and 2 is new.
        counts: version -> what it has counted, as a server would.
        told: the audit log.
    """

    def __init__(self, folder, seed=0, **request):
        self.repository = Repository(folder / "MODELS")
        artifact = make_artifact(folder / "tiny.lepton")
        for _ in range(2):
            self.repository.push(artifact, "m")
        self.repository.promote("m", "1")
        self.now_s = 1000.0
        self.entries = []
        self.told = []
        self.rerouted = 0
        self.loaded = {"1", "2"}
        self.draw = random.Random(seed)
        self.restart()
        asked = RolloutRequest(**{"version": "2", "stages": STAGES} | request)
        self.change(lambda plan, found: plans.with_rollout(plan, found, asked, "me", self.now_s))

    def restart(self):
        """Another process, whose counters begin at zero."""
        self.counts = {
            version: {
                "request_s": [0, 0, 0, 0, 0.0], "failures": 0, "rejected": 0, "expired": 0,
                "feedback": {"right": 0, "wrong": 0, "labels": {}},
                "shadow": {"same": 0, "different": 0, "failed": 0, "dropped": 0},
            }
            for version in ("1", "2")
        }  # fmt: skip

        async def index():
            return self.entries

        async def reroute(name, who):
            self.rerouted += 1

        record = lambda *what, **more: self.told.append((what, more))  # noqa: E731
        self.director = Director(self.repository.root, index, reroute, record, lambda: self.now_s)

    def change(self, change):
        return self.repository.replan("m", change)

    @property
    def rollout(self):
        return self.repository.find("m").plan.rollout

    def look(self, requests=200, accuracy=None, failing=0.0, slow=0.0, agreeing=1.0):
        """One second, with so many requests, shared as the plan says. Figures are of version 2."""
        plan = self.repository.find("m").plan
        traffic, accuracy = plan.in_force, {"1": 0.95, "2": 0.95} if accuracy is None else accuracy
        for _ in range(requests):
            version = "2" if self.draw.random() < traffic.shares.get("2", 0.0) else "1"
            counts, new = self.counts[version], version == "2"
            if new and self.draw.random() < failing:
                counts["failures"] += 1
                continue
            counts["request_s"][2 if new and self.draw.random() < slow else 0] += 1
            counts["feedback"]["right" if self.draw.random() < accuracy[version] else "wrong"] += 1
            if not new and traffic.shadow is not None and self.draw.random() < traffic.shadow.fraction:
                self.counts["2"]["shadow"]["same" if self.draw.random() < agreeing else "different"] += 1
        self.now_s += 1.0
        known = {version: (json.loads(json.dumps(self.counts[version])), BOUNDS, None) for version in self.loaded}
        asyncio.run(self.director.look({"m": known}))

    def run(self, seconds=120, **figures):
        """Seconds until the rollout has ended; gives its state."""
        for _ in range(seconds):
            if not self.rollout.running:
                break
            self.look(**figures)
        return self.rollout.state

    @property
    def stands_on(self):
        return self.repository.find("m").settings.labels["stable"]


@pytest.fixture
def simulate(tmp_path):
    def make(seed=0, **request):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        return Simulated(folder, seed, **request)

    return make


@pytest.mark.parametrize("seed", range(5))
def test_a_version_with_five_percent_worse_accuracy_is_rolled_back(simulate, seed):
    subject = simulate(seed)
    assert subject.run(accuracy={"1": 0.95, "2": 0.90}) == "rolled back"
    assert subject.stands_on == "1"
    last = subject.rollout.decisions[-1]
    assert (last.reason, last.who, last.state) == ("accuracy < stable surely", "rollout", "rolled back")
    assert last.figures["accuracy"] < last.figures["stable accuracy"]
    assert subject.repository.find("m").plan.in_force.shares == {}
    (who, action, target, outcome), details = subject.told[-1]
    assert (who, action, target, outcome) == ("rollout", "rollout", "m/2", "rolled back")
    assert details["reason"] == last.reason
    assert details["accuracy"] == last.figures["accuracy"]


@pytest.mark.parametrize("seed", range(5))
def test_a_better_version_is_promoted_through_all_stages(simulate, seed):
    subject = simulate(seed, promote=("accuracy > stable surely",))
    assert subject.run(accuracy={"1": 0.90, "2": 0.95}) == "promoted"
    assert subject.stands_on == "2"
    states = [(each.state, each.stage) for each in subject.rollout.decisions]
    assert states == [("shadow", 0), ("canary", 1), ("canary", 2), ("promoted", 2)]
    assert [each[0][3] for each in subject.told] == ["stage", "stage", "promoted"]
    assert subject.repository.find("m").plan.in_force.shares == {}
    # One look more changes nothing.
    before = subject.rollout
    subject.look()
    assert subject.rollout == before


def test_an_equal_version_is_promoted_and_hardly_ever_rolled_back(simulate):
    assert [simulate(seed).run() for seed in range(6)] == ["promoted"] * 6


@pytest.mark.parametrize(
    ("figures", "rule"),
    [
        ({"failing": 0.1}, "errors > stable + 1%"),
        ({"slow": 0.2}, "p99 > stable * 3 for 10s"),
        ({"agreeing": 0.5}, "agreement < 0.8 over 50"),
    ],
)
def test_errors_latency_and_disagreement_end_it(simulate, figures, rule):
    subject = simulate(rollback=("errors > stable + 1%", "p99 > stable * 3 for 10s", "agreement < 0.8 over 50"))
    assert subject.run(requests=100, **figures) == "rolled back"
    assert subject.rollout.reason == rule


def test_a_stage_lasts_as_long_as_it_has_to(simulate):
    subject = simulate(stages=(Stage(share=0.5, answers=10, seconds=5.0), Stage(share=0.9, answers=0)))
    for _ in range(4):
        subject.look()
    assert subject.rollout.stage == 0
    subject.look()
    assert subject.rollout.stage == 1
    # Rules for promotion are waited for, but not for ever.
    subject = simulate(1, stages=(Stage(share=0.5, answers=1),), promote=("accuracy > 99%",), most_s=30.0)
    assert subject.run(100) == "rolled back"
    assert "more than 30 s" in subject.rollout.reason


def test_a_process_that_takes_over_goes_on_with_the_same_evidence(simulate):
    """Killed after each second: what was seen adds up as if nothing had happened, but for the seconds in between."""
    subject = simulate(stages=(Stage(share=0.5, answers=1000), Stage(share=0.9, answers=10)))
    for second in range(5):
        for _ in range(2):  # the first look of a process is where its counters begin
            subject.look()
        answered = sum(subject.counts["2"]["request_s"][:-1])
        run = subject.director._runs["m"]
        write_evidence(subject.repository, "m", run.saved())
        subject.restart()
        assert subject.rollout.stage == 0, second
        assert 0 < answered < 250
    for _ in range(9):
        subject.look()
    assert subject.rollout.stage == 1
    kept = json.loads((subject.repository.root / "m" / ".evidence.json").read_text())
    assert sum(kept["counts"]["2"]["request_s"][:-1]) >= 1000


@pytest.mark.parametrize(
    "counts",
    [
        {"request_s": "many"}, {"request_s": [1, 2]}, {"failures": -1}, {"feedback": None}, {"shadow": {"same": []}},
        {"feedback": {"right": 5, "weighted": [1]}}, {"feedback": {"labels": {"0": [1]}}}, {"failures": 1e300},
    ],
)  # fmt: skip
def test_evidence_that_is_damaged_or_of_other_bins_does_not_hold_a_rollout_up(simulate, counts):
    subject = simulate(stages=(Stage(share=0.5, answers=10),), promote=())
    saved = {"started_s": subject.rollout.started_s, "stage": 0, "before": 0.0, "counts": {"1": counts, "2": counts}}
    (subject.repository.root / "m" / ".evidence.json").write_text(json.dumps(saved))
    assert subject.run(5) == "promoted"


def test_a_rollout_in_a_stage_that_it_does_not_have_is_a_damaged_file(simulate):
    subject = simulate()
    path = subject.repository.root / "m" / "traffic.json"
    path.write_text(path.read_text().replace('"stage": 0', '"stage": 7'))
    assert "no stage 7" in subject.repository.find("m").problem


def test_a_rule_on_the_disk_that_does_not_parse_stops_no_other_model(simulate, caplog):
    subject = simulate(rollback=("errors > 0.5",))
    path = subject.repository.root / "m" / "traffic.json"
    path.write_text(path.read_text().replace("errors > 0.5", "errors >"))
    subject.look()
    assert "errors >" in caplog.text


def test_counters_that_begin_anew_within_a_process():
    tally = Tally()
    for right, expected in ((5, 0), (8, 3), (2, 5), (4, 7)):
        assert tally.grown({"feedback": {"right": right, "wrong": 0}})["feedback"]["right"] == expected


def test_a_label_that_is_moved_by_somebody_ends_it(simulate):
    subject = simulate(stages=(Stage(share=0.5, answers=10**6),))
    subject.look()
    subject.repository.promote("m", "2")
    subject.look()
    assert (subject.rollout.state, subject.stands_on) == ("promoted", "2")
    subject = simulate(1, stages=(Stage(share=0.5, answers=10**6),))
    subject.repository.push(subject.repository.root / "m" / "1.lepton", "m")
    subject.repository.promote("m", "3")
    subject.look()
    assert (subject.rollout.state, subject.stands_on) == ("stopped", "3")
    assert "moved from version 1 to 3" in subject.rollout.reason


def test_a_version_that_is_gone_or_cannot_be_loaded_ends_it(simulate):
    subject = simulate()
    with pytest.raises(RepositoryError, match="has a part in its rollout"):
        subject.repository.remove("m", "2")
    shutil.rmtree(subject.repository.root / "m" / "2.lepton")
    subject.look()
    assert (subject.rollout.state, subject.rollout.reason) == ("rolled back", "version 2 is gone from the repository")

    subject = simulate(1)
    subject.loaded = {"1"}
    for _ in range(20):  # it is only on its way
        subject.look()
    assert subject.rollout.running
    subject.entries = [Entry("m", "2", "UNAVAILABLE", "weights hold NaN")]
    subject.look()
    assert subject.rollout.running
    assert subject.run(12) == "rolled back"
    assert subject.rollout.reason == "version 2 cannot be loaded: weights hold NaN"


def test_killed_between_the_label_and_the_plan(simulate, monkeypatch):
    """The label is moved first: whoever looks next finds it there, and writes the end."""
    subject = simulate(stages=(Stage(share=0.5, answers=1),))
    subject.look()
    write = Repository.replan
    monkeypatch.setattr(Repository, "replan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        subject.look()
    monkeypatch.setattr(Repository, "replan", write)
    assert subject.rollout.running
    assert subject.stands_on == "2"
    subject.restart()
    subject.look()
    assert subject.rollout.state == "promoted"


def test_somebody_who_stops_it_while_it_is_decided_wins(simulate, monkeypatch):
    subject = simulate(stages=(Stage(share=0.5, answers=1), Stage(share=0.6, answers=1)))
    find = Repository.find

    def find_and_stop(self, name):
        found = find(self, name)
        monkeypatch.setattr(Repository, "find", find)
        subject.change(lambda plan, found: plans.with_stop(plan, found, "me", 0.0))
        return found

    subject.look()
    monkeypatch.setattr(Repository, "find", find_and_stop)
    subject.look()
    assert subject.rollout.state == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["promoted", "rolled back", "stage"])
def test_killed_at_every_step_of_a_decision(tmp_path, kind):
    """See `rollout_kills.py`: before or after, and whoever looks next decides the same."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("rollout_kills.py"), tmp_path, kind],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 10
