"""Bytes on real sockets against a running server."""

import itertools
import json
import random
import re
import socket
import threading
import time

import numpy as np
import pytest
from serve_fakes import (
    Affine,
    affine_binary,
    affine_json,
    connect,
    counted,
    exchange,
    raw_request,
    read_outputs,
    read_response,
)

from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.limits import Limits

INFER = "/v2/models/affine/infer"
X = np.arange(4, dtype=np.float32).reshape(1, 4)


def infer_bytes(n=1, **headers):
    body, fields = affine_binary(X, [n])
    return raw_request("POST", INFER, body, fields | headers)


def check(response, n=1):
    status, headers, body = response
    assert status == 200, body
    np.testing.assert_array_equal(read_outputs(headers, body)["y"], 2 * X + n)


def closed(sock):
    """Whether the server closes this connection without another byte."""
    return sock.recv(1) == b""


def test_keep_alive_answers_one_after_the_other(server):
    with connect(server) as sock:
        for n in range(5):
            sock.sendall(infer_bytes(n))
            check(read_response(sock), n)


def test_pipelined_requests_are_answered_in_order(server):
    buffer = bytearray()
    with connect(server) as sock:
        parts = [infer_bytes(n) if n % 3 else raw_request("GET", "/v2/health/live") for n in range(60)]
        sock.sendall(b"".join(parts))
        for n in range(60):
            response = read_response(sock, buffer=buffer)
            if n % 3:
                check(response, n)
            else:
                assert json.loads(response[2]) == {"live": True}
        assert not buffer


def test_any_cut_of_the_bytes_gives_the_same_answers(server):
    data = infer_bytes(1) + infer_bytes(2) + raw_request("GET", "/v2") + infer_bytes(3)
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randrange(8)))})
        buffer = bytearray()
        with connect(server) as sock:
            for start, stop in itertools.pairwise(cuts):
                sock.sendall(data[start:stop])
                time.sleep(0.001)
            check(read_response(sock, buffer=buffer), 1)
            check(read_response(sock, buffer=buffer), 2)
            assert read_response(sock, buffer=buffer)[0] == 200
            check(read_response(sock, buffer=buffer), 3)


@pytest.mark.parametrize("cut", [20, -40, None])
def test_what_follows_requests_with_the_same_head_is_read_for_what_it_is(server, cut):
    """More than one request at once, or less, or another one, where the last ones were each whole and alike."""
    buffer = bytearray()
    with connect(server) as sock:
        for n in range(3):
            sock.sendall(infer_bytes(n))
            check(read_response(sock, buffer=buffer), n)
        data = infer_bytes(3) + (infer_bytes(4) if cut is None else b"")
        sock.sendall(data[:cut])
        time.sleep(0.01)
        sock.sendall(data[cut:] if cut is not None else raw_request("GET", "/v2"))
        check(read_response(sock, buffer=buffer), 3)
        if cut is None:
            check(read_response(sock, buffer=buffer), 4)
            assert read_response(sock, buffer=buffer)[0] == 200
        sock.sendall(infer_bytes(5, **{"X-Other": "1"}))
        check(read_response(sock, buffer=buffer), 5)


def test_a_remembered_head_is_not_taken_for_another_body_length(server):
    """The second request's head equals the first's; its body comes in two pieces, then the third's in one."""
    with connect(server) as sock:
        sock.sendall(infer_bytes(1))
        check(read_response(sock), 1)
        data = infer_bytes(2)
        sock.sendall(data[:-10])
        time.sleep(0.05)
        sock.sendall(data[-10:])
        check(read_response(sock), 2)
        sock.sendall(infer_bytes(3))
        check(read_response(sock), 3)


def chunked(body, sizes, extension=b""):
    out, at = b"", 0
    for size in sizes:
        out += b"%x%s\r\n%s\r\n" % (size, extension, body[at : at + size])
        at += size
    assert at == len(body)
    return out + b"0\r\n\r\n"


def test_chunked_bodies_are_joined(server):
    body, fields = affine_binary(X, [1])
    with connect(server) as sock:
        for sizes in ([len(body)], [1] * len(body), [10, len(body) - 10]):
            head = raw_request("POST", INFER, b"", fields | {"Transfer-Encoding": "chunked"})
            sock.sendall(head + chunked(body, sizes))
            check(read_response(sock))


def test_expect_100_continue_is_answered_before_the_body(server):
    body, fields = affine_binary(X, [1])
    data = raw_request("POST", INFER, body, fields | {"Expect": "100-continue"})
    with connect(server) as sock:
        sock.sendall(data[: -len(body)])
        assert read_response(sock)[0] == 100
        sock.sendall(body)
        check(read_response(sock))


def test_expect_100_continue_on_a_body_that_is_too_large_gets_the_refusal_at_once(server):
    fields = {"Expect": "100-continue", "Content-Length": str(1 << 40)}
    with connect(server) as sock:
        sock.sendall(raw_request("POST", INFER, b"", fields))
        assert read_response(sock)[0] == 413


def test_head_has_the_headers_of_get_and_no_body(server):
    _, headers, body = exchange(server, "GET", "/v2")
    status, head_headers, head_body = exchange(server, "HEAD", "/v2")
    assert (status, head_body) == (200, b"")
    assert head_headers == headers
    assert int(headers["content-length"]) == len(body)


@pytest.mark.parametrize("host", ["", "a", "127.0.0.1:8000", "[::1]:8000", "a_b.example."])
def test_every_host_that_there_may_be_is_taken(server, host):
    assert exchange(server, "GET", "/v2", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("origin", ["http://a", "HTTPS://a.example:8443", "http://[::1]:80"])
def test_the_absolute_form_of_a_target_is_taken(server, origin):
    """RFC 9112, section 3.2.2: by every server, though only clients of proxies send it."""
    check(exchange(server, "POST", origin + INFER, *affine_binary(X, [1])))
    assert exchange(server, "GET", f"{origin}/v2?x=http://b/")[0] == 200
    for target in (f"{origin}/v3", origin, f"ftp{origin[4:]}/v2", "http:///v2", "http://a?/v2"):
        assert exchange(server, "GET", target)[0] in (400, 404)


def test_http_10_and_connection_close_end_the_connection(server):
    for fields, version, kept in (
        ({"Connection": "close"}, "1.1", False),
        ({}, "1.0", False),
        ({"Connection": "keep-alive"}, "1.0", True),
    ):
        body, binary = affine_binary(X, [1])
        with connect(server) as sock:
            sock.sendall(raw_request("POST", INFER, body, fields | binary, version))
            response = read_response(sock)
            check(response)
            assert response[1]["connection"] == ("keep-alive" if kept else "close")
            if not kept:
                assert closed(sock)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 501),
        (b"GET\r\n\r\n", 501),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\nHost: a\n\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: a, b/c\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: user@a\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1x\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 501),  # a TLS hello
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(100)) + b"\r\n", 431),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
    ],
)
def test_malformed_http_is_refused_in_json_and_the_connection_closed(server, data, status):
    with connect(server) as sock:
        sock.sendall(data)
        got, headers, body = read_response(sock)
        assert got == status
        assert set(json.loads(body)) == {"error"}
        assert headers["connection"] == "close"
        assert closed(sock)
    assert exchange(server, "GET", "/v2/health/live")[0] == 200


def test_answers_before_a_malformed_request_still_come(server, affine):
    with connect(server) as sock:
        buffer = bytearray()
        sock.sendall(infer_bytes(1) + b"nonsense\r\n\r\n")
        check(read_response(sock, buffer=buffer))
        assert read_response(sock, buffer=buffer)[0] == 501
        assert closed(sock)


def test_a_header_that_never_ends_is_cut_off(server):
    with connect(server) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: ")
        time.sleep(0.05)
        # More than the parser may hold back, in pieces, never a complete field.
        send_until_answered(sock, b"y" * 4096, 1000)
        assert read_response(sock)[0] == 431


def send_until_answered(sock, piece, most):
    """Sends pieces until the server has answered; fails if it takes `most` pieces without a word."""
    sock.setblocking(False)
    for _ in range(most):
        try:
            sock.send(piece)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            time.sleep(0.001)
        try:
            if sock.recv(1, socket.MSG_PEEK):
                break
        except BlockingIOError:
            pass
    else:
        pytest.fail("not answered")
    sock.setblocking(True)
    sock.settimeout(10)


def test_chunk_extensions_cannot_carry_endless_bytes(server):
    with connect(server) as sock:
        sock.sendall(raw_request("POST", INFER, b"", {"Transfer-Encoding": "chunked"}) + b"5;")
        time.sleep(0.05)
        send_until_answered(sock, b"x" * 8192, 1000)
        assert read_response(sock)[0] == 400


def test_the_number_of_chunks_is_bounded(make_server):
    server = make_server(Affine(), limits=Limits(max_chunks=100))
    with connect(server) as sock:
        head = raw_request("POST", INFER, b"", {"Transfer-Encoding": "chunked"})
        sock.sendall(head + b"1\r\nx\r\n" * 101)
        assert read_response(sock)[0] == 413


def test_a_body_over_the_limit_is_refused_with_its_answer_readable(make_server):
    server = make_server(Affine(), limits=Limits(max_body_bytes=100_000))
    for fields, wrap in (({}, False), ({"Transfer-Encoding": "chunked"}, True)):
        body = bytes(20 << 20)
        with connect(server) as sock:
            if wrap:
                sock.sendall(raw_request("POST", INFER, b"", fields))
                send_until_answered(sock, b"%x\r\n%s\r\n" % (50_000, bytes(50_000)), 1000)
            else:
                sock.sendall(raw_request("POST", INFER, body, fields))
            status, _, answer = read_response(sock)
            assert status == 413
            assert "100000" in json.loads(answer)["error"]


def test_too_many_pipelined_requests_are_refused(make_server, affine):
    server = make_server(affine, limits=Limits(max_pipelined=4))
    affine.gate.clear()
    with connect(server) as sock:
        sock.sendall(infer_bytes(0))
        affine.running.wait(5)
        sock.sendall(b"".join(infer_bytes(n) for n in range(1, 6)))
        time.sleep(0.1)
        affine.gate.set()
        buffer = bytearray()
        for n in range(4):
            check(read_response(sock, buffer=buffer), n)
        assert read_response(sock, buffer=buffer)[0] == 400


def test_too_many_connections_get_503(make_server):
    server = make_server(Affine(), limits=Limits(max_connections=2))
    with connect(server) as first, connect(server) as second:
        for sock in (first, second):
            sock.sendall(raw_request("GET", "/v2"))
            assert read_response(sock)[0] == 200
        with connect(server) as third:
            third.sendall(infer_bytes())
            status, headers, _ = read_response(third)
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            assert closed(third)


FAST = Limits(head_timeout_s=0.3, body_timeout_s=0.3, idle_timeout_s=0.3, write_timeout_s=0.3)


@pytest.mark.parametrize("sent", [b"GET /v2 HT", raw_request("POST", INFER, b"x" * 100)[:-50]])
def test_a_slow_request_gets_408(make_server, sent):
    server = make_server(Affine(), limits=FAST)
    with connect(server) as sock:
        sock.sendall(sent)
        start = time.monotonic()
        assert read_response(sock)[0] == 408
        assert 0.25 < time.monotonic() - start < 3


def test_a_client_that_the_server_makes_wait_is_not_slow(make_server):
    """Its next body is half read when the server takes no more; only what it could send counts against its time."""
    affine = Affine((20_000,))
    server = make_server(affine, limits=FAST, max_queue_rows=1_000_000)
    body, fields = affine_binary(np.ones((20_000, 4)), np.arange(20_000))
    data = raw_request("POST", INFER, body, fields) * 40
    affine.gate.clear()
    with connect(server) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        time.sleep(1.5)
        affine.gate.set()
        buffer = bytearray()
        for _ in range(40):
            assert read_response(sock, buffer=buffer)[0] == 200
        sender.join()


def test_trickling_bytes_does_not_extend_the_deadline(make_server):
    server = make_server(Affine(), limits=FAST)
    with connect(server) as sock:
        start = time.monotonic()
        send_until_answered(sock, b"G", 5000)
        assert time.monotonic() - start < 5


def test_an_idle_connection_is_closed_and_a_waiting_one_is_not(make_server, affine):
    server = make_server(affine, limits=FAST)
    with connect(server) as sock:
        assert closed(sock)
    with connect(server) as sock:
        affine.gate.clear()
        sock.sendall(infer_bytes(1))
        time.sleep(1.5)
        affine.gate.set()
        check(read_response(sock))
        assert closed(sock)


def test_a_client_that_does_not_read_is_dropped(make_server):
    server = make_server(Affine((20_000,)), limits=Limits(write_timeout_s=0.3), max_queue_rows=100_000)
    body, fields = affine_binary(np.zeros((20_000, 4)), np.zeros(20_000))
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flood = raw_request("POST", INFER, body, fields) * 200
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            sock.sendall(flood)
    assert exchange(server, "GET", "/v2")[0] == 200


def test_a_client_that_goes_away_cancels_what_it_queued(server, affine):
    affine.gate.clear()
    affine.runs.clear()
    affine.running.clear()
    with connect(server) as first:
        first.sendall(infer_bytes(1))
        assert affine.running.wait(5)
        with connect(server) as gone:
            gone.sendall(infer_bytes(2) * 3)
            time.sleep(0.1)
        time.sleep(0.1)
        with connect(server) as stays:
            stays.sendall(infer_bytes(4))
            time.sleep(0.1)
            affine.gate.set()
            check(read_response(first), 1)
            check(read_response(stays), 4)
    assert len(affine.runs) == 2
    metrics = exchange(server, "GET", "/metrics")[2].decode()
    assert re.search(r'^lepton_inference_cancelled_total{model="affine",version="3"} 3\.0$', metrics, re.MULTILINE)


def test_a_client_that_ends_its_side_is_taken_to_have_gone(server, affine):
    """It cannot be told from one that gave up: what it asked is cancelled, and the connection closed."""
    affine.gate.clear()
    affine.running.clear()
    affine.seen.clear()
    with connect(server) as first, connect(server) as half:
        first.sendall(infer_bytes(1))
        assert affine.running.wait(5)
        half.sendall(infer_bytes(2))
        half.shutdown(socket.SHUT_WR)
        assert closed(half)
        affine.gate.set()
        check(read_response(first), 1)
        check(exchange(server, "POST", INFER, *affine_binary(X, [4])), 4)
    assert [n.max() for _, n in affine.seen] == [1, 4]
    assert counted(server).cancelled == 1


def test_what_was_answered_before_a_client_ended_its_side_still_leaves(make_server):
    """A large answer that it had not begun to read, and one to a request that was answered at once."""
    rows = 300_000
    server = make_server(Affine((rows,)), max_queue_rows=rows)
    body, fields = affine_binary(np.ones((rows, 4)), np.arange(rows))
    with connect(server) as half:
        half.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        half.sendall(raw_request("POST", INFER, body, fields))
        half.recv(1, socket.MSG_PEEK)
        half.shutdown(socket.SHUT_WR)
        status, headers, answer = read_response(half)
        assert status == 200
        np.testing.assert_array_equal(read_outputs(headers, answer)["twice"], 2 * np.arange(rows))
    with connect(server) as half:
        half.sendall(raw_request("GET", "/v2/health/live"))
        half.shutdown(socket.SHUT_WR)
        assert read_response(half)[0] == 200
        assert closed(half)


class Unread:
    """A transport whose client reads nothing: what is written stays, too little of it to make it say so."""

    aborted = False

    def get_extra_info(self, name):
        return ("127.0.0.1", 1)

    def write(self, data):
        pass

    def close(self):
        pass

    def can_write_eof(self):
        return True

    def abort(self):
        self.aborted = True


@pytest.mark.parametrize("end", ["by the answer", "by the client"])
def test_the_last_answer_may_be_left_unread_for_no_longer_than_others(end):
    state = ServerState(lambda exchange: exchange.answer(200, b"{}"), Limits(write_timeout_s=30))
    connection, transport = Connection(state), Unread()
    connection.connection_made(transport)
    fields = {"Connection": "close"} if end == "by the answer" else {}
    connection.data_received(raw_request("GET", "/v2", b"", fields))
    if end == "by the client":
        connection.eof_received()
    now = time.monotonic()
    connection.sweep(now + 29)
    assert not transport.aborted
    connection.sweep(now + 31)
    assert transport.aborted


def test_clients_that_vanish_at_any_point_leave_the_server_well(server):
    data = infer_bytes(1)
    for cut in range(0, len(data) + 1, 7):
        with connect(server) as sock:
            sock.sendall(data[:cut])
            if cut % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
    status, headers, body = exchange(server, "POST", INFER, affine_json(X, [1]))
    check((status, headers, body))
    assert len(server.metrics.codes) <= 3


def test_random_bytes_never_hurt(server):
    rng = random.Random(1)
    good = infer_bytes(1)
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with connect(server, timeout=0.5) as sock:
            sock.sendall(damaged)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(65536)
            assert not answer or answer.startswith(b"HTTP/1.1 ")
            assert b" 500 " not in answer[:16]
    check(exchange(server, "POST", INFER, affine_json(X, [1])))
