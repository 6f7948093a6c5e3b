"""Packets between two processes of a server, over a Unix socket that preserves their boundaries (SOCK_SEQPACKET)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence

_log = logging.getLogger("lepton_xla.serve")

MOST_BYTES = 1 << 16
"""Size of the largest packet."""

MOST_FDS = 64
"""Most file descriptors in one packet."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Packets:
    """One end of a connection. What is written in one turn of the event loop goes out in one packet.

    Args:
        sock: from `pair`.
        received: called with each packet and its descriptors, which it has to close. If it raises, the packet is
            invalid and the connection closes.
        lost: called once when the peer is gone or has sent an invalid packet.
        loop: the event loop.
        with_fds: whether packets may carry descriptors; otherwise they are dropped.

    Attributes:
        closed: whether the connection has ended.
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[bytes, list[int]], object],
        lost: Callable[[], object],
        loop: asyncio.AbstractEventLoop,
        *,
        with_fds: bool,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._received = received
        self._lost = lost
        self._loop = loop
        self._entries: list[bytes] = []
        self._scheduled = False
        self._blocked = False
        self.closed = False
        self._with_fds = with_fds
        loop.add_reader(sock, self._read)

    def write(self, entry: bytes) -> None:
        """Queues an entry. All entries of one turn of the event loop share a packet; none is split."""
        self._entries.append(entry)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def offer(self, packet: bytes, fds: Sequence[int]) -> bool:
        """Sends a packet at once, with copies of descriptors; False if the socket is full."""
        if self.closed:
            return False
        try:
            if fds:
                socket.send_fds(self._socket, [packet], fds)
            else:
                self._socket.send(packet)
        except OSError:
            return False  # a peer that is gone is seen by the reader
        return True

    def close(self) -> None:
        """Closes the connection without calling `lost`; unsent entries are dropped."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._socket)
            if self._blocked:
                self._loop.remove_writer(self._socket)
            self._socket.close()

    def flush(self) -> None:
        """Sends the queued entries, as far as the socket takes them."""
        entries = self._entries
        try:
            while entries and not self.closed:
                packet = b"".join(entries)
                count = len(entries)
                if len(packet) > MOST_BYTES:
                    packet, count = _first(entries)
                self._socket.send(packet)
                del entries[:count]
        except BlockingIOError:
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self._socket, self.flush)
            return
        except (BrokenPipeError, ConnectionResetError):
            entries.clear()  # the reader sees it too, after what the peer had sent
        except OSError:
            _log.exception("a packet could not be sent to another process of this server")
            self._fail()
        if self._blocked and not self.closed:
            self._blocked = False
            self._loop.remove_writer(self._socket)

    def _flush(self) -> None:
        self._scheduled = False
        self.flush()

    def _read(self) -> None:
        reset = False
        while not self.closed:
            try:
                packet, fds = self._receive()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionResetError:
                # What the peer sent before it went can still be read; uvloop does not call again for it.
                reset = True
                continue
            if not (packet and self._hand_over(packet, fds)):
                self._fail()
            elif not reset:
                return

    def _fail(self) -> None:
        if not self.closed:
            self.close()
            self._lost()

    def _receive(self) -> tuple[bytes, list[int]]:
        if not self._with_fds:
            return self._socket.recv(MOST_BYTES), []
        packet, fds, _, _ = socket.recv_fds(self._socket, MOST_BYTES, MOST_FDS)
        return packet, fds

    def _hand_over(self, packet: bytes, fds: list[int]) -> bool:
        try:
            self._received(packet, fds)
        except Exception:
            _log.exception("another process of this server sent an invalid packet")
            return False
        return True


def _first(entries: Sequence[bytes]) -> tuple[bytes, int]:
    """As many of the first entries as fit into a packet, at least one, and their number."""
    size = count = 0
    for entry in entries:
        size += len(entry)
        if size > MOST_BYTES and count:
            break
        count += 1
    return b"".join(entries[:count]), count


def close_all(fds: Sequence[int]) -> None:
    """Closes file descriptors."""
    for fd in fds:
        os.close(fd)
