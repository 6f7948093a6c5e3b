"""Feedback at `leptonx serve --workers 2`: judged by the worker that answered, whichever the client reaches."""

import json
import os
import select
import signal
import socket
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from serve_fakes import exchange, raw_request, read_response, start_script

import lepton_xla as lx

CLASSES = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The running command; a row [1, CLASSES] is its own answer."""
    path = tmp_path_factory.mktemp("artifact") / "same.lepton"
    program = lx.trace(
        lambda w, x: x * w["w"][None], {"w": jnp.ones(CLASSES)}, {"x": lx.TensorSpec(("batch", CLASSES), "float32")}
    )
    lx.compile(program, {"batch": (1, 4)}, name="same").save(path)
    process = start_script(
        "from lepton_xla.cli.serve import serve; serve()",
        path, "--json", "--port", "0", "--workers", "2",
        environment=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    event = json.loads(process.stdout.readline())
    process.address = (event["host"], event["port"])
    yield process
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()


def asked(served, ids, classes):
    """Has requests answered, each over a connection of its own, so by both workers."""
    for request_id, chosen in zip(ids, classes, strict=True):
        data = np.eye(CLASSES)[chosen].tolist()
        body = {"id": request_id, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": data}]}
        status, _, text = exchange(served, "POST", "/v2/models/same/infer", json.dumps(body).encode())
        assert (status, json.loads(text)["outputs"][0]["data"]) == (200, data)


def told(served, labels):
    """Status and body of the answer to feedback, over a new connection."""
    body = {"feedback": [{"id": request_id, "label": label} for request_id, label in labels.items()]}
    status, _, text = exchange(served, "POST", "/v2/models/same/feedback", json.dumps(body).encode())
    return status, json.loads(text)


def counted(served):
    """Rows with feedback, and how many were right."""
    _, _, text = exchange(served, "GET", "/metrics")
    lines = [
        line.rsplit(" ", 1) for line in text.decode().splitlines() if line.startswith("lepton_feedback_rows_total")
    ]
    right = sum(float(value) for name, value in lines if 'result="right"' in name)
    return sum(float(value) for _, value in lines), right


def test_whoever_is_told_all_labels_are_judged_once(served):
    ids = [f"{number}:{'x' * 480}" for number in range(80)]  # more than one message between processes holds
    classes = [number % CLASSES for number in range(80)]
    asked(served, ids, classes)
    labels = dict(zip(ids, [*classes[:60], *((each + 1) % CLASSES for each in classes[60:])], strict=True))
    before = counted(served)
    for _ in range(6):  # a retry changes nothing, whichever worker gets it
        assert told(served, labels) == (200, {"rows": 80})
    assert (counted(served)[0] - before[0], counted(served)[1] - before[1]) == (80, 60)
    others = {request_id: (label + 1) % CLASSES for request_id, label in labels.items()}
    for _ in range(4):
        assert told(served, others)[0] == 409
    assert counted(served)[0] - before[0] == 80


def test_labels_that_do_not_fit_are_refused_whole(served):
    ids = [f"some {number}" for number in range(8)]
    asked(served, ids, [0] * 8)
    before = counted(served)
    for _ in range(4):
        assert told(served, dict.fromkeys(ids, 0) | {"never asked": 0})[0] == 404
        status, body = told(served, dict.fromkeys(ids, 0) | {ids[5]: CLASSES})
        assert (status, "0 to 2" in body["error"]) == (400, True)
    assert counted(served) == before
    assert told(served, dict.fromkeys(ids, 0))[0] == 200


def test_one_who_does_not_say_is_told_as_such(served):
    """Not as an answer that nobody gave: the label would be lost."""
    workers = [
        each for each in psutil.Process(served.pid).children() if "lepton_xla.serve.processes.worker" in each.cmdline()
    ]
    ids = [f"late {number}" for number in range(8)]
    asked(served, ids, [1] * 8)
    body = json.dumps({"feedback": [{"id": request_id, "label": 1} for request_id in ids]}).encode()
    sockets = [socket.create_connection(served.address, 10) for _ in range(12)]
    try:
        time.sleep(0.5)  # both workers have some
        workers[0].suspend()
        for sock in sockets:
            sock.sendall(raw_request("POST", "/v2/models/same/feedback", body))
        select.select(sockets, [], [], 20)
        time.sleep(0.2)
        answered, _, _ = select.select(sockets, [], [], 0)
        assert {read_response(sock)[0] for sock in answered} == {503}
        assert len(answered) < len(sockets)  # connections of the suspended one
    finally:
        workers[0].resume()
        for sock in sockets:
            sock.close()
    assert told(served, dict.fromkeys(ids, 1)) == (200, {"rows": 8})
