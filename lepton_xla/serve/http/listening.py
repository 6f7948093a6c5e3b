"""The sockets that a server listens on: all addresses of a name, or a file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lepton_xla.errors import ServeError

type Found = tuple[int, int, int, tuple[Any, ...]]
"""Family, kind, protocol and address."""

# Where a machine has a name for a family that it does not speak.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
# Ports that are free for one family may be taken for another.
_TRIES = 20
_LONGEST_PATH = 107  # unix(7)


class Listening:
    """What a server listens on.

    Args:
        sockets: bound ones.
        bind: binds more when they open.
        path: the file of a Unix socket, which is removed at the end.

    Attributes:
        sockets: those there are.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        bind: Callable[[], socket.socket] | None = None,
        path: Path | None = None,
    ) -> None:
        self.sockets = list(sockets)
        self._bind = bind
        self._path = path
        self._made: tuple[int, int] | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each; the path and 0 of a Unix socket."""
        if self._path is not None:
            return [(os.fspath(self._path), 0)]
        return [each.getsockname()[:2] for each in self.sockets]

    def open(self, backlog: int) -> None:
        """Listens.

        Raises:
            ServeError: if somebody else does.
        """
        if self._bind is not None:
            self.sockets = [self._bind()]
        if self._path is not None:
            self._made = _identity(self._path)
        for each in self.sockets:
            each.setblocking(False)
            try:
                each.listen(backlog)
            except OSError as error:
                raise ServeError(f"cannot listen on {each.getsockname()}: {error.strerror}") from error

    def close(self) -> None:
        """Listens no more."""
        for each in self.sockets:
            each.close()
        if self._path is not None and self._made is not None and _identity(self._path) == self._made:
            with contextlib.suppress(OSError):
                self._path.unlink()


def on_tcp(found: Sequence[Found], where: str) -> Listening:
    """Binds all addresses of a name, so that a taken port is found before a long warm-up.

    Args:
        found: the addresses. Port 0 is one free port for all of them.
        where: what an error calls them.

    Raises:
        ServeError: if one of them cannot be had. What the machine does not speak is left out, unless nothing is left.
    """
    for _ in range(_TRIES):
        sockets: list[socket.socket] = []
        try:
            failure = _bind_all(found, sockets)
        except OSError as error:
            for each in sockets:
                each.close()
            if error.errno == errno.EADDRINUSE and sockets and not found[0][3][1]:
                continue
            raise _cannot(where, error) from error
        if not sockets and failure is not None:
            raise _cannot(where, failure)
        return Listening(sockets)
    raise ServeError(f"cannot listen on {where}: no port is free for all of its addresses")


def _bind_all(found: Sequence[Found], sockets: list[socket.socket]) -> OSError | None:
    failure = None
    for family, kind, protocol, (host, port, *rest) in found:
        if not port and sockets:
            port = sockets[0].getsockname()[1]
        try:
            made = socket.socket(family, kind, protocol)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            failure = error
            continue
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and len(found) > 1:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((host, port, *rest))
        except OSError as error:
            made.close()
            if error.errno not in _ABSENT:
                raise
            failure = error
            continue
        sockets.append(made)
    return failure


def on_unix(path: Path) -> Listening:
    """A Unix socket, whose file is made when it listens: until then nothing else could tell it from one left behind.

    The umask says who may connect: with 022 only the server's user, with 007 its group too.

    Raises:
        ServeError: if somebody listens there, or there is something else.
    """
    _clear(path, remove=False)

    def bind() -> socket.socket:
        _clear(path, remove=True)
        made = socket.socket(socket.AF_UNIX)
        try:
            made.bind(os.fspath(path))
        except OSError as error:
            made.close()
            raise _cannot(str(path), error) from error
        return made

    return Listening([], bind, path)


def _clear(path: Path, *, remove: bool) -> None:
    """Makes sure that nobody listens at a path, and removes what a server has left there that did not end in order."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ServeError(f"cannot listen on {path}: the path of a Unix socket has at most {_LONGEST_PATH} bytes")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ServeError(f"cannot listen on {path}: there is no folder {path.parent}") from None
        return
    except OSError as error:
        raise _cannot(str(path), error) from error
    if not stat.S_ISSOCK(mode):
        raise ServeError(f"cannot listen on {path}: it exists, and is no socket")
    with socket.socket(socket.AF_UNIX) as asking:
        asking.setblocking(False)
        try:
            asking.connect(os.fspath(path))
        except ConnectionRefusedError:
            if remove:
                path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise _cannot(str(path), error) from error
    raise ServeError(f"cannot listen on {path}: another server does")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _cannot(where: str, error: OSError) -> ServeError:
    return ServeError(f"cannot listen on {where}: {error.strerror}")
