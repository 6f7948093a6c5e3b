"""Alerts: what fires, when, and who is told."""

import http.server
import json
import threading

import numpy as np
import pytest

from lepton_xla.profiles import Sketch, profile_of
from lepton_xla.serve.monitor.alerts import Alerts, Subject, measure
from lepton_xla.serve.monitor.history import History
from lepton_xla.serve.monitor.rules import Rules, Webhook, parse_condition
from lepton_xla.serve.monitor.webhooks import Sender

BOUNDS = (0.01, 0.1, 1.0)


def subject(*snapshots, profile=None):
    history = History()
    for second, counts in enumerate(snapshots):
        history.add(60 * second, counts)
    return Subject(history, BOUNDS, profile)


def value(when, *snapshots, profile=None):
    return measure(parse_condition(when), subject(*snapshots, profile=profile))


def test_quantiles_are_prometheus():
    # 90 answers up to 10 ms and 10 up to 100 ms: the 95th of them is in the middle of the second bin.
    before, after = {"request_s": [5, 0, 0, 0, 1.0]}, {"request_s": [95, 10, 0, 0, 2.0]}
    assert value("p95 > 1s", before, after) == pytest.approx(0.01 + 0.09 * 0.5)
    assert value("p50 > 1s", before, after) == pytest.approx(0.01 * 50 / 90)
    assert value("p99 > 1s", {"request_s": [0, 0, 0, 0, 0.0]}, {"request_s": [0, 0, 0, 7, 99.0]}) == 1.0
    assert value("p99 > 1s", before) is None  # one look is no window
    assert value("p99 > 1s", before, before) is None  # nothing was answered


def test_rates_and_shares():
    before = {"request_s": [0, 0, 0, 0, 0.0], "failures": 1, "rejected": 0, "expired": 0}
    after = {"request_s": [60, 0, 0, 0, 1.0], "failures": 11, "rejected": 25, "expired": 5}
    assert value("requests < 1", before, after) == 1.0
    assert value("errors > 1%", before, after) == 0.1
    assert value("rejected > 1%", before, after) == 0.25
    assert value("expired > 1%", before, after) == 0.05
    assert value("queue > 1", {"now": {"queue_rows": 3}}) == 3


def test_rightness_is_of_the_last_rows_with_feedback():
    old = {"feedback": {"right": 1000, "wrong": 0, "labels": {"3": [500, 500, 500]}}}
    new = {"feedback": {"right": 1060, "wrong": 40, "labels": {"3": [530, 560, 540]}}}
    assert value("accuracy < 0.9 over 100", old, new) == 0.6
    assert value("recall(3) < 0.9 over 100", old, new) == 0.5
    assert value("precision(3) < 0.9 over 100", old, new) == 0.75
    assert value("recall(4) < 0.9 over 100", old, new) is None
    assert value("accuracy < 0.9 over 2000", old, new) is None


def test_drift_is_of_a_tensor_a_feature_or_all():
    rng = np.random.default_rng(0)
    rows, other = (np.float32(rng.normal(size=(500, 2))) for _ in range(2))
    profile = profile_of({"a": rows[:, :1], "b": rows[:, 1:]}, {"y": rows[:, :1]})
    sketch = Sketch(profile)
    sketch.add({"a": other[:, :1], "b": other[:, 1:] + 2}, {"y": other[:, :1]})
    counts = {"sketch": {profile.bins: sketch.counts}}
    assert value("drift(a) > 0.2", counts, profile=profile) < 0.1
    assert value("drift(b) > 0.2", counts, profile=profile) > 2
    assert value("drift(b[0]) > 0.2", counts, profile=profile) == value("drift > 0.2", counts, profile=profile)
    assert value("ks(b) > 0.2", counts, profile=profile) > 0.5
    assert value("drift(none) > 0.2", counts, profile=profile) is None
    assert value("drift > 0.2 over 501", counts, profile=profile) is None
    assert value("drift > 0.2", counts) is None


def run(when, rows_by_second, drop=()):
    """What is told of a rule on the queue's rows: (second, state)."""
    told = []
    rules = Rules.parse(f"[[rule]]\nname = 'it'\nwhen = '{when}'").rules
    second = 0
    alerts = Alerts(rules, lambda alert: told.append((second, alert.state)))
    history = History()
    for second, rows in enumerate(rows_by_second):
        history.add(second, {"now": {"queue_rows": rows}})
        alerts.look(second, {} if second in drop else {("m", "1"): Subject(history, BOUNDS, None)})
    return told


def test_an_alert_fires_once_and_ends_once():
    assert run("queue > 5", [0, 9, 9, 9, 0, 0, 9]) == [(1, "firing"), (4, "ok"), (6, "firing")]


def test_a_condition_has_to_hold_for_its_time():
    assert run("queue > 5 for 3s", [9, 9, 0, 9, 9, 9, 9, 9]) == [(6, "firing")]


def test_the_alert_of_a_version_that_goes_ends():
    assert run("queue > 5", [9, 9, 9], drop={2}) == [(0, "firing"), (2, "ok")]


class Receiver(http.server.BaseHTTPRequestHandler):
    """Fails as often as the server says, then takes what it is sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.headers.get("Authorization"), json.loads(body)))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()
        if len(self.server.seen) == self.server.expected:
            self.server.done.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    server.seen, server.statuses, server.expected, server.done = [], [], 1, threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def firing(state="firing"):
    alerts, told = None, []
    rules = Rules.parse("[[rule]]\nname = 'it'\nwhen = 'queue > 5'\nseverity = 'page'").rules
    alerts = Alerts(rules, told.append)
    history = History()
    history.add(0, {"now": {"queue_rows": 9}})
    alerts.look(1_700_000_000, {("digits", "3"): Subject(history, BOUNDS, None)})
    if state != "firing":
        history.add(1, {"now": {"queue_rows": 0}})
        alerts.look(1_700_000_060, {("digits", "3"): Subject(history, BOUNDS, None)})
    return told[-1]


@pytest.mark.parametrize("statuses", [[], [503, 500], [302]])
def test_a_webhook_gets_what_alertmanager_sends(receiver, tmp_path, statuses):
    (tmp_path / "token").write_text("s3cret\n")
    receiver.statuses, receiver.expected = list(statuses), 1 + len(statuses)
    waits = []
    hook = Webhook(f"http://127.0.0.1:{receiver.server_port}/alerts", tmp_path / "token")
    sender = Sender([hook], "http://server:8000", wait=lambda seconds: waits.append(seconds))
    sender.send(firing())
    assert receiver.done.wait(10)
    sender.close()
    authorization, message = receiver.seen[-1]
    assert authorization == "Bearer s3cret"
    assert (message["version"], message["status"]) == ("4", "firing")
    (alert,) = message["alerts"]
    assert alert["labels"] == {"alertname": "it", "severity": "page", "model": "digits", "version": "3"}
    assert (alert["startsAt"], alert["endsAt"]) == ("2023-11-14T22:13:20Z", "0001-01-01T00:00:00Z")
    assert waits == [1.0, 5.0][: len(statuses)]


def test_an_alert_that_ends_is_resolved(receiver):
    sender = Sender([Webhook(f"http://127.0.0.1:{receiver.server_port}/")])
    sender.send(firing("ok"))
    assert receiver.done.wait(10)
    sender.close()
    assert receiver.seen[0][1]["alerts"][0]["status"] == "resolved"
    assert receiver.seen[0][1]["alerts"][0]["endsAt"] == "2023-11-14T22:14:20Z"


def test_a_webhook_that_never_answers_is_given_up_and_its_url_not_logged(caplog):
    waits = []
    sender = Sender([Webhook("http://127.0.0.1:1/hook-with-a-secret")], wait=lambda seconds: waits.append(seconds))
    sender.send(firing())
    sender.close(10)
    assert waits == [1.0, 5.0, 30.0]
    assert "given up" in caplog.text
    assert "secret" not in caplog.text
