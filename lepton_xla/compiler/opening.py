"""The first look at an artifact: its signature, its manifest, and its files as they are to be read.

What is checked is what is used: the signature pins the bytes of the manifest, which are read once, and the manifest
pins those of every other file, which `VerifiedFiles` compares in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from lepton_xla.compiler.manifest import OPEN_FOLDERS, Manifest, manifest_from_json
from lepton_xla.compiler.storage import Store, VerifiedFiles
from lepton_xla.errors import ArtifactError, TrustError
from lepton_xla.files.listing import MANIFEST, MAX_MANIFEST_BYTES
from lepton_xla.trust.bundles import MAX_SIGNATURE_BYTES, SIGNATURE, Signed, check_signature, is_left_out, signer_of
from lepton_xla.trust.keys import TrustedKeys, decryption_key, identifier
from lepton_xla.trust.sealing import Opener

DECRYPT_VARIABLE = "LEPTON_DECRYPT_KEY"
# Files beside the manifest's, such as a model card, that a signature may cover.
MAX_EXTRA_BYTES = 64 << 20


def trusted_keys(trust: str | os.PathLike[str] | TrustedKeys | None) -> TrustedKeys | None:
    """Read the keys that a caller names.

    Raises:
        TrustError: see `TrustedKeys.read`.
    """
    return trust if trust is None or isinstance(trust, TrustedKeys) else TrustedKeys.read(trust)


def is_signed(store: Store) -> bool:
    """Whether there is a signature file, whatever it holds."""
    return not store.is_missing(SIGNATURE)


def claimed_signer(store: Store) -> str:
    """The identifier of the key that the signature claims to be of, unverified; empty if the artifact is not signed.

    Raises:
        ArtifactError: if the signature file cannot be read, or is none.
    """
    if not is_signed(store):
        return ""
    try:
        return signer_of(store.read(SIGNATURE, limit=MAX_SIGNATURE_BYTES))
    except TrustError as error:
        raise TrustError(f"{store.location}: {SIGNATURE} {error}") from error


def read_signature(store: Store, trusted: TrustedKeys) -> Signed:
    """Read and check the signature of an artifact.

    Raises:
        TrustError: if there is none, or it is not of a trusted key.
    """
    try:
        data = store.read(SIGNATURE, limit=MAX_SIGNATURE_BYTES)
    except ArtifactError as error:
        if store.is_missing(SIGNATURE) and not store.is_missing(MANIFEST):
            raise TrustError(
                f"{store.location}: is not signed (no {SIGNATURE}), and only signed artifacts are trusted here"
            ) from error
        raise
    try:
        return check_signature(data, trusted)
    except TrustError as error:
        raise TrustError(f"{store.location}: {SIGNATURE} {error}") from error


def read_manifest(store: Store, signed: Signed | None = None) -> Manifest:
    """Read the manifest of an artifact.

    Args:
        store: the artifact.
        signed: what was signed, which the manifest has to be part of; None takes any manifest.

    Raises:
        ArtifactError: if it is missing, too large, or invalid.
        TrustError: if it is not what was signed.
    """
    data = store.read(MANIFEST, limit=MAX_MANIFEST_BYTES)
    if signed is not None and signed.digests.get(MANIFEST) != hashlib.sha256(data).hexdigest():
        raise TrustError(f"{store.location}: {MANIFEST} is not the one that {signed.signer} signed")
    return decoded_manifest(store, data)


def read_trusted_manifest(store: Store, trusted: TrustedKeys | None) -> Manifest:
    """Read the manifest of an artifact, and its signature first.

    Args:
        store: the artifact.
        trusted: the keys, one of which must have signed it; None takes any artifact.

    Raises:
        ArtifactError: if the manifest is missing, too large, or invalid.
        TrustError: if it is not signed by a trusted key.
    """
    return read_manifest(store, None if trusted is None else read_signature(store, trusted))


def decoded_manifest(store: Store, data: bytes) -> Manifest:
    """Decode the bytes of a store's manifest.

    Raises:
        ArtifactError: if they are invalid.
    """
    try:
        return manifest_from_json(data)
    except ArtifactError as error:
        raise ArtifactError(f"{store.location}: {error}") from error


def open_files(store: Store, manifest: Manifest, decrypt_key: str | os.PathLike[str] | None = None) -> VerifiedFiles:
    """Make the reader of an artifact's files, which decrypts in memory what is encrypted.

    Args:
        store: the artifact.
        manifest: its manifest.
        decrypt_key: file of the private key; None takes that of the environment.

    Raises:
        TrustError: if files are encrypted and there is no key, or it is not one that they were encrypted for.
    """
    if manifest.encryption is None:
        return VerifiedFiles(store, manifest.files)
    key = decryption_key(decrypt_key, DECRYPT_VARIABLE)
    where, readers = store.location, {each.key: each.wrapped for each in manifest.encryption.recipients}
    names = ", ".join(name[:16] for name in readers)
    if key is None:
        raise TrustError(
            f"{where}: is encrypted for {names}; give that private key in {DECRYPT_VARIABLE}, or to leptonx serve as "
            "--decrypt-key"
        )
    own = identifier(key.public_key())
    if own not in readers:
        raise TrustError(f"{where}: is encrypted for {names}, and this private key is that of {own[:16]}")
    try:
        opener = Opener(readers[own], key)
    except TrustError as error:
        raise TrustError(f"{where}: {error}") from error

    def opened(name: str, data: bytes) -> bytes:
        if name.startswith(OPEN_FOLDERS):
            return data
        try:
            return opener.open(name, data)
        except TrustError as error:
            raise TrustError(f"{where}: {error}") from error

    return VerifiedFiles(store, manifest.files, opened)


def check_signed_files(store: Store, manifest: Manifest, signed: Signed, extra: Sequence[str]) -> None:
    """Compare all files of an artifact with those that were signed, one by one.

    Args:
        store: the artifact.
        manifest: its manifest, whose files are intact.
        signed: what was signed.
        extra: the files that are not in the manifest.

    Raises:
        TrustError: if a file is not signed, or a signed one is missing or another.
    """
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    for name in extra:
        if name in signed.digests:
            digests[name] = hashlib.sha256(store.read(name, limit=MAX_EXTRA_BYTES)).hexdigest()
        elif not is_left_out(name):
            raise TrustError(f"{store.location}: {name} is not signed; loading ignores it, but it does not belong here")
    for name, digest in signed.digests.items():
        if name != MANIFEST and digests.get(name) != digest:
            what = "is missing" if name not in digests else "is not the one"
            raise TrustError(f"{store.location}: {name} {what} that {signed.signer} signed")
    if unsigned := digests.keys() - signed.digests.keys():
        raise TrustError(f"{store.location}: {min(unsigned)} is not signed")
