"""Names that passes make: whatever users call their weights, no site is lost and no weight replaces another."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_xla as lx
from lepton_xla.errors import ModelError
from lepton_xla.passes import fake_quant, find_sites, fold
from lepton_xla.passes.core.names import SiteNames, fresh
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ENDS = ("", "#0", "#1", "#2", ":bias", ":input_factor", ":act_absmax", ":act_scale", ":correction", "#1:act_absmax")
NAMES = st.lists(
    st.tuples(st.sampled_from(["w", "dot_general", "größe 1.0"]), st.lists(st.sampled_from(ENDS), max_size=2)).map(
        lambda parts: parts[0] + "".join(parts[1])
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(max_examples=25)
@given(NAMES, st.lists(st.sampled_from(["path", "activations", "fresh"]), max_size=12), st.data())
def test_no_name_is_given_twice(paths, kinds, data):
    names, taken, seen = SiteNames(set(paths)), set(paths), []
    first = dict.fromkeys(paths, True)
    for kind in kinds:
        path = data.draw(st.sampled_from(paths))
        if kind == "fresh":
            made = fresh(path, data.draw(st.sampled_from(["bias", "act_absmax"])), taken)
            assert made not in taken
            taken.add(made)
            continue
        name = names.of_weight(path) if kind == "path" else names.of_activations("", "dot_general")
        assert name not in seen
        assert (name in paths) == (kind == "path" and first[path])
        first[path] = first[path] and kind != "path"
        seen.append(name)


def test_plain_names():
    names = SiteNames({"w", "a/w"})
    assert [names.of_weight("w") for _ in range(3)] == ["w", "w#1", "w#2"]
    assert [names.of_activations("a", "dot_general") for _ in range(2)] == ["a/dot_general#0", "a/dot_general#1"]
    assert fresh("w", "bias", {"w"}) == "w:bias"
    assert fresh("w", "bias", {"w", "w:bias"}) == "w:bias:bias"


# Each next to a name that the package would make: further uses, factors, ranges, folded shifts.
ADVERSARIAL = (
    "w", "w#0", "w#1", "w:input_factor", "w:act_absmax", "w:act_scale", "w:bias", "w:correction", "w#1:act_absmax",
    "dot_general", "dot_general#0", "größe 1.0", "a.b c:0", "(?i)x+",
)  # fmt: skip
FEW = ("w", "w#1", "w:act_absmax", "w:input_factor")
WIDTH = 4


def chain(names):
    """A program that multiplies by each weight in turn, by the first once more, and by its own result."""
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(rng.standard_normal((WIDTH, WIDTH)) * np.exp(rng.standard_normal(WIDTH)), jnp.float32)
        for name in names
    }

    def fn(w, x):
        for name in (*names, names[0]):
            x = jnp.tanh(x @ w[name])
        return jnp.tanh((x @ x.T) @ x)

    return trace(fn, weights, {"x": TensorSpec((3, WIDTH), "float32")})


def test_sites_beside_names_like_theirs():
    found = find_sites(chain(ADVERSARIAL))
    names = [site.name for site in found]
    assert len(set(names)) == len(names) == len(ADVERSARIAL) + 3
    assert [site.path for site in found] == [*ADVERSARIAL, "w", None, None]
    assert names[: len(ADVERSARIAL)] == list(ADVERSARIAL)
    assert names[len(ADVERSARIAL) :] == ["w#2", "dot_general##0", "dot_general##1"]


def test_a_folded_shift_beside_weights_that_are_called_so():
    names = ("w", "w:bias", "w:bias:bias")
    weights = {name: jnp.full((WIDTH, WIDTH), 0.1 * (1 + index)) for index, name in enumerate(names)}
    weights |= {"scale": jnp.arange(1.0, 5.0), "shift": jnp.arange(4.0)}

    def fn(w, x):
        for name in names:
            x = x @ w[name] * w["scale"][None] + w["shift"][None]
        return x

    program = trace(fn, weights, {"x": TensorSpec((3, WIDTH), "float32")})
    folded, x = fold(program), np.ones((3, WIDTH), np.float32)
    np.testing.assert_allclose(folded.fn(folded.weights, x), program.fn(weights, x), rtol=1e-5)
    assert len(folded.weights) == 2 * len(names)


METHODS = {
    "smooth": "rescale = 'smooth:0.5'\n[[quantize]]\nsites = '.*'\ndynamic = false",
    "others": "rescale = 'awq'\nrounding = 'gptq'\nequalize = true\ncorrect_bias = true\n[[quantize]]\nsites = '.*'\n"
    "activations = 'none'\n[[prune]]\nsites = '.*'\nmethod = 'wanda'\nsparsity = 0.25",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_weights_are_called_as_what_is_made_of_them(method, tmp_path):
    """The same weights under plain names give the same outputs, bit for bit, and as many sites."""
    recipe = Recipe.parse(f"measure = false\non_unsupported = 'keep'\n{METHODS[method]}", name="all")
    plain, program = chain([f"w{index}" for index in range(len(FEW))]), chain(FEW)
    rng = np.random.default_rng(1)
    data = [{"x": rng.standard_normal((3, WIDTH)).astype(np.float32)} for _ in range(2)]
    wanted, found = (lx.optimize(each, recipe, calibration=data) for each in (plain, program))
    x = data[0]["x"]
    want = np.asarray(jax.jit(wanted.fn)(wanted.weights, x))
    np.testing.assert_array_equal(jax.jit(found.fn)(found.weights, x), want)
    for ours, theirs in zip(found.history, wanted.history, strict=True):
        names = [site.site for site in ours.sites]
        assert ours.name == theirs.name
        assert sorted(map(len, _grouped(names))) == sorted(map(len, _grouped([site.site for site in theirs.sites])))
    sites = {site.site for report in found.history for site in report.sites}
    assert {site.name for site in find_sites(program) if site.path is not None} <= sites
    lx.compile(found, {}).save(tmp_path / "m.lepton")
    np.testing.assert_allclose(lx.load(tmp_path / "m.lepton")(x=x)["output"], want, rtol=1e-5, atol=1e-6)


def _grouped(names):
    return [list(group) for _, group in itertools.groupby(sorted(names))]


def test_a_weight_that_is_called_as_a_part_of_a_quantized_one(tmp_path):
    weights = {
        name: jnp.full((WIDTH, WIDTH), value) for name, value in (("w", 0.5), ("w/values", 0.25), ("w/scale", 2.0))
    }
    fn = lambda w, x: x @ w["w"] @ w["w/values"] + w["w/scale"][:3]  # noqa: E731
    program = trace(fn, weights, {"x": TensorSpec((3, WIDTH), "float32")})
    small = lx.optimize(
        program, Recipe.parse("measure = false\n[[quantize]]\nsites = '.*'\nactivations = 'none'", name="w")
    )
    x = np.ones((3, WIDTH), np.float32)
    lx.compile(small, {}).save(tmp_path / "m.lepton")
    np.testing.assert_allclose(lx.load(tmp_path / "m.lepton")(x=x)["output"], program.fn(weights, x), rtol=1e-5)


def test_training_beside_such_names():
    recipe = Recipe.parse("on_unsupported = 'keep'\n[[quantize]]\nsites = '.*'\ndynamic = false", name="static")
    names = ("w", "w:act_absmax")
    program = chain(names)
    plan = resolve(recipe, program)
    ranges = {site.name: jnp.float32(1 + index) for index, site in enumerate(find_sites(program))}
    x = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    plain = chain(["w0", "w1"])
    renamed = {site.name: jnp.float32(1 + index) for index, site in enumerate(find_sites(plain))}
    got = fake_quant(program.fn, plan, ranges)(program.weights, x)
    np.testing.assert_array_equal(got, fake_quant(plain.fn, resolve(recipe, plain), renamed)(plain.weights, x))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, "two leaves have the path 'a/b'; rename"),
        ({1: jnp.ones(2), "1": jnp.ones(2)}, "a dictionary has keys of different types"),
        ({"x": {1: jnp.ones(2), "b": jnp.ones(2)}}, "a dictionary has keys of different types"),
    ],
)
def test_two_leaves_of_one_path(weights, message):
    with pytest.raises(ModelError, match=message):
        trace(lambda w, x: x, weights, {"x": TensorSpec((2,), "float32")})
