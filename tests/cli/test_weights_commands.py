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


def test_float_weights_become_small_by_the_kept_steps(cli, plain, trained, files, tmp_path):
    base = tmp_path / "base.lepton"
    recipe = ("--recipe", files / "int8.toml", "--no-evaluate")
    cli.ok("compile", plain, *recipe, "-o", base, "--keep-master")
    assert "float master: 2 weights" in cli.ok("inspect", base)
    assert "weights" in cli.ok("weights", "master", base, "-o", tmp_path / "float.npz")
    with np.load(tmp_path / "float.npz") as found:
        weights = dict(found)
    np.savez(tmp_path / "new.npz", **{name: 1.5 * array for name, array in weights.items()})
    told = cli.json("weights", "make", base, tmp_path / "new.npz", "-o", tmp_path / "new.lepton")
    assert told["fit"] == compiler.verify(base).manifest.fit
    cli.ok("compile", trained, *recipe, "-o", tmp_path / "whole.lepton")
    x = np.random.default_rng(0).standard_normal((5, cli_models.IN)).astype(np.float32)
    answer = compiler.load(tmp_path / "new.lepton", base=compiler.load(base))(x=x)["output"]
    np.testing.assert_array_equal(answer, compiler.load(tmp_path / "whole.lepton")(x=x)["output"])
    np.savez(tmp_path / "less.npz", **dict(list(weights.items())[1:]))
    said = cli.refused("weights", "make", base, tmp_path / "less.npz", "-o", tmp_path / "n.lepton")
    assert "it lacks weight" in said


def test_what_cannot_be_adjusted_is_refused_before_anything_is_sent(cli, tmp_path):
    for flags, said in (
        (("--alpha", 0), "--alpha 0.0: expected a number above 0 and at most 1"),
        (("--alpha", 1.5), "--alpha 1.5"),
        (("--alpha", 0.5, "--steps", 0), "--steps 0: expected at least 1"),
        (("--alpha", 0.5), "needs a running server"),
        (("--alpha", 0.5, "--every", "soon"), "--every 'soon'"),
        (("--alpha", 0.5, "--promote", "stable"), "makes versions of its own"),
        (("--steps", 3), "--steps without --alpha changes nothing"),
    ):
        assert said in cli.refused("weights", "push", tmp_path, "new.lepton", *flags)
    assert "give MODELS and ARTIFACT, or ARTIFACT and --to URL" in cli.refused("weights", "push", "new.lepton")
