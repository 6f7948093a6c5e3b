"""Squeeze-excite by a kernel against NumPy in float64, and which jaxprs it is found in."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import lepton_xla as lx
from lepton_xla.kernels import convolution, installation
from lepton_xla.kernels.convolution import Epilogue, Geometry
from lepton_xla.kernels.excitation import Step, excite
from lepton_xla.passes.alternatives import autotuning, exciting
from lepton_xla.passes.alternatives.fusing import fuse
from lepton_xla.passes.alternatives.passing import pass_codes
from lepton_xla.passes.core.timing import Timer
from lepton_xla.quant import QTensor

SILU, RELU = Epilogue("silu"), Epilogue("clamp", 0.0)


def array(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def steps(channels, squeezed, columns, *, codes=False, biased=True):
    """The operands of both products."""
    given_steps = []
    for rows, out in ((channels, squeezed), (squeezed, columns)):
        weight, bias = array(rows, out), array(out, seed=2) if biased else None
        if codes:
            scale = np.abs(weight).max(0, keepdims=True) / 127
            given_steps.append(Step(np.rint(weight / scale).astype(np.int8), bias, scale, np.full(1, 0.01, np.float32)))
        else:
            given_steps.append(Step(weight, bias))
    return given_steps


def reference(x, narrow, wide, epilogue):
    """The factors, and how far they may be off, where a code is so near the middle of two that it may be either."""

    def product(x, apart, step):
        weight = np.asarray(step.weight, np.float64)
        if step.static is not None:
            static = np.float64(step.static[0])
            near = apart / static + 5e-4  # of a code: floats are off by less
            least, most = (np.clip(np.rint(x / static + side), -127, 127) for side in (-near, near))
            x, apart = (most + least) / 2 * static, (most - least) / 2 * static
            weight = weight * np.asarray(step.scale, np.float64)
        bias = 0 if step.bias is None else np.asarray(step.bias, np.float64)
        return x @ weight + bias, apart @ np.abs(weight)

    inner, apart = product(x.astype(np.float64).mean((1, 2)), np.zeros(x[:, 0, 0].shape), narrow)
    inner = np.maximum(inner, 0) if epilogue.activation == "clamp" else inner / (1 + np.exp(-inner))
    outer, apart = product(inner, 1.1 * apart, wide)  # a SiLU is nowhere steeper
    return (1 / (1 + np.exp(-outer)))[:, None, None], (apart / 4)[:, None, None]


def assert_near(got, expected, atol):
    """Results of codes are where `reference` has them, but for the codes in the middle."""
    middle, apart = expected
    assert got.shape == middle.shape
    assert (np.abs(got - middle) <= apart + atol).all()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 70), st.integers(1, 90)),
    epilogue=st.sampled_from([SILU, RELU]),
    codes=st.booleans(),
    biased=st.booleans(),
)
@example(size=(1, 3, 2), sizes=(90, 34, 2), epilogue=SILU, codes=False, biased=True)
def test_every_shape(variants, size, sizes, epilogue, codes, biased):
    x = array(*size, sizes[0])
    operands = steps(*sizes, codes=codes, biased=biased)
    expected = reference(x, *operands, epilogue)
    for _ in variants():
        got = excite(jnp.asarray(x), *operands, epilogue)
        assert_near(got, expected, 2e-6 if codes else 2e-6 * max(sizes))


def test_large_images_are_summed_in_one_order(variants):
    """An image that is spread over threads has the bits of one alone; NaN stays in its example."""
    x, operands = array(3, 60, 61, 50), steps(50, 4, 50)
    x[1, 3, 4, 5] = np.nan
    for _ in variants():
        several = np.asarray(excite(jnp.asarray(x), *operands, SILU))
        for at in (0, 2):
            np.testing.assert_array_equal(several[at], excite(jnp.asarray(x[at : at + 1]), *operands, SILU)[0])
        assert_near(several[::2], reference(x[::2], *operands, SILU), 2e-5)
        assert np.isnan(several[1]).all()


def test_transformations_and_the_fallback(kernels, monkeypatch):
    x = array(2, 3, 5, 4, 20)
    for codes in (False, True):
        operands = [Step(*map(jnp.asarray, step[: 4 if codes else 2])) for step in steps(20, 5, 20, codes=codes)]
        expected = [np.stack(parts) for parts in zip(*(reference(part, *operands, SILU) for part in x), strict=True)]

        def each(x, operands=operands):
            return jax.vmap(functools.partial(excite, narrow=operands[0], wide=operands[1], epilogue=SILU))(x)

        assert f"{installation.PREFIX}excitation" in jax.jit(each).lower(x).as_text()
        assert_near(jax.jit(each)(x), expected, 1e-5)
        with monkeypatch.context() as patched:
            patched.setenv(installation.VARIABLE, "off")
            off = jax.jit(lambda x, each=each: each(x))
            assert "custom_call" not in off.lower(x).as_text()
            np.testing.assert_allclose(off(x), jax.jit(each)(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3), (1, 0, 2, 3), (1, 2, 2, 0)])
def test_nothing(variants, shape):
    operands = steps(shape[3], 2, 3)
    for _ in variants():
        got = np.asarray(excite(jnp.zeros(shape), *operands, SILU))
        assert got.shape == (shape[0], 1, 1, 3)
        assert np.isnan(got).all() == (shape[1] == 0 or not got.size)


@pytest.mark.parametrize("wrong", [{1: (7, 2)}, {4: (3,)}, {5: (3, 6)}, {8: (2,)}, {1: (6,)}])
def test_operands_that_do_not_fit_are_refused(kernels, wrong):
    call = jax.ffi.ffi_call(f"{installation.PREFIX}excitation", jax.ShapeDtypeStruct((2, 1, 1, 6), jnp.float32))
    shapes = [(2, 3, 3, 6), (6, 2), (1, 0), (0,), (2,), (2, 6), (1, 0), (0,), (6,)]
    operands = [jnp.zeros(wrong.get(at, shape), "f4") for at, shape in enumerate(shapes)]
    run = jax.jit(lambda *given: call(*given, **SILU.attributes()))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(run(*operands))


def conv(x, weight):
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def wide(bias):
    return jnp.reshape(bias, (1, 1, 1, -1))


def by_hand(x, w, means=lambda x: x.mean((1, 2), keepdims=True), act=nn.silu):
    inner = act(conv(means(x), w["narrow"]) + wide(w["a"]))
    return nn.sigmoid(conv(inner, w["wide"]) + wide(w["b"])) * x


def flax(x, w):
    inner = nn.silu(
        nn.Conv(3, (1, 1)).apply({"params": {"kernel": w["narrow"], "bias": w["a"]}}, x.mean((1, 2), keepdims=True))
    )
    return x * nn.sigmoid(nn.Conv(8, (1, 1)).apply({"params": {"kernel": w["wide"], "bias": w["b"]}}, inner))


FOUND = {
    "by hand": by_hand,
    "flax": flax,
    "relu": lambda x, w: by_hand(x, w, act=nn.relu),
    "sum times a number": lambda x, w: by_hand(x, w, lambda x: jnp.sum(x, (1, 2))[:, None, None] * (1 / 20)),
    "without biases": lambda x, w: nn.sigmoid(
        conv(nn.relu(conv(x.mean((1, 2), keepdims=True), w["narrow"])), w["wide"])
    ),
}
OTHERS = {
    "a sum": lambda x, w: by_hand(x, w, lambda x: jnp.sum(x, (1, 2), keepdims=True)),
    "the largest": lambda x, w: by_hand(x, w, lambda x: jnp.max(x, (1, 2), keepdims=True)),
    "means of rows": lambda x, w: by_hand(x, w, lambda x: x.mean((1,), keepdims=True)),
    "means that are read": lambda x, w: (lambda means: by_hand(x, w, lambda _: means) + means)(
        x.mean((1, 2), keepdims=True)
    ),
    "another activation": lambda x, w: by_hand(x, w, act=jnp.tanh),
    "no logistic function": lambda x, w: conv(nn.silu(conv(x.mean((1, 2), keepdims=True), w["narrow"])), w["wide"]),
}


def operands():
    weights = {"narrow": array(1, 1, 8, 3), "a": array(3), "wide": array(1, 1, 3, 8), "b": array(8)}
    return jnp.asarray(array(2, 5, 4, 8)), {name: jnp.asarray(value) for name, value in weights.items()}


def names(fn, *given_operands):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*given_operands).eqns]


@pytest.mark.parametrize("fn", FOUND.values(), ids=list(FOUND))
def test_spellings(fn):
    found = exciting.excite(fn, lambda _pattern: True)
    primitives = names(found, *operands())
    assert primitives.count("excitation") == 1
    assert not {"conv_general_dilated", "logistic", "reduce_sum"} & set(primitives)
    np.testing.assert_allclose(found(*operands()), fn(*operands()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fn", OTHERS.values(), ids=list(OTHERS))
def test_others_are_left(fn):
    assert "excitation" not in names(exciting.excite(fn, lambda _pattern: True), *operands())


def test_of_codes(kernels):
    """Between convolutions of codes, as EfficientNet has it: the numbers of the two convolutions."""
    static = jnp.full(1, 0.02, jnp.float32)
    x, point = jnp.asarray(array(2, 5, 4, 8)), Geometry((1, 1))
    weights = [QTensor(step.weight, step.scale, "int8", step.weight.shape[0]) for step in steps(8, 3, 8, codes=True)]

    def fn(x):
        means = x.mean((1, 2), keepdims=True)
        inner = nn.silu(convolution.convolve_codes(means, weights[0], point, static) + wide(jnp.ones(3)))
        return x * nn.sigmoid(convolution.convolve_codes(inner, weights[1], point, static))

    chained = pass_codes(fuse(fn))
    found = exciting.excite(chained, lambda pattern: pattern.codes)
    assert names(chained, x).count("integer_convolution") == 2
    primitives = names(found, x)
    assert primitives.count("excitation") == 1
    assert "integer_convolution" not in primitives
    np.testing.assert_allclose(found(x), chained(x), rtol=1e-5)


def test_it_is_chosen_by_measurement(kernels):
    """A report names it, and the program has it if it is faster."""
    x, weights = operands()
    program = lx.trace(lambda w, x: by_hand(x, w), weights, {"x": lx.TensorSpec((2, 5, 4, 8), "float32")})
    timer = Timer()
    tuned = autotuning.autotune(program, sizes=[{}], timer=timer)
    (report,) = [entry for entry in tuned.history[-1].sites if "excitation" in entry.site]
    assert (report.action == "a kernel") == ("excitation" in names(tuned.fn, tuned.weights, x))
    np.testing.assert_allclose(tuned.fn(tuned.weights, x), by_hand(x, weights), rtol=1e-5, atol=1e-5)


def test_a_filter_a_channel_is_no_product(kernels):
    """Of one position, of codes."""
    static, point = jnp.full(1, 0.02, jnp.float32), Geometry((1, 1))
    filters = [QTensor(step.weight, step.scale, "int8", 1) for step in steps(1, 8, 8, codes=True)[:1] * 2]

    def fn(x):
        inner = nn.silu(convolution.convolve_codes(x.mean((1, 2), keepdims=True), filters[0], point, static))
        return nn.sigmoid(convolution.convolve_codes(inner, filters[1], point, static))

    x = jnp.asarray(array(2, 5, 4, 8))
    found = exciting.excite(fuse(fn), lambda _pattern: True)
    np.testing.assert_allclose(jax.jit(found)(x), jax.jit(fn)(x), rtol=1e-5)


def test_what_is_read_more_than_once(autotuned):
    """Of one example, whose results look like biases and weights."""

    def fn(x, narrow, out):
        def means(factor):
            return (factor * x).mean((1, 2), keepdims=True)

        def ends(inner):
            return nn.sigmoid(conv(nn.silu(inner), out))

        first, second, single = conv(means(1), narrow), conv(means(2), narrow), x[..., :1].mean((1, 2), keepdims=True)
        return {
            "as it is": ends(conv(means(3), narrow)),
            "added to itself": ends(first + first),
            "a result": second,
            "a result, gone on with": ends(second),
            "biased by another": ends(conv(means(4), narrow) + conv(means(5), 2 * narrow)),
            "squared means": ends(conv((m := means(6)) * m, narrow)),
            "its own weight": nn.sigmoid(conv(nn.silu(conv(single, single)), single)),
            "spread again": nn.sigmoid(conv(nn.silu(conv(means(7) + jnp.zeros_like(x), narrow)), out)),
        }

    x, w = operands()
    names = autotuned(fn, x[:1], w["narrow"], w["wide"])
    assert "excitation" in names
