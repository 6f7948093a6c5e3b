"""How to read on after a request that asks for another protocol, which a server may ignore (RFC 9110, section 7.8).

The parser takes such a request's head for the last of HTTP/1.1. Without a body it can be told to go on. With one it
would take the body for the next request; so another parser is told a head of the same framing, and then the rest.
"""

from __future__ import annotations

from typing import Any, Protocol

import httptools


class Callbacks(Protocol):
    """What a parser calls."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_chunk_header(self) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


def request_parser(callbacks: Callbacks) -> Any:
    """A parser of requests that leaves it to the callbacks which versions there are."""
    parser: Any = httptools.HttpRequestParser(callbacks)
    parser.set_dangerous_leniencies(lenient_version=True)
    return parser


def body_parser(callbacks: Callbacks, content_length: int) -> Any:
    """A parser that stands before a body, whose head was told.

    Args:
        callbacks: told of the body, and of all requests that come after it.
        content_length: of the body, -1 for a chunked one.
    """
    parser = request_parser(_AfterHead(callbacks))
    framing = b"Transfer-Encoding: chunked" if content_length < 0 else b"Content-Length: %d" % content_length
    parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
    return parser


class _AfterHead:
    """Keeps the first head to itself."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._told = False
        self.on_chunk_header = callbacks.on_chunk_header
        self.on_body = callbacks.on_body
        self.on_message_complete = callbacks.on_message_complete

    def on_message_begin(self) -> None:
        if self._told:
            self._callbacks.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._told:
            self._callbacks.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._told:
            self._callbacks.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._told:
            self._callbacks.on_headers_complete()
        self._told = True
