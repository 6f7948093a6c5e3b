"""One HTTP request and its answer: the interface between connection and app."""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

import msgspec

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.date import DATE


class Answers(Protocol):
    """Takes answers: the connection, which sends them in the order of the requests."""

    def flush(self) -> None:
        """An exchange has its answer."""
        ...

    def abandoned(self) -> None:
        """The client of an exchange went away before its answer."""
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
    """

    __slots__ = ("content_length", "generation", "headers", "keep_alive", "method", "old", "route", "start", "target")

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


class Exchange(msgspec.Struct, eq=False):
    """One request and its answer.

    Attributes:
        connection: takes the answer.
        head: request line and headers.
        body: the whole body as sent.
        started_s: when the request was complete, on the monotonic clock.
        work: what will answer it; cancelled if the client goes away first.
        answered: whether it has an answer or needs none any more.
        payload: the answer.
        reserved: bytes reserved for the answer, until it is written.
        trace: the W3C `traceparent` of the request, if valid; the answer repeats it.
    """

    connection: Answers
    head: Head
    body: bytes
    started_s: float
    work: Cancellable | None = None
    answered: bool = False
    payload: bytes | None = None
    trace: bytes | None = None
    reserved: int = 0

    def reserve(self, nbytes: int) -> None:
        """Reserves memory for the answer.

        Raises:
            HTTPError: 503 if the server holds too much already.
        """
        self.connection.reserve(nbytes)
        self.reserved += nbytes

    def abandon(self) -> None:
        """The client went away."""
        if not self.answered:
            self.answered = True
            work, self.work = self.work, None
            if work is not None:
                work.cancel()
            self.connection.abandoned()

    def answer(self, status: int, body: bytes, content_type: str = "application/json", *extra: str) -> None:
        """Answers with a status, a body, and further header lines such as `Retry-After: 1`."""
        self.send(_head(status, len(body), content_type, extra) + (b"" if self.head.method == b"HEAD" else body))

    def refuse(self, refusal: HTTPError) -> None:
        """Answers with an error."""
        head, body = _refusal(refusal.status, refusal.message, refusal.headers, DATE.field)
        self.send(head if self.head.method == b"HEAD" else head + body)

    def send(self, payload: bytes) -> None:
        """Answers with a whole response, status line included."""
        if not self.answered:
            self.answered = True
            # It refers to this exchange: without a cycle, reference counting frees both.
            self.work = None
            if self.trace is not None:
                payload = payload.replace(b"\r\n", b"\r\nTraceparent: " + self.trace + b"\r\n", 1)
            self.payload = payload
            if self.reserved > len(payload):
                # The answer may wait long for earlier ones.
                self.reserve(len(payload) - self.reserved)
            self.connection.flush()


def _head(status: int, body_bytes: int, content_type: str, extra: tuple[str, ...]) -> bytes:
    """Status line and header fields, with the blank line."""
    lines = (f"Content-Type: {content_type}", f"Content-Length: {body_bytes}", *extra, "\r\n")
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return line.encode() + DATE.field + "\r\n".join(lines).encode("latin-1")


@functools.lru_cache(maxsize=256)
def _refusal(status: int, message: str, headers: tuple[str, ...], date: bytes) -> tuple[bytes, bytes]:
    """Head and body of an error, cached for one date: an overloaded server repeats them."""
    if status == 503 and not any(line.startswith("Retry-After:") for line in headers):
        headers = (*headers, "Retry-After: 1")
    body = msgspec.json.encode({"error": message})
    return _head(status, len(body), "application/json", headers), body
