"""Certificates made here, and clients that speak TLS."""

import contextlib
import socket
import ssl

import trustme

from lepton_xla.serve.access.tls import TlsFiles


class Authority:
    """A certificate authority that writes pairs of files."""

    def __init__(self, folder):
        self.folder = folder
        self.ca = trustme.CA()
        self.root = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.root)

    def issue(self, stem, *names, **kwargs):
        made = self.ca.issue_cert(*names, **kwargs)
        cert, key = self.folder / f"{stem}.pem", self.folder / f"{stem}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(made.private_key_pem.bytes())
        return TlsFiles(cert, key)


def copy(source, target):
    for name in ("cert", "key"):
        path = getattr(target, name)
        if not path.exists():
            path.touch(0o600)
        path.write_bytes(getattr(source, name).read_bytes())


def client(authority, own=None):
    context = ssl.create_default_context(cafile=authority.root)
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


def connect(server, context, **kwargs):
    sock = socket.create_connection(server.address, 10)
    try:
        return contextlib.closing(context.wrap_socket(sock, server_hostname="127.0.0.1", **kwargs))
    except BaseException:
        sock.close()
        raise
