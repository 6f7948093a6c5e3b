"""Status and header fields of answers. The connection adds the fields that depend on it."""

from __future__ import annotations

import functools

import msgspec


class Response(msgspec.Struct, eq=False):
    """Status and header fields of an answer. Equal answers may share one.

    Attributes:
        status: the HTTP status.
        fields: header lines and the blank line, then the part of the body that all its answers share. `Date`,
            `Connection` and `Traceparent` are left to the connection.
        nbytes: size of `fields` and the rest of the body.
        start, tick: kept by connections: how the answer begins, from the status line to the end of `fields`, and the
            `Date.ticks` for which that holds.
    """

    status: int
    fields: bytes
    nbytes: int
    start: bytes = b""
    tick: int = -1


def respond(status: int, body_bytes: int, content_type: str = "application/json", *extra: str) -> Response:
    """Makes the status and header fields of an answer.

    Args:
        status: the HTTP status.
        body_bytes: length of the body.
        content_type: type of the body.
        extra: further header lines, such as `Retry-After: 1`.
    """
    lines = (f"Content-Type: {content_type}", f"Content-Length: {body_bytes}", *extra, "\r\n")
    if status == 204:  # has no body, nor its length (RFC 9110, section 8.6)
        lines = (*extra, "\r\n")
    fields = "\r\n".join(lines).encode("latin-1")
    return Response(status, fields, len(fields) + body_bytes)


@functools.lru_cache(maxsize=256)
def refuse(status: int, message: str, headers: tuple[str, ...], bodiless: bool) -> Response:
    """Makes an error answer with its whole body. Cached: an overloaded server repeats them."""
    if status == 503 and not any(line.startswith("Retry-After:") for line in headers):
        headers = (*headers, "Retry-After: 1")
    body = msgspec.json.encode({"error": message})
    response = respond(status, len(body), "application/json", *headers)
    return response if bodiless else Response(status, response.fields + body, response.nbytes)
