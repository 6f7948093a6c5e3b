"""Detects output that could not be written to stdout, and reports it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

from lepton_xla.errors import LeptonError


class _Watched:
    """Stdout that records its write errors, because an `OSError` does not say which file it is about."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def stdout_checked() -> Generator[None, None, None]:
    """Check after the block that everything it printed to stdout was written.

    Raises:
        LeptonError: if stdout is closed or full.
        SystemExit: if it is a pipe whose reader has seen enough, such as `head`: silently, with the exit code that a
            shell gives to programs that SIGPIPE ends.
    """
    stream: Any = sys.stdout
    if stream is None:
        # The next file to be opened would get file descriptor 1, and with it everything that is printed.
        raise LeptonError("stdout is closed; redirect it to /dev/null to discard the output")
    watched: Any = _Watched(stream)
    sys.stdout = watched
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(_flush, watched)
            yield
    except OSError:
        if watched.error is None:
            raise
    finally:
        sys.stdout = stream
        if watched.error is not None:
            _give_up(stream)
            if watched.error.errno == errno.EPIPE:
                sys.exit(128 + signal.SIGPIPE)
            raise LeptonError(f"stdout cannot be written: {watched.error.strerror}") from watched.error


def _flush(watched: _Watched) -> None:
    with contextlib.suppress(OSError):
        watched.flush()


def _give_up(stream: Any) -> None:
    """Stop the interpreter from flushing the stream again at exit, which would print a second error."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
