"""The bandit: shares by the chance to be best, propensities that are kept, estimates from them, and promotion."""

import asyncio
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from fake_artifacts import make_artifact

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models import plans
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.split import Split
from lepton_xla.serve.monitor.feedback import Feedback
from lepton_xla.serve.protocol.traffic import Bandit, Traffic
from lepton_xla.serve.traffic.bandit import Estimate, Rewards, off_policy, propensities, surely_best
from lepton_xla.serve.traffic.director import Director

BOUNDS = (0.01, 0.1, 1.0)


def chance_to_be_best(one, other):
    """P(X > Y) of two Beta variables, by numerical integration in float64."""
    grid = (np.arange(20_000) + 0.5) / 20_000

    def density(rewards):
        a, b = 1 + rewards.right, 1 + rewards.wrong
        log = (a - 1) * np.log(grid) + (b - 1) * np.log1p(-grid)
        found = np.exp(log - log.max())
        return found / found.sum()

    below = np.cumsum(density(other)) - density(other) / 2
    return float((density(one) * below).sum())


@pytest.mark.parametrize(("one", "other"), [((9, 1), (6, 4)), ((0, 0), (0, 0)), ((95, 5), (90, 10)), ((0, 3), (3, 0))])
def test_shares_are_the_chances_to_be_best(one, other):
    rewards = {"3": Rewards(*one), "4": Rewards(*other)}
    exact = chance_to_be_best(rewards["3"], rewards["4"])
    found = propensities(rewards, seed=1)
    assert found["3"] == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 4096) + 1e-3)
    assert found == propensities(rewards, seed=1)
    least = propensities(rewards, least=0.1, seed=1)
    assert least["3"] == pytest.approx(0.1 + 0.8 * found["3"], abs=1e-5)
    Traffic(shares=propensities({str(arm): Rewards(arm, 1) for arm in range(1, 17)}, 0.02))  # they add up to 1


def test_estimates_are_those_of_each_row_s_propensity():
    """Shares that change, as a bandit's do: by hand, row by row, in float64."""
    draw = np.random.default_rng(0)
    propensity = draw.choice([0.1, 0.5, 0.9], 500)
    right = draw.random(500) < 0.8
    weight = 1 / propensity
    sums = [500.0, weight.sum(), (weight**2).sum(), (weight * right).sum(), (weight**2 * right).sum()]
    found = off_policy(sums)
    value = np.average(right, weights=weight)
    error = np.sqrt(((weight * (right - value)) ** 2).sum()) / weight.sum()
    assert (found.value, found.error, found.rows) == (pytest.approx(value), pytest.approx(error), 500)
    assert math.isnan(off_policy([0.0] * 5).value)


def test_estimates_are_right_where_shares_follow_what_was_seen():
    """The plain accuracy of an arm that a bandit has left early is too low; by propensities it is not."""
    found = []
    for seed in range(150):
        draw = random.Random(seed)
        feedback = {arm: Feedback(np.dtype("float32"), 2) for arm in "12"}
        shares = {"1": 0.5, "2": 0.5}
        for step in range(8):
            split = Split("m", Traffic(shares=shares), "1", {"1": "1", "2": "2"}, draw)
            for number in range(40):
                choice = split.choose()
                judge, name = feedback[choice.version], f"{step} {number}"
                judge.remember(name, np.float32([[0, 1]]).tobytes(), choice.propensity)
                judge.judge({name: [int(draw.random() < 0.8)]})
            rewards = {arm: Rewards(each.right, each.wrong) for arm, each in feedback.items()}
            shares = propensities(rewards, 0.1, seed=step)
        estimates = [off_policy(each.weighted).value for each in feedback.values()]
        plain = [each.right / (each.right + each.wrong) for each in feedback.values()]
        found.append(list(zip(estimates, plain, strict=True)))
    bias = np.array(found).mean(axis=(0, 1)) - 0.8
    noise = np.array(found).std(axis=(0, 1)) / math.sqrt(300)
    assert abs(bias[0]) < 4 * noise[0]
    assert bias[1] < -4 * noise[1]


def test_only_rows_of_drawn_versions_are_weighted_and_forgotten_ones_are_not():
    judge = Feedback(np.dtype("float32"), 2, most=2)
    judge.remember("named", np.float32([[0, 1]]).tobytes())
    judge.remember("drawn", np.float32([[0, 1], [0, 1]]).tobytes(), 0.25)
    judge.judge({"named": [1], "drawn": [1, 0]})
    assert judge.weighted == [2.0, 8.0, 32.0, 4.0, 16.0]
    for number in range(5):
        judge.remember(str(number), np.float32([[0, 1]]).tobytes(), 0.5)
    judge.remember("4", np.float32([[0, 1]]).tobytes())  # again, and not drawn
    judge.judge({"4": [1]})
    assert judge.weighted[0] == 2.0
    assert sum(len(piece.propensities) for piece in judge._pieces) <= 2


def test_who_is_surely_the_best():
    good, bad = Estimate(0.95, 0.003, 5000), Estimate(0.90, 0.004, 5000)
    assert surely_best({"1": bad, "2": good}) == "2"
    assert surely_best({"1": Estimate(0.94, 0.004, 5000), "2": good}) is None
    assert surely_best({"1": Estimate(math.nan, math.inf, 0.0), "2": good}) is None
    assert surely_best({"1": Estimate(0.0, 0.0, 3), "2": Estimate(1.0, 0.0, 3)}) is None
    assert surely_best({"1": Estimate(math.nan, math.nan, 5000), "2": good}) is None
    assert surely_best({}) is None


class Simulated:
    """A bandit over two versions, and a server that has the given accuracies."""

    def __init__(self, folder, **bandit):
        self.repository = Repository(folder / "MODELS")
        artifact = make_artifact(folder / "tiny.lepton")
        for _ in range(2):
            self.repository.push(artifact, "m")
        self.repository.promote("m", "1")
        self.now_s, self.told, self.draw = 1000.0, [], random.Random(0)
        asked = Traffic(shares={"stable": 0.5, "2": 0.5}, bandit=Bandit(**bandit))
        self.repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, asked, self.now_s))
        self.restart()

    def restart(self):
        """Another process, whose counters begin at zero."""
        self.feedback = {version: Feedback(np.dtype("float32"), 2) for version in "12"}

        async def reroute(name, who):
            pass

        record = lambda *what, **more: self.told.append((what, more))  # noqa: E731
        self.director = Director(self.repository.root, None, reroute, record, lambda: self.now_s)

    @property
    def traffic(self):
        return self.repository.find("m").plan.traffic

    def look(self, accuracy, rows=100):
        """One second."""
        found = self.repository.find("m")
        versions = {"stable": found.settings.labels["stable"], "1": "1", "2": "2"}
        split = Split("m", found.plan.in_force, "1", versions, self.draw)
        for number in range(rows):
            choice = split.choose()
            judge = self.feedback[choice.version]
            judge.remember(f"{self.now_s} {number}", np.float32([[0, 1]]).tobytes(), choice.propensity)
            judge.judge({f"{self.now_s} {number}": [int(self.draw.random() < accuracy[choice.version])]})
        self.now_s += 1.0
        counts = json.loads(json.dumps({key: {"feedback": each.counts()} for key, each in self.feedback.items()}))
        known = {version: (each, BOUNDS, None) for version, each in counts.items()}
        asyncio.run(self.director.look({"m": known}))


def test_shares_follow_the_feedback_and_each_change_is_told_with_its_propensities(tmp_path):
    subject = Simulated(tmp_path, least=0.05, every_s=2)
    before = subject.traffic
    for _ in range(30):
        subject.look({"1": 0.9, "2": 0.6})
    assert subject.traffic.shares == {"stable": 0.95, "2": 0.05}
    assert subject.traffic.bandit == before.bandit
    assert subject.repository.find("m").settings.labels["stable"] == "1"  # it was not asked to promote
    (who, action, target, outcome), details = subject.told[-1]
    assert (who, action, target, outcome) == ("bandit", "bandit", "m", "shares")
    assert details["share_stable"] + details["share_2"] == pytest.approx(1)
    assert details["estimate_stable"] == pytest.approx(0.9, abs=5 * details["error_stable"])
    assert len(subject.told) < 15


def test_the_best_version_is_promoted_once_the_estimates_say_so(tmp_path):
    subject = Simulated(tmp_path, least=0.1, every_s=1, promote=True)
    seconds = 0
    while subject.traffic.bandit is not None and seconds < 60:
        subject.look({"1": 0.8, "2": 0.95})
        seconds += 1
    assert 3 < seconds < 60
    assert subject.repository.find("m").settings.labels["stable"] == "2"
    assert subject.traffic == Traffic()
    (_, _, _, outcome), details = subject.told[-1]
    assert (outcome, details["version"]) == ("promoted", "2")
    error = math.hypot(details["error_2"], details["error_stable"])
    assert details["estimate_2"] - details["estimate_stable"] > 3 * error


def test_what_was_learned_survives_a_restart(tmp_path):
    subject = Simulated(tmp_path, least=0.05, every_s=1)
    for _ in range(20):
        subject.look({"1": 0.9, "2": 0.6})
    learned = subject.traffic.shares
    subject.restart()
    subject.look({"1": 0.9, "2": 0.6}, rows=1)
    subject.look({"1": 0.9, "2": 0.6}, rows=1)
    # With two rows of its own, the new process would have gone back to halves.
    assert subject.traffic.shares["stable"] == pytest.approx(learned["stable"], abs=0.05)
    assert learned["stable"] > 0.9


def test_somebody_who_sets_the_traffic_wins(tmp_path):
    subject = Simulated(tmp_path, every_s=1)
    asked = Traffic(shares={"stable": 0.9, "2": 0.1})
    subject.repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, asked, 0.0))
    for _ in range(3):
        subject.look({"1": 0.9, "2": 0.1})
    assert subject.traffic == asked
    assert not subject.told


@pytest.mark.parametrize("shares", [{"stable": 0.5, "2": 0.5}, {"stable": 0.4, "2": 0.3, "3": 0.3}])
def test_killed_between_the_label_and_the_traffic_it_ends(tmp_path, shares):
    subject = Simulated(tmp_path, every_s=1)
    subject.repository.push(tmp_path / "tiny.lepton", "m")
    asked = Traffic(shares=shares, bandit=Bandit(every_s=1))
    subject.repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, asked, 0.0))
    subject.repository.promote("m", "2")  # now two of its arms are version 2
    subject.look({"1": 0.9, "2": 0.9})
    assert subject.traffic == Traffic()
    assert [(what[3], more["reason"]) for what, more in subject.told] == [
        ("ended", "two of its shares are of one version now")
    ]


def test_a_bandit_among_equals_is_refused(tmp_path):
    subject = Simulated(tmp_path)
    before = subject.traffic
    asked = Traffic(shares={"stable": 0.5, "2": 0.3, "1": 0.2}, bandit=Bandit())
    with pytest.raises(RepositoryError, match="two shares are of version 1") as caught:
        subject.repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, asked))
    assert (caught.value.kind, subject.traffic) == ("conflict", before)
