"""A server that watches whether its answers are right: drift, feedback and alerts through HTTP."""

import json
import re
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from serve_fakes import Affine, affine_binary, connect, exchange, raw_request, read_response

import lepton_xla as lx
from lepton_xla.profiles import Sketch, profile_of
from lepton_xla.serve.app import frontend
from lepton_xla.serve.monitor.monitor import Monitor
from lepton_xla.serve.monitor.monitoring import Monitoring, Watched
from lepton_xla.serve.monitor.rules import Rules
from lepton_xla.serve.observe.metrics import added
from lepton_xla.serve.protocol.signature import signature_of

RNG = np.random.default_rng(0)
KNOWN = np.float32(RNG.normal(size=(2000, 4)))


@pytest.fixture(scope="module")
def classifier():
    """The class of a row is its largest element."""
    program = lx.trace(lambda w, x: x @ w, 5 * jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    return lx.compile(program, {"batch": (1, 8)}, name="largest").with_profile([{"x": KNOWN}]).servable()


def call(server, method, path, body=None):
    data = b"" if body is None else json.dumps(body).encode()
    status, _, answer = exchange(server, method, path, data, {"content-type": "application/json"} if data else None)
    return status, json.loads(answer)


def infer(server, rows, request_id=None, model="largest"):
    message = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}]
    } | ({} if request_id is None else {"id": request_id})
    status, answer = call(server, "POST", f"/v2/models/{model}/infer", message)
    assert status == 200
    return answer


def until(check, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_drift_feedback_and_alerts(make_server, classifier, tmp_path):
    rules = tmp_path / "alerts.toml"
    rules.write_text("""
        [[rule]]
        name = "drifted"
        when = "drift(x) > 0.2"
        [[rule]]
        name = "wrong"
        when = "accuracy < 0.8 over 20"
    """)
    server = make_server(classifier, alerts=rules)

    def states():
        return {each["rule"]: each["state"] for each in call(server, "GET", "/v2/alerts")[1]["alerts"]}

    for start in range(0, 512, 8):
        infer(server, KNOWN[start : start + 8], request_id=f"clean {start}")
    until(lambda: states().get("drifted") == "ok")
    rows = {f"clean {start}": KNOWN[start : start + 8].argmax(axis=1).tolist() for start in range(0, 24, 8)}
    status, answer = call(
        server, "POST", "/v2/models/largest/feedback", {"feedback": [{"id": k, "label": v} for k, v in rows.items()]}
    )
    assert (status, answer) == (200, {"rows": 24})
    until(lambda: states()["wrong"] == "ok")
    monitor = call(server, "GET", "/v2/models/largest/monitor")[1]
    assert (monitor["accuracy"], monitor["feedback_rows"]) == (1.0, 24)
    assert {each["feature"] for each in monitor["drift"]} == {feature.name for feature in classifier.profile.features}
    assert max(each["psi"] for each in monitor["drift"]) < 0.1
    # Then the data shift, and the answers with them.
    for start in range(0, 504, 8):
        infer(server, KNOWN[start : start + 8] + 2, request_id=f"shifted {start}")
    until(lambda: states()["drifted"] == "firing")
    wrong = [{"id": f"shifted {start}", "label": [(int(row.argmax()) + 1) % 4 for row in KNOWN[start : start + 8]]}
             for start in range(0, 24, 8)]  # fmt: skip
    assert call(server, "POST", "/v2/models/largest/feedback", {"feedback": wrong})[0] == 200
    until(lambda: states()["wrong"] == "firing")
    metrics = exchange(server, "GET", "/metrics")[2].decode()
    assert 'lepton_feedback_rows_total{model="largest",result="wrong",version="1"} 24.0' in metrics
    assert 'lepton_alert_firing{model="largest",rule="wrong",severity="warning",version="1"} 1.0' in metrics


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"feedback": []}, 400),
        ({"feedback": [{"id": "a"}]}, 400),
        ({"feedback": [{"id": "a", "label": "3"}]}, 400),
        ({"feedback": [{"id": "a", "label": True}]}, 400),
        ({"feedback": [{"id": "a", "label": -1}]}, 400),
        ({"feedback": [{"id": "a", "label": 9}]}, 400),
        ({"feedback": [{"id": "a", "label": [0, 1]}]}, 400),
        ({"feedback": [{"id": "a", "label": 0}, {"id": "a", "label": 0}]}, 400),
        ({"feedback": [{"id": "a", "label": 0}, {"id": "never", "label": 0}]}, 404),
        ({"feedback": [{"id": str(number), "label": 0} for number in range(1001)]}, 400),
        ({"feedback": [{"id": "a", "label": 0, "more": 1}]}, 400),
    ],
)
def test_feedback_that_does_not_fit_counts_nothing(watched, body, status):
    infer(watched, KNOWN[:1], request_id="a")
    assert call(watched, "POST", "/v2/models/largest/feedback", body)[0] == status
    assert call(watched, "GET", "/v2/models/largest/monitor")[1]["feedback_rows"] == 0


@pytest.fixture(scope="module")
def watched(classifier):
    with lx.serve.Server(classifier, lx.serve.Options(port=0)) as server:
        yield server


def test_a_model_without_classes_takes_no_feedback(make_server):
    program = lx.trace(lambda w, x: (x @ w).sum(1), jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    server = make_server(lx.compile(program, {"batch": (1,)}, name="sum").servable())
    infer(server, KNOWN[:1], request_id="a", model="sum")
    status, answer = call(server, "POST", "/v2/models/sum/feedback", {"feedback": [{"id": "a", "label": 0}]})
    assert status == 501
    assert "no output with classes" in answer["error"]


def test_a_server_that_does_not_monitor(make_server, classifier):
    server = make_server(classifier, monitor=False)
    infer(server, KNOWN[:1], request_id="a")
    assert call(server, "POST", "/v2/models/largest/feedback", {"feedback": [{"id": "a", "label": 0}]})[0] == 501
    assert call(server, "GET", "/v2/models/largest/monitor")[1]["drift"] == []


def test_rules_that_do_not_parse_stop_the_server_before_it_loads_anything(classifier, tmp_path):
    (tmp_path / "alerts.toml").write_text("[[rule]]\nname = 'a'\nwhen = 'p99 > soon'")
    with pytest.raises(lx.errors.ServeError, match="rule 1"):
        lx.serve.Server(classifier, lx.serve.Options(port=0, alerts=tmp_path / "alerts.toml"))


# Another artifact in the place of a version.


def pushed(folder, classes, known):
    program = lx.trace(lambda w, x: x @ w, 5 * jnp.eye(4, classes), {"x": lx.TensorSpec(("batch", 4), "float32")})
    artifact = lx.compile(program, {"batch": (8,)}, name="m")
    path = folder / "m" / "1.lepton"
    shutil.rmtree(path, ignore_errors=True)
    (artifact if known is None else artifact.with_profile([{"x": known}])).save(path)


def test_a_rule_sees_the_rows_that_wait_now(make_server, tmp_path, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    (tmp_path / "alerts.toml").write_text("[[rule]]\nname = 'full'\nwhen = 'queue > 2'")
    affine = Affine()
    server = make_server(affine, alerts=tmp_path / "alerts.toml")
    affine.gate.clear()
    affine.running.clear()
    body, fields = affine_binary(np.ones((3, 4)), [1] * 3)

    def state():
        return [each["state"] for each in call(server, "GET", "/v2/alerts")[1]["alerts"]]

    with connect(server) as running, connect(server) as waiting:
        running.sendall(raw_request("POST", "/v2/models/affine/infer", body, fields))
        assert affine.running.wait(5)
        waiting.sendall(raw_request("POST", "/v2/models/affine/infer", body, fields))
        until(lambda: state() == ["firing"])
        affine.gate.set()
        assert read_response(running)[0] == read_response(waiting)[0] == 200
    until(lambda: state() == ["ok"])


@pytest.mark.parametrize("known", [KNOWN[:600] + 50, None], ids=["another profile", "none"])
def test_what_takes_a_versions_place_goes_on_counting_and_has_its_own_drift(tmp_path, monkeypatch, known):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.05)
    (tmp_path / "alerts.toml").write_text("[[rule]]\nname = 'drifted'\nwhen = 'drift > 0.2'")
    pushed(tmp_path / "MODELS", 4, KNOWN[:600])
    options = lx.serve.Options(port=0, alerts=tmp_path / "alerts.toml", explicit=True, load=("m",))
    with lx.serve.Server(repository=tmp_path / "MODELS", options=options) as server:

        def alert():
            return [each["state"] for each in call(server, "GET", "/v2/alerts")[1]["alerts"]]

        def counted():
            text = exchange(server, "GET", "/metrics")[2].decode()
            return dict(
                re.findall(r'^lepton_feedback_rows_total\{model="m",result="(\w+)".* (.*)$', text, re.MULTILINE)
            )

        for start in range(0, 512, 8):
            infer(server, KNOWN[start : start + 8] + 9, request_id=f"old {start}", model="m")
        labels = {"feedback": [{"id": "old 0", "label": (KNOWN[:8]).argmax(1).tolist()}]}
        assert call(server, "POST", "/v2/models/m/feedback", labels)[0] == 200
        until(lambda: alert() == ["firing"])
        pushed(tmp_path / "MODELS", 3, known)
        assert exchange(server, "POST", "/v2/repository/models/m/load", b"{}")[0] == 200
        until(lambda: alert() == ["unknown"])
        assert call(server, "GET", "/v2/models/m/monitor")[1]["drift"] == []
        assert counted() == {"right": "8.0", "wrong": "0.0"}
        # The answers of the other artifact had four classes: nobody reads them as three.
        labels = {"feedback": [{"id": "old 8", "label": [0] * 8}]}
        assert call(server, "POST", "/v2/models/m/feedback", labels)[0] == 404
        infer(server, KNOWN[:8], request_id="new", model="m")
        labels = {"feedback": [{"id": "new", "label": KNOWN[:8, :3].argmax(1).tolist()}]}
        assert call(server, "POST", "/v2/models/m/feedback", labels)[0] == 200
        assert counted() == {"right": "16.0", "wrong": "0.0"}


def test_an_artifact_with_the_same_outputs_judges_the_answers_of_the_one_before(classifier):
    signature = signature_of(classifier)
    before = Monitor(signature, classifier.profile)
    before.answered("a", [(0, True)], [KNOWN[:1].tobytes()])
    monitor = Monitor(signature, None, before=before)
    assert monitor.feedback.judge({"a": [int(KNOWN[0].argmax())]}) == 1


def test_rows_of_different_profiles_are_not_added(classifier):
    counts, profiles = [], [classifier.profile, profile_of({"x": KNOWN + 1}, {"output": KNOWN})]
    for profile in profiles:
        monitor = Monitor(signature_of(classifier), profile, clock=Clock())
        monitor.saw([KNOWN[:256]], [KNOWN[:256]], 256)
        counts.append(monitor.counts())
    both = added(added(*counts), counts[0])["sketch"]
    assert [sum(both[profile.bins]["x[0]"]) for profile in profiles] == [512, 256]


def test_latency_is_looked_at_over_a_change_of_the_profile(classifier):
    monitoring, now = Monitoring(Rules.parse("[[rule]]\nname = 'a'\nwhen = 'requests > 1'"), clock=lambda: now), 0
    for count, profile in ((0, classifier.profile), (30, None)):
        monitoring.look([Watched("m", "1", {"request_s": [count, 0.0]}, (), profile)])
        now += 10
    assert [alert.value for alert in monitoring.alerts] == [3.0]


# The profile in the artifact, and the monitor alone.


def test_a_profile_is_saved_and_loaded(tmp_path):
    program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    artifact = lx.compile(program, {"batch": (1, 8)}).with_profile([{"x": KNOWN[:9]}, {"x": KNOWN[9:50]}])
    assert artifact.manifest.profile == profile_of({"x": KNOWN[:50]}, {"output": KNOWN[:50]})
    artifact.save(tmp_path / "a.lepton")
    assert lx.load(tmp_path / "a.lepton").profile == artifact.manifest.profile
    for batch, reason in (({"y": KNOWN}, "missing"), ({"x": KNOWN[:, :3]}, "dimension 1 is 3")):
        with pytest.raises(lx.errors.CompileError, match=f"batch 0 of the data.*{reason}"):
            artifact.with_profile([batch])


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_monitor_counts_every_row_as_a_sketch_does(classifier):
    monitor = Monitor(signature_of(classifier), classifier.profile, clock=Clock())
    expected = Sketch(classifier.profile)
    stage, start = np.zeros((8, 4), np.float32), 0
    for rows in (1, 8, 3, 5, 7) * 30:
        stage[:rows] = KNOWN[start : start + rows]  # one array for all batches, with padding that is not zero
        outputs = stage * 5
        expected.add({"x": stage[:rows]}, {"output": outputs[:rows]})
        monitor.saw([stage], [outputs], rows)
        start += rows
    assert monitor.counts()["sketch"] == {classifier.profile.bins: expected.counts}


@pytest.mark.parametrize("slow", ["copying", "counting"])
def test_copying_and_counting_take_a_share_of_the_time(classifier, slow):
    clock, times = Clock(), []
    monitor = Monitor(signature_of(classifier), classifier.profile, clock=clock)

    def takes_long(*_):
        clock.now += 0.3
        times.append(clock.now)

    class Rows:
        shape = KNOWN[:256].shape

        def __getitem__(self, part):
            if slow == "copying":
                takes_long()
            return KNOWN[:256][part]

    if slow == "counting":
        monitor._sketch.add = takes_long
    for _ in range(1000):
        monitor.saw([Rows()], [KNOWN[:256]], 256)
        clock.now += 0.1
    # A hundredth of a second was saved up; after that one percent.
    assert 0.3 * len(times) < 0.01 * clock.now + 0.01 + 0.3
    assert 0.3 * len(times) > 0.01 * clock.now - 0.3


def test_what_cannot_be_counted_fails_no_answer(classifier, caplog):
    monitor = Monitor(signature_of(classifier), profile_of({"x": KNOWN}, {"output": KNOWN}), clock=Clock())
    monitor._sketch.add = None
    for _ in range(3):
        monitor.saw([KNOWN[:256]], [KNOWN[:256]], 256)
    assert caplog.text.count("could not be counted") == 1
