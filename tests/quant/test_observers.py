"""Histograms counted exactly, and ranges against straightforward float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lepton_xla.errors import CalibrationError
from lepton_xla.quant import FORMATS, observers
from lepton_xla.quant.formats import Format
from lepton_xla.quant.observers import BINS, Aggregate, Histogram

counted = jax.jit(observers.count)
largest = jax.jit(observers.largest_bits)

INT8 = FORMATS["int8"]
floats = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.floats(-8, 8, width=32),
        st.sampled_from([0.0, -0.0, 1e-45, -1.1e-38, 1.1754944e-38, 3.4028235e38, 1.0, -2.0]),
    ),
)


def reference_level(values):
    """The smallest n >= 0 with every magnitude below 2**(n - 126)."""
    absmax = np.abs(values.astype(np.float64)).max(initial=0)
    return max(0, int(np.frexp(absmax)[1]) + 126) if absmax else 0


def reference_counts(values, level):
    magnitudes = np.abs(values.astype(np.float64)).ravel()
    index = np.minimum(np.floor(magnitudes / 2.0 ** (level - 126) * 2048), 2047).astype(int)
    return np.concatenate([[np.sum(magnitudes == 0)], np.bincount(index[magnitudes > 0], minlength=2048)])


def histogram(values, level=None):
    level = reference_level(values) if level is None else level
    values = values.astype(np.float32)
    return Histogram.of_counts(reference_counts(values, level), level, float(np.abs(values).max()))


# Counting.


@settings(max_examples=200, deadline=None)
@given(values=floats, above=st.integers(0, 3))
@example(values=np.zeros(3, np.float32), above=0)
@example(values=np.full(1, 1e-45, np.float32), above=0)
@example(values=np.full(5, np.finfo(np.float32).max), above=0)
@example(values=np.asarray([1, np.nextafter(np.float32(2), np.float32(0)), 2], np.float32), above=0)
def test_counts_are_exact(values, above):
    # One shape, so that it is compiled once; the zeros that fill it up are taken off again.
    padded = np.zeros(40, np.float32)
    padded[: values.size] = values
    bits = int(largest(padded))
    assert np.int32(bits).view(np.float32) == np.abs(values).max()
    level = int(observers.level_of(np.int32(bits)))
    assert level == reference_level(values)
    found = np.asarray(counted(padded, level + above)).astype(np.int64)
    found[0] -= 40 - values.size
    np.testing.assert_array_equal(found, reference_counts(values, level + above))


def test_what_lies_above_is_in_the_last_bin():
    level = reference_level(np.asarray([1.5]))
    found = counted(jnp.asarray([0.5, 2.0, 1e30, 3.4e38], jnp.float32), level)
    assert found[1 + 512] == 1
    assert found[-1] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_narrow_arrays(dtype):
    values = np.random.default_rng(0).standard_normal((7, 9)).astype(jnp.dtype(dtype))
    level = reference_level(values)
    np.testing.assert_array_equal(counted(jnp.asarray(values), level), reference_counts(values, level))


def test_not_a_number_shows_as_the_largest():
    bits = largest(jnp.asarray([1, np.inf, np.nan, -3], jnp.float32))
    assert np.isnan(np.asarray(bits).view(np.float32))
    assert np.isinf(np.asarray(largest(jnp.asarray([1, -np.inf]))).view(np.float32))


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(floats, min_size=1, max_size=4))
def test_a_histogram_that_grew_is_the_one_that_was_large_from_the_start(parts):
    total = Histogram()
    for part in parts:
        total = total + histogram(part)
    everything = np.concatenate(parts)
    level = reference_level(everything)
    assert total.level == level
    np.testing.assert_array_equal([total.zeros, *total.counts], reference_counts(everything, level))
    assert total.absmax == np.abs(everything).max()


# Counting under sharding and control flow. conftest gives two devices.


def mesh(kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh((2,), ("x",), axis_types=(kind,))


VALUES = np.random.default_rng(1).laplace(size=(8, 6)).astype(np.float32)
LEVEL = reference_level(VALUES)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
def test_sharded_arrays_have_one_global_histogram(spec, kind):
    placed = jax.device_put(VALUES, NamedSharding(mesh(kind), spec))
    compiled = jax.jit(lambda array: (observers.count(array, LEVEL), observers.largest_bits(array)))
    counts, bits = compiled(placed)
    np.testing.assert_array_equal(counts, reference_counts(VALUES, LEVEL))
    assert np.asarray(bits).view(np.float32) == np.abs(VALUES).max()
    # Each device counts what it has: only counts travel.
    assert "all-gather" not in compiled.lower(placed).compile().as_text()


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_add_up(check_vma):
    def shard(array):
        return lax.psum(observers.count(array, LEVEL), "x")

    mapped = jax.shard_map(shard, mesh=mesh(), in_specs=P("x"), out_specs=P(), check_vma=check_vma)
    np.testing.assert_array_equal(jax.jit(mapped)(VALUES), reference_counts(VALUES, LEVEL))


def test_steps_of_a_scan_add_up():
    def step(total, row):
        return total + observers.count(row, LEVEL), None

    total, _ = jax.jit(lambda rows: lax.scan(step, jnp.zeros(1 + BINS, jnp.uint32), rows))(VALUES)
    np.testing.assert_array_equal(total, reference_counts(VALUES, LEVEL))


# Ranges.

SAMPLES = {
    "normal": np.random.default_rng(2).standard_normal(50_000),
    "laplace": np.random.default_rng(3).laplace(size=50_000),
    "half of it zero": np.maximum(np.random.default_rng(4).standard_normal(50_000), 0),
    "uniform": np.random.default_rng(5).uniform(-3, 3, 50_000),
    "outliers": np.concatenate([np.random.default_rng(6).standard_normal(50_000), [40.0, -41.0]]),
}


def squared_error(values, top, codes):
    """Of rounding every value to the nearest code times top / largest, in float64."""
    scaled = np.abs(values) * (codes[-1] / top)
    nearest = codes[np.abs(scaled[:, None] - codes).argmin(axis=1)]
    return np.mean((np.abs(values) - nearest * (top / codes[-1])) ** 2)


@pytest.mark.parametrize("codes", [np.arange(8.0), np.arange(128.0)], ids=["int4", "int8"])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_the_best_there_is(name, codes):
    values = SAMPLES[name][-6000:]
    seen = histogram(values)
    found = observers.mse_range(seen, codes)
    grid = np.linspace(0.02, 1, 150) * seen.absmax
    best = min(squared_error(values, top, codes) for top in grid)
    assert squared_error(values, found, codes) <= 1.02 * best
    assert 0 < found <= seen.absmax


def test_mse_is_within_a_bin_of_a_sharp_optimum():
    # Three quarters at 1 and a quarter at 3 in a format with the codes 0 and 1 alone: with range t the error is
    # 3/4 (t - 1)^2 + 1/4 (t - 3)^2, smallest at the mean 1.5.
    seen = histogram(np.asarray([1.0, 1.0, 1.0, 3.0]))
    assert abs(observers.mse_range(seen, np.asarray([0.0, 1.0])) - 1.5) <= seen.width


def test_mse_of_a_format_whose_codes_are_not_even():
    codes = observers.code_magnitudes(Format(**fields("float8_e4m3fn", 448)))
    assert codes[0] == 0
    assert codes[-1] == 448
    assert codes.size == 127
    values = SAMPLES["laplace"][:3000]
    found = observers.mse_range(histogram(values), codes)
    best = min(squared_error(values, top, codes) for top in np.linspace(0.1, 1, 60) * np.abs(values).max())
    assert squared_error(values, found, codes) <= 1.05 * best


def fields(dtype, top):
    given = {"name": dtype, "dtype": jnp.dtype(dtype), "lowest": -top, "largest": top, "kind": "float", "bits": 8}
    return {name: value for name, value in given.items() if name in Format.__dataclass_fields__}


def straightforward_entropy(counts, width, levels):
    """The range with the least divergence, bins and groups in plain loops; the last of those that tie."""
    used = np.flatnonzero(counts)[-1] + 1
    best, answer = np.inf, None
    for kept in range(levels, used + 1):
        reference = counts[:kept].astype(np.float64)
        reference[-1] += counts[kept:].sum()
        candidate = np.zeros(kept)
        groups = np.arange(kept) * levels // kept
        for group in range(levels):
            members = (groups == group) & (counts[:kept] > 0)
            if members.any():
                candidate[members] = counts[:kept][members].sum() / members.sum()
        p, q = reference / reference.sum(), candidate / candidate.sum()
        if np.any((p > 0) & (q == 0)):
            continue
        divergence = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if divergence <= best + 1e-12:
            best, answer = min(best, divergence), kept * width
    return answer


@pytest.mark.parametrize(
    ("name", "levels"),
    [*((name, 8) for name in SAMPLES), ("laplace", 128), ("outliers", 128), ("half of it zero", 128)],
)
def test_entropy_is_the_straightforward_optimum(name, levels):
    seen = histogram(SAMPLES[name][-3000:])
    found = observers.entropy_range(seen, levels)
    assert found == min(straightforward_entropy(seen.counts, seen.width, levels), seen.absmax)


def test_entropy_takes_the_largest_of_equally_good_ranges():
    # One value below and one at the top: cutting the top off leaves nothing to lose, and so does keeping all.
    seen = histogram(np.asarray([1.0] * 5 + [3.0]))
    assert observers.entropy_range(seen, 128) == pytest.approx(3.0, abs=seen.width)


def test_entropy_cuts_outliers_off_and_keeps_what_is_even():
    assert observers.entropy_range(histogram(SAMPLES["outliers"]), 128) < 20
    assert observers.entropy_range(histogram(SAMPLES["uniform"]), 128) > 2.9


@pytest.mark.parametrize("percentile", [0.5, 30, 50, 99, 99.9, 100])
@pytest.mark.parametrize("name", SAMPLES)
def test_percentile_is_within_a_bin(name, percentile):
    values = SAMPLES[name].astype(np.float32)
    seen = histogram(values)
    exact = np.percentile(np.abs(values.astype(np.float64)), percentile, method="nearest")
    assert abs(observers.percentile_range(seen, percentile) - exact) <= (0 if percentile == 100 else seen.width)
    if exact == 0:
        assert observers.percentile_range(seen, percentile) == 0


METHODS = ["absmax", "percentile:99.9", "percentile:100", "mse", "entropy"]


@settings(max_examples=40, deadline=None)
@given(values=floats, method=st.sampled_from(METHODS))
@example(values=np.zeros(3, np.float32), method="mse")
@example(values=np.full(1, 1e-45, np.float32), method="entropy")
@example(values=np.full(1, 1e-45, np.float32), method="mse")
@example(values=np.full(3, np.finfo(np.float32).max), method="mse")
@example(values=np.full(3, 7.0, np.float32), method="percentile:99.9")
def test_a_range_is_positive_and_no_larger_than_what_was_seen(values, method):
    found = observers.estimate_range(method, histogram(values), INT8)
    if np.any(values != 0):
        assert (found > 0) or method == "percentile:99.9"
        assert found <= np.abs(values).max()
    else:
        assert found == 0


def test_a_single_value_is_its_own_range():
    for method in METHODS:
        seen = histogram(np.full(9, 7.0, np.float32))
        assert observers.estimate_range(method, seen, INT8) == pytest.approx(7.0, abs=seen.width)


def test_formats_that_a_method_is_not_for():
    seen = histogram(np.ones(3, np.float32))
    with pytest.raises(CalibrationError, match="'entropy' needs evenly spaced codes; those of 'float8_e4m3fn'"):
        observers.estimate_range("entropy", seen, Format(**fields("float8_e4m3fn", 448)))
    with pytest.raises(CalibrationError, match="not symmetric"):
        observers.estimate_range("mse", seen, Format(**fields("uint8", 255)))


# Batches.


def test_aggregates():
    ranges = [np.asarray([2.0, 0.0, 1.0]), np.asarray([4.0, 3.0, 0.0]), np.asarray([1.0, 5.0, 0.0])]
    expected = {
        "max": [4, 5, 1],
        "mean": [7 / 3, 4, 1],
        # 2, then 0.75 * 2 + 0.25 * 4, then 0.75 * 2.5 + 0.25 * 1; a batch that says nothing leaves it.
        "ema:0.75": [2.125, 0.75 * 3 + 0.25 * 5, 1],
    }
    for method, value in expected.items():
        total = Aggregate.empty(method, (3,))
        for one in ranges:
            total = total.add(one)
        np.testing.assert_allclose(total.value, value, rtol=1e-12)


@pytest.mark.parametrize("method", ["max", "mean", "ema:0.9"])
def test_an_aggregate_does_not_hide_what_is_not_a_number(method):
    total = Aggregate.empty(method, ()).add(np.asarray(1.0)).add(np.asarray(np.nan)).add(np.asarray(2.0))
    assert np.isnan(total.value)
