"""The audit log: who changed what, one JSON object a line, only ever appended to.

Several processes may write to one file, and one line is one write, flushed to the disk before the change is answered.
A line that a crash or a full disk cut short is ended by the next one and passed over by readers. The file is renamed to
`FILE.1` when it is full, `FILE.1` to `FILE.2`, and so on; the oldest one goes.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import msgspec

from lepton_xla.errors import ServeError
from lepton_xla.serve.protocol.auditing import AuditEntry, Value

MAX_FILE_BYTES = 16 << 20
KEPT_FILES = 4
# A line is bounded before it is written: names and reasons may come from a request.
_MAX_TEXT = 512
_MAX_DETAILS = 32
_MAX_LINE_BYTES = 32 << 10
_BLOCK_BYTES = 64 << 10
# Secrets of `leptonx token create`, wherever a caller put them.
_SECRET = re.compile(r"leptonx_[A-Za-z0-9_-]{8,}")

_DECODER = msgspec.json.Decoder(AuditEntry)


class Audit:
    """An audit log in a file.

    Args:
        path: the file; it is made if it is missing, readable by its owner only.
        max_bytes: size at which a new file is begun.
        kept_files: number of full files that are kept.
        clock: the time (Unix, in seconds).

    Raises:
        ServeError: if the file cannot be written.

    >>> audit = Audit("audit.jsonl")
    >>> audit.record("ci", "promote", "digits/3", "done", address="10.0.0.7", digest="9f86d081")
    >>> [(entry.who, entry.target, entry.details["address"]) for entry in audit.tail(1)]
    [('ci', 'digits/3', '10.0.0.7')]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_FILE_BYTES,
        kept_files: int = KEPT_FILES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        try:
            # A link is followed once, or renaming full files would rename the link.
            self._path = Path(os.path.realpath(path))
        except ValueError as error:  # a path that no file can have
            raise ServeError(f"the audit log {os.fsdecode(path)!r} cannot be used: {error}") from error
        self._max_bytes = max_bytes
        self._kept_files = kept_files
        self._clock = clock
        with self._opened(fcntl.LOCK_EX):
            pass

    def record(self, who: str, action: str, target: str, outcome: str, **details: Value) -> None:
        """Append a line and flush it to the disk, which takes milliseconds: do not call it on an event loop.

        Texts are cut after 512 characters, and secrets of tokens in them are blotted out.

        Raises:
            ServeError: if it cannot be written; the file then ends where it ended before.
        """
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        told = {_text(name): _value(value) for name, value in list(details.items())[:_MAX_DETAILS]}
        entry = AuditEntry(
            now.isoformat(timespec="milliseconds"), _text(who), _text(action), _text(target), _text(outcome)
        )
        line = msgspec.json.encode(msgspec.structs.replace(entry, details=told)) + b"\n"
        if len(line) > _MAX_LINE_BYTES:
            line = msgspec.json.encode(msgspec.structs.replace(entry, details={"omitted": "too long"})) + b"\n"
        with self._opened(fcntl.LOCK_EX) as file:
            size = os.fstat(file).st_size
            if size + len(line) > self._max_bytes and size:
                self._begin_file()
                self._append_to_current(line)
            else:
                self._append(file, size, line)

    def tail(self, n: int) -> list[AuditEntry]:
        """The last `n` entries, the latest last.

        Raises:
            ServeError: if the file cannot be read.
        """
        found: list[AuditEntry] = []
        if n <= 0:
            return found
        # The lock keeps files from being renamed meanwhile.
        with self._opened(fcntl.LOCK_SH):
            for path in (self._path, *map(self._full, range(1, self._kept_files + 1))):
                for line in _lines_from_end(path):
                    with contextlib.suppress(msgspec.DecodeError):  # a line that was cut short
                        found.append(_DECODER.decode(line))
                    if len(found) == n:
                        return found[::-1]
        return found[::-1]

    @contextlib.contextmanager
    def _opened(self, lock: int) -> Generator[int]:
        """The current file, locked; the lock is given up with it, also by a process that is killed."""
        try:
            while True:
                file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(file, lock)
                    if self._is_current(file):
                        yield file
                        return
                finally:
                    os.close(file)
        except OSError as error:
            raise ServeError(f"the audit log {self._path} cannot be used: {error.strerror or error}") from error

    def _is_current(self, file: int) -> bool:
        """Whether nobody renamed the file before it was locked."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _append(self, file: int, size: int, line: bytes) -> None:
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            written = os.write(file, line)
            if written != len(line):
                raise OSError(0, f"only {written} of {len(line)} bytes were written")
            os.fsync(file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)
            raise

    def _append_to_current(self, line: bytes) -> None:
        """Append to the file that was just begun. Another process may have been first to write to it."""
        with self._opened(fcntl.LOCK_EX) as file:
            self._append(file, os.fstat(file).st_size, line)

    def _begin_file(self) -> None:
        for number in range(self._kept_files, 0, -1):
            older = self._path if number == 1 else self._full(number - 1)
            with contextlib.suppress(FileNotFoundError):
                older.replace(self._full(number))
        if not self._kept_files:
            self._path.unlink()
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _full(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first, without reading more of it than is asked for."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            first, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from filter(None, reversed(lines))
            end, rest = start, first
            if len(rest) > _MAX_LINE_BYTES:  # no line of ours
                rest = b""
        if rest:
            yield rest


def _text(value: str) -> str:
    # Blotted out before it is cut, or a part of a secret would be left.
    text = _SECRET.sub("leptonx_***", value[: 2 * _MAX_TEXT])
    cut = text if len(value) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."
    # JSON has no lone surrogates, which names of files may hold.
    return cut.encode("utf-8", "backslashreplace").decode()


def _value(value: Value) -> Value:
    return value if value is None or isinstance(value, bool | int | float) else _text(str(value))
