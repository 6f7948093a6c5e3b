"""Requests that are watched: the access log, and what it costs where there is none."""

import logging
import threading
import time

import numpy as np
import pytest
from serve_fakes import affine_binary, affine_json, connect, exchange, raw_request, read_response

from lepton_xla.errors import ServeError
from lepton_xla.serve import Options

INFER = "/v2/models/affine/infer"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def lines(caplog):
    """The fields of the access log's lines so far."""
    caplog.set_level(logging.INFO, "lepton_xla.serve.access")
    return lambda: [each.fields for each in caplog.records if each.name == "lepton_xla.serve.access"]


def test_a_line_says_what_was_asked_and_answered(make_server, affine, lines):
    server = make_server(affine, access_log_sample=1.0, max_delay_us=200_000)
    body, fields = affine_binary(np.ones((3, 4)), [1] * 3, id="mine")
    threads = [
        threading.Thread(target=exchange, args=(server, "POST", INFER, body, fields | {"traceparent": TRACE}))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    first, second = lines()
    for line in (first, second):
        assert line.items() >= {
            "method": "POST", "route": "/v2/models/{model}/infer", "status": 200, "request_bytes": len(body),
            "rows": 3, "batch_rows": 6, "batch_size": 8, "request_id": "mine", "trace_id": TRACE[3:35],
        }.items()  # fmt: skip
        assert line["answer_bytes"] > 3 * 5 * 4
        assert 0 < line["queue_ms"] + line["compute_ms"] <= line["ms"] + 0.002
        assert line["compute_ms"] > 0
    assert first["queue_ms"] >= 190


def test_other_routes_and_errors_are_logged_by_their_template(make_server, affine, lines):
    server = make_server(affine, access_log_sample=1.0)
    for method, path, body in (
        ("GET", "/v2/health/live", b""),
        ("GET", "/v2/models/affine/versions/3/config?secret=1", b""),
        ("GET", "/v2/models/other", b""),
        ("POST", INFER, b"{"),
        ("POST", INFER, affine_json(np.ones((1, 4)), [-1], id="poison")),
        ("GET", "/etc/passwd", b""),
        ("POST", "/v2/health/live", b""),
    ):
        exchange(server, method, path, body)
    assert [(line["method"], line["route"], line["status"], line.get("request_id")) for line in lines()] == [
        ("GET", "/v2/health/live", 200, None),
        ("GET", "/v2/models/{model}/versions/{version}/config", 200, None),
        ("GET", "/v2/models/{model}", 404, None),
        ("POST", "/v2/models/{model}/infer", 400, None),
        ("POST", "/v2/models/{model}/infer", 500, "poison"),
        ("GET", "none", 404, None),
        ("POST", "none", 405, None),
    ]


def test_a_client_that_goes_away_has_a_line_too(make_server, affine, lines):
    server = make_server(affine, access_log_sample=1.0)
    affine.gate.clear()
    affine.running.clear()
    with connect(server) as sock:
        sock.sendall(raw_request("POST", INFER, *affine_binary(np.ones((1, 4)), [1])))
        assert affine.running.wait(5)
    deadline = time.monotonic() + 5
    while not lines():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    affine.gate.set()
    (line,) = lines()
    assert (line["status"], line["rows"]) == (499, 1)


def test_a_share_is_logged(make_server, affine, lines):
    server = make_server(affine, access_log_sample=0.25)
    with connect(server) as sock:
        sock.sendall(raw_request("GET", "/v2/health/live") * 1000)
        buffer = bytearray()
        for _ in range(1000):
            assert read_response(sock, buffer=buffer)[0] == 200
    # Five standard deviations of a binomial.
    assert abs(len(lines()) - 250) < 5 * (1000 * 0.25 * 0.75) ** 0.5


def test_pipelined_answers_keep_their_order_when_some_are_watched(make_server, affine):
    server = make_server(affine, access_log_sample=0.5)
    with connect(server) as sock:
        sock.sendall(b"".join(raw_request("POST", INFER, *affine_binary(np.ones((1, 4)), [n])) for n in range(50)))
        buffer = bytearray()
        for n in range(50):
            _, headers, body = read_response(sock, buffer=buffer)
            y = np.frombuffer(body[int(headers["inference-header-content-length"]) :], "<f4")[0]
            assert y == 2 + n


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ServeError, match="access_log_sample"):
        Options(access_log_sample=share)
