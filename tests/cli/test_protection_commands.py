"""`leptonx keys`, `sign`, `encrypt`, and what `verify`, `inspect`, `predict` and `serve` make of them."""

import json
import shutil

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("LEPTON_DECRYPT_KEY", raising=False)
    monkeypatch.delenv("LEPTON_TRUST", raising=False)


@pytest.fixture(scope="module")
def folder(cli, artifact, tmp_path_factory):
    """Keys, and the artifact signed, and encrypted and signed."""
    folder = tmp_path_factory.mktemp("protection")
    for name in ("release", "other"):
        cli.ok("keys", "new", folder / name)
    cli.ok("keys", "new", folder / "server", "--for", "encryption")
    shutil.copytree(artifact, folder / "signed.lepton")
    cli.ok("encrypt", artifact, folder / "sealed.lepton", "--to", folder / "server.pub")
    for name in ("signed", "sealed"):
        assert "signed by the key" in cli.ok("sign", folder / f"{name}.lepton", "--key", folder / "release.key")
    return folder


def test_keys_are_made_once(cli, tmp_path):
    found = cli.json("keys", "new", tmp_path / "a")
    assert found == {"private": f"{tmp_path}/a.key", "public": f"{tmp_path}/a.pub", "purpose": "signing"}
    assert f"{tmp_path}/a.pub exists; choose another name" in cli.refused("keys", "new", tmp_path / "a")
    (tmp_path / "a.pub").unlink()
    before = (tmp_path / "a.key").read_bytes()
    assert f"{tmp_path}/a.key exists; choose another name" in cli.refused("keys", "new", tmp_path / "a")
    assert (tmp_path / "a.key").read_bytes() == before


def test_signed(cli, artifact, folder):
    path = folder / "signed.lepton"
    assert "all intact, signed by release.pub" in cli.ok("verify", path, "--key", folder / "release.pub")
    assert cli.json("verify", path, "--key", folder / "release.pub")["signer"] == "release.pub"
    assert cli.json("verify", path)["signer"] == ""
    assert "is of a key that is not trusted here" in cli.refused("verify", path, "--key", folder / "other.pub")
    assert "is not signed" in cli.refused("verify", artifact, "--key", folder / "release.pub")
    key = cli.json("sign", path, "--key", folder / "release.key")["key"]
    assert cli.json("inspect", path)["signed_by"] == key
    assert f"signed by the key {key[:16]}, which `leptonx verify --key` checks" in cli.ok("inspect", path)
    assert cli.json("inspect", artifact)["signed_by"] == ""
    assert "signed" not in cli.ok("inspect", artifact)


def test_encrypted(cli, artifact, folder, monkeypatch, tmp_path):
    path = folder / "sealed.lepton"
    text = cli.ok("inspect", path)
    assert "encrypted with AES-256-GCM for " in text
    recipients = cli.json("inspect", path)["manifest"]["encryption"]["recipients"]
    assert recipients[0]["key"][:16] in text
    assert "release.pub" in cli.ok("verify", path, "--key", folder / "release.pub")
    rows = tmp_path / "x.npy"
    np.save(rows, np.ones((2, 16), np.float32))
    line = cli.refused("predict", path, "--input", f"x={rows}")
    assert "is encrypted for" in line
    assert "LEPTON_DECRYPT_KEY" in line
    monkeypatch.setenv("LEPTON_DECRYPT_KEY", (folder / "server.key").read_text())
    assert cli.json("predict", path, "--input", f"x={rows}") == cli.json("predict", artifact, "--input", f"x={rows}")
    assert "is encrypted already" in cli.refused("encrypt", path, tmp_path / "a", "--to", folder / "server.pub")


@pytest.mark.parametrize("value", ["-----BEGIN PRIVATE KEY-----\nMC4CAQSECRET", "MC4CAQSECRET", "SECRET\nSECRET"])
def test_a_key_in_the_environment_is_never_shown(cli, folder, monkeypatch, value):
    monkeypatch.setenv("LEPTON_DECRYPT_KEY", value)
    for command in (["serve", "--port", "0"], ["predict", "--input", "-"], ["bench"]):
        result = cli(command[0], folder / "sealed.lepton", *command[1:], input="{}")
        assert result.exit_code == 2
        assert "LEPTON_DECRYPT_KEY" in result.stderr
        assert "SECRET" not in result.output + result.stderr


def test_serve_refuses_what_is_not_trusted(cli, artifact, folder):
    trust = ["--port", "0", "--trust", folder / "release.pub"]
    assert "is not signed" in cli.refused("serve", artifact, *trust)
    assert "not trusted here" in cli.refused(
        "serve", folder / "signed.lepton", "--port", "0", "--trust", folder / "other.pub"
    )
    # Signed, but nobody gave the key.
    assert "is encrypted for" in cli.refused("serve", folder / "sealed.lepton", *trust)


def test_an_empty_variable_does_not_turn_trust_off(cli, artifact, monkeypatch):
    monkeypatch.setenv("LEPTON_TRUST", "")
    assert "the environment variable LEPTON_TRUST is empty" in cli.refused("serve", artifact, "--port", "0")


def test_trust_from_the_environment(cli, artifact, folder, monkeypatch):
    monkeypatch.setenv("LEPTON_TRUST", str(folder / "release.pub"))
    assert "is not signed" in cli.refused("serve", artifact, "--port", "0")


def test_inspect_says_what_is_no_signature(cli, damaged):
    (damaged / "model.sig").write_text("{}")
    assert "model.sig is no signature file" in cli.refused("inspect", damaged)
    assert json.loads(cli.ok("verify", damaged, "--json"))["ok"]  # which was not asked for the signature
