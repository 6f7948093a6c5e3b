"""`leptonx weights` and `compile --golden`."""

import cli_models
import numpy as np
import pytest

from lepton_xla import compiler


@pytest.fixture
def trained(variant):
    return variant("weights={name: 1.5 * value for name, value in weights.items()}")


def test_new_weights_of_a_model_by_the_recipe_of_the_base(cli, compiled, trained, files, tmp_path):
    base_path, _ = compiled
    out = tmp_path / "new.lepton"
    told = cli.json("weights", "make", base_path, trained, "-o", out, "--version", 7)
    manifest = compiler.verify(out).manifest
    assert (told["name"], told["version"], told["golden"]) == ("plain", "7", False)
    assert told["fit"] == manifest.fit == compiler.verify(base_path).manifest.fit
    assert manifest.is_update
    assert "already" not in cli.ok("inspect", out)
    assert "weights alone: runs on the compiled code" in cli.ok("inspect", out)
    assert cli.json("inspect", out)["route"]["route"] == "shared"
    base = compiler.load(base_path)
    x = np.random.default_rng(0).standard_normal((5, cli_models.IN)).astype(np.float32)
    answer = compiler.load(out, base=base)(x=x)["output"]
    cli.ok("compile", trained, "--recipe", files / "int8.toml", "-o", tmp_path / "whole.lepton", "--no-evaluate")
    np.testing.assert_array_equal(answer, compiler.load(tmp_path / "whole.lepton")(x=x)["output"])
    assert not np.array_equal(answer, base(x=x)["output"])
    said = cli.refused("weights", "make", base_path, trained, "-o", out)
    assert "exists; give another --output" in said
    assert "wrote" in cli.ok("weights", "make", base_path, out, "-o", tmp_path / "again.lepton")
    assert compiler.verify(tmp_path / "again.lepton").manifest.is_update


def test_golden_rows(cli, plain, trained, tmp_path):
    x = np.random.default_rng(0).standard_normal((5, cli_models.IN)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x)
    base = tmp_path / "base.lepton"
    cli.ok("compile", plain, "-o", base, "--golden", tmp_path / "rows.npz", "--no-evaluate")
    entry = compiler.load(base, check=True).manifest.golden
    assert [(tensor.name, tensor.shape) for tensor in (*entry.inputs, *entry.outputs)] == [
        ("x", (5, cli_models.IN)),
        ("output", (5, cli_models.OUT)),
    ]
    answers = compiler.load(base)(x=x)["output"]
    np.savez(tmp_path / "known.npz", x=x, output=answers)
    said = cli.refused(
        "weights", "make", base, trained, "-o", tmp_path / "u.lepton", "--golden", tmp_path / "known.npz"
    )
    assert "golden row 0 is answered wrong: output 'output' differs by" in said
    assert not (tmp_path / "u.lepton").exists()
    np.save(tmp_path / "one.npy", x)
    assert "is one array" in cli.refused(
        "compile", plain, "-o", tmp_path / "c.lepton", "--golden", tmp_path / "one.npy"
    )


def test_a_model_that_does_not_fit(cli, compiled, variant, tmp_path):
    other = variant("fn=lambda w, x: x @ w['hidden'] @ w['head']")
    said = cli.refused("weights", "make", compiled[0], other, "-o", tmp_path / "u.lepton")
    assert "do not fit 'plain' version 1" in said
    assert not (tmp_path / "u.lepton").exists()
