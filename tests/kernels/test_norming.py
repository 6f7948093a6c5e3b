"""Norms in one pass against NumPy in float64, and which jaxprs they are found in."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lepton_xla as lx
from lepton_xla.kernels import installation, norm
from lepton_xla.passes.alternatives import autotuning, norming
from lepton_xla.passes.core.timing import Timer

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def array(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def reference(x, gain=None, shift=None, epsilon=1e-6, *, centered=True):
    x = x.astype(np.float64)
    x = x - x.mean(axis=-1, keepdims=True) if centered else x
    with np.errstate(invalid="ignore"):
        out = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
        return out * (1 if gain is None else gain) + (0 if shift is None else shift)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 200),
    epsilon=st.sampled_from([1e-12, 1e-5, 0.1]),
    centered=st.booleans(),
    scaled=st.booleans(),
    shifted=st.booleans(),
)
def test_every_shape(variants, rows, width, epsilon, centered, scaled, shifted):
    x = array(rows, width) + np.float32(0.5)
    x[0] = 0
    gain, shift = array(width) if scaled else None, array(width, seed=2) if shifted else None
    expected = reference(x, gain, shift, epsilon, centered=centered)
    for _ in variants():
        got = norm.normalize(jnp.asarray(x), gain, shift, epsilon=epsilon, centered=centered)
        if width > 1:  # the difference of one value from its mean is rounding
            np.testing.assert_allclose(got, expected, **TOLERANCE)
        assert got.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing(variants, shape):
    for _ in variants():
        assert norm.normalize(jnp.zeros(shape, jnp.float32)).shape == shape


def test_far_from_zero_nan_infinities_and_huge_values(variants):
    """A mean that is large beside the differences leaves no negative variance; NaN stays in its row."""
    x = array(6, 80)
    x[0] += 5000
    x[1, 3], x[2, 77], x[3, 0] = np.nan, np.inf, -np.inf
    x[4] *= np.float32(1e15)
    for _ in variants():
        got = np.asarray(norm.normalize(jnp.asarray(x)))
        assert np.isnan(got[1:4]).all()
        np.testing.assert_allclose(got[[4, 5]], reference(x[[4, 5]]), **TOLERANCE)
        np.testing.assert_allclose(got[0], reference(x[:1])[0], atol=2e-3)


def test_transformations_and_the_fallback(kernels, monkeypatch):
    x, gain = array(3, 4, 40), array(40)
    expected = reference(x, gain)
    each = jax.vmap(lambda part: norm.normalize(part, gain))
    assert f"{installation.PREFIX}norm" in jax.jit(each).lower(x).as_text()
    np.testing.assert_allclose(jax.jit(each)(x), expected, **TOLERANCE)
    monkeypatch.setenv(installation.VARIABLE, "off")
    off = jax.jit(lambda x: jax.vmap(lambda part: norm.normalize(part, gain))(x))
    assert "custom_call" not in off.lower(x).as_text()
    np.testing.assert_allclose(off(x), expected, **TOLERANCE)


@pytest.mark.parametrize("wrong", [{0: (2, 7)}, {1: (3,)}, {2: (1,)}])
def test_operands_that_do_not_fit_are_refused(kernels, wrong):
    call = jax.ffi.ffi_call(f"{installation.PREFIX}norm", jax.ShapeDtypeStruct((2, 8), jnp.float32))
    operands = [jnp.zeros(wrong.get(at, shape), "f4") for at, shape in enumerate([(2, 8), (8,), (8,)])]
    run = jax.jit(lambda *given: call(*given, epsilon=np.float32(1), centered=np.bool_(True)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(run(*operands))


def test_threads_change_nothing(variants):
    """A row of many, which are spread over threads where there are several, has the bits of a row alone."""
    x = array(500, 301)
    for _ in variants():
        several = norm.normalize(jnp.asarray(x))
        for at in (0, 251, 499):
            np.testing.assert_array_equal(several[at], norm.normalize(jnp.asarray(x[at : at + 1]))[0])


def mean_of(x):
    return jnp.mean(x, axis=-1, keepdims=True)


def wide(vector, x):
    return jnp.expand_dims(vector, range(x.ndim - 1))


SPELLINGS = {
    "by hand": lambda x, gain, shift: (
        (x - mean_of(x)) * jax.lax.rsqrt(mean_of((x - mean_of(x)) ** 2) + 1e-12) * wide(gain, x) + wide(shift, x)
    ),
    "jnp.var": lambda x, gain, shift: (
        (x - mean_of(x)) / jnp.sqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5) * wide(gain, x) + wide(shift, x)
    ),
    "flax": lambda x, gain, shift: flax.linen.LayerNorm().apply({"params": {"scale": gain, "bias": shift}}, x),
    "root of mean square": lambda x, gain, _shift: wide(gain, x) * (x / jnp.sqrt(mean_of(x * x) + 1e-6)),
    "flax, root of mean square": lambda x, gain, _shift: flax.linen.RMSNorm().apply({"params": {"scale": gain}}, x),
    "no factors": lambda x, _gain, _shift: jax.nn.standardize(x, epsilon=1e-3),
}


@pytest.mark.parametrize("fn", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("shape", [(2, 3, 48), (1, 48)])
def test_spellings_of_norms_are_found(kernels, fn, shape):
    given_operands = array(*shape) * np.float32(0.01), array(48), array(48, seed=2)
    found = norming.normalize(fn, lambda _pattern: True)
    names = str(jax.make_jaxpr(found)(*given_operands))
    assert names.count("= norm[") == 1
    assert "reduce_sum" not in names
    expected = jax.jit(fn)(*given_operands)
    np.testing.assert_allclose(jax.jit(found)(*given_operands), expected, **TOLERANCE)


def test_two_norms_and_what_is_between(kernels):
    def fn(x, gain, shift):
        first = SPELLINGS["by hand"](x, gain, shift)
        return SPELLINGS["by hand"](first + jnp.tanh(first), shift, gain)

    given_operands = array(3, 48), array(48), array(48, seed=2)
    found = norming.normalize(fn, lambda _pattern: True)
    assert str(jax.make_jaxpr(found)(*given_operands)).count("= norm[") == 2
    np.testing.assert_allclose(jax.jit(found)(*given_operands), jax.jit(fn)(*given_operands), **TOLERANCE)


NO_NORM = {
    "the variance is read": lambda x, _gain: (
        (x - mean_of(x)) * (root := jax.lax.rsqrt(mean_of((x - mean_of(x)) ** 2) + 1e-5)) + root
    ),
    "of columns": lambda x, _gain: x * jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + 1e-5),
    "of fewer": lambda x, _gain: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) / 47 + 1e-5),
    "no root": lambda x, _gain: x / (mean_of(x * x) + 1e-5),
    "another gain for each row": lambda x, _gain: x[:, :16] * jax.lax.rsqrt(mean_of(x[:, 16:] ** 2) + 1e-5),
    "softmax": lambda x, _gain: jax.nn.softmax(x),
}


@pytest.mark.parametrize("fn", NO_NORM.values(), ids=NO_NORM.keys())
def test_what_is_no_norm_stays(kernels, fn):
    x, gain = array(7, 48), array(48)
    found = norming.normalize(fn, lambda _pattern: True)
    assert "= norm[" not in str(jax.make_jaxpr(found)(x, gain))
    np.testing.assert_array_equal(jax.jit(found)(x, gain), jax.jit(fn)(x, gain))


@pytest.mark.parametrize(("whole", "chosen"), [(1.0, "a kernel"), (3.0, "XLA's own")])
def test_norms_are_chosen_by_measurement(kernels, monkeypatch, whole, chosen):
    """Alone the kernel takes half the time; it also has to make the whole program faster."""

    def fn(weights, x):
        return SPELLINGS["by hand"](x, weights["gain"], weights["gain"])

    program = lx.trace(fn, {"gain": jnp.ones(48)}, {"x": lx.TensorSpec(("batch", 6, 48), "float32")})
    monkeypatch.setattr(
        autotuning,
        "time_programs",
        lambda functions, inputs, *_: [2.0, 1.0] if len(inputs) == 3 else [2.0, whole],
    )
    tuned = lx.passes.autotune(program, sizes=[{"batch": 1}, {"batch": 3}], timer=Timer())
    (report,) = [site for site in tuned.history[-1].sites if site.site == "norm#0"]
    assert report.action == chosen
    x = array(3, 6, 48)
    for shape in (x.shape, jax.export.symbolic_shape("batch, 6, 48")):
        like = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert ("= norm[" in str(jax.make_jaxpr(tuned.fn)(tuned.weights, like))) is (chosen == "a kernel")
    np.testing.assert_allclose(jax.jit(tuned.fn)(tuned.weights, x), jax.jit(fn)(program.weights, x), **TOLERANCE)


def test_what_is_read_more_than_once(autotuned):
    """Of as many rows as columns, whose sums look like vectors."""

    def fn(x, gain, number):
        def root(x):
            return jax.lax.rsqrt(mean_of(x * x) + 1e-5)

        apart, squares, second, single = x - mean_of(x), jnp.sum(x**2, -1), 2.0 * x, 4 * x[:1]
        norm_of = {at: SPELLINGS["by hand"](at * x, gain, gain) for at in (3, 5)}
        return {
            "as it is": SPELLINGS["root of mean square"](x + 1, gain, gain),
            "differences, a result": apart,
            "differences": apart * root(apart) * wide(gain, x),
            "root, a result": (factor := root(second)),
            "root": second * factor + factor,
            "sums of rows as a gain": x * jax.lax.rsqrt(squares[:, None] / 48 + 1e-5) * squares[None],
            "means of columns as a gain": 3 * x * root(3 * x) * (3 * x).mean(0)[None],
            "means of rows taken from columns": (y := x - x.mean(-1)[None]) * root(y),
            "squared": norm_of[3] * norm_of[3],
            "added to what it is of": norm_of[5] + 5 * x,
            "a gain of the only row": single * root(single) * single[0][None],
            "sums of products": jnp.sum(2.0 * x, -1) + jnp.sum(number * x, -1),
        }

    names = autotuned(fn, array(48, 48), array(48), array(1)[0])
    assert names.count("norm") >= 4
