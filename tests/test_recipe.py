"""Recipes: what is accepted, what is refused and in which words, and how a plan comes of one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe, presets

QUANTIZE = '[[quantize]]\nsites = "{}"\n'


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def program(fn=None, **weights):
    fn = fn or (lambda w, x: jnp.tanh(jnp.tanh(x @ w["body"]["a"]) @ w["body"]["b"]) @ w["head"])
    weights = weights or {"body": {"a": array(6, 8), "b": array(8, 8)}, "head": array(8, 3)}
    return trace(fn, weights, {"x": TensorSpec(("batch", 6), "float32")})


def parse(text):
    return Recipe.parse(text, name="test")


def decisions(plan: Plan):
    return {planned.site.name: planned.describe() for planned in plan.sites}


def tied(fn=None):
    """A table that is both looked up and multiplied with."""
    fn = fn or (lambda w, ids: jnp.take(w["table"], ids, axis=0).sum(1) @ w["dense"] @ w["table"].T)
    weights = {"table": array(10, 6), "dense": array(6, 6, seed=1)}
    return trace(fn, weights, {"ids": TensorSpec(("batch", 4), "int32")})


# Files and text.


@pytest.mark.parametrize("name", presets())
def test_presets_load(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.on_unsupported == "keep"
    assert resolve(recipe, program()).sites


def test_there_are_the_presets_the_documentation_names():
    named = {"int8", "int8-weight-only", "prune50", "int8-prune50", "shrink50", "int8-shrink50", "codebook16-prune90"}
    assert named <= set(presets())
    for name in ("shrink50", "int8-shrink50", "codebook16-prune90"):
        assert "to regain accuracy" in Recipe.load(name).description


def test_a_file_is_named_by_its_stem_or_by_itself(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(QUANTIZE.format(".*"))
    assert Recipe.load(path).name == "mine"
    assert Recipe.load(str(path)) == Recipe.load(path)
    path.write_text('name = "given ü"\n' + QUANTIZE.format(".*"), encoding="utf-8")
    assert Recipe.load(path).name == "given ü"


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "empty name", "null"])
def test_what_is_not_a_recipe_file(kind, tmp_path):
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    path = {
        "missing": tmp_path / "missing.toml",
        "folder": tmp_path,
        "binary": tmp_path / "binary.toml",
        "empty name": "",
        "null": "a\0b",
    }[kind]
    with pytest.raises(RecipeError, match=r"neither a preset .*int8.* nor a readable TOML file") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("name = 1", "name"),
        ("fold = 1", "fold = 1: expected `bool`, got `int`"),
        ('on_unsupported = "ignore"', "on_unsupported"),
        ('measure = "yes"', "measure"),
        ("speed = 1", "speed"),
        ("prune = 1", "prune"),
        ('[quantize]\nsites = ".*"', "quantize"),
        ("[[quantize]]", "sites"),
        ("[[prune]]\nsparsity = 0.5", "sites"),
        ('[[prune]]\nsites = ".*"', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = 1', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = 1e300', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = -0.1', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = nan', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = inf', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = "0.5"', "sparsity"),
        ('[[prune]]\nsites = ".*"\nsparsity = true', "sparsity"),
        (
            '[[prune]]\nsites = ".*"\nsparsity = 0.6\npattern = "2:4"',
            "sparsity = 0.6: pattern = '2:4' implies a sparsity of 0.5",
        ),
        ('[[prune]]\nsites = ".*"\npattern = "4:4"', "pattern = '4:4': expected N:M with 0 < N < M"),
        ('[[prune]]\nsites = ".*"\npattern = "2:4"\ndistribution = "erk"', "distribution = 'erk'"),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\npattern = "block:0x1"', "pattern"),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\npattern = "row"', "pattern"),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\nmethod = "wander"', "method"),
        (
            '[[prune]]\nsites = ".*"\nsparsity = 0.5\nmethod = "deviation:1"',
            "method = 'deviation:1' determines the sparsity",
        ),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\nmethod = "wanda"\ndistribution = "global"', "distribution"),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\nmethod = "sparsegpt"\npattern = "channel"', "pattern"),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\ndistribution = "layer"', "distribution"),
        ('[[prune]]\nsites = ".*"\nsparsity = 0.5\nweights = "int8"', "weights"),
        ('[[quantize]]\nsites = [".*"]', "sites"),
        ('[[quantize]]\nsites = "("', r"quantize\[0\].sites"),
        ('[[quantize]]\nsites = ".*"\n[[quantize]]\nsites = "*"', r"quantize\[1\].sites"),
        ('[[quantize]]\nsites = ".*"\nexclude = "["', r"quantize\[0\].exclude"),
        ('[[quantize]]\nsites = "a{99999999999999999999}"', r"quantize\[0\].sites"),
        ('[[prune]]\nsites = "a**"\nsparsity = 0.5', r"prune\[0\].sites"),
        (QUANTIZE.format(".*") + 'weights = "int3"', "weights"),
        (QUANTIZE.format(".*") + 'activations = "int16"', "activations"),
        (QUANTIZE.format(".*") + 'granularity = "row"', "granularity"),
        (QUANTIZE.format(".*") + 'granularity = "group:0"', "granularity"),
        (
            QUANTIZE.format(".*") + 'granularity = "group:-4"',
            r"quantize\[0\].granularity = 'group:-4': expected channel, tensor, group:G or group:~G",
        ),
        (QUANTIZE.format(".*") + 'wieghts = "int8"', r"quantize\[0\]: unknown key 'wieghts'; did you mean 'weights'\?"),
        (QUANTIZE.format(".*") + "frob = 1", r"quantize\[0\]: unknown key 'frob'; keys are sites, exclude, weights, "),
        ('rescale = "smooth:2"', "rescale = 'smooth:2': expected none, awq or smooth:A with A in"),
        (QUANTIZE.format(".*") + 'granularity = "group:~0"', "granularity"),
        (QUANTIZE.format(".*") + 'granularity = "group:<=64"', "granularity"),
        (QUANTIZE.format(".*") + 'weight_range = "entropy"', "weight_range"),
        (QUANTIZE.format(".*") + 'weights = "codebook4"\nactivations = "none"\nweight_range = "mse"', "weight_range"),
        (QUANTIZE.format(".*") + 'products = "activations"', "products"),
        (QUANTIZE.format(".*") + 'dynamic = "no"', "dynamic"),
        (
            QUANTIZE.format(".*") + 'weights = "fp8_e4m3"\nactivations = "fp8_e4m3"\ndynamic = false\n'
            'calibration = "entropy"',
            r"quantize\[0\].calibration = 'entropy' needs evenly spaced codes",
        ),
        (
            QUANTIZE.format(".*") + 'activations = "uint8"',
            r"quantize\[0\].activations = 'uint8': expected one of int8, int4, fp8_e4m3, fp8_e5m2, none",
        ),
        ('cast = "float8"', "cast = 'float8': expected one of none, bfloat16, float16"),
        (
            '[[prune]]\nsites = ".*"\nsparsity = 0.1\ndistribution = "x"',
            r"prune\[0\].distribution = 'x': expected one of uniform, global, erk",
        ),
        (QUANTIZE.format(".*") + 'calibration = "mean"', "calibration"),
        (QUANTIZE.format(".*") + 'calibration = "percentile"', "calibration"),
        (QUANTIZE.format(".*") + 'calibration = "percentile:-1"', "calibration"),
        (QUANTIZE.format(".*") + 'calibration = "percentile:0"', "calibration"),
        (QUANTIZE.format(".*") + 'calibration = "percentile:100.1"', "calibration"),
        (QUANTIZE.format(".*") + f'calibration = "percentile:{"9" * 400}"', "calibration"),
        ('name = "a"\nname = "b"', "overwrite"),
        ("name =", "Invalid value"),
        ("name = " + "9" * 5000, "recipe 'test'"),
        ("name = " + "[" * 20000, "recipe 'test'"),
        ("\x00", "recipe 'test'"),
    ],
)
def test_a_bad_key_is_named_in_one_line(text, key):
    with pytest.raises(RecipeError, match=key) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert "recipe 'test'" in str(caught.value)


def test_a_nested_regular_expression_is_refused():
    with pytest.raises(RecipeError, match=r"quantize\[0\].sites"):
        parse(QUANTIZE.format("(" * 20000 + ")" * 20000))


KEYS = st.sampled_from(
    ["name", "fold", "measure", "on_unsupported", "prune", "quantize", "sites", "sparsity", "exclude", "weights",
     "activations", "calibration", "dynamic", "pattern", "distribution", "[[prune]]", "[[quantize]]", "[a.b]", "x"]
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ['".*"', "0.5", "1", "true", "nan", '"int8"', "[[", "{a=1}", '"(?P<x"', "1979-05-27", "'''", '"\\x"']
    ),
    st.text(max_size=8),
    st.floats().map(str),
    st.integers().map(str),
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(st.one_of(KEYS, st.builds("{} = {}".format, KEYS, VALUES))).map("\n".join)))
def test_no_text_raises_anything_else(text):
    try:
        recipe = parse(text)
    except RecipeError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(recipe, Recipe)


# Which site gets what.


def test_the_first_block_that_matches_wins():
    recipe = parse(
        '[[quantize]]\nsites = "body/a"\nactivations = "none"\n'
        '[[quantize]]\nsites = ".*"\ndynamic = false\ncalibration = "percentile:99.9"\n'
        '[[prune]]\nsites = "head"\nsparsity = 0.125\n'
        '[[prune]]\nsites = "body/.*"\nexclude = ".*/b"\nsparsity = 0.875\n'
    )
    assert decisions(resolve(recipe, program())) == {
        "body/a": "prune 87.5% uniform + int8 weights",
        "body/b": "int8 weights, int8 activations percentile:99.9",
        "head": "prune 12.5% uniform + int8 weights, int8 activations percentile:99.9",
    }


def test_exclude_leaves_a_site_to_the_blocks_after():
    recipe = parse(QUANTIZE.format(".*") + 'exclude = "head"\n' + QUANTIZE.format("head") + 'activations = "none"')
    plan = resolve(recipe, program())
    assert decisions(plan)["head"] == "int8 weights"
    assert decisions(plan)["body/a"] == "int8 weights, int8 activations dynamic"
    alone = resolve(parse(QUANTIZE.format(".*") + 'exclude = "head"'), program())
    assert decisions(alone)["head"] == "float"
    assert alone["head"].kept == ""
    assert alone["no such site"] is None


def test_a_pattern_matches_the_whole_name():
    with pytest.raises(
        RecipeError, match=r"quantize\[0\].sites = 'body' matches none of the program's 3 sites: body/a"
    ):
        resolve(parse(QUANTIZE.format("body")), program())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (QUANTIZE.format(".*") + QUANTIZE.format("tail"), r"quantize\[1\].sites = 'tail' matches none"),
        ('[[prune]]\nsites = "tail"\nsparsity = 0.1', r"prune\[0\].sites = 'tail' matches none"),
        (QUANTIZE.format(".*") + 'exclude = "haed"', r"quantize\[0\].exclude = 'haed' matches none"),
        (
            QUANTIZE.format(".*") + 'exclude = ".*"',
            r"quantize\[0\].exclude = '\.\*' excludes everything that its sites match",
        ),
        (
            QUANTIZE.format(".*") + QUANTIZE.format("head"),
            r"quantize\[1\].sites = 'head' only matches sites that earlier",
        ),
    ],
)
def test_a_pattern_without_effect_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        resolve(parse(text), program())


def test_a_program_without_sites():
    bare = program(lambda w, x: x * w["scale"], scale=jnp.float32(2))
    with pytest.raises(RecipeError, match="matches none of the program's 0 sites: there is none"):
        resolve(parse(QUANTIZE.format(".*")), bare)
    assert resolve(Recipe.load("int8"), bare).sites == ()  # it says `keep`
    assert resolve(parse("fold = true"), bare).sites == ()


def test_what_cannot_be_done_is_an_error_or_kept_and_said():
    def fn(w, x):
        y = x @ w["dense"]
        return (y @ y.T) @ jnp.take(w["table"], jnp.zeros(x.shape[0], int), axis=0)

    attention = program(fn, dense=array(6, 5), table=array(9, 4))
    text = QUANTIZE.format(".*") + '[[prune]]\nsites = ".*"\nsparsity = 0.5'
    with pytest.raises(UnsupportedError, match=r"site 'dot_general#0' .*not quantized: dot_general of two activations"):
        resolve(parse(text), attention)
    left = "dot_general of two activations, which products = 'weights' leaves float"
    plan = resolve(parse('on_unsupported = "keep"\n' + text), attention)
    assert {planned.site.name: planned.kept for planned in plan.sites} == {
        "dense": "",
        "dot_general#0": f"not pruned: no weight; not quantized: {left}",
        "table": "not pruned: an embedding",
        "dot_general#1": f"not pruned: no weight; not quantized: {left}",
    }
    assert decisions(plan)["table"] == "int8 weights"  # it is looked up, so there is no activation to round
    # A recipe that does not name them may say `error`.
    assert resolve(parse(QUANTIZE.format("dense")), attention)["table"].kept == ""


def test_integers_are_not_pruned():
    whole = program(lambda w, x: x @ w["codes"].astype(jnp.float32), codes=jnp.ones((6, 4), jnp.int8))
    with pytest.raises(UnsupportedError, match=r"site 'codes' .*not pruned: its weight is"):
        resolve(parse('[[prune]]\nsites = ".*"\nsparsity = 0.5'), whole)


def test_a_tied_embedding_is_quantized_and_kept_whole():
    text = QUANTIZE.format(".*") + '[[prune]]\nsites = ".*"\nsparsity = 0.5'
    with pytest.raises(UnsupportedError, match="site 'table'"):
        resolve(parse(text), tied())
    plan = resolve(parse('on_unsupported = "keep"\n' + text), tied())
    assert decisions(plan)["table"] == "int8 weights"
    assert decisions(plan)["table#1"] == "int8 weights, int8 activations dynamic"
    assert plan["table#1"].not_pruned == "its weight is shared with 'table': an embedding"
    assert decisions(plan)["dense"].startswith("prune")


def test_two_rules_for_one_weight():
    def twice(w, x):
        return jnp.tanh(x @ w["w"]) @ w["w"]

    shared = program(twice, w=array(6, 6))
    with pytest.raises(RecipeError, match="'w' and 'w#1' use one weight but get different treatment"):
        resolve(parse(QUANTIZE.format("w")), shared)
    with pytest.raises(RecipeError, match="'table' and 'table#1' use one weight"):
        resolve(parse(QUANTIZE.format(".*") + 'exclude = "table"'), tied())
    plan = resolve(parse(QUANTIZE.format("w.*")), shared)
    assert decisions(plan)["w"] == decisions(plan)["w#1"] == "int8 weights, int8 activations dynamic"


def test_groups_of_about_a_size_fit_each_weight():
    widths = {"w784": 784, "w300": 300, "w25": 25, "w134": 134}
    weights = {name: array(6, size) for name, size in widths.items()} | {
        f"{name}_out": array(size, 2) for name, size in widths.items()
    }
    model = program(lambda w, x: sum(jnp.tanh(x @ w[name]) @ w[f"{name}_out"] for name in widths), **weights)
    text = QUANTIZE.format(".*_out") + 'activations = "none"\nweights = "int4"\n'
    plan = resolve(parse(text + 'granularity = "group:~64"'), model)
    groups = {"w784": 56, "w300": 60, "w25": 25, "w134": 67}
    assert {name: plan[f"{name}_out"].quantize.granularity for name in widths} == {
        name: f"group:{size}" for name, size in groups.items()
    }
    assert decisions(plan)["w784_out"] == "int4 weights in groups of 56"
    searched = resolve(parse(text + 'granularity = "group:~64"\nweight_range = "mse"'), model)
    assert decisions(searched)["w25_out"] == "int4 weights in groups of 25, range by mse"
    with pytest.raises(UnsupportedError, match=r"'group:64' does not divide the 784 rows .*'group:~64' takes the near"):
        resolve(parse(text + 'granularity = "group:64"'), model)


def test_groups_of_about_a_size_at_a_weight_with_several_sites():
    text = QUANTIZE.format(".*") + 'activations = "none"\ngranularity = "group:~5"'
    plan = resolve(parse(text), tied())
    assert plan["table"].quantize == plan["table#1"].quantize
    assert decisions(plan) == dict.fromkeys(("table", "dense", "table#1"), "int8 weights in groups of 6")
    # In two layouts the sums have other lengths: that, and not their groups, is what is said.
    model = program(lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"].T, w=array(6, 9))
    with pytest.raises(UnsupportedError, match="its weight is used in two layouts, at 'w' and 'w#1'"):
        resolve(parse(text), model)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"].T, "its weight is used in two layouts, at 'w' and 'w#1'"),
        (lambda w, x: x @ w["w"] + jnp.sum(w["w"]), "its weight is also used where no product is"),
        (
            lambda w, x: x @ jnp.broadcast_to(w["w"][:, None], (6, 3, 6)).reshape(6, 18),
            "its weight is broadcast or cut before its use at 'w'",
        ),
        (lambda w, x: x @ w["w"] @ w["w"][:, :4], "its weight is broadcast or cut before its use at 'w#1'"),
        (lambda w, x: x[:, :4] @ w["w"][:4] @ w["w"], "its weight is broadcast or cut before its use at 'w'"),
    ],
)
def test_a_weight_that_cannot_be_stored_is_known_before_anything_runs(fn, reason):
    model = program(fn, w=array(6, 6))
    with pytest.raises(UnsupportedError, match=f"site 'w(#1)?' .*{reason}"):
        resolve(parse(QUANTIZE.format(".*")), model)
    plan = resolve(parse('on_unsupported = "keep"\n' + QUANTIZE.format(".*")), model)
    assert all(planned.quantize is None for planned in plan.sites)
    assert {planned.not_quantized for planned in plan.sites} == {reason}


# JSON.


def test_json_round_trip_and_figures():
    def fn(w, x):
        def layers(x, _):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["stack"])

        return lax.scan(layers, x, None, length=5)[0]

    model = program(fn, stack=array(3, 6, 6))
    (entry,) = resolve(Recipe.load("int8-prune50"), model).to_json()
    assert json.loads(json.dumps(entry)) == entry
    assert entry == {
        "site": "stack",
        "weight": "stack",
        "kind": "dot_general",
        "shape": [6, 6],
        "weight_bytes": 3 * 6 * 6 * 4,
        "repeats": 15,
        "decision": "prune 50% global + int8 weights, int8 activations dynamic",
        "kept": "",
        "computed_from": [],
    }
    converted = program(lambda w, x: x.astype(jnp.bfloat16) @ w["w"].astype(jnp.bfloat16), w=array(6, 4))
    (entry,) = resolve(Recipe.load("int8"), converted).to_json()
    assert entry["weight_bytes"] == 6 * 4 * 4  # as stored, not as used
