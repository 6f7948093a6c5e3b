"""`leptonx recipes` and `leptonx plan`, and every way in which a recipe or a model file can be wrong."""

import re
import sys
import tomllib

import cli_models as models
import pytest

from lepton_xla.recipe import presets


def test_recipes_lists_presets(cli):
    found = {entry["name"]: entry["description"] for entry in cli.json("recipes")}
    assert sorted(found) == list(presets())
    text = " ".join(cli.ok("recipes").split())
    for name, description in found.items():
        assert description
        assert f"{name} " in text


def test_a_preset_printed_is_a_recipe_file(cli, plain, tmp_path):
    text = cli.ok("recipes", "int8")
    assert tomllib.loads(text)["quantize"][0]["weights"] == "int8"
    assert cli.json("recipes", "int8")["toml"] == text
    (tmp_path / "mine.toml").write_text(text)
    mine = cli.json("plan", plain, "--recipe", tmp_path / "mine.toml")
    assert (mine["recipe"], mine["totals"]["changed"]) == ("mine", 2)


def test_recipes_refuses_a_name_that_is_none(cli):
    assert "'int7': no such preset; the presets are codebook16" in cli.refused("recipes", "int7")


def test_plan_has_the_right_figures(cli, plain, files):
    found = cli.json("plan", plain, "--recipe", files / "int8.toml")
    hidden, head = found["sites"]
    assert hidden["site"] == "hidden"
    assert hidden["shape"] == [models.IN, models.HIDDEN]
    assert hidden["weight_bytes"] == 4 * models.IN * models.HIDDEN
    assert hidden["flops"] == 2 * models.IN * models.HIDDEN  # at batch 1
    assert head["flops"] == 2 * models.HIDDEN * models.OUT
    assert hidden["decision"] == "int8 weights, int8 activations dynamic"
    assert found["sizes"] == {"batch": 1}
    totals = found["totals"]
    assert (totals["sites"], totals["changed"], totals["kept"]) == (2, 2, 0)
    assert totals["weight_bytes"] == 4 * models.HIDDEN * (models.IN + models.OUT) == totals["site_weight_bytes"]
    assert totals["flops"] == hidden["flops"] + head["flops"] + totals["other_flops"]


def test_plan_shows_groups_and_casts(cli, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "small.toml").write_text(
        'cast = "bfloat16"\n[[quantize]]\nsites = "hidden"\nweights = "int4"\nactivations = "none"\n'
        'granularity = "group:~10"\nweight_range = "mse"'
    )
    found = cli.json("plan", plain, "--recipe", tmp_path / "small.toml")
    assert found["cast"] == "bfloat16"
    assert [site["decision"] for site in found["sites"]] == ["int4 weights in groups of 8, range by mse", "float"]
    text = " ".join(cli.ok("plan", plain, "--recipe", tmp_path / "small.toml").split())
    assert "int4 weights in groups of 8, range by mse" in text
    assert "Products left in float are made bfloat16." in text


def test_plan_counts_at_the_size_asked_for(cli, plain):
    found = cli.json("plan", plain, "--buckets", "batch=8,32")
    assert found["sizes"] == {"batch": 8}
    assert found["sites"][0]["flops"] == 8 * 2 * models.IN * models.HIDDEN
    assert [site["decision"] for site in found["sites"]] == ["float", "float"]
    assert found["recipe"] == "none"


def test_plan_prints_a_table(cli, plain, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = cli.ok("plan", plain, "--recipe", "prune50")
    assert "plain_model.py:model, recipe prune50" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("hidden"))
    assert row.split()[:6] == ["hidden", "dot", "16x64", "4.10", "kB", "1"]
    assert "prune 50%" in row
    assert "2 of 2 sites change, 0 are kept" in text
    assert "FLOPs of one call at batch=1." in text


def test_plan_says_why_a_site_is_kept(cli, variant, tmp_path):
    # The head stands for an embedding: its rows are looked up, so a pattern does not prune it.
    target = variant(
        "fn=look, inputs={'ids': lx.TensorSpec(('batch',), 'int32')}, calibration=None",
        "def look(weights, ids):\n    return weights['hidden'][ids] @ weights['head']",
    )
    found = cli.json("plan", target, "--recipe", "prune50")
    kept = {site["site"]: site["kept"] for site in found["sites"]}
    assert kept == {"hidden": "not pruned: an embedding", "head": ""}
    assert found["totals"]["kept"] == 1
    assert "not pruned: an embedding" in " ".join(cli.ok("plan", target, "--recipe", "prune50").split())


@pytest.mark.parametrize(
    ("toml", "part"),
    [
        ("speed = 1", "unknown key 'speed'"),
        ("fold = 'yes'", "fold = 'yes': expected `bool`"),
        ("[[prune]]\nsites = '.*'\nsparsity = 1.5", "prune[0].sparsity = 1.5: expected `float` < 1.0"),
        ("[[prune]]\nsites = '.*'\nsparsity = 0.5\nspeed = 1", "unknown key 'speed'"),
        ("[[quantize]]\nsites = '.*'\nweights = 'int9'", "quantize[0].weights = 'int9': expected one of int8, int4"),
        ("[[quantize]]\nsites = '.*'\ngranularity = 'group:7'", "'group:7' does not divide the 16 rows"),
        ("[[quantize]]\nsites = '.*'\nactivations = 'fp8_e4m3'", "there is no quantized product with weights = 'int8'"),
        ("cast = 'int8'", "cast = 'int8': expected one of none, "),
        ("[[quantize]]\nsites = 'nothing/.*'", "quantize[0].sites = 'nothing/.*' matches none"),
        ("[[quantize]]\nsites = '('", "quantize[0].sites = '(' is not a regular expression"),
        ("[[quantize]\nsites", "recipe 'bad'"),
    ],
)
@pytest.mark.parametrize("name", ["plan", "compile"])
def test_a_recipe_that_is_wrong(cli, plain, tmp_path, monkeypatch, name, toml, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text(toml)
    assert part in cli.refused(name, plain, "--recipe", "bad.toml")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.toml"]


@pytest.mark.parametrize("name", ["plan", "compile"])
@pytest.mark.parametrize(
    ("sites", "part"),
    [
        ("hidden", "sites 'hidden' and 'hidden#1' use one weight but get different treatment"),
        (".*", "site 'whole' (dot_general): not quantized: its weight is int8 already"),
    ],
)
def test_rules_that_the_weights_do_not_allow(cli, variant, tmp_path, monkeypatch, name, sites, part):
    target = variant(
        "fn=twice, weights={'hidden': data[:16], 'whole': np.ones((16, 4), np.int8)}",
        "def twice(weights, x):\n    hidden = jnp.tanh(x @ weights['hidden']) @ weights['hidden']\n"
        "    return hidden @ weights['whole'].astype(jnp.float32)",
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.toml").write_text(f'[[quantize]]\nsites = "{sites}"')
    assert part in cli.refused(name, target, "--recipe", "rules.toml")


def test_a_plan_that_would_leave_nothing_of_a_weight(cli, plain, tmp_path):
    recipe = tmp_path / "all.toml"
    recipe.write_text('[[prune]]\nsites = "head"\npattern = "channel"\nsparsity = 0.99')
    line = cli.refused("plan", plain, "--recipe", recipe)
    assert "weight 'head' of shape" in line
    assert "would leave nothing of it; lower its sparsity or exclude it" in line


def test_a_recipe_that_is_not_there(cli, plain):
    line = cli.refused("plan", plain, "--recipe", "missing.toml")
    assert "'missing.toml': neither a preset (codebook16, codebook16-prune90, float, fp8, " in line


@pytest.mark.parametrize(
    ("source", "target", "part"),
    [
        (None, "{file}:model", "no file"),
        ("x = 1", "{file}", "expected FILE.py:NAME or package.module:NAME"),
        ("x = 1", "{file}:", "expected FILE.py:NAME"),
        ("x = 1", "{file}:model", "has no 'model'"),
        (models.PLAIN, "{file}:modle", "has no 'modle'; it has model"),
        (models.PLAIN + "small = model.program()", "{file}:smal", "has no 'smal'; it has model, small"),
        ("model = 3", "{file}:model", "is a int; expected a Program, a Generator, a ModelSpec, or a function"),
        ("def model(): return 3", "{file}:model", "is a int; expected a Program"),
        ("def model(weights, x): return x", "{file}:model", "takes arguments; expected a Program"),
        ("def model(): raise KeyError('weights')", "{file}:model", "KeyError: 'weights'"),
        ("1 / 0", "{file}:model", "ZeroDivisionError"),
        ("import no_such_package", "{file}:model", "No module named 'no_such_package'"),
        ("model = (", "{file}:model", "SyntaxError"),
        (
            "import lepton_xla as lx\nmodel = lx.ModelSpec(inputs={})",
            "{file}:model",
            "either fn and weights, or module",
        ),
        (models.PLAIN + "model = make(inputs={'x': lx.TensorSpec(('batch', 9), 'float32')})", "{file}:model", "traced"),
        (None, "no_such_package.models:model", "No module named 'no_such_package'"),
    ],
)
def test_a_model_file_that_is_wrong(cli, tmp_path, monkeypatch, source, target, part):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "wrong_model.py"
    if source is not None:
        file.write_text(source)
    before = sorted(tmp_path.iterdir())
    for name in ("plan", "compile"):
        assert part in cli.refused(name, target.format(file=file))
    assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_a_program_is_a_model_too(cli, plain, tmp_path):
    """As it is, made by a function, and in a ModelSpec that adds what it lacks."""
    file = tmp_path / "programs.py"
    file.write_text(f"""{models.PLAIN}
program = lx.trace(fn, weights, {{"x": lx.TensorSpec(("batch", 16), "float32")}})
make_program = lambda: program
model = lx.ModelSpec(fn=program, buckets={{"batch": (1, 4)}})
""")

    def decisions(target):
        return [(site["site"], site["decision"]) for site in cli.json("plan", target, "--recipe", "int8")["sites"]]

    for name in ("program", "make_program", "model"):
        assert decisions(f"{file}:{name}") == decisions(plain)


def test_a_package_in_this_folder_is_found(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "models.py").write_text(models.PLAIN)
    found = cli.json("plan", "some_package.models:model", "--recipe", "int8")
    assert [site["site"] for site in found["sites"]] == ["hidden", "head"]


def test_plan_shows_the_units_that_go(cli, plain, tmp_path, monkeypatch):
    recipe = tmp_path / "half.toml"
    recipe.write_text('[shrink]\nsparsity = 0.5\n[[quantize]]\nsites = "head"\nactivations = "none"\n')
    half = models.HIDDEN // 2
    found = cli.json("plan", plain, "--recipe", recipe, "--groups")
    removed = {site["site"]: site["action"] for site in found["shrink"]["sites"]}
    assert removed["hidden[1]"] == f"{models.HIDDEN} -> {half} units"
    assert {group["name"]: group["units"] for group in found["groups"]} == {"hidden[1]": half, "head[1]": models.OUT}
    assert [site["shape"] for site in found["sites"]] == [[models.IN, half], [half, models.OUT]]
    assert found["totals"]["weight_bytes"] == 4 * half * (models.IN + models.OUT)
    monkeypatch.setenv("COLUMNS", "160")
    text = " ".join(cli.ok("plan", plain, "--recipe", recipe, "--groups").split())
    assert "units removed" in text
    assert "it is part of the program's output" in text
    recipe.write_text("[shrink]\nflops = 0.0001\n")
    assert "flops = 0.0001 cannot be reached" in cli.refused("plan", plain, "--recipe", recipe)


def test_plan_draws_which_weights_lose_units_together(cli, plain, tmp_path):
    drawing = tmp_path / "groups.svg"
    assert "groups" not in cli.json("plan", plain, "--recipe", "int8", "--plot", drawing)
    text = drawing.read_text()
    assert all(f"<!-- {label} -->" in text for label in ("hidden", "head", f"{models.HIDDEN} units"))
    assert f"<!-- {models.OUT} units (kept) -->" in text
    assert "nowhere" in cli.refused("plan", plain, "--recipe", "int8", "--plot", tmp_path / "nowhere" / "groups.svg")
    line = cli.refused("plan", plain, "--recipe", "int8", "--plot", tmp_path / "groups.docx")
    assert "groups.docx cannot be written" in line


def test_set_and_exclude_change_a_preset(cli, plain):
    changed = cli.json("plan", plain, "--recipe", "int8", "--set", "quantize.0.weights=int4", "--set",
                       "quantize.0.activations=none", "--exclude", "head")  # fmt: skip
    assert [site["decision"] for site in changed["sites"]] == ["int4 weights", "float"]
    assert changed["recipe"] == "int8, changed"
    alone = cli.json("plan", plain, "--set", "cast=bfloat16")
    assert (alone["recipe"], alone["cast"]) == ("none, changed", "bfloat16")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "quantize.0.weights=int7"], "quantize[0].weights = 'int7': expected one of int8"),
        (["--set", "weights=int4"], "unknown key 'weights'"),
        (["--set", "fold"], "--set 'fold': expected key=value"),
        (["--exclude", "nowhere"], "exclude = 'nowhere' matches none of"),
        (["--exclude", "("], "exclude = '(' is not a regular expression"),
    ],
)
def test_changes_that_do_not_fit_are_refused_in_one_line(cli, plain, more, message):
    assert message in cli.refused("plan", plain, "--recipe", "int8", *more)


@pytest.mark.parametrize("command", ["plan", "compile", "sensitivity"])
def test_help_teaches_set_by_an_example(cli, command):
    text = cli.ok(command, "--help")
    assert "--exclude" in text
    assert re.search(rf"leptonx {command} .*--set \S+=", text)
