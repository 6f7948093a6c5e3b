"""RFC 9110 and RFC 9112, clause by clause: what a client sends, and what it has to get.

One row a clause: its section, what it says, the bytes that are sent, the answers (status and fields) in their order,
and whether the connection goes on afterwards. All rows are asked of one server on a socket of their own.
"""

import contextlib
import dataclasses
import email.utils
import gzip
import json
import socket
import time

import numpy as np
import pytest
from serve_fakes import Affine, affine_json, read_response

from lepton_xla.serve import Options, Server
from lepton_xla.serve.http.date import Date
from lepton_xla.serve.limits import Limits

BODY = affine_json(np.zeros((1, 4)), [1])
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
GZIP = gzip.compress(BODY)
LIVE = b"/v2/health/live"
INFER = b"/v2/models/affine/infer"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


def get(fields=b"", target=LIVE, version=b"1.1", method=b"GET", host=b"Host: a\r\n"):
    return b"%s %s HTTP/%s\r\n%s%s\r\n" % (method, target, version, host, fields)


def post(fields=LENGTH, body=BODY, **parts):
    return get(fields, **({"target": INFER, "method": b"POST"} | parts)) + body


@dataclasses.dataclass(frozen=True)
class Answer:
    """Status, and fields whose value is exactly this, or that are not there (None)."""

    status: int
    fields: dict[str, str | None] = dataclasses.field(default_factory=dict)
    method: str = "GET"


OK = Answer(200)
HEAD = Answer(200, method="HEAD")
CLOSING = Answer(200, {"connection": "close"})
BAD = Answer(400, {"connection": "close"})
NONE = "of the method: no content"

# Section, what it says, bytes, answers, whether the connection goes on.
CLAUSES = [
    # RFC 9112: messages.
    ("9112 2.2", "an empty line before the request line is ignored", b"\r\n\r\n" + get(), [OK], True),
    ("9112 2.2", "a bare LF ends no line (it may)", get().replace(b"\r\n", b"\n"), [BAD], False),
    ("9112 2.2", "a bare CR is invalid", get(b"X: a\rb\r\n"), [BAD], False),
    ("9112 2.2", "no whitespace before the first field", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", [BAD], False),
    ("9112 2.2", "what is no HTTP at all begins with no method", b"\x16\x03\x01\x02\x00\x01\x00",
     [Answer(501)], False),
    ("9112 2.3", "the name of the protocol is case-sensitive", b"GET / http/1.1\r\nHost: a\r\n\r\n", [BAD], False),
    ("9112 3", "a request line without a target is refused", b"GET\r\n\r\n", [Answer(501)], False),
    ("9112 3", "so is one of more than three words", get(version=b"1.1 x"), [BAD], False),
    ("9112 3", "a target may not hold a space", get(target=b"/v2/a b"), [BAD], False),
    ("9112 3", "a method that is unknown gets 501", get(method=b"BREW"), [Answer(501)], False),
    ("9112 3", "also behind another request", get() + get(method=b"BREW"), [OK, Answer(501)], False),
    ("9112 3", "a target that is too long gets 414", get(target=b"/" + b"a" * 20_000), [Answer(414)], False),
    ("9112 3", "request lines of 8000 bytes are taken", get(target=LIVE + b"?" + b"a" * 7950), [OK], True),
    ("9112 3.2", "a request of HTTP/1.1 without Host gets 400", get(host=b""), [BAD], False),
    ("9112 3.2", "so does one with two", get(b"Host: a\r\n"), [BAD], False),
    ("9112 3.2", "so does one whose value is none", get(host=b"Host: a b\r\n"), [BAD], False),
    ("9112 3.2", "HTTP/1.0 may do without", get(host=b"", version=b"1.0"), [CLOSING], False),
    ("9112 3.2.2", "the absolute form is taken, whatever Host says", get(target=b"http://b:80" + LIVE), [OK], True),
    ("9112 3.2.2", "its scheme is case-insensitive", get(target=b"HTTP://b" + LIVE), [OK], True),
    ("9112 3.2.3", "the authority form is for CONNECT only", get(target=b"a:80"), [BAD], False),
    ("9112 3.2.4", "the asterisk form is for OPTIONS only", get(target=b"*"), [Answer(400)], True),
    ("9112 5.1", "no whitespace before a colon", get(b"X : a\r\n"), [BAD], False),
    ("9112 5.1", "whitespace after a value is not part of it", get(host=b"Host: a \t \r\n"), [OK], True),
    ("9112 5.1", "nor of what frames a body", post(b"Content-Length: %d \t\r\n" % len(BODY)), [OK], True),
    ("9112 5.1", "nor of a transfer coding", post(b"Transfer-Encoding:chunked \r\n", CHUNKS), [OK], True),
    ("9112 5.2", "a folded line is refused", get(b"X: a\r\n b\r\n"), [BAD], False),
    ("9112 5.2", "so is one folded by a tab", get(b"X: a\r\n\tb\r\n"), [BAD], False),
    ("9112 6.1", "a transfer coding that is not known gets 501", post(CHUNKED.replace(b" c", b" gzip, c"), CHUNKS),
     [Answer(501)], False),
    ("9112 6.1", "chunked is not applied twice", post(CHUNKED.replace(b" c", b" chunked, c"), CHUNKS), [BAD], False),
    ("9112 6.1", "names of transfer codings are case-insensitive", post(b"Transfer-Encoding: Chunked\r\n", CHUNKS),
     [OK], True),
    ("9112 6.1", "HTTP/1.0 with Transfer-Encoding is answered, and closed",
     post(b"Connection: keep-alive\r\n" + CHUNKED, CHUNKS, version=b"1.0"), [CLOSING], False),
    ("9112 6.1", "Transfer-Encoding and Content-Length together are refused", post(LENGTH + CHUNKED, CHUNKS),
     [BAD], False),
    ("9112 6.3", "where chunked is not the last coding the length is unknown", post(b"Transfer-Encoding: gzip\r\n"),
     [BAD], False),
    ("9112 6.3", "nor if something comes after it", post(b"Transfer-Encoding: chunked, gzip\r\n", CHUNKS),
     [BAD], False),
    ("9112 6.3", "two lengths that differ are refused", post(LENGTH + b"Content-Length: 1\r\n"), [BAD], False),
    ("9112 6.3", "a list of equal lengths is refused (it may be)", post(b"Content-Length: 5, 5\r\n"), [BAD], False),
    ("9112 6.3", "a length is digits", post(b"Content-Length: +5\r\n"), [BAD], False),
    ("9112 6.3", "and no underscores", post(b"Content-Length: 1_0\r\n"), [BAD], False),
    ("9112 6.3", "and not empty", post(b"Content-Length: \r\n"), [BAD], False),
    ("9112 6.3", "without either there is no body", get(method=b"POST", target=INFER), [Answer(400)], True),
    ("9112 7.1", "sizes of chunks are hexadecimal in either case",
     post(CHUNKED, b"A\r\n%s\r\n%X\r\n%s\r\n0\r\n\r\n" % (BODY[:10], len(BODY) - 10, BODY[10:])), [OK], True),
    ("9112 7.1", "and do not overflow", post(CHUNKED, b"f" * 17 + b"\r\n"), [BAD], False),
    ("9112 7.1", "and are what comes", post(CHUNKED, b"3\r\nabcd\r\n"), [BAD], False),
    ("9112 7.1.1", "chunk extensions are ignored", post(CHUNKED, CHUNKS.replace(b"\r\n", b';a=b;c="d"\r\n', 1)),
     [OK], True),
    ("9112 7.1.2", "trailers may be discarded", post(CHUNKED, CHUNKS[:-2] + b"Host: b\r\nX: c\r\n\r\n"), [OK], True),
    ("9112 9.3", "connections of HTTP/1.1 go on", get() + get(), [Answer(200, {"connection": None})] * 2, True),
    ("9112 9.3", "those of HTTP/1.0 end", get(version=b"1.0"), [CLOSING], False),
    ("9112 9.3", "unless they say otherwise", get(b"Connection: Keep-Alive\r\n", version=b"1.0"),
     [Answer(200, {"connection": "keep-alive"})], True),
    ("9112 9.3", "close wins", get(b"Connection: keep-alive, close\r\n"), [CLOSING], False),
    ("9112 9.3.2", "answers come in the order of the requests",
     post() + get() + get(method=b"HEAD") + post() + get(target=b"/v3"), [OK, OK, HEAD, OK, Answer(404)], True),
    ("9112 9.6", "after close nothing more is answered", get(b"Connection: close\r\n") + get(), [CLOSING], False),
    ("9112 9.6", "names of options are case-insensitive", get(b"Connection: Close\r\n"), [CLOSING], False),
    # RFC 9110: semantics.
    ("9110 2.5", "a higher minor version is read as HTTP/1.1", get(version=b"1.2") * 2, [OK] * 2, True),
    ("9110 2.5", "another major version gets 505", get(version=b"3.0"), [Answer(505, {"connection": "close"})], False),
    ("9110 2.5", "so does HTTP/2 that was not asked for", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [Answer(505)], False),
    ("9110 5.1", "names of fields are case-insensitive", post(LENGTH.upper()), [OK], True),
    ("9110 5.4", "a head that is too long gets 431", get(b"X: " + b"a" * 20_000 + b"\r\n"), [Answer(431)], False),
    ("9110 5.4", "so does one of too many fields", get(b"X: a\r\n" * 100), [Answer(431)], False),
    ("9110 5.5", "a value may not hold NUL", get(b"X: a\x00b\r\n"), [BAD], False),
    ("9110 5.5", "nor a name what is no token", get(b"A@B: c\r\n"), [BAD], False),
    ("9110 5.5", "a value may be empty", get(b"X:\r\nY: \r\n"), [OK], True),
    ("9110 6.6.1", "errors have a Date too", get(target=b"/v3"), [Answer(404)], True),
    ("9110 7.6.1", "fields that Connection names are ignored", get(b"Connection: X\r\nX: a\r\n"), [OK], True),
    ("9110 7.6.2", "Max-Forwards is for proxies", get(b"Max-Forwards: 0\r\n"), [OK], True),
    ("9110 7.6.3", "so is Via", get(b"Via: 1.1 a, 1.0 b (c)\r\n"), [OK], True),
    ("9110 7.8", "an upgrade to HTTP/2 may be ignored", get(UPGRADE), [Answer(200, {"upgrade": None})], True),
    ("9110 7.8", "and the next request read", get(UPGRADE) + get(), [OK] * 2, True),
    ("9110 7.8", "so it may before a body", post(UPGRADE + LENGTH) + get(), [OK] * 2, True),
    ("9110 7.8", "of whatever framing", post(UPGRADE + CHUNKED, CHUNKS) + post(UPGRADE + LENGTH), [OK] * 2, True),
    ("9110 7.8", "an upgrade to WebSocket too", get(b"Connection: Upgrade\r\nUpgrade: websocket\r\n") + get(),
     [OK] * 2, True),
    ("9110 7.8", "Upgrade in HTTP/1.0 is ignored", get(UPGRADE, version=b"1.0"), [CLOSING], False),
    ("9110 7.8", "Upgrade without Connection is ignored", get(b"Upgrade: h2c\r\n"), [OK], True),
    ("9110 8.4.1.3", "x-gzip is gzip", post(b"Content-Encoding: X-GZip\r\nContent-Length: %d\r\n" % len(GZIP), GZIP),
     [OK], True),
    ("9110 8.4", "a content coding that is not known gets 415",
     post(b"Content-Encoding: br\r\n" + LENGTH), [Answer(415, {"accept-encoding": "gzip, deflate"})], True),
    ("9110 8.6", "a body beyond the limit gets 413", post(b"Content-Length: 99999999999\r\n"), [Answer(413)], False),
    ("9110 9.1", "methods are case-sensitive", get(method=b"get"), [Answer(501)], False),
    ("9110 9.1", "a known method that is not taken gets 405", get(method=b"PROPFIND"), [Answer(405)], True),
    ("9110 9.3.1", "the body of a GET is read, and ignored", get(b"Content-Length: 3\r\n") + b"abc" + get(),
     [OK] * 2, True),
    ("9110 9.3.2", "HEAD: " + NONE, get(method=b"HEAD") + get(), [HEAD, OK], True),
    ("9110 9.3.2", "nor with an error", get(method=b"HEAD", target=b"/v3"), [Answer(404, method="HEAD")], True),
    ("9110 9.3.2", "nor where the head cannot be read", get(method=b"HEAD", host=b""),
     [Answer(400, method="HEAD")], False),
    ("9110 9.3.2", "nor where it is too long", get(b"X: " + b"a" * 20_000 + b"\r\n", method=b"HEAD"),
     [Answer(431, method="HEAD")], False),
    ("9110 9.3.2", "nor where the target is", get(target=b"/" + b"a" * 20_000, method=b"HEAD"),
     [Answer(414, method="HEAD")], False),
    ("9110 9.3.2", "nor where a body is", get(b"Content-Length: 99999999999\r\n", method=b"HEAD"),
     [Answer(413, method="HEAD")], False),
    ("9110 9.3.6", "CONNECT is for proxies", get(target=b"a:80", method=b"CONNECT"), [Answer(501)], False),
    ("9110 9.3.7", "OPTIONS may be refused", get(method=b"OPTIONS"), [Answer(405, {"allow": "GET, HEAD"})], True),
    ("9110 9.3.7", "also of the whole server", get(target=b"*", method=b"OPTIONS"),
     [Answer(405, {"allow": "GET, HEAD, POST"})], True),
    ("9110 9.3.8", "TRACE may be refused", get(method=b"TRACE"), [Answer(405, {"allow": "GET, HEAD"})], True),
    ("9110 10.1.1", "an expectation of HTTP/1.0 is ignored", post(b"Expect: 100-continue\r\n" + LENGTH, version=b"1.0"),
     [CLOSING], False),
    ("9110 10.1.1", "an expectation that is not met gets its final status",
     post(b"Expect: 100-continue\r\n" + LENGTH, b"", target=b"/v3"), [Answer(404, {"connection": "close"})], False),
    ("9110 10.1.1", "also of a method", post(b"Expect: 100-continue\r\n" + LENGTH, b"", target=LIVE),
     [Answer(405, {"connection": "close", "allow": "GET, HEAD"})], False),
    ("9110 10.1.1", "100 comes before the body is read", post(b"Expect: 100-Continue\r\n" + LENGTH),
     [Answer(100, {"content-length": None}), OK], True),
    ("9110 10.1.4", "TE: trailers may be ignored", get(b"TE: trailers\r\nConnection: TE\r\n"), [OK], True),
    ("9110 12.5.1", "Accept may be ignored", get(b"Accept: text/html\r\n"), [OK], True),
    ("9110 12.5.3", "an answer is not coded as the client excludes", get(b"Accept-Encoding: gzip;q=0\r\n"),
     [Answer(200, {"content-encoding": None})], True),
    ("9110 14.2", "Range may be ignored", get(b"Range: bytes=0-1\r\n"), [Answer(200, {"content-range": None})], True),
    ("9110 15.5.5", "what is not found gets 404", get(target=b"/v3"), [Answer(404)], True),
    ("9110 15.5.6", "405 says what is allowed", get(method=b"DELETE"), [Answer(405, {"allow": "GET, HEAD"})], True),
    ("9110 15.5.6", "of every resource", get(target=INFER), [Answer(405, {"allow": "POST"})], True),
]  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    """One server for all clauses."""
    with Server(Affine(), Options(port=0)) as running:
        yield running


def check_head(answer, headers, body):
    for name, value in answer.fields.items():
        assert headers.get(name) == value, name
    if answer.status == 100:
        return
    sent = email.utils.parsedate_to_datetime(headers["date"]).timestamp()
    assert abs(sent - time.time()) < 5
    assert headers["date"].endswith(" GMT")
    assert int(headers["content-length"]) > 0
    if answer.status >= 400 and answer.method != "HEAD":
        assert set(json.loads(body)) == {"error"}


@pytest.mark.parametrize(
    ("request_bytes", "answers", "kept"),
    [clause[2:] for clause in CLAUSES],
    ids=[f"{section}: {says}".replace(" ", "-") for section, says, *_ in CLAUSES],
)
def test_clause(warm, request_bytes, answers, kept):
    buffer = bytearray()
    with contextlib.closing(socket.create_connection(warm.address, 10)) as sock:
        sock.sendall(request_bytes)
        for answer in answers:
            status, headers, body = read_response(sock, answer.method, buffer)
            assert status == answer.status, body
            check_head(answer, headers, body)
        if kept:
            sock.sendall(get(b"X-Last: 1\r\n"))
            status, headers, body = read_response(sock, buffer=buffer)
            assert (status, json.loads(body), headers.get("connection")) == (200, {"live": True}, None)
        else:
            assert sock.recv(1) == b""
        assert not buffer


@pytest.mark.parametrize("request_bytes", [get(UPGRADE), post(UPGRADE + LENGTH), post(UPGRADE + CHUNKED, CHUNKS)])
def test_an_upgrade_is_ignored_however_the_bytes_are_cut(warm, request_bytes):
    data = request_bytes + get()
    with contextlib.closing(socket.create_connection(warm.address, 10)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(1, len(data), 37):
            buffer = bytearray()
            sock.sendall(data[:cut])
            time.sleep(0.001)
            sock.sendall(data[cut:])
            assert [read_response(sock, buffer=buffer)[0] for _ in range(2)] == [200, 200]


def test_a_body_of_an_upgrade_is_bounded_as_any_other():
    with Server(Affine(), Options(port=0, limits=Limits(max_body_bytes=1000))) as running:
        for fields, body in ((b"Content-Length: 1001\r\n", bytes(1001)), (CHUNKED, b"3e9\r\n" + bytes(1001))):
            with contextlib.closing(socket.create_connection(running.address, 10)) as sock:
                sock.sendall(post(UPGRADE + fields, body))
                assert read_response(sock)[0] == 413


def test_the_date_is_that_of_the_second():
    date = Date()
    date.tick(784111777.9)
    # The example of RFC 9110, section 5.6.7.
    assert date.starts[200] == b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n"


def test_the_date_goes_on_while_the_server_runs(warm):
    def date():
        with contextlib.closing(socket.create_connection(warm.address, 10)) as sock:
            sock.sendall(post())
            return read_response(sock)[1]["date"]

    first, until = date(), time.monotonic() + 20
    while date() == first:
        assert time.monotonic() < until
        time.sleep(0.05)
