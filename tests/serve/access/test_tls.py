"""TLS and mutual TLS, with certificates made here; what changes while the server runs; who may listen where."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest
from serve_fakes import Affine, affine_binary, exchange, raw_request, read_outputs, read_response, start_script
from serve_tls import Authority, client, connect, copy

from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options, Server
from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.http.reserve import HANDSHAKE_S, RESERVED

X = np.ones((1, 4), np.float32)
INFER = "/v2/models/affine/infer"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def pair(authority, tmp_path):
    """The server's files, in a folder of their own to be changed."""
    made = authority.issue("server", "127.0.0.1")
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    copy(made, TlsFiles(cert, key))
    return TlsFiles(cert, key)


def status_of(server, context, path="/v2/health/live", **kwargs):
    with connect(server, context, **kwargs) as sock:
        sock.sendall(raw_request("GET", path))
        return read_response(sock)[0]


def serial_of(server, context):
    with connect(server, context) as sock:
        return sock.getpeercert()["serialNumber"]


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_answers_come_over_tls(make_server, authority, pair):
    server = make_server(Affine(), tls=pair)
    assert server.url == f"https://127.0.0.1:{server.address[1]}"
    body, fields = affine_binary(np.ones((2000, 4)), range(2000))
    with connect(server, client(authority)) as sock:
        assert sock.version() in ("TLSv1.2", "TLSv1.3")
        for _ in range(3):  # the head is remembered from the first
            sock.sendall(raw_request("POST", INFER, body, fields))
            status, headers, answer = read_response(sock)
            assert status == 200
            expected = 2 + np.arange(2000)[:, None] * np.ones(4)
            np.testing.assert_array_equal(read_outputs(headers, answer)["y"], expected)
        sock.sendall(raw_request("GET", "/v2", b"", {"Connection": "close"}))
        assert read_response(sock)[0] == 200
        assert sock.recv(1) == b""


def test_pipelined_requests_in_pieces_come_over_tls(make_server, authority, pair):
    server = make_server(Affine(), tls=pair)
    data = b"".join(raw_request("POST", INFER, *affine_binary(X, [n])) for n in range(40))
    buffer = bytearray()
    with connect(server, client(authority)) as sock:
        for start in range(0, len(data), 777):
            sock.sendall(data[start : start + 777])
        for n in range(40):
            status, headers, body = read_response(sock, buffer=buffer)
            assert status == 200
            np.testing.assert_array_equal(read_outputs(headers, body)["y"], 2 * X + n)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_are_refused(make_server, authority, pair):
    server = make_server(Affine(), tls=pair)
    old = client(authority)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        status_of(server, old)
    new = client(authority)
    new.maximum_version = ssl.TLSVersion.TLSv1_2
    assert status_of(server, new) == 200


def test_mutual_tls_takes_its_own_clients_only(make_server, authority, stranger, pair):
    server = make_server(Affine(), tls=TlsFiles(pair.cert, pair.key, authority.root))
    mine = authority.issue("client", "someone@example.org")
    theirs = stranger.issue("client", "someone@example.org")
    assert status_of(server, client(authority, mine)) == 200
    for own in (None, theirs):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            status_of(server, client(authority, own))


def test_a_new_certificate_is_taken_without_a_restart(make_server, authority, pair):
    server = make_server(Affine(), tls=pair)
    context = client(authority)
    before = serial_of(server, context)
    with connect(server, context) as kept:
        copy(authority.issue("next", "127.0.0.1"), pair)
        wait_until(lambda: serial_of(server, context) != before)
        kept.sendall(raw_request("GET", "/v2/health/live"))
        assert read_response(kept)[0] == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_other_client_roots_are_taken_without_a_restart(make_server, authority, stranger, pair, tmp_path, version):
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.root.read_bytes())
    server = make_server(Affine(), tls=TlsFiles(pair.cert, pair.key, roots))
    mine = client(authority, authority.issue("client", "someone@example.org"))
    theirs = client(authority, stranger.issue("client", "someone@example.org"))
    mine.minimum_version = mine.maximum_version = version
    with connect(server, mine) as sock:
        sock.sendall(raw_request("GET", "/v2/health/live"))
        assert read_response(sock)[0] == 200
        session = sock.session
    roots.write_bytes(stranger.root.read_bytes())

    def refused(**kwargs):
        try:
            status_of(server, mine, **kwargs)
        except (ssl.SSLError, ConnectionError):
            return True
        return False

    wait_until(refused)
    assert refused(session=session)  # a session that was begun with the old roots is not taken up again
    assert status_of(server, theirs) == 200


@pytest.mark.parametrize("damage", ["half a pair", "no PEM", "missing"])
def test_broken_files_keep_the_old_certificate_and_say_so(make_server, authority, pair, caplog, damage):
    server = make_server(Affine(), tls=pair)
    context = client(authority)
    before = serial_of(server, context)
    new = authority.issue("next", "127.0.0.1")
    if damage == "half a pair":
        pair.cert.write_bytes(new.cert.read_bytes())
    elif damage == "no PEM":
        pair.key.write_text("nonsense")
    else:
        pair.key.unlink()
    wait_until(lambda: "stays in use" in caplog.text)
    assert "key" in caplog.text
    assert serial_of(server, context) == before
    copy(new, pair)
    wait_until(lambda: serial_of(server, context) != before)


def test_a_handshake_that_does_not_come_is_given_up(make_server, pair):
    server = make_server(Affine(), tls=pair, limits=Limits(head_timeout_s=0.3))
    with socket.create_connection(server.address, 10) as sock:
        start = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert time.monotonic() - start < 3


def is_full(server, authority):
    """Whether a connection more gets 503, and yet the health of the server."""
    assert status_of(server, client(authority)) == 200
    return status_of(server, client(authority), path="/v2") == 503


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
def test_handshakes_count_as_connections_and_for_no_longer_than_they_may_take(make_server, authority, pair, limit):
    server = make_server(Affine(), tls=pair, limits=Limits(head_timeout_s=1.0, **{limit: 3}))
    with connect(server, client(authority)) as good, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(server.address, 10)) for _ in range(2)]
        assert is_full(server, authority)
        for sock in silent:
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        wait_until(lambda: not is_full(server, authority))

        def open_now():
            good.sendall(raw_request("GET", "/metrics"))
            return re.search(rb"^lepton_connections (.*)$", read_response(good)[2], re.MULTILINE)[1]

        wait_until(lambda: open_now() == b"1.0")


def test_health_is_answered_beside_handshakes_beyond_the_limits_that_do_not_go_on(make_server, authority, pair):
    """The oldest makes room for the newest."""
    server = make_server(Affine(), tls=pair, limits=Limits(max_connections=1))
    with connect(server, client(authority)), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(server.address, 10)) for _ in range(2 * RESERVED)]
        for _ in range(5):
            assert is_full(server, authority)
        for sock in silent[:RESERVED]:
            sock.settimeout(HANDSHAKE_S / 2)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def test_thousands_of_requests_at_once_are_all_answered(make_server, authority, pair):
    """Reading pauses and goes on between them, which TLS does by other means.

    asyncio is the client since it writes and reads in one thread: an `ssl.SSLSocket` may not be used by two at once.
    """

    async def statuses(count):
        reader, writer = await asyncio.open_connection(
            *server.address, ssl=client(authority), server_hostname="127.0.0.1"
        )
        writer.write(raw_request("GET", "/v2/health/live") * count)
        found = []
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            found.append(int(head.split()[1]))
            await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        with pytest.raises(TimeoutError):  # nothing follows
            await asyncio.wait_for(reader.read(1), 0.1)
        writer.close()
        await writer.wait_closed()
        return found

    server = make_server(Affine(), tls=pair)
    assert asyncio.run(asyncio.wait_for(statuses(8000), 60)) == [200] * 8000


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_plain_http_on_a_port_that_speaks_tls_is_told_so(make_server, pair, method):
    server = make_server(Affine(), tls=pair)
    status, headers, body = exchange(server, method, "/v2/health/live")
    assert (status, headers["connection"]) == (400, "close")
    if method == "HEAD":
        assert not body
    else:
        assert json.loads(body)["error"].startswith("plain HTTP was sent to a port that speaks TLS")


def test_handshakes_that_fail_leave_their_place(make_server, authority, pair):
    server = make_server(Affine(), tls=pair, limits=Limits(max_connections=2))
    stranger = ssl.create_default_context()
    for number in range(12):
        with socket.create_connection(server.address, 10) as sock:
            match number % 4:
                case 0:
                    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    sock.recv(100)
                case 1:
                    with pytest.raises(ssl.SSLError):
                        stranger.wrap_socket(sock, server_hostname="127.0.0.1")
                case 2:
                    sock.sendall(b"\x16\x03\x01\x02\x00\x01")
                case 3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
        wait_until(lambda: not is_full(server, authority))


def test_a_handshake_under_way_when_the_server_stops_is_ended_and_answered(make_server, authority, pair):
    server = make_server(Affine(), tls=pair)
    with socket.create_connection(server.address, 10) as late:
        time.sleep(0.1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.3)
        with client(authority).wrap_socket(late, server_hostname="127.0.0.1") as sock:
            sock.sendall(raw_request("POST", INFER, *affine_binary(X, [1])))
            status, headers, _ = read_response(sock)
            assert (status, headers["connection"]) == (200, "close")
        stopping.join(5)
        assert not stopping.is_alive()


def test_a_client_that_keeps_a_connection_does_not_keep_the_server(make_server, authority, pair):
    """It does not read, so it does not see that TLS has ended, and does not say so in return."""
    server = make_server(Affine(), tls=pair, stop_timeout_s=60)
    with connect(server, client(authority)) as kept:
        kept.sendall(raw_request("GET", "/v2"))
        assert read_response(kept)[0] == 200
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
        assert kept.recv(1) == b""


def test_a_server_does_not_start_with_files_that_do_not_fit(authority, stranger, pair, tmp_path):
    from cryptography.hazmat.primitives import serialization

    other = stranger.issue("other", "127.0.0.1")
    loaded = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.touch(0o600)
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    empty = tmp_path / "empty.pem"
    empty.touch(0o600)
    for files, part in (
        (TlsFiles(pair.cert, other.key), "key values mismatch"),
        (TlsFiles(pair.cert, locked), "locked.key"),
        (TlsFiles(pair.cert, tmp_path / "none"), "No such file"),
        (TlsFiles(tmp_path / "none", pair.key), "No such file"),
        (TlsFiles(empty, pair.key), "empty.pem"),
        (TlsFiles(pair.cert, pair.key, empty), "client CA"),
        (TlsFiles(pair.cert, pair.key, tmp_path / "none"), "client CA"),
    ):
        with pytest.raises(ServeError, match=part) as caught:
            Server(Affine(), Options(port=0, tls=files))
        assert "\n" not in str(caught.value)


PUBLIC = [("0.0.0.0", False), ("::", False), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True),
          ("localhost", True), ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False), ("10.1.2.3", False),
          ("fe80::1%lo", False)]  # fmt: skip


@pytest.mark.parametrize(("host", "private"), PUBLIC)
def test_a_public_address_needs_a_guard(host, private, tmp_path, pair, authority):
    options = {"host": host, "port": 0}
    create_token(tmp_path / "tokens", "t", ["read"])
    if private:
        Server(Affine(), Options(**options))
        return
    for unguarded in ({}, {"tls": pair}):
        with pytest.raises(ServeError, match="--token-file or --tls-client-ca, or --insecure-public"):
            Server(Affine(), Options(**options, **unguarded))
    for guarded in (
        {"token_file": tmp_path / "tokens"},
        {"tls": TlsFiles(pair.cert, pair.key, authority.root)},
        {"insecure_public": True},
    ):
        Server(Affine(), Options(**options, **guarded))


def test_tokens_in_the_clear_are_warned_of(tmp_path, pair, caplog):
    create_token(tmp_path / "tokens", "t", ["read"])
    Server(Affine(), Options(host="0.0.0.0", port=0, token_file=tmp_path / "tokens", tls=pair))
    Server(Affine(), Options(port=0, token_file=tmp_path / "tokens"))
    assert not caplog.text
    Server(Affine(), Options(host="0.0.0.0", port=0, token_file=tmp_path / "tokens"))
    assert "readable" in caplog.text


SCRIPT = """
    import sys
    from pathlib import Path
    from serve_fakes import Affine
    from lepton_xla.serve import Options, Server
    from lepton_xla.serve.observe.logs import configure

    configure(as_json=True)
    options = Options(port=0, token_file=Path(sys.argv[1]))
    Server(Affine((1,)), options).run(on_ready=lambda server: print(server.address[1], flush=True))
"""


def test_sighup_reads_the_files_again_and_stops_nothing(tmp_path):
    file = tmp_path / "tokens"
    create_token(file, "t", ["read"])
    with start_script(SCRIPT, file, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            port = int(process.stdout.readline())
            for _ in range(2):
                process.send_signal(signal.SIGHUP)
                while "read again" not in (line := process.stderr.readline()):
                    assert line, "the signal ended it"
            with socket.create_connection(("127.0.0.1", port), 10) as sock:
                sock.sendall(raw_request("GET", "/v2"))
                assert read_response(sock)[0] == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
