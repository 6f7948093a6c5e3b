"""What a server listens on: all addresses of a name, and Unix sockets."""

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess

import numpy as np
import pytest
from serve_fakes import Affine, raw_request, read_response

from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options, Server
from lepton_xla.serve.client import AsyncClient, Client
from lepton_xla.serve.http.listening import on_tcp

IPV4 = (socket.AF_INET, socket.SOCK_STREAM, 6, ("127.0.0.1", 0))
IPV6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, ("::1", 0, 0, 0))


def speaks_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


def live(sock):
    sock.sendall(raw_request("GET", "/v2/health/live"))
    return read_response(sock)[0] == 200


def ask(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return contextlib.closing(sock)


@pytest.mark.skipif(not speaks_ipv6(), reason="this machine has no IPv6")
def test_localhost_is_both_families(make_server, monkeypatch):
    found = [(family, kind, protocol, "", address) for family, kind, protocol, address in (IPV6, IPV4, IPV6)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    server = make_server(Affine(), host="localhost")
    assert server.url == f"http://127.0.0.1:{server.address[1]}"
    monkeypatch.undo()
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, server.address[1]), 10) as sock:
            assert live(sock)


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_a_family_that_the_machine_does_not_speak_is_left_out(monkeypatch, number):
    class NoIPv6(socket.socket):
        def bind(self, address):
            if self.family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", NoIPv6)
    listening = on_tcp([IPV6, IPV4], "localhost:0")
    assert [host for host, _ in listening.addresses] == ["127.0.0.1"]
    listening.close()
    with pytest.raises(ServeError, match="cannot listen on localhost:0"):
        on_tcp([IPV6], "localhost:0")


def test_one_public_address_of_a_name_needs_a_guard(monkeypatch):
    found = [(*IPV4[:3], "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ServeError, match="--insecure-public"):
        Server(Affine(), Options(host="name", port=0))


def test_a_unix_socket_serves_and_is_removed(tmp_path):
    path = tmp_path / "Digits.sock"
    limits = Limits(max_connections_per_address=1)
    with Server(Affine(), Options(unix_socket=path, limits=limits)) as server:
        with ask(path) as first, ask(path) as second:  # which have no address
            assert live(first)
            assert live(second)
        x, n = np.ones((2, 4), np.float32), np.ones(2, np.int32)
        with Client(server.url) as client:
            np.testing.assert_array_equal(client.infer(x=x, n=n)["y"], 2 * x + 1)

        async def wait_for_answer():
            async with AsyncClient(server.url) as client:
                return await client.infer(x=x, n=n)

        np.testing.assert_array_equal(asyncio.run(wait_for_answer())["y"], 2 * x + 1)
        if curl := shutil.which("curl"):
            command = [curl, "-s", "--unix-socket", path, "http://localhost/v2/health/live"]
            assert subprocess.run(command, capture_output=True, check=True).stdout == b'{"live":true}'
    assert not path.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o007, 0o770)])
def test_the_umask_says_who_may_connect(tmp_path, umask, mode):
    path = tmp_path / "a.sock"
    before = os.umask(umask)
    try:
        with Server(Affine(), Options(unix_socket=path)):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_file_that_was_left_behind_is_replaced(tmp_path):
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Server(Affine(), Options(unix_socket=path)), ask(path) as sock:
        assert live(sock)


def test_a_socket_that_somebody_listens_on_is_not(tmp_path):
    path = tmp_path / "a.sock"
    with Server(Affine(), Options(unix_socket=path)):
        with pytest.raises(ServeError, match="another server does"):
            Server(Affine(), Options(unix_socket=path)).start()
        with ask(path) as sock:
            assert live(sock)


def test_what_another_has_put_there_is_not_removed(tmp_path):
    path = tmp_path / "a.sock"
    with Server(Affine(), Options(unix_socket=path)):
        path.unlink()
        path.touch()
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [("file", "it exists, and is no socket"), ("no/a.sock", "there is no folder"), ("a" * 108, "at most 107 bytes")],
)
def test_paths_that_cannot_be(tmp_path, monkeypatch, name, why):
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match=why):
        Server(Affine(), Options(unix_socket=tmp_path / name)).start()
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("url", ["http+unix://", "http+unix:///run/a.sock"])
def test_a_url_of_a_unix_socket_names_its_path(url):
    with pytest.raises(ServeError, match="%2F"):
        Client(url)
