"""Every format: codes, packing, grids and round trips, against float64 and ml_dtypes."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.errors import RecipeError
from lepton_xla.quant import FORMATS, Grid, QTensor, encode, make_grid, quantize
from lepton_xla.quant.codebook import learn_levels, nearest_level
from lepton_xla.quant.grid import matrix_codes, settle
from lepton_xla.quant.packing import pack, packed_rows, unpack

TINY = float(np.finfo(np.float32).tiny)
# What XLA:CPU does with subnormal results is its own affair: magnitudes are zero, or far from them.
VALUE = st.one_of(
    st.just(0.0), st.floats(2.0**-100, 2.0**120, width=32), st.floats(-(2.0**120), -(2.0**-100), width=32)
)
NAMES = [name for name in FORMATS if name not in ("codebook4", "codebook8", "codebook32", "codebook64", "codebook128")]
GRANULARITIES = ("channel", "tensor", "group:3", "group:2")


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def exact_grid(stored):
    """Scale, zero point and codebook of each element, in float64."""
    rows, groups = stored.rows, stored.scale.shape[-2]
    spread = lambda part: np.repeat(np.asarray(part, np.float64), rows // groups, axis=-2)  # noqa: E731
    zero = spread(stored.zero_point) if stored.zero_point is not None else 0.0
    return spread(stored.scale), zero


def levels_of(name, stored):
    """Every value that a format can hold at a scale of one, ascending, in float64."""
    target = FORMATS[name]
    if target.kind == "int":
        return np.arange(*{8: (-127, 128), 4: (-8, 8)}[target.bits], dtype=np.float64)
    if target.kind == "affine":
        return np.arange(2**target.bits, dtype=np.float64)
    if target.kind == "float":
        every = np.arange(256, dtype=np.uint8).view(target.dtype).astype(np.float64)
        return np.unique(every[np.isfinite(every)])
    if target.levels:
        return np.asarray(target.levels, np.float64)
    return np.asarray(stored.codebook, np.float64).ravel()


def check_round_trip(matrix, name, granularity):
    """Each value became one of the nearest the format can hold; scales are normal; zeros are zero."""
    stored = quantize(jnp.asarray(matrix), name, granularity)
    target, exact = FORMATS[name], np.asarray(matrix, np.float64)
    scales = np.asarray(stored.scale, np.float64)
    assert np.isfinite(scales).all()
    assert (scales >= TINY).all()
    back = np.asarray(stored.dequantize(), np.float64)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(back[exact == 0], 0)
    scale, zero = exact_grid(stored)
    levels = levels_of(name, stored)
    ideal = np.abs((levels - (zero[..., None] if np.ndim(zero) else zero)) * scale[..., None] - exact[..., None]).min(
        -1
    )
    reach = np.abs(exact) + np.abs(scale) * np.abs(levels).max()
    assert (np.abs(back - exact) <= ideal + 1e-5 * reach).all()
    # Nothing is further away than half a step, but what a codebook has no level near.
    if target.kind in ("int", "affine"):
        # A group's scale has bfloat16's precision: the largest code may stand for slightly less than the largest value.
        slack = 1e-4 + (target.largest * 2.0**-8 if granularity.startswith("group") else 0)
        assert (np.abs(back - exact) <= scale * (0.5 + slack)).all()
    if target.kind == "float":
        bits = jnp.finfo(target.dtype)
        relative = np.abs(exact) * 2.0 ** -(bits.nmant + 1)
        slack = 2.0**-8 if granularity.startswith("group") else 1e-5
        step = scale * float(bits.smallest_subnormal) / 2
        assert (np.abs(back - exact) <= np.maximum(relative, step) * 1.001 + slack * np.abs(exact)).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.sampled_from(GRANULARITIES), st.data())
def test_round_trip_of_any_finite_matrix(name, granularity, data):
    # Few shapes, each of which is compiled for each format.
    shape = (6, 4) if granularity.startswith("group") else data.draw(st.sampled_from(((1, 1), (5, 4))))
    matrix = data.draw(hnp.arrays(np.float32, shape, elements=VALUE))
    check_round_trip(matrix, name, granularity)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group:8"])
def test_round_trip_of_normal_weights(name, granularity):
    matrix = np.asarray(array(48, 20)) * np.geomspace(1e-6, 1e6, 20, dtype=np.float32)
    matrix[:, 3] = 0
    matrix[5] = 0
    check_round_trip(matrix, name, granularity)


@pytest.mark.parametrize("name", NAMES)
def test_extremes(name):
    largest, tiny = np.float32(3.4e38), np.float32(TINY)
    matrix = np.stack([np.full(4, value, np.float32) for value in (largest, -largest, tiny, 0.0, 1.0)], axis=1)
    matrix[1, :2] *= np.float32(0.25)
    for granularity in ("channel", "group:2"):
        stored = quantize(jnp.asarray(matrix), name, granularity)
        scales = np.asarray(stored.scale, np.float64)
        assert np.isfinite(scales).all()
        assert (scales >= TINY).all()
        back = np.asarray(stored.dequantize())
        assert np.isfinite(back[:, :2] / np.float32(4)).all()
        np.testing.assert_array_equal(back[:, 3], 0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.sampled_from((1, 2, 5, 9, 16)), st.just(3), st.integers(0, 2**31))
def test_packing_is_exact(name, rows, columns, seed):
    target = FORMATS[name]
    if target.kind == "float":
        return
    low, high = {"int8": (-127, 127), "int4": (-8, 7)}.get(name, (0, 2**target.bits - 1))
    codes = np.random.default_rng(seed).integers(low, high + 1, (2, rows, columns)).astype(target.dtype)
    stored = pack(jnp.asarray(codes), target)
    assert stored.shape == (2, packed_rows(rows, target), columns)
    per_byte = {1: 8, 2: 4, 3: 2, 4: 2}.get(target.bits, 1)
    assert packed_rows(rows, target) == -(-rows // per_byte)
    np.testing.assert_array_equal(unpack(stored, target, rows), codes)


def test_packing_by_hand():
    codes = jnp.asarray([[1], [-2], [7], [-8], [3]], jnp.int8)
    # Rows 0 to 2 are in the low halves, rows 3 and 4 in the high ones.
    assert pack(codes, FORMATS["int4"])[:, 0].tolist() == [0x81, 0x3E, 0x07]
    bits = jnp.asarray([[1], [0], [1], [1], [0], [0], [1], [0], [1]], jnp.uint8)
    # Two bytes: rows 0, 2, 4, 6, 8 are the bits of the first from the lowest up, the others those of the second.
    assert pack(bits, FORMATS["codebook2"])[:, 0].tolist() == [0b11011, 0b00010]


@pytest.mark.parametrize(
    ("name", "granularity", "share"),
    [
        ("int8", "channel", 0.2502), ("int4", "channel", 0.1260), ("int4", "group:64", 0.1329),
        ("nf4", "group:64", 0.1329), ("uint4", "group:64", 0.1368), ("uint8", "channel", 0.2513),
        ("fp8_e4m3", "channel", 0.2510), ("fp8_e5m2", "tensor", 0.2501), ("codebook16", "channel", 0.1261),
        ("codebook256", "channel", 0.2521), ("codebook8", "tensor", 0.1251), ("codebook4", "tensor", 0.0626),
        ("codebook2", "tensor", 0.0313),
    ],
)  # fmt: skip
def test_bytes(name, granularity, share):
    matrix = array(1024, 256)
    stored = quantize(matrix, name, granularity)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) / matrix.nbytes
    assert share - 0.003 <= taken <= share + 0.0008
    if (name, granularity) == ("int4", "group:64"):
        assert taken <= 0.14


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_codes_are_those_of_ml_dtypes(name):
    values = np.concatenate([np.linspace(-500, 500, 4001), np.geomspace(1e-6, 1, 300)]).astype(np.float32)
    target = FORMATS[name]
    got = encode(jnp.asarray(values), jnp.float32(1), target)
    assert got.dtype == target.dtype
    clipped = np.clip(values, -target.largest, target.largest)
    np.testing.assert_array_equal(np.asarray(got, np.float32), clipped.astype(target.dtype).astype(np.float32))


def test_nf4_levels_are_those_of_the_paper():
    """Quantiles of a normal distribution, as its appendix E says: 8 from 0 to 1 and 9 from -1 to 0, zero shared."""
    from scipy.stats import norm

    offset = 0.5 * (1 / 32 + 1 / 30)
    positive = norm.ppf(np.linspace(1 - offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(1 - offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0], negative]))
    np.testing.assert_allclose(FORMATS["nf4"].levels, levels / levels.max(), atol=2e-3)


def test_affine_covers_a_one_sided_range_with_all_its_codes():
    matrix = jnp.abs(array(200, 3)) + 1
    stored = quantize(matrix, "uint8")
    assert (np.asarray(stored.zero_point) == 0).all()
    assert (np.asarray(stored.values).max(0) == 255).all()
    error = np.abs(np.asarray(stored.dequantize()) - np.asarray(matrix)).max(0)
    assert (error <= np.asarray(matrix).max(0) / 255 / 2 * 1.001).all()
    both = quantize(jnp.concatenate([matrix, -matrix / 3]), "uint8")
    np.testing.assert_allclose(both.zero_point[0], 255 / 4, atol=8)


# Codebooks.


def lloyd(values, count, steps=200):
    """The same algorithm in float64, to its end."""
    levels = np.linspace(values.min(), values.max(), count)
    fixed = np.argmin(np.abs(levels)) if (values == 0).any() else None
    for _ in range(steps):
        if fixed is not None:
            levels[fixed] = 0
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        for k in range(count):
            if (nearest == k).any() and k != fixed:
                levels[k] = values[nearest == k].mean()
    return levels


@pytest.mark.parametrize("count", [2, 4, 16, 64])
@pytest.mark.parametrize("pruned", [False, True])
def test_levels_are_those_of_lloyd_in_float64(count, pruned):
    values = np.random.default_rng(0).normal(size=3000)
    if pruned:
        values[np.abs(values) < 0.6] = 0
    values = values.astype(np.float32)
    levels = np.asarray(learn_levels(jnp.asarray(values), count), np.float64)
    error = lambda levels: np.mean(np.abs(values[:, None] - levels).min(1) ** 2)  # noqa: E731
    reference = error(lloyd(values.astype(np.float64), count))
    assert error(levels) <= 1.02 * reference + 1e-9
    assert (np.diff(levels) >= 0).all()
    assert not pruned or 0 in levels


def test_levels_find_clusters_exactly():
    centres = np.asarray([-3.0, -0.5, 0.25, 2.0], np.float32)
    values = jnp.asarray(np.repeat(centres, [5, 1000, 7, 20000]))
    np.testing.assert_allclose(learn_levels(values, 4), centres, atol=1e-6)


def test_levels_of_one_value_and_of_zeros():
    np.testing.assert_array_equal(learn_levels(jnp.zeros(9), 4), np.zeros(4))
    np.testing.assert_allclose(learn_levels(jnp.full(9, 0.3), 4), np.full(4, 0.3), rtol=1e-6)


@pytest.mark.parametrize("count", [2, 8, 32])
def test_nearest_level(count):
    levels = np.sort(np.random.default_rng(1).normal(size=count)).astype(np.float32)
    values = np.random.default_rng(2).normal(size=(40, 7)).astype(np.float32) * 2
    got = np.asarray(nearest_level(jnp.asarray(values), jnp.asarray(levels)))
    np.testing.assert_array_equal(got, np.abs(values[..., None] - levels).argmin(-1))


def test_a_codebook_beats_int4_where_weights_are_clustered():
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(
        rng.choice([-1.0, -0.11, 0.0, 0.13, 0.4], (64, 32)) + rng.normal(size=(64, 32)) * 1e-3, "float32"
    )
    error = {n: float(jnp.abs(quantize(matrix, n).dequantize() - matrix).mean()) for n in ("codebook16", "int4")}
    assert error["codebook16"] < 0.1 * error["int4"]


# Stacks, given grids, errors.


@pytest.mark.parametrize(
    ("name", "granularity"), pairs(NAMES, ("channel", "group:2"), whole=("int8", "uint4", "codebook16"))
)
def test_a_stack_is_its_steps(name, granularity):
    stack = array(3, 6, 5) * jnp.asarray([1.0, 100.0, 0.01]).reshape(3, 1, 1)
    together = quantize(stack, name, granularity)
    assert together.shape == (3, 6, 5)
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(together), together.dequantize())
    for step in (0, 2):
        alone = quantize(stack[step], name, granularity)
        part = jax.tree.map(lambda leaf, step=step: leaf[step], together)
        np.testing.assert_allclose(part.dequantize(), alone.dequantize(), rtol=1e-5)
        assert jax.tree.structure(part) == jax.tree.structure(alone)


@pytest.mark.parametrize("name", ["int8", "int4", "uint8", "fp8_e4m3", "nf4", "codebook16"])
def test_columns_are_those_of_the_whole(name):
    stored = quantize(array(10, 12), name, "group:5")
    index = jnp.asarray([3, 11, 0, 3])
    np.testing.assert_array_equal(stored.columns(index).dequantize(), stored.dequantize()[:, index])
    stored = quantize(array(10, 12), name, "tensor")
    np.testing.assert_array_equal(stored.columns(index).dequantize(), stored.dequantize()[:, index])


def test_a_given_grid_is_kept_exactly():
    matrix = array(8, 4)
    scale = jnp.full((1, 4), 0.1) * jnp.arange(1.0, 5)[None]
    stored = quantize(matrix, "int4", scale=scale)
    np.testing.assert_array_equal(stored.scale, scale)
    expected = np.clip(np.rint(np.asarray(matrix, np.float64) / np.asarray(scale, np.float64)), -8, 7)
    np.testing.assert_array_equal(stored.codes(), expected)
    zero = jnp.full((1, 4), 3, jnp.uint8)
    stored = quantize(matrix, "uint4", scale=scale, zero_point=zero)
    expected = np.clip(np.rint(np.asarray(matrix, np.float64) / np.asarray(scale, np.float64)) + 3, 0, 15)
    np.testing.assert_array_equal(stored.codes(), expected)
    levels = jnp.asarray([-1.0, 0.0, 0.5, 1.0])
    stored = quantize(matrix, "codebook4", scale=scale, codebook=levels)
    np.testing.assert_array_equal(stored.codebook, levels)


def test_scales_of_groups_are_bfloat16_and_used_as_stored():
    matrix = array(64, 4)
    grid = make_grid(matrix, FORMATS["int8"], "group:16")
    assert grid.scale.shape == (4, 4)
    assert grid.scale.dtype == jnp.bfloat16
    codes = matrix_codes(matrix, grid, FORMATS["int8"])
    scale = np.repeat(np.asarray(grid.scale, np.float64), 16, axis=0)
    np.testing.assert_array_equal(codes, np.clip(np.rint(np.asarray(matrix, np.float64) / scale), -127, 127))
    # jit must not see through the rounding of the scale.
    values = np.geomspace(1e-3, 1e3, 50).astype(np.float32)
    expected = jnp.asarray(values).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda s: settle(s, "group:2"))(values), expected)
    np.testing.assert_array_equal(jax.jit(lambda s: settle(s, "channel"))(values), values)


def test_what_does_not_fit_is_said():
    with pytest.raises(RecipeError, match="'group:4' does not divide the 6 rows"):
        quantize(array(6, 2), "int4", "group:4")
    assert isinstance(quantize(array(6, 2), "int4").grid, Grid)
    assert isinstance(quantize(array(6, 2), "int4"), QTensor)
