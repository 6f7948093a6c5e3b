"""Convolutions by kernels, against NumPy in float64 and, of codes, in int64."""

import dataclasses
import hashlib
import itertools
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import ON_ONE_CORE, here

from lepton_xla.kernels import convolution, installation
from lepton_xla.kernels.convolution import Epilogue, Geometry
from lepton_xla.quant import QTensor

NONE = np.zeros(0, np.float32)
PLAIN = Epilogue()


def array(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(terms, columns, *, per_channel=True, seed=0):
    """A weight [K, N] of random codes, row-major."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (terms, columns)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (1, columns if per_channel else 1)).astype(np.float32)
    return QTensor(jnp.asarray(codes), jnp.asarray(scale), "int8", terms)


def summed(x, weight, geometry):
    """The sums of a convolution, position by position, in the dtype of the operands."""
    depthwise = weight.shape[2] == 1 and x.shape[3] != 1
    padded = np.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    sizes = [geometry.size(size, axis) for axis, size in enumerate(x.shape[1:3])]
    out = np.zeros((len(x), *sizes, weight.shape[3]), x.dtype)
    for position in itertools.product(*map(range, geometry.window)):
        cut = [
            slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride)
            for at, dilation, size, stride in zip(position, geometry.dilation, sizes, geometry.strides, strict=True)
        ]
        part = padded[:, cut[0], cut[1]]
        out += part * weight[position][0] if depthwise else part @ weight[position]
    return out


def finished(out, bias, residual, epilogue):
    out = out + bias if bias.size else out
    out = out + residual if residual.size and epilogue.add_first else out
    if epilogue.activation == "clamp":
        out = np.clip(out, epilogue.low, epilogue.high)
    elif epilogue.activation == "silu":
        with np.errstate(over="ignore"):
            out = out / (1 + np.exp(-out))
    return out + residual if residual.size and not epilogue.add_first else out


def rounded(x, static=None):
    """Codes of images and their scales, as the one rounding rule has them."""
    if static is None:
        scale = np.abs(x).max(axis=(1, 2, 3), keepdims=True, initial=0) * np.float32(1 / 127)
        scale = np.where(scale == 0, np.float32(1), np.maximum(scale, np.finfo(np.float32).tiny))
    else:
        scale = np.full((len(x), 1, 1, 1), static, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.clip(np.rint(np.nan_to_num(x / scale, nan=0.0)), -127, 127).astype(np.int64), scale


def of_codes(x, weight, geometry, static=None):
    """Rounded to float32 where the kernel does, and nowhere else."""
    codes, scale = rounded(x, static)
    window = np.asarray(weight.values, np.int64).reshape(*geometry.window, -1, weight.values.shape[1])
    with np.errstate(invalid="ignore", over="ignore"):
        return summed(codes, window, geometry).astype(np.float32) * (scale * np.asarray(weight.scale))


def by_kernel(name, operands, bias, residual, geometry, epilogue, gate=NONE):
    """One call of the primitive with an epilogue and a gate."""
    given_operands = [jnp.asarray(operand) for operand in (*operands, gate, NONE, NONE)]
    return np.asarray(
        convolution.followed(name, given_operands, jnp.asarray(bias), jnp.asarray(residual), geometry, epilogue)
    )


GEOMETRIES = st.builds(
    Geometry,
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
)
EPILOGUES = st.sampled_from(
    [
        PLAIN,
        Epilogue("clamp", 0.0),
        Epilogue("clamp", 0.0, 6.0, False),
        Epilogue("silu"),
        Epilogue("silu", add_first=False),
    ]
)
random_cases = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@random_cases
@given(
    size=st.tuples(st.integers(1, 3), st.integers(7, 12), st.integers(7, 12)),
    channels=st.integers(1, 40),
    columns=st.integers(1, 70),
    depthwise=st.booleans(),
    geometry=GEOMETRIES,
    epilogue=EPILOGUES,
    extra=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_every_shape_in_float(variants, size, channels, columns, depthwise, geometry, epilogue, extra):
    x, columns, gated = array(*size, channels), channels if depthwise else columns, extra[2] and not depthwise
    geometry = Geometry((1, 1)) if gated else geometry
    gate = array(size[0], 1, 1, channels, seed=5) if gated else NONE
    weight = array(*geometry.window, 1 if depthwise else channels, columns, seed=2)
    wide = (x * gate if gated else x).astype(np.float64)
    exact = summed(wide, weight.astype(np.float64), geometry)
    bias = array(columns, seed=3) if extra[0] else NONE
    residual = array(*exact.shape, seed=4) if extra[1] else NONE
    expected = finished(exact, bias, residual, epilogue)
    for _ in variants():
        got = by_kernel("convolution", (x, weight), bias, residual, geometry, epilogue, gate)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * math.sqrt(weight.size / columns))


@random_cases
@given(
    size=st.tuples(st.integers(1, 3), st.integers(7, 12), st.integers(7, 12)),
    channels=st.integers(1, 40),
    columns=st.integers(1, 70),
    depthwise=st.booleans(),
    geometry=GEOMETRIES,
    epilogue=EPILOGUES,
    extra=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 0.02])),
    between=st.tuples(st.sampled_from(["", "codes", "gate"]), st.sampled_from([None, 0.5])),
)
def test_every_shape_of_codes(variants, size, channels, columns, depthwise, geometry, epilogue, extra, between):
    """Floats, with a gate or not, or codes go in, floats or codes come out."""
    x, columns = array(*size, channels), channels if depthwise else columns
    x[0] = 0
    weight = stored(math.prod(geometry.window) * (1 if depthwise else channels), columns, per_channel=extra[2])
    gate = array(size[0], 1, 1, channels, seed=5) if between[0] == "gate" and extra[3] and not depthwise else NONE
    exact = of_codes(x * gate if gate.size else x, weight, geometry, extra[3])
    bias = array(columns, seed=3) if extra[0] else NONE
    residual = array(*exact.shape, seed=4) if extra[1] else NONE
    static, result = (NONE if scale is None else np.full(1, scale, np.float32) for scale in (extra[3], between[1]))
    image = (rounded(x, extra[3])[0] + 128).astype(np.uint8) if between[0] == "codes" and extra[3] else x
    operands = (image, weight.values, weight.scale, static, result)
    blurred = epilogue.activation == "silu" or bias.size
    expected = finished(exact.astype(np.float64) if blurred else exact, bias, residual, epilogue)
    for _ in variants():
        got = by_kernel("integer_convolution", operands, bias, residual, geometry, epilogue, gate)
        if result.size:
            apart = np.abs(got.astype(int) - 128 - rounded(expected.astype(np.float32), between[1])[0])
            assert apart.max(initial=0) <= (1 if blurred else 0)
            assert apart.sum() <= 1 + apart.size // 500
        elif blurred:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(exact).max(initial=1))
        else:
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("scale", [0.037, 1.0, 6 / 127, 3e-38, 1e-20, 1e30, 1e36])
def test_results_are_rounded_as_a_division_has_them(variants, scale):
    """Codes of what is at and near the middle between two, and of what no code is near."""
    scale = np.float32(scale)
    middles = (np.arange(-130, 130, dtype=np.float32) + np.float32(0.5)) * scale
    near = [middles * np.float32(1 + step * 2.0**-24) for step in range(-4, 5)]
    random = np.random.default_rng(0).uniform(-130, 130, 10_000).astype(np.float32) * scale
    odd = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 0, -0.0], np.float32)
    given_values = np.concatenate([*near, random, odd])
    values = np.resize(given_values, (1, -(-given_values.size // 19), 1, 19))
    image, weight = np.zeros((*values.shape[:3], 2), np.uint8), stored(2, 19)
    operands = (image + 128, weight.values, weight.scale, np.ones(1, np.float32), np.full(1, scale))
    for _ in variants():
        got = by_kernel("integer_convolution", operands, NONE, values, Geometry((1, 1)), PLAIN)
        np.testing.assert_array_equal(got.astype(int) - 128, rounded(values, scale)[0])
        # As biases of sums that are zero: the nearest code, or either where the middle between two is near.
        for filters in (False, True):
            bias = np.resize(given_values[np.isfinite(given_values)], 12_810)
            zeros = np.full((1, 3, 5, 12_810 if filters else 2), 128, np.uint8)
            wide = stored(1 if filters else 2, 12_810)
            given_operands = (zeros, wide.values, wide.scale, np.ones(1, np.float32), np.full(1, scale))
            got = by_kernel("integer_convolution", given_operands, bias, NONE, Geometry((1, 1)), PLAIN)
            exact = np.clip(bias.astype(np.float64) / scale, -127, 127)
            assert np.abs(got.astype(int) - 128 - exact).max() < 0.5 + 2e-5


@pytest.mark.parametrize(("size", "channels", "columns"), [((2, 40, 40), 48, 64), ((1, 7, 7), 500, 700)])
def test_convolutions_that_are_spread_over_threads(variants, size, channels, columns):
    """Cut by pixels, and by columns; padded, depthwise, and of codes."""
    x, geometry = array(*size, channels), Geometry((3, 3), padding=((1, 1), (1, 1)))
    weight, each = array(3, 3, channels, columns, seed=2), array(3, 3, 1, channels, seed=3)
    codes = stored(9 * channels, columns)
    wide = [part.astype(np.float64) for part in (x, weight, each)]
    for _ in variants():
        got = convolution.convolve(jnp.asarray(x), jnp.asarray(weight), geometry)
        np.testing.assert_allclose(got, summed(wide[0], wide[1], geometry), rtol=1e-4, atol=2e-3)
        got = convolution.convolve(jnp.asarray(x), jnp.asarray(each), geometry)
        np.testing.assert_allclose(got, summed(wide[0], wide[2], geometry), rtol=1e-5, atol=1e-5)
        got = convolution.convolve_codes(jnp.asarray(x), codes, geometry)
        np.testing.assert_array_equal(got, of_codes(x, codes, geometry))
        for window in ((3, 3), (9, 8)):  # and one of many positions
            large, filters = dataclasses.replace(geometry, window=window), stored(math.prod(window), channels)
            got = convolution.convolve_codes(jnp.asarray(x), filters, large)
            np.testing.assert_array_equal(got, of_codes(x, filters, large))


@pytest.mark.parametrize(("window", "stride", "channels"), [((5, 5), 1, 100), ((7, 3), 2, 64), ((2, 5), 2, 5)])
def test_filters_of_codes_that_share_columns(variants, window, stride, channels):
    """In blocks of 64 channels on AVX-512, of which the last one lacks some."""
    x, geometry = array(2, 7, 9, channels), Geometry(window, (stride, stride), padding=((2, 2), (1, 2)))
    filters = stored(math.prod(window), channels)
    for _ in variants():
        got = convolution.convolve_codes(jnp.asarray(x), filters, geometry)
        np.testing.assert_array_equal(got, of_codes(x, filters, geometry))


def test_nan_and_infinities(variants):
    """They stay where windows meet them; a dynamic scale makes the example NaN, a static one saturates."""
    x, geometry = array(4, 5, 6, 20), Geometry((1, 1))
    x[1, 2, 3, 4], x[2, 0, 0, 0], x[3, 4, 5, 19] = np.nan, np.inf, -np.inf
    weight, codes = array(1, 1, 20, 33, seed=2), stored(20, 33)
    with np.errstate(invalid="ignore"):
        expected = np.clip(summed(x.astype(np.float64), weight.astype(np.float64), geometry), 0, 6)
    for _ in variants():
        got = by_kernel("convolution", (x, weight), NONE, NONE, geometry, Epilogue("clamp", 0.0, 6.0))
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert np.isnan(got[1, 2, 3]).all()
        dynamic = np.asarray(convolution.convolve_codes(jnp.asarray(x), codes, geometry))
        assert np.isnan(dynamic[1:]).all()
        np.testing.assert_array_equal(dynamic[:1], of_codes(x[:1], codes, geometry))
        static = convolution.convolve_codes(jnp.asarray(x), codes, geometry, jnp.float32(0.05))
        np.testing.assert_array_equal(static, of_codes(x, codes, geometry, 0.05))


def test_silu_at_the_ends_of_floats(variants):
    x = np.array(
        [0, -0.0, 1e-30, 20, 88, 100, 3e38, -1, -20, -80, -87, -100, -3e38, np.inf, -np.inf, np.nan], np.float32
    )
    image, one = x.reshape(1, 4, 4, 1), np.ones((1, 1, 1, 1), np.float32)
    expected = np.asarray(jax.jit(lambda x: x * jax.lax.logistic(x))(x))
    for _ in variants():
        got = by_kernel("convolution", (image, one), NONE, NONE, Geometry((1, 1)), Epilogue("silu"))
        np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-6, atol=1e-35)


def test_sums_near_the_ends_of_int32(variants):
    x = np.stack([np.full((1, 1, 70_000), value, np.float32) for value in (1e-44, 1.0, -1.0, 3e38)])
    weight = QTensor(jnp.full((70_000, 3), 127, jnp.int8), jnp.ones((1, 1), jnp.float32), "int8", 70_000)
    for _ in variants():
        got = convolution.convolve_codes(jnp.asarray(x), weight, Geometry((1, 1)))
        np.testing.assert_array_equal(got, of_codes(x, weight, Geometry((1, 1))))


@pytest.mark.parametrize("shape", [(0, 5, 5, 3), (2, 0, 5, 3)])
def test_no_examples_and_no_pixels(variants, shape):
    geometry = Geometry((1, 1))
    for _ in variants():
        assert convolution.convolve(jnp.zeros(shape), jnp.zeros((1, 1, 3, 4)), geometry).shape == (*shape[:3], 4)
        assert convolution.convolve_codes(jnp.zeros(shape), stored(3, 4), geometry).shape == (*shape[:3], 4)


def test_images_without_width_are_all_padding(variants):
    geometry = Geometry((3, 3), padding=((1, 1), (2, 2)))
    for _ in variants():
        found = convolution.convolve_codes(jnp.zeros((1, 4, 0, 8)), stored(9, 8), geometry)
        np.testing.assert_array_equal(found, np.zeros((1, 4, 2, 8), np.float32))


def test_no_channels(kernels):
    x, geometry = jnp.zeros((2, 5, 5, 0)), Geometry((3, 3))
    codes = QTensor(jnp.zeros((0, 4), jnp.int8), jnp.ones((1, 4)), "int8", 0)
    for found in (
        convolution.convolve(x, jnp.zeros((3, 3, 0, 4)), geometry),
        convolution.convolve_codes(x, codes, geometry),
    ):
        np.testing.assert_array_equal(found, np.zeros((2, 3, 3, 4), np.float32))


def test_transformations_and_the_fallback(kernels, monkeypatch):
    x, geometry = array(3, 2, 9, 8, 6), Geometry((3, 3), (2, 1), padding=((1, 1), (0, 2)))
    weight, each, codes = array(3, 3, 6, 7, seed=2), array(3, 3, 1, 6, seed=3), stored(54, 7)
    cases = {
        lambda part: convolution.convolve(part, jnp.asarray(weight), geometry): (
            lambda part: summed(part.astype(np.float64), weight.astype(np.float64), geometry)
        ),
        lambda part: convolution.convolve(part, jnp.asarray(each), geometry): (
            lambda part: summed(part.astype(np.float64), each.astype(np.float64), geometry)
        ),
        lambda part: convolution.convolve_codes(part, codes, geometry): lambda part: of_codes(part, codes, geometry),
    }
    for compute, reference in cases.items():
        expected = np.stack([reference(part) for part in x])
        for made in (
            jax.vmap(compute)(x),
            jax.lax.scan(lambda _, part, compute=compute: (_, compute(part)), 0, jnp.asarray(x))[1],
        ):
            np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
        assert installation.PREFIX in jax.jit(compute).lower(x[0]).as_text()
        with monkeypatch.context() as patched:
            patched.setenv(installation.VARIABLE, "off")
            plain = jax.jit(lambda x, compute=compute: jax.vmap(compute)(x))
            assert installation.PREFIX not in plain.lower(x).as_text()
            np.testing.assert_allclose(plain(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "epilogue", [PLAIN, Epilogue("clamp", -0.5, 0.5), Epilogue("silu"), Epilogue("clamp", 0.0, add_first=False)]
)
@pytest.mark.parametrize("name", ["convolution", "integer_convolution"])
def test_the_fallback_of_epilogues(kernels, monkeypatch, name, epilogue):
    x, geometry, codes = array(2, 6, 6, 5), Geometry((1, 1)), stored(5, 9)
    operands = (x, array(1, 1, 5, 9)) if name == "convolution" else (x, codes.values, codes.scale, NONE, NONE)
    given_operands = (operands, array(9), array(2, 6, 6, 9, seed=5), geometry, epilogue)
    expected = by_kernel(name, *given_operands)
    monkeypatch.setenv(installation.VARIABLE, "off")
    jax.clear_caches()
    np.testing.assert_allclose(by_kernel(name, *given_operands), expected, rtol=1e-5, atol=1e-5)


def test_the_fallback_between_convolutions(kernels, monkeypatch):
    """The same bytes."""
    x, geometry = array(2, 7, 6, 5), Geometry((3, 3), (2, 1), padding=((1, 1), (0, 2)))
    one, static = stored(5, 5), np.full(1, 0.03, np.float32)
    for weight in (stored(45, 9), stored(9, 5)):

        def chain(weight=weight):
            first = (x, one.values, one.scale, static, static * 99)
            between = by_kernel("integer_convolution", first, NONE, NONE, Geometry((1, 1)), Epilogue("clamp", 0, 300))
            second = (between, weight.values, weight.scale, static * 99, static * 2000)
            return between, by_kernel("integer_convolution", second, NONE, NONE, geometry, PLAIN)

        with monkeypatch.context() as patched:
            expected = chain()
            patched.setenv(installation.VARIABLE, "off")
            jax.clear_caches()
            for got, each in zip(chain(), expected, strict=True):
                assert len(set(each.flat)) > 20
                np.testing.assert_array_equal(got, each)
        jax.clear_caches()


WRONG = {
    "x": {"x": (2, 5, 5, 4)},
    "window": {"weight": (2, 3, 3, 4)},
    "channels": {"weight": (3, 3, 2, 4)},
    "columns": {"weight": (3, 3, 3, 5)},
    "bias": {"bias": (3,)},
    "residual": {"residual": (1, 3, 3, 4)},
    "result": {"y": (2, 4, 3, 4)},
    "examples": {"y": (3, 3, 3, 4)},
    "gate": {"gate": (2, 1, 1, 4)},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_operands_that_do_not_fit_are_refused(kernels, change):
    shapes = {"x": (2, 5, 5, 3), "weight": (3, 3, 3, 4), "gate": (0,), "bias": (0,), "residual": (0,)}
    shapes |= {"y": (2, 3, 3, 4)} | change
    call = jax.ffi.ffi_call(f"{installation.PREFIX}convolution", jax.ShapeDtypeStruct(shapes.pop("y"), jnp.float32))
    operands = [jnp.zeros(shape, jnp.float32) for shape in shapes.values()]
    attributes = {"geometry": Geometry((3, 3)).numbers(), **PLAIN.attributes()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(jax.jit(lambda *given: call(*given, **attributes))(*operands))


@pytest.mark.parametrize("place", range(10))
def test_geometries_that_reach_outside_are_refused(kernels, place):
    numbers = dataclasses.replace(Geometry((3, 3)), padding=((1, 1), (1, 1))).numbers()
    numbers[place] = -1 if place > 5 else 0
    for name, operands in {
        "convolution": ((2, 3, 3, 3), (3, 3, 3, 4), (0,), (0,), (0,)),
        "integer_convolution": ((2, 3, 3, 3), (27, 4), (1, 4), (0,), (0,), (0,), (0,), (0,)),
    }.items():
        call = jax.ffi.ffi_call(f"{installation.PREFIX}{name}", jax.ShapeDtypeStruct((2, 3, 3, 4), jnp.float32))
        kinds = ["i1" if name[0] == "i" and at == 1 else "f4" for at in range(len(operands))]
        given_operands = [jnp.zeros(shape, kind) for shape, kind in zip(operands, kinds, strict=True)]
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"positive|negative"):
            jax.block_until_ready(
                jax.jit(lambda *given, call=call: call(*given, geometry=numbers, **PLAIN.attributes()))(*given_operands)
            )


UNIT = np.float32(1.7)


def in_the_middle(size, channels, columns, *, depthwise=False):
    """Codes and what follows their sums, so that half of the results are in the middle between two codes."""
    rng = np.random.default_rng(6)
    image = rng.integers(126, 131, (*size, channels)).astype(np.uint8)
    weight = rng.integers(-1, 2, (1 if depthwise else channels, columns)).astype(np.int8)
    bias = UNIT * rng.integers(50, 150, columns).astype(np.float32)
    return image, (weight, np.ones((1, 1), np.float32), np.full(1, UNIT), np.full(1, 2 * UNIT)), bias


def codes_in_the_middle(image, others, bias, epilogue):
    return by_kernel("integer_convolution", (image, *others), bias, NONE, Geometry((1, 1)), epilogue)


@pytest.mark.parametrize("epilogue", [PLAIN, Epilogue("silu")], ids=["plain", "silu"])
@pytest.mark.parametrize("kind", ["dense", "depthwise", "dynamic"])
def test_codes_do_not_depend_on_other_examples(variants, kind, epilogue):
    """Nor on where in a batch an image is."""
    image, others, bias = in_the_middle((3, 5, 5), 40, 40 if kind == "depthwise" else 51, depthwise=kind == "depthwise")
    if kind == "dynamic":
        image, others = UNIT * (image.astype(np.float32) - 128), (*others[:2], NONE, others[3])
        image[:, 0, 0, 0] = 127 * UNIT
        image[0, 1, 2, 3] = np.nan
    for _ in variants():
        for count in (2, 3):
            several = codes_in_the_middle(image[:count], others, bias, epilogue)
            alone = codes_in_the_middle(image[count - 1 : count], others, bias, epilogue)
            assert len(set(alone.flat)) > 20
            np.testing.assert_array_equal(several[-1:], alone)


def digest():
    """Of convolutions that are spread over threads, where there are several: some cut by pixels, some by columns."""
    x, geometry = jnp.asarray(array(2, 30, 30, 40)), Geometry((3, 3), padding=((1, 1), (1, 1)))
    found = [
        convolution.convolve(x, jnp.asarray(array(3, 3, 40, 50, seed=2)), geometry),
        convolution.convolve(x, jnp.asarray(array(3, 3, 1, 40, seed=3)), geometry),
        convolution.convolve_codes(x, stored(360, 50), geometry),
        convolution.convolve_codes(x, stored(9, 40), geometry),
    ]
    for operands in (in_the_middle((33, 3, 3), 160, 192), in_the_middle((2, 5, 5), 960, 321)):
        found += [codes_in_the_middle(*operands, epilogue) for epilogue in (PLAIN, Epilogue("silu"))]
    return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in found)).hexdigest()


def test_the_number_of_threads_changes_nothing(kernels):
    limited = [sys.executable, "-c", ON_ONE_CORE.format(here=here(), module="test_convolution")]
    assert subprocess.run(limited, capture_output=True, text=True, check=True).stdout.strip() == digest()


def wakes():
    """How often the threads of XLA's pool have gone to sleep so far."""
    count = 0
    for task in pathlib.Path("/proc/self/task").iterdir():
        fields = dict(line.split(":\t") for line in (task / "status").read_text().splitlines() if ":\t" in line)
        if fields["Name"].startswith("tf_XLAEigen"):
            count += int(fields["voluntary_ctxt_switches"])
    return count


@pytest.mark.parametrize("codes", [False, True], ids=["float", "codes"])
def test_what_is_small_is_computed_behind_what_is_large(variants, codes):
    """While a thread that has helped is awake, less is worth sharing with it."""
    geometry = Geometry((1, 1), (1, 1))
    large, small = array(1, 32, 32, 64), array(1, 8, 8, 32)
    weights = [stored(64, 64), stored(32, 32)] if codes else [jnp.asarray(array(1, 1, c, c)) for c in (64, 32)]
    convolve = convolution.convolve_codes if codes else convolution.convolve

    def fn(weights, large, small):
        first = convolve(large, weights[0], geometry)
        return convolve(small + 0 * first[0, 0, 0, 0], weights[1], geometry)  # not before the large one

    expected = np.asarray(convolve(small, weights[1], geometry))
    for _ in variants():
        compute = jax.jit(fn)
        for _ in range(20):
            np.testing.assert_allclose(compute(weights, large, small), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("codes", [False, True], ids=["float", "codes"])
def test_what_takes_microseconds_wakes_no_thread(kernels, codes):
    geometry = Geometry((3, 3), (1, 1), padding=((1, 1), (1, 1)))
    weight = stored(288, 64) if codes else jnp.asarray(array(3, 3, 32, 64))
    convolve = convolution.convolve_codes if codes else convolution.convolve
    compute = jax.jit(lambda x, weight: convolve(x, weight, geometry))
    x = jnp.asarray(array(1, 8, 8, 32))
    compute(x, weight).block_until_ready()
    before = wakes()
    for _ in range(200):
        compute(x, weight).block_until_ready()
    assert wakes() - before < 40  # of threads that were about to sleep
