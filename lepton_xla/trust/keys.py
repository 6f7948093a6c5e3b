"""Key files in PEM: elliptic-curve keys that sign, and X25519 keys that artifacts are encrypted for.

A key is known by the SHA-256 of its public PEM text, as OpenSSF Model Signing has it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lepton_xla import toml
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import TrustError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

_log = logging.getLogger(__name__)

type Purpose = Literal["signing", "encryption"]

# Checked before a file is read. A key takes some 200 bytes.
_MAX_KEY_BYTES = 64 << 10
_MAX_TRUSTED_KEYS = 1000
_POLICY = "policy.toml"
# The curves of OpenSSF Model Signing.
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def create_keys(path: str | os.PathLike[str], purpose: Purpose = "signing") -> tuple[Path, Path]:
    """Make a key pair: `PATH.key`, which only its owner may read, and `PATH.pub`, which is for everybody.

    Args:
        path: where, without a suffix.
        purpose: `signing` makes an ECDSA key on the curve P-256, `encryption` an X25519 key.

    Returns:
        The paths of the private and the public key.

    Raises:
        TrustError: if one of the files exists or cannot be written.

    >>> private, public = lx.trust.create_keys("release")
    >>> private.name, public.name, oct(private.stat().st_mode)[-3:]
    ('release.key', 'release.pub', '600')
    """
    _require()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, x25519

    key: Any
    key = ec.generate_private_key(ec.SECP256R1()) if purpose == "signing" else x25519.X25519PrivateKey.generate()
    private = Path(f"{os.fsdecode(path)}.key")
    public = private.with_name(private.name.removesuffix(".key") + ".pub")
    if os.path.lexists(public):
        raise TrustError(f"{public} exists; choose another name")
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _create(private, secret, 0o600)
    _create(public, public_pem(key.public_key()), 0o644)
    return private, public


def signing_key(path: str | os.PathLike[str]) -> EllipticCurvePrivateKey:
    """Read a private key to sign with.

    Raises:
        TrustError: if the file cannot be read, or holds no such key.
    """
    data, name = _read(Path(path), secret=True), os.fsdecode(path)
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _private(data, name)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise TrustError(f"{name}: {_kind(key)} does not sign artifacts; `leptonx keys new NAME` makes one that does")
    return key


def decryption_key(path: str | os.PathLike[str] | None, variable: str) -> X25519PrivateKey | None:
    """Read a private key to decrypt with; errors never show what the environment holds.

    Args:
        path: the file; None takes the environment's key.
        variable: environment variable with the key itself, or with the path of its file.

    Returns:
        The key; None if there is neither.

    Raises:
        TrustError: if the file cannot be read, or holds no such key.
    """
    value = os.environ.get(variable, "") if path is None else ""
    if path is None and not value:
        return None
    name = variable if path is None else os.fsdecode(path)
    if "-----BEGIN" in value:
        _require()
        data = value.strip().encode()
    else:
        data = _read(Path(value if path is None else path), secret=True, name=name)
    from cryptography.hazmat.primitives.asymmetric import x25519

    key = _private(data, name)
    if not isinstance(key, x25519.X25519PrivateKey):
        advice = "`leptonx keys new NAME --for encryption` makes one that does"
        raise TrustError(f"{name}: {_kind(key)} does not decrypt artifacts; {advice}")
    return key


def encryption_key(path: str | os.PathLike[str]) -> X25519PublicKey:
    """Read a public key to encrypt for.

    Raises:
        TrustError: if the file cannot be read, or holds no such key.
    """
    data = _read(Path(path))
    from cryptography.hazmat.primitives.asymmetric import x25519

    key = _public(data, os.fsdecode(path))
    if not isinstance(key, x25519.X25519PublicKey):
        raise TrustError(
            f"{path}: {_kind(key)} cannot be encrypted for; `leptonx keys new NAME --for encryption` makes one that can"
        )
    return key


@dataclasses.dataclass(frozen=True)
class TrustedKeys:
    """The public keys whose signatures are trusted.

    Attributes:
        keys: identifier -> name of the file, and the key.
        not_before_s: signatures that are older, in seconds since the epoch, are not; None trusts any.

    >>> _, public = lx.trust.create_keys("release")
    >>> [name for name, _ in lx.trust.TrustedKeys.read(public).keys.values()]
    ['release.pub']
    """

    keys: Mapping[str, tuple[str, EllipticCurvePublicKey]]
    not_before_s: float | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TrustedKeys:
        """Read a public key, or all files of a folder but hidden ones, each of which has to hold one.

        A folder may have a file `policy.toml`, with a line such as `not_before = 2026-11-28T00:00:00Z`: signatures that
        are older are not trusted.

        Raises:
            TrustError: if there is no key, or a file cannot be read or holds anything else.

        >>> _ = lx.trust.create_keys("release")
        >>> lx.trust.TrustedKeys.read("release.key")
        Traceback (most recent call last):
        lepton_xla.errors.TrustError: release.key: holds a private key, where a public one belongs
        """
        _require()
        place, found = Path(path), dict[str, tuple[str, Any]]()
        not_before_s = None
        for file in _files(place):
            if file.name == _POLICY and place.is_dir():
                not_before_s = _not_before_s(_read(file), str(file))
                continue
            key = _verifying(_read(file), str(file))
            found[identifier(key)] = (file.name, key)
        if not found:
            raise TrustError(f"{place}: holds no public key, so nothing would be trusted")
        return cls(found, not_before_s)


def _not_before_s(data: bytes, name: str) -> float | None:
    """The time in a policy."""
    try:
        policy = toml.parsed(data)
    except ValueError as error:
        raise TrustError(f"{name}: is not TOML: {error}") from error
    unknown = sorted(set(policy) - {"not_before"})
    if unknown:
        raise TrustError(f"{name}: unknown key {unknown[0]!r:.100}; the key is not_before")
    time = policy.get("not_before")
    if time is None:
        return None
    if not isinstance(time, datetime.datetime) or time.tzinfo is None:
        raise TrustError(f"{name}: not_before must be a time with its zone, such as 2026-11-28T00:00:00Z")
    return time.timestamp()


def identifier(key: EllipticCurvePublicKey | X25519PublicKey) -> str:
    """The SHA-256 of a public key's PEM text, in hexadecimal."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def public_pem(key: EllipticCurvePublicKey | X25519PublicKey) -> bytes:
    """A public key as PEM text."""
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _verifying(data: bytes, name: str) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _public(data, name)
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise TrustError(f"{name}: {_kind(key)} does not sign artifacts, so it cannot be trusted to")
    return key


def _files(place: Path) -> list[Path]:
    """The files that a path of trusted keys stands for."""
    if not place.is_dir():
        return [place]
    try:
        # Orchestrators mount secrets as links into hidden folders.
        files = sorted(file for file in place.iterdir() if not file.name.startswith(".") and not file.is_dir())
    except OSError as error:
        raise TrustError(f"{place}: cannot be read: {error.strerror}") from error
    if not files:
        raise TrustError(f"{place}: holds no public key, so nothing would be trusted")
    if len(files) > _MAX_TRUSTED_KEYS:
        raise TrustError(f"{place}: {len(files)} files are more than the {_MAX_TRUSTED_KEYS} keys that may be trusted")
    return files


def _private(data: bytes, name: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    if b"PRIVATE KEY-----" not in data:
        raise TrustError(f"{name}: is not a private key in PEM")
    try:
        return serialization.load_pem_private_key(data, None)
    except TypeError:
        raise TrustError(f"{name}: is locked with a password; `openssl pkey -in FILE` writes it without") from None
    except (ValueError, UnsupportedAlgorithm):  # whose text may quote the key
        raise TrustError(f"{name}: is damaged, or of a kind that is not known") from None


def _public(data: bytes, name: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    if b"PRIVATE KEY-----" in data:
        raise TrustError(f"{name}: holds a private key, where a public one belongs")
    if data.count(b"-----BEGIN PUBLIC KEY-----") != 1:
        raise TrustError(f"{name}: is not one public key in PEM")
    try:
        return serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise TrustError(f"{name}: is damaged, or of a kind that is not known") from None


def _kind(key: Any) -> str:
    """A key's kind for messages, such as `a key of the kind X25519`."""
    curve = getattr(key, "curve", None)
    name = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
    return f"a key of the kind {name if curve is None else curve.name}"


def _read(path: Path, *, secret: bool = False, name: str = "") -> bytes:
    _require()
    name = name or str(path)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_KEY_BYTES + 1) if stat.S_ISREG(mode) else b""
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else "it is not a path"
        raise TrustError(f"{name}: the key cannot be read: {reason}") from None
    if not stat.S_ISREG(mode) or len(data) > _MAX_KEY_BYTES:
        raise TrustError(f"{name}: is not a file of a key")
    if mode & 0o022:
        raise TrustError(f"{name}: others may write to this key (mode {stat.S_IMODE(mode):04o}); chmod go-w it")
    if secret and mode & 0o044:
        _log.warning("%s: others may read this private key (mode %04o); chmod 600 it", name, stat.S_IMODE(mode))
    return data


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a new file, which nobody else can read meanwhile."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise TrustError(f"{path} exists; choose another name") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a path"
        raise TrustError(f"{path}: the key cannot be written: {reason}") from None


def _require() -> None:
    with Needs("trust", "a key"):
        importlib.import_module("cryptography.hazmat.primitives.hpke")  # of version 47
