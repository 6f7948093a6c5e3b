"""A shadow is asked what was answered: it delays nobody, and where it differs is counted."""

import asyncio
import json
import time

import ml_dtypes
import numpy as np
import pytest
from serve_fakes import Affine, affine_binary, affine_json, connect, exchange, raw_request, read_response

from lepton_xla.program import TensorSpec
from lepton_xla.serve import Limits
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.traffic import Shadow, Traffic
from lepton_xla.serve.protocol.wire import Decoder
from lepton_xla.serve.traffic import mirror
from lepton_xla.serve.traffic.agreement import same_rows
from lepton_xla.serve.traffic.mirror import Mirror


class Other(Affine):
    """The same for n < 10, but slow once told to be; fails for n == -2."""

    version = "4"
    slow_s = 0.0

    def run(self, sizes, arrays):
        time.sleep(self.slow_s)
        if (arrays[1] == -2).any():
            raise ValueError("no")
        y, twice = super().run(sizes, arrays)
        return [y + np.outer(arrays[1] >= 10, [0, 0, 1, 0]).astype(np.float32), twice]


def share(server, **traffic):
    async def on_loop():
        server.models.share("affine", Traffic(**traffic))

    asyncio.run_coroutine_threadsafe(on_loop(), server._loop).result(20)


@pytest.fixture
def server(make_server):
    return make_server([Affine(), Other()])


@pytest.fixture
def patient(monkeypatch):
    """Has servers leave nothing out, however slow the machine is."""
    monkeypatch.setattr(mirror, "_SAVED_S", 60.0)


def ask(sock, n, rows=1, binary=True, path="/v2/models/affine/infer"):
    x = np.ones((rows, 4))
    body, headers = affine_binary(x, [n] * rows) if binary else (affine_json(x, [n] * rows), {})
    sock.sendall(raw_request("POST", path, body, headers))
    status, _, told = read_response(sock)
    assert status == 200, told


def counts(server, of=1, version="4"):
    """What became of the shadow's rows, once all of them are accounted for."""
    until = time.monotonic() + 20
    while True:
        found = server.metrics.of("affine", version).shadow
        if sum(found.values()) >= of or time.monotonic() > until:
            assert sum(found.values()) == of
            return dict(found)
        time.sleep(0.01)


@pytest.mark.usefixtures("patient")
def test_what_differs_and_what_fails_is_counted_by_rows(server):
    share(server, shares={"3": 1.0}, shadow=Shadow(to="4"))
    with connect(server) as sock:
        ask(sock, 1, rows=3)
        ask(sock, 10, rows=2, binary=False)
        ask(sock, 2, rows=21)  # more than the largest size: in parts
        ask(sock, -2)
    assert counts(server, 27) == {"same": 24, "different": 2, "failed": 1, "dropped": 0}
    text = exchange(server, "GET", "/metrics")[2].decode()
    assert 'lepton_shadow_rows_total{model="affine",result="different",version="4"} 2.0' in text
    assert server.metrics.of("affine", "4").requests == 0  # it has answered nobody
    with connect(server) as sock:
        ask(sock, 1, path="/v2/models/affine/versions/3/infer")  # who names a version is not mirrored
    assert counts(server, 27)["same"] == 24


def test_a_slow_shadow_delays_nobody(server):
    slow = server.models.find("affine", "4").scheduler.engine.model
    slow.slow_s = 3.0
    share(server, shares={"3": 1.0}, shadow=Shadow(to="4"))
    times = []
    with connect(server) as sock:
        ask(sock, 1)
        for _ in range(20):
            before = time.monotonic()
            ask(sock, 1)
            times.append(time.monotonic() - before)
            time.sleep(0.005)
    assert max(times) < 1.5
    # A quarter of the time at most, and a moment that was saved up: the first takes all of it.
    assert counts(server, 21) == {"same": 1, "different": 0, "failed": 0, "dropped": 20}


@pytest.mark.parametrize(
    ("load", "free", "least", "most"), [(0.1, 1.0, 0.24, 0.26), (0.9, 1.0, 0.0075, 0.0125), (0.1, 0.5, 0.0075, 0.03)]
)
def test_a_busy_server_gives_it_less(server, load, free, least, most):
    """By a clock that is moved by hand: 20 ms from request to request, and 10 ms for each that the shadow is asked.

    `load` is how busy the processor is without the shadow, and `free` for how much of its time the shadow has a core.
    """
    one, other = (server.models.find("affine", version) for version in "34")
    request = one.decoder.decode(affine_json(np.ones((1, 4)), [1]), None)
    outputs = [np.full((1, 4), 3, np.float32).tobytes(), np.int32([2]).tobytes()]
    now = [100.0]

    class Timed(Mirror):
        def _compare(self, item):
            super()._compare(item)
            now[0] += 0.01

    subject = Timed(lambda: now[0], lambda: load * now[0] + subject._ran_s, lambda: free * now[0])
    requests = 2000
    for _ in range(requests):
        now[0] += 0.02
        subject.ask(other, one, request, outputs)
        until = time.monotonic() + 5
        while subject._bytes and time.monotonic() < until:
            time.sleep(0.0)
    subject.close()
    found = other.metrics.shadow
    assert found["same"] + found["dropped"] == requests
    took_s, saved_s = 0.01 * found["same"], 0.02
    assert least <= (took_s - saved_s) / (now[0] - 100.0) <= most


@pytest.mark.usefixtures("patient")
def test_a_fraction_of_the_requests(server):
    share(server, shares={"3": 1.0}, shadow=Shadow(to="4", fraction=0.25))
    with connect(server) as sock:
        for _ in range(200):
            ask(sock, 1)
    time.sleep(0.2)
    assert 0 < sum(server.metrics.of("affine", "4").shadow.values()) < 90


class Narrow(Affine):
    version = "5"

    def __init__(self):
        super().__init__()
        self.outputs = {"y": self.outputs["y"]}

    def run(self, sizes, arrays):
        return super().run(sizes, arrays)[:1]


def test_a_version_of_other_tensors_cannot_be_a_shadow(make_server):
    server = make_server([Affine(), Narrow()])
    share(server, shares={"3": 1.0}, shadow=Shadow(to="5"))
    with connect(server) as sock:
        ask(sock, 1, rows=2)
    assert counts(server, 2, "5") == {"same": 0, "different": 0, "failed": 2, "dropped": 0}


def agreed(servable, outputs, ones, others):
    """Rows on which two answers of 3 rows agree, by the outputs that were asked for."""
    signature = signature_of(servable)
    head = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 4], "data": [0.0] * 12}],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    spec = Decoder(signature, Limits(), 8).decode(json.dumps(head).encode(), None).spec
    return same_rows(signature, spec, [each.tobytes() for each in ones], [each.tobytes() for each in others])


class Made:
    name, version, buckets = "made", "1", {"batch": (4,)}

    def __init__(self, **outputs):
        self.inputs = {"x": TensorSpec(("batch", 4), "float32")}
        self.outputs = {name: TensorSpec(shape, dtype) for name, (shape, dtype) in outputs.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_classes_are_compared_where_there_are_classes(dtype):
    one = np.array([[1, 2, 0], [5, 1, 1], [0, 0, 9]], dtype)
    other = np.array([[1, 9, 0], [1, 5, 1], [0, 0, 1]], dtype)
    servable = Made(scores=(("batch", 3), np.dtype(dtype).name), sizes=(("batch",), "int32"))
    different = np.int32([1, 2, 3]), np.int32([3, 2, 1])
    assert agreed(servable, ["scores", "sizes"], [one, different[0]], [other, different[1]]) == 2
    assert agreed(servable, ["sizes"], different[:1], different[1:]) == 1


def test_an_answer_of_nan_agrees_with_no_class():
    one, nan = np.float32([[2, 1, 0], [1, 2, 0], [0, 1, 2]]), np.full((3, 3), np.nan, np.float32)
    servable = Made(scores=(("batch", 3), "float32"))
    assert agreed(servable, ["scores"], [one], [nan]) == 0
    assert agreed(servable, ["scores"], [nan], [nan]) == 3


def test_numbers_are_compared_within_two_percent():
    one = np.float32([[1, 100], [1, 100], [np.nan, 100]])
    other = np.float32([[1.01, 99], [1.5, 100], [np.nan, 100]])
    servable = Made(y=(("batch", 2, 1), "float32"))
    assert agreed(servable, ["y"], [one], [other]) == 2
