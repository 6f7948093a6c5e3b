"""HTTP/1.1: bytes in, exchanges out, answers in order. It knows nothing of models.

A connection has each request that came in whole (`Incoming`) handled as an `Exchange`. Answers may be given in any
order and at any time; they leave in the order of the requests.

Sources: RFC 9112 (HTTP/1.1 messages), RFC 9110 (semantics; 100-continue in section 10.1.1); clause by clause in
`tests/serve/http/test_rfc.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from time import monotonic
from typing import Any

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.date import DATE
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.http.heads import buffer_refusal
from lepton_xla.serve.http.incoming import Incoming
from lepton_xla.serve.http.outgoing import AHEAD_BYTES, Outgoing
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.protocol.traceparent import take_out

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CACHED_HEADS = 512
_CACHED_HEAD_BYTES = 2048
_LINGER_S = 2.0
# With more unanswered requests than this, the connection is not read.
_AHEAD = 64


class Connection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_address",
        "_announced",
        "_closing",
        "_continue",
        "_deadline",
        "_going_on",
        "_in",
        "_last",
        "_limits",
        "_out",
        "_paused_s",
        "_pending",
        "_reading",
        "_stalled",
        "_state",
        "_transport",
    )  # fmt: skip

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._limits = state.limits
        self._transport: Any = None
        self._address = ""
        self._announced = False
        self._pending: deque[Exchange] = deque()
        self._in = Incoming(state, self)
        self._out = Outgoing(state)
        self._closing = False
        self._reading = True
        self._paused_s = 0.0
        self._stalled = inf
        self._deadline = inf
        self._continue = False
        self._going_on = False
        # The last head: most clients repeat it, and comparing is faster than a lookup.
        self._last: Head | None = None

    # Called by `Arrivals`.

    def announce(self, address: str) -> None:
        """Counts the connection before it is made, as during a TLS handshake."""
        self._address = address
        self._announced = True
        self._state.arriving += 1
        self._state.addresses[address] += 1

    def recall(self) -> None:
        """Stops counting it if it was announced but never made."""
        if self._announced:
            self._announced = False
            self._state.arriving -= 1
            self._leave_address()

    @property
    def address(self) -> str:
        """Who is at the other end; empty on a Unix socket."""
        return self._address

    def _leave_address(self) -> None:
        addresses = self._state.addresses
        addresses[self._address] -= 1
        if not addresses[self._address]:
            del addresses[self._address]

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        state, limits = self._state, self._limits
        state.connections.add(self)
        if self._announced:
            self._announced = False
            state.arriving -= 1
        else:
            self._address = str((transport.get_extra_info("peername") or ("",))[0])
            state.addresses[self._address] += 1
        self._deadline = monotonic() + limits.idle_timeout_s

    def connection_lost(self, exc: Exception | None) -> None:
        state = self._state
        state.connections.discard(self)
        self._leave_address()
        self._closing = True
        self._in.end()
        self._out.end()
        for exchange in self._pending:
            state.buffered_bytes -= len(exchange.body)
            exchange.abandon()
        self._pending.clear()

    def eof_received(self) -> None:
        # The transport closes this side too once everything is written. A half-closed connection looks the same as one
        # that the client gave up, whose requests have to be cancelled.
        self._closing = True
        self._deadline = monotonic() + self._limits.write_timeout_s

    def pause_writing(self) -> None:
        self._stalled = monotonic()
        self._out.count(self._transport.get_write_buffer_size())
        self._throttle()

    def resume_writing(self) -> None:
        self._stalled = inf
        self._out.count(0)  # below the low-water mark nothing counts
        self._out.go_on()
        self._throttle()

    def _throttle(self) -> None:
        """Pauses reading while the client does not read its answers or has too many requests open, else resumes."""
        pending = self._pending
        ahead = len(pending) > _AHEAD or (len(pending) > 1 and sum(len(each.body) for each in pending) > AHEAD_BYTES)
        reading = not ahead and self._stalled == inf and not self._out.waiting
        if self._in.rest or self._going_on:
            if reading and not self._going_on:
                self._going_on = True
                asyncio.get_running_loop().call_soon(self._go_on)
            reading = False
        if reading != self._reading and not self._transport.is_closing():
            self._reading = reading
            if reading:
                # The time limit does not run while reading is paused.
                self._deadline += monotonic() - self._paused_s
                self._transport.resume_reading()
            else:
                self._paused_s = monotonic()
                self._transport.pause_reading()

    def _go_on(self) -> None:
        """Parses the rest of a read that was too much for one turn of the event loop."""
        rest = self._in.take_rest()
        if not self._closing:
            try:
                self._feed(rest)
            except Exception:
                self._transport.abort()  # as transports do where `data_received` fails
                raise
        self._going_on = False
        self._throttle()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        incoming = self._in
        if incoming.begun:
            self._feed(data)
            return
        head = self._last
        if head is not None and len(data) == head.size and data.startswith(head.start):
            self._state.buffered_bytes += head.content_length
            self.dispatch(head, data[len(head.start) :], None)
            return
        end = data.find(b"\r\n\r\n", 0, _CACHED_HEAD_BYTES)
        if end < 0:
            self._feed(data)
            return
        heads = self._state.heads
        head = heads.get(data[:end])
        trace = None
        if head is None:
            taken = take_out(data[:end])
            if taken is not None:
                lines, trace = taken
                data, end = lines + data[end:], len(lines)
                head = heads.get(lines)
        come = len(data) - end - 4
        if head is not None and come == head.content_length:
            if trace is None:
                self._last = head
            self._state.buffered_bytes += head.content_length
            self.dispatch(head, data[end + 4 :], trace)
            return
        incoming.trace = trace
        if head is not None and come < head.content_length and b"expect" not in head.headers:
            refusal = incoming.begin(head, data[end + 4 :])
            if refusal is not None:
                self._fail(refusal, head.method)
            return
        self._feed(data)
        if not self._closing:
            self._remember(data, end)

    def _feed(self, data: bytes | memoryview) -> None:
        refusal = self._in.feed(data)
        if refusal is not None:
            self._fail(refusal)
        elif self._in.rest:
            self._throttle()

    def _remember(self, data: bytes, end: int) -> None:
        """Caches the head of data that was one request with a body of the declared length, or the first part of it."""
        incoming, heads, come = self._in, self._state.heads, len(data) - end - 4
        if incoming.messages == 0:
            head = incoming.head_before(come)
        else:
            head = incoming.complete if incoming.messages == 1 and not incoming.begun else None
            if head is not None and come != head.content_length:
                head = None
        if head is not None:
            if len(heads) >= _CACHED_HEADS:
                heads.clear()
            head.start, head.size = data[: end + 4], end + 4 + head.content_length
            heads[data[:end]] = head

    # Called by `Incoming`.

    def expect(self, seconds: float) -> None:
        """Sets the time limit for what the client sends next."""
        if self._closing:  # nothing that comes is read
            return
        self._continue = False
        self._deadline = monotonic() + seconds

    def consider(self, target: bytes, headers: dict[bytes, bytes]) -> None:
        """No-op: this connection takes every request."""

    def invite(self) -> None:
        """Answers `Expect: 100-continue`."""
        if self._closing:
            return
        self._continue = True
        self._send_continue()

    def _send_continue(self) -> None:
        # Only after all earlier answers: the client would take it for one of them.
        if self._continue and not self._pending:
            self._continue = False
            self._transport.write(_CONTINUE)

    def dispatch(self, head: Head, body: bytes, trace: bytes | None) -> None:
        """Passes a request to the handler, or refuses it."""
        state, pending = self._state, self._pending
        if self._closing:
            state.buffered_bytes -= len(body)
            return
        alone = not pending and self._stalled == inf
        if pending and len(pending) >= self._limits.max_pipelined:
            state.buffered_bytes -= len(body)
            many = f"more than {self._limits.max_pipelined} unanswered requests on one connection"
            self._fail(HTTPError(400, many), head.method)
            return
        exchange = Exchange(self, head, body, monotonic())
        if trace is not None:
            exchange.trace = trace
        pending.append(exchange)
        self._deadline = inf
        if not head.keep_alive:
            self._closing = True
        if not alone:
            self._throttle()
        if body and state.buffered_bytes > self._limits.max_buffered_bytes:
            refusal = buffer_refusal()
            state.refused(refusal)
            exchange.refuse(refusal)
            return
        if alone:
            state.handler(exchange)
            return
        self._out.handle(exchange)
        if self._out.waiting and self._reading:
            self._throttle()

    def reserve(self, nbytes: int) -> None:
        """Reserves memory for an answer.

        Raises:
            HTTPError: 503 if the server holds too much already.
        """
        self._out.reserve(nbytes)

    def hold(self, held: bool) -> None:
        """Starts or stops holding back further requests, while the size of an answer is unknown."""
        self._out.held = held
        if not held:
            self._out.go_on()
            self._throttle()

    def flush(self, exchange: Exchange, now_s: float | None = None) -> None:
        """Writes the answers whose turn it is: answers leave in the order of the requests."""
        state, pending = self._state, self._pending
        if not pending:
            return
        if pending[0] is not exchange:
            exchange.body_out = (b"".join(exchange.body_out),)
            exchange = pending[0]
        while (response := exchange.response) is not None:
            if exchange.streaming:
                self._write_on(exchange)
                return
            pending.popleft()
            head = exchange.head
            state.buffered_bytes -= len(exchange.body)
            if exchange.reserved:
                self._out.reserve(-exchange.reserved)
            last = not head.keep_alive
            if state.draining and not self._in.begun:
                # `Connection: close` tells the client that later requests are not read.
                self._closing = True
                last = last or not pending
            tick, body = DATE.ticks, exchange.body_out
            if response.tick != tick:
                # In this order: servers in other threads may share the response.
                response.start = DATE.starts[response.status] + response.fields
                response.tick = tick
            start = response.start
            if last or head.old or exchange.trace is not None:
                start = DATE.starts[response.status] + _fields(exchange, last=last) + response.fields
            if exchange.streamed:
                start = b""
            # A list, because unpacking into a tuple takes longer.
            self._transport.write(b"".join([start, *body]) if body else start)
            if self._stalled != inf:
                self._out.count(self._transport.get_write_buffer_size())
            if last:
                self._finish(unread=not head.target or state.draining)
                return
            if not pending:
                break
            exchange = pending[0]
        if not self._reading:
            self._out.go_on()
            self._throttle()
        if not pending:
            if self._in.begun:
                self._send_continue()
            else:
                self._deadline = (monotonic() if now_s is None else now_s) + self._limits.idle_timeout_s

    def _write_on(self, exchange: Exchange) -> None:
        """Writes what there is of an answer whose body goes on. It keeps its place among the answers."""
        response = exchange.response
        assert response is not None
        pieces = list(exchange.body_out)
        exchange.body_out = ()
        if not exchange.streamed:
            exchange.streamed = True
            trace = b"" if exchange.trace is None else b"Traceparent: " + exchange.trace + b"\r\n"
            pieces.insert(0, DATE.starts[response.status] + trace + response.fields)
        self._transport.write(b"".join(pieces))
        if self._stalled != inf:
            self._out.count(self._transport.get_write_buffer_size())

    def _fail(self, refusal: HTTPError, method: bytes = b"") -> None:
        """Answers a request that cannot be read, after all earlier answers, and closes.

        Args:
            refusal: why.
            method: of the request; by default of the one that is being read.
        """
        if self._closing:
            return
        method = method or self._in.method
        self._closing = True
        self._in.forget()
        self._state.refused(refusal)
        exchange = Exchange(self, Head(method, b"", {}, keep_alive=False, old=False), b"", monotonic())
        self._pending.append(exchange)
        exchange.refuse(refusal)

    def _finish(self, unread: bool) -> None:
        self._closing = True
        plain = self._transport.can_write_eof()
        if unread and plain:
            # Closing a socket with unread bytes resets the connection, and the client could lose the answer.
            self._deadline = monotonic() + _LINGER_S
            self._transport.write_eof()
            return
        # Some data may be left to write: too little for the transport to call `pause_writing`.
        self._deadline = monotonic() + self._limits.write_timeout_s
        self._transport.close()
        if not plain:
            # TLS waits for the client's close_notify. A client that pools the connection does not read ours, and sends
            # none.
            asyncio.get_running_loop().call_later(_LINGER_S, self._part)

    def _part(self) -> None:
        if not self._transport.get_write_buffer_size():
            self._transport.abort()

    # Called by `drain` and `ServerState.sweep`.

    @property
    def unanswered(self) -> int:
        """Number of requests read whose answers are not written yet."""
        return len(self._pending)

    @property
    def owing(self) -> bool:
        """Whether a request has no answer yet, or its answer has not left the process."""
        return bool(self._pending) or self._transport.get_write_buffer_size() > 0

    def quiet_s(self, now: float) -> float:
        """Seconds since the last answer, or since the connection opened; -1 while a request is read or answered."""
        if self._pending or self._in.begun or self._in.rest or self._closing:
            return -1.0
        return now - (self._deadline - self._limits.idle_timeout_s)

    def fileno(self) -> int:
        """The descriptor of its socket."""
        return self._transport.get_extra_info("socket").fileno()

    def end(self) -> None:
        """Closes an idle connection."""
        self._finish(unread=False)

    def give_up(self, refusal: HTTPError) -> None:
        """Answers every open request with an error, and closes."""
        if self._in.begun:
            self._fail(refusal)
        for exchange in tuple(self._pending):
            work = exchange.work
            if not exchange.answered:
                self._state.refused(refusal)
                exchange.refuse(refusal)
            exchange.streaming = False  # a body that is cut off: its client sees that the last chunk is missing
            if work is not None:
                work.cancel()
        if not self._closing:
            self.end()

    def abort(self) -> None:
        """Closes at once."""
        self._transport.abort()

    def sweep(self, now: float) -> None:
        """Closes if a time limit has passed."""
        if self._stalled != inf:
            # The client may be slow but reading.
            self._out.count(self._transport.get_write_buffer_size())
            self._out.go_on()
        if now - self._stalled > self._limits.write_timeout_s or (self._closing and now >= self._deadline):
            self._transport.abort()
        elif now >= self._deadline and (self._reading or not self._in.begun):
            if self._in.begun:
                self._fail(HTTPError(408, "the request did not arrive in time"))
            else:
                self._finish(unread=False)


def _fields(exchange: Exchange, *, last: bool) -> bytes:
    """The header lines that depend on the connection and its request."""
    lines = b"Connection: close\r\n" if last else b"Connection: keep-alive\r\n" if exchange.head.old else b""
    return lines if exchange.trace is None else lines + b"Traceparent: " + exchange.trace + b"\r\n"
