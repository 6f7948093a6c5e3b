"""A version whose certificate does not hold any more: its alert, and its label."""

import asyncio
import types

import msgspec
import pytest

from lepton_xla.certificates import Certificate
from lepton_xla.errors import RepositoryError
from lepton_xla.serve.monitor.comparisons import parse_comparison
from lepton_xla.serve.monitor.monitoring import Monitoring, Watched
from lepton_xla.serve.monitor.rules import Rules
from lepton_xla.serve.traffic.director import Director

CERTIFICATE = Certificate(
    metric="accuracy", float_value=0.98, value=0.97, drop=1.0, low=0.5, high=1.5, rows=500, all_rows=1000,
    data="0" * 64, weights_bytes=1, float_bytes=4, recipe="int8", promised=0.95,
)  # fmt: skip


def looked(monitoring, right, wrong, certificate=CERTIFICATE):
    counts = {"feedback": {"right": right, "wrong": wrong, "labels": {}}}
    monitoring.look([Watched("digits", "2", counts, (), None, certificate)])
    return [(alert.rule.name, alert.state) for alert in monitoring.alerts]


def test_feedback_that_speaks_against_the_certificate_alerts():
    seconds = iter(range(100))
    monitoring = Monitoring(clock=lambda: next(seconds))
    assert looked(monitoring, 0, 0) == [("certificate", "ok")]
    assert looked(monitoring, 960, 40) == [("certificate", "ok")]
    assert monitoring.broken == []
    assert looked(monitoring, 1040, 110) == [("certificate", "firing")]
    assert monitoring.broken == [("digits", "2")]
    # Another artifact in its place is judged by its own promise and its own feedback.
    other = msgspec.structs.replace(CERTIFICATE, promised=0.3)
    assert looked(monitoring, 1040, 110, other) == [("certificate", "ok")]
    better = msgspec.structs.replace(CERTIFICATE, value=0.975)
    assert looked(monitoring, 1040, 110, better) == [("certificate", "ok")]
    assert looked(monitoring, 1120, 180, better) == [("certificate", "firing")]


def test_without_a_promise_nothing_is_tested():
    monitoring = Monitoring()
    assert looked(monitoring, 0, 1000, None) == []
    none = msgspec.structs.replace(CERTIFICATE, promised=None)
    assert looked(monitoring, 0, 1000, none) == [("certificate", "unknown")]


def test_a_rule_of_the_file_takes_the_place_of_the_usual_one():
    monitoring = Monitoring(Rules.parse("[[rule]]\nname = 'mine'\nwhen = 'certificate > 50'"))
    looked(monitoring, 0, 0)
    assert looked(monitoring, 75, 15) == [("mine", "firing")]
    with pytest.raises(Exception, match="certificate is for alerts"):
        parse_comparison("certificate > 10")


@pytest.mark.parametrize(
    ("stands", "fails", "recorded"), [("2", False, ["done"]), ("1", False, []), ("2", True, ["failed"])]
)
def test_a_label_goes_back_once(tmp_path, stands, fails, recorded):
    moved, records, rerouted = [], [], []

    class Repository:
        def find(self, name):
            return types.SimpleNamespace(settings=types.SimpleNamespace(labels={"stable": stands}))

        def rollback(self, name, label, version):
            assert version == "2"
            if fails:
                raise RepositoryError("missing", "stood on no other version before")
            moved.append((name, label))
            return "2", "1"

    async def reroute(name, who):
        rerouted.append((name, who))

    director = Director(tmp_path, lambda: None, reroute, lambda *what, **more: records.append((what, more)))
    director._repository = Repository()
    assert asyncio.run(director.revoke("digits", "2")) is not fails
    assert [what[3] for what, _ in records] == recorded
    assert moved == ([("digits", "stable")] if recorded == ["done"] else [])
    assert rerouted == ([("digits", "certificate")] if recorded == ["done"] else [])
