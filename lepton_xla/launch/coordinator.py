"""The address where the processes of a run meet: whether it is free, whether it answers, and a port of one's own."""

from __future__ import annotations

import contextlib
import socket
import time

from lepton_xla.errors import LaunchError

_ATTEMPT_S = 5.0
_PAUSE_S = 0.2


def split(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        LaunchError: if the address is not `host:port`.

    >>> split("[::1]:1234")
    ('::1', 1234)
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"the coordinator's address {address!r} is not host:port with a port of 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_free(address: str) -> None:
    """Check that process 0 can listen on the coordinator's port.

    gRPC lets several processes listen on one port, and then mixes two runs. So this also tries to connect.

    Raises:
        LaunchError: if something listens there, or the port cannot be bound.
    """
    host, port = split(address)
    try:
        reserve(port).close()
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_ATTEMPT_S):
            raise LaunchError(f"the coordinator's port {port} is in use: another program listens on {address}")
    except OSError as error:
        raise LaunchError(f"the coordinator's port {port} is in use or not allowed: {error.strerror}") from error


def wait_for(address: str, timeout_s: float, who: str) -> None:
    """Wait until the coordinator accepts connections.

    Raises:
        LaunchError: if it does not within the time; the message names the last reason.
    """
    host, port = split(address)
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=min(_ATTEMPT_S, timeout_s)).close()
        except OSError as error:
            if time.monotonic() + _PAUSE_S > end:
                raise LaunchError(
                    f"{who}: the coordinator {address} does not answer after {timeout_s:g} s "
                    f"({error.strerror or 'no answer'}): does process 0 run, and may this machine reach that port?"
                ) from error
            time.sleep(_PAUSE_S)
        else:
            return


def reserve(port: int = 0) -> socket.socket:
    """Bind a port of this machine, by default a free one, without listening.

    While the socket is open, no other program gets the port by chance, and process 0 can still listen on it: gRPC sets
    `SO_REUSEPORT` too.

    Raises:
        OSError: if the port is in use.
    """
    dual = socket.has_dualstack_ipv6()
    bound = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    try:
        if dual:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("", port))
    except OSError:
        bound.close()
        raise
    return bound
