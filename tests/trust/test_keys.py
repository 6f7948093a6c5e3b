"""Key files: what is made can be read, whatever is no such key is refused, and no error shows a secret."""

import hashlib
import logging
import os
import stat
import subprocess
import sys

import pytest
import trust_keys as keys
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import TrustError
from lepton_xla.trust import TrustedKeys, create_keys
from lepton_xla.trust.keys import decryption_key, encryption_key, identifier, signing_key

VARIABLE = "LEPTON_DECRYPT_KEY"


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def lines_of(pem):
    """What of a PEM text is secret: its lines between the first and the last."""
    return pem.decode().strip().splitlines()[1:-1]


def test_a_pair_is_made_for_its_owner_only(tmp_path):
    old = os.umask(0)
    try:
        private, public = create_keys(tmp_path / "release.v1")
    finally:
        os.umask(old)
    assert (private.name, public.name) == ("release.v1.key", "release.v1.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PRIVATE" not in public.read_bytes()
    assert signing_key(private).public_key() == next(iter(TrustedKeys.read(public).keys.values()))[1]
    sealing = create_keys(tmp_path / "server", "encryption")
    assert encryption_key(sealing[1]) == decryption_key(sealing[0], VARIABLE).public_key()


@pytest.mark.parametrize("name", ["release.key", "release.pub"])
def test_no_key_is_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrustError, match=rf"{name} exists; choose another name"):
        create_keys(tmp_path / "release")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("place", ["missing/release", "a\0b"])
def test_a_pair_that_cannot_be_written(tmp_path, place):
    with pytest.raises(TrustError, match="cannot be written"):
        create_keys(tmp_path / place)


def test_a_key_is_known_by_the_digest_of_its_pem():
    assert identifier(keys.key("p256").public_key()) == hashlib.sha256(keys.public_pem("p256")).hexdigest()


READERS = {
    "sign": (signing_key, keys.private, {"p256", "p256_other", "p384", "p521"}),
    "decrypt": (lambda path: decryption_key(path, VARIABLE), keys.private, {"x25519", "x25519_other"}),
    "encrypt": (encryption_key, keys.public, {"x25519", "x25519_other"}),
    "trust": (TrustedKeys.read, keys.public, {"p256", "p256_other", "p384", "p521"}),
}


@pytest.mark.parametrize("kind", keys.KINDS)
@pytest.mark.parametrize("use", READERS)
def test_only_keys_of_the_right_kind_are_taken(use, kind):
    read, file, right = READERS[use]
    if kind in right:
        assert read(file(kind)) is not None
        return
    with pytest.raises(TrustError, match=rf"{kind}\.(key|pub): a key of the kind ") as error:
        read(file(kind))
    assert not any(line in str(error.value) for line in lines_of(keys.private_pem(kind)))


@pytest.mark.parametrize("use", READERS)
def test_private_and_public_keys_are_not_mixed_up(use):
    read, file, right = READERS[use]
    kind = sorted(right)[0]
    wrong = keys.public(kind) if file is keys.private else keys.private(kind)
    said = "is not a private key" if file is keys.private else "holds a private key, where a public one belongs"
    with pytest.raises(TrustError, match=said):
        read(wrong)


def locked():
    secret = serialization.BestAvailableEncryption(b"secret")
    return keys.key("p256").private_bytes(keys.PEM, keys.PKCS8, secret)


BAD = {
    "nothing": (b"", "is not"),
    "text": (b"hello", "is not"),
    "locked": (locked(), "locked with a password|private key, where"),
    "cut": (keys.private_pem("p256")[:-40], "damaged|private key, where"),
    "cut_public": (keys.public_pem("p256")[:-40], "is not|damaged"),
    "two": (keys.public_pem("p256") + keys.public_pem("p384"), "is not"),
    "public_and_private": (keys.public_pem("p256") + keys.private_pem("p256"), "private key, where|kind|damaged"),
    "huge": (keys.public_pem("p256") + b"\n" * (65 << 10), "is not"),
    "not_utf8": (b"-----BEGIN PUBLIC KEY-----\n\xff\xfe\n-----END PUBLIC KEY-----", "is not|damaged"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("use", READERS)
def test_what_is_no_key_is_refused_without_showing_it(tmp_path, use, bad):
    data, said = BAD[bad]
    (tmp_path / "bad.pem").touch(0o600)
    (tmp_path / "bad.pem").write_bytes(data)
    if (use, bad) == ("sign", "public_and_private"):
        return  # the private key of the file is one
    with pytest.raises(TrustError, match=rf"bad\.pem: .*({said})") as error:
        READERS[use][0](tmp_path / "bad.pem")
    assert not any(line in str(error.value) for line in lines_of(keys.private_pem("p256")))


@pytest.mark.parametrize("use", READERS)
def test_files_that_cannot_be_read(tmp_path, use):
    read = READERS[use][0]
    for path in (tmp_path / "missing.pem", tmp_path / "a\0b", "/dev/zero", tmp_path):
        with pytest.raises(TrustError, match=r"cannot be read|is not a file of a key|holds no public key"):
            read(path)


@pytest.mark.parametrize("use", READERS)
def test_a_key_that_others_may_write_is_refused(tmp_path, use):
    read, file, right = READERS[use]
    copy = tmp_path / "copy.pem"
    copy.write_bytes(file(sorted(right)[0]).read_bytes())
    copy.chmod(0o622)
    with pytest.raises(TrustError, match=r"others may write to this key \(mode 0622\)"):
        read(copy)


def test_a_private_key_that_others_may_read_is_told(tmp_path, caplog):
    copy = tmp_path / "copy.pem"
    copy.write_bytes(keys.private_pem("p256"))
    copy.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        signing_key(copy)
    assert "others may read this private key" in caplog.text


# Trusted keys.


def test_a_folder_of_keys(tmp_path):
    for kind in ("p256", "p384"):
        (tmp_path / f"{kind}.pub").write_bytes(keys.public_pem(kind))
    # As an orchestrator mounts secrets.
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "p521.pub").write_bytes(keys.public_pem("p521"))
    (tmp_path / "p521.pub").symlink_to("..data/p521.pub")
    found = TrustedKeys.read(tmp_path).keys
    assert sorted(name for name, _ in found.values()) == ["p256.pub", "p384.pub", "p521.pub"]
    assert set(found) == {hashlib.sha256(keys.public_pem(kind)).hexdigest() for kind in ("p256", "p384", "p521")}


def test_a_folder_trusts_nothing_if_one_file_is_no_key(tmp_path):
    (tmp_path / "a.pub").write_bytes(keys.public_pem("p256"))
    (tmp_path / "notes.txt").write_text("keys of 2026")
    with pytest.raises(TrustError, match=r"notes\.txt: is not one public key"):
        TrustedKeys.read(tmp_path)


def test_an_empty_folder_trusts_nobody(tmp_path):
    with pytest.raises(TrustError, match="holds no public key, so nothing would be trusted"):
        TrustedKeys.read(tmp_path)


def test_too_many_files_are_not_read(tmp_path):
    for number in range(1001):
        (tmp_path / str(number)).touch()
    with pytest.raises(TrustError, match="1001 files are more than the 1000"):
        TrustedKeys.read(tmp_path)


# The environment.


@pytest.mark.parametrize("as_path", [True, False])
def test_a_key_from_the_environment(monkeypatch, as_path):
    monkeypatch.setenv(
        VARIABLE, str(keys.private("x25519")) if as_path else f"\n{keys.private_pem('x25519').decode()}\n"
    )
    assert decryption_key(None, VARIABLE).public_key() == keys.key("x25519").public_key()
    # What is asked for comes first.
    asked = decryption_key(keys.private("x25519_other"), VARIABLE)
    assert asked.public_key() == keys.key("x25519_other").public_key()


def test_without_a_key_there_is_none(monkeypatch):
    assert decryption_key(None, VARIABLE) is None
    monkeypatch.setenv(VARIABLE, "")
    assert decryption_key(None, VARIABLE) is None


@given(st.one_of(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.integers(1, 300)))
def test_no_error_shows_what_the_environment_holds(value):
    """Such as a key without its first line, or in another encoding."""
    pem = keys.private_pem("x25519").decode()
    held = value if isinstance(value, str) else pem[value % len(pem) :]
    secret = next(line for line in lines_of(pem.encode()) if len(line) > 20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(VARIABLE, held)
        error = None
        try:
            found = decryption_key(None, VARIABLE)
        except TrustError as raised:
            error = raised
    if error is None:
        assert not held or found is not None
        return
    assert VARIABLE in str(error)
    assert secret[10:] not in str(error)
    # Nor does a traceback.
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_without_cryptography_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['cryptography.hazmat.primitives.hpke'] = None\n"
        "from lepton_xla.trust import TrustedKeys, create_keys\n"
        "for call in (lambda: create_keys('x'), lambda: TrustedKeys.read('x')):\n"
        "    try: call()\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (
        done.stdout.count("MissingPackageError a key needs the package cryptography: pip install 'lepton-xla[trust]'")
        == 2
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not_before = 3", "must be a time with its zone"),
        ("not_before = 2026-01-01T00:00:00", "must be a time with its zone"),
        ("not_before = 2026-01-01", "must be a time with its zone"),
        ("not_after = 2026-01-01T00:00:00Z", "unknown key 'not_after'"),
        ("not toml", "is not TOML"),
        (b"\xff", "is not TOML"),
    ],
)
def test_a_policy_that_says_nothing_is_refused(tmp_path, text, message):
    create_keys(tmp_path / "a")
    (tmp_path / "a.key").unlink()
    policy = tmp_path / "policy.toml"
    policy.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TrustError, match=message):
        TrustedKeys.read(tmp_path)
    policy.write_text("")
    assert TrustedKeys.read(tmp_path).not_before_s is None
    policy.chmod(0o666)
    with pytest.raises(TrustError, match="others may write"):
        TrustedKeys.read(tmp_path)
