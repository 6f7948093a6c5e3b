"""HTTP/1.1 from the client's end, on httptools: one unanswered request a connection, blocking or on an event loop.

A connection is handed the bytes of a whole request and gives the whole answer. Who may use it when, what is tried
again and what an answer means is up to the caller.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import os
import pathlib
import select
import socket
import ssl
from collections.abc import Sequence
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

import httptools

from lepton_xla.errors import ServeError

TOKEN_VARIABLE = "LEPTON_TOKEN"  # noqa: S105 (the variable's name)
_RECEIVE_BYTES = 1 << 18
# Fields of an answer without which only the end of the connection ends it.
_FRAMING = (b"content-length", b"transfer-encoding")


class RequestError(ServeError):
    """A request that was not answered as asked.

    Attributes:
        status: HTTP status of the answer; None where none came.
        message: what the server said, or why there is no answer.
    """

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message if status is None else f"{message} (HTTP {status})")
        self.status = status
        self.message = message


class DeadlineError(RequestError):
    """A request whose time ran out, on the client's side or by the server's account."""


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is and what every request to it carries. Made by `endpoint`; shows no secret.

    Attributes:
        url: as it was given, for messages.
        host: name or address.
        port: port.
        prefix: path before every route, without a slash at its end.
        tls: how to speak TLS; None for plain TCP.
        fields: header lines of every request.
    """

    url: str
    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None = dataclasses.field(repr=False)
    fields: bytes = dataclasses.field(repr=False)

    def request(
        self, method: str, path: str, body: Sequence[bytes | memoryview] = (), head_bytes: int | None = None
    ) -> bytes:
        """The bytes of a request.

        Args:
            method: such as `POST`.
            path: the route, percent-encoded.
            body: pieces of the body.
            head_bytes: length of its JSON part, where a binary part follows.
        """
        lines = f"{method} {self.prefix}{path} HTTP/1.1\r\n".encode()
        length = sum(piece.nbytes if isinstance(piece, memoryview) else len(piece) for piece in body)
        framing = f"Content-Length: {length}\r\n" if method == "POST" else ""
        if head_bytes is not None:
            framing += f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {head_bytes}\r\n"
        elif body:
            framing += "Content-Type: application/json\r\n"
        return b"".join((lines, self.fields, framing.encode(), b"\r\n", *body))


def endpoint(
    url: str,
    *,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    certificate_file: str | os.PathLike[str] | None = None,
    key_file: str | os.PathLike[str] | None = None,
) -> Endpoint:
    """Where `url` points to and how to get in there.

    Args:
        url: such as `https://models.example:8443`; without a scheme it is HTTP.
        token: bearer token. If neither it nor a file is given, the variable `LEPTON_TOKEN` is, where it is set.
        token_file: file that holds the token and nothing else.
        ca_file: certificates (PEM) to trust instead of the system's.
        certificate_file: the client's own certificate chain (PEM), for a server that asks for one.
        key_file: its private key, if not in the same file.

    Raises:
        ServeError: for a URL, token or file that cannot be used.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise ServeError(f"URL {url!r} has no valid port") from error
    if port is None or not parts.hostname:
        raise ServeError(f"URL {url!r}: expected http://HOST:PORT or https://HOST:PORT")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ServeError("a server's URL has no user, query or fragment; give a token instead of a password")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ServeError(f"URL {url!r} holds a character that has to be percent-encoded")
    tls = None
    if parts.scheme == "https":
        tls = _tls(ca_file, certificate_file, key_file)
    elif ca_file or certificate_file or key_file:
        raise ServeError(f"URL {url!r} is not https, but certificates are given")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    fields = f"Host: {host}:{port}\r\nUser-Agent: lepton-xla/{importlib.metadata.version('lepton-xla')}\r\n"
    secret = _token(token, token_file)
    if secret is not None:
        fields += f"Authorization: Bearer {secret}\r\n"
    return Endpoint(url, unquote(parts.hostname), port, parts.path.rstrip("/"), tls, fields.encode("ascii"))


def _token(token: str | None, token_file: str | os.PathLike[str] | None) -> str | None:
    where = "the token"
    if token is None and token_file is not None:
        where = f"token file {os.fspath(token_file)!r}"
        try:
            token = pathlib.Path(token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"{where} cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None
    elif token is None:
        where = f"the variable {TOKEN_VARIABLE}"
        token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ServeError(f"{where} does not hold a token: printable ASCII without blanks")
    return token


def _tls(ca_file: Any, certificate_file: Any, key_file: Any) -> ssl.SSLContext:
    if key_file is not None and certificate_file is None:
        raise ServeError("a private key is given without its certificate")
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if certificate_file is not None:
            context.load_cert_chain(certificate_file, key_file)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(os.fspath(file) for file in (ca_file, certificate_file, key_file) if file is not None)
        raise ServeError(f"certificates of {files} cannot be used: {error.strerror or error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


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
            self._whole = answer
        self._answer, self._pieces = Answer(), []


def left(deadline: float) -> float:
    """Seconds until `deadline`, on the monotonic clock.

    Raises:
        TimeoutError: when there are none.
    """
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


class Connection:
    """A blocking connection.

    Raises:
        OSError: if there is none to be had; TimeoutError if not before the deadline.
    """

    def __init__(self, target: Endpoint, deadline: float) -> None:
        self.open = True
        self._parser = _Parser()
        self._socket = socket.create_connection((target.host, target.port), left(deadline))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if target.tls is not None:
                self._socket = target.tls.wrap_socket(self._socket, server_hostname=target.host)
        except BaseException:
            self.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def idle(self) -> bool:
        """Whether it can take a request: the server has neither closed it nor said anything unasked."""
        return self.open and not self._poll.poll(0)

    def exchange(self, request: bytes, deadline: float) -> Answer:
        """Sends a request and waits for its answer; afterwards `open` says whether it takes another.

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
        answer = None
        while answer is None:
            self._socket.settimeout(left(deadline))
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                raise
            except OSError as error:
                raise failure or error from None
            answer = self._parser.feed(data) if data else self._parser.end()
            if not data and answer is None:
                raise failure or ConnectionResetError("the server closed the connection")
        self.open = answer.keep_alive and failure is None
        return answer

    def close(self) -> None:
        """Ends the connection."""
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
        """Takes the answer; `open` says whether the connection takes another request."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """Told that no answer will come."""
        raise NotImplementedError

    def lost(self) -> None:
        """Told that the connection is gone, whether or not a request was on its way."""

    def send(self, request: bytes) -> None:
        """Sends a request; the one before it must have its answer."""
        self._waiting = True
        self._transport.write(request)

    def abort(self) -> None:
        """Ends the connection; nothing is told of a request on its way."""
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
