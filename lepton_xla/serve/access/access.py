"""Who can reach a server: the address it listens on, its certificates, and the tokens it asks for."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from lepton_xla.errors import ServeError
from lepton_xla.serve.access.auth import Guard
from lepton_xla.serve.access.tls import Certificates, TlsFiles
from lepton_xla.serve.http.listening import Found, Listening, on_tcp, on_unix
from lepton_xla.serve.limits import Limits

_log = logging.getLogger("lepton_xla.serve")


class Access:
    """Checks once, before a model is loaded, that a server would not be open to whoever can reach it.

    Args:
        host: address or name to listen on.
        port: port to listen on.
        token_file: the tokens; None asks for none.
        tls: the certificates; None speaks plain HTTP.
        open_paths: paths that need no token.
        unix_socket: file to listen on instead of the address, which the machine's users can reach as its mode says.
        public: whether an address that others can reach is wanted though everybody there may ask everything.

    Attributes:
        guard: asks for tokens; None where everybody may ask.
        certificates: None where HTTP is plain.

    Raises:
        ServeError: if the host has no address, a file cannot be used, or nothing guards a public address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        token_file: Path | None,
        tls: TlsFiles | None,
        open_paths: AbstractSet[bytes],
        public: bool,
        unix_socket: Path | None = None,
    ) -> None:
        self._where = f"{host}:{port}"
        self._unix_socket = unix_socket
        self._found: list[Found] = []
        if unix_socket is None:
            try:
                # The addresses that are checked are those that are bound, whatever the name resolves to later.
                named = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                raise ServeError(f"cannot listen on {self._where}: {error.strerror}") from error
            found = dict.fromkeys((family, kind, protocol, address) for family, kind, protocol, _, address in named)
            # The address that is printed is one that everybody can reach.
            self._found = sorted(found, key=lambda each: each[0] == socket.AF_INET6)
        guarded = token_file is not None or (tls is not None and tls.client_ca is not None)
        local = all(_is_loopback(address) for *_, address in self._found)
        if not (guarded or public or local):
            raise ServeError(
                f"{host} can be reached by other machines and nothing says who may ask: give --token-file or "
                "--tls-client-ca, or --insecure-public if everybody may"
            )
        if token_file is not None and tls is None and not local:
            _log.warning("without --tls-cert tokens cross the network readable; have TLS end in front of the server")
        self.guard = None if token_file is None else Guard(token_file, frozenset(open_paths))
        self.certificates = None if tls is None else Certificates(tls)

    @property
    def reloads(self) -> bool:
        """Whether there is something that may change while the server runs."""
        return self.guard is not None or self.certificates is not None

    def reload(self) -> None:
        """Reads everything again, as on SIGHUP; the log says what, or that there is nothing."""
        if not self.reloads:
            _log.info("SIGHUP: nothing is read again, for there is neither a token file nor a certificate")
        self.refresh(force=True)

    def refresh(self, *, force: bool = False) -> None:
        """Reads again what changed, or everything."""
        if self.guard is not None:
            self.guard.refresh(force=force)
        if self.certificates is not None:
            self.certificates.refresh(force=force)

    def tls_options(self, limits: Limits) -> dict[str, Any]:
        """What the event loop has to be told to speak TLS, if it should."""
        if self.certificates is None:
            return {}
        return {
            "ssl": self.certificates.context,
            "ssl_handshake_timeout": limits.head_timeout_s,
            "ssl_shutdown_timeout": limits.write_timeout_s,
        }

    def listen(self) -> Listening:
        """What to listen on, bound as far as it can be before a long warm-up.

        Raises:
            ServeError: if it cannot be had.
        """
        return on_tcp(self._found, self._where) if self._unix_socket is None else on_unix(self._unix_socket)


def _is_loopback(address: tuple[Any, ...]) -> bool:
    found = ipaddress.ip_address(address[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
