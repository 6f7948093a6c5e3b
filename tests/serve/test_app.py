"""Routes, statuses and the way of an infer request through a running server."""

import gzip
import json
import threading
import zlib

import numpy as np
import pytest
from serve_fakes import (
    Affine,
    Identity,
    Tokens,
    affine_binary,
    affine_json,
    connect,
    counted,
    exchange,
    raw_request,
    read_outputs,
    read_response,
    wait_rows,
)

from lepton_xla.program import TensorSpec
from lepton_xla.serve.app.app import InferCall
from lepton_xla.serve.protocol.wire import Decoder

INFER = "/v2/models/affine/infer"


def get(server, path):
    status, headers, body = exchange(server, "GET", path)
    assert headers["content-type"] == "application/json"
    return status, json.loads(body)


def affine_reference(x, n):
    return {"y": 2 * x + n[:, None].astype(np.float32), "twice": 2 * n}


def check(server, x, n, **extra):
    x, n = np.asarray(x, np.float32), np.asarray(n, np.int32)
    body, fields = affine_binary(x, n)
    status, headers, answer = exchange(server, "POST", INFER, body, fields | extra)
    assert status == 200, answer
    outputs = read_outputs(headers, answer)
    for name, expected in affine_reference(x, n).items():
        np.testing.assert_array_equal(outputs[name], expected)


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2?x=1"])
def test_server_metadata(server, path):
    status, body = get(server, path)
    assert status == 200
    assert body["name"] == "lepton_xla"
    assert "binary_tensor_data" in body["extensions"]


def test_health(server):
    assert get(server, "/v2/health/live") == (200, {"live": True})
    assert get(server, "/v2/health/ready") == (200, {"ready": True, "live": True})
    assert get(server, "/v2/models/affine/ready") == (200, {"name": "affine", "ready": True})
    assert get(server, "/v2/models/affine/versions/3/ready")[0] == 200


@pytest.mark.parametrize("path", ["/v2/models/affine", "/v2/models/affine/versions/3", "/v2/models/%61ffine"])
def test_model_metadata(server, path):
    status, body = get(server, path)
    assert status == 200
    assert body["versions"] == ["3"]
    assert body["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "n", "datatype": "INT32", "shape": [-1]},
    ]
    assert body["outputs"][0] == {"name": "y", "datatype": "FP32", "shape": [-1, 4]}


def test_model_config(server):
    status, body = get(server, "/v2/models/affine/config")
    assert status == 200
    assert body["max_batch_size"] == 8
    assert body["input"][0] == {"name": "x", "data_type": "TYPE_FP32", "dims": [4], "format": "FORMAT_NONE"}
    assert body["output"][1] == {"name": "twice", "data_type": "TYPE_INT32", "dims": []}
    assert body["version_policy"] == {"specific": {"versions": ["3"]}}
    assert body["dynamic_batching"] == {"preferred_batch_size": [1, 4, 8], "max_queue_delay_microseconds": 0}


def test_statistics_count_rows_and_executions(server):
    check(server, np.ones((3, 4)), [1, 2, 3])
    check(server, np.ones((1, 4)), [1])
    for path in ("/v2/models/affine/stats", "/v2/models/stats", "/v2/models/affine/versions/3/stats"):
        (stats,) = get(server, path)[1]["model_stats"]
        assert (stats["name"], stats["version"]) == ("affine", "3")
        assert (stats["inference_count"], stats["execution_count"]) == (4, 2)
        assert stats["inference_stats"]["success"]["count"] == 2
        assert stats["inference_stats"]["success"]["ns"] > stats["inference_stats"]["compute_infer"]["ns"] > 0
        # Which sizes they ran at is a matter of what each was measured to cost.
        assert {entry["batch_size"] for entry in stats["batch_stats"]} <= {1, 4, 8}
        assert sum(entry["compute_infer"]["count"] for entry in stats["batch_stats"]) == 2


def test_repository_index(server):
    status, _, body = exchange(server, "POST", "/v2/repository/index", b"{}")
    assert (status, json.loads(body)) == (200, [{"name": "affine", "version": "3", "state": "READY"}])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 200),
        (b"  ", 200),
        (b'{"ready": true}', 200),
        (b'{"ready": false, "more": 1}', 200),
        (b'{"ready": 1}', 400),
        (b"[]", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 5000, 400),
        (b" " * 70_000, 413),
    ],
)
def test_repository_index_takes_an_object_or_nothing(server, body, status):
    assert exchange(server, "POST", "/v2/repository/index", body)[0] == status


def test_a_stopping_server_lists_its_model_as_unavailable_unless_ready_ones_are_asked_for(server):
    server.metrics.ready = False
    try:
        (entry,) = json.loads(exchange(server, "POST", "/v2/repository/index")[2])
        assert entry == {"name": "affine", "version": "3", "state": "UNAVAILABLE", "reason": "it takes no requests now"}
        assert json.loads(exchange(server, "POST", "/v2/repository/index", b'{"ready": true}')[2]) == []
        for path in ("/v2/health/ready", "/v2/models/affine/ready"):
            status, body = get(server, path)
            assert (status, body["ready"]) == (503, False)
    finally:
        server.metrics.ready = True


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v3",
        "/v2/x",
        "/v2/models",
        "/v2/models/",
        "/v2/models/other",
        "/v2/models/affine/",
        "/v2/models/affine/x",
        "/v2/models/affine/versions/4",
        "/v2/models/affine/versions/3/x",
        "/v2/models/affine%2Finfer",
        "/v2/models/..%2faffine",
        "/v2/models/%00",
        "/v2/models/%ff",
        "//v2",
        "/metrics/x",
    ],
)
def test_unknown_routes_and_models_are_404(server, path):
    status, body = get(server, path)
    assert status == 404
    assert set(body) == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v2", "GET, HEAD"),
        ("DELETE", "/v2/health/live", "GET, HEAD"),
        ("GET", INFER, "POST"),
        ("HEAD", INFER, "POST"),
        ("PUT", INFER, "POST"),
        ("POST", "/metrics", "GET, HEAD"),
        ("OPTIONS", "/v2", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_and_says_which(server, method, path, allow):
    status, headers, _ = exchange(server, method, path)
    assert (status, headers["allow"]) == (405, allow)


@pytest.mark.parametrize("path", [INFER, "/v2/models/affine/versions/3/infer"])
def test_infer_in_json(server, path):
    x, n = np.arange(8, dtype=np.float32).reshape(2, 4), np.array([1, 2], np.int32)
    status, headers, body = exchange(server, "POST", path, affine_json(x, n, id="é"))
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in headers
    assert json.loads(body)["id"] == "é"
    outputs = read_outputs(headers, body)
    for name, expected in affine_reference(x, n).items():
        np.testing.assert_array_equal(outputs[name], expected)


IDS = [None, "", "a", "b", "é", "a b", '"\\', "/", "x" * 64, "y" * 64, "z" * 65, '"}', "\x7f", "😀", "aé", None]


@pytest.mark.parametrize("rows", [1, 3])
def test_requests_that_differ_in_their_ids_get_their_own_ids_and_answers(server, rows):
    for number, name in enumerate(IDS * 2):
        x, n = np.full((rows, 4), number, np.float32), np.arange(rows)
        body, fields = affine_binary(x, n)
        size = int(fields["Inference-Header-Content-Length"])
        head = json.loads(body[:size])
        head = json.dumps(head if name is None else {"id": name, **head}, ensure_ascii=number % 2 == 0).encode()
        fields |= {"Inference-Header-Content-Length": str(len(head))}
        status, headers, answer = exchange(server, "POST", INFER, head + body[size:], fields)
        assert status == 200, answer
        said = json.loads(answer[: int(headers["inference-header-content-length"])])
        assert (said.get("id"), said["model_version"]) == (name, "3")
        outputs = read_outputs(headers, answer)
        for output, expected in affine_reference(x, n).items():
            np.testing.assert_array_equal(outputs[output], expected)


def test_of_ids_of_every_length_a_few_are_kept(server, monkeypatch):
    responses = {}
    original = Decoder.decode

    def decode(self, body, size):
        request = original(self, body, size)
        responses[id(request.spec.responses)] = request.spec.responses
        return request

    monkeypatch.setattr(Decoder, "decode", decode)
    body, fields = affine_binary(np.ones((1, 4), np.float32), np.ones(1, np.int32))
    size = int(fields["Inference-Header-Content-Length"])
    for length in range(30):
        head = json.dumps({"id": "x" * length, **json.loads(body[:size])}).encode()
        given = fields | {"Inference-Header-Content-Length": str(len(head))}
        assert exchange(server, "POST", INFER, head + body[size:], given)[0] == 200
    assert [0 < len(each) <= 8 for each in responses.values()] == [True]


def test_infer_in_binary_of_every_size_up_to_three_batches(server):
    rng = np.random.default_rng(0)
    for rows in range(1, 25):
        check(server, rng.random((rows, 4), np.float32), rng.integers(0, 100, rows))


def test_padding_rows_are_zero_whatever_ran_before(server, affine):
    check(server, np.full((8, 4), 9.0), [9] * 8)
    check(server, np.full((5, 4), 9.0), [9] * 5)
    check(server, np.full((2, 4), 7.0), [7] * 2)
    for x, n in affine.seen:
        used = max((index + 1 for index in range(len(n)) if n[index]), default=0)
        assert not x[used:].any()
        assert not n[used:].any()


def test_a_mix_of_binary_and_json_outputs(server):
    x, n = np.ones((2, 4), np.float32), np.array([3, 4], np.int32)
    wanted = [{"name": "twice"}, {"name": "y", "parameters": {"binary_data": True}}]
    body = affine_json(x, n, outputs=wanted)
    status, headers, answer = exchange(server, "POST", INFER, body)
    assert status == 200
    assert headers["content-type"] == "application/octet-stream"
    head = json.loads(answer[: int(headers["inference-header-content-length"])])
    assert head["outputs"][0]["data"] == [6, 8]
    np.testing.assert_array_equal(read_outputs(headers, answer)["y"], affine_reference(x, n)["y"])


def test_requests_that_wait_together_run_together(make_server):
    """Behind a run that is held back, six rows of four requests gather and share one execution."""
    affine = Affine((8,))  # of several sizes, what was measured of them would choose
    server = make_server(affine)
    affine.gate.clear()
    affine.running.clear()
    affine.runs.clear()
    threads = [threading.Thread(target=check, args=(server, np.ones((1, 4)), [1]))]
    threads[0].start()
    assert affine.running.wait(5)
    threads += [
        threading.Thread(target=check, args=(server, np.full((rows, 4), rows), [rows] * rows)) for rows in (1, 2, 1, 2)
    ]
    for thread in threads[1:]:
        thread.start()
    wait_rows(server, 6)
    affine.gate.set()
    for thread in threads:
        thread.join(10)
    assert len(affine.runs) == 2
    assert counted(server).rows == 7
    assert counted(server).requests == 5


def test_a_batch_of_zero_rows_is_400(server):
    status, _, body = exchange(server, "POST", INFER, affine_json(np.zeros((0, 4)), np.zeros(0)))
    assert status == 400
    assert "at least one row" in json.loads(body)["error"]


@pytest.mark.parametrize("value", ["-1", "x", "1e3", "+5", "99999999999999999999", "999999", "0x10", ""])
def test_a_header_length_that_lies_is_400(server, value):
    body, _ = affine_binary(np.ones((1, 4)), [1])
    status, _, answer = exchange(server, "POST", INFER, body, {"Inference-Header-Content-Length": value})
    assert status == 400, answer


def test_a_full_queue_is_503_with_retry_after_and_recovers(make_server, affine):
    server = make_server(affine, max_queue_rows=4)
    affine.gate.clear()
    affine.running.clear()
    data, fields = affine_binary(np.ones((4, 4)), [1] * 4)
    with connect(server) as first, connect(server) as second:
        first.sendall(raw_request("POST", INFER, data, fields))
        assert affine.running.wait(5)
        second.sendall(raw_request("POST", INFER, data, fields))
        wait_rows(server, 4)
        status, headers, body = exchange(server, "POST", INFER, data, fields)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "queue is full" in json.loads(body)["error"]
        assert get(server, "/v2/health/live")[0] == get(server, "/v2/health/ready")[0] == 200
        affine.gate.set()
        assert read_response(first)[0] == read_response(second)[0] == 200
    check(server, np.ones((4, 4)), [1] * 4)
    assert exchange(server, "POST", INFER, *affine_binary(np.ones((5, 4)), [1] * 5))[0] == 413


def test_a_failing_batch_is_500_without_details_and_the_engine_lives(server, caplog):
    for _ in range(3):
        status, _, body = exchange(server, "POST", INFER, affine_json(np.ones((1, 4)), [-1]))
        assert (status, json.loads(body)) == (500, {"error": "inference failed"})
    assert "poisoned" in caplog.text
    check(server, np.ones((1, 4)), [1])


def test_a_split_request_of_which_one_part_fails_is_answered_once(server, affine):
    n = np.zeros(20, np.int32)
    n[3] = -1
    affine.runs.clear()
    assert exchange(server, "POST", INFER, affine_json(np.ones((20, 4)), n))[0] == 500
    check(server, np.ones((1, 4)), [1])
    assert sum(affine.runs) <= 8 + 8 + 1


def test_max_delay_lets_requests_gather(make_server, affine):
    server = make_server(affine, max_delay_us=300_000)
    affine.runs.clear()
    threads = [threading.Thread(target=check, args=(server, np.ones((1, 4)), [index])) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(affine.runs) == 1
    assert counted(server).queue_s.total / 4 <= 0.35


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_requests_and_responses(server, coding, compress):
    x, n = np.arange(800, dtype=np.float32).reshape(200, 4), np.arange(200, dtype=np.int32)
    body, fields = affine_binary(x, n)
    # The same JSON part first without: what is remembered of that answer must not be used for the compressed one.
    assert "content-encoding" not in exchange(server, "POST", INFER, body, fields)[1]
    headers = fields | {"Content-Encoding": coding, "Accept-Encoding": coding}
    status, got, answer = exchange(server, "POST", INFER, compress(body), headers)
    assert (status, got["content-encoding"]) == (200, coding)
    answer = gzip.decompress(answer) if coding == "gzip" else zlib.decompress(answer)
    np.testing.assert_array_equal(read_outputs(got, answer)["y"], affine_reference(x, n)["y"])


def test_small_answers_and_errors_are_never_compressed(server):
    body, fields = affine_binary(np.ones((1, 4)), [1])
    assert "content-encoding" not in exchange(server, "POST", INFER, body, fields | {"Accept-Encoding": "gzip"})[1]
    bad = affine_json(np.ones((1, 4)), [1]).replace(b"FP32", b"F" * 5000)
    status, headers, _ = exchange(server, "POST", INFER, bad, {"Accept-Encoding": "gzip"})
    assert status == 400
    assert "content-encoding" not in headers


def test_bad_compressed_bodies(make_server):
    from lepton_xla.serve import Limits

    server = make_server(Affine(), limits=Limits(max_body_bytes=100_000))
    for body, coding, status in (
        (b"junk", "gzip", 400),
        (gzip.compress(bytes(10 << 20)), "gzip", 413),
        (zlib.compress(bytes(10 << 20)), "deflate", 413),
        (b"{}", "br", 415),
    ):
        got, headers, _ = exchange(server, "POST", INFER, body, {"Content-Encoding": coding})
        assert got == status
        assert ("accept-encoding" in headers) == (status == 415)


def test_two_symbols_are_padded_and_cut(make_server):
    tokens = Tokens()
    server = make_server(tokens)
    for seq in range(1, 9):
        for rows in (1, 3, 6):
            array = np.arange(1, rows * seq + 1, dtype=np.int32).reshape(rows, seq)
            given = {"name": "tokens", "datatype": "INT32", "shape": [rows, seq], "data": array.tolist()}
            body = json.dumps({"inputs": [given]}).encode()
            status, headers, answer = exchange(server, "POST", "/v2/models/tokens/infer", body)
            assert status == 200, answer
            outputs = read_outputs(headers, answer)
            np.testing.assert_array_equal(outputs["out"], array + 1)
            np.testing.assert_array_equal(outputs["length"], [seq] * rows)
    assert {seq for _, seq in tokens.runs} == {4, 8}


def test_a_model_without_a_batch_dimension_runs_requests_alone(make_server):
    server = make_server(Identity(shape=(2, 3), bucket_sizes=()))
    given = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}
    body = json.dumps({"inputs": [given]}).encode()
    status, headers, answer = exchange(server, "POST", "/v2/models/identity/infer", body)
    assert status == 200
    np.testing.assert_array_equal(read_outputs(headers, answer)["y"], np.arange(1, 7).reshape(2, 3))
    assert get(server, "/v2/models/identity/config")[1]["max_batch_size"] == 0


def test_an_input_shared_by_all_rows_stops_requests_from_sharing_a_run(make_server):
    class Scaled(Identity):
        def __init__(self):
            super().__init__()
            self.inputs["scale"] = TensorSpec((), "float32")

        def run(self, sizes, arrays):
            return [arrays[0] * arrays[1]]

    server = make_server(Scaled())
    for scale in (2.0, 3.0):
        inputs = [
            {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]},
            {"name": "scale", "datatype": "FP32", "shape": [], "data": [scale]},
        ]
        body = json.dumps({"inputs": inputs}).encode()
        status, headers, answer = exchange(server, "POST", "/v2/models/identity/infer", body)
        assert status == 200, answer
        np.testing.assert_array_equal(read_outputs(headers, answer)["y"], scale * np.arange(1, 7).reshape(2, 3))


def test_raw_mode(make_server):
    server = make_server(Identity())
    row = np.array([1, 2, 3], "<f4")
    status, headers, body = exchange(
        server, "POST", "/v2/models/identity/infer", row.tobytes(), {"Inference-Header-Content-Length": "0"}
    )
    assert status == 200
    np.testing.assert_array_equal(read_outputs(headers, body)["y"], row[None])


def long_request(rows, *, binary_out, **headers):
    """A request whose JSON takes long enough to be read on another thread, and its right answer."""
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) / 7
    n = np.arange(rows, dtype=np.int32)
    body = affine_json(x, n, parameters={"binary_data_output": binary_out})
    assert len(body) > 1 << 16
    coding = headers.get("Content-Encoding")
    body = {"gzip": gzip.compress, "deflate": zlib.compress, None: bytes}[coding](body)
    return raw_request("POST", INFER, body, headers), affine_reference(x, n)


def test_long_bodies_are_read_and_written_elsewhere_and_their_answers_keep_the_order_of_the_requests(
    make_server, affine
):
    server = make_server(affine, max_queue_rows=1 << 16)
    cases = [
        (rows, binary, coding)
        for rows in (2500, 6000)
        for binary in (True, False)
        for coding in ({}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "deflate"}, {"Accept-Encoding": "gzip"})
    ]
    expected = []
    with connect(server) as sock, connect(server) as other:
        for rows, binary, headers in cases:
            request, outputs = long_request(rows, binary_out=binary, **headers)
            # One that is answered at once, between two that take their time.
            sock.sendall(request + raw_request("GET", "/v2/health/live"))
            expected.append(outputs)
        buffer = bytearray()
        for outputs in expected:
            status, headers, body = read_response(sock, buffer=buffer)
            assert status == 200
            if "content-encoding" in headers:
                body = gzip.decompress(body)
            for name, array in read_outputs(headers, body).items():
                np.testing.assert_array_equal(array, outputs[name])
            assert read_response(sock, buffer=buffer)[2] == b'{"live":true}'
        other.sendall(raw_request("GET", "/v2/health/live"))
        assert read_response(other)[0] == 200


def test_outputs_are_used_only_until_the_call_was_told(make_server, monkeypatch):
    """They may lie in memory that the next batch is written to."""
    original = InferCall.finish

    def spoil(self, outputs):
        original(self, outputs)
        for output in outputs:
            output[:] = bytes(len(output))

    monkeypatch.setattr(InferCall, "finish", spoil)
    server = make_server(Affine((1, 4096)), max_queue_rows=1 << 16)
    for rows in (1, 6000):
        x, n = np.ones((rows, 4), np.float32), np.ones(rows, np.int32)
        for accept in ({}, {"Accept-Encoding": "gzip"}):
            for body, fields in (affine_binary(x, n), (affine_json(x, n), {})):
                status, headers, answer = exchange(server, "POST", INFER, body, fields | accept)
                assert status == 200
                answer = gzip.decompress(answer) if "content-encoding" in headers else answer
                np.testing.assert_array_equal(read_outputs(headers, answer)["y"], np.full((rows, 4), 3))


@pytest.mark.parametrize("coding", [None, "gzip"])
def test_a_long_body_that_is_refused_is_refused_as_a_short_one_is(server, coding):
    headers = {} if coding is None else {"Content-Encoding": coding}
    for damage in (b"]}", b'"FP32"', b'"shape"'):
        for rows in (3, 5000):
            body = affine_json(np.ones((rows, 4)), np.ones(rows)).replace(damage, b"!", 1)
            body = body if coding is None else gzip.compress(body)
            status, _, answer = exchange(server, "POST", INFER, body, headers)
            assert status == 400, (damage, rows)
            assert set(json.loads(answer)) == {"error"}


def test_a_client_that_leaves_while_its_body_is_read_is_not_run(make_server, affine, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    original = Decoder.decode

    def slow(self, body, size):
        if len(body) > 1 << 16:
            reading.set()
            assert go_on.wait(10)
        return original(self, body, size)

    monkeypatch.setattr(Decoder, "decode", slow)
    server = make_server(affine)
    affine.runs.clear()
    with connect(server) as sock:
        sock.sendall(long_request(4000, binary_out=True)[0])
        assert reading.wait(5)
        # The event loop is not what reads.
        assert get(server, "/v2/health/live")[0] == 200
    assert get(server, "/v2/health/live")[0] == 200
    go_on.set()
    check(server, np.ones((1, 4)), [1])
    assert len(affine.runs) == 1


def test_more_long_bodies_than_may_be_held_are_503(make_server, affine, monkeypatch):
    from lepton_xla.serve.http import workers

    go_on = threading.Event()
    monkeypatch.setattr(workers.Workers, "run", limited(workers.Workers.run, go_on))
    server = make_server(affine)
    request, _ = long_request(4000, binary_out=True)
    with connect(server) as first, connect(server) as second:
        first.sendall(request)
        get(server, "/v2/health/live")
        second.sendall(request)
        status, headers, body = read_response(second)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "large requests" in json.loads(body)["error"]
        go_on.set()
        assert read_response(first)[0] == 200


def limited(run, go_on):
    """`Workers.run` with room for one body, whose work waits."""

    def held(self, size, work, done, failed):
        self._max_bytes = 1

        def wait():
            assert go_on.wait(10)
            return work()

        run(self, size, wait, done, failed)

    return held


def test_nan_in_a_json_answer_is_the_clients_error_short_or_long(make_server):
    server = make_server(Identity(), max_queue_rows=1 << 16)
    for rows in (1, 20_000):
        array = np.full((rows, 3), np.nan, np.float32)
        given = {"name": "x", "datatype": "FP32", "shape": [rows, 3], "parameters": {"binary_data_size": array.nbytes}}
        head = json.dumps({"inputs": [given]}).encode()
        fields = {"Inference-Header-Content-Length": str(len(head))}
        status, _, body = exchange(server, "POST", "/v2/models/identity/infer", head + array.tobytes(), fields)
        assert status == 400
        assert "ask for binary_data" in json.loads(body)["error"]


@pytest.mark.parametrize("shape", [("batch", 3), (2, 3)])
@pytest.mark.parametrize("binary", [True, False])
def test_classification_of_batches_and_of_what_has_none(make_server, shape, binary):
    server = make_server(Identity(shape=shape, bucket_sizes=(1, 8) if "batch" in shape else ()))
    outputs = [{"name": "y", "parameters": {"classification": 2, "binary_data": binary}}]
    given = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 5, 3, 4, 6, 2]}
    body = json.dumps({"inputs": [given], "outputs": outputs}).encode()
    status, headers, answer = exchange(server, "POST", "/v2/models/identity/infer", body)
    assert status == 200, answer
    size = int(headers.get("inference-header-content-length", len(answer)))
    (output,) = json.loads(answer[:size])["outputs"]
    expected = ["5.0:1", "3.0:2", "6.0:1", "4.0:0"] if "batch" in shape else ["6.0:4", "5.0:1"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2] if "batch" in shape else [2])
    if binary:
        assert output["parameters"] == {"binary_data_size": len(answer) - size}
        assert answer[size:] == b"".join(len(text).to_bytes(4, "little") + text.encode() for text in expected)
    else:
        assert output["data"] == expected
