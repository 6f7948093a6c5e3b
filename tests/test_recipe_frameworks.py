"""One network written in five ways: every recipe, and training, must make the same of each."""

import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from cases import pairs
from flax import nnx

from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.optimization.pipeline import optimize
from lepton_xla.passes import calibrate, fake_quant
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.fake_quantization import initial_scales
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import QTensor
from lepton_xla.recipe import Recipe, presets
from lepton_xla.trees import name_leaves

DEPTH, HIDDEN, OUT = 16, 24, 6
ROWS = {"x": TensorSpec(("batch", DEPTH), "float32")}
RNG = np.random.default_rng(0)
# With a scale for each input, so that there is something for SmoothQuant to do.
WEIGHTS = {
    "gamma": RNG.uniform(0.3, 3, DEPTH).astype(np.float32), "beta": RNG.normal(0, 0.1, DEPTH).astype(np.float32),
    "up": RNG.normal(0, 0.3, (DEPTH, HIDDEN)).astype(np.float32), "up_b": RNG.normal(0, 0.1, HIDDEN).astype(np.float32),
    "down": RNG.normal(0, 0.3, (HIDDEN, OUT)).astype(np.float32), "down_b": RNG.normal(0, 0.1, OUT).astype(np.float32),
}  # fmt: skip
X = RNG.normal(0, 1, (32, DEPTH)).astype(np.float32)


def given(tree, names):
    """A tree of some framework's with the weights above in its leaves; `names` in the order of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [WEIGHTS[name.removesuffix(".T")].T if name.endswith(".T") else WEIGHTS[name] for name in names]
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in chosen]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in chosen])


def by_hand():
    def fn(w, x):
        mean = jnp.mean(x, -1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + 1e-6) * w["gamma"] + w["beta"]
        return jax.nn.relu(x @ w["up"] + w["up_b"]) @ w["down"] + w["down_b"]

    return trace(fn, jax.tree.map(jnp.asarray, WEIGHTS), ROWS)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(OUT, name="down")(nn.relu(x))


def linen():
    variables = LinenNet().init(jax.random.key(0), X)
    return from_linen(LinenNet(), given(variables, ["down_b", "down", "beta", "gamma", "up_b", "up"]), ROWS)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(DEPTH, rngs=rngs)
        self.up, self.down = nnx.Linear(DEPTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, OUT, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(self.norm(x))))


def of_nnx():
    net = NNXNet()
    state = nnx.state(net)
    nnx.update(net, given(state, ["down_b", "down", "beta", "gamma", "up_b", "up"]))
    return from_nnx(net, ROWS)


def equinox():
    keys = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.LayerNorm(DEPTH, 1e-6), eqx.nn.Linear(DEPTH, HIDDEN, key=keys[0]), eqx.nn.Lambda(jax.nn.relu)]
    model = eqx.nn.Sequential([*layers, eqx.nn.Linear(HIDDEN, OUT, key=keys[1])])
    arrays, rest = eqx.partition(model, eqx.is_array)
    arrays = given(arrays, ["gamma", "beta", "up.T", "up_b", "down.T", "down_b"])
    return trace(lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays, ROWS)


def haiku():
    def fn(x):
        x = hk.LayerNorm(-1, True, True, eps=1e-6, name="a_norm")(x)
        return hk.Linear(OUT, name="c_down")(jax.nn.relu(hk.Linear(HIDDEN, name="b_up")(x)))

    network = hk.without_apply_rng(hk.transform(fn))
    weights = network.init(jax.random.key(0), X)
    return trace(network.apply, given(weights, ["beta", "gamma", "up_b", "up", "down_b", "down"]), ROWS)


FRAMEWORKS = {"by hand": by_hand, "linen": linen, "nnx": of_nnx, "equinox": equinox, "haiku": haiku}
OTHERS = [name for name in FRAMEWORKS if name != "by hand"]
FLAX = ("linen", "nnx")
# Beside the presets, what no preset asks for.
RECIPES = {name: msgspec.structs.replace(Recipe.load(name), measure=False) for name in presets()} | {
    name: Recipe.parse(f'measure = false\n{top}\n[[quantize]]\nsites = ".*"\n{keys}', name=name)
    for name, top, keys in [
        ("awq and biases", 'rescale = "awq"\ncorrect_bias = true', 'weights = "uint4"\nactivations = "none"'),
        ("equalized and static", "equalize = true", 'dynamic = false\ncalibration = "mse"\naggregate = "ema:0.9"'),
    ]
}


# What is run with data; the others leave out what needs it, which these have.
WITH_DATA = ("int8", "int8-static", "int4-weight-only", "awq and biases", "equalized and static")


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Equinox, Haiku and NNX promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def programs(promotion):
    return {name: make() for name, make in FRAMEWORKS.items()}


@pytest.fixture(scope="module")
def optimized(programs):
    """What a recipe makes of a framework's program, and its outputs; made once."""
    made = {}

    def make(recipe, framework):
        if (recipe, framework) not in made:
            data = [{"x": X[:16]}, {"x": X[16:]}] if recipe in WITH_DATA else None
            small = optimize(programs[framework], RECIPES[recipe], calibration=data)
            made[recipe, framework] = small, np.asarray(small(small.weights, X))
        return made[recipe, framework]

    return make


def facts(program):
    """Each pass, and what became of each product in it, without the paths of weights."""
    paths = re.compile(r"(with|into) .*|\S+ corrected")
    return [(report.name, sorted(paths.sub(r"\1", site.action) for site in report.sites)) for report in program.history]


@pytest.mark.parametrize(
    ("recipe", "framework"),
    # Flax has `test_pipeline.py` for all of them.
    pairs(RECIPES, [name for name in OTHERS if name not in FLAX], whole=WITH_DATA)
    + [("awq and biases", name) for name in FLAX],
)
def test_a_recipe_makes_the_same_of_every_framework(programs, optimized, recipe, framework):
    (small, got), (reference, expected) = optimized(recipe, framework), optimized(recipe, "by hand")
    exact = np.asarray(programs["by hand"](programs["by hand"].weights, X))
    lost, size = np.linalg.norm(expected - exact), np.linalg.norm(exact)
    loses = RECIPES[recipe].quantize or RECIPES[recipe].prune or RECIPES[recipe].shrink
    assert lost / size > 1e-4 if loses else lost < 1e-6 * size
    assert np.linalg.norm(expected) > 0.2 * size, "what loses all is the same of every framework too"
    # Sums are in another order, so that a code may fall on the other side of a half here and there.
    assert np.linalg.norm(got - expected) < (0.1 * lost if loses else 1e-6 * size)
    assert facts(small) == facts(reference)
    assert small.weights_bytes == reference.weights_bytes
    stored = [sum(isinstance(w, QTensor) for w in program.weights.values()) for program in (small, reference)]
    assert stored == [2 * bool(RECIPES[recipe].quantize)] * 2


@pytest.mark.parametrize("framework", OTHERS)
def test_training_and_what_is_compiled_of_it_are_the_same(programs, framework):
    """The value and every gradient, those of trained scales too; and `lower` stores the scales that were trained."""
    text = 'measure = false\n[[quantize]]\nsites = ".*"\nweights = "int4"\nactivations = "int4"\ndynamic = false'
    recipe = Recipe.parse(text, name="qat")

    def trained(program):
        plan = resolve(recipe, program)
        scales = initial_scales(program.weights, plan, calibrate(program, plan, [{"x": X}]))
        quantized = fake_quant(program.fn, plan)
        loss = lambda w, s: jnp.mean(quantized(w, X, scales=s) ** 2)  # noqa: E731
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(program.weights, scales)
        stepped = [
            jax.tree.map(lambda a, g: a - 0.01 * g, tree, by)
            for tree, by in zip((program.weights, scales), gradients, strict=True)
        ]
        small = quantize(program.replace(weights=stepped[0]), plan, scales=stepped[1])
        for site in find_sites(program):
            np.testing.assert_array_equal(small.weights[site.path].scale, jnp.exp2(stepped[1][site.path]["log2_scale"]))
        np.testing.assert_allclose(small(small.weights, X), quantized(*stepped[:1], X, scales=stepped[1]), atol=1e-5)
        sizes = sorted(float(jnp.linalg.norm(leaf)) for leaf in name_leaves(gradients, prefix="gradients").values())
        return float(value), sizes

    value, sizes = trained(programs[framework])
    expected, expected_sizes = trained(programs["by hand"])
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    np.testing.assert_allclose(sizes, expected_sizes, rtol=2e-2, atol=1e-4)
