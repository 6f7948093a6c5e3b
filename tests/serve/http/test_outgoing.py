"""Memory on the way out: answers count against the limits before a request is handled and until they have left."""

import contextlib
import inspect
import json
import re
import socket
import sys
import time

import numpy as np
import pytest
from serve_fakes import bodies, exchange, raw_request, read_outputs, read_response, send

from lepton_xla.program import TensorSpec
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.date import DATE
from lepton_xla.serve.http.outgoing import AHEAD_BYTES
from lepton_xla.serve.http.response import Response
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol.encoding import deflate
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES
from lepton_xla.serve.protocol.response import write_response
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Decoder

MIB = 1 << 20
INFER = "/v2/models/wide/infer"


class Wide:
    """A number becomes a row of as many as make a mebibyte: itself, and then what is added to it."""

    name, version = "wide", "1"

    def __init__(self, dtype="float32", columns=MIB // 4):
        self.inputs = {"x": TensorSpec(("batch",), "int32")}
        self.outputs = {"y": TensorSpec(("batch", columns), dtype)}
        self.buckets = {"batch": (1, 4)}
        self.runs = 0

    def run(self, sizes, arrays):
        self.runs += 1
        (columns,) = self.outputs["y"].shape[1:]
        return [arrays[0][:, None].astype(np.float32) + np.arange(columns, dtype=np.float32)]


def ask(*numbers, coding=None, blanks=0):
    x = np.array(numbers, np.int32)
    given = {"name": "x", "datatype": "INT32", "shape": [len(x)], "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    head += b" " * blanks
    body, fields = head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    if coding is not None:
        body = deflate(body, coding)
        fields["Content-Encoding"] = coding
    return raw_request("POST", INFER, body, fields)


def buffered(server):
    text = exchange(server, "GET", "/metrics")[2].decode()
    return float(re.search(r"^lepton_buffered_bytes (\S+)", text, re.MULTILINE)[1])


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.fixture
def wide():
    return Wide()


def connect_slowly(server):
    """A connection of small buffers, so that little is on its way in the kernel."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    sock.settimeout(10)
    sock.connect(server.address)
    return contextlib.closing(sock)


@pytest.mark.parametrize("sent", [{}, {"coding": "gzip", "blanks": PIECE_BYTES}], ids=["short", "read on a thread"])
def test_what_a_client_does_not_read_is_not_computed_and_all_of_it_comes_in_order_at_last(make_server, wide, sent):
    server = make_server(wide, limits=Limits(max_body_bytes=16 * MIB, max_buffered_bytes=16 * MIB))
    exchange(server, "GET", "/v2")
    ran, before = wide.runs, resident_bytes()
    with connect_slowly(server) as sock:
        sock.sendall(b"".join(ask(n, **sent) for n in range(120)))
        seen = []
        for _ in range(20):
            time.sleep(0.01)
            seen.append(buffered(server))
            status, headers, body = exchange_infer(server, 7)
            assert status == 200
            assert read_outputs(headers, body)["y"][0, 1] == 8
        assert 0 < max(seen) < 5 * MIB
        # Those of the other client; and of this one as many as its limit and the kernel's buffers have room for.
        assert wide.runs - ran < 20 + 16
        assert resident_bytes() - before < 60 * MIB
        buffer = bytearray()
        for n in range(120):
            status, headers, body = read_response(sock, buffer=buffer)
            assert status == 200
            np.testing.assert_array_equal(read_outputs(headers, body)["y"][0, [0, -1]], [n, n + MIB // 4 - 1])
    wait_until(lambda: not buffered(server))


def wait_until(true):
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def exchange_infer(server, *numbers):
    with contextlib.closing(socket.create_connection(server.address, 10)) as sock:
        sock.sendall(ask(*numbers))
        return read_response(sock)


def test_a_client_that_goes_gives_back_what_it_held(make_server, wide):
    server = make_server(wide)
    with connect_slowly(server) as sock:
        sock.sendall(b"".join(ask(n) for n in range(50)))
        wait_until(lambda: buffered(server) > 0)
    wait_until(lambda: not buffered(server))


def test_an_answer_that_never_fits_is_refused_before_it_is_computed(make_server, wide):
    server = make_server(wide, limits=Limits(max_body_bytes=16 * MIB, max_buffered_bytes=16 * MIB))
    ran = wide.runs
    status, _, body = exchange_infer(server, *range(1000))
    assert status == 413
    # Of more rows than one run has, the parts are put together and then copied into the answer.
    assert f"the answer takes {2000 * MIB} bytes of memory, and the server may hold {16 * MIB}" in body.decode()
    assert wide.runs == ran
    status, headers, body = exchange_infer(server, *range(7))
    np.testing.assert_array_equal(read_outputs(headers, body)["y"][:, 0], np.arange(7))


class Pipe:
    """A transport of which nothing leaves until it is told."""

    def __init__(self):
        self.written = []

    def write(self, data):
        self.written.append(data)

    def get_write_buffer_size(self):
        return sum(map(len, self.written))

    def get_extra_info(self, name):
        return ("", 0)

    def is_closing(self):
        return False

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


@pytest.fixture
def held():
    return []


@pytest.fixture
def connection(held):
    made = Connection(ServerState(held.append, Limits(max_body_bytes=4 * MIB, max_buffered_bytes=4 * MIB)))
    made.connection_made(Pipe())
    return made


def get(count):
    return raw_request("GET", "/v2") * count


def test_requests_wait_for_room_for_their_answers(connection, held):
    state, pipe = connection._state, connection._transport

    def handle(exchange):
        held.append(exchange)
        exchange.reserve(AHEAD_BYTES * 3 // 5)

    state.handler = handle
    connection.data_received(get(5))
    assert len(held) == 2  # the second passes the limit, and no third is handled
    assert not pipe.reading
    assert state.buffered_bytes == 2 * (AHEAD_BYTES * 3 // 5)
    send(held[1], b"second")
    assert (pipe.written, len(held)) == ([], 3)  # what it was found to take is all that counts now
    send(held[0], b"first ")
    assert (bodies(pipe.written), len(held)) == (b"first second", 4)
    connection.pause_writing()
    pipe.written = [b"x" * AHEAD_BYTES]
    connection.sweep(time.monotonic())
    send(held[2], b"third")
    send(held[3], b"fourth")
    assert len(held) == 4
    assert state.buffered_bytes == pipe.get_write_buffer_size() > AHEAD_BYTES + len(b"thirdfourth")
    pipe.written.clear()
    connection.resume_writing()
    assert len(held) == 5
    assert pipe.reading
    send(held[4], b"fifth")
    assert state.buffered_bytes == 0


def test_an_answer_that_waits_for_another_keeps_what_it_said(connection, held):
    """The bytes of outputs are the engine's, which writes the next batch over them."""
    connection.data_received(get(2))
    outputs = bytearray(b"second")
    held[1].send(Response(200, b"\r\nthe ", 10), (memoryview(outputs),))
    outputs[:] = b"------"
    send(held[0], b"first, ")
    assert bodies(connection._transport.written) == b"first, the second"


def test_a_response_that_is_sent_again_has_the_date_of_then(connection, held):
    response = Response(200, b"Content-Length: 0\r\n\r\n", 21)
    try:
        for second in (b"37", b"38"):
            DATE.tick(784111740 + int(second))
            for _ in range(2):
                connection.data_received(get(1))
                held[-1].send(response, ())
                start = b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:%b GMT\r\n" % second
                assert connection._transport.written.pop() == start + response.fields
    finally:
        DATE.tick(time.time())


def test_what_there_is_no_room_for_now_is_503(connection, held):
    connection.data_received(get(2))
    held[0].reserve(3 * MIB)
    with pytest.raises(HTTPError) as caught:
        held[1].reserve(2 * MIB)
    assert caught.value.status == 503
    connection.connection_lost(None)
    assert connection._state.buffered_bytes == 0


def test_answers_that_are_there_at_once_are_no_recursion(connection, held):
    connection._transport.written = [b"x" * 2 * AHEAD_BYTES]
    connection.pause_writing()
    connection._transport.written.clear()
    connection._state.handler = lambda exchange: send(exchange, b"x")
    connection.data_received(get(100))
    assert not connection._transport.written
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 50)
    try:
        connection.resume_writing()
    finally:
        sys.setrecursionlimit(limit)
    assert len(connection._transport.written) == 100


EXTREMES = {
    "bool": [False, True],
    "int8": [-128, 127], "uint8": [255], "int16": [-(2**15)], "uint16": [2**16 - 1], "int32": [-(2**31)],
    "uint32": [2**32 - 1], "int64": [-(2**63)], "uint64": [2**64 - 1],
    "float32": [-1.1754944e-38, -3.4028235e38, -1.4e-45, 0.1], "float64": [-2.2250738585072014e-308, -5e-324, 1 / 3],
}  # fmt: skip


@pytest.mark.parametrize("dtype", EXTREMES)
@pytest.mark.parametrize("asked", [{"binary_data": True}, {"binary_data": False}, {"classification": 40}])
def test_an_answer_is_no_longer_than_what_is_set_aside_for_it(dtype, asked):
    values = np.resize(np.array(EXTREMES[dtype], dtype), (5, 40))
    signature = signature_of(Wide(dtype, 40))
    request = {
        "inputs": [{"name": "x", "datatype": "INT32", "shape": [5], "data": [1] * 5}],
        "outputs": [{"name": "y", "parameters": asked}],
    }
    spec = Decoder(signature, Limits(), 100).decode(json.dumps(request).encode(), None).spec
    head, tail = write_response(signature, spec, [values.tobytes()])
    assert values.nbytes <= sum(map(len, (head, *tail))) <= spec.answer_bytes + 300
