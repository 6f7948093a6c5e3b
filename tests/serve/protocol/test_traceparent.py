"""Header fields that are new on every request: where they go, and that they cost nobody else anything."""

import json
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import affine_binary, connect, exchange, raw_request, read_response

from lepton_xla.serve.protocol.traceparent import take_out, valid

# The examples of the standard's section 3.2.
GOOD = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
HEAD = b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: a\r\nAccept: */*"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (GOOD, GOOD),
        (b"  " + GOOD + b" ", GOOD),
        (GOOD[:-1] + b"0", GOOD[:-1] + b"0"),
        (b"cc" + GOOD[2:], GOOD),
        (b"cc" + GOOD[2:] + b"-what-the-future-will-be-like", GOOD),
        (b"cc" + GOOD[2:] + b".what", None),
        (b"ff" + GOOD[2:], None),
        (GOOD + b"-x", None),
        (GOOD.upper(), None),
        (b"00-" + b"0" * 32 + GOOD[35:], None),
        (GOOD[:36] + b"0" * 16 + GOOD[52:], None),
        (GOOD[:-1], None),
        (GOOD.replace(b"-", b"_"), None),
        (b"", None),
    ],
)
def test_what_is_a_traceparent(value, expected):
    assert valid(value) == expected


fresh = st.sampled_from([b"tracestate: a=1,b=2", b"X-Request-Id: 42", b"b3: 0", b"X-B3-TraceId: 463ac35c9f6413ad"])
stays = st.sampled_from([b"Host: a", b"Accept: */*", b"X-Trace: 1", b"traceparents: 1", b"Content-Length: 0"])


@given(st.lists(st.tuples(st.booleans(), fresh, stays), min_size=1, max_size=8), st.booleans(), st.randoms())
def test_a_head_is_left_as_it_would_be_without_those_lines(lines, traced, random):
    kept = [line for is_fresh, _, line in lines if not is_fresh]
    given_lines = [one if is_fresh else other for is_fresh, one, other in lines]
    if traced:
        name = random.choice([b"traceparent: ", b"Traceparent:", b"TRACEPARENT:  "])
        given_lines.insert(random.randrange(len(given_lines) + 1), name + GOOD)
    taken = take_out(b"\r\n".join((b"GET / HTTP/1.1", *given_lines)))
    if len(kept) == len(given_lines):
        assert taken is None
    else:
        assert taken == (b"\r\n".join((b"GET / HTTP/1.1", *kept)), GOOD if traced else None)


@pytest.mark.parametrize(
    "line",
    [
        b"traceparent: " + GOOD + b"\r\n folded",
        b"traceparent: " + GOOD + b"\r\n\tfolded",
        b"traceparent: a\x00b",
        b"traceparent : " + GOOD,
        b"traceparent: \xff",
        b"x-b3-\xff: 1",
    ],
)
def test_a_line_that_the_parser_should_judge_stays(line):
    assert take_out(HEAD + b"\r\n" + line) is None


def test_given_twice_is_as_if_not_given():
    line = b"\r\ntraceparent: " + GOOD
    assert take_out(HEAD + line + line) == (HEAD, None)


def test_the_request_line_is_never_taken():
    assert take_out(b"\r\ntraceparent: " + GOOD) is None
    assert take_out(b"GET /traceparent: HTTP/1.1\r\nHost: a") is None


def trace(number):
    return f"00-{number + 1:032x}-{number + 1:016x}-01"


def test_it_goes_back_with_every_kind_of_answer(server):
    body, fields = affine_binary(np.ones((1, 4)), [1])
    bad = fields | {"Inference-Header-Content-Length": "5"}
    for method, path, payload, headers, status in (
        ("POST", "/v2/models/affine/infer", body, fields, 200),
        ("POST", "/v2/models/affine/infer", body, bad, 400),
        ("GET", "/v2/health/live", b"", {}, 200),
        ("GET", "/nowhere", b"", {}, 404),
    ):
        for number in range(3):
            for extra in ({"traceparent": trace(number)}, {"Traceparent": trace(number), "tracestate": f"a={number}"}):
                got, answer, _ = exchange(server, method, path, payload, headers | extra)
                assert (got, answer["traceparent"]) == (status, trace(number))
        for extra in ({}, {"traceparent": "nonsense"}, {"X-Request-Id": "5"}):
            got, answer, _ = exchange(server, method, path, payload, headers | extra)
            assert got == status
            assert "traceparent" not in answer


def test_pipelined_and_split_requests_keep_their_own(server):
    with connect(server) as sock:
        requests = [
            raw_request("GET", "/v2/health/live", headers={"traceparent": trace(n)} if n % 2 == 0 else {})
            for n in range(6)
        ]
        sock.sendall(b"".join(requests))
        rest = bytearray()
        answers = [read_response(sock, buffer=rest)[1].get("traceparent") for _ in requests]
        assert answers == [trace(n) if n % 2 == 0 else None for n in range(6)]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body, fields = affine_binary(np.ones((1, 4)), [1])
        request = raw_request("POST", "/v2/models/affine/infer", body, fields | {"traceparent": trace(7)})
        for cut in (20, 90, 150, len(request) - len(body), len(request) - 3):
            sock.sendall(request[:cut])
            sock.sendall(request[cut:])
            status, headers, _ = read_response(sock, buffer=rest)
            assert (status, headers["traceparent"]) == (200, trace(7))


def test_a_large_head_has_it_too(server):
    headers = {"X-Long": "a" * 5000, "traceparent": trace(1)}
    assert exchange(server, "GET", "/v2", headers=headers)[1]["traceparent"] == trace(1)


def test_heads_that_differ_in_those_fields_only_are_one_head(make_server, affine, monkeypatch):
    """Else each of them would be parsed anew, and push the heads of other clients out of the cache."""
    from lepton_xla.serve.http import connection as http

    hubs = []
    original = http.Connection.__init__

    def spy(self, state):
        hubs.append(state)
        original(self, state)

    monkeypatch.setattr(http.Connection, "__init__", spy)
    server = make_server(affine)
    body, fields = affine_binary(np.ones((1, 4)), [1])
    with connect(server) as sock:
        for number in range(600):
            extra = {"traceparent": trace(number), "X-Request-Id": str(number), "tracestate": f"v={number}"}
            sock.sendall(raw_request("POST", "/v2/models/affine/infer", body, fields | extra))
            status, headers, _ = read_response(sock)
            assert (status, headers["traceparent"]) == (200, trace(number))
        sock.sendall(raw_request("POST", "/v2/models/affine/infer", body, fields))
        assert read_response(sock)[0] == 200
    assert len(hubs[0].heads) == 1


def test_the_id_of_a_request_is_echoed(server):
    for name in ("a", "é", "x" * 300, '"\\'):
        body, fields = affine_binary(np.ones((1, 4)), [1], id=name)
        _, headers, answer = exchange(server, "POST", "/v2/models/affine/infer", body, fields)
        assert json.loads(answer[: int(headers["inference-header-content-length"])])["id"] == name
