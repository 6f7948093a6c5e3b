"""Rollouts of real servers: to the end, through a kill -9, and with several workers."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import psutil
import pytest
from serve_fakes import connect, exchange, raw_request, read_response, start_script

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from numbered import wait

import lepton_xla as lx
from lepton_xla.certificates import Certificate
from lepton_xla.serve import Options, Server
from lepton_xla.serve.app import frontend
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.repository import Repository

ACCURACY = {"1": 0.9, "2": 0.9}
CERTIFICATE = Certificate(
    metric="accuracy", float_value=0.98, value=0.97, drop=1.0, low=0.5, high=1.5, rows=500, all_rows=1000,
    data="0" * 64, weights_bytes=1, float_bytes=4, recipe="int8", promised=0.95,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact with four classes."""
    program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    path = tmp_path_factory.mktemp("made") / "m.lepton"
    lx.compile(program, {"batch": (1, 8)}, name="m").save(path)
    return path


@pytest.fixture
def repository(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    for _ in range(2):
        repository.push(made, "m")
    # The one that was stable stays, or the feedback for its last answers came too late.
    (repository.root / "m" / "model.toml").write_text('versions = "all"\n[labels]\nstable = "1"\n')
    return repository


class People:
    """Ask all the time on one connection, and say what was right, as often as a version's accuracy says.

    Attributes:
        answers: how many there were, by version.
    """

    def __init__(self, server, accuracy):
        self._server, self._accuracy = server, accuracy
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.answers = {}
        self.failed = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join(60)

    def _ask(self):
        draw, number, prefix = random.Random(0), 0, f"{time.monotonic()}"
        while not self._done.is_set():
            try:
                with connect(self._server) as sock:
                    while not self._done.is_set():
                        feedback = []
                        for _ in range(50):
                            number += 1
                            row = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 0, 0]}
                            body = {"id": f"{prefix} {number}", "inputs": [row]}
                            told = self._call(sock, "infer", body)
                            version = told["model_version"]
                            self.answers[version] = self.answers.get(version, 0) + 1
                            label = 1 if draw.random() < self._accuracy[version] else 2
                            feedback.append({"id": told["id"], "label": label})
                        self._call(sock, "feedback", {"feedback": feedback})
                        time.sleep(0.01)
            except OSError as error:
                self.failed.append(repr(error))
                time.sleep(0.05)

    def _call(self, sock, action, body):
        sock.sendall(raw_request("POST", f"/v2/models/m/{action}", json.dumps(body).encode()))
        status, _, told = read_response(sock)
        assert status == 200, told
        return json.loads(told)


STAGES = [{"shadow": 0.5, "answers": 20}, {"share": 0.3, "answers": 200}, {"share": 0.5, "answers": 600}]


@pytest.mark.parametrize(
    ("accuracy", "state"), [({"1": 0.9, "2": 0.7}, "rolled back"), ({"1": 0.7, "2": 0.9}, "promoted")]
)
def test_a_worse_version_goes_back_and_a_better_one_stays(repository, monkeypatch, tmp_path, accuracy, state):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.05)
    log = tmp_path / "audit.jsonl"
    options = Options(port=0, repository_poll_s=0.05, audit_log=log)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        asked = {"version": "2", "stages": STAGES, "promote": ["accuracy > stable surely"]}
        assert client.start_rollout("m", asked)["state"] == "shadow"
        with People(server, accuracy) as people:
            wait(lambda: client.rollout("m")["state"] == state)
            winner = {"promoted": "2", "rolled back": "1"}[state]
            assert repository.find("m").settings.labels["stable"] == winner
            # The end is written, and then carried out.
            wait(lambda: {each["version"]: each for each in client.traffic("m")["versions"]}[winner]["share"] == 1.0)

            def are_of_the_winner():
                people.answers.clear()
                wait(lambda: sum(people.answers.values()) >= 100)
                return set(people.answers) == {winner}

            wait(are_of_the_winner)
        assert not people.failed
        arms = {each["version"]: each for each in client.traffic("m")["versions"]}
        assert arms[winner]["share"] == 1.0
        assert abs(arms["1"]["accuracy"] - accuracy["1"]) < 0.1
        assert arms["2"]["agreement"] == 1.0
    told = [json.loads(line) for line in log.read_text().splitlines()]
    decisions = [each for each in told if each["action"] in ("start rollout", "rollout")]
    assert decisions[0]["who"] == "anonymous"
    assert decisions[-1] == decisions[-1] | {"who": "rollout", "outcome": state, "target": "m/2"}
    assert decisions[-1]["details"]["reason"].startswith("accuracy")


def test_a_version_that_breaks_its_certificate_goes_back_whenever_it_is_stable(repository, made, monkeypatch, tmp_path):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.05)
    model = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    certified = lx.compile(model, {"batch": (1, 8)}, name="m").with_certificate(CERTIFICATE)
    certified.save(tmp_path / "certified.lepton")
    repository.push(tmp_path / "certified.lepton", "m")
    log = tmp_path / "audit.jsonl"

    def stable():
        return repository.find("m").settings.labels["stable"]

    def records():
        told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [(each["target"], each["outcome"]) for each in told if each["who"] == "certificate"]

    options = Options(port=0, repository_poll_s=0.05, audit_log=log, certificate_rollback=True)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        client.set_traffic("m", {"shares": {"1": 0.5, "3": 0.5}})
        with People(server, {"1": 0.7, "3": 0.7}) as people:  # version 1 promises nothing
            wait(lambda: any(alert.state == "firing" for alert in server.metrics.monitoring.alerts))
            time.sleep(0.2)
            assert (stable(), records()) == ("1", []), "no label stands on it"
            client.clear_traffic("m")
            for times in (1, 2):
                client.promote("m", "3")
                wait(lambda times=times: records() == times * [("m/3", "done")])
                assert stable() == "1"
                wait(lambda: client.traffic("m")["versions"][0]["share"] == 1.0)
        assert not people.failed
        # There is nothing to go back to: that is told once.
        (repository.root / "m" / "model.toml").write_text('versions = "all"\n[labels]\nstable = "3"\n')
        for version in ("1", "2"):
            repository.remove("m", version)
        wait(lambda: records()[2:] == [("m/3", "failed")])
        time.sleep(0.3)
        assert (stable(), len(records())) == ("3", 3)


def test_a_bandit_learns_from_the_answers_that_it_shared_out(repository, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.05)
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        shares = {"stable": 0.5, "2": 0.5}
        client.set_traffic("m", {"shares": shares, "bandit": {"every_s": 1, "least": 0.05}})
        with People(server, {"1": 0.6, "2": 0.9}):
            wait(lambda: client.traffic("m")["traffic"]["shares"]["2"] > 0.9)
        one, two = client.traffic("m")["versions"]
        assert abs(one["estimate"] - 0.6) < 5 * one["estimate_error"] < 0.5
        assert abs(two["estimate"] - 0.9) < 5 * two["estimate_error"] < 0.5
        rows, weights, *_ = server.metrics.of("m", "1").feedback_counts()["weighted"]
        assert weights > 1.9 * rows  # it had half of the requests at first, and then less


class Served:
    """A running command."""

    def __init__(self, root, *flags):
        self.process = start_script(
            "from lepton_xla.cli.serve import serve; serve()",
            root, "--json", "--port", "0", "--repository-poll-s", "0.05", *flags,
            environment=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
        )  # fmt: skip
        event = json.loads(self.process.stdout.readline())
        self.url, self.address = event["url"], (event["host"], event["port"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.process.stdout.close()

    def kill(self):
        if self.process.poll() is None:
            for each in (*psutil.Process(self.process.pid).children(), self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait(10)


def test_a_rollout_goes_on_after_kill_9(repository):
    stages = [{"share": 0.5, "answers": 1}, {"share": 0.6, "answers": 10**6}]
    with Served(repository.root) as served, RepositoryClient(served.url) as client, People(served, ACCURACY) as people:
        client.start_rollout("m", {"version": "2", "stages": stages})
        wait(lambda: client.rollout("m")["stage"] == 1)
        wait(lambda: (repository.root / "m" / ".evidence.json").exists())
        served.kill()
        wait(lambda: people.failed)
    before = repository.find("m").plan.rollout
    assert (before.state, before.stage) == ("canary", 1)
    with Served(repository.root) as served, RepositoryClient(served.url) as client:
        rollout = client.rollout("m")
        assert (rollout["stage"], len(rollout["decisions"])) == (1, 2)
        with People(served, {"1": 0.95, "2": 0.5}) as people:
            wait(lambda: client.rollout("m")["state"] == "rolled back")
            assert {"1", "2"} == set(people.answers)
        assert client.rollout("m")["decisions"][-1]["reason"] == "accuracy < stable surely"


def versions(server, count):
    """Which version answers on each of many connections."""
    row = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 0, 0]}
    body = json.dumps({"inputs": [row]}).encode()
    return [json.loads(exchange(server, "POST", "/v2/models/m/infer", body)[2])["model_version"] for _ in range(count)]


@pytest.mark.slow
def test_all_workers_share_requests_alike_and_one_of_them_decides(repository):
    with Served(repository.root, "--workers", "2") as served, RepositoryClient(served.url) as client:
        for version in ("2", "1", "2"):
            client.set_traffic("m", {"shares": {version: 1.0}})
            # In force in every worker when the answer comes.
            assert set(versions(served, 12)) == {version}
        client.set_traffic("m", {"shares": {"1": 0.5, "2": 0.5}, "sticky": "x-user"})
        client.clear_traffic("m")
        assert set(versions(served, 12)) == {"1"}
        client.start_rollout(
            "m", {"version": "2", "stages": [{"share": 0.5, "answers": 5}, {"share": 0.9, "answers": 5}]}
        )
        until = time.monotonic() + 60
        while client.rollout("m")["state"] != "promoted":
            assert time.monotonic() < until
            versions(served, 10)
        assert set(versions(served, 12)) == {"2"}
        assert len(client.rollout("m")["decisions"]) == 3
