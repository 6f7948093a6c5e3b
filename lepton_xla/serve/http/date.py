"""The `Date` field of answers (RFC 9110, section 6.6.1), written out anew by the sweep and not by each answer."""

from __future__ import annotations

import time
from email.utils import formatdate


class Date:
    """The time as answers say it.

    Attributes:
        field: `Date: ...` as a line of a head.
        ok: how every answer with status 200 begins: the status line and the date.
    """

    __slots__ = ("field", "ok")

    def __init__(self) -> None:
        self.tick(time.time())

    def tick(self, now_s: float) -> None:
        """Takes the time (Unix)."""
        self.field = f"Date: {formatdate(now_s, usegmt=True)}\r\n".encode("ascii")
        self.ok = b"HTTP/1.1 200 OK\r\n" + self.field


DATE = Date()
"""That of this process. Like the clock that it follows there is one, whatever the number of servers."""
