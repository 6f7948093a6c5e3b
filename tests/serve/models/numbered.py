"""Artifacts whose answers say which version made them, and clients that check every answer."""

import json
import threading
import time

import jax.numpy as jnp
import numpy as np
from serve_fakes import connect, raw_request, read_outputs, read_response

import lepton_xla as lx

ROW = [1.0, 2.0, 3.0, 4.0]


def make_numbered(folder, numbers, name="m", width=4):
    """Artifacts by number. Both outputs are the input times that number, each by a weight of its own."""
    made = {}
    for number in numbers:
        weights = {key: jnp.eye(width) * number for key in ("first", "second")}
        program = lx.trace(
            lambda w, x: {"first": x @ w["first"], "second": x @ w["second"]},
            weights,
            {"x": lx.TensorSpec(("batch", width), "float32")},
        )
        made[number] = folder / f"made{number}.lepton"
        lx.compile(program, {"batch": (1, 8)}, name=name).save(made[number])
    return made


class Clients:
    """Threads that ask a server all the time, each over its own kept connection, and check every answer.

    Attributes:
        answers: how many there were, by version.
        wrong: what was not an answer of the version that it names.
    """

    def __init__(self, server, name="m", count=3, route="/infer"):
        self.answers = {}
        self.wrong = []
        self._server = server
        self._done = threading.Event()
        self._lock = threading.Lock()
        path = f"/v2/models/{name}{route}"
        self._threads = [threading.Thread(target=self._ask, args=(path, bool(each % 2))) for each in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        for thread in self._threads:
            thread.join(20)
        assert not self.wrong, self.wrong[:5]

    def _ask(self, path, binary):
        head = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": ROW}]}
        if binary:
            head["parameters"] = {"binary_data_output": True}
        request = raw_request("POST", path, json.dumps(head).encode())
        with connect(self._server) as sock:
            while not self._done.is_set():
                sock.sendall(request)
                try:
                    self._check(*read_response(sock))
                except (OSError, ValueError, AssertionError) as error:
                    self.wrong.append(repr(error))
                    return

    def _check(self, status, headers, body):
        assert status == 200, body
        size = headers.get("inference-header-content-length")
        version = json.loads(body if size is None else body[: int(size)])["model_version"]
        outputs = read_outputs(headers, body)
        for output in outputs.values():
            np.testing.assert_allclose(output, np.float32([ROW]) * int(version), rtol=1e-6)
        assert set(outputs) == {"first", "second"}
        with self._lock:
            self.answers[version] = self.answers.get(version, 0) + 1


def wait(until, seconds=60.0):
    """Waits for something to be true."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
