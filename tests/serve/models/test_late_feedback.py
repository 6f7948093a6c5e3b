"""Feedback that comes after another version has taken the place of the one that answered."""

import json
import threading

import jax.numpy as jnp
import pytest
from numbered import wait
from serve_fakes import connect, exchange, raw_request, read_response

import lepton_xla as lx
from lepton_xla.serve import Options, Server
from lepton_xla.serve.models.repository import Repository

CLASSES = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Artifacts by version: what the first calls class c, the others call the next one, or the one after that."""
    folder = tmp_path_factory.mktemp("made")
    for number in (1, 2, 3):
        weights = {"w": jnp.roll(jnp.eye(CLASSES), number - 1, axis=1)}
        program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", CLASSES), "float32")})
        lx.compile(program, {"batch": (1, 8)}, name="m").save(folder / f"{number}.lepton")
    return folder


class Asking(threading.Thread):
    """Asks for class 0 all the time, each time by another id."""

    def __init__(self, server, name):
        super().__init__()
        self._server, self._name, self._done = server, name, threading.Event()
        self.answered = {}  # version -> ids

    def run(self):
        with connect(self._server) as sock:
            number = 0
            while not self._done.is_set():
                number += 1
                given = {"name": "x", "datatype": "FP32", "shape": [1, CLASSES], "data": [1, 0, 0, 0]}
                body = {"id": f"{self._name}{number}", "inputs": [given]}
                sock.sendall(raw_request("POST", "/v2/models/m/infer", json.dumps(body).encode()))
                status, _, text = read_response(sock)
                assert status == 200, text
                self.answered.setdefault(json.loads(text)["model_version"], []).append(body["id"])

    def stop(self):
        self._done.set()
        self.join(20)


def told(server, ids, label=0):
    body = {"feedback": [{"id": each, "label": label} for each in ids]}
    status, _, text = exchange(server, "POST", "/v2/models/m/feedback", json.dumps(body).encode())
    return status, json.loads(text)


def test_it_counts_for_the_version_that_answered(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    repository.push(made / "1.lepton", "m")
    with Server(options=Options(port=0, repository_poll_s=0.02), repository=repository.root) as server:
        asking = [Asking(server, name) for name in "ab"]
        for each in asking:
            each.start()
        try:
            for version in ("2", "3"):
                before = str(int(version) - 1)
                wait(lambda v=before: all(len(each.answered.get(v, ())) > 20 for each in asking))
                repository.push(made / f"{version}.lepton", "m", version)
                wait(lambda v=version: server.models.versions("m") == [v])
            wait(lambda: all(len(each.answered.get("3", ())) > 20 for each in asking))
        finally:
            for each in asking:
                each.stop()
        # Fewer than the rows that one body may have.
        ids = {version: [each for one in asking for each in one.answered[version][-100:]] for version in "123"}
        together = [each for some in ids.values() for each in some]
        assert told(server, together) == (200, {"rows": len(together)})
        assert told(server, together) == (200, {"rows": len(together)})  # again: not counted again
        assert told(server, together[:1], 1)[0] == 409
        assert told(server, ["never"])[0] == 404
        text = exchange(server, "GET", "/metrics")[2].decode()
        for version in "123":
            result = "right" if version == "1" else "wrong"
            line = f'lepton_feedback_rows_total{{model="m",result="{result}",version="{version}"}}'
            assert f"{line} {float(len(ids[version]))}\n" in text, [x for x in text.splitlines() if "feedback" in x]
