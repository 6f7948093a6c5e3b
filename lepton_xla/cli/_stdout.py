"""What a command prints either gets out whole, or the command says that it did not."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from typing import Any

from lepton_xla.errors import LeptonError


class _Watched:
    """Stdout, and what it refused: an `OSError` itself does not say whose it is."""

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
    """Runs what prints to stdout, then sees that all of it was written.

    Raises:
        LeptonError: if stdout is closed, full, or a pipe that nobody reads.
    """
    stream: Any = sys.stdout
    if stream is None:
        # A file that is opened later would get its number, and whatever is printed.
        raise LeptonError("stdout is closed; redirect it to /dev/null if nobody is to read it")
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
            raise LeptonError(f"stdout cannot be written: {watched.error.strerror}") from watched.error


def _flush(watched: _Watched) -> None:
    with contextlib.suppress(OSError):
        watched.flush()


def _give_up(stream: Any) -> None:
    """Has the interpreter not try again when it ends, which would print an error of its own."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
