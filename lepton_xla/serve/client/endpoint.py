"""Where a server is, and what every request to it carries: address, path prefix, TLS, bearer token."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from lepton_xla.errors import ServeError

TOKEN_VARIABLE = "LEPTON_TOKEN"  # noqa: S105 (the variable's name)


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is and what every request to it carries. Made by `endpoint`; shows no secret.

    Attributes:
        url: as it was given, for messages.
        host: name or address; the path, where it is a Unix socket.
        port: port.
        prefix: path before every route, without a slash at its end.
        tls: how to speak TLS; None for plain TCP.
        fields: header lines of every request.
        unix: whether it is a Unix socket.
    """

    url: str
    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None = dataclasses.field(repr=False)
    fields: bytes = dataclasses.field(repr=False)
    unix: bool = False

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
        framing = f"Content-Length: {length}\r\n" if method in ("POST", "PUT") else ""
        if head_bytes is not None:
            framing += f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {head_bytes}\r\n"
        elif body:
            framing += f"Content-Type: application/{'octet-stream' if method == 'PUT' else 'json'}\r\n"
        return b"".join((lines, self.fields, framing.encode(), b"\r\n", *body))


def endpoint(
    url: str,
    *,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    tls_ca: str | os.PathLike[str] | None = None,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
) -> Endpoint:
    """Where `url` points to and how to get in there.

    Args:
        url: such as `https://models.example:8443`, or `http+unix://%2Frun%2Fdigits.sock` for a Unix socket; without a
            scheme it is HTTP.
        token: bearer token. If neither it nor a file is given, the variable `LEPTON_TOKEN` is, where it is set.
        token_file: file that holds the token and nothing else.
        tls_ca: certificates (PEM) to trust instead of the system's.
        tls_cert: the client's own certificate chain (PEM), for a server that asks for one.
        tls_key: its private key, if not in the same file.

    Raises:
        ServeError: for a URL, token or file that cannot be used.

    >>> there = endpoint("http+unix://%2Frun%2Fdigits.sock")
    >>> there.unix, there.host
    (True, '/run/digits.sock')
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    unix = parts.scheme == "http+unix"
    try:
        port = 0 if unix else parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise ServeError(f"URL {url!r} has no valid port") from error
    if unix and not parts.netloc:
        raise ServeError(f"URL {url!r}: expected http+unix://PATH, where the path's slashes are written %2F")
    if unix:
        pass
    elif parts.scheme not in ("http", "https") or port is None or not parts.hostname:
        raise ServeError(f"URL {url!r}: expected http://HOST:PORT or https://HOST:PORT")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ServeError("a server's URL has no user, query or fragment; give a token instead of a password")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ServeError(f"URL {url!r} holds a character that has to be percent-encoded")
    tls = None
    if parts.scheme == "https":
        tls = _tls(tls_ca, tls_cert, tls_key)
    elif tls_ca or tls_cert or tls_key:
        raise ServeError(f"URL {url!r} is not https, but certificates are given")
    name = parts.hostname or ""
    host = "localhost" if unix else f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    fields = f"Host: {host}\r\nUser-Agent: lepton-xla/{importlib.metadata.version('lepton-xla')}\r\n"
    secret = _token(token, token_file)
    if secret is not None:
        fields += f"Authorization: Bearer {secret}\r\n"
    # A name is the same in any case; a path is not.
    where = unquote(parts.netloc if unix else name)
    return Endpoint(url, where, port or 0, parts.path.rstrip("/"), tls, fields.encode("ascii"), unix)


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


def _tls(tls_ca: Any, tls_cert: Any, tls_key: Any) -> ssl.SSLContext:
    if tls_key is not None and tls_cert is None:
        raise ServeError("a private key is given without its certificate")
    try:
        context = ssl.create_default_context(cafile=tls_ca)
        if tls_cert is not None:
            context.load_cert_chain(tls_cert, tls_key)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(os.fspath(file) for file in (tls_ca, tls_cert, tls_key) if file is not None)
        raise ServeError(f"certificates of {files} cannot be used: {error.strerror or error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context
