"""Scales that a search chooses, groups that fit, and scales of anything at all, against NumPy in float64."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.quant import FORMATS, absmax_scale, encode, magnitude, make_grid, observers, quantize
from lepton_xla.quant.grid import decode, nearest_group, settle

TINY = float(np.finfo(np.float32).tiny)
SEARCHED = ["int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4"]


def squared_error(matrix, stored, granularity):
    """Of what shares a scale, in float64."""
    difference = np.asarray(stored.dequantize(), np.float64) - np.asarray(matrix, np.float64)
    blocks = difference.reshape(*matrix.shape[:-2], stored.scale.shape[-2], -1, matrix.shape[-1])
    return np.square(blocks).sum((-3, -2, -1) if granularity == "tensor" else -2)


def round_trip(name, values, scale, zero):
    """What a format makes of values, by its definition, in float64."""
    position = values / scale
    if name.startswith("int"):
        return np.clip(np.rint(position), *{"int8": (-127, 127), "int4": (-8, 7)}[name]) * scale
    if name.startswith("uint"):
        return (np.clip(np.rint(position) + zero, 0, 2 ** int(name[4:]) - 1) - zero) * scale
    if name == "nf4":
        levels = np.asarray(FORMATS["nf4"].levels)
        return levels[np.abs(position[..., None] - levels).argmin(-1)] * scale
    dtype, top = {"fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448), "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344)}[name]
    return np.clip(position, -top, top).astype(np.float32).astype(dtype).astype(np.float64) * scale


def least_error(name, values):
    """The smallest squared error of one block over a fine grid of scales, and over all zero points."""
    target = FORMATS[name]
    top = np.abs(values).max() / target.largest
    zeros = np.zeros(1)
    if target.kind == "affine":
        top = (max(values.max(), 0) - min(values.min(), 0)) / target.largest
        zeros = np.arange(target.largest + 1)
    signs = (1, -1) if name in ("int4", "nf4") else (1,)
    scales = [top * share * sign for share in np.linspace(0.1, 1.2, 200) for sign in signs]
    errors = [np.square(round_trip(name, values, scale, zeros[:, None]) - values).sum(-1).min() for scale in scales]
    return min(errors)


@pytest.mark.parametrize("name", SEARCHED)
def test_the_error_is_that_of_trying_everything(name):
    rng = np.random.default_rng(0)
    matrix = (rng.standard_t(6, (64, 4)) * np.geomspace(1e-20, 1e20, 4)).astype(np.float32)
    matrix[:, 2] += np.abs(matrix[:, 2]).max() / 2  # more above zero than below
    matrix[::8] = 0
    for granularity, rows in (("channel", 64), ("group:32", 32)):
        stored = quantize(jnp.asarray(matrix), name, granularity, "mse")
        blocks = matrix.astype(np.float64).reshape(-1, rows, 4)
        want = np.asarray([[least_error(name, column) for column in block.T] for block in blocks])
        ratio = squared_error(matrix, stored, granularity) / want
        # At eight bits a block of few values owes much to a lucky scale, and the finer grid has more of them.
        assert np.mean(ratio) < (1.01 if FORMATS[name].bits == 4 else 1.2)
        assert ratio.max() < (1.05 if FORMATS[name].bits == 4 else 1.7)
        np.testing.assert_array_equal(np.asarray(stored.dequantize())[::8], 0)


@pytest.mark.parametrize(("name", "share"), [("int4", 0.5), ("uint4", 0.6), ("nf4", 0.8), ("int8", 0.97)])
def test_one_scale_for_a_whole_matrix_gains_the_most(name, share):
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((256, 64)), jnp.float32)
    errors = [squared_error(matrix, quantize(matrix, name, "tensor", how), "tensor") for how in ("absmax", "mse")]
    assert errors[1] < share * errors[0]


def test_what_a_search_and_the_sixteenth_code_are_worth():
    matrix = np.random.default_rng(0).standard_normal((64, 1000)).astype(np.float32)
    errors = [
        squared_error(matrix, quantize(jnp.asarray(matrix), "int4", "group:64", how), "group:64").sum()
        for how in ("mse", "absmax")
    ]
    exact = matrix.astype(np.float64)
    scales = np.linspace(0.4, 1.2, 200)[:, None, None] * np.abs(exact).max(0) / 7
    best_of_15 = np.square(np.clip(np.rint(exact / scales), -7, 7) * scales - exact).sum(1).min(0).sum()
    assert errors[0] < 0.835 * best_of_15
    assert errors[0] < 0.71 * errors[1]


def test_the_sixteenth_code_of_int4_is_used_on_the_side_that_needs_it():
    steps = np.arange(-8, 8, dtype=np.float32)[:, None] * np.float32(0.25)
    stored = quantize(jnp.asarray(np.concatenate([steps, -steps], axis=1)), "int4", "channel", "mse")
    np.testing.assert_allclose(stored.scale, [[0.25, -0.25]], rtol=1e-6)
    np.testing.assert_array_equal(stored.codes(), np.repeat(np.arange(-8, 8)[:, None], 2, axis=1))
    np.testing.assert_allclose(stored.dequantize(), np.concatenate([steps, -steps], axis=1), rtol=1e-6)
    # Over the whole range, codes stay from -7 to 7.
    assert np.abs(np.asarray(quantize(jnp.asarray(steps), "int4").codes())).max() == 7


@pytest.mark.parametrize(("name", "granularity"), [("int4", "channel"), ("uint4", "group:12")])
def test_a_search_finds_the_same_for_a_stack_in_any_program(name, granularity):
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((3, 24, 5)), jnp.float32)
    search = lambda matrix: quantize(matrix, name, granularity, "mse")  # noqa: E731
    together, mapped = search(stack), jax.jit(jax.vmap(search))(stack)
    for step in range(3):
        alone = search(stack[step])
        for whole in (together, mapped):
            part = jax.tree.map(lambda leaf, step=step: leaf[step], whole)
            jax.tree.map(np.testing.assert_array_equal, part, alone)


def test_learned_levels_need_no_search():
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((24, 5)), jnp.float32)
    plain, searched = (quantize(matrix, "codebook4", "channel", how) for how in ("absmax", "mse"))
    jax.tree.map(np.testing.assert_array_equal, plain, searched)


def test_a_scale_that_is_given_is_not_searched():
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((24, 5)), jnp.float32)
    grid = make_grid(
        matrix,
        FORMATS["uint4"],
        "channel",
        "mse",
        scale=jnp.full((1, 5), 0.3),
        zero_point=jnp.full((1, 5), 4, jnp.uint8),
    )
    np.testing.assert_array_equal(grid.scale, np.float32(0.3))
    np.testing.assert_array_equal(grid.zero_point, 4)


# Any numbers at all.

# Magnitudes over float32's whole range, subnormal ones and the largest too; zeros; and one that dwarfs all others.
LARGEST = float(np.finfo(np.float32).max)
MAGNITUDE = st.one_of(
    st.just(0.0), st.floats(2.0**-149, LARGEST, width=32), st.sampled_from([2.0**-149, 2.0**-126, 1.0, LARGEST])
)
VALUE = st.one_of(MAGNITUDE, MAGNITUDE.map(lambda value: -value))


@st.composite
def matrices(draw):
    rows, columns = draw(st.sampled_from([(6, 4), (12, 1)]))
    if draw(st.booleans()):
        return draw(hnp.arrays(np.float32, (rows, columns), elements=VALUE))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    matrix = rng.standard_normal((rows, columns)) * 10.0 ** draw(st.integers(-44, 37))
    matrix[rng.random(matrix.shape) < draw(st.sampled_from([0, 0.5, 0.99]))] = 0
    if draw(st.booleans()):
        matrix[rng.integers(rows), rng.integers(columns)] = draw(st.sampled_from([LARGEST, -LARGEST, 1e30]))
    return np.clip(matrix, -LARGEST, LARGEST).astype(np.float32)


@pytest.mark.parametrize("name", [*SEARCHED, "codebook16"])
@settings(max_examples=20, deadline=None)
@given(matrices())
def test_scales_of_weights_are_normal(name, matrix):
    exact = matrix.astype(np.float64)
    for granularity in ("channel", "tensor", "group:3") if matrix.shape[1] > 1 else ("group:3",):
        plain = quantize(jnp.asarray(matrix), name, granularity)
        searched = plain if FORMATS[name].learned else quantize(jnp.asarray(matrix), name, granularity, "mse")
        for stored in (plain, searched):
            size = np.abs(np.asarray(stored.scale, np.float64))
            assert np.isfinite(size).all()
            assert (size >= TINY).all()
            back = np.asarray(stored.dequantize(), np.float64)
            assert np.isfinite(back).all()
            np.testing.assert_array_equal(back[exact == 0], 0)
        errors = [squared_error(matrix, stored, granularity) for stored in (searched, plain)]
        # What XLA makes of subnormal numbers is its own affair.
        no_worse = errors[0] <= errors[1] * (1 + 1e-4) + exact.size * TINY**2
        assert no_worse.all() or np.abs(exact).max() > LARGEST / 2  # more than half of it, no grid covers


@pytest.mark.parametrize("name", ["int8", "int4", "uint8", "uint4"])
@pytest.mark.parametrize("how", ["absmax", "mse"])
def test_the_largest_numbers_there_are_do_not_become_infinite(name, how):
    normal = np.random.default_rng(0).standard_normal((6, 4))
    alike = np.full((6, 4), LARGEST)
    stack = np.stack([alike, np.sign(normal) * alike, normal / np.abs(normal).max() * LARGEST]).astype(np.float32)
    for granularity in ("channel", "group:3"):
        stored = jax.jit(lambda stack, granularity=granularity: quantize(stack, name, granularity, how))(stack)
        back = np.asarray(stored.dequantize())
        assert np.isfinite(back).all()
        assert (np.sign(back) * np.sign(stack) >= 0).all()


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
@settings(max_examples=60, deadline=None)
@given(matrices())
def test_scales_of_activations_are_normal(name, matrix):
    target, exact = FORMATS[name], matrix.astype(np.float64)
    rows = absmax_scale(magnitude(jnp.asarray(matrix), (1,)), target)
    largest = float(np.abs(exact).max())
    static = absmax_scale(jnp.float32(largest), target)
    for scale in (rows, static, settle(rows, "group:2"), settle(-rows, "tensor")):
        size = np.abs(np.asarray(scale, np.float64))
        assert np.isfinite(size).all()
        assert (size >= TINY).all()
    back = np.asarray(decode(encode(jnp.asarray(matrix), rows, target), rows, target), np.float64)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(back[exact == 0], 0)


@pytest.mark.parametrize("granularity", ["channel", "group:2"])
def test_a_scale_is_stored_as_a_normal_number_of_its_sign(granularity):
    given = jnp.asarray([0.0, 1e-45, -1e-45, 2e-38, -0.5, 3.4e38, -3.4e38])
    stored = np.asarray(jax.jit(settle, static_argnums=1)(given, granularity), np.float64)
    largest = 3.4e38 if granularity == "channel" else float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_allclose(stored, [TINY, TINY, stored[2], 2e-38, -0.5, largest, -largest], rtol=2.0**-8)
    assert abs(stored[2]) == TINY  # whether a subnormal number has a sign is XLA's own affair


@pytest.mark.parametrize("method", ["absmax", "percentile:99", "mse", "entropy"])
@settings(max_examples=40, deadline=None)
@given(matrices())
def test_static_ranges_give_normal_scales(method, matrix):
    bits = observers.largest_bits(jnp.asarray(matrix))
    level = observers.level_of(bits)
    absmax = float(np.asarray(bits).view(np.float32))
    seen = observers.Histogram.of_counts(np.asarray(observers.count(jnp.asarray(matrix), level)), int(level), absmax)
    found = observers.estimate_range(method, seen, FORMATS["int8"])
    assert 0 <= found <= absmax
    scale = float(absmax_scale(jnp.float32(found), FORMATS["int8"]))
    assert TINY <= scale < np.inf


# Groups that fit.


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300))
def test_the_nearest_group_divides_and_costs_no_more_than_asked_for(rows, size):
    group = nearest_group(rows, size)
    assert rows % group == 0
    inside = [part for part in range(1, size + 1) if rows % part == 0 and part / size >= 0.625]
    above = [part for part in range(size + 1, rows + 1) if rows % part == 0]
    assert group == (max(inside) if inside else min(above) if above else rows)


@pytest.mark.parametrize("rows", [768, 784, 800, 500, 400, 300, 120, 84, 134, 1018])
def test_scales_of_fitting_groups_stay_small_beside_int4_codes(rows):
    matrix = jnp.ones((rows, 16))
    stored = quantize(matrix, "int4", f"group:{nearest_group(rows, 64)}")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) <= 0.14 * matrix.nbytes
