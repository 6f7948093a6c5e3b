"""What broke in servers like this one, a test for each class. The names of the tests are the classes.

Classes that do not apply, and what shows it: files or models fetched from an address in a request (there is no such
route and no HTTP client in the server's process: `test_server_side_request_forgery`); forms, uploads and byte ranges
(none is parsed: `test_form_parsing`, `test_header_confusion`); sockets between processes that carry pickles (no module
here imports one: `test_pickle_reachable`); files that a load request brings (nothing is loaded over HTTP:
`test_model_name_traversal`, `test_open_management_port`).
"""

import ast
import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import re
import select
import socket
import time
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from serve_fakes import (
    Affine,
    Identity,
    affine_binary,
    affine_json,
    connect,
    exchange,
    raw_request,
    read_outputs,
    read_response,
)

import lepton_xla.serve
from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options, Server
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.observe.logs import JsonLines, PlainLines
from lepton_xla.serve.protocol.routes import ROUTES

INFER = "/v2/models/affine/infer"
X = np.ones((1, 4), np.float32)
SOURCES = sorted(Path(lepton_xla.serve.__file__).parent.rglob("*.py"))


def alive(server, headers=None):
    """Whether the server still gives right answers."""
    body, fields = affine_binary(X, [3])
    status, got, answer = exchange(server, "POST", INFER, body, fields | (headers or {}))
    assert status == 200, answer
    np.testing.assert_array_equal(read_outputs(got, answer)["y"], 2 * X + 3)


def refusal(server, method, path, body=b"", headers=None, statuses=range(400, 500)):
    """The error of a request that has to be refused as the client's own fault."""
    status, _, answer = exchange(server, method, path, body, headers)
    assert status in statuses, (status, answer)
    message = json.loads(answer)
    assert set(message) == {"error"}
    return message["error"]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_chunk_flood(make_server):
    """A million chunks of a byte each (CVE-2025-23310, CVE-2025-23311): refused early, and they take no memory."""
    server = make_server(Affine())
    flood = b"1\r\nx\r\n" * 1_000_000
    before = resident_bytes()
    for _ in range(3):
        with connect(server) as sock:
            sock.sendall(raw_request("POST", INFER, b"", {"Transfer-Encoding": "chunked"}))
            try:
                sock.sendall(flood)
            except (BrokenPipeError, ConnectionResetError):
                continue
            assert read_response(sock)[0] == 413
    assert resident_bytes() - before < 32 << 20
    alive(server)


def test_chunk_flood_within_the_limit_takes_its_bytes_and_not_fifty_times_as_many(make_server):
    """Connections that each hold an unfinished body of 60,000 chunks of one byte."""
    server = make_server(Affine(), limits=Limits(idle_timeout_s=60))
    piece = b"1\r\nx\r\n" * 60_000
    socks = [socket.create_connection(server.address, 10) for _ in range(20)]
    try:
        before = resident_bytes()
        for sock in socks:
            sock.sendall(raw_request("POST", INFER, b"", {"Transfer-Encoding": "chunked"}) + piece)
        time.sleep(0.5)
        alive(server)
        assert resident_bytes() - before < 20 << 20  # 1.2 MB of bodies; a list of chunks held 60 MB
    finally:
        for sock in socks:
            sock.close()


def test_error_text_leaks(make_server, caplog):
    """What fails inside says nothing of the inside (CVE-2025-23319, -23320, -23334): no path, no traceback."""
    server = make_server(Affine())
    message = refusal(server, "POST", INFER, affine_json(X, [-1]), statuses=[500])
    assert message == "inference failed"
    assert "/secret/path" in caplog.text  # the operator gets to know
    for body, headers in (
        (b"\xff\xfe", {}),
        (b"{" * 50, {}),
        (affine_json(X, [1]) + b"x", {}),
        (b"\x1f\x8bnonsense", {"Content-Encoding": "gzip"}),
        (affine_json(np.ones((1, 5)), [1]), {}),
    ):
        message = refusal(server, "POST", INFER, body, headers)
        assert not any(word in message for word in ("/", "Traceback", "lepton_xla", ".py", "0x", "msgspec"))
    alive(server)


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("parameters", [
    {"shared_memory_region": "triton_python_backend_shm_region_1", "shared_memory_byte_size": 16},
    {"shared_memory_region": "r", "shared_memory_byte_size": 2**63, "shared_memory_offset": 2**63},
    {"shared_memory_offset": -1},
])  # fmt: skip
def test_shared_memory(make_server, where, parameters):
    """Regions named by a client, their offsets and sizes (CVE-2024-0088, -0116, CVE-2025-23334): never looked at."""
    server = make_server(Affine())
    request = json.loads(affine_json(X, [1], outputs=[{"name": "y"}]))
    request[f"{where}s"][0]["parameters"] = parameters
    request["inputs"][0].pop("data") if where == "input" else None
    assert "shared memory" in refusal(server, "POST", INFER, json.dumps(request).encode(), statuses=[400, 501])
    for path in ("system", "cuda"):
        for route in ("status", "region/r/status", "region/r/register", "region/r/unregister", "unregister"):
            for method in ("GET", "POST"):
                body = b'{"key": "/psm", "offset": 0, "byte_size": 64}'
                refusal(server, method, f"/v2/{path}sharedmemory/{route}", body if method == "POST" else b"",
                        statuses=(404, 405, 400, 403, 501))  # fmt: skip
    alive(server)


NAMES = ["..", ".", "../affine", "a/../affine", "%2e%2e", "%2e%2e%2faffine", "..%2faffine", "%2fetc%2fpasswd",
         "affine%00", "affine%0a", "%20affine", "affine%20", "affine%2f", "affine/", "//affine", "./affine",
         "/etc/passwd", "affine/..",
         "affine%5c..", "..%5caffine", "C:%5c", "x" * 256, "x" * 4000, "%ff%fe", "%", "%zz", "affine;x", "%61ffine%2e",
         "aff%C4%B1ne", "AFFINE", "file:affine", "affine%e2%80%8b", ""]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_model_name_traversal(make_server, name):
    """Names that are paths (CVE-2023-31036, CVE-2026-24208, -24209): no model, and nothing of it in an error."""
    server = make_server(Affine())
    for action in ("", "/infer", "/config", "/ready", "/stats", "/versions/3/infer"):
        body = affine_json(X, [1]) if action.endswith("infer") else b""
        message = refusal(
            server, "POST" if body else "GET", f"/v2/models/{name}{action}", body, statuses=(400, 404, 405)
        )
        assert "etc" not in message
        assert message.isprintable()
    for action in ("load", "unload"):
        parameters = {"file:../../etc/x": "AAAA", "config": "{}"}
        body = json.dumps({"parameters": parameters}).encode()
        refusal(server, "POST", f"/v2/repository/models/{name}/{action}", body, statuses=(400, 403, 404, 405, 501))
    alive(server)


@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/v2/logging"), ("POST", "/v2/trace/setting"), ("POST", "/v2/models/affine/trace/setting"),
])  # fmt: skip
def test_settings_write_files(make_server, tmp_path, method, path):
    """Settings that name a file (CVE-2024-0087, -0095): there is none to set over HTTP."""
    server = make_server(Affine())
    target = tmp_path / "written"
    settings = {
        "log_file": str(target),
        "trace_file": str(target),
        "trace_level": ["TIMESTAMPS"],
        "log_verbose_level": 9,
    }
    refusal(server, method, path, json.dumps(settings).encode(), statuses=(400, 403, 404, 405, 501))
    alive(server)
    assert not target.exists()


EVIL = "\r\n2030-01-01 INFO forged \x1b[31mred\x1b[0m \x07\x9b2J\u2028\u202e"


@pytest.mark.parametrize("formatter", [JsonLines, PlainLines])
def test_log_injection(make_server, formatter):
    """Line ends and terminal sequences of a client (CVE-2024-0095, -0100) start no line and colour nothing."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter())
    logger = logging.getLogger("lepton_xla")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        server = make_server(Affine())
        quoted = "".join(f"%{byte:02x}" for byte in EVIL.encode())
        exchange(server, "GET", f"/v2/models/{quoted}")
        exchange(server, "GET", "/v2", headers={"User-Agent": "x\x1b[31m", "traceparent": "x\x1b[31m"})
        body = json.loads(affine_json(X, [-1], id=EVIL))
        exchange(server, "POST", INFER, json.dumps(body).encode())
        body["inputs"][0]["name"] = EVIL
        exchange(server, "POST", INFER, json.dumps(body).encode())
        logger.error("told: %s", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            logger.exception("raised")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = stream.getvalue().split("\n")
    assert any("told: " in line for line in lines)
    for line in lines:
        assert not line.startswith("2030-01-01 INFO forged")
        assert not set(line) & set("\r\x1b\x07\x9b\u2028\u202e"), line


def test_header_injection(make_server):
    """What a client sent comes back in no header of the answer that it could end a line in."""
    server = make_server(Affine())
    evil = "x%0d%0aSet-Cookie:%20a=b"
    for path in (f"/v2/models/{evil}", f"/v2/{evil}", f"/v2?{evil}"):
        _, headers, _ = exchange(server, "GET", path)
        assert "set-cookie" not in headers
    for value in ("a\x0bSet-Cookie: x", "00-" + "g" * 32 + "-0000000000000001-01", "\x85Set-Cookie: x"):
        _, headers, _ = exchange(server, "GET", "/v2", headers={"traceparent": value, "X-Request-Id": value})
        assert "set-cookie" not in headers
        assert value.strip() not in headers.values()


@pytest.fixture
def secret(tmp_path):
    """A token that is good for everything, in the file that `guarded` asks for."""
    return create_token(tmp_path / "tokens.jsonl", "all", ["infer", "read", "admin"])


@pytest.fixture
def guarded(make_server, tmp_path, secret):
    return make_server(Affine(), token_file=tmp_path / "tokens.jsonl")


ALIASES = [
    "/v2", "/v2/", "//v2", "/v2//", "/./v2", "/v2/.", "/%76%32", "/v2/models/affine", "/v2/models/affine/",
    "/v2/models//affine", "/v2/models/affine/infer", "/v2/models/affine/versions/3/infer", "/v2/models/%61ffine/infer",
    "/v2/models/affine/%69nfer", "/v2/models/affine/infer/", "/v2/models/affine/infer?x=/v2/health/live",
    "/v2/models/affine/infer#/v2/health/live", "/v2/models/affine/infer;/v2/health/live", "/v2/health/live/../models",
    "/v2/health/live/", "/v2/health/%6cive", "/v2/health%2flive", "/v2/health/live%00", "/v2/health", "/v2/health/",
    "/v2/health/LIVE", "/v2/HEALTH/live", "/v2/health/live/x", "/metrics", "/metrics/", "/%6detrics", "//metrics",
    "http://test/v2/health/live", "http://test/v2", "http://test/metrics", "*", "/invocations", "/ping", "/predict",
    "/v1/models/affine:predict", "/v2/repository/index", "/v2/openapi.json", "/openapi.json", "/v2/logging",
    "/v2/repository/models/affine/unload", "/v2/models/stats", "/health", "/v2/../v2/models/affine", "\\v2",
]  # fmt: skip


@pytest.mark.parametrize("path", ALIASES)
def test_authentication_bypass_by_another_route(guarded, secret, path):
    """Other spellings and other names of routes (CVE-2026-24207): all behind the token, which a token shows to work."""
    for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        for headers in ({}, {"X-Original-URL": "/v2/health/live", "X-Rewrite-URL": "/v2/health/live"}):
            body = affine_json(X, [1]) if method == "POST" else b""
            status, _, answer = exchange(guarded, method, path, body, headers)
            # What is no HTTP at all is refused as that.
            assert status == 401 or (status == 400 and (b"malformed HTTP" in answer or method == "HEAD"))
    assert exchange(guarded, "GET", "/v2/health/live")[0] == 200
    alive(guarded, {"Authorization": f"Bearer {secret}"})


def test_authentication_bypass_by_method(guarded):
    """A method that is not allowed on an open path shows nothing but that."""
    for method in ("POST", "PUT", "DELETE", "CONNECT"):
        assert exchange(guarded, method, "/v2/health/live")[0] in (400, 401, 405, 501)


def test_authentication_bypass_by_a_remembered_head(guarded, secret):
    """The head of a request that was let in is remembered with its token, and serves no other."""
    body, fields = affine_binary(X, [1])
    with_token = raw_request("POST", INFER, body, fields | {"Authorization": f"Bearer {secret}"})
    without = raw_request("POST", INFER, body, fields)
    with connect(guarded) as sock:
        for _ in range(3):
            sock.sendall(with_token)
            assert read_response(sock)[0] == 200
        sock.sendall(with_token + without)
        buffer = bytearray()
        assert read_response(sock, buffer=buffer)[0] == 200
        assert read_response(sock, buffer=buffer)[0] == 401


def test_secrets_in_logs(make_server, tmp_path, caplog):
    """A token appears in no log line, error, metric or answer, whatever is done with it."""
    file = tmp_path / "tokens.jsonl"
    secret = create_token(file, "all", ["infer", "read", "admin"], requests_per_s=1000, burst=10)
    limited = create_token(file, "limited", ["infer"], requests_per_s=0.001)
    wrong = "leptonx_" + "w" * 43
    seen = []
    with caplog.at_level(logging.DEBUG):
        server = make_server(Affine(), token_file=file)
        for token in (secret, limited, wrong):
            given = {"Authorization": f"Bearer {token}"}
            for method, path, body, headers in (
                ("GET", "/v2", b"", given),
                ("GET", "/metrics", b"", given),
                ("GET", "/nothing", b"", given),
                ("PUT", "/v2", b"", given),
                ("POST", INFER, affine_json(X, [1]), given),
                ("POST", INFER, affine_json(X, [1]), given),
                ("POST", INFER, affine_json(X, [-1]), given),
                ("POST", INFER, b"{", given),
                ("GET", "/v2", b"", {"Authorization": f"Basic {token}"}),
                ("GET", "/v2", b"", {"Authorization": f"Bearer {token}", "Bad Header": "x"}),
            ):
                seen.append(str(exchange(server, method, path, body, headers)))
        file.write_text("{}")
        time.sleep(1.2)
        seen.append(str(exchange(server, "GET", "/metrics", headers={"Authorization": f"Bearer {secret}"})))
    assert "poisoned" in caplog.text
    assert "stays in use" in caplog.text
    for text in (*seen, caplog.text):
        for token in (secret, limited, wrong):
            assert token not in text
            assert hashlib.sha256(token.encode()).hexdigest() not in text


def test_secret_comparison():
    """Digests are compared by `hmac.compare_digest`; nothing compares a secret or a digest with `==` or `in`."""
    path = Path(lepton_xla.serve.__file__).parent / "access" / "auth.py"
    tree = ast.parse(path.read_text())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest(grant.digest, digest)" in calls
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node)
            assert not any(word in text for word in ("digest", "secret", "match", "given")) or text.endswith("is None")


def test_access_control_fails_open(make_server, tmp_path, secret):
    """No identity, an empty one, one without a scope, an empty file: no access (Sax let `principal=None` in)."""
    file = tmp_path / "tokens.jsonl"
    for content in ("", "\n\n"):
        file.write_text(content)
        server = make_server(Affine(), token_file=file)
        for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {secret}"}):
            for path in ("/v2", "/metrics", "/v2/models/affine", "/nothing"):
                assert exchange(server, "GET", path, headers=headers)[0] == 401
            assert exchange(server, "POST", INFER, affine_json(X, [1]), headers)[0] == 401


def test_json_depth(make_server):
    server = make_server(Affine())
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")):
        for depth in (101, 5000, 200_000):
            for end in (closing * depth, b""):
                assert refusal(server, "POST", INFER, opening * depth + end)
                assert refusal(server, "POST", INFER, b'{"inputs": ' + opening * depth + end + b"}")
    alive(server)


def one_input(**changes):
    """A JSON request whose input x is changed."""
    request = json.loads(affine_json(X, [1]))
    request["inputs"][0] |= changes
    return json.dumps(request).encode()


@pytest.mark.parametrize("shape", [
    [2**31, 4], [2**32, 4], [2**62, 4], [2**63, 4], [2**64, 4], [2**65, 4], [2**32, 2**32], [10**400, 4],
    [4, 2**64 // 4], [1] * 10_000, [], [0, 4], [1, 0], [1], [4], [1, 4, 1],
])  # fmt: skip
def test_shape_overflow(make_server, shape):
    """Products that wrap around in 32 or 64 bits (CVE-2024-53880 and its kind)."""
    server = make_server(Affine())
    assert refusal(server, "POST", INFER, one_input(shape=shape))
    body = json.loads(one_input(shape=shape, parameters={"binary_data_size": 16}))
    body["inputs"][0].pop("data")
    head = json.dumps(body).encode()
    fields = {"Inference-Header-Content-Length": str(len(head))}
    assert refusal(server, "POST", INFER, head + bytes(16), fields)
    alive(server)


@pytest.mark.parametrize("shape", [[-1, 4], [-1, -4], [1, -4], [-(2**63), 4], [-(2**70), -4]])
def test_negative_dimensions(make_server, shape):
    assert "no size" in refusal(make_server(Affine()), "POST", INFER, one_input(shape=shape))


@pytest.mark.parametrize(
    "shape", [[1.0, 4], ["1", 4], [True, 4], [None, 4], [1.5, 4], [[1], 4], {"0": 1}, "14", 4, None, [1e30, 4]]
)
def test_dimensions_that_are_no_numbers(make_server, shape):
    assert "shape" in refusal(make_server(Affine()), "POST", INFER, one_input(shape=shape), statuses=(400,))


@pytest.mark.parametrize(("dtype", "values"), [
    ("int8", [128]), ("int8", [-129]), ("uint8", [-1]), ("uint8", [256]), ("int32", [2**31]), ("int32", [2**63]),
    ("uint32", [-1]), ("int64", [2**63]), ("uint64", [2**64]), ("uint64", [-1]), ("int64", [10**400]), ("int32", [1.5]),
    ("int32", [True]), ("int32", ["1"]), ("float32", [1e39]), ("float32", ["NaN"]), ("bool", [2]), ("int32", [1e10]),
])  # fmt: skip
def test_integer_truncation(make_server, dtype, values):
    """A number that does not fit its type is refused, never cut to what fits."""
    from lepton_xla.serve.protocol.datatypes import datatype_of

    server = make_server(Identity(dtype, ("batch",)))
    given = {"name": "x", "datatype": datatype_of(dtype).name, "shape": [1], "data": values}
    body = json.dumps({"inputs": [given]}).encode()
    assert refusal(server, "POST", "/v2/models/identity/infer", body)


@pytest.mark.parametrize("size", [-1, 0, 15, 17, 2**31, 2**32 + 16, 2**63, 2**64 + 16, 16.0, "16", True, None, [16]])
def test_binary_sizes(make_server, size):
    server = make_server(Affine())
    body, fields = affine_binary(X, [1])
    head = json.loads(body[: int(fields["Inference-Header-Content-Length"])])
    head["inputs"][1]["parameters"]["binary_data_size"] = size
    text = json.dumps(head).encode()
    tail = body[int(fields["Inference-Header-Content-Length"]) :]
    assert refusal(server, "POST", INFER, text + tail, {"Inference-Header-Content-Length": str(len(text))})
    alive(server)


def test_duplicate_tensors(make_server):
    server = make_server(Affine())
    assert "twice" in refusal(server, "POST", INFER, affine_json(X, [1], outputs=[{"name": "y"}, {"name": "y"}]))
    request = json.loads(affine_json(X, [1]))
    request["inputs"].append(request["inputs"][0])
    assert "twice" in refusal(server, "POST", INFER, json.dumps(request).encode())
    request["inputs"] = request["inputs"] * 10_000
    assert refusal(server, "POST", INFER, json.dumps(request).encode())


@pytest.mark.parametrize("length", ["99999999999", "99999999999999999999999", "-1", "+5", "0x10", "1e3", "5 5", "", "٣",
                                    "5,5", "007777777777", "1_0"])  # fmt: skip
def test_header_length(make_server, length):
    server = make_server(Affine())
    body, _ = affine_binary(X, [1])
    headers = {"Inference-Header-Content-Length": length.encode().decode("latin-1")}
    assert refusal(server, "POST", INFER, body, headers)
    alive(server)


def test_decompression_bomb(make_server):
    """Four kilobytes that become four megabytes, and a bomb within a bomb: never inflated past the limit."""
    server = make_server(Affine(), limits=Limits(max_body_bytes=1 << 20, max_buffered_bytes=1 << 24))
    before = resident_bytes()
    bomb = gzip.compress(bytes(64 << 20), 9)
    assert len(bomb) < 1 << 20
    many = gzip.compress(bytes(1 << 19)) * 50
    for body, coding in ((bomb, "gzip"), (zlib.compress(bytes(64 << 20), 9), "deflate"), (many, "gzip")):
        assert "exceeds" in refusal(server, "POST", INFER, body, {"Content-Encoding": coding}, statuses=[413])
    assert refusal(server, "POST", INFER, gzip.compress(bomb), {"Content-Encoding": "gzip, gzip"}, statuses=[415])
    assert resident_bytes() - before < 200 << 20  # the bombs themselves are made here
    alive(server)


def test_huge_payload(make_server):
    """CVE-2025-33201: bodies too large by themselves, declared or not, or too large together, are not taken in."""
    limits = Limits(max_body_bytes=1 << 20, max_buffered_bytes=4 << 20)
    server = make_server(Affine(), limits=limits)
    before = resident_bytes()
    for fields in ({"Content-Length": str(1 << 50)}, {"Transfer-Encoding": "chunked"}):
        with connect(server) as sock:
            sock.sendall(raw_request("POST", INFER, b"", fields))
            with contextlib.suppress(ConnectionError):
                for _ in range(64):
                    sock.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            assert read_response(sock)[0] == 413
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(8)]
        for sock in held:  # all but the last byte
            sock.sendall(raw_request("POST", INFER, b"", {"Content-Length": str(1 << 20)}))
            with contextlib.suppress(ConnectionError):
                sock.sendall(bytes((1 << 20) - 1))
        for _ in range(4):
            (sock, *_), _, _ = select.select(held, [], [], 10)
            assert read_response(sock)[0] == 503
            held.remove(sock)
        for sock in held:
            sock.sendall(b"x")
            assert read_response(sock)[0] == 400
    assert resident_bytes() - before < 64 << 20
    alive(server)


def test_empty_gzip_members_do_not_keep_the_loop_busy(make_server):
    """Members that inflate to nothing: each one's end was found by copying all the rest."""
    server = make_server(Affine())
    body = gzip.compress(b"") * 200_000
    start = time.monotonic()
    assert refusal(server, "POST", INFER, body, {"Content-Encoding": "gzip"})
    assert time.monotonic() - start < 2


def test_pickle_reachable():
    """No pickle by content type or socket (CVE-2025-27520, CVE-2025-32375, CVE-2024-50050): none is imported."""
    unsafe = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg", "yaml"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "compile", "__import__", "np.load", "numpy.load")
            assert not unsafe & {name.partition(".")[0] for name in names}, path


def unpickled(mark, request):
    """What a pickle runs when it is loaded; what comes of it would be a good request."""
    Path(mark).touch()
    return request


@pytest.mark.parametrize("kind", ["vnd.bentoml+pickle", "x-pickle", "python-pickle", "octet-stream", "json"])
def test_pickles_are_refused(make_server, tmp_path, kind):
    class Evil:
        def __reduce__(self):
            return unpickled, (str(tmp_path / "mark"), json.loads(affine_json(X, [3])))

    body = pickle.dumps(Evil())
    refusal(make_server(Affine()), "POST", INFER, body, {"Content-Type": f"application/{kind}"})
    assert not (tmp_path / "mark").exists()
    assert pickle.loads(body)["inputs"], "it does what it is made for"
    assert (tmp_path / "mark").exists()


def test_server_side_request_forgery():
    """Nothing that answers requests can make one: no module of the server's side imports an HTTP client.

    But the one that sends alerts, to URLs of the file of rules alone.
    """
    clients = {"http.client", "urllib.request", "httpx", "requests", "aiohttp", "ftplib", "smtplib"}
    from lepton_xla.serve import server

    seen, todo = set(), ["lepton_xla.serve.server"]
    folder = Path(server.__file__).parents[1]
    while todo:
        module = todo.pop()
        path = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                continue
            sends_alerts = module == "lepton_xla.serve.monitor.webhooks"
            assert sends_alerts or not clients & set(found), (module, found)
            todo += [name for name in found if name.startswith("lepton_xla.serve")]
    assert "lepton_xla.serve.http.connection" in seen


def test_open_management_port(make_server):
    """One port, which only this machine can reach by default, and nothing on it that loads or sets anything."""

    def listening():
        return {each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}

    before = listening()
    server = make_server(Affine())
    assert listening() - before == {server.address}
    assert server.address[0] == "127.0.0.1"
    with pytest.raises(ServeError, match="--insecure-public"):
        Server(Affine(), Options(host="0.0.0.0", port=0))
    for route in ROUTES:
        if route.scope == "admin":
            for path in route.paths:
                refusal(server, route.method, re.sub("{.*?}", "affine", path), b"{}", statuses=(405, 501))


@pytest.mark.parametrize("headers", [
    {"Range": "bytes=" + ",".join(f"{n}-" for n in range(2000))},
    {"Range": "bytes=0-0"},
    {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/evil"},
], ids=["ranges", "range", "host"])  # fmt: skip
def test_header_confusion(make_server, headers):
    """Ranges (CVE-2025-62727) and hosts (CVE-2026-54282) of a request change nothing in its answer."""
    server = make_server(Affine())
    for path in ("/v2", "/v2/openapi.json", "/v2/models/affine"):
        plain = exchange(server, "GET", path)
        assert exchange(server, "GET", path, headers=headers) == plain
        assert b"evil" not in plain[2]


def test_form_parsing(make_server):
    """Forms and uploads (CVE-2024-47874, CVE-2025-54121) are not parsed: what would be a good request is refused."""
    server = make_server(Affine())
    inputs = json.dumps(json.loads(affine_json(X, [3]))["inputs"]).encode()
    part = b'--x\r\nContent-Disposition: form-data; name="inputs"%s\r\n\r\n%s\r\n--x--\r\n'
    for name in (b"", b'; filename="inputs.json"\r\nContent-Type: application/json'):
        refusal(server, "POST", INFER, part % (name, inputs), {"Content-Type": "multipart/form-data; boundary=x"})
    for form in (urllib.parse.urlencode({"inputs": inputs}), urllib.parse.urlencode({"": affine_json(X, [3])})):
        refusal(server, "POST", INFER, form.encode(), {"Content-Type": "application/x-www-form-urlencoded"})
    alive(server)


HOST = b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: a\r\n"
HIDDEN = b"GET /v2/hidden HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("head", [
    HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    HOST + b"Content-Length: 0\r\nContent-Length: 39\r\n\r\n",
    HOST + b"Content-Length: 0, 39\r\n\r\n",
    HOST + b"Content-Length: 0\r\ncontent-length: 0\r\n\r\n",
    HOST + b"Content-Length: +0\r\n\r\n",
    HOST + b"Content-Length: 0x0\r\n\r\n",
    HOST + b"Content-Length: \r\n\r\n",
    HOST + b"Content-Length : 0\r\n\r\n",
    HOST + b" Content-Length: 0\r\n\r\n",
    HOST + b"Content-Length: 18446744073709551616\r\n\r\n",
    HOST + b"Content-Length: 0\n\r\n",
    HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding: identity\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    HOST + b"X: y\r\n folded: z\r\n\r\n",
    HOST + b"X: y\rTransfer-Encoding: chunked\r\n\r\n",
    HOST + b"X: y\x00\r\n\r\n",
    HOST + b"X\x00: y\r\n\r\n",
    HOST + b": y\r\n\r\n",
    HOST + b"X y\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n-0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n 0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n0\n\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n1;a\nb\r\nx\r\n0\r\n\r\n",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n",
    HOST.replace(b"\r\n", b"\n") + b"\n",
    HOST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v2 HTTP/1.1 \r\nHost: a\r\n\r\n",
    b"POST /v2\tHTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\n Host: a\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"POST /v2 HTTP/2.0\r\nHost: a\r\n\r\n",
    b"POST /v2\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
], ids=repr)  # fmt: skip
def test_request_smuggling(make_server, head):
    """Framing that two readers could understand in two ways: what follows is never answered as a request of its own."""
    server = make_server(Affine())
    with connect(server) as sock:
        sock.sendall(head + HIDDEN)
        data = b""
        while part := sock.recv(65536):
            data += part
    assert data.count(b"HTTP/1.1 ") == 1, data
    if b"Connection: close" not in head:
        assert data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501", b"HTTP/1.1 505")), data
    assert b"hidden" not in data
    assert b"no such route" not in data
    alive(server)


FAST = Limits(head_timeout_s=0.3, body_timeout_s=0.3, idle_timeout_s=0.3, write_timeout_s=0.3)


@pytest.mark.parametrize("begin", [
    b"", b"GET /v2 HTTP/1.1\r\n", b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: ",
    HOST + b"Content-Length: 1000\r\n\r\n", HOST + b"Transfer-Encoding: chunked\r\n\r\n",
], ids=["request line", "header name", "header value", "body", "chunks"])  # fmt: skip
def test_slowloris(make_server, begin):
    """A byte now and then keeps no connection: the deadline is that of the whole, not of the byte."""
    server = make_server(Affine(), limits=FAST)
    drip = b"1\r\nx\r\n" if b"chunked" in begin else b"a"
    with connect(server) as sock:
        start = time.monotonic()
        sock.sendall(begin)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 6:
                time.sleep(0.02)
                sock.sendall(drip)
        assert time.monotonic() - start < 5
    alive(server)


def test_slowloris_by_unread_answers(make_server):
    """A client that asks and never reads is dropped, and holds no answers for longer than that."""
    server = make_server(Affine((20_000,)), limits=FAST, max_queue_rows=100_000)
    body, fields = affine_binary(np.zeros((20_000, 4)), np.zeros(20_000))
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(ConnectionError):
            sock.sendall(raw_request("POST", INFER, body, fields) * 200)
    alive(server)


def test_idle_connections(make_server):
    server = make_server(Affine(), limits=FAST)
    socks = [socket.create_connection(server.address, 10) for _ in range(50)]
    for sock in socks:
        assert sock.recv(1) == b""
        sock.close()
    alive(server)
