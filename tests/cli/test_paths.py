"""Paths that a command is given: what cannot be a file of that kind is one line and exit code 2."""

import numpy as np
import pytest

BAD = ("nu\0ll", "a-folder", "a-file/below", "missing/below")
COMMANDS = {
    "artifact to inspect": ["inspect", "{}"],
    "artifact to verify": ["verify", "{}"],
    "artifact to run": ["predict", "{}", "--input", "{folder}/x.npy"],
    "artifact to serve": ["serve", "{}", "--port", "0"],
    "model file": ["compile", "{}.py:model"],
    "model module": ["compile", "{}:model"],
    "recipe": ["plan", "{plain}", "--recipe", "{}"],
    "array": ["predict", "{artifact}", "--input", "x={}"],
    "arrays": ["predict", "{artifact}", "--input", "{}.npz"],
    "JSON": ["predict", "{artifact}", "--input", "{}.json"],
    "output": ["predict", "{artifact}", "--input", "x={folder}/x.npy", "-o", "{}"],
    "tokens to list": ["token", "list", "{}"],
    "tokens to make": ["token", "create", "{}", "ci"],
    "token file": ["serve", "{artifact}", "--port", "0", "--token-file", "{}"],
    "key to sign with": ["sign", "{artifact}", "--key", "{}"],
    "key to verify with": ["verify", "{artifact}", "--key", "{}"],
    "key to encrypt for": ["encrypt", "{artifact}", "{folder}/new.lepton", "--to", "{}"],
    "trusted keys": ["serve", "{artifact}", "--port", "0", "--trust", "{}"],
    "TLS files": ["serve", "{artifact}", "--port", "0", "--tls-cert", "{}", "--tls-key", "{}"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_what_is_no_file_of_that_kind_is_one_line(cli, plain, artifact, tmp_path, monkeypatch, what):
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-folder" / "inside").write_text("x")
    (tmp_path / "a-file").write_text("x")
    np.save(tmp_path / "x.npy", np.ones((1, 16), np.float32))
    monkeypatch.chdir(tmp_path)
    for bad in BAD:
        if (what, bad) == ("artifact to serve", "a-folder"):
            continue  # a repository in which there is no model yet
        given = [
            part.replace("{folder}", str(tmp_path)).replace("{plain}", plain).replace("{artifact}", str(artifact))
            for part in COMMANDS[what]
        ]
        line = cli.refused(*(part.replace("{}", bad) for part in given))
        assert len(line) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "a-folder", "x.npy"]


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != "missing/below"])
def test_an_artifact_that_cannot_be_written_there_is_one_line(cli, plain, tmp_path, monkeypatch, bad):
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-file").write_text("x")
    monkeypatch.chdir(tmp_path)
    cli.refused("compile", plain, "-o", bad, "--name", "m", "--overwrite")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_that_begin_with_a_byte_order_mark(cli, plain, files, artifact, tmp_path, end):
    recipe = tmp_path / "int8.toml"
    recipe.write_bytes(end.join(["\ufeffmeasure = false", "[[quantize]]", 'sites = ".*"', ""]).encode())
    marked, plainly = (cli.json("plan", plain, "--recipe", path)["sites"] for path in (recipe, files / "int8.toml"))
    assert marked == plainly
    document = tmp_path / "in.json"
    document.write_bytes(f'\ufeff{{"x":{end}[{[0.0] * 16}]}}'.encode())
    cli.ok("predict", artifact, "--input", document)
    cli.ok("predict", artifact, "--input", "-", input=document.read_text())
