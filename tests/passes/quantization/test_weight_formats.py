"""Every weight format in fake_quant and quantize, which must agree, and in artifacts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import pairs
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lepton_xla as lx
from lepton_xla.errors import CalibrationError, ModelError, RecipeError, UnsupportedError
from lepton_xla.passes import calibrate, fake_quant, find_sites, quantize
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.matrix import code_matrix
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization import eligibility, products
from lepton_xla.passes.quantization.fake_quantization import initial_scales
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import QTensor
from lepton_xla.quant import quantize as quantize_matrix
from lepton_xla.quant.learned import raw_scales
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGE = {"x": TensorSpec(("batch", 7, 7, 4), "float32")}
FORMATS_TESTED = ["int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4", "codebook2", "codebook16"]


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def recipe(weights, granularity="channel", activations="none", options=""):
    return Recipe.parse(
        f'[[quantize]]\nsites = ".*"\nweights = "{weights}"\ngranularity = "{granularity}"\n'
        f'activations = "{activations}"\n{options}',
        name="test",
    )


def conv(layout):
    return lambda w, x: lax.conv_general_dilated(x, w["w"], (2, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC"))


def steps(w, x):
    return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w["w"])[0]


MODELS = {
    "dense": (lambda w, x: x @ w["w"], (6, 5), ROWS),
    "transposed": (lambda w, x: x @ w["w"].T, (5, 6), ROWS),
    "weight on the left": (lambda w, x: jnp.einsum("oi,bi->bo", w["w"], x), (5, 6), ROWS),
    "heads": (lambda w, x: jnp.einsum("bd,hdk->bhk", x, w["w"]), (2, 6, 3), ROWS),
    "experts": (lambda w, x: jnp.einsum("bei,eio->beo", x.reshape(-1, 3, 2), w["w"]), (3, 2, 5), ROWS),
    "HWIO": (conv("HWIO"), (3, 3, 4, 5), IMAGE),
    "OIHW": (conv("OIHW"), (5, 4, 3, 3), IMAGE),
    "scan": (steps, (3, 6, 6), ROWS),
    "embedding": (lambda w, x: jnp.take(w["w"], jnp.argmax(x, 1), axis=0), (6, 4), ROWS),
    "tied": (lambda w, x: jnp.tanh(jnp.take(w["w"], jnp.argmax(x, 1), axis=0)) @ w["w"].T, (6, 4), ROWS),
}  # fmt: skip


def model(name):
    fn, shape, specs = MODELS[name]
    return trace(fn, {"w": array(*shape, seed=1)}, specs)


def example(program, seed=3):
    return array(*[4 if isinstance(dim, str) else dim for dim in program.inputs["x"].shape], seed=seed)


COMBINATIONS = [
    ("int4", "channel"), ("int4", "tensor"), ("int4", "group:2"), ("uint8", "channel"), ("uint4", "group:2"),
    ("fp8_e4m3", "channel"), ("nf4", "group:2"), ("codebook16", "channel"), ("codebook2", "group:2"),
]  # fmt: skip


FEW = ("transposed", "HWIO", "tied")


@pytest.mark.parametrize(
    ("name", "weights", "granularity"),
    [
        (name, weights, granularity)
        for weights, granularity in COMBINATIONS
        for name in (MODELS if (weights, granularity) in COMBINATIONS[2:4] else FEW)
    ],
)
def test_fake_and_lowered_weights_are_the_same(name, weights, granularity):
    program = model(name)
    plan = resolve(recipe(weights, granularity), program)
    x = example(program)
    fake = jax.jit(fake_quant(program.fn, plan))(program.weights, x)
    small = quantize(program, plan)
    got = jax.jit(small.fn)(small.weights, x)
    assert got.dtype == fake.dtype
    # The products are the same operation on the same numbers; the compiler may sum in another order.
    np.testing.assert_allclose(got, fake, rtol=0, atol=2e-6 * np.abs(fake).max())
    exact = np.asarray(program(program.weights, x))
    limit = 2 if weights == "codebook2" or name == "scan" else 0.6
    assert 0 < np.abs(np.asarray(got) - exact).max() / np.abs(exact).max() < limit
    stored = small.weights["w"]
    assert isinstance(stored, QTensor)
    assert stored.format == weights
    (action,) = {site.action for site in small.history[-1].sites}
    assert action == f"{weights} weights"


@pytest.mark.parametrize(
    ("name", "weights", "granularity"),
    [
        ("dense", "int4", "group:3"), ("scan", "int4", "channel"), ("HWIO", "uint4", "group:6"),
        ("tied", "nf4", "channel"), ("experts", "int4", "tensor"), ("embedding", "int4", "group:2"),
    ],
)  # fmt: skip
def test_a_searched_range_is_the_same_in_training_and_lowered(name, weights, granularity):
    program = model(name)
    plan, plain = (
        resolve(recipe(weights, granularity, options=f'weight_range = "{how}"'), program) for how in ("mse", "absmax")
    )
    x = example(program)
    fake = jax.jit(fake_quant(program.fn, plan))(program.weights, x)
    small, covering = quantize(program, plan), quantize(program, plain)
    np.testing.assert_allclose(small(small.weights, x), fake, rtol=0, atol=2e-6 * np.abs(fake).max())
    site = find_sites(program)[0]
    to_matrix = lambda w: code_matrix(site, w)  # noqa: E731
    exact = (jax.vmap(to_matrix) if name == "scan" else to_matrix)(lay_out(program.weights["w"], site.layout))
    errors = [float(jnp.sum((one.weights["w"].dequantize() - exact) ** 2)) for one in (small, covering)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("weights", FORMATS_TESTED)
def test_the_operand_is_exactly_the_same(weights):
    """The weight itself, bit for bit, jitted and not, in both narrow and wide models."""
    for dtype in ("float32", "bfloat16"):
        weight = array(5, 6).astype(dtype)
        program = trace(lambda w, x: x @ w["w"].T, {"w": weight}, {"x": TensorSpec(("batch", 6), dtype)})
        for granularity in ("channel", "group:3"):
            plan = resolve(recipe(weights, granularity), program)
            (site,) = find_sites(program)
            stored = products.store(site, lay_out(weight, site.layout), weights, granularity)
            wrap = jax.jit if (dtype == "float32") == (granularity == "channel") else lambda f: f
            seen = wrap(fake_quant(program.fn, plan))(program.weights, jnp.eye(6, dtype=dtype))
            np.testing.assert_array_equal(
                np.asarray(seen, np.float32), np.asarray(products.restore(site, stored), np.float32)
            )


@pytest.mark.parametrize(
    ("name", "formats"),
    pairs(
        ("dense", "transposed", "HWIO", "OIHW", "scan", "experts"),
        itertools.product(("int4", "int8"), repeat=2),
        whole=("dense",),
    ),
)
def test_integer_products(name, formats):
    program, (weights, activations) = model(name), formats
    plan = resolve(recipe(weights, "channel", activations), program)
    small = quantize(program, plan)
    x = example(program)
    jaxpr = str(jax.make_jaxpr(small.fn)(small.weights, x))
    assert jaxpr.count("preferred_element_type=int32") == 1
    assert small.history[-1].sites[0].action == f"{weights} x {activations}"
    fake = np.asarray(fake_quant(program.fn, plan)(program.weights, x))
    difference = np.abs(np.asarray(jax.jit(small.fn)(small.weights, x)) - fake)
    # In a scan a code may fall on the other side of a tie.
    assert np.median(difference) < 1e-5
    assert difference.max() < (1e-4 if name != "scan" else 0.2)
    per_byte = 2 if weights == "int4" else 1
    assert small.weights["w"].values.size * per_byte >= program.weights["w"].size
    assert small.weights["w"].values.nbytes <= program.weights["w"].size / per_byte * 1.4


def test_what_has_no_product_of_codes_is_stored_small_and_says_why():
    program = model("dense")
    small = quantize(program, resolve(recipe("int4", "group:2", "int8"), program))
    (site,) = small.history[-1].sites
    assert (site.action, site.reason) == (
        "int4 weights", "groups have no product of codes, so only the weight is stored small",
    )  # fmt: skip
    small = quantize(program, resolve(recipe("fp8_e4m3", "channel", "fp8_e4m3"), program))
    (site,) = small.history[-1].sites
    assert (site.action, site.reason) == (
        "fp8_e4m3 weights", "the platform 'cpu' has no fp8 product, so only the weight is stored small",
    )  # fmt: skip


def test_fp8_products_where_the_platform_has_them(monkeypatch):
    monkeypatch.setattr(products, "SAFE_FP8_VALUES", 0)
    monkeypatch.setattr(eligibility, "FP8_PLATFORMS", ("cpu",))
    program = model("dense")
    small = quantize(program, resolve(recipe("fp8_e4m3", "channel", "fp8_e4m3"), program))
    assert small.history[-1].sites[0].action == "fp8_e4m3 x fp8_e4m3"
    jaxpr = jax.make_jaxpr(small.fn)(small.weights, example(program))
    (dot,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert [var.aval.dtype.name for var in dot.invars] == ["float8_e4m3fn", "float8_e4m3fn"]
    assert dot.params["preferred_element_type"] == jnp.float32
    x = example(program)
    fake = fake_quant(program.fn, resolve(recipe("fp8_e4m3", "channel", "fp8_e4m3"), program))(program.weights, x)
    np.testing.assert_allclose(small(small.weights, x), fake, rtol=1e-5, atol=1e-5)
    both = resolve(recipe("fp8_e5m2", "channel", "fp8_e5m2"), program)
    assert "fp8_e5m2 by itself" in quantize(program, both).history[-1].sites[0].reason


# Embeddings.


@pytest.mark.parametrize(
    ("weights", "mode"), pairs(("int8", "int4", "nf4", "codebook16"), ("clip", "fill", "wrap"), whole=("int4",))
)
def test_a_table_is_looked_up_in_codes(weights, mode):
    program = trace(
        lambda w, ids: jnp.take(w["table"], ids, axis=0, mode=mode), {"table": array(11, 8)},
        {"ids": TensorSpec(("batch", "seq"), "int32")},
    )  # fmt: skip
    small = quantize(program, resolve(recipe(weights, "group:4"), program))
    ids = jnp.asarray([[0, 10, 3], [11, -1, 500], [-11, -12, 5]])
    table = small.weights["table"].dequantize().T
    got = jax.jit(small.fn)(small.weights, ids)
    np.testing.assert_array_equal(got, jnp.take(table, ids, axis=0, mode=mode))
    assert got.shape == (3, 3, 8)
    # The whole table is nowhere a float.
    floats = {
        var.aval.shape
        for eqn in jax.make_jaxpr(small.fn)(small.weights, ids).eqns
        for var in eqn.outvars
        if jnp.issubdtype(var.aval.dtype, jnp.floating)
    }
    assert not any(np.prod(shape) >= 11 * 8 for shape in floats if 11 in shape)


def test_training_rounds_only_the_rows_that_are_looked_up():
    program = trace(
        lambda w, ids: jnp.take(w["table"], ids, axis=0), {"table": array(11, 8)},
        {"ids": TensorSpec(("batch", "seq"), "int32")},
    )  # fmt: skip
    ids = jnp.asarray([[0, 10, 3], [1, 1, 7]])
    quantized = fake_quant(program.fn, resolve(recipe("int4", "group:4"), program))
    jaxpr = str(jax.make_jaxpr(quantized)(program.weights, ids))
    assert "round" in jaxpr
    assert not [line for line in jaxpr.splitlines() if "[11,8]" in line and ("round" in line or " div" in line)]
    gradient = jax.grad(lambda w: jnp.sum(quantized(w, ids)))(program.weights)["table"]
    np.testing.assert_allclose(gradient, np.bincount(np.ravel(ids), minlength=11)[:, None] * np.ones((11, 8)))


# Recipes.


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("nf4", "int8"), ("int8", "fp8_e4m3"), ("fp8_e5m2", "int4"), ("uint8", "int8"), ("codebook16", "int8")],
)
def test_formats_without_a_product_are_refused(weights, activations):
    with pytest.raises(
        RecipeError, match=rf"quantize\[0\].activations = '{activations}'.*'{weights}'.*'none'"
    ) as caught:
        recipe(weights, "channel", activations)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", ["group", "group:", "group:0", "group:-1", "group:1.5", "group:a", "row"])
def test_granularities_that_are_none(granularity):
    with pytest.raises(RecipeError, match="granularity"):
        recipe("int4", granularity)


def test_a_group_that_does_not_divide_is_an_error_or_kept():
    program = model("dense")
    with pytest.raises(UnsupportedError, match=r"site 'w' .*'group:4' does not divide the 6 rows") as caught:
        resolve(recipe("int4", "group:4"), program)
    assert "\n" not in str(caught.value)
    text = 'on_unsupported = "keep"\n[[quantize]]\nsites = ".*"\nweights = "int4"\nactivations = "none"\n'
    kept = resolve(Recipe.parse(text + 'granularity = "group:4"', name="test"), program)
    assert quantize(program, kept).history[-1].sites[0].action == "kept float"


def test_integer_weights_are_refused():
    program = trace(lambda w, x: x @ w["w"].astype(jnp.float32), {"w": jnp.ones((6, 4), jnp.int8)}, ROWS)
    for weights in ("int4", "nf4"):
        # The product sees floats, so the conversion is looked through, and the stored integers are named.
        with pytest.raises(UnsupportedError, match=r"site 'w' .*int8"):
            resolve(recipe(weights), program)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_numbers_are_refused_by_name(broken):
    program = model("dense")
    plan = resolve(recipe("int8", "channel", "int8", "dynamic = false"), program)
    with pytest.raises(CalibrationError, match="range of site 'w' is not finite"):
        quantize(program, plan, {"w": jnp.float32(broken)})
    worse = program.replace(weights={"w": program.weights["w"].at[0, 0].set(broken)})
    with pytest.raises(ModelError, match="weight 'w' cannot be quantized: it holds NaN or infinity"):
        quantize(worse, plan, {"w": jnp.float32(1)})
    with pytest.raises(ModelError, match="weight 'w' cannot be quantized: its scale"):
        quantize(program, plan, {"w": jnp.float32(1)}, scales={"w": {"scale": jnp.full((1, 5), broken)}})


# Scales that are trained.


def numpy_lsq(values, scale, lowest, largest, shared):
    """Value and both gradients of the sum, by the formulas of arXiv:1902.08153, in float64."""
    position = values / scale
    codes = np.clip(np.rint(position), lowest, largest)
    inner = (position >= lowest) & (position <= largest)
    by_scale = np.where(inner, codes - position, codes)
    return codes * scale, inner.astype(float), by_scale / np.sqrt(shared * largest)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group:3"])
def test_trained_scales_have_the_gradient_of_the_paper(weights, granularity):
    program = model("dense")
    plan = resolve(recipe(weights, granularity), program)
    scales = jax.tree.map(lambda s: s * 0.8, raw_scales(initial_scales(program.weights, plan)))
    scale = scales["w"]["scale"]
    assert scale.shape == {"channel": (1, 5), "tensor": (1, 1), "group:3": (2, 5)}[granularity]
    if granularity == "group:3":
        scales["w"]["scale"] = scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
    quantized = fake_quant(program.fn, plan)
    total = lambda w, s: jnp.sum(quantized({"w": w}, jnp.eye(6), scales=s))  # noqa: E731
    by_weight, by_scale = jax.grad(total, (0, 1))(program.weights["w"], scales)
    spread = np.broadcast_to(np.repeat(np.asarray(scale, np.float64), 6 // scale.shape[0], axis=0), (6, 5))
    ends = {"int8": (-127, 127), "int4": (-8, 7)}[weights]
    shared = 30 / scale.size
    value, pass_weight, pass_scale = numpy_lsq(np.asarray(program.weights["w"], np.float64), spread, *ends, shared)
    np.testing.assert_allclose(quantized(program.weights, jnp.eye(6), scales=scales), value, rtol=1e-6)
    np.testing.assert_allclose(by_weight, pass_weight, atol=1e-5)
    expected = pass_scale.reshape(scale.shape[0], -1, 5).sum(1)
    expected = expected.sum(keepdims=True) if granularity == "tensor" else expected
    # A group's scale has its gradient in bfloat16.
    np.testing.assert_allclose(by_scale["w"]["scale"], expected, rtol=1e-3, atol=2e-4)


def test_the_first_scale_is_that_of_the_paper():
    program = model("scan")
    scales = initial_scales(program.weights, resolve(recipe("int4"), program))
    expected = 2 * np.abs(np.asarray(program.weights["w"], np.float64)).mean(1, keepdims=True) / np.sqrt(7)
    assert scales["w"]["log2_scale"].shape == (3, 1, 6)
    np.testing.assert_allclose(scales["w"]["log2_scale"], np.log2(expected), rtol=1e-5)
    zero = initial_scales({"w": jnp.zeros((3, 6, 6))}, resolve(recipe("int4"), program))
    np.testing.assert_array_equal(zero["w"]["log2_scale"], 0)
    with pytest.raises(UnsupportedError, match="site 'w': scales are trained for int8 and int4, not for nf4"):
        initial_scales(program.weights, resolve(recipe("nf4"), program))


@pytest.mark.parametrize(
    ("name", "granularity"), pairs(("dense", "scan", "HWIO"), ("channel", "tensor", "group:2"), whole=("dense",))
)
def test_what_was_trained_is_what_is_compiled(name, granularity):
    """Train weights and scales together; the stored codes and scales are those of the last step, exactly."""
    program = model(name)
    activations = "int4" if not granularity.startswith("group") else "none"
    plan = resolve(recipe("int4", granularity, activations, "dynamic = false"), program)
    x = jnp.concatenate([example(program, seed) for seed in range(3, 19)])
    ranges = calibrate(program, plan, [{"x": x}]) if activations != "none" else {}
    params = {"weights": program.weights, "scales": initial_scales(program.weights, plan, ranges)}
    quantized = fake_quant(program.fn, plan)
    target = program(program.weights, x)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((quantized(p["weights"], x, scales=p["scales"]) - target) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    before = params
    for _ in range(60):
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
            params, state, value = step(params, state)
        losses.append(float(value))
    assert min(losses[-5:]) < 0.9 * losses[0]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert not np.array_equal(old, new)

    trained = program.replace(weights=params["weights"])
    small = quantize(trained, plan, scales=params["scales"])
    stored = small.weights["w"]
    raw = raw_scales(params["scales"])["w"]
    scale = np.asarray(raw["scale"])
    if granularity.startswith("group"):
        scale = np.asarray(raw["scale"].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(np.asarray(stored.scale, np.float32), scale)
    (site,) = find_sites(program)
    laid = lay_out(params["weights"]["w"], site.layout)
    to_matrix = lambda w: code_matrix(site, w)  # noqa: E731
    matrix = np.asarray((jax.vmap(to_matrix) if name == "scan" else to_matrix)(laid))
    spread = np.repeat(scale, matrix.shape[-2] // scale.shape[-2], axis=-2)
    np.testing.assert_array_equal(stored.codes(), np.clip(np.rint(matrix / spread), -8, 7))
    if activations != "none":
        np.testing.assert_array_equal(small.weights["w:act_scale"], raw["activation"])
    expected = np.asarray(quantized(params["weights"], x, scales=params["scales"]))
    difference = np.abs(np.asarray(small(small.weights, x)) - expected)
    assert np.median(difference) < 1e-5
    assert difference.max() < (1e-4 if name != "scan" else 0.3)


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_adam_trains_scales_as_logarithms(rate):
    """Its step is as large for a small scale as for a large one: trained as it is, a small one passes zero."""
    fn = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]  # noqa: E731
    weights, x = {"a": 0.02 * array(6, 32), "b": 0.02 * array(32, 4, seed=1)}, array(256, 6, seed=2)
    program = trace(fn, weights, ROWS)
    plan = resolve(recipe("int8", "channel", "int8", "dynamic = false"), program)
    quantized, target = fake_quant(fn, plan), fn(weights, x)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, 200))

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((quantized(p["weights"], x, scales=p["scales"]) - target) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        smallest = jnp.stack([jnp.min(leaf) for leaf in jax.tree.leaves(raw_scales(params["scales"]))]).min()
        return optax.apply_updates(params, updates), state, (value, smallest)

    def trained(scales):
        params, seen = {"weights": weights, "scales": scales}, []
        state = optimizer.init(params)
        for _ in range(200):
            with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
                params, state, now = step(params, state)
            seen.append(now)
        losses, smallest = np.asarray(seen).T
        return losses[-1] / losses[0], smallest.min()

    scales = initial_scales(weights, plan, calibrate(program, plan, [{"x": x}]))
    kept, smallest = trained(scales)
    assert kept < 0.5
    assert smallest > 1e-3
    kept, smallest = trained(raw_scales(scales))
    assert smallest < 0
    assert rate < 1e-2 or kept > 10


def test_scales_for_nothing_are_refused():
    program = model("dense")
    plan = resolve(recipe("int4"), program)
    lower_with = lambda scales: quantize(program, plan, scales=scales)  # noqa: E731
    with pytest.raises(ModelError, match="scales are given for 'v'"):
        fake_quant(program.fn, plan)(program.weights, jnp.eye(6), scales={"v": {"scale": jnp.ones((1, 5))}})
    for parts, said in (
        (
            {"scal": 1.0},
            "'w' as 'scal'; parts are scale, zero_point, codebook, activation, log2_scale",
        ),
        ({"log2_zero_point": 1.0}, "'w' as 'log2_zero_point'"),
        ({"scale": 1.0, "log2_scale": 0.0}, "'w' both as 'scale' and as its logarithm"),
    ):
        for take in (lambda s: fake_quant(program.fn, plan)(program.weights, jnp.eye(6), scales=s), lower_with):
            with pytest.raises(ModelError, match=f"scales are given for {said}"):
                take({"w": parts})


def test_levels_are_trained_too():
    program = model("dense")
    plan = resolve(recipe("codebook4", "tensor"), program)
    stored = quantize(program, plan).weights["w"]
    scales = {"w": {"scale": stored.scale, "codebook": stored.codebook}}
    quantized = fake_quant(program.fn, plan)
    gradient = jax.grad(lambda s: jnp.sum(quantized(program.weights, jnp.eye(6), scales=s)))(scales)
    # Each level's gradient is how many weights it stands for, times the scale.
    members = np.bincount(np.asarray(stored.codes()).ravel(), minlength=4)
    np.testing.assert_allclose(gradient["w"]["codebook"], members * float(stored.scale[0, 0]), rtol=1e-5)
    moved = {"w": {"scale": stored.scale, "codebook": stored.codebook + 0.05}}
    small = quantize(program, plan, scales=moved)
    np.testing.assert_array_equal(small.weights["w"].codebook, moved["w"]["codebook"])
    got = small(small.weights, jnp.eye(6))
    np.testing.assert_allclose(got, quantized(program.weights, jnp.eye(6), scales=moved), rtol=1e-6)


# When and how it rounds.


def test_rounding_begins_at_its_step_without_a_new_compile():
    program = model("scan")
    plan = resolve(recipe("int4", "channel", "int4"), program)
    traces = []

    def fn(w, x):
        traces.append(1)
        return program.fn(w, x)

    quantized = jax.jit(lambda w, x, step: fake_quant(fn, plan, start=10)(w, x, step=step))
    x = example(program)
    plain, rounded = program(program.weights, x), fake_quant(program.fn, plan)(program.weights, x)
    for step, expected in ((0, plain), (9, plain), (10, rounded), (11, rounded)):
        np.testing.assert_allclose(quantized(program.weights, x, step), expected, rtol=0, atol=1e-5)
    assert len(traces) == 2  # once as it is, once to be rounded
    assert np.abs(rounded - plain).max() > 0.01


def test_activations_are_rounded_after_their_delay():
    program = model("scan")
    plan = resolve(recipe("int4", "channel", "int4", 'products = "all"'), program)
    weights_alone = resolve(recipe("int4"), program)
    staged = jax.jit(lambda w, x, step: fake_quant(program.fn, plan, start=10, delay=5)(w, x, step=step))
    x = example(program)
    plain = program(program.weights, x)
    narrow, rounded = (fake_quant(program.fn, each)(program.weights, x) for each in (weights_alone, plan))
    for step, expected in ((9, plain), (10, narrow), (14, narrow), (15, rounded), (99, rounded)):
        np.testing.assert_allclose(staged(program.weights, x, step), expected, rtol=0, atol=1e-5)
    assert min(np.abs(narrow - plain).max(), np.abs(narrow - rounded).max()) > 0.01
    with pytest.raises(RecipeError, match="delay = -1 is negative"):
        fake_quant(program.fn, plan, delay=-1)


def test_random_rounding_is_right_on_average_and_differs_by_step_site_and_key():
    program = model("scan")
    program = program.replace(weights={"w": jnp.broadcast_to(array(6, 6), (3, 6, 6))})
    plan = resolve(recipe("int4"), program)

    def operands(key):
        fn = lambda w, x: lax.scan(lambda c, s: (c, x @ s), 0, w["w"])[1]  # noqa: E731
        return fake_quant(fn, plan)(program.weights, jnp.eye(6), key=key)

    many = jax.jit(jax.vmap(operands))(jax.random.split(jax.random.key(0), 2000))
    exact = np.asarray(program.weights["w"])
    scale = np.abs(exact).max(1, keepdims=True) / 7
    assert (np.abs(np.asarray(many).mean(0) - exact) < 4 * 0.5 / np.sqrt(2000) * scale).all()
    codes = np.asarray(many) / scale
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert (np.abs(np.asarray(many) - exact) <= scale * 1.0001).all()
    assert not np.array_equal(many[0, 0], many[0, 1])  # equal weights, other steps
    assert not np.array_equal(many[0], many[1])
    np.testing.assert_array_equal(operands(jax.random.key(3)), operands(jax.random.key(3)))
    gradient = jax.grad(lambda w: jnp.sum(fake_quant(program.fn, plan)(w, jnp.eye(6), key=jax.random.key(1))))
    assert np.isfinite(gradient(program.weights)["w"]).all()
    with pytest.raises(UnsupportedError, match="nf4 has no uniform step"):
        fake_quant(program.fn, resolve(recipe("nf4"), program))(program.weights, jnp.eye(6), key=jax.random.key(0))


@pytest.mark.parametrize("weights", ["int4", "uint4", "fp8_e4m3", "nf4", "codebook4"])
def test_composes(weights):
    """Inside remat, custom derivatives, scan, jit, grad, and shard_map over the batch."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def fn(w, x):
        def local(x, w, stack):
            x = jax.checkpoint(lambda x: jax.nn.relu(x @ w))(x)
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

        return jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))(
            x, w["w"], w["stack"]
        )

    def plain(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jax.nn.relu(x @ w["w"]), w["stack"])[0]

    weights_tree = {"w": array(6, 6), "stack": array(2, 6, 6, seed=1)}
    single = trace(plain, weights_tree, ROWS)
    plan = resolve(recipe(weights, "group:3"), single)
    x = array(4, 6, seed=3)
    scales = initial_scales(weights_tree, plan) if weights == "int4" else None

    def loss(fn):
        quantized = fake_quant(fn, plan)
        if scales is None:
            return jax.jit(jax.value_and_grad(lambda w: jnp.sum(quantized(w, x, step=jnp.int32(3)) ** 2)))
        return lambda w: jax.jit(jax.value_and_grad(lambda p: jnp.sum(quantized(p[0], x, scales=p[1]) ** 2)))(
            (w, scales)
        )

    value, gradient = loss(plain)(weights_tree)
    sharded_value, sharded_gradient = loss(fn)(weights_tree)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded_gradient, gradient)


# What a stored weight survives.


@pytest.mark.parametrize("weights", ["int4", "uint8", "fp8_e4m3", "nf4", "codebook16"])
def test_a_checkpoint_gives_it_back(weights, tmp_path):
    tree = {"a": quantize_matrix(array(2, 9, 5), weights), "b": quantize_matrix(array(8, 5), weights, "group:4")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "it", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "it", jax.tree.map(like, tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    np.testing.assert_array_equal(back["b"].dequantize(), tree["b"].dequantize())


def like(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@pytest.mark.parametrize("weights", ["int4", "uint8", "nf4", "codebook16"])
def test_it_is_sharded_over_its_columns(weights):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    stored = quantize_matrix(array(8, 6), weights)
    place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(None, "model") if leaf.ndim == 2 else P()))  # noqa: E731
    sharded = jax.tree.map(place, stored)
    x = array(3, 8, seed=1)
    compiled = jax.jit(lambda q, x: x @ q.dequantize()).lower(sharded, x).compile()
    np.testing.assert_allclose(compiled(sharded, x), x @ stored.dequantize(), rtol=1e-5, atol=1e-6)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("weights", ["int4", "uint4", "fp8_e4m3", "nf4", "codebook16"])
def test_an_artifact_gives_it_back(weights, tmp_path):
    def fn(w, x):
        return jnp.tanh(jnp.take(w["table"], jnp.argmax(x, 1), axis=0)) @ w["dense"]

    program = trace(fn, {"table": array(6, 16), "dense": array(16, 32)}, ROWS)
    small = quantize(program, resolve(recipe(weights, "group:8"), program))
    x = np.asarray(array(3, 6, seed=3))
    expected = np.asarray(jax.jit(small.fn)(small.weights, x))
    lx.compile(small, {"batch": (1, 4)}, name="it").save(tmp_path / "it.lepton")
    got = lx.load(tmp_path / "it.lepton")(x=x)["output"]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
