"""Signature files: theirs are read, and nothing but a right signature of a trusted key is taken."""

import base64
import dataclasses
import datetime
import hashlib
import json
import pathlib

import pytest
import trust_keys as keys
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import TrustError
from lepton_xla.trust.bundles import check_signature, is_left_out, sign_digests, signer_of
from lepton_xla.trust.keys import TrustedKeys, identifier

THEIRS = json.loads(pathlib.Path(__file__).with_name("model_signing.json").read_text())["signatures"]
DIGESTS = {"manifest.json": "0" * 64, "weights/a": "12" * 32}


def trusted(*kinds):
    public = [keys.key(kind).public_key() for kind in kinds]
    return TrustedKeys({identifier(key): (kind, key) for kind, key in zip(kinds, public, strict=True)})


def signature(kind="p256", digests=DIGESTS):
    return sign_digests("tiny.lepton", digests, keys.key(kind))


def envelope(payload, kind="p256", *, payload_type="application/vnd.in-toto+json", hint=None, **more):
    """A signature file with any payload, really signed."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(data), data)
    key = keys.key(kind)
    sig = key.sign(signed, ec.ECDSA(hashes.SHA256()))
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hint or identifier(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(data).decode(),
            "payloadType": payload_type,
            "signatures": [{"sig": base64.b64encode(sig).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle | more).encode()


def statement(**changes):
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in DIGESTS.items()]
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in DIGESTS.values())).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "tiny", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": {"method": "files", "hash_type": "sha256"}, "resources": resources},
    } | changes


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_what_was_signed_comes_back(kind):
    found = check_signature(signature(kind), trusted("p256_other", kind))
    assert found.digests == DIGESTS
    assert (found.signer, found.key) == (kind, identifier(keys.key(kind).public_key()))
    assert signer_of(signature(kind)) == found.key


def test_a_statement_that_is_written_by_hand():
    assert check_signature(envelope(statement()), trusted("p256")).digests == DIGESTS


@pytest.mark.parametrize("number", range(3))
def test_signatures_of_model_signing_are_read(tmp_path, number):
    (tmp_path / "theirs.pub").write_text(THEIRS[number]["public"])
    found = check_signature(THEIRS[number]["signature"].encode(), TrustedKeys.read(tmp_path))
    assert found.digests == {
        name: hashlib.sha256(data).hexdigest() for name, data in (("a.txt", b"one"), ("weights/b", b"two"))
    }
    assert found.signer == "theirs.pub"


def test_a_signature_without_the_name_of_its_key_is_tried_with_each():
    bundle = json.loads(signature())
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    assert check_signature(json.dumps(bundle).encode(), trusted("p384", "p256_other", "p256")).signer == "p256"
    with pytest.raises(TrustError, match="is of a key that is not trusted here"):
        check_signature(json.dumps(bundle).encode(), trusted("p384", "p256_other"))


def test_another_key_is_refused():
    with pytest.raises(TrustError, match=r"is of a key that is not trusted here \([0-9a-f]{64}\)"):
        check_signature(signature(), trusted("p256_other"))
    with pytest.raises(TrustError, match="is of a key that is not trusted here"):
        check_signature(signature(), TrustedKeys({}))


def test_a_signature_that_claims_to_be_of_a_trusted_key():
    other = envelope(statement(), "p256_other", hint=identifier(keys.key("p256").public_key()))
    with pytest.raises(TrustError, match="is wrong: p256 did not sign this"):
        check_signature(other, trusted("p256", "p256_other"))


WRONG = {
    "media_type": (envelope(statement(), mediaType="application/json"), "not of an in-toto statement"),
    "payload_type": (envelope(statement(), payload_type="text/plain"), "not of an in-toto statement"),
    "type": (envelope(statement(_type="https://in-toto.io/Statement/v0.1")), "not a statement of Model Signing 1.0"),
    "predicate": (envelope(statement(predicateType="https://slsa.dev/provenance/v1")), "not a statement"),
    "no_json": (envelope(b"\xff"), "signs no statement"),
    "nothing": (envelope({}), "signs no statement"),
    "deep": (envelope(b"[" * 100_000), "signs no statement"),
    "no_subject": (envelope(statement(subject=[])), "signs no statement"),
    "two_subjects": (envelope(statement(subject=statement()["subject"] * 2)), "signs no statement"),
    "root": (envelope(statement(subject=[{"name": "", "digest": {"sha256": "1" * 64}}])), "contradicts itself"),
    "shards": (
        envelope(
            statement(
                predicate=statement()["predicate"] | {"serialization": {"method": "shards", "hash_type": "sha256"}}
            )
        ),
        "something else than the SHA-256 of whole files",
    ),
    "blake": (
        envelope(
            statement(
                predicate=statement()["predicate"] | {"serialization": {"method": "files", "hash_type": "blake2"}}
            )
        ),
        "something else than the SHA-256 of whole files",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_trusted_key_signed_may_be_something_else(wrong):
    data, said = WRONG[wrong]
    with pytest.raises(TrustError, match=said) as error:
        check_signature(data, trusted("p256"))
    assert len(str(error.value)) < 500


def test_a_file_that_is_signed_twice_is_refused():
    resources = statement()["predicate"]["resources"] + [
        {"name": "weights/a", "algorithm": "sha256", "digest": "3" * 64}
    ]
    root = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()
    twice = statement(
        subject=[{"name": "", "digest": {"sha256": root}}],
        predicate=statement()["predicate"] | {"resources": resources},
    )
    with pytest.raises(TrustError, match="contradicts itself"):
        check_signature(envelope(twice), trusted("p256"))


def test_two_signatures_are_not_read():
    bundle = json.loads(signature())
    bundle["dsseEnvelope"]["signatures"] *= 2
    with pytest.raises(TrustError, match="is no signature file"):
        check_signature(json.dumps(bundle).encode(), trusted("p256"))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(st.dictionaries(NAMES, st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=20))
def test_any_names_and_digests_come_back(digests):
    assert check_signature(signature(digests=digests), trusted("p256")).digests == digests


GOOD = signature()


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_no_flipped_bit_signs_anything_else(place, bit):
    data = bytearray(GOOD)
    data[place] ^= 1 << bit
    try:
        found = check_signature(bytes(data), trusted("p256", "p256_other"))
    except TrustError:
        return
    # A bit of the JSON round it that means nothing, such as the key's identifier in the envelope.
    assert found.digests == DIGESTS
    assert found.signer == "p256"


@given(st.integers(0, len(GOOD) - 1))
def test_a_signature_that_is_cut_is_refused(length):
    with pytest.raises(TrustError):
        check_signature(GOOD[:length], trusted("p256"))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    with pytest.raises(TrustError):
        check_signature(data, trusted("p256"))
    with pytest.raises(TrustError):
        signer_of(data)


def test_what_is_never_signed():
    assert [is_left_out(name) for name in ("model.sig", ".git/config", ".gitignore")] == [True] * 3
    assert not any(is_left_out(name) for name in ("manifest.json", "weights/model.sig", ".github2", "model.sig2"))


@pytest.mark.parametrize(
    ("signed_at", "outcome"),
    [
        (None, "does not say when p256 signed it"),
        ("2026-11-28T00:00:00+00:00", None),
        ("2026-11-28T02:00:00+02:00", None),
        ("2026-11-27T23:59:59.999Z", "is of 2026-11-27T23:59:59.999Z, and here only"),
        ("2026-11-28T00:00:00", "without its zone"),
        ("soon", "signs a time that is none"),
    ],
)
def test_what_was_signed_too_long_ago_is_not_trusted(signed_at, outcome):
    document = statement()
    document["predicate"]["signed_at"] = signed_at
    limit = datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC).timestamp()
    since = dataclasses.replace(trusted("p256"), not_before_s=limit)
    if outcome is None:
        assert check_signature(envelope(document), since).signed_s == limit
    else:
        with pytest.raises(TrustError, match=outcome):
            check_signature(envelope(document), since)
    assert check_signature(signature(), since).digests == DIGESTS
