"""Signed and encrypted artifacts: what is not signed is not used, and what is encrypted is nowhere in the clear."""

import hashlib
import json
import logging
import os
import shutil

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from compiler_models import dense_reference, dense_weights
from hypothesis import given
from hypothesis import strategies as st

import lepton_xla as lx
from lepton_xla.compiler import code, loading, opening
from lepton_xla.compiler.manifest import manifest_from_json, manifest_to_json
from lepton_xla.compiler.storage import Store, VerifiedFiles
from lepton_xla.errors import ArtifactError, TrustError
from lepton_xla.trust.keys import TrustedKeys

X = np.linspace(-1, 1, 36, dtype=np.float32).reshape(3, 12)


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("LEPTON_DECRYPT_KEY", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory, saved_dense):
    """Keys `release`, `other` and `server`, and the artifact signed and encrypted."""
    place = tmp_path_factory.mktemp("trust")
    for name in ("release", "other"):
        lx.trust.create_keys(place / name)
    for name in ("server", "second"):
        lx.trust.create_keys(place / name, "encryption")
    shutil.copytree(saved_dense, place / "signed.lepton")
    lx.sign(place / "signed.lepton", key=place / "release.key")
    lx.encrypt(saved_dense, place / "sealed.lepton", to=[place / "server.pub", place / "second.pub"])
    lx.sign(place / "sealed.lepton", key=place / "release.key")
    return place


@pytest.fixture
def signed(place, tmp_path):
    return shutil.copytree(place / "signed.lepton", tmp_path / "copy.lepton")


@pytest.fixture
def sealed(place, tmp_path):
    return shutil.copytree(place / "sealed.lepton", tmp_path / "copy.lepton")


@pytest.fixture
def nothing_used(monkeypatch):
    """Fails the test where a program is read or code is loaded."""

    def used(*_, **__):
        raise AssertionError("something of the artifact was used")

    for module, name in (
        (code.Code, "read"),
        (loading, "compile_portable"),
        (loading, "read_all"),
        (loading, "run_expand"),
    ):
        monkeypatch.setattr(module, name, used)


def test_a_signed_artifact_loads(place):
    for trust in (place / "release.pub", str(place / "release.pub"), TrustedKeys.read(place / "release.pub")):
        model = lx.load(place / "signed.lepton", trust=trust)
    np.testing.assert_allclose(model(x=X)["output"], dense_reference(X), rtol=1e-5, atol=1e-6)
    assert model.route == "executables"
    assert lx.verify(place / "signed.lepton", trust=place / "release.pub").signer == "release.pub"
    assert lx.verify(place / "signed.lepton").signer == ""
    assert lx.verify(place / "signed.lepton").extra == ()


def test_one_of_several_keys_will_do(place, tmp_path):
    for name in ("release.pub", "other.pub"):
        shutil.copy(place / name, tmp_path)
    assert lx.verify(place / "signed.lepton", trust=tmp_path).signer == "release.pub"


def refused(path, place, said, key="release.pub"):
    for use in (lx.load, lx.verify):
        with pytest.raises(TrustError, match=said) as error:
            use(path, trust=place / key)
        assert str(path) in str(error.value)


def test_an_unsigned_artifact_is_refused(place, saved_dense, nothing_used):
    refused(saved_dense, place, r"is not signed \(no model\.sig\)")


def test_an_artifact_of_another_key_is_refused(place, nothing_used):
    refused(place / "signed.lepton", place, "model.sig is of a key that is not trusted here", "other.pub")


def test_an_artifact_that_is_not_there_is_missing_not_unsigned(place, tmp_path):
    with pytest.raises(ArtifactError, match="there is no such folder"):
        lx.load(tmp_path / "nothing.lepton", trust=place / "release.pub")


def test_a_signature_of_another_artifact_is_refused(place, saved_dense, signed, nothing_used):
    manifest = manifest_from_json((signed / "manifest.json").read_bytes())
    (signed / "manifest.json").write_bytes(manifest_to_json(msgspec.structs.replace(manifest, version="2")))
    lx.verify(signed)
    refused(signed, place, "manifest.json is not the one that release.pub signed")


def test_a_manifest_that_only_looks_another_is_refused(place, signed, nothing_used):
    """Equal for a JSON parser, and for the manifest's own digest, but not what was signed."""
    data = (signed / "manifest.json").read_bytes()
    (signed / "manifest.json").write_bytes(data + b"\n")
    lx.verify(signed)
    refused(signed, place, "manifest.json is not the one that release.pub signed")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b"[" * 200_000])
def test_what_is_no_signature_is_refused(place, signed, data, nothing_used):
    (signed / "model.sig").write_bytes(data)
    refused(signed, place, "model.sig is no signature file")


def test_a_cut_signature_is_refused(place, signed, nothing_used):
    data = (signed / "model.sig").read_bytes()
    for length in range(0, len(data), 97):
        (signed / "model.sig").write_bytes(data[:length])
        refused(signed, place, "model.sig is no signature file")


def test_a_huge_signature_is_not_read(place, signed, nothing_used):
    with (signed / "model.sig").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(ArtifactError, match=r"model\.sig has 1099511627776 bytes, more than the limit"):
        lx.load(signed, trust=place / "release.pub")


@pytest.mark.parametrize("name", ["model.sig", "manifest.json", "programs/symbolic.stablehlo"])
def test_a_link_out_of_the_artifact_is_refused(place, signed, tmp_path, name, nothing_used):
    (signed / name).rename(tmp_path / "outside")
    (signed / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=f"{name} is not a regular file inside the artifact"):
        lx.load(signed, trust=place / "release.pub")


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("copy", ["signed", "sealed"])
def test_a_flipped_bit_in_any_file_is_refused(place, request, copy, nothing_used):
    path = request.getfixturevalue(copy)
    for name in files_of(path):
        before = (path / name).read_bytes()
        for at in {0, len(before) // 2, len(before) - 1}:
            data = bytearray(before)
            data[at] ^= 4
            (path / name).write_bytes(data)
            with pytest.raises(ArtifactError, match=name):
                lx.verify(path, trust=place / "release.pub")
        (path / name).write_bytes(before)
    lx.verify(path, trust=place / "release.pub")


def test_files_that_are_not_signed(place, signed):
    """Loading never reads them, and verifying refuses them."""
    (signed / "weights" / "extra").write_bytes(b"mine")
    assert lx.load(signed, trust=place / "release.pub").name == "dense"
    with pytest.raises(TrustError, match="weights/extra is not signed"):
        lx.verify(signed, trust=place / "release.pub")


def test_files_beside_the_manifest_are_signed_too(place, signed):
    (signed / "README.md").write_text("# A model card")
    (signed / ".gitattributes").write_text("* binary")
    lx.sign(signed, key=place / "release.key")
    assert lx.verify(signed, trust=place / "release.pub").extra == (".gitattributes", "README.md")
    (signed / "README.md").write_text("# Another one")
    with pytest.raises(TrustError, match=r"README\.md is not the one that release.pub signed"):
        lx.verify(signed, trust=place / "release.pub")
    (signed / "README.md").unlink()
    with pytest.raises(TrustError, match=r"README\.md is missing"):
        lx.verify(signed, trust=place / "release.pub")


def test_a_damaged_artifact_is_not_signed(place, signed):
    (signed / "model.sig").unlink()
    file = signed / "weights/packed/c/0/0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="weights/packed/c/0/0 is damaged"):
        lx.sign(signed, key=place / "release.key")
    assert not (signed / "model.sig").exists()


def test_a_new_signature_replaces_the_old_one(place, signed):
    lx.sign(signed, key=place / "other.key")
    assert lx.verify(signed, trust=place / "other.pub").signer == "other.pub"
    refused(signed, place, "not trusted here")


def test_saving_anew_takes_the_signature_away(place, signed, dense_artifact):
    dense_artifact.save(signed, overwrite=True)
    refused(signed, place, "is not signed")


def test_what_is_verified_is_what_is_loaded(place, signed, dense_artifact, monkeypatch):
    """Whoever replaces the manifest after the signature was checked has it refused, since it is read after that."""
    evil = manifest_to_json(
        msgspec.structs.replace(manifest_from_json((signed / "manifest.json").read_bytes()), name="evil")
    )
    check = opening.check_signature

    def checked(*args):
        found = check(*args)
        (signed / "manifest.json").write_bytes(evil)
        return found

    monkeypatch.setattr(opening, "check_signature", checked)
    with pytest.raises(TrustError, match=r"manifest\.json is not the one"):
        lx.load(signed, trust=place / "release.pub")


def test_each_file_is_read_once(place, signed, monkeypatch):
    read, names = Store.read, []

    def counted(self, name, *, limit):
        names.append(name)
        return read(self, name, limit=limit)

    monkeypatch.setattr(Store, "read", counted)
    lx.load(signed, trust=place / "release.pub")
    assert sorted(names) == sorted(set(names))
    assert {"model.sig", "manifest.json", "weights/packed/c/0/0"} <= set(names)
    assert names[0] == "model.sig"


def test_a_signed_artifact_is_not_written_back_to(place, signed, monkeypatch, caplog):
    manifest = manifest_from_json((signed / "manifest.json").read_bytes())
    (signed / "manifest.json").write_bytes(manifest_to_json(msgspec.structs.replace(manifest, executables={})))
    lx.sign(signed, key=place / "release.key")
    with caplog.at_level(logging.WARNING):
        model = lx.load(signed, trust=place / "release.pub", write_back=True)
    assert model.route == "stablehlo"
    assert "it is signed, and new files would void the signature" in caplog.text
    assert lx.load(signed, trust=place / "release.pub").route == "stablehlo"


def test_signing_in_an_object_store(place, dense_artifact):
    where = "memory://trust/dense.lepton"
    dense_artifact.save(where)
    with pytest.raises(TrustError, match="is not signed"):
        lx.load(where, trust=place / "release.pub")
    lx.sign(where, key=place / "release.key")
    assert lx.verify(where, trust=place / "release.pub").signer == "release.pub"
    lx.encrypt(where, "memory://trust/sealed.lepton", to=place / "server.pub")
    lx.load("memory://trust/sealed.lepton", decrypt_key=place / "server.key")


# Encrypted.


def test_an_encrypted_artifact_loads_to_equal_weights(place, saved_dense):
    plain = lx.load(saved_dense)
    for key in ("server.key", "second.key"):
        model = lx.load(place / "sealed.lepton", trust=place / "release.pub", decrypt_key=place / key)
        np.testing.assert_array_equal(model(x=X)["output"], plain(x=X)["output"])
        for one, other in zip(model.runtime.weights, plain.runtime.weights, strict=True):
            np.testing.assert_array_equal(one, other)


def test_nothing_learned_is_on_the_disk(place, saved_dense):
    def everything(path):
        return b"".join((path / name).read_bytes() for name in files_of(path))

    # What is stored uncompressed or compressed is found in the plain artifact, so the search works.
    packed = (saved_dense / "weights/packed/c/0/0").read_bytes()
    large = (saved_dense / "weights/00002-large/c/0/0").read_bytes()
    sealed = everything(place / "sealed.lepton")
    for part in (packed, large):
        for start in range(0, len(part) - 16, 16):
            assert part[start : start + 16] not in sealed
        assert part in everything(saved_dense)
    assert b"zarr_format" not in sealed
    assert dense_weights()["bias"].tobytes() not in sealed


def test_every_encrypted_file_has_its_own_nonce(place):
    path = place / "sealed.lepton"
    nonces = [(path / name).read_bytes()[:12] for name in files_of(path) if name.startswith("weights/")]
    assert len(set(nonces)) == len(nonces) > 3


def test_the_same_artifact_twice_is_encrypted_with_two_keys(place, saved_dense, tmp_path):
    lx.encrypt(saved_dense, tmp_path / "again.lepton", to=place / "server.pub")
    name = "weights/packed/c/0/0"
    assert (tmp_path / "again.lepton" / name).read_bytes()[12:] != (place / "sealed.lepton" / name).read_bytes()[12:]


def test_verifying_needs_no_key(place):
    assert lx.verify(place / "sealed.lepton", trust=place / "release.pub").signer == "release.pub"


def test_without_the_key_nothing_is_used(place, nothing_used):
    for key, said in ((None, "is encrypted for .*; give that private key in LEPTON_DECRYPT_KEY"),
                      ("other.key", "a key of the kind secp256r1 does not decrypt")):  # fmt: skip
        with pytest.raises(TrustError, match=said):
            lx.load(place / "sealed.lepton", decrypt_key=None if key is None else place / key)


def test_the_key_of_somebody_else(place, tmp_path, nothing_used):
    private, _ = lx.trust.create_keys(tmp_path / "third", "encryption")
    with pytest.raises(TrustError, match=r"is encrypted for .*, and this private key is that of"):
        lx.load(place / "sealed.lepton", decrypt_key=private)


def test_a_key_from_the_environment(place, monkeypatch):
    for value in ((place / "server.key").read_text(), str(place / "server.key")):
        monkeypatch.setenv("LEPTON_DECRYPT_KEY", value)
        assert lx.load(place / "sealed.lepton").name == "dense"


def resealed(path, change):
    """Changes files of an artifact and puts their new digests into the manifest, as who may write to it can."""
    manifest = manifest_from_json((path / "manifest.json").read_bytes())
    change(path)
    files = {
        name: msgspec.structs.replace(
            entry,
            size=(path / name).stat().st_size,
            sha256=hashlib.sha256((path / name).read_bytes()).hexdigest(),
        )
        for name, entry in manifest.files.items()
    }
    (path / "manifest.json").write_bytes(manifest_to_json(msgspec.structs.replace(manifest, files=files)))


def swap(path):
    one, other = path / "weights/packed/c/0/0", path / "weights/00002-large/c/0/0"
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b), other.write_bytes(a)


def cut(path):
    file = path / "weights/00002-large/c/0/0"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path):
    file = path / "weights/00002-large/c/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("change", [swap, cut, flip])
def test_without_a_signature_encrypted_files_still_cannot_be_changed(place, sealed, change):
    """The digests are right: it is the encryption that detects it."""
    resealed(sealed, change)
    with pytest.raises(TrustError, match=r"weights/.* does not open"):
        lx.load(sealed, decrypt_key=place / "server.key")


def test_the_wrapped_key_of_another_artifact(place, sealed, saved_dense, tmp_path):
    lx.encrypt(saved_dense, tmp_path / "other.lepton", to=place / "server.pub")
    other = manifest_from_json((tmp_path / "other.lepton" / "manifest.json").read_bytes())
    manifest = manifest_from_json((sealed / "manifest.json").read_bytes())
    changed = msgspec.structs.replace(manifest, encryption=other.encryption)
    (sealed / "manifest.json").write_bytes(manifest_to_json(changed))
    with pytest.raises(TrustError, match=r"weights/.* does not open"):
        lx.load(sealed, decrypt_key=place / "server.key")


@given(st.binary(max_size=200))
def test_any_wrapped_key_is_refused(place, wrapped):
    manifest = manifest_from_json((place / "sealed.lepton" / "manifest.json").read_bytes())
    recipients = tuple(msgspec.structs.replace(each, wrapped=wrapped) for each in manifest.encryption.recipients)
    changed = msgspec.structs.replace(
        manifest, encryption=msgspec.structs.replace(manifest.encryption, recipients=recipients)
    )
    with pytest.raises(TrustError, match="the data key does not open with this key"):
        opening.open_files(Store(place / "sealed.lepton"), changed, place / "server.key")


@pytest.mark.parametrize(
    "encryption",
    [
        {"cipher": "AES-128-ECB", "recipients": [{"key": "0" * 64, "wrapped": ""}]},
        {"cipher": "AES-256-GCM", "recipients": []},
        {"cipher": "AES-256-GCM", "recipients": [{"key": "0" * 64, "wrapped": ""}] * 65},
        {"cipher": "AES-256-GCM", "recipients": [{"key": "\x1b[31m", "wrapped": ""}]},
        {"cipher": "AES-256-GCM", "recipients": [{"key": "0" * 64, "wrapped": "A" * 8000}]},
        {"cipher": "AES-256-GCM", "recipients": [{"key": "0" * 64, "wrapped": "no base64!"}]},
    ],
)
def test_a_manifest_with_another_encryption_is_refused(place, sealed, encryption):
    document = json.loads((sealed / "manifest.json").read_text()) | {"encryption": encryption}
    (sealed / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"manifest\.json: .*encryption"):
        lx.load(sealed, decrypt_key=place / "server.key")


def test_what_cannot_be_encrypted(place, saved_dense, tmp_path):
    target = tmp_path / "new.lepton"
    with pytest.raises(TrustError, match="is encrypted already"):
        lx.encrypt(place / "sealed.lepton", target, to=place / "server.pub")
    with pytest.raises(TrustError, match="cannot be encrypted for"):
        lx.encrypt(saved_dense, target, to=place / "release.pub")
    with pytest.raises(TrustError, match="no recipient"):
        lx.encrypt(saved_dense, target, to=[])
    with pytest.raises(ArtifactError, match="exists"):
        lx.encrypt(saved_dense, place / "signed.lepton", to=place / "server.pub")
    damaged = shutil.copytree(saved_dense, tmp_path / "damaged.lepton")
    flip(damaged)
    with pytest.raises(ArtifactError, match="damaged"):
        lx.encrypt(damaged, target, to=place / "server.pub")
    assert os.listdir(tmp_path) == ["damaged.lepton"]


def test_an_artifact_is_encrypted_in_its_place(place, signed):
    lx.encrypt(signed, signed, to=place / "server.pub", overwrite=True)
    assert lx.load(signed, decrypt_key=place / "server.key").name == "dense"
    refused(signed, place, "is not signed")  # the signature was of other bytes


def test_parts_of_encrypted_weights_are_read_by_device(place, tmp_path):
    """Cut weights are read a part at a time, in any order, from files of their own."""
    weights = {"w": np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)}
    program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 64), "float32")})
    rules = lx.sharding.Rules((("w", (None, "model")),))
    lx.compile(program, {"batch": (2,)}, mesh="model=2", rules=rules).save(tmp_path / "plain.lepton")
    lx.encrypt(tmp_path / "plain.lepton", tmp_path / "sealed.lepton", to=place / "server.pub")
    model = lx.load(tmp_path / "sealed.lepton", decrypt_key=place / "server.key")
    assert len(model.runtime.devices.all) == 2
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    np.testing.assert_allclose(model(x=x)["output"], x @ weights["w"], rtol=1e-4, atol=1e-4)


def test_every_encoding_of_weights_is_encrypted(place, tmp_path):
    random = np.random.default_rng(0)
    sparse = random.standard_normal((200, 200)).astype(np.float32)
    sparse[random.random(sparse.shape) < 0.9] = 0
    weights = {
        "sparse": sparse,
        "dense": random.standard_normal((1200, 1000)).astype(np.float32),
        "half": jnp.asarray(random.standard_normal((40, 40)), jnp.bfloat16),
    }
    inputs = {"x": lx.TensorSpec(("batch", 1), "float32")}
    program = lx.trace(lambda w, x: x + w["sparse"][0, 0] + w["dense"][0, 0], weights, inputs)
    lx.compile(program, {"batch": (1,)}).save(tmp_path / "plain.lepton")
    lx.encrypt(tmp_path / "plain.lepton", tmp_path / "sealed.lepton", to=place / "server.pub")
    manifest = opening.read_manifest(Store(tmp_path / "sealed.lepton"))
    assert len({leaf.encoding for leaf in manifest.weights}) >= 2
    model = lx.load(tmp_path / "sealed.lepton", decrypt_key=place / "server.key")
    for leaf, array in zip(manifest.weights, model.runtime.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(weights[leaf.path]))


def test_files_without_encryption_are_read_as_they_are(saved_dense):
    store = Store(saved_dense)
    manifest = opening.read_manifest(store)
    files = opening.open_files(store, manifest)
    assert files.read("programs/symbolic.stablehlo") == VerifiedFiles(store, manifest.files).read(
        "programs/symbolic.stablehlo"
    )
