"""Bytes into the server's whole way of a request, without sockets, threads or a model that compiles.

Run it for as long as you like:

    python tests/serve/serve_fuzz.py --seconds 600 [--seed 0]

Under atheris (`pip install atheris`) coverage guides it; without, good requests are changed at random. What is found is
printed as a Python literal, for the list of `test_fuzz.py`.

What must hold for any bytes: nothing raises, every answer is well-formed HTTP with JSON where it says so, none is a
500, the body bytes that are counted go back to zero, no request is left without an answer, and cutting the same bytes
otherwise gives the same answers (a head that is remembered may not be read in another way than one that is parsed).
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from serve_fakes import Affine, affine_binary, affine_json, raw_request

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["lepton_xla.serve"]) if atheris else contextlib.nullcontext():
    from lepton_xla.serve.app.app import App
    from lepton_xla.serve.errors import HTTPError
    from lepton_xla.serve.http.connection import Connection
    from lepton_xla.serve.http.server_state import ServerState
    from lepton_xla.serve.limits import Limits
    from lepton_xla.serve.models.handle import ModelHandle
    from lepton_xla.serve.models.registry import Registry
    from lepton_xla.serve.observe.server_metrics import ServerMetrics
    from lepton_xla.serve.protocol.signature import signature_of

# Header fields are bounded by their bytes alone here: those that are taken out of a head are not counted.
LIMITS = Limits(max_body_bytes=1 << 16, max_header_bytes=2048, max_headers=1000, max_chunks=200, max_json_depth=30)
X = np.ones((1, 4), np.float32)
INFER = "/v2/models/affine/infer"


class Now:
    """A scheduler that runs every call at once, by the equation of `Affine`."""

    max_delay_s = 0.0

    max_rows = 64
    shed = None

    def submit(self, call):
        x, n = (np.frombuffer(data, dtype) for data, dtype in zip(call.request.tensors, ("<f4", "<i4"), strict=True))
        assert x.size == 4 * n.size == 4 * call.request.spec.rows
        with np.errstate(all="ignore"):
            results = (2 * x.reshape(-1, 4) + n[:, None].astype("<f4"), 2 * n)
        try:
            call.finish([memoryview(results[index].tobytes()) for index, _ in call.request.spec.outputs])
        except HTTPError as refusal:
            call.fail(refusal)

    def cancel(self, call):
        pass


class Inline:
    """In place of the threads that read long bodies."""

    def run(self, size, work, done, failed):
        try:
            done(work())
        except HTTPError as refusal:
            failed(refusal)


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data):
        assert not self.closed
        self.written += data

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1) if name == "peername" else default

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    abort = close

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.closed = True

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


class Fuzzed:
    """A server's app and state, to be fed one connection after the other."""

    def __init__(self):
        signature = signature_of(Affine())
        metrics = ServerMetrics()
        counted = metrics.opened(signature.name, signature.version)
        self.app = App(Registry(ModelHandle(signature, Now(), counted, LIMITS)), metrics, LIMITS)
        self.app._workers = Inline()
        self.app._metrics.ready = True
        self.asked = 0

        def handler(exchange):
            self.asked += 1
            self.app(exchange)
            assert exchange.answered, "left without an answer"

        self.state = ServerState(handler, LIMITS)

    def answers(self, pieces):
        """What comes back for bytes that arrive in these pieces: bytes, and whether the connection was closed."""
        wire, connection = Wire(), Connection(self.state)
        connection.connection_made(wire)
        for piece in pieces:
            if not wire.closed:
                connection.data_received(piece)
        connection.connection_lost(None)
        assert not self.state.buffered_bytes
        assert not self.state.connections
        assert not self.state.addresses
        return bytes(wire.written), wire.closed

    def check(self, data, cuts=()):
        """Raises unless everything holds for these bytes."""
        self.state.heads.clear()
        whole = self.answers([data])
        check_answers(whole[0])
        again = self.answers([data])  # now with heads that are remembered
        assert constant(again) == constant(whole)
        edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        cut = self.answers([data[start:stop] for start, stop in itertools.pairwise(edges) if start < stop])
        assert constant(cut) == constant(whole)


def constant(answer):
    """An answer without what may differ: figures that grow, and which of several faults was found first."""
    written, closed = answer
    found = []
    for head, body in split(written):
        if head.startswith(b"HTTP/1.1 4") and b"\r\nConnection: close" in head:
            found.append("refused")
        elif b"text/plain" in head or b"inference_stats" in body:
            found.append(head[:12])
        else:
            # Of two lines `traceparent`, one of them malformed, either may be taken.
            found.append((re.sub(rb"\r\nTraceparent: [^\r]*", b"", head), body))
    return found, closed


def split(written):
    """Heads and bodies of answers that follow each other; the answer to HEAD is known by what follows its head."""
    found = []
    while written:
        head, blank, rest = written.partition(b"\r\n\r\n")
        assert blank, written
        assert head.startswith(b"HTTP/1.1 "), head
        if head == b"HTTP/1.1 100 Continue":
            written = rest
            continue
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        size = int(fields[b"Content-Length"])
        if rest.startswith(b"HTTP/1.1 ") or not rest:
            size = 0  # the answer to HEAD
        assert len(rest) >= size
        found.append((head, rest[:size]))
        written = rest[size:]
    return found


def check_answers(written):
    for head, body in split(written):
        status = int(head.split(b" ", 2)[1])
        assert status < 600
        assert status not in (500, 502), (head, body)
        if body and b"Content-Type: application/json" in head and b"Content-Encoding" not in head:
            told = json.loads(body)
            if status >= 400 and status != 503:
                assert set(told) == {"error"}, told
                assert "Traceback" not in told["error"]
                assert len(told["error"]) < 600


def good_requests():
    """What the changes start from."""
    binary, fields = affine_binary(X, [1])
    tail = affine_json(X, [1])
    yield raw_request("POST", INFER, binary, fields)
    yield raw_request("POST", INFER, binary, fields) * 3
    yield raw_request("POST", INFER, tail)
    yield raw_request("POST", INFER, affine_json(X, [1], id="a", parameters={"timeout": 5, "priority": 1}))
    yield raw_request("POST", INFER, affine_json(X, [1], outputs=[{"name": "y", "parameters": {"classification": 2}}]))
    yield raw_request("POST", INFER, affine_json(np.ones((3, 4)), [1, 2, 3], outputs=[{"name": "twice"}]))
    yield raw_request(
        "POST",
        INFER,
        b"%x\r\n%s\r\n0\r\nT: u\r\n\r\n" % (len(tail), tail),
        {"Transfer-Encoding": "chunked", "Content-Length": ""},
    ).replace(b"Content-Length: \r\n", b"")
    yield raw_request("GET", "/v2/health/live") + raw_request("HEAD", "/v2/models/affine") + raw_request("GET", "/v2")
    yield raw_request("GET", "/metrics", b"", {"Accept-Encoding": "gzip;q=0.5, deflate", "Connection": "close"})
    yield raw_request("POST", "/v2/repository/index", b'{"ready": true}')
    yield raw_request("GET", "/v2/models/%61ffine/versions/3/stats?x=y", b"", {"Expect": "100-continue"})
    trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "X-Request-Id": "5", "tracestate": "a=b"}
    yield raw_request("POST", INFER, binary, fields | trace) * 2
    yield raw_request("GET", "/v2", b"", {"Connection": "keep-alive"}, "1.0") * 2
    packed = zlib.compress(tail)
    yield raw_request("POST", INFER, packed, {"Content-Encoding": "deflate", "Accept-Encoding": "gzip"})


SEEDS = list(good_requests())
PIECES = [
    b"\r\n", b"\r", b"\n", b"\r\n\r\n", b": ", b" ", b"\t", b"\0", b"0\r\n\r\n", b"5;" + b"x" * 40, b"HTTP/1.0",
    b"GET /v2 HTTP/1.1\r\n", b"Host: b\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"traceparent: ", b"\r\nX-Request-Id: a", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Upgrade: x\r\n",
    b"Inference-Header-Content-Length: 0\r\n", b'"', b"\\u0000", b"\\ud800", b"[", b"]", b"{", b"}", b"-1", b"1e999",
    b"9" * 30, b"NaN", b"null", b"true", b'"binary_data_size":16', b'"classification":9', b'"shape":[0,4]',
    b'"id":"\\n"', b"%", b"%2f", b"/", b"//", b"?", b";", b"\xff", b"\x80",
]  # fmt: skip


def changed(rng):
    """A good request, or two, with some of its bytes otherwise."""
    data = bytearray(rng.choice(SEEDS))
    if rng.random() < 0.3:
        data += rng.choice(SEEDS)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:at] = rng.choice(PIECES)
        elif kind == 2:
            del data[at : at + rng.choice((1, 1, 2, 5, 40))]
        elif kind == 3:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.choice((1, 4, 20, 100))]
        elif kind == 4:
            piece = rng.choice(PIECES)
            data[at : at + len(piece)] = piece
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        data = data or bytearray(b"G")
    return bytes(data)


def run_random(seconds, seed):
    """Feeds changed requests; gives how many."""
    rng, fuzzed = random.Random(seed), Fuzzed()
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = changed(rng)
        cuts = [rng.randrange(1 << 16) for _ in range(rng.randrange(6))]
        try:
            fuzzed.check(data, cuts)
        except Exception:
            sys.stdout.write(f"({data!r}, {cuts!r}),\n")
            raise
        count += 1
    return count


def run_atheris(seconds, seed):
    fuzzed = Fuzzed()

    def one(raw):
        if raw:
            fuzzed.check(raw[1:], [raw[0] * number for number in range(1, raw[0] % 4)])

    corpus = Path("build/fuzz")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(SEEDS):
        (corpus / f"seed{number}").write_bytes(b"\x07" + data)
    flags = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=4096", "-timeout=5"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="without atheris, though it is there")
    given = parser.parse_args()
    if given.random or atheris is None:
        sys.stdout.write(f"{run_random(given.seconds, given.seed)} inputs, nothing found\n")
    else:
        run_atheris(given.seconds, given.seed)


if __name__ == "__main__":
    main()
