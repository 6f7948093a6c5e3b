"""What the audit log tells over HTTP."""

from __future__ import annotations

from urllib.parse import parse_qs

import msgspec

from lepton_xla.serve.errors import HTTPError

MAX_ENTRIES = 1000
_DEFAULT_ENTRIES = 100

type Value = str | int | float | bool | None


class AuditEntry(msgspec.Struct, frozen=True):
    """One line of the audit log.

    Attributes:
        time: when it was written: UTC, ISO 8601, with milliseconds.
        who: the name of the token that asked, or of the part of the server that decided.
        action: what was done, such as `promote`.
        target: what it was done to, such as `digits/3`.
        outcome: how it ended, such as `done` or `refused`.
        details: whatever else is known, such as `address`, `digest` and `reason`.
    """

    time: str
    who: str
    action: str
    target: str
    outcome: str
    details: dict[str, Value] = {}


def entries_asked(target: bytes) -> int:
    """How many entries a request asks for: the parameter `limit`, at most 1000, by default 100.

    Raises:
        HTTPError: 400 if it is not such a number, or there are other parameters.

    >>> entries_asked(b"/v2/audit?limit=7"), entries_asked(b"/v2/audit")
    (7, 100)
    """
    query = target.partition(b"?")[2][:200].decode("latin-1")
    if not query:
        return _DEFAULT_ENTRIES
    try:
        ((name, (text,)),) = parse_qs(query, keep_blank_values=True, strict_parsing=True).items()
    except ValueError:
        name, text = "", ""
    if name != "limit" or not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_ENTRIES:
        raise HTTPError(400, f"the only parameter is limit, a number from 1 to {MAX_ENTRIES}")
    return int(text)
