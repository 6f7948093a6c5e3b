"""Sealed files: AES-256-GCM under a data key that is made for one artifact, and wrapped by HPKE for its readers.

A sealed file is the nonce (12 bytes), the ciphertext, and the tag (16 bytes). Nonces count the files, and a data key
seals each file of one artifact once, so none comes twice. The file's name is authenticated with it: a file in the
place of another, a shorter one, or one of another artifact does not open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lepton_xla.errors import TrustError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hpke import Suite

_NONCE_BYTES = 12
_TAG_BYTES = 16
_KEY_BYTES = 32
# Separates these ciphertexts from those of another version of this format, or of another use of the same key.
_FILE_CONTEXT = b"lepton_xla sealed file 1\0"
_KEY_CONTEXT = b"lepton_xla data key 1"


class Sealer:
    """Seals the files of one artifact under a new data key."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._key = AESGCM.generate_key(8 * _KEY_BYTES)
        self._cipher = AESGCM(self._key)
        self._sealed: set[str] = set()

    def seal(self, name: str, data: bytes) -> bytes:
        """Seal a file.

        Raises:
            ValueError: if a file of that name was sealed already.
        """
        if name in self._sealed:
            raise ValueError(f"{name} is sealed already")
        nonce = len(self._sealed).to_bytes(_NONCE_BYTES)
        self._sealed.add(name)
        return nonce + self._cipher.encrypt(nonce, data, _FILE_CONTEXT + name.encode())

    def wrap(self, recipient: X25519PublicKey) -> bytes:
        """The data key, for the owner of a key (RFC 9180: DHKEM(X25519), HKDF-SHA256, AES-256-GCM)."""
        return _suite().encrypt(self._key, recipient, _KEY_CONTEXT)


class Opener:
    """Opens the files of one artifact.

    Args:
        wrapped: the data key as it was wrapped.
        key: of the recipient that it was wrapped for.

    Raises:
        TrustError: if it was not.
    """

    def __init__(self, wrapped: bytes, key: X25519PrivateKey) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            data_key = _suite().decrypt(wrapped, key, _KEY_CONTEXT)
        except (InvalidTag, ValueError):
            raise TrustError("the data key does not open with this key: it is damaged, or for another") from None
        if len(data_key) != _KEY_BYTES:
            raise TrustError(f"the data key has {len(data_key)} bytes, not {_KEY_BYTES}")
        self._cipher = AESGCM(data_key)

    def open(self, name: str, sealed: bytes) -> bytes:
        """Open a file.

        Raises:
            TrustError: if it is not what was sealed under that name; names it.
        """
        from cryptography.exceptions import InvalidTag

        if len(sealed) < _NONCE_BYTES + _TAG_BYTES:
            raise TrustError(f"{name} is too short to be sealed")
        nonce, ciphertext = sealed[:_NONCE_BYTES], memoryview(sealed)[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, ciphertext, _FILE_CONTEXT + name.encode())
        except InvalidTag:
            raise TrustError(f"{name} does not open: it is damaged, or not the file of that name") from None


def _suite() -> Suite:
    from cryptography.hazmat.primitives import hpke

    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
