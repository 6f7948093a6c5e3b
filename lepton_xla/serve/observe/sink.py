"""Where log lines go: a stream that may be full, be it for a while."""

from __future__ import annotations

import errno
import io
import os
import select
from typing import IO

_CLOSED = (errno.EPIPE, errno.EBADF)


class ClosedError(OSError):
    """Nobody reads any more, nor will."""


class Sink:
    """Writes whole texts to a stream.

    Past Python's own buffers where the stream has a file: what those could not get rid of would come again with the
    next text, or not at all.

    Args:
        stream: open for writing.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._torn = False
        try:
            self._fd: int | None = stream.fileno()
        except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
            self._fd = None

    def write(self, text: str) -> None:
        """Writes all of a text; waits where the stream takes nothing now.

        Raises:
            ClosedError: if the stream is closed, or nobody reads it.
            OSError: if it takes nothing for another reason. A part that it took ends with a line break later.
        """
        if self._fd is None:
            self._stream.write(text)
            self._stream.flush()
            return
        left = memoryview(("\n" if self._torn else "").encode() + text.encode(errors="backslashreplace"))
        self._torn = False
        while left:
            try:
                written = os.write(self._fd, left)
            except BlockingIOError:
                self._wait(self._fd)
                continue
            except OSError as error:
                if error.errno in _CLOSED:
                    raise ClosedError(error.errno, error.strerror) from error
                raise
            left = left[written:]
            self._torn = bool(left)

    @staticmethod
    def _wait(fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll()
