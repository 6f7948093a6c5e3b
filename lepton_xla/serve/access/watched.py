"""What is read from files and read again when they change, while the server runs."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from lepton_xla.errors import ServeError

_log = logging.getLogger("lepton_xla.serve")

type _Look = tuple[tuple[int, ...] | None, ...]


class Watched[T]:
    """A value made from files. A change that cannot be read is logged, and the value made before stays.

    Args:
        paths: the files. Links are followed, so that an orchestrator may swap a link to a directory of secrets.
        read: makes the value; raises `ServeError` where it cannot.

    Attributes:
        value: the last one made.

    Raises:
        ServeError: if the first reading fails.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        # Looked at before they are read: a change in between is then seen at the next look.
        self._seen = self._look()
        self.value = read()

    def refresh(self, *, force: bool = False) -> bool:
        """Reads again if a file changed, or in any case; gives whether there is a new value."""
        seen = self._look()
        if seen == self._seen and not force:
            return False
        self._seen = seen
        try:
            self.value = self._read()
        except ServeError as error:
            _log.error("%s; what was read before stays in use", error)
            return False
        _log.info("read again: %s", ", ".join(map(str, self._paths)))
        return True

    def _look(self) -> _Look:
        return tuple(map(_state, self._paths))


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return None
    # The change time tells of a mode that was put right.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a file that only its owner should reach.

    Args:
        path: the file.
        what: what to call it in errors, such as "token file".

    Raises:
        ServeError: if it cannot be read, or others may write to it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as error:
        raise ServeError(f"cannot read the {what} {path}: {error.strerror}") from error
    except ValueError as error:  # a path that no file can have
        raise ServeError(f"cannot read the {what} {str(path)!r}: {error}") from error
    if mode & 0o022:
        raise ServeError(f"the {what} {path} may be written by others (mode {mode:04o}); chmod 600 it")
    if mode & 0o044:
        _log.warning("the %s %s may be read by others (mode %04o); chmod 600 it", what, path, mode)
    return content
