"""Signature files in the format of OpenSSF Model Signing 1.0, for elliptic-curve keys.

A sigstore bundle (v0.3, JSON) holds a DSSE envelope, whose payload is an in-toto statement (v1) with the SHA-256 of
each file. `model_signing verify key` reads what is written here, and what `model_signing sign key` writes is read here.
Only signatures made here say when: `signed_at`, a field of the predicate that others pass over.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime
import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from lepton_xla.errors import TrustError
from lepton_xla.trust.keys import TrustedKeys, identifier

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SIGNATURE = "model.sig"
# Some 250 bytes a file, in base64: room for 40,000 files.
MAX_SIGNATURE_BYTES = 16 << 20

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
# What model_signing leaves out by default too.
_LEFT_OUT = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore")

type _Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Key(msgspec.Struct):
    hint: _Sha256 | None = None


class _Material(msgspec.Struct, rename="camel"):
    public_key: _Key
    tlog_entries: list[Any] = []


class _Signature(msgspec.Struct):
    sig: str
    keyid: str = ""


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: str
    signatures: Annotated[list[_Signature], msgspec.Meta(min_length=1, max_length=1)]


class _Bundle(msgspec.Struct, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Digest(msgspec.Struct):
    sha256: _Sha256


class _Subject(msgspec.Struct):
    name: str
    digest: _Digest


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: _Sha256


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str
    allow_symlinks: bool = False
    ignore_paths: list[str] = []


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: list[_Resource]
    signed_at: str | None = None


class _Statement(msgspec.Struct):
    type: str = msgspec.field(name="_type")
    subject: Annotated[list[_Subject], msgspec.Meta(min_length=1, max_length=1)]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: _Predicate


@dataclasses.dataclass(frozen=True)
class Signed:
    """What a trusted key signed.

    Attributes:
        signer: name of the key's file.
        key: the key's identifier.
        digests: file -> SHA-256 in hexadecimal.
        signed_s: when, by the signer's clock, in seconds since the epoch; None where the signature does not say.
    """

    signer: str
    key: str
    digests: Mapping[str, str]
    signed_s: float | None = None


def sign_digests(name: str, digests: Mapping[str, str], key: EllipticCurvePrivateKey) -> bytes:
    """Make a signature file.

    Args:
        name: the model's, for readers.
        digests: file -> SHA-256 in hexadecimal.
        key: signs.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    resources = [_Resource(file, "sha256", digest) for file, digest in sorted(digests.items())]
    statement = _Statement(
        type=_STATEMENT_TYPE,
        subject=[_Subject(name, _Digest(_root(resources)))],
        predicate_type=_PREDICATE_TYPE,
        predicate=_Predicate(
            _Serialization("files", "sha256", ignore_paths=list(_LEFT_OUT)), resources, utc(time.time())
        ),
    )
    payload = msgspec.json.encode(statement)
    signature = key.sign(_pae(payload), ec.ECDSA(_hash(key.public_key())))
    bundle = _Bundle(
        _BUNDLE_TYPE,
        _Material(_Key(identifier(key.public_key()))),
        _Envelope(_text(payload), _PAYLOAD_TYPE, [_Signature(_text(signature))]),
    )
    return msgspec.json.encode(bundle)


def is_left_out(name: str) -> bool:
    """Whether a file of a model's folder is never signed: the signature itself, and what belongs to git."""
    return name.partition("/")[0] in _LEFT_OUT


def signer_of(data: bytes) -> str:
    """The identifier of the key that a signature file claims to be of. Nothing is verified.

    Raises:
        TrustError: if it is no signature file.
    """
    return _decoded(data).verification_material.public_key.hint or "unknown"


def check_signature(data: bytes, trusted: TrustedKeys) -> Signed:
    """Check that a trusted key signed, and give what it signed.

    Args:
        data: the signature file, of at most `MAX_SIGNATURE_BYTES`.
        trusted: the keys.

    Raises:
        TrustError: if it is no signature file, is of another key, or the signature is wrong, or older than it may be.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    bundle = _decoded(data)
    envelope, claimed = bundle.dsse_envelope, bundle.verification_material.public_key.hint
    if bundle.media_type != _BUNDLE_TYPE or envelope.payload_type != _PAYLOAD_TYPE:
        raise TrustError(
            f"is a {bundle.media_type!r:.100} of {envelope.payload_type!r:.100}, not of an in-toto statement"
        )
    payload, signature = _bytes(envelope.payload), _bytes(envelope.signatures[0].sig)
    # The claim only says which key to try. Signatures of model_signing before 1.1 have none.
    candidates = trusted.keys if not claimed else {key: trusted.keys[key] for key in (claimed,) if key in trusted.keys}
    for key, (name, public) in candidates.items():
        try:
            public.verify(signature, _pae(payload), ec.ECDSA(_hash(public)))
        except InvalidSignature:
            continue
        signed = _signed(name, key, payload)
        if trusted.not_before_s is not None:
            _check_age(signed, trusted.not_before_s)
        return signed
    if candidates and claimed:
        raise TrustError(f"is wrong: {candidates[claimed][0]} did not sign this")
    raise TrustError(f"is of a key that is not trusted here ({claimed or 'unknown'})")


def utc(seconds: float) -> str:
    """A time as ISO 8601 has it, in UTC.

    >>> utc(0.25)
    '1970-01-01T00:00:00.250Z'
    """
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _check_age(signed: Signed, not_before_s: float) -> None:
    wanted = f"here only what was signed at {utc(not_before_s)} or later is trusted: sign it again if it is to be used"
    if signed.signed_s is None:
        raise TrustError(f"does not say when {signed.signer} signed it, and {wanted}")
    if signed.signed_s < not_before_s:
        raise TrustError(f"is of {utc(signed.signed_s)}, and {wanted}")


def _signed(signer: str, key: str, payload: bytes) -> Signed:
    """Read a statement whose signature is right: what a trusted key signed may still be meant for something else."""
    try:
        statement = msgspec.json.decode(payload, type=_Statement)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"signs no statement of Model Signing: {error!s:.200}") from error
    how, resources = statement.predicate.serialization, statement.predicate.resources
    if statement.type != _STATEMENT_TYPE or statement.predicate_type != _PREDICATE_TYPE:
        raise TrustError(f"signs a {statement.predicate_type!r:.100}, not a statement of Model Signing 1.0")
    if how.method != "files" or {how.hash_type, *(each.algorithm for each in resources)} != {"sha256"}:
        raise TrustError("signs something else than the SHA-256 of whole files")
    digests = {each.name: each.digest for each in resources}
    if len(digests) != len(resources) or statement.subject[0].digest.sha256 != _root(resources):
        raise TrustError("signs a statement that contradicts itself")
    return Signed(signer, key, digests, _time(statement.predicate.signed_at))


def _time(text: str | None) -> float | None:
    try:
        found = None if text is None else datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise TrustError(f"signs a time that is none: {text!r:.100}") from error
    if found is not None and found.tzinfo is None:
        raise TrustError(f"signs a time without its zone: {text!r:.100}")
    return None if found is None else found.timestamp()


def _root(resources: list[_Resource]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(each.digest) for each in resources)).hexdigest()


def _decoded(data: bytes) -> _Bundle:
    try:
        return msgspec.json.decode(data, type=_Bundle)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"is no signature file: {error!s:.200}") from error


def _pae(payload: bytes) -> bytes:
    """What DSSE signs: its pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _hash(key: EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes

    return {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}[key.curve.key_size]()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TrustError(f"is no signature file: {error}") from error
