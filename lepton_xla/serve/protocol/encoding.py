"""Content codings of HTTP bodies: gzip and deflate, both ways, with a bound on what inflating may produce.

`deflate` is the zlib format of RFC 1950, as RFC 9110 section 8.4.1.2 says, not a bare RFC 1951 stream.
"""

from __future__ import annotations

import zlib

from lepton_xla.serve.errors import HTTPError

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
# RFC 9110, section 8.4.1.3.
_SAME = {"x-gzip": "gzip"}
CODINGS = ", ".join(_WINDOW)
_PIECE_BYTES = 1 << 14
_MEMBERS = 4096  # of one gzip body; tools that make blocks for random access make one of every 64 KiB
_LONGEST_ACCEPT = 1024  # of what a client accepts, no more is looked at
_LEVEL = 1  # a server's time is dearer than the last tenth of a size


def inflate(body: bytes, coding: str, max_bytes: int) -> bytes:
    """Decompress a request body.

    Args:
        body: as sent.
        coding: the value of `Content-Encoding`.
        max_bytes: most bytes it may become.

    Raises:
        HTTPError: 415 for another coding, 400 for a damaged or truncated body, 413 if it becomes too large.

    >>> inflate(deflate(b"tensors", "gzip"), "gzip", max_bytes=100)
    b'tensors'
    """
    coding = _SAME.get(coding, coding)
    window = _WINDOW.get(coding)
    if window is None:
        raise HTTPError(415, f"this Content-Encoding is not supported; use {CODINGS}", f"Accept-Encoding: {CODINGS}")
    parts: list[bytes] = []
    view = memoryview(body)
    room, at, members = max_bytes, 0, 0
    while at < len(body):
        if members == (_MEMBERS if coding == "gzip" else 1):
            raise HTTPError(400, f"the {coding} body goes on after its end")
        members += 1
        stream = zlib.decompressobj(window)
        while not stream.eof:
            if at == len(body):
                raise HTTPError(400, f"the {coding} body is truncated")
            # In pieces, because zlib copies what follows a member: many members would copy all the rest for each.
            piece = view[at : at + _PIECE_BYTES]
            try:
                # One byte more than allowed tells "too large" from "exactly as large as allowed".
                part = stream.decompress(piece, room + 1)
            except zlib.error as error:
                raise HTTPError(400, f"the body is not valid {coding}") from error
            room -= len(part)
            if room < 0:
                raise HTTPError(413, f"the body exceeds {max_bytes} bytes when decompressed")
            parts.append(part)
            at += len(piece) - len(stream.unused_data)
    return b"".join(parts)


def inflate_short(body: bytes, coding: str, max_bytes: int) -> bytes | None:
    """As `inflate`, but None where it becomes too large: an answer that is found in little time, whatever came.

    Raises:
        HTTPError: 415 or 400, as `inflate`.

    >>> inflate_short(deflate(bytes(1000), "gzip"), "gzip", max_bytes=100) is None
    True
    """
    if len(body) > max_bytes:
        return None
    try:
        return inflate(body, coding, max_bytes)
    except HTTPError as refusal:
        if refusal.status != 413:
            raise
        return None


def start_of(body: bytes, coding: str, most: int = 4096) -> bytes:
    """The first bytes of a body, as far as they can be read; all of a body that is not compressed.

    >>> start_of(deflate(b'{"id": "a"}', "gzip"), "gzip")
    b'{"id": "a"}'
    """
    if coding in ("", "identity"):
        return body
    try:
        return zlib.decompressobj(_WINDOW[_SAME.get(coding, coding)]).decompress(body[:most], most)
    except (KeyError, zlib.error):
        return b""


def choose(accept_encoding: str) -> str | None:
    """The coding to answer with: the one of ours that `Accept-Encoding` weighs most, or None for no coding.

    >>> choose("gzip;q=0.5, deflate"), choose("br")
    ('deflate', None)
    """
    best, best_weight = None, 0.0
    listed: dict[str, float] = {}
    for item in accept_encoding[:_LONGEST_ACCEPT].lower().split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        listed[_SAME.get(coding, coding)] = weight
    for coding in _WINDOW:
        weight = listed.get(coding, listed.get("*", 0.0))
        if weight > best_weight:
            best, best_weight = coding, weight
    return best


def deflate(body: bytes, coding: str) -> bytes:
    """Compress a response body with a coding that `choose` gave.

    >>> len(deflate(bytes(1000), "deflate")) < 100
    True
    """
    stream = zlib.compressobj(_LEVEL, wbits=_WINDOW[coding])
    return stream.compress(body) + stream.flush()
