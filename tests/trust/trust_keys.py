"""Key files of every kind, made once."""

import functools
import pathlib
import tempfile

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
OPEN = serialization.NoEncryption()

KINDS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p256_other": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "x25519": x25519.X25519PrivateKey.generate,
    "x25519_other": x25519.X25519PrivateKey.generate,
}


@functools.cache
def key(kind):
    """A private key."""
    return KINDS[kind]()


@functools.cache
def folder():
    return pathlib.Path(tempfile.mkdtemp(prefix="lepton-keys-"))


def private_pem(kind):
    return key(kind).private_bytes(PEM, PKCS8, OPEN)


def public_pem(kind):
    return key(kind).public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private(kind):
    """The file of a private key."""
    return _file(folder() / f"{kind}.key", private_pem(kind))


def public(kind):
    """The file of a public key."""
    return _file(folder() / f"{kind}.pub", public_pem(kind))


def _file(path, data):
    if not path.exists():
        path.touch(0o600)
        path.write_bytes(data)
    return path
