"""A recipe changed by dotted keys: in Python, and by `--set` and `--exclude` on the command line."""

import re

import jax.numpy as jnp
import pytest

import lepton_xla as lx
from lepton_xla.optimization.pipeline import plan_for
from lepton_xla.passes import find_groups
from lepton_xla.passes.planning import resolve
from lepton_xla.recipe import PruneRule
from lepton_xla.recipe.changes import parse_setting

INT8 = lx.Recipe.load("int8")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("quantize.0.weights=int4", ("quantize.0.weights", "int4")),
        ("rescale = awq", ("rescale", "awq")),
        ("shrink.flops=0.7", ("shrink.flops", 0.7)),
        ("fold=false", ("fold", False)),
        ('shrink.protect=["a", "b"]', ("shrink.protect", ["a", "b"])),
        ("prune.0.sites=layers/[0-3]/.*", ("prune.0.sites", "layers/[0-3]/.*")),
        ("quantize.0.granularity=group:~64", ("quantize.0.granularity", "group:~64")),
        ('name="a=b"', ("name", "a=b")),
        ("shrink.flops=", ("shrink.flops", None)),
    ],
)
def test_values_are_toml_or_bare_words(text, setting):
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["rescale", "=awq", 'name="a', "name=a\nfold=false", "name={a"])
def test_what_is_no_setting(text):
    with pytest.raises(lx.RecipeError, match="--set"):
        parse_setting(text)


def test_values_are_changed_and_begun():
    changed = INT8.replace({"quantize.0.weights": "int4", "quantize.0.activations": "none"}, rounding="nearest")
    assert (changed.quantize[0].weights, changed.quantize[0].activations) == ("int4", "none")
    assert (changed.rounding, changed.rescale, changed.quantize[0].sites) == ("nearest", INT8.rescale, ".*")
    more = INT8.replace({"prune.0.sites": "a", "prune.0.sparsity": 0.5, "shrink.flops": 0.5})
    assert more.prune == (PruneRule(sites="a", sparsity=0.5),)
    assert more.shrink is not None
    assert more.shrink.flops == 0.5
    other = more.replace({"shrink.flops": None, "shrink.sparsity": 0.25}, prune=[PruneRule(sites="b", sparsity=0.1)])
    assert (other.shrink.flops, other.shrink.sparsity, other.prune[0].sites) == (None, 0.25, "b")
    assert lx.Recipe.load("int8") == INT8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize.0.weights": "int7"}, "quantize[0].weights = 'int7': expected one of int8"),
        ({"quantize.0.weigths": "int4"}, "unknown key 'weigths'; did you mean 'weights'?"),
        ({"shrink.flop": 0.5}, "unknown key 'flop'; did you mean 'flops'?"),
        ({"shrink.flops": "half"}, "shrink.flops = 'half': expected"),
        (
            {"quantize.weights": "int4"},
            "quantize.weights: give the index of the block, such as quantize.0",
        ),
        ({"quantize.0": "int4"}, "quantize.0: name a key of the block"),
        ({"quantize.3.weights": "int4"}, "quantize.3: the recipe has 1 [[quantize]] blocks, counted from 0"),
        ({"quantize.1.weights": "int4"}, "missing required field `sites`"),
        ({"rescale.alpha": 0.5}, "rescale is a value and has no keys of its own"),
        ({"fold": "yes"}, "fold = 'yes': expected `bool`"),
        ({"quantize.0.exclude": "("}, "quantize[0].exclude = '(' is not a regular expression"),
    ],
)
def test_mistakes_name_the_key(changes, message):
    with pytest.raises(lx.RecipeError, match=re.escape(message)):
        INT8.replace(changes)


def program():
    weights = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones((8, 3))}
    fn = lambda w, x: ((x @ w["a"]) @ w["b"]) @ w["c"]  # noqa: E731
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 4), "float32")})


def test_what_is_excluded_stays():
    recipe = lx.Recipe.load("int8-shrink50").replace({"shrink.round_to": 1}, exclude=["a", "c"], measure=False)
    small, plan = plan_for(program(), recipe)
    assert {path: leaf.shape for path, leaf in small.weights.items()} == {"a": (4, 8), "b": (8, 8), "c": (8, 3)}
    assert [entry.describe().split()[0] for entry in plan.sites] == ["float", "int8", "float"]
    assert INT8.replace(exclude="a").replace(exclude="b").quantize[0].exclude == ("a", "b")
    whole = find_groups(program()).protecting(["c"])  # a weight whose own axis makes the output
    assert [group.name for group in whole if group.protected.startswith("by the pattern")] == ["b[1]"]


def test_excluding_nothing_or_everything_is_a_mistake():
    with pytest.raises(lx.RecipeError, match=r"exclude = 'd' matches none of the program's 3 sites"):
        resolve(INT8.replace(exclude="d"), program())
    with pytest.raises(lx.RecipeError, match="excludes everything that its sites match"):
        resolve(INT8.replace(exclude=".*"), program())
    with pytest.raises(lx.RecipeError, match="nothing to exclude from"):
        lx.Recipe(name="none").replace(exclude="a")
