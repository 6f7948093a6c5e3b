"""The request that arrives on a connection: parsed by httptools (llhttp), and within its limits before it is kept.

What comes in one read may be thousands of requests. A turn of the event loop takes its share of them, and the rest is
kept for the next turns, so that other connections need not wait for all of them.
"""

from __future__ import annotations

from typing import Any, Protocol

import httptools

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Head
from lepton_xla.serve.http.heads import (
    SINGLE,
    body_refusal,
    buffer_refusal,
    head_of,
    header_refusal,
    malformed,
    target_refusal,
)
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.http.upgrade import body_parser, request_parser
from lepton_xla.serve.protocol.traceparent import valid

SLICE_BYTES = 4096
"""Given to the parser at once, unless they are one body."""

SHARE = 64
"""Requests and chunks after which the rest of a read is for the next turn of the event loop."""

# Framing of a chunked body that is not data (sizes, extensions): what one chunk may cost on the wire.
_CHUNK_OVERHEAD = 64


class Owner(Protocol):
    """The connection, as what arrives on it sees it."""

    def expect(self, seconds: float) -> None:
        """Told how long the client may take for what it sends next."""
        ...

    def consider(self, target: bytes, headers: dict[bytes, bytes]) -> None:
        """Told of a head before anything else is made of it; may raise `HTTPError`."""
        ...

    def invite(self) -> None:
        """Told that the client waits for a 100 before it sends the body."""
        ...

    def dispatch(self, head: Head, body: bytes, trace: bytes | None) -> None:
        """Takes a request that is whole, and its `traceparent` if it has a valid one."""
        ...


class Incoming:
    """What one connection has on its way in.

    Args:
        state: what the connections share.
        owner: the connection.

    Attributes:
        begun: whether a request has begun and is not whole yet.
        messages: requests that became whole since the last `feed` began.
        complete: head of the last of them.
        rest: what was read and is for later turns.
        trace: `traceparent` that was taken out of the head that comes next.
    """

    __slots__ = (
        "_body",
        "_chunks",
        "_fields",
        "_framing",
        "_head",
        "_head_bytes",
        "_headers",
        "_left",
        "_limits",
        "_owner",
        "_parser",
        "_state",
        "_steps",
        "_target",
        "_upgrading",
        "begun",
        "complete",
        "messages",
        "rest",
        "trace",
    )  # fmt: skip

    def __init__(self, state: ServerState, owner: Owner) -> None:
        self._state = state
        self._limits = state.limits
        self._owner = owner
        self._parser: Any = request_parser(self)
        self._upgrading = False
        self._steps = 0
        self.messages = 0
        self.complete: Head | None = None
        self.rest: bytes | memoryview = b""
        self.trace: bytes | None = None
        self._begin()
        self.begun = False

    # From the connection.

    @property
    def method(self) -> bytes:
        """Of the request that is read, as far as it has come."""
        if not self.begun:
            return b""
        if self._head is not None:
            return self._head.method
        return self._parser.get_method() if self._target else b""

    def head_before(self, nbytes: int) -> Head | None:
        """The head of the request that is read, if just so much of a body of known length has come."""
        head = self._head if self.begun else None
        return head if head is not None and len(self._body) == nbytes < head.content_length else None

    def begin(self, head: Head, data: bytes) -> HTTPError | None:
        """Reads on after a head that is known; gives why the request is refused, if it is.

        Args:
            head: one whose client does not wait to be told to go on.
            data: of the body what has come, which is not all of it.
        """
        self._begin()
        self.messages = self._steps = 0
        try:
            self._owner.consider(head.target, head.headers)
            self._accept(head)
        except HTTPError as refusal:
            return refusal
        self._left = head.content_length
        return self._read_body(data)

    def feed(self, data: bytes | memoryview) -> HTTPError | None:
        """Reads a turn's share of data and keeps the rest; gives why a request cannot be read, if one cannot."""
        self.messages = self._steps = 0
        if self._left:
            left = self._left
            refusal = self._read_body(bytes(data[:left]))
            if refusal is not None:
                return refusal
            data = data[left:]
        if len(data) > SLICE_BYTES:
            data = memoryview(data)
        while len(data) > SLICE_BYTES:
            size = max(SLICE_BYTES, self._missing())
            refusal = self._parse(data[:size])
            data = data[size:]
            if refusal is not None:
                return refusal
            if self._steps >= SHARE:
                return self._keep(data)
        return self._parse(data) if data else None

    def take_rest(self) -> bytes | memoryview:
        """Gives what is left of the last read, and keeps it no longer."""
        rest, self.rest = self.rest, b""
        self._state.buffered_bytes -= len(rest)
        return rest

    def forget(self) -> None:
        """Drops what arrived and will not be handled."""
        self._state.buffered_bytes -= len(self._body)
        self._body = b""
        self.take_rest()

    def end(self) -> None:
        """The connection is lost."""
        self.forget()
        # They refer back to this: without that, each connection would wait for the garbage collector.
        del self._parser, self._owner

    def _missing(self) -> int:
        """How much of a body of known length is to come, which costs no more for coming at once."""
        return self._head.content_length - len(self._body) if self.begun and self._head is not None else 0

    def _keep(self, rest: bytes | memoryview) -> HTTPError | None:
        state = self._state
        self.rest = rest
        state.buffered_bytes += len(rest)
        return buffer_refusal() if state.buffered_bytes > self._limits.max_buffered_bytes else None

    def _read_body(self, data: bytes) -> HTTPError | None:
        """Takes a piece of a body whose head was known, without the parser."""
        self._left -= len(data)
        try:
            if data:
                self.on_body(data)
        except HTTPError as refusal:
            return refusal
        if not self._left:
            self.on_message_complete()
        return None

    def _parse(self, data: bytes | memoryview) -> HTTPError | None:
        began_before, messages = self.begun, self.messages
        rest = data
        try:
            while True:
                try:
                    self._parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as pause:
                    rest = memoryview(rest)[pause.args[0] :]
                    if self._upgrading:
                        self._upgrading = False
                        assert self._head is not None
                        self._parser = body_parser(self, self._head.content_length)
        except httptools.HttpParserError as error:
            unknown = isinstance(error, httptools.HttpParserInvalidMethodError)
            return _refusal_in(error) or malformed(self.method, unknown)
        # llhttp holds back a field or a chunk extension until it is whole, where no callback sees it grow.
        if began_before and self.begun and self.messages == messages:
            return self._count(len(data))
        return None

    def _count(self, size: int) -> HTTPError | None:
        """Bounds the bytes of a message that are not its body."""
        self._framing += size
        if self._head is None:
            if self._framing > self._limits.max_header_bytes:
                return header_refusal(self._limits)
        elif self._framing > len(self._body) + self._chunks * _CHUNK_OVERHEAD + 2 * self._limits.max_header_bytes:
            return HTTPError(400, "the chunked body has more framing than data")
        return None

    # From the parser.

    def _begin(self) -> None:
        self.begun = True
        self._head: Head | None = None
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._fields = 0
        self._head_bytes = 0
        self._framing = 0
        self._body: bytes | bytearray = b""
        self._left = 0  # of a body that is read without the parser
        self._chunks = 0

    def on_message_begin(self) -> None:
        self._begin()
        self._owner.expect(self._limits.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._head_bytes += len(url)
        if self._head_bytes > self._limits.max_header_bytes:
            raise target_refusal(self._limits)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.max_header_bytes:
            raise header_refusal(self._limits)
        if self._head is not None:
            return  # a trailer: bounded, and of no interest
        self._fields += 1
        if self._fields > self._limits.max_headers:
            raise HTTPError(431, f"more than {self._limits.max_headers} header fields")
        name, value = name.lower(), value.strip(b" \t")
        headers = self._headers
        if name in headers:
            if name in SINGLE:
                raise HTTPError(400, f"header {name.decode('latin-1')} is given twice")
            value = headers[name] + b", " + value
        headers[name] = value

    def on_headers_complete(self) -> None:
        parser, headers = self._parser, self._headers
        self._owner.consider(self._target, headers)
        version = parser.get_http_version()
        head = head_of(
            parser.get_method(), self._target, version, headers, parser.should_keep_alive(), self._limits
        )  # fmt: skip
        self._accept(head)
        self._upgrading = head.content_length != 0 and parser.should_upgrade()
        self._framing = 0
        self._head_bytes = 0
        if headers.get(b"expect", b"").lower() == b"100-continue" and not head.old:
            self._state.invite(head)
            self._owner.invite()

    def _accept(self, head: Head) -> None:
        """Goes on to the body."""
        if head.content_length:
            # Before the body: who may not ask cannot make the server hold one.
            self._state.admit(head)
        self._head = head
        self._owner.expect(self._limits.body_timeout_s)

    def on_chunk_header(self) -> None:
        self._steps += 1
        self._chunks += 1
        if self._chunks > self._limits.max_chunks:
            raise HTTPError(413, f"the body has more than {self._limits.max_chunks} chunks")

    def on_body(self, data: bytes) -> None:
        # One piece, not a list of them: an object a chunk would cost fifty times the bytes that it carries.
        if not self._body:
            self._body = data
        elif type(self._body) is bytearray:
            self._body += data
        else:
            self._body = bytearray().join((self._body, data))
        state = self._state
        state.buffered_bytes += len(data)
        if len(self._body) > self._limits.max_body_bytes:
            raise body_refusal(self._limits)
        if state.buffered_bytes > self._limits.max_buffered_bytes:
            raise buffer_refusal()

    def on_message_complete(self) -> None:
        if self._upgrading:
            return  # the body is to come
        head = self.complete = self._head
        assert head is not None
        self.begun = False
        self.messages += 1
        self._steps += 1
        body, self._body = bytes(self._body), b""
        trace, self.trace = self.trace, None
        if trace is None and b"traceparent" in head.headers:
            trace = valid(head.headers[b"traceparent"])
        self._owner.dispatch(head, body, trace)


def _refusal_in(error: Exception) -> HTTPError | None:
    """What a callback refused, if the parser's error is of one; a fault in a callback is raised."""
    cause = error.__context__
    if cause is None:
        return None
    if not isinstance(cause, HTTPError):
        raise error
    return cause.bare()
