"""Health is answered whatever the limits say: an orchestrator must not end a server that only has much to do."""

import contextlib
import json
import re
import time

import pytest
from serve_fakes import Affine, affine_json, connect, exchange, raw_request, read_response

from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.http.reserve import RESERVED
from lepton_xla.serve.limits import Limits

INFER = "/v2/models/affine/infer"
BODY = affine_json([[0, 0, 0, 0]], [1])


def full(server, stack, count):
    """Opens connections until there are as many as there may be, and asks something on each."""
    for _ in range(count):
        sock = stack.enter_context(connect(server))
        sock.sendall(raw_request("GET", "/v2/health/live"))
        assert read_response(sock)[0] == 200


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
def test_beyond_the_limits_health_is_answered_and_nothing_else(make_server, limit):
    server = make_server(Affine(), limits=Limits(**{limit: 2}))
    with contextlib.ExitStack() as stack:
        full(server, stack, 2)
        for _ in range(2):  # the second time the heads are known
            for method in ("GET", "HEAD"):
                for path in ("/v2/health/live", "/v2/health/ready", "/v2/health/live?x=1"):
                    status, headers, body = exchange(server, method, path)
                    assert (status, headers["connection"], bool(body)) == (200, "close", method == "GET")
                status, headers, body = exchange(server, method, "/v2")
                assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
                if body:
                    assert "too many connections" in json.loads(body)["error"]
            assert exchange(server, "POST", INFER, BODY)[0] == 503
            assert exchange(server, "GET", "/v2/health/live", b"body")[0] == 503
            assert exchange(server, "GET", "/v2/health/live/../../v2")[0] == 503
    for _ in range(3):
        assert exchange(server, "POST", INFER, BODY)[0] == 200


def test_one_connection_more_is_one_request_more(make_server):
    server = make_server(Affine(), limits=Limits(max_connections=1))
    with contextlib.ExitStack() as stack:
        full(server, stack, 1)
        with connect(server) as sock:
            sock.sendall(raw_request("GET", "/v2/health/live") * 2)
            assert read_response(sock)[0] == 200
            assert sock.recv(1) == b""


def test_those_that_are_silent_make_room_for_the_next(make_server):
    server = make_server(Affine(), limits=Limits(max_connections=1))
    with contextlib.ExitStack() as stack:
        full(server, stack, 1)
        silent = [stack.enter_context(connect(server)) for _ in range(2 * RESERVED)]
        assert exchange(server, "GET", "/v2/health/live")[0] == 200
        assert read_response(silent[0])[0] == 503
        for each in silent[-RESERVED // 2 :]:
            each.sendall(raw_request("GET", "/v2/health/ready"))
            assert read_response(each)[0] == 200
    assert exchange(server, "GET", "/v2")[0] == 200


@pytest.mark.parametrize("asks", [b"", raw_request("GET", "/v2"), raw_request("GET", "/v2/health/live")])
def test_however_many_come_and_never_close_few_are_held(make_server, asks):
    """Else the process would run out of files, and could not accept whoever asks for health."""
    server = make_server(Affine(), limits=Limits(max_connections=1))
    with connect(server) as first, contextlib.ExitStack() as stack:
        flood = [stack.enter_context(connect(server)) for _ in range(4 * RESERVED)]
        for sock in flood:
            # Those that made room may be closed already.
            with contextlib.suppress(ConnectionError):
                sock.sendall(asks)
        assert exchange(server, "GET", "/v2/health/live")[0] == 200
        until = time.monotonic() + 1
        while open_now(first) > RESERVED + 1:
            assert time.monotonic() < until


def open_now(sock):
    sock.sendall(raw_request("GET", "/metrics"))
    return float(re.search(rb"^lepton_connections (.*)$", read_response(sock)[2], re.MULTILINE)[1])


def test_what_is_refused_takes_no_place(make_server):
    """One connection goes, and the next has its place, however many were refused meanwhile and still linger."""
    server = make_server(Affine(), limits=Limits(max_connections=2))
    with contextlib.ExitStack() as stack:
        full(server, stack, 1)
        with connect(server) as second:
            second.sendall(raw_request("GET", "/v2"))
            assert read_response(second)[0] == 200
            refused = [stack.enter_context(connect(server)) for _ in range(5)]
            for sock in refused:
                sock.sendall(raw_request("GET", "/v2"))
                assert read_response(sock)[0] == 503
        for _ in range(100):
            status = exchange(server, "GET", "/v2")[0]
            if status == 200:
                break
        assert status == 200


def test_no_other_limit_holds_for_health(make_server, affine, tmp_path):
    """Bodies that fill the server's memory, a token's rate."""
    secret = create_token(tmp_path / "tokens", "one", ["infer"], requests_per_s=0.01)
    limits = Limits(max_body_bytes=len(BODY), max_buffered_bytes=len(BODY))
    server = make_server(affine, limits=limits, token_file=tmp_path / "tokens")
    token = {"Authorization": f"Bearer {secret}"}
    affine.gate.clear()
    with connect(server) as sock:
        sock.sendall(raw_request("POST", INFER, BODY, token))
        affine.running.wait(5)
        assert exchange(server, "POST", INFER, BODY, token)[0] in (429, 503)
        for headers in ({}, token):
            assert exchange(server, "GET", "/v2/health/live", headers=headers)[0] == 200
            assert exchange(server, "GET", "/v2/health/ready", headers=headers)[0] == 200
        affine.gate.set()
        assert read_response(sock)[0] == 200
