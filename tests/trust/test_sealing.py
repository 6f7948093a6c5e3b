"""Sealed files: they open under their own name and key, and not otherwise."""

import pytest
import trust_keys as keys
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import TrustError
from lepton_xla.trust.sealing import Opener, Sealer


def opener(sealer, kind="x25519"):
    return Opener(sealer.wrap(keys.key(kind).public_key()), keys.key(kind))


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.binary(max_size=200), max_size=5))
def test_what_is_sealed_opens(files):
    sealer = Sealer()
    sealed = {name: sealer.seal(name, data) for name, data in files.items()}
    opened = opener(sealer)
    assert {name: opened.open(name, data) for name, data in sealed.items()} == files
    assert len({data[:12] for data in sealed.values()}) == len(files)  # nonces


def test_the_format():
    """Read by hand: AES-256-GCM, the name authenticated, the data key wrapped by HPKE."""
    sealer = Sealer()
    sealer.seal("other", b"")
    sealed = sealer.seal("weights/a", b"secret")
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    wrapped = sealer.wrap(keys.key("x25519").public_key())
    data_key = suite.decrypt(wrapped, keys.key("x25519"), b"lepton_xla data key 1")
    assert sealed[:12] == bytes(11) + b"\x01"
    assert AESGCM(data_key).decrypt(sealed[:12], sealed[12:], b"lepton_xla sealed file 1\0weights/a") == b"secret"
    assert len(data_key) == 32
    assert wrapped != sealer.wrap(keys.key("x25519").public_key())


def test_each_recipient_opens_it():
    sealer = Sealer()
    sealed = sealer.seal("a", b"secret")
    for kind in ("x25519", "x25519_other"):
        assert opener(sealer, kind).open("a", sealed) == b"secret"


def test_the_key_of_somebody_else_does_not_unwrap():
    with pytest.raises(TrustError, match="does not open with this key"):
        Opener(Sealer().wrap(keys.key("x25519").public_key()), keys.key("x25519_other"))


def test_nothing_is_sealed_twice():
    sealer = Sealer()
    sealer.seal("a", b"1")
    with pytest.raises(ValueError, match="a is sealed already"):
        sealer.seal("a", b"2")


SEALER = Sealer()
FILES = {f"weights/c/{number}": bytes([number]) * 40 for number in range(3)}
SEALED = {name: SEALER.seal(name, data) for name, data in FILES.items()}
WRAPPED = SEALER.wrap(keys.key("x25519").public_key())
OPENER = opener(SEALER)


def test_files_do_not_open_in_the_place_of_another():
    for name in FILES:
        for other in set(FILES) - {name}:
            with pytest.raises(TrustError, match=f"{name} does not open: it is damaged, or not the file of that name"):
                OPENER.open(name, SEALED[other])


def test_files_of_another_artifact_do_not_open():
    with pytest.raises(TrustError, match="does not open"):
        OPENER.open("a", Sealer().seal("a", b"secret"))


@given(st.sampled_from(sorted(FILES)), st.data())
def test_no_change_of_a_file_opens(name, data):
    sealed = bytearray(SEALED[name])
    match data.draw(st.sampled_from(["flip", "cut", "grow", "cut the start"])):
        case "flip":
            sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del sealed[data.draw(st.integers(0, len(sealed) - 1)) :]
        case "grow":
            sealed += data.draw(st.binary(min_size=1))
        case _:
            del sealed[: data.draw(st.integers(1, len(sealed)))]
    with pytest.raises(TrustError, match=rf"{name} (does not open|is too short)"):
        OPENER.open(name, bytes(sealed))


@given(st.one_of(st.binary(max_size=100), st.integers(0, len(WRAPPED) * 8 - 1)))
def test_no_change_of_a_wrapped_key_opens(change):
    wrapped = bytearray(WRAPPED)
    if isinstance(change, int):
        wrapped[change // 8] ^= 1 << change % 8
    else:
        wrapped = change
    with pytest.raises(TrustError, match="does not open with this key"):
        Opener(bytes(wrapped), keys.key("x25519"))


def test_a_data_key_of_another_size_is_refused():
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    wrapped = suite.encrypt(b"short", keys.key("x25519").public_key(), b"lepton_xla data key 1")
    with pytest.raises(TrustError, match="has 5 bytes, not 32"):
        Opener(wrapped, keys.key("x25519"))
