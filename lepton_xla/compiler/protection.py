"""Signs and encrypts artifacts that exist."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import PurePath

import msgspec

from lepton_xla.arguments import takes
from lepton_xla.compiler.manifest import OPEN_FOLDERS, Encryption, Manifest, Recipient, manifest_to_json
from lepton_xla.compiler.opening import MAX_EXTRA_BYTES, decoded_manifest, read_manifest
from lepton_xla.compiler.storage import Store, VerifiedFiles, atomic_store
from lepton_xla.errors import ArtifactError, TrustError
from lepton_xla.files.listing import MANIFEST, MAX_MANIFEST_BYTES, FileEntry
from lepton_xla.trust.bundles import MAX_SIGNATURE_BYTES, SIGNATURE, is_left_out, sign_digests
from lepton_xla.trust.keys import encryption_key, identifier, signing_key
from lepton_xla.trust.sealing import Sealer


@takes(location=(str, os.PathLike), key=(str, os.PathLike))
def sign(location: str | os.PathLike[str], *, key: str | os.PathLike[str]) -> str:
    """Sign an artifact with all files in its folder, as OpenSSF Model Signing does; replaces an earlier signature.

    The signature is the file `model.sig` in the artifact. Every file is checked against its digest first.

    Args:
        location: a local folder, or a `gs://` or `s3://` prefix.
        key: file of the private key, see `trust.create_keys`.

    Returns:
        The identifier of the key.

    Raises:
        ArtifactError: if a file is missing or damaged.
        TrustError: if the key cannot be used.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> private, public = lx.trust.create_keys("release")
    >>> _ = lx.sign("tiny.lepton", key=private)
    >>> lx.load("tiny.lepton", trust=public).name
    'model'
    """
    signer, store = signing_key(key), Store(location)
    data = store.read(MANIFEST, limit=MAX_MANIFEST_BYTES)
    manifest = decoded_manifest(store, data)
    files = VerifiedFiles(store, manifest.files)
    for name in manifest.files:
        files.read(name)
    digests = {MANIFEST: _sha256(data)} | {name: entry.sha256 for name, entry in manifest.files.items()}
    for name in store.names():
        if name not in digests and not is_left_out(name):
            digests[name] = _sha256(store.read(name, limit=MAX_EXTRA_BYTES))
    named = PurePath(store.location.rstrip("/")).name or manifest.name
    signature = sign_digests(named, digests, signer)
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise TrustError(f"{store.location}: has too many files to be signed: {len(digests)}")
    if store.is_replaced or _sha256(store.read(MANIFEST, limit=MAX_MANIFEST_BYTES)) != digests[MANIFEST]:
        raise ArtifactError(f"{store.location}: another artifact has taken its place meanwhile; sign it again")
    store.write(SIGNATURE, signature)
    return identifier(signer.public_key())


@takes(location=(str, os.PathLike), target=(str, os.PathLike), to=(str, os.PathLike, Sequence))
def encrypt(
    location: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    overwrite: bool = False,
) -> Manifest:
    """Write an encrypted copy of an artifact: everything but the programs, the executables and the manifest.

    Any of the recipients can load it. Encryption does not say who made an artifact: sign the copy as well. A signature
    of the original is left out.

    Args:
        location: the artifact.
        target: where the copy goes.
        to: files of the recipients' public keys, see `trust.create_keys`.
        overwrite: whether to replace an existing artifact.

    Returns:
        The manifest of the copy.

    Raises:
        ArtifactError: if a file is missing or damaged, or the target exists or cannot be written.
        TrustError: if it is encrypted already, or a key cannot be used.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> private, public = lx.trust.create_keys("server", "encryption")
    >>> _ = lx.encrypt("tiny.lepton", "sealed.lepton", to=public)
    >>> lx.load("sealed.lepton", decrypt_key=private)(x=np.eye(1, 4, dtype=np.float32))["output"]
    array([[1., 0., 0., 0.]], dtype=float32)
    """
    keys = [encryption_key(path) for path in ([to] if isinstance(to, str | os.PathLike) else to)]
    if not keys:
        raise TrustError("there is no recipient to encrypt for")
    store = Store(location)
    manifest = read_manifest(store)
    if manifest.encryption is not None:
        raise TrustError(f"{store.location}: is encrypted already")
    files, sealer = VerifiedFiles(store, manifest.files), Sealer()
    stored: dict[str, FileEntry] = {}
    with atomic_store(target, overwrite=overwrite) as copy:
        for name in manifest.files:
            data = files.read(name)
            if not name.startswith(OPEN_FOLDERS):
                data = sealer.seal(name, data)
            copy.write(name, data)
            stored[name] = FileEntry(size=len(data), sha256=_sha256(data))
        wrapped = {identifier(key): sealer.wrap(key) for key in keys}
        recipients = tuple(Recipient(key=name, wrapped=data) for name, data in wrapped.items())
        encryption = Encryption(cipher="AES-256-GCM", recipients=recipients)
        sealed = msgspec.structs.replace(manifest, files=stored, encryption=encryption)
        copy.write(MANIFEST, manifest_to_json(sealed))
    return sealed


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
