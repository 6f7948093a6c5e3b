"""HTTP/1.1 from the client's end, on httptools: one unanswered request a connection, blocking or on an event loop.

A connection is handed the bytes of a whole request and gives the whole answer. Who may use it when, what is tried
again and what an answer means is up to the caller.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

import httptools

from lepton_xla.errors import ServeError
from lepton_xla.serve.client.endpoint import Endpoint

PATIENCE_S = 1.0
"""So long a client waits for a connection, or for a sign of life, that it could also get from another server."""

_RECEIVE_BYTES = 1 << 18
# Fields of an answer without which only the end of the connection ends it.
_FRAMING = (b"content-length", b"transfer-encoding")


class RequestError(ServeError):
    """A request that was not answered as asked.

    Attributes:
        status: HTTP status of the answer; None where none came.
        message: what the server said, or why there is no answer.

    >>> from lepton_xla.serve.client import Client, RequestError
    >>> try:
    ...     Client("http://127.0.0.1:1", retries=0).infer("digits", x=[1.0])
    ... except RequestError as error:
    ...     error.status is None, error.message
    (True, 'http://127.0.0.1:1: no answer after one attempt: Connection refused')
    """

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message if status is None else f"{message} (HTTP {status})")
        self.status = status
        self.message = message


class DeadlineError(RequestError):
    """A request whose time ran out, on the client's side or by the server's account.

    >>> from lepton_xla.serve.client import DeadlineError, RequestError
    >>> issubclass(DeadlineError, RequestError), DeadlineError(504, "too late").status
    (True, 504)
    """


class Answer:
    """One HTTP answer: its status, its header fields by lower-case name, its whole body."""

    __slots__ = ("body", "headers", "keep_alive", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.keep_alive = False


class _Parser:
    """Bytes to answers."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._answer = Answer()
        self._whole: Answer | None = None

    def feed(self, data: bytes) -> Answer | None:
        """The answer, once it is whole.

        Raises:
            RequestError: for what is not HTTP.
        """
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._whole is None:
                raise RequestError(None, "the server's answer is not HTTP/1.1") from error
        whole, self._whole = self._whole, None
        return whole

    def end(self) -> Answer | None:
        """The answer that the end of the connection completes, if there is one."""
        answer = self._answer
        if not answer.status or any(field in answer.headers for field in _FRAMING):
            return None
        answer.body = b"".join(self._pieces)
        return answer

    def on_message_begin(self) -> None:
        if self._whole is not None:
            self._whole.keep_alive = False  # what follows was not asked for, and would be taken for the next answer
        self._answer = Answer()
        self._pieces = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._answer.keep_alive = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        answer, pieces = self._answer, self._pieces
        if answer.status >= 200:  # before the answer proper there may be others, such as 103
            answer.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self._whole = self._whole or answer
        self._answer, self._pieces = Answer(), []


def left(deadline: float) -> float:
    """Seconds until `deadline`, on the monotonic clock.

    Raises:
        TimeoutError: when there are none.

    >>> 9 < left(monotonic() + 10) <= 10
    True
    """
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def open_socket(target: Endpoint, timeout_s: float) -> socket.socket:
    """Connect to a server, TLS included.

    Args:
        target: the server.
        timeout_s: seconds that each step may take, and each later read or write.

    Raises:
        OSError: if it cannot be reached.
    """
    if target.unix:
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.create_connection((target.host, target.port), timeout_s)
    try:
        if target.unix:
            sock.settimeout(timeout_s)
            sock.connect(target.host)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if target.tls is None else target.tls.wrap_socket(sock, server_hostname=target.host)
    except BaseException:
        sock.close()
        raise


class BlockingChannel:
    """A blocking connection.

    Raises:
        OSError: if there is none to be had; TimeoutError if not before the deadline.
    """

    def __init__(self, target: Endpoint, deadline: float) -> None:
        self.open = True
        self._parser = _Parser()
        self._socket = open_socket(target, left(deadline))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def idle(self) -> bool:
        """Tell whether it can take a request: the server has neither closed it nor said anything unasked."""
        return self.open and not self._poll.poll(0)

    def exchange(self, request: bytes, deadline: float, doubt: Callable[[], None] | None = None) -> Answer:
        """Send a request and waits for its answer; afterwards `open` says whether it takes another.

        Args:
            doubt: called after each `PATIENCE_S` in which nothing came; to go on waiting it returns.

        Raises:
            OSError: if the connection breaks; TimeoutError at the deadline.
            RequestError: if the answer is not HTTP.
        """
        self.open = False
        failure: OSError | None = None
        self._socket.settimeout(left(deadline))
        try:
            self._socket.sendall(request)
        except TimeoutError:
            raise
        except OSError as error:
            failure = error  # a server that refuses a body may have answered and closed
        try:
            answer = self._receive(deadline, failure, doubt)
            self.open = answer.keep_alive and failure is None
            return answer
        finally:
            failure = None  # its traceback leads back to this frame

    def _receive(self, deadline: float, failure: OSError | None, doubt: Callable[[], None] | None) -> Answer:
        """The answer, or why there is none: first what sending it met."""
        try:
            answer = None
            while answer is None:
                wait = left(deadline)
                self._socket.settimeout(wait if doubt is None else min(wait, PATIENCE_S))
                try:
                    data = self._socket.recv(_RECEIVE_BYTES)
                except TimeoutError:
                    if doubt is None:
                        raise
                    doubt()
                    continue
                except OSError as error:
                    raise failure or error from None
                answer = self._parser.feed(data) if data else self._parser.end()
                if not data and answer is None:
                    raise failure or ConnectionResetError("the server closed the connection")
            return answer
        finally:
            failure = None

    def close(self) -> None:
        """End the connection."""
        self.open = False
        self._socket.close()


class Channel(asyncio.Protocol):
    """A connection on an event loop. Its owner overrides `answered` and `failed`; one of them follows each `send`."""

    __slots__ = ("_parser", "_transport", "_waiting", "open")

    def __init__(self) -> None:
        self.open = False
        self._parser = _Parser()
        self._transport: Any = None
        self._waiting = False

    def answered(self, answer: Answer) -> None:
        """Take the answer; `open` says whether the connection takes another request."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """Told that no answer will come."""
        raise NotImplementedError

    def lost(self) -> None:
        """Told that the connection is gone, whether or not a request was on its way."""

    def send(self, request: bytes) -> None:
        """Send a request; the one before it must have its answer."""
        self._waiting = True
        self._transport.write(request)

    def abort(self) -> None:
        """End the connection; nothing is told of a request on its way."""
        self.open = self._waiting = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.open = True

    def data_received(self, data: bytes) -> None:
        if not self._waiting:
            self.abort()  # an answer to nothing
            return
        try:
            answer = self._parser.feed(data)
        except RequestError as error:
            self.abort()
            self.failed(error)
            return
        if answer is not None:
            self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        self._waiting = False
        if not answer.keep_alive:
            self.open = False
            self._transport.close()
        self.answered(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._waiting:
            answer = self._parser.end() if exc is None else None
            if answer is not None:
                self._answer(answer)
            else:
                self._waiting = False
                self.failed(exc or ConnectionResetError("the server closed the connection"))
        self.lost()


async def connected[C: Channel](make: Callable[[], C], target: Endpoint) -> C:
    """A channel to a server, on the event loop that runs.

    Raises:
        OSError: if there is none to be had.
    """
    loop = asyncio.get_running_loop()
    if target.unix:
        return (await loop.create_unix_connection(make, target.host))[1]
    name = target.host if target.tls is not None else None
    return (await loop.create_connection(make, target.host, target.port, ssl=target.tls, server_hostname=name))[1]
