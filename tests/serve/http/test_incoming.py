"""What a client sends at once is handled in shares, so that others need not wait for all of it; counted, not timed."""

import asyncio

import pytest
from serve_fakes import Affine, bodies, connect, raw_request, read_response, send

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.connection import Connection
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.http.incoming import SHARE, SLICE_BYTES
from lepton_xla.serve.http.reserve import LastConnection
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.limits import Limits

READ = 256 << 10
"""What uvloop reads at once."""

TINY = raw_request("GET", "/")
# Requests of the slice that fills the share are handled too.
MOST = SHARE + SLICE_BYTES // len(TINY) + 1


class Wire:
    """A transport of which everything leaves at once, until it is stalled."""

    def __init__(self):
        self.written = []
        self.reading = True
        self.stalled = 0

    def write(self, data):
        self.written.append(data)

    def get_write_buffer_size(self):
        return self.stalled

    def get_extra_info(self, name):
        return ("", 0)

    def is_closing(self):
        return False

    def can_write_eof(self):
        return True

    def write_eof(self):
        pass

    def close(self):
        pass

    def abort(self):
        self.aborted = True

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


class Client:
    """A connection whose requests are answered with their bodies, at once or when `answers` is set."""

    def __init__(self, state=None, **limits):
        self.seen: list[Exchange] = []
        self.answers = True
        self.state = ServerState(self.handle, Limits(**limits)) if state is None else state
        self.wire = Wire()
        self.connection = Connection(self.state)
        self.connection.connection_made(self.wire)

    def handle(self, exchange):
        self.seen.append(exchange)
        if self.answers:
            send(exchange, b"%s " % (exchange.body or exchange.head.target))

    def send(self, data):
        """Requests handled in this turn of the event loop, and in each that follows until there is no more."""

        async def turns():
            counts = []
            before = len(self.seen)
            self.connection.data_received(data)
            while True:
                counts.append(len(self.seen) - before)
                before = len(self.seen)
                if not self.connection._going_on:
                    return counts
                assert len(counts) < 1000
                assert not self.wire.reading
                assert 0 < self.state.buffered_bytes <= len(data)
                await asyncio.sleep(0)

        return asyncio.run(turns())


async def finish(client):
    """Lets turns of the event loop go by until nothing is left of what came."""
    for _ in range(1000):
        if not client.connection._going_on:
            return
        await asyncio.sleep(0)
    raise AssertionError("it goes on and on")


@pytest.fixture
def client():
    return Client()


def test_thousands_of_requests_in_one_read_are_handled_in_shares_and_in_order(client):
    paths = [b"/%d" % n for n in range(9000)]
    counts = client.send(b"".join(raw_request("GET", path.decode()) for path in paths)[:READ])
    count = len(client.seen)
    assert count > 5000 > 20 * MOST
    assert max(counts) <= MOST
    assert sum(counts) == count
    assert bodies(client.wire.written).split() == paths[:count]
    assert client.wire.reading
    assert client.state.buffered_bytes == 0


def test_thousands_of_chunks_are_read_in_shares(client):
    chunks = 6000
    counts = client.send(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * chunks + b"0\r\n\r\n"
    )
    assert len(counts) >= chunks // (SHARE + SLICE_BYTES // 6 + 1)
    assert [each.body for each in client.seen] == [b"x" * chunks]


@pytest.mark.parametrize(
    "data",
    [
        TINY,
        raw_request("POST", "/", b"x" * (READ - 100)),
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        % (60000, b"x" * 60000),
        raw_request("POST", "/", b"x" * 5000) * 40,
    ],
    ids=["one", "one body", "one chunk", "forty bodies"],
)
def test_what_is_no_more_than_a_share_needs_one_turn(client, data):
    assert len(client.send(data)) == 1
    assert {len(each.body) for each in client.seen} <= {0, 5000, 60000, READ - 100}


def test_a_body_is_given_to_the_parser_in_two_slices(client):
    """The one that its head ends in, and all the rest."""
    fed = []
    parse = type(client.connection._in)._parse

    class Counted(type(client.connection._in)):
        __slots__ = ()

        def _parse(self, data):
            fed.append(len(data))
            return parse(self, data)

    client.connection._in.__class__ = Counted
    data = raw_request("POST", "/", b"x" * 100_000)
    client.send(data)
    assert fed == [SLICE_BYTES, len(data) - SLICE_BYTES]


def test_requests_are_the_same_wherever_they_are_cut():
    """Also when their heads are known: a body that has come in part is then read without the parser."""
    wanted = [(b"/a", b"x" * 9), (b"/b", b"\r\n\r\nGET"), (b"/a", b"y" * 9), (b"/", b""), (b"/b", b"z" * 7)]
    requests = [raw_request("POST" if body else "GET", path.decode(), body) for path, body in wanted]
    data = b"\r\n\r\n".join(requests[:3]) + b"".join(requests[3:])
    for cut in range(1, len(data) - 5):
        client = Client()
        for start, end in ((0, cut), (cut, -5), (-5, None)) * 2:
            client.connection.data_received(data[start:end])
        assert [(each.head.target, each.body) for each in client.seen] == wanted * 2
        assert client.state.buffered_bytes == 0


def test_a_head_is_known_by_its_own_bytes_only(client):
    """Not by blank lines in front of it, which would make what others send after such lines its body."""
    client.connection.data_received(b"\r\n\r\n" + raw_request("POST", "/", b"x" * 500)[:-2])
    other = Client(client.state)
    other.connection.data_received(b"\r\n\r\n" + TINY)
    assert [each.head.method for each in client.seen] == [b"GET"]


@pytest.mark.parametrize("case", ["no token", "beyond the limits", "too much"])
def test_a_known_head_is_admitted_as_others_are(case):
    client = Client(max_body_bytes=100, max_buffered_bytes=100)
    data = raw_request("POST", "/", b"x" * 60)
    client.send(data)
    if case == "no token":

        def admit(head):
            raise HTTPError(401, "a token is needed")

        client.state.admit = admit
    if case == "beyond the limits":
        client.connection = LastConnection(client.state, HTTPError(429, "too many connections"))
        client.connection.connection_made(client.wire)
    if case == "too much":
        client.state.buffered_bytes = 70
    client.connection.data_received(data[:-20])
    status = {"no token": b"401", "beyond the limits": b"429", "too much": b"503"}[case]
    assert client.wire.written[-1].startswith(b"HTTP/1.1 %s " % status)
    assert len(client.seen) == 1
    assert client.state.buffered_bytes == (70 if case == "too much" else 0)


def test_the_rest_of_a_read_waits_while_answers_do(client):
    client.answers = False
    counts = client.send(TINY * 1000)
    assert len(counts) == 1
    assert counts[0] <= MOST  # handled, or waiting for the answers before them
    assert not client.wire.reading
    # All but what was handled, and a part of the next.
    assert 0 <= len(TINY) * (1000 - counts[0]) - client.state.buffered_bytes < len(TINY)

    async def answer():
        client.answers = True
        for exchange in tuple(client.seen):
            send(exchange, b"/ ")
        await finish(client)

    asyncio.run(answer())
    assert len(bodies(client.wire.written).split()) == 1000
    assert client.wire.reading
    assert client.state.buffered_bytes == 0


@pytest.mark.parametrize("end", ["lost", "close", "malformed", "draining"])
def test_the_rest_of_a_read_is_dropped_with_its_connection(client, end):
    last = {"close": raw_request("GET", "/last", headers={"Connection": "close"}), "malformed": b"\x00\r\n\r\n"}
    data = TINY * 500 + last.get(end, b"") + TINY * 500

    async def go():
        client.connection.data_received(data)
        assert client.state.buffered_bytes > 0
        client.state.draining = end == "draining"
        if end == "lost":
            client.connection.connection_lost(None)
        await finish(client)

    asyncio.run(go())
    assert client.state.buffered_bytes == 0
    if end in last:
        assert len(client.seen) == 500 + (end == "close")
    else:
        assert len(client.seen) <= 2 * MOST


def test_a_fault_in_a_later_turn_ends_the_connection(client):
    """As one in the first turn does, of which the event loop takes care."""

    async def go():
        failures = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))
        client.connection.data_received(TINY * 1000)
        client.state.handler = None
        await asyncio.sleep(0.01)
        return failures

    (failure,) = asyncio.run(go())
    assert isinstance(failure.__context__, TypeError)
    assert client.wire.aborted


def test_the_rest_of_a_read_counts_against_the_limit_of_all_bodies():
    client = Client(max_body_bytes=1000, max_buffered_bytes=1000)
    client.send(TINY * 1000)
    assert b" 503 " in client.wire.written[-1]
    assert len(client.seen) <= MOST
    assert client.state.buffered_bytes == 0


def test_a_client_that_pipelines_thousands_gets_them_all(make_server):
    server = make_server(Affine())
    count = 3000
    buffer = bytearray()
    with connect(server) as sock:
        sock.sendall(raw_request("GET", "/v2/health/live") * count)
        for _ in range(count):
            assert read_response(sock, buffer=buffer)[0] == 200
        assert not buffer
