"""One HTTP request and its answer: what lies between the connection that reads bytes and the app that knows models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

import msgspec

from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.http.date import DATE


class Answers(Protocol):
    """Where answers go: the connection, which keeps them in the order of the requests."""

    def flush(self) -> None:
        """Told that one more exchange has its answer."""
        ...

    def abandoned(self) -> None:
        """Told that the client of an exchange went away before its answer."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Sets memory aside for an answer, or gives it back where that is negative; may raise `RefusedError`, 503."""
        ...

    def hold(self, held: bool) -> None:
        """Has the requests after this one wait until the size of its answer is known, or no longer."""
        ...


class Cancellable(Protocol):
    """Work that will answer an exchange."""

    def cancel(self) -> None:
        """Told that the client went away."""
        ...


class Head:
    """Request line and header fields of a request. Equal ones may share an object.

    Attributes:
        method: such as `b"POST"`.
        target: the request target, still percent-encoded.
        headers: lower-case name -> value; repeated fields joined by a comma.
        keep_alive: whether the client wants the connection kept.
        old: HTTP/1.0, where keep-alive has to be said.
        content_length: of the body; 0 without one, -1 where only its chunks will tell.
        route: room for the handler to keep what answers this head.
        generation: of what the handler knew when it found that; -1 before.
        start: its bytes, the blank line included, once it is known to come again.
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
    """One request and the place for its answer.

    Attributes:
        connection: where the answer goes.
        head: request line and headers.
        body: the whole body as sent.
        started_s: when the request was complete.
        work: what will answer it, if that takes time; cancelled if the client goes away first.
        answered: whether an answer was given.
        payload: the answer.
        reserved: bytes set aside for the answer, until it is written.
        trace: the W3C `traceparent` it came with, if a valid one; it goes back with the answer.
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
        """Sets memory aside for the answer.

        Raises:
            RefusedError: 503 where the server holds too much already.
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

    def refuse(self, refusal: RefusedError) -> None:
        """Answers with an error."""
        head, body = _refusal(refusal.status, refusal.message, refusal.headers, DATE.field)
        self.send(head if self.head.method == b"HEAD" else head + body)

    def send(self, payload: bytes) -> None:
        """Answers with all that is to be sent, the status line first."""
        if not self.answered:
            self.answered = True
            # It refers back to this exchange; a cycle a request would keep the garbage collector busy.
            self.work = None
            if self.trace is not None:
                payload = payload.replace(b"\r\n", b"\r\nTraceparent: " + self.trace + b"\r\n", 1)
            self.payload = payload
            if self.reserved > len(payload):
                # It may wait long for those before it.
                self.reserve(len(payload) - self.reserved)
            self.connection.flush()


def _head(status: int, body_bytes: int, content_type: str, extra: tuple[str, ...]) -> bytes:
    """Everything before a body, the blank line included."""
    lines = (f"Content-Type: {content_type}", f"Content-Length: {body_bytes}", *extra, "\r\n")
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return line.encode() + DATE.field + "\r\n".join(lines).encode("latin-1")


@functools.lru_cache(maxsize=256)
def _refusal(status: int, message: str, headers: tuple[str, ...], date: bytes) -> tuple[bytes, bytes]:
    """Head and body of an error. Kept while the date is the same: an overloaded server writes one over and over."""
    if status == 503 and not any(line.startswith("Retry-After:") for line in headers):
        headers = (*headers, "Retry-After: 1")
    body = msgspec.json.encode({"error": message})
    return _head(status, len(body), "application/json", headers), body
