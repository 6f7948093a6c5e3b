"""`leptonx plan --mesh`: what each device would hold, on a machine that has two of the devices."""

import pytest

RULES = '[[rules]]\nweights = "hidden"\nspec = ["", "model"]\n[[rules]]\nweights = "head"\nspec = ["model"]\n'


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path / "rules.toml"


def test_plan_shows_what_a_device_would_hold(cli, plain, rules):
    found = cli.json("plan", plain, "--mesh", "data=-1,model=4", "--rules", rules)["placement"]
    assert found["mesh"] == {"data": 1, "model": 4}
    assert found["batch"] == ["data"]
    assert found["device_bytes"] == (16 * 64 + 64 * 4) * 4 // 4
    head, hidden = found["weights"]
    assert (hidden["path"], hidden["shape"], hidden["spec"]) == ("hidden", [16, 64], [[], ["model"]])
    assert (head["spec"], head["device_bytes"], head["reason"]) == ([["model"]], 256, "rule 'head'")
    text = cli.ok("plan", plain, "--mesh", "data=2,model=4", "--rules", rules)
    assert text.startswith("weights on data=2, model=4 (8 devices)\n")
    assert "sites change" not in text


def test_a_recipe_and_a_mesh_show_both(cli, plain, files):
    text = cli.ok("plan", plain, "--recipe", files / "int8.toml", "--mesh", "data=-1")
    assert "2 of 2 sites change" in text
    assert "weights on data=2 (2 devices)" in text
    assert "no rule matches, and there is no fallback" in text


@pytest.mark.parametrize(
    ("mesh", "toml", "said"),
    [
        ("data=2,data=2", RULES, "names the axis 'data' twice"),
        ("data=2", RULES, "the mesh has no axis 'model'"),
        ("model=5", RULES, "cannot be cut by model=5: 5 does not divide 64"),
        ("model=2", RULES + '[[rules]]\nweights = "hiden"\nspec = []\n', "rule 'hiden' matches no weight"),
        ("model=2", "rules = 3", "rules.toml': "),
    ],
)
def test_what_does_not_fit_is_one_line(cli, plain, rules, mesh, toml, said):
    rules.write_text(toml)
    assert said in cli.refused("plan", plain, "--mesh", mesh, "--rules", rules)


def test_rules_need_a_mesh(cli, plain, rules):
    assert "add --mesh" in cli.refused("plan", plain, "--rules", rules)


def test_compile_inspect_and_predict_take_an_artifact_for_two_devices(cli, plain, rules, tmp_path):
    path = tmp_path / "two.lepton"
    found = cli.json("compile", plain, "--mesh", "model=2", "--rules", rules, "-o", path)
    assert found["weights_bytes_optimized"] == found["weights_bytes_float"] // 2
    assert found["metrics"]["optimized"]["mean"] == pytest.approx(found["metrics"]["float"]["mean"], abs=1e-5)
    manifest = cli.json("inspect", path)["manifest"]
    assert manifest["mesh"] == {"axes": {"model": 2}, "batch": []}
    assert {leaf["path"]: leaf["spec"] for leaf in manifest["weights"]} == {
        "head": [["model"]],
        "hidden": [[], ["model"]],
    }
    text = cli.ok("inspect", path)
    assert "for 2 devices: model=2\n" in text
    assert "loads compiled code without compiling" in text


def test_compile_keeps_quantized_weights_cut(cli, plain, files, rules, tmp_path):
    path = tmp_path / "int8.lepton"
    cli.ok("compile", plain, "--recipe", files / "int8.toml", "--mesh", "model=2", "--rules", rules, "-o", path)
    specs = {leaf["path"]: leaf["spec"] for leaf in cli.json("inspect", path)["manifest"]["weights"]}
    assert all(spec for name, spec in specs.items() if "hidden" in name)


def test_compile_refuses_what_does_not_fit_in_one_line(cli, plain, rules, tmp_path):
    out = ["-o", tmp_path / "no.lepton"]
    assert "add --mesh" in cli.refused("compile", plain, "--rules", rules, *out)
    assert "takes 3 devices" in cli.refused("compile", plain, "--mesh", "model=3", *out)
    rules.write_text('batch = "model"\n')
    assert "bucket batch=1 cannot be split" in cli.refused(
        "compile", plain, "--mesh", "model=2", "--rules", rules, *out
    )
    assert not (tmp_path / "no.lepton").exists()
