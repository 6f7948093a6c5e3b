"""Output of several processes as one: whole lines, each with the number of the process that wrote it."""

from __future__ import annotations

import asyncio
from typing import BinaryIO

# Of a line without an end, this much is kept back at most.
_LONGEST_BYTES = 1 << 16
_COLOURS = (36, 33, 35, 32, 34, 31)


class Lines:
    """Writes to one stream. A stream that cannot be written any more is given up: training goes on without it.

    Args:
        stream: such as `sys.stdout.buffer`.
        colour: whether prefixes are coloured.
    """

    def __init__(self, stream: BinaryIO, *, colour: bool) -> None:
        self._stream = stream
        self._colour = colour
        self.error: OSError | None = None

    def write(self, rank: int | None, line: bytes) -> None:
        """Write one line, given without its end."""
        if self.error is not None:
            return
        shown = line.rsplit(b"\r", 1)[-1]  # of a progress bar, what a terminal would show
        try:
            self._stream.write(self._prefix(rank) + shown + b"\n")
            self._stream.flush()
        except OSError as error:
            self.error = error

    def _prefix(self, rank: int | None) -> bytes:
        if rank is None:
            return b""
        text = f"[{rank}]"
        return (f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{text}\x1b[0m " if self._colour else f"{text} ").encode()


async def pump(source: asyncio.StreamReader, rank: int | None, lines: Lines) -> None:
    """Copy a process's output line by line until it ends; a last line without an end is written too."""
    rest = b""
    while chunk := await source.read(_LONGEST_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            lines.write(rank, line.removesuffix(b"\r"))
        if len(rest) > _LONGEST_BYTES:
            lines.write(rank, rest)
            rest = b""
    if rest:
        lines.write(rank, rest)
