"""One HTTP request and its answer: the interface between connection and app."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.response import Response, refuse, respond


class Watcher(Protocol):
    """Is told how an exchange ends, while its `work` is still known."""

    def answered(self, exchange: Exchange, response: Response) -> None:
        """An answer is about to be sent."""
        ...

    def gone(self, exchange: Exchange) -> None:
        """The client went away before its answer."""
        ...


class Answers(Protocol):
    """Takes answers: the connection, which sends them in the order of the requests."""

    @property
    def address(self) -> str:
        """Who is at the other end; empty on a Unix socket."""
        ...

    def flush(self, exchange: Exchange, now_s: float | None = None) -> None:
        """An exchange has its answer. The pieces of its body are only valid until this returns."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Reserves memory for an answer, or releases it if negative. May raise `HTTPError`, 503."""
        ...

    def hold(self, held: bool) -> None:
        """Starts or stops holding back the requests after this one, while the size of its answer is unknown."""
        ...


class Cancellable(Protocol):
    """Work that will answer an exchange."""

    def cancel(self) -> None:
        """The client went away."""
        ...


class Head:
    """Request line and header fields. Equal heads may share an object.

    Attributes:
        method: such as `b"POST"`.
        target: the request target, still percent-encoded.
        headers: lower-case name -> value; repeated fields joined by a comma.
        keep_alive: whether the connection stays open after the answer.
        old: HTTP/1.0, where keep-alive has to be announced.
        content_length: of the body; 0 without one, -1 if it is chunked.
        route: cached by the handler: what answers this head.
        generation: of the handler's routes when it was cached; -1 if it is not.
        start: its bytes with the blank line, if the head is cached.
        size: bytes of head and body, if the head is cached.
    """

    __slots__ = (
        "content_length", "generation", "headers", "keep_alive", "method", "old", "route", "size", "start", "target"
    )  # fmt: skip

    def __init__(self, method: bytes, target: bytes, headers: dict[bytes, bytes], keep_alive: bool, old: bool) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.old = old
        self.content_length = 0
        self.route: Callable[[Exchange], None]
        self.generation = -1
        self.start = b""
        self.size = 0


class Exchange(msgspec.Struct, eq=False):
    """One request and its answer.

    Attributes:
        connection: takes the answer.
        head: request line and headers.
        body: the whole body as sent.
        started_s: when the request was complete, on the monotonic clock.
        work: what will answer it; cancelled if the client goes away first.
        watcher: told how it ended; None for most requests.
        answered: whether it has an answer or needs none any more.
        response: status and header fields of the answer.
        body_out: pieces of its body.
        reserved: bytes reserved for the answer, until it is written.
        streaming: whether its body goes on: it has been begun, and has not been ended.
        streamed: whether its head has been written already.
        choice: how the version that answers was chosen, where several share the requests; what is set by the app.
        trace: the W3C `traceparent` of the request, if valid; the answer repeats it.
    """

    connection: Answers
    head: Head
    body: bytes
    started_s: float
    work: Cancellable | None = None
    watcher: Watcher | None = None
    answered: bool = False
    response: Response | None = None
    body_out: Sequence[bytes | memoryview] = ()
    trace: bytes | None = None
    reserved: int = 0
    streaming: bool = False
    streamed: bool = False
    choice: Any = None

    def reserve(self, nbytes: int) -> None:
        """Reserves memory for the answer.

        Raises:
            HTTPError: 503 if the server holds too much already.
        """
        self.connection.reserve(nbytes)
        self.reserved += nbytes

    def abandon(self) -> None:
        """The client went away."""
        if not self.answered or self.streaming:
            if not self.answered and self.watcher is not None:
                self.watcher.gone(self)
            self.answered, self.streaming = True, False
            work, self.work = self.work, None
            if work is not None:
                work.cancel()

    def answer(self, status: int, body: bytes, content_type: str = "application/json", *extra: str) -> None:
        """Answers with a status, a body, and further header lines such as `Retry-After: 1`."""
        self.send(respond(status, len(body), content_type, *extra), () if self.head.method == b"HEAD" else (body,))

    def begin(self, status: int, content_type: str, *extra: str) -> None:
        """Answers with a body whose length is not known yet: `write` sends it in chunks, and `end` ends it.

        Raises:
            HTTPError: 505 for a client of HTTP/1.0, which knows no chunks.
        """
        if self.answered:
            return
        if self.head.old:
            raise HTTPError(505, "an answer that comes in pieces needs HTTP/1.1")
        close = () if self.head.keep_alive else ("Connection: close",)
        lines = (f"Content-Type: {content_type}", "Transfer-Encoding: chunked", *extra, *close, "\r\n")
        fields = "\r\n".join(lines).encode("latin-1")
        self.answered = self.streaming = True
        self.response = Response(status, fields, len(fields))
        if self.watcher is not None:
            self.watcher.answered(self, self.response)
        self.connection.flush(self)

    def write(self, data: bytes) -> None:
        """Sends a piece of a body that was begun, unless the client went away."""
        if self.streaming and data:
            self.body_out = (*self.body_out, b"%x\r\n%b\r\n" % (len(data), data))
            self.connection.flush(self)

    def end(self) -> None:
        """Ends a body that was begun."""
        if self.streaming:
            self.streaming = False
            self.work = None
            self.body_out = (*self.body_out, b"0\r\n\r\n")
            self.connection.flush(self)

    def refuse(self, refusal: HTTPError) -> None:
        """Answers with an error."""
        if self.head.method == b"HEAD":
            self.send(refuse(refusal.status, refusal.message, refusal.headers, bodiless=True), ())
            return
        if refusal.response is None:
            refusal.response = refuse(refusal.status, refusal.message, refusal.headers, bodiless=False)
        self.send(refusal.response, ())

    def send(self, response: Response, body: Sequence[bytes | memoryview], now_s: float | None = None) -> None:
        """Answers, unless there is an answer already.

        Args:
            response: status and header fields.
            body: pieces of the body. They need only be valid until this returns.
            now_s: the time on the monotonic clock, from who knows it: looking takes a hundredth of a request's time.
        """
        if not self.answered:
            self.answered = True
            self.response = response
            self.body_out = body
            if self.watcher is not None:
                self.watcher.answered(self, response)
            # It refers to this exchange: without a cycle, reference counting frees both.
            self.work = None
            if self.reserved > response.nbytes:
                # The answer may wait long for earlier ones.
                self.reserve(response.nbytes - self.reserved)
            self.connection.flush(self, now_s)
