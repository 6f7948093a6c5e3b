"""The `Date` field of answers (RFC 9110, section 6.6.1), written out anew by the sweep and not by each answer."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

_STATUS_LINES = {int(each): f"HTTP/1.1 {each} {each.phrase}\r\n".encode("ascii") for each in HTTPStatus}


class Date:
    """The time as answers say it.

    Attributes:
        starts: how answers begin, by status: the status line and the date.
        ticks: how often they have changed.
    """

    __slots__ = ("starts", "ticks")

    def __init__(self) -> None:
        self.ticks = 0
        self.tick(time.time())

    def tick(self, now_s: float) -> None:
        """Takes the time (Unix)."""
        date = f"Date: {formatdate(now_s, usegmt=True)}\r\n".encode("ascii")
        self.starts = {status: line + date for status, line in _STATUS_LINES.items()}
        self.ticks += 1


DATE = Date()
"""That of this process. Like the clock that it follows there is one, whatever the number of servers."""
