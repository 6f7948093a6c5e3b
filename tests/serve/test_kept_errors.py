"""What is refused or fails is let go of at once: no error is held in a frame of its own traceback.

Such a cycle keeps what was in hand there, a body of any size, until the garbage collector happens to run.
"""

import asyncio
import contextlib
import gc
import gzip
import socket
import time
import tracemalloc

import numpy as np
import pytest
from keeping import nothing_kept
from serve_fakes import Scripted, affine_binary, exchange

from lepton_xla.serve.client import AsyncClient, Client, RequestError

INFER = "/v2/models/affine/infer"
MIB = 1 << 20
LONG = 200_000


def gzipped(data):
    return gzip.compress(data), {"Content-Encoding": "gzip"}


def refusals():
    binary, fields = affine_binary(np.ones((1, 4), np.float32), [1])
    yield "gzip bomb", *gzipped(b"x" * (65 * MIB)), 413
    yield "long gzip of no JSON", *gzipped(b"x" * LONG), 400
    yield "gzip of no JSON", *gzipped(b"x"), 400
    yield "damaged gzip", gzip.compress(b"x" * LONG)[:-9], {"Content-Encoding": "gzip"}, 400
    yield "unknown coding", b"x", {"Content-Encoding": "br"}, 415
    yield "long body of no JSON", b"x" * LONG, {}, 400
    yield "long data of the wrong type", b'{"inputs":[{"name":"n","datatype":"INT32","shape":[1],"data":[%s]}]}' % (
        b"1.5," * LONG + b"1"
    ), {}, 400  # fmt: skip
    yield "short body of no JSON", b"x", {}, 400
    yield "cut binary", binary[:-1], fields, 400
    yield "too many bytes", b"", {"Content-Length": str(65 * MIB)}, 413
    yield "no number of bytes", b"", {"Inference-Header-Content-Length": "x"}, 400
    yield "an unknown expectation of framing", b"", {"Transfer-Encoding": "chunked, chunked"}, None
    yield "too many fields", b"", {f"x-{i}": "1" for i in range(99)}, 431


@pytest.mark.parametrize(("body", "fields", "status"), [pytest.param(*rest, id=name) for name, *rest in refusals()])
def test_a_refused_request_leaves_no_cycle(server, body, fields, status):
    exchange(server, "POST", INFER, body, fields)  # the first time more is made: caches, threads
    with nothing_kept():
        got, _, _ = exchange(server, "POST", INFER, body, fields)
        time.sleep(0.05)  # the connection's end
    assert status in (got, None)
    assert got >= 400


def test_the_memory_of_refused_bodies_is_given_back_without_the_collector(server):
    body, fields = gzipped(b" " * (16 * MIB))
    exchange(server, "POST", INFER, body, fields)
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(3):
            assert exchange(server, "POST", INFER, body, fields)[0] == 400
        until = time.monotonic() + 5
        while tracemalloc.get_traced_memory()[0] >= 1 * MIB:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_a_failed_run_leaves_no_cycle(server):
    body, fields = affine_binary(np.ones((1, 4), np.float32), [-1])
    exchange(server, "POST", INFER, body, fields)
    with nothing_kept():
        assert exchange(server, "POST", INFER, body, fields)[0] == 500


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("answers", [None, [None]], ids=["nobody there", "closed without an answer"])
def test_a_client_that_gets_no_answer_keeps_nothing(answers):
    x = {"x": np.ones((1, MIB), np.float32)}
    with contextlib.ExitStack() as stack:
        url = f"http://127.0.0.1:{closed_port()}" if answers is None else stack.enter_context(Scripted(*answers)).url

        def ask():
            with Client(url, retries=1) as client, contextlib.suppress(RequestError):
                client.infer("m", x)

        async def ask_async():
            async with AsyncClient(url, retries=1) as client:
                with contextlib.suppress(RequestError):
                    await client.infer("m", x)

        ask()
        asyncio.run(ask_async())
        with nothing_kept():
            ask()
        with nothing_kept():
            asyncio.run(ask_async())
