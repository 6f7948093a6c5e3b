"""The client, blocking and asynchronous, against the real server and against scripted ones that misbehave."""

import asyncio
import gc
import json
import logging
import math
import random
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import Affine, Identity, Scripted, raw_answer

from lepton_xla.errors import InputError, LeptonError, ServeError
from lepton_xla.serve import Limits
from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.client import AsyncClient, Client, DeadlineError, RequestError, calls
from lepton_xla.serve.client.calls import Attempts
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.client.replicas import Replicas
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.client.transport import Answer

X = np.arange(8, dtype=np.float32).reshape(2, 4)
N = np.array([1, 2], np.int32)
Y = 2 * X + N[:, None].astype(np.float32)
SEVEN = b'{"outputs": [{"name": "y", "datatype": "INT32", "shape": [1], "data": [7]}]}'
GOOD = raw_answer(200, SEVEN)
THERE = Replicas([endpoint("http://there")])


def blocking(url, method, *args, options=None, **kwargs):
    with Client(url, **(options or {})) as client:
        return getattr(client, method)(*args, **kwargs)


def awaited(url, method, *args, options=None, **kwargs):
    async def main():
        async with AsyncClient(url, **(options or {})) as client:
            return await getattr(client, method)(*args, **kwargs)

    return asyncio.run(main())


@pytest.fixture(params=[blocking, awaited])
def ask(request):
    """Calls one method of a client, blocking or asynchronous."""
    return request.param


@pytest.fixture
def delays(monkeypatch):
    """The delays that the client wants before it asks again; it is not made to wait them out."""
    wanted = []
    delay = Attempts.delay

    def noted(self, outcome):
        found = delay(self, outcome)
        if found is not None:
            wanted.append(found)
        return found and 0.001

    monkeypatch.setattr(Attempts, "delay", noted)
    return wanted


# Against the real server.


def test_feedback_is_for_a_request_by_its_id(server, ask):
    ask(server.url, "infer", "affine", x=X, n=N, request_id="mine")  # 2 X + N is largest at the end
    assert ask(server.url, "feedback", "affine", {"mine": [3, 0]}) == 2
    figures = ask(server.url, "monitor", "affine")
    assert (figures["feedback_rows"], figures["labels"][0]["recall"]) == (2, 0.0)
    assert ask(server.url, "feedback", "affine", {"mine": [3, 0]}) == 2  # as a client does whose answer was lost
    assert ask(server.url, "monitor", "affine")["feedback_rows"] == 2
    for labels, status in (({"mine": [3, 1]}, 409), ({"other": 1}, 404)):
        with pytest.raises(RequestError) as caught:
            ask(server.url, "feedback", "affine", labels)
        assert caught.value.status == status
    with pytest.raises(InputError, match="'mine' must be a class"):
        ask(server.url, "feedback", "affine", {"mine": 0.5})


def test_infer(ask, server):
    outputs = ask(server.url, "infer", "affine", x=X, n=N)
    assert list(outputs) == ["y", "twice"]
    np.testing.assert_array_equal(outputs["y"], Y)
    np.testing.assert_array_equal(outputs["twice"], 2 * N)
    assert outputs["y"].dtype == np.float32


def test_infer_takes_lists_of_numbers(ask, server):
    np.testing.assert_array_equal(ask(server.url, "infer", x=X.tolist(), n=N.tolist())["y"], Y)


def test_infer_says_which_outputs_and_takes_any_name(ask, server):
    """The server's only model is found; an input may be given by position, where keywords would not do."""
    outputs = ask(server.url, "infer", None, {"x": X}, n=N, outputs=["twice"], timeout_s=9, priority=1)
    assert list(outputs) == ["twice"]
    assert list(ask(server.url, "infer", x=X, n=N, options={"model": "affine", "binary": False})) == ["y", "twice"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint64", "bool"])
def test_every_bit_of_narrow_floats_comes_back(ask, make_server, dtype):
    patterns = np.arange(65536, dtype=np.uint16)
    x = {"bfloat16": patterns.view(ml_dtypes.bfloat16), "float16": patterns.view(np.float16)}.get(
        dtype, (patterns % 2).astype(dtype)
    )
    server = make_server(Identity(dtype, ("batch", 8192), (8,)))
    (y,) = ask(server.url, "infer", x=x.reshape(8, 8192)).values()
    assert y.dtype == x.dtype
    assert y.tobytes() == x.tobytes()


def test_what_the_server_says_of_itself(ask, server):
    assert ask(server.url, "server")["name"] == "lepton_xla"
    assert ask(server.url, "index") == [{"name": "affine", "version": "3", "state": "READY"}]
    assert ask(server.url, "metadata")["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    assert ask(server.url, "config", "affine")["max_batch_size"] == 8
    assert ask(server.url, "stats", "affine")["model_stats"][0]["inference_count"] == 0
    assert ask(server.url, "live") is True
    assert ask(server.url, "ready") is True
    assert ask(server.url, "ready", "affine") is True
    assert ask(server.url, "ready", "other") is False


@pytest.mark.parametrize(
    ("call", "status", "part"),
    [
        ({"x": X}, 400, "input 'n' is missing"),
        ({"x": X.astype(np.float64), "n": N}, 400, "FP64"),
        ({"x": X[:0], "n": N[:0]}, 400, "at least one row"),
    ],
)
def test_an_error_has_the_servers_words_and_status(ask, server, call, status, part):
    with pytest.raises(RequestError, match=part) as caught:
        ask(server.url, "infer", **call)
    assert caught.value.status == status
    assert isinstance(caught.value, LeptonError)
    assert str(caught.value).endswith(f"(HTTP {status})")


def test_an_unknown_model(ask, server):
    for name in ("other", "a/ö ?"):
        with pytest.raises(RequestError, match="unknown model") as caught:
            ask(server.url, "metadata", name)
        assert caught.value.status == 404


def test_a_body_that_is_too_large_is_told_so(ask, make_server):
    """The server answers before it has read all, and closes."""
    server = make_server(Affine(), limits=Limits(max_body_bytes=1000))
    with pytest.raises(RequestError, match="exceeds 1000 bytes") as caught:
        ask(server.url, "infer", "affine", x=np.zeros((40, 4), np.float32), n=np.zeros(40, np.int32))
    assert caught.value.status == 413


def test_threads_and_tasks_share_a_client(server):
    x = np.random.default_rng(0).random((64, 1, 4), np.float32)
    n = np.arange(64, dtype=np.int32)[:, None]
    expected = 2 * x[:, 0] + n.astype(np.float32)

    async def all_at_once():
        async with AsyncClient(server.url, max_connections=5) as client:
            return await asyncio.gather(*(client.infer("affine", x=x[i], n=n[i]) for i in range(64)))

    with Client(server.url, max_connections=5) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: client.infer("affine", x=x[i], n=n[i]), range(64)))
    for found in (answers, asyncio.run(all_at_once())):
        np.testing.assert_array_equal(np.concatenate([each["y"] for each in found]), expected)


# Who asks.


@pytest.fixture
def guarded(make_server, tmp_path):
    secret = create_token(tmp_path / "tokens.jsonl", "someone", ["infer", "read"])
    return make_server(Affine(), token_file=tmp_path / "tokens.jsonl"), secret


def test_a_token_from_an_argument_a_file_or_the_environment(ask, guarded, tmp_path, monkeypatch):
    server, secret = guarded
    (tmp_path / "token").write_text(f"{secret}\n")
    assert ask(server.url, "metadata", options={"token": secret, "model": "affine"})["name"] == "affine"
    assert ask(server.url, "metadata", "affine", options={"token_file": tmp_path / "token"})["name"] == "affine"
    monkeypatch.setenv("LEPTON_TOKEN", secret)
    assert ask(server.url, "metadata", "affine")["name"] == "affine"
    with pytest.raises(RequestError) as caught:
        ask(server.url, "metadata", "affine", options={"token": "wrong"})
    assert caught.value.status == 401


@pytest.mark.parametrize(("method", "status"), [("infer", 401), ("metadata", 401), ("ready", 401)])
def test_a_wrong_token_is_an_error_that_does_not_show_it(ask, guarded, caplog, method, status):
    server, _ = guarded
    with caplog.at_level(logging.DEBUG), pytest.raises(RequestError) as caught:
        ask(server.url, method, "affine", options={"token": "my-secret-token"})
    assert caught.value.status == status
    assert "my-secret-token" not in f"{caught.value!r}{caught.value}{caplog.text}"


def test_nothing_shows_the_token():
    client = Client("http://127.0.0.1:1", token="my-secret-token")
    assert repr(client) == "Client('http://127.0.0.1:1')"
    assert "my-secret-token" not in repr(endpoint("http://127.0.0.1:1", token="my-secret-token"))


def test_tls(ask, make_server, tmp_path, delays):
    authority, stranger = trustme.CA(), trustme.CA()
    roots = [tmp_path / name for name in ("root.pem", "stranger.pem")]
    for root, made in zip(roots, (authority, stranger), strict=True):
        made.cert_pem.write_to_path(root)
    pair = authority.issue_cert("127.0.0.1")
    files = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem", roots[0])
    files.key.touch(0o600)
    pair.cert_chain_pems[0].write_to_path(files.cert)
    pair.private_key_pem.write_to_path(files.key)
    server = make_server(Affine(), tls=files)
    own = {"tls_ca": roots[0], "tls_cert": files.cert, "tls_key": files.key}
    x, n = np.ones((4000, 4), np.float32), np.ones(4000, np.int32)
    np.testing.assert_array_equal(ask(server.url, "infer", "affine", x=x, n=n, options=own)["y"], 2 * x + 1)
    for options, part in (
        ({"tls_ca": roots[1]}, "TLS failed: CERTIFICATE_VERIFY_FAILED"),
        ({"tls_ca": roots[0]}, "TLS failed|no answer"),
    ):
        with pytest.raises(RequestError, match=part) as caught:
            ask(server.url, "server", options=options)
        assert caught.value.status is None
    with pytest.raises(RequestError):
        ask(server.url.replace("https", "http"), "server", options={"retries": 0})


@pytest.mark.parametrize(
    ("url", "options", "part"),
    [
        ("ftp://h:1", {}, "expected http://"),
        ("http://", {}, "expected http://"),
        ("http://h:99999", {}, "port"),
        ("http://user:pass@h", {}, "token instead"),
        ("http://h/?q=1", {}, "no user, query"),
        ("http://h/a b", {}, "percent-encoded"),
        ("http://h/ü", {}, "percent-encoded"),
        ("http://h/\r\nX: y", {}, "percent-encoded"),
        ("http://h", {"token": "a\r\nX: y"}, "token"),
        ("http://h", {"token": ""}, "token"),
        ("http://h", {"token_file": "/nowhere/token"}, "cannot be read"),
        ("http://h", {"tls_ca": "ca.pem"}, "not https"),
        ("https://h", {"tls_ca": "/nowhere/ca.pem"}, "cannot be used"),
        ("https://h", {"tls_key": "key.pem"}, "without its certificate"),
        ("http://h", {"timeout_s": 0}, "timeout_s"),
        ("http://h", {"timeout_s": math.inf}, "timeout_s"),
        ("http://h", {"retries": -1}, "retries"),
        ("http://h", {"max_connections": 0}, "max_connections"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_options_that_cannot_be_used(kind, url, options, part):
    with pytest.raises(ServeError, match=part) as caught:
        kind(url, **options)
    assert "pass" not in str(caught.value) or "password" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "line"),
    [
        ("localhost:8000", "localhost", 8000, b"GET /v2 HTTP/1.1\r\nHost: localhost:8000\r\n"),
        ("http://[::1]:80/", "::1", 80, b"GET /v2 HTTP/1.1\r\nHost: [::1]:80\r\n"),
        ("https://h/models/a/", "h", 443, b"GET /models/a/v2 HTTP/1.1\r\nHost: h:443\r\n"),
    ],
)
def test_where_a_url_points(url, host, port, line):
    found = endpoint(url)
    assert (found.host, found.port, found.tls is not None) == (host, port, url.startswith("https"))
    assert found.request("GET", "/v2").startswith(line)


# Asking again.


@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_server_is_asked_again_when_it_says(ask, delays, status):
    busy = raw_answer(status, b'{"error": "full"}', {"Retry-After": "7"})
    with Scripted(busy, busy, GOOD) as server:
        assert ask(server.url, "infer", "m", x=[1])["y"] == [7]
        assert len(server.requests) == 3
        assert server.connections == 1
    assert 7 <= delays[0] <= 7.05
    assert 7 <= delays[1] <= 7.1


def test_a_date_may_say_when(ask, delays):
    moment = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 9))
    with Scripted(raw_answer(503, b"", {"Retry-After": moment}), GOOD) as server:
        ask(server.url, "infer", "m", x=[1])
    assert 7 < delays[0] < 9.1


@pytest.mark.parametrize(
    "broken",
    [
        None,
        GOOD[:-3],
        GOOD[:20],
        raw_answer(200, b"5\r\nabc", {"Transfer-Encoding": "chunked"}).replace(b"Content-Length: 6\r\n", b""),
    ],
)
def test_a_connection_that_breaks_is_tried_again(ask, delays, broken):
    def half(sock):
        sock.sendall(broken)
        sock.shutdown(2)

    with Scripted(broken if broken is None else half, GOOD) as server:
        assert ask(server.url, "infer", "m", x=[1])["y"] == [7]
        assert (len(server.requests), server.connections) == (2, 2)
    assert len(delays) == 1
    assert delays[0] <= 0.05


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 501, 502])
def test_other_errors_are_not_tried_again(ask, delays, status):
    with Scripted(raw_answer(status, b'{"error": "no\\u0007 good"}')) as server:
        with pytest.raises(RequestError, match="no  good") as caught:
            ask(server.url, "infer", "m", x=[1])
        assert caught.value.status == status
        assert len(server.requests) == 1
    assert delays == []


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[1]", b"null", b'[{"name": "m", "version": 1}]', b'{"sizes": {"0": -1}}', b'[{"label": 1}]', b"<html>",
        b"[" * 9999,
    ],
)  # fmt: skip
def test_an_answer_of_another_server_is_an_error(ask, body):
    """Whoever answers at a URL, a proxy say, may answer anything by 200."""
    with Scripted(raw_answer(200, body)) as server:
        for method, *given in (
            ("server",), ("index",), ("metadata", "m"), ("traffic", "m"), ("rollout", "m"), ("adjustment", "m"),
            ("feedback", "m", {"a": 1}), ("metadata",),
        ):  # fmt: skip
            with pytest.raises(RequestError, match="the server's answer is not"):
                ask(server.url, method, *given)
        with RepositoryClient(server.url) as client:
            for change in (
                client.models, lambda: client.promote("m", "1"), lambda: client.rollback("m"),
                lambda: client.remove("m", "1"), lambda: client.set_traffic("m", {}), lambda: client.clear_traffic("m"),
                lambda: client.start_rollout("m", {}), lambda: client.stop_rollout("m"),
                lambda: client.stop_adjustment("m"), lambda: client._sizes(["0"]),
            ):  # fmt: skip
                with pytest.raises(RequestError, match="the server's answer is not"):
                    change()


def test_the_last_word_of_a_busy_server(ask, delays):
    with Scripted(raw_answer(503, b'{"error": "the queue is full"}')) as server:
        with pytest.raises(RequestError, match="the queue is full") as caught:
            ask(server.url, "infer", "m", x=[1], options={"retries": 2})
        assert len(server.requests) == 3
    assert caught.value.status == 503
    assert len(delays) == 2


def test_nobody_there(ask, delays):
    with Scripted(GOOD) as server:
        url = server.url
    with pytest.raises(RequestError, match=r"no answer after 4 attempts: .*[Rr]efused") as caught:
        ask(url, "server")
    assert caught.value.status is None
    assert len(delays) == 3
    assert ask(url, "live") is False
    assert ask(url, "ready", "m") is False


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(ask):
    with Scripted(raw_answer(503, b'{"error": "full"}', {"Retry-After": "60"})) as server:
        started = time.monotonic()
        with pytest.raises(RequestError, match="full"):
            ask(server.url, "server", options={"timeout_s": 20})
        assert time.monotonic() - started < 10
        assert len(server.requests) == 1


@given(st.integers(0, 10), st.floats(0.1, 100), st.integers(0, 200), st.randoms(use_true_random=False))
def test_delays_grow_at_random_and_end_before_the_deadline(retries, timeout_s, retry_after, source):
    """Against the rule of full jitter: up to 50 ms times 2^n, at most 2 s, beside what the server asks for."""
    clock = [1000.0]
    busy = Answer()
    busy.status = 503
    busy.headers[b"retry-after"] = str(retry_after % 3).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "monotonic", lambda: clock[0])
        patch.setattr(calls, "random", types.SimpleNamespace(uniform=source.uniform))
        attempts = Attempts(THERE, retries, timeout_s)
        lefts, made = [attempts.left()], 0
        while (delay := attempts.delay(busy)) is not None:
            assert retry_after % 3 <= delay <= retry_after % 3 + min(2.0, 0.05 * 2**made)
            clock[0] += delay
            made += 1
            assert clock[0] < 1000 + timeout_s
            lefts.append(attempts.left())
            assert 0 < lefts[-1] <= timeout_s
            assert lefts[-1] * 64 / timeout_s == pytest.approx(round(lefts[-1] * 64 / timeout_s))
        assert made <= retries
        assert lefts == sorted(lefts, reverse=True)


def test_delays_differ(monkeypatch):
    """Clients that were refused together do not come back together."""
    random.seed(0)
    busy = Answer()
    busy.status = 503
    assert len({Attempts(THERE, 1, 10).delay(busy) for _ in range(20)}) == 20


# Deadlines.


def test_a_server_that_does_not_answer(ask):
    with Scripted(lambda sock: None) as server:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"no answer within 0\.3 s") as caught:
            ask(server.url, "infer", "m", x=[1], timeout_s=0.3)
        assert 0.29 < time.monotonic() - started < 5
        assert caught.value.status is None
        assert len(server.requests) == 1


def test_a_server_that_answers_byte_by_byte(ask):
    """Each byte comes soon, all of them do not."""

    def drip(sock):
        for byte in raw_answer(200, b" " * 1000):
            sock.sendall(bytes([byte]))
            time.sleep(0.01)

    with Scripted(drip) as server, pytest.raises(DeadlineError):
        ask(server.url, "server", options={"timeout_s": 0.3})


def test_the_server_is_told_the_time_that_is_left(ask, delays):
    with Scripted(raw_answer(503), GOOD) as server:
        ask(server.url, "infer", "m", x=[1], timeout_s=2.5, priority=3)
        first, second = (json.loads(body[: body.rindex(b"}}") + 2])["parameters"] for _, body in server.requests)
    assert first == {"priority": 3, "timeout": 2_500_000, "binary_data_output": True}
    assert 0 < second["timeout"] < 2_500_000
    assert second["timeout"] == int(round(second["timeout"] * 64 / 2.5e6) * 2.5e6 / 64)


def test_the_servers_own_deadline_is_one(ask):
    with Scripted(raw_answer(504, b'{"error": "too late"}')) as server:
        with pytest.raises(DeadlineError, match="too late") as caught:
            ask(server.url, "server")
        assert caught.value.status == 504


# Connections.


def test_one_connection_for_one_request_after_another():
    async def main(url):
        async with AsyncClient(url) as client:
            for _ in range(5):
                await client.infer("m", x=[1])

    with Scripted(GOOD) as server:
        with Client(server.url) as client:
            for _ in range(5):
                client.infer("m", x=[1])
        asyncio.run(main(server.url))
        assert (len(server.requests), server.connections) == (10, 2)


def test_a_connection_that_is_closed_or_says_more_than_it_was_asked_is_not_used(delays):
    def then_close(sock):
        sock.sendall(GOOD)
        sock.shutdown(2)

    def then_more(sock):
        sock.sendall(GOOD + b"HTTP/1.1 200 OK\r\n")

    def then_another(sock):
        sock.sendall(GOOD + raw_answer(500))

    def last(sock):
        sock.sendall(GOOD.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))

    async def main(url):
        async with AsyncClient(url) as client:
            for _ in range(4):
                assert (await client.infer("m", x=[1]))["y"] == [7]
                await asyncio.sleep(0.05)

    for script in (then_close, then_more, then_another, last):
        with Scripted(script) as server:
            with Client(server.url) as client:
                for _ in range(4):
                    assert client.infer("m", x=[1])["y"] == [7]
                    time.sleep(0.05)
            assert server.connections == 4
            asyncio.run(main(server.url))
            assert server.connections == 8
    assert delays == []


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + GOOD,
        raw_answer(200, b"%x\r\n%b\r\n0\r\n\r\n" % (len(SEVEN), SEVEN)).replace(
            b"Content-Length", b"Transfer-Encoding: chunked\r\nX-Not-Length"
        ),
        GOOD.replace(b"Content-Length", b"X-Not-Length"),
        GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)  # fmt: skip
def test_every_framing_of_an_answer(ask, answer):
    def send(sock):
        for start in range(0, len(answer), 7):
            sock.sendall(answer[start : start + 7])
        if b"X-Not-Length" in answer and b"chunked" not in answer:
            sock.shutdown(2)

    with Scripted(send) as server:
        assert ask(server.url, "infer", "m", x=[1])["y"] == [7]


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "not HTTP"),
        (raw_answer(200, b"<html>"), "no infer answer"),
        (raw_answer(200, b"{}", {"Inference-Header-Content-Length": "x"}), "no infer answer"),
        (raw_answer(200, b"{}", {"Inference-Header-Content-Length": "99"}), "no infer answer"),
        (raw_answer(302, b"", {"Location": "http://elsewhere"}), "Found"),
        (raw_answer(500, b"<html>" + b"x" * 5000), "<html>x{494} "),
        (raw_answer(599), "no reason given"),
        (raw_answer(500, b'["error"]'), "error"),
    ],
)
def test_an_answer_that_is_none(ask, answer, part):
    with Scripted(answer) as server, pytest.raises(RequestError, match=part):
        ask(server.url, "infer", "m", x=[1])
    with Scripted(raw_answer(200, b"<html>")) as server, pytest.raises(RequestError, match="not JSON"):
        ask(server.url, "server")


def test_which_model_if_there_are_several(ask):
    two = raw_answer(200, b'[{"name": "b"}, {"name": "a"}]')
    with Scripted(two) as server, pytest.raises(InputError, match=r"2 models \(a, b\)"):
        ask(server.url, "metadata")


def test_an_infer_that_is_cancelled_leaves_no_answer_behind(server, affine):
    async def main():
        async with AsyncClient(server.url) as client:
            affine.gate.clear()
            task = asyncio.create_task(client.infer("affine", x=X, n=N))
            await asyncio.to_thread(affine.running.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            affine.gate.set()
            return await client.infer("affine", x=X + 1, n=N)

    affine.running.clear()
    np.testing.assert_array_equal(asyncio.run(main())["y"], Y + 2)


def test_no_more_connections_than_allowed():
    arrived, gate = threading.Semaphore(0), threading.Event()

    def wait(sock):
        arrived.release()
        gate.wait(5)
        sock.sendall(GOOD)

    with Scripted(wait) as server, Client(server.url, max_connections=2) as client, ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(client.infer, "m", x=[1]) for _ in range(6)]
        assert arrived.acquire(timeout=5)
        assert arrived.acquire(timeout=5)
        assert not arrived.acquire(timeout=0.1)
        with pytest.raises(DeadlineError):
            client.infer("m", x=[1], timeout_s=0.05)
        gate.set()
        assert all(each.result(5)["y"] == [7] for each in waiting)
        assert server.connections == 2


def test_a_closed_client():
    client = Client("http://127.0.0.1:1")
    client.close()
    with pytest.raises(ServeError, match="closed"):
        client.server()


def test_sockets_are_closed():
    """ResourceWarning is an error here, and a socket that is forgotten makes one."""
    with Scripted(lambda sock: None) as server:
        for ask in (blocking, awaited):
            with pytest.raises(DeadlineError):
                ask(server.url, "server", options={"timeout_s": 0.05})
    gc.collect()


def test_the_client_needs_no_jax():
    code = (
        "import sys, lepton_xla.serve.client, lepton_xla.serve.load.generator, lepton_xla.cli.load\n"
        "from lepton_xla.serve import AsyncClient, Client\n"
        "print(sorted({'jax', 'jaxlib', 'flax', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
