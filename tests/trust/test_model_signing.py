"""With `model_signing` itself, the reference implementation: it verifies our signatures, and we verify its.

Its dependencies are many, so it has a virtual environment of its own, which `make test-all` makes;
LEPTON_MODEL_SIGNING names the Python of another.
"""

import os
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
import trust_keys as keys

import lepton_xla as lx
from lepton_xla.errors import TrustError

PYTHON = pathlib.Path(os.environ.get("LEPTON_MODEL_SIGNING", "build/model-signing/bin/python")).absolute()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make build/model-signing/.ready` installs model_signing"),
]


def model_signing(*args):
    command = [PYTHON, "-m", "model_signing", *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env={"PATH": ""})
    return done.returncode == 0, done.stdout + done.stderr


def verified(path, kind="p256"):
    return model_signing("verify", "key", path, "--signature", path / "model.sig", "--public_key", keys.public(kind))


@pytest.fixture(params=["plain", "encrypted"])
def path(request, tmp_path):
    program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(64)}, {"x": lx.TensorSpec(("batch", 64), "float32")})
    lx.compile(program, {"batch": (1,)}, name="tiny").save(tmp_path / "plain.lepton")
    if request.param == "encrypted":
        lx.encrypt(tmp_path / "plain.lepton", tmp_path / "encrypted.lepton", to=keys.public("x25519"))
    return tmp_path / f"{request.param}.lepton"


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_it_verifies_ours(path, kind):
    (path / "README.md").write_text("# A model card")
    lx.sign(path, key=keys.private(kind))
    right, said = verified(path, kind)
    assert right, said
    assert not verified(path, "p256_other")[0]


@pytest.mark.parametrize("name", ["manifest.json", "README.md"])
def test_it_refuses_ours_when_a_file_was_changed(path, name):
    (path / "README.md").write_text("# A model card")
    lx.sign(path, key=keys.private("p256"))
    (path / name).write_bytes((path / name).read_bytes() + b" ")
    right, said = verified(path)
    assert not right
    assert name in said


def test_it_refuses_files_that_we_did_not_sign(path):
    lx.sign(path, key=keys.private("p256"))
    (path / "extra").write_text("mine")
    assert not verified(path)[0]


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_we_verify_its(path, kind):
    right, said = model_signing(
        "sign", "key", path, "--signature", path / "model.sig", "--private_key", keys.private(kind)
    )
    assert right, said
    assert lx.verify(path, trust=keys.public(kind)).signer == f"{kind}.pub"
    model = lx.load(path, trust=keys.public(kind), decrypt_key=keys.private("x25519"))
    np.testing.assert_array_equal(model(x=np.eye(64, dtype=np.float32))["output"], np.eye(64))
    with pytest.raises(TrustError, match="not trusted here"):
        lx.load(path, trust=keys.public("p256_other"))
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(TrustError, match=r"manifest\.json is not the one"):
        lx.load(path, trust=keys.public(kind))
