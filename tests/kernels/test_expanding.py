"""A convolution of one position and the depthwise one behind it by one kernel, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_convolution import NONE, PLAIN, array, finished, summed

from lepton_xla.kernels import convolution, expanding, installation
from lepton_xla.kernels.convolution import Epilogue, Geometry
from lepton_xla.passes.alternatives import expanding as joining
from lepton_xla.passes.alternatives import fusing

PADDING = st.integers(0, 3)
GEOMETRIES = st.builds(
    Geometry,
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.tuples(PADDING, PADDING), st.tuples(PADDING, PADDING)),
)
EPILOGUES = st.sampled_from([PLAIN, Epilogue("clamp", 0.0), Epilogue("clamp", -0.5, 1.5), Epilogue("silu")])


def operands(size, channels, wide, window, *, biased=True):
    first = array(1, 1, channels, wide, seed=2) / np.sqrt(channels).astype(np.float32)
    biases = (array(wide, seed=3), array(wide, seed=4)) if biased else (NONE, NONE)
    return array(*size, channels), first, biases[0], array(*window, 1, wide, seed=5), biases[1]


def in_float64(x, first, bias, window, second, geometry, before, after):
    x, first, bias, window, second = (np.asarray(each, np.float64) for each in (x, first, bias, window, second))
    wide = finished(np.tensordot(x, first[0, 0], 1), bias, np.zeros(0), before)
    # `summed` takes a weight of one channel for a dense one
    return finished(summed(wide, window, geometry), second, np.zeros(0), after)


def by_kernel(x, first, bias, window, second, geometry, before, after):
    def fn(*given_operands):
        return expanding.PRIMITIVE.bind(*given_operands, geometry=geometry, before=before, after=after)

    return np.asarray(jax.jit(fn)(x, first, bias, window, second))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 13), st.integers(1, 19)),
    channels=st.integers(1, 9),
    wide=st.sampled_from([1, 2, 7, 8, 16, 17, 48, 50, 100, 113]),
    geometry=GEOMETRIES,
    before=EPILOGUES,
    after=EPILOGUES,
    biased=st.booleans(),
)
@example(  # of which no row is read
    size=(1, 1, 3), channels=3, wide=17, geometry=Geometry((1, 1), (3, 1), padding=((1, 1), (0, 0))), before=PLAIN,
    after=PLAIN, biased=True,
)  # fmt: skip
def test_every_shape(variants, size, channels, wide, geometry, before, after, biased):
    sizes = [geometry.size(each, axis) for axis, each in enumerate(size[1:])]
    if min(sizes) < 1:
        return
    given_operands = operands(size, channels, wide, geometry.window, biased=biased)
    expected = in_float64(*given_operands, geometry, before, after)
    for _ in variants():
        found = by_kernel(*given_operands, geometry, before, after)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("side", "channels", "wide", "stride"), [(90, 4, 96, 1), (91, 3, 50, 2), (7, 160, 960, 1)])
def test_what_is_cut_into_bands_and_spread_over_threads(variants, side, channels, wide, stride):
    geometry = Geometry((3, 3), (stride, stride), padding=((1, 1), (1, 1)))
    given_operands = operands((2, side, side), channels, wide, (3, 3))
    expected = in_float64(*given_operands, geometry, Epilogue("clamp", 0.0, 6.0), PLAIN)
    for _ in variants():
        found = by_kernel(*given_operands, geometry, Epilogue("clamp", 0.0, 6.0), PLAIN)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=3e-5)


def test_nan_and_infinities_reach_the_windows_that_read_them(variants):
    geometry = Geometry((3, 3), padding=((1, 1), (1, 1)))
    x, first, bias, window, second = operands((1, 9, 9), 3, 20, (3, 3))
    x[0, 1, 1, 0], x[0, 7, 7, 0] = np.nan, np.inf
    for _ in variants():
        found = by_kernel(x, first, bias, window, second, geometry, PLAIN, Epilogue("clamp", -6.0, 6.0))
        assert np.isnan(found[0, :3, :3]).all()
        assert not np.isnan(found[0, 3:6, :]).any()
        assert (np.abs(found[0, 6:, 6:]) == 6).all()


def test_transformations_and_the_fallback(kernels, monkeypatch):
    geometry = Geometry((3, 3), (2, 2), padding=((0, 1), (0, 1)))
    before, after = Epilogue("silu"), Epilogue("clamp", 0.0, 6.0)
    x, first, bias, window, second = operands((6, 8, 8), 3, 20, (3, 3))

    def fn(x):
        return expanding.expand(x, (first, bias, before), (window, second, after), geometry)

    assert "lepton_kernel_expanding" in jax.jit(fn).lower(x).as_text()
    expected = jax.jit(fn)(x)
    batched = jax.jit(jax.vmap(fn))(x.reshape(3, 2, 8, 8, 3)).reshape(expected.shape)
    np.testing.assert_array_equal(batched, expected)
    _, scanned = jax.lax.scan(lambda carry, part: (carry, fn(part)), 0, x[:, None])
    np.testing.assert_array_equal(scanned[:, 0], expected)
    monkeypatch.setenv(installation.VARIABLE, "off")
    jax.clear_caches()
    assert "lepton_kernel_expanding" not in jax.jit(fn).lower(x).as_text()
    np.testing.assert_allclose(jax.jit(fn)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", range(4))
def test_operands_that_do_not_fit_are_refused(kernels, place):
    x, first, bias, window, second = operands((1, 5, 5), 3, 8, (3, 3))
    wrong = [first[:, :, :2], bias[:5], window[..., :5], second[:3]][place]
    given_operands = [x, first, bias, window, second]
    given_operands[place + 1] = wrong
    target = jax.ffi.ffi_call(f"{installation.PREFIX}expanding", jax.ShapeDtypeStruct((1, 3, 3, 8), jnp.float32))
    first_attributes = {f"expand_{name}": value for name, value in PLAIN.attributes().items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        target(
            *given_operands, geometry=Geometry((3, 3)).numbers(), **first_attributes, **PLAIN.attributes()
        ).block_until_ready()


def test_pairs_are_joined_where_nothing_else_reads_between():
    x, first, bias, window, _ = operands((1, 5, 5), 3, 8, (3, 3))

    def pair(x, *, shown=False, twice=False):
        wide = jax.nn.relu(convolution.convolve(x, first, Geometry((1, 1))) + bias.reshape(1, 1, 1, -1))
        out = convolution.convolve(wide, window, Geometry((3, 3)))
        if twice:
            out = out + convolution.convolve(wide, window * 2, Geometry((3, 3)))
        return (out, wide) if shown else out

    def joined(**how):
        def fn(x):
            return pair(x, **how)

        made = joining.join(fusing.fuse(fn))
        names = [eqn.primitive.name for eqn in jax.make_jaxpr(made)(x).eqns]
        np.testing.assert_allclose(jax.tree.leaves(made(x))[0], jax.tree.leaves(fn(x))[0], rtol=1e-5, atol=1e-5)
        assert joining.joins(jax.make_jaxpr(made)(x)) == ("expanding" in names)
        return names.count("expanding"), names.count("convolution")

    assert joined() == (1, 0)
    assert joined(shown=True) == (0, 2)
    assert joined(twice=True) == (0, 3)
