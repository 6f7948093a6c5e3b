"""Falls of accuracy and confidence: found by ADWIN, counted once, told by a rule."""

import sys

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.errors import ServeError
from lepton_xla.profiles import Sketch, profile_of
from lepton_xla.serve.monitor import falls
from lepton_xla.serve.monitor.comparisons import parse_comparison
from lepton_xla.serve.monitor.monitoring import Monitoring, Watched
from lepton_xla.serve.monitor.rules import Rules, parse_condition

RULES = "\n".join(
    f"[[rule]]\nname = '{name}'\nwhen = 'falls({name}) > 0 over 30m'" for name in ("accuracy", "confidence")
)
DRAW = np.random.default_rng(0)
X = np.float32(DRAW.normal(size=(2000, 4)))
PROFILE = profile_of({"x": X}, {"y": 4 * X})


class Stream:
    """A version that is looked at every second, after 50 rows with feedback."""

    def __init__(self):
        self.now = 0.0
        self.monitoring = Monitoring(Rules.parse(RULES), clock=lambda: self.now)
        self.sketch, self.right, self.wrong = Sketch(PROFILE), 0, 0
        self.draw = np.random.default_rng(1)

    def go(self, seconds, accuracy=0.95, scale=4.0):
        for _ in range(seconds):
            right = int(self.draw.binomial(50, accuracy))
            self.right, self.wrong = self.right + right, self.wrong + 50 - right
            rows = X[self.draw.integers(0, len(X), 50)]
            self.sketch.add({"x": rows}, {"y": scale * rows})
            counts = {
                "feedback": {"right": self.right, "wrong": self.wrong, "labels": {}},
                "sketch": {PROFILE.bins: self.sketch.counts},
            }
            self.monitoring.look([Watched("m", "1", counts, (), PROFILE)])
            self.now += 1
        return {alert.rule.name: (alert.state, alert.value) for alert in self.monitoring.alerts}


def test_a_fall_is_found_and_a_rise_is_none():
    pytest.importorskip("river", reason="comes with the extra drift")
    stream = Stream()
    assert stream.go(200) == {"accuracy": ("ok", 0), "confidence": ("ok", 0)}
    assert stream.go(30, accuracy=1.0, scale=8.0) == {"accuracy": ("ok", 0), "confidence": ("ok", 0)}
    found = stream.go(30, accuracy=0.8)
    assert found["accuracy"][0] == "firing"
    found = stream.go(30, accuracy=0.8, scale=1.0)
    assert found["confidence"][0] == "firing"
    # What lies behind half an hour is told no more.
    stream.go(400, accuracy=0.8, scale=1.0)
    stream.now += 1900
    assert {state for state, _ in stream.go(30, accuracy=0.8, scale=1.0).values()} == {"ok"}


def test_another_profile_begins_its_confidence_anew():
    pytest.importorskip("river", reason="comes with the extra drift")
    other = profile_of({"x": X}, {"y": X})
    tracked = falls.Falls(["confidence"])
    for profile, scale in ((PROFILE, 4), (other, 1)):
        sketch = Sketch(profile)
        for start in range(0, 2000, 200):
            sketch.add({"x": X[start : start + 200]}, {"y": scale * X[start : start + 200]})
            found = tracked.look({"sketch": {profile.bins: sketch.counts}}, profile)
    assert found == {"confidence": 0}
    assert tracked.look({}, None) == {"confidence": 0}


@pytest.mark.parametrize("rows", [(3, 0), (0, 0), (), (700, 300), (10_000, 1)])
def test_rows_are_mixed_and_thinned_in_proportion(rows):
    values = [1.0, 0.0][: len(rows)]
    mixed = falls._in_turn(values, rows)
    assert len(mixed) == min(sum(rows), 500)
    if sum(rows) == 1000:
        assert sum(mixed) == 350
        assert 30 <= sum(mixed[:50]) <= 40


def test_without_the_package_the_server_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(lx.MissingPackageError, match=r"lepton-xla\[drift\]"):
        Monitoring(Rules.parse(RULES))
    Monitoring(Rules.parse("[[rule]]\nname = 'a'\nwhen = 'accuracy < 0.9'"))


def test_what_falls_is_named():
    with pytest.raises(ServeError, match=r"write falls\(accuracy\) or falls\(confidence\)"):
        parse_condition("falls(latency) > 0")
    with pytest.raises(ServeError, match="falls is for alerts"):
        parse_comparison("falls(accuracy) > 0")
