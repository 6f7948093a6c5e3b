"""Header fields that are new on every request, taken out of a head before it is looked up among those seen before.

Clients repeat their heads byte for byte, and a head that was seen costs a hundredth of one that was not. Proxies and
tracing libraries put a fresh identifier into each: without these lines the heads are equal again. The one that means
something here, W3C Trace Context's `traceparent`, goes on with the request.

Source: W3C Trace Context, Recommendation of 2021, sections 3.2 (traceparent) and 3.3 (tracestate).
"""

from __future__ import annotations

import re

# A whole line of printable characters that is not the request line and that no folded line follows; what is not so
# stays where it is, for the parser to judge.
_LINE = re.compile(
    rb"\r\n(traceparent|tracestate|x-request-id|b3|x-b3-[a-z]+):[ \t]*([ -~]*)(?=\r\n[^ \t]|\Z)", re.IGNORECASE
)
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]*)?")


def take_out(head: bytes) -> tuple[bytes, bytes | None] | None:
    """A head without those lines, and its `traceparent` if it has a valid one; None if it has no such line.

    Args:
        head: request line and header fields, without the blank line.
    """
    found = _LINE.search(head, 1)
    if found is None:
        return None
    given: list[bytes] = []

    def drop(line: re.Match[bytes]) -> bytes:
        if line[1].lower() == b"traceparent":
            given.append(line[2])
        return b""

    rest = head[: found.start()] + _LINE.sub(drop, head[found.start() :])
    # Given twice, it is as if it were not given.
    return rest, valid(given[0]) if len(given) == 1 else None


def valid(value: bytes) -> bytes | None:
    """The value of a `traceparent` header if it is one, as version 00; else None.

    A later version is read as far as version 00 goes, as the standard asks.

    >>> valid(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    b'00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
    >>> valid(b"nonsense") is None
    True
    """
    value = value.strip()
    found = _TRACEPARENT.fullmatch(value)
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[2] is not None):
        return None
    return b"00" + value[2:55]
