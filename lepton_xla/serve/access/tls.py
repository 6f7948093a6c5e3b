"""TLS with certificates that may change while the server runs."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path
from typing import Any

from lepton_xla.errors import ServeError
from lepton_xla.serve.access.watched import Watched, read_private


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files.

    Attributes:
        cert: the server's certificate, then those between it and its root.
        key: its private key, not encrypted.
        client_ca: the roots that clients' certificates have to come from; None asks clients for none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


class _Current(ssl.SSLContext):
    """Gives every new connection to the context that was read last.

    All of it changes at once: the certificate, the clients' roots, and the sessions that may be taken up again.
    """

    watched: Watched[ssl.SSLContext]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self.watched.value.wrap_bio(*args, **kwargs)


class Certificates:
    """The certificates of a server.

    Attributes:
        context: what to listen with; it stays the same when the files change.

    Raises:
        ServeError: if the files cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        paths = [path for path in (files.cert, files.key, files.client_ca) if path is not None]
        self._watched = Watched(paths, lambda: _context(files))
        self.context = _Current(ssl.PROTOCOL_TLS_SERVER)
        self.context.watched = self._watched

    def refresh(self, *, force: bool = False) -> None:
        """Reads the files again if one changed; open connections keep what they have."""
        self._watched.refresh(force=force)


def _context(files: TlsFiles) -> ssl.SSLContext:
    read_private(files.key, "TLS key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would be asked for on the terminal; an empty password makes it an error.
        context.load_cert_chain(files.cert, files.key, password="")
    except (OSError, ValueError) as error:
        raise ServeError(f"cannot use the certificate {files.cert} with the key {files.key}: {_why(error)}") from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ValueError) as error:
            raise ServeError(f"cannot use the client CA {files.client_ca}: {_why(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a PEM file").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
