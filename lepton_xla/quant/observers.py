"""Range estimators: choose from data the magnitude that a static scale covers.

Magnitudes are counted on the device, in a histogram with a fixed number of bins. Its range is a power of two. If it
turns out too small, merging neighbouring bins doubles it, with the same counts as if it had been that large from the
start; so one pass over the data suffices. A value's bin follows from the bits of its float32, so counts are equal on
every platform, however it treats subnormal numbers. The range is then chosen on the host, in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.errors import CalibrationError
from lepton_xla.quant.formats import Format

BINS_LOG2 = 11
BINS = 1 << BINS_LOG2

# Of a float32: the bits below the exponent, the implied leading one, everything but the sign.
_FRACTION_BITS = 23
_FRACTION = (1 << _FRACTION_BITS) - 1
_LEADING_ONE = 1 << _FRACTION_BITS
_MAGNITUDE = 0x7FFFFFFF

# Divergences that differ by less count as equal; the rest is rounding.
_TIE = 1e-12


# On the device.


def magnitude_bits(array: jax.Array) -> jax.Array:
    """Bits of the float32 magnitudes, int32, same shape. They sort like the magnitudes, NaN last.

    >>> np.asarray(magnitude_bits(jnp.array([-2.0, 3.0, -jnp.inf]))).view(np.float32).tolist()
    [2.0, 3.0, inf]
    """
    return lax.bitcast_convert_type(array.astype(jnp.float32), jnp.int32) & _MAGNITUDE


def largest_bits(array: jax.Array) -> jax.Array:
    """Give `magnitude_bits` of the largest magnitude, scalar; 0 for an empty array.

    >>> np.int32(largest_bits(jnp.array([1.0, -3.0]))).view(np.float32).item()
    3.0
    """
    return jnp.max(magnitude_bits(array), initial=0)


def level_of(bits: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Level of the smallest histogram that holds a magnitude; level `n` covers magnitudes below 2**(n - 126).

    >>> level = int(level_of(largest_bits(jnp.array([1.0, -3.0]))))
    >>> 2.0 ** (level - 126)
    4.0
    """
    return bits >> _FRACTION_BITS


def count(array: jax.Array, level: jax.Array) -> jax.Array:
    """Count magnitudes.

    Works inside `jit`, on sharded arrays too, inside `shard_map` (where the counts are those of one shard) and control
    flow.

    Args:
        array: float array, any shape.
        level: int32 scalar; the histogram's range is 2**(level - 126). Larger magnitudes are counted in the last bin.

    Returns:
        uint32[1 + BINS]: number of elements that are exactly zero, then the count of each bin. Bins have equal width.

    >>> counted = count(jnp.array([0.0, 0.0, 1.0, -3.0]), jnp.int32(128))  # 128: magnitudes below 4
    >>> int(counted[0]), np.flatnonzero(counted[1:]).tolist()
    (2, [512, 1536])
    """
    bits = magnitude_bits(array)
    exponent = bits >> _FRACTION_BITS
    mantissa = (bits & _FRACTION) | jnp.where(exponent > 0, _LEADING_ONE, 0)
    # value = mantissa * 2**(exponent - 150); bin width = 2**(level - 126 - BINS_LOG2).
    shift = jnp.clip(24 - BINS_LOG2 + level - jnp.maximum(exponent, 1), 0, 31)
    index = jnp.where(bits == 0, 0, 1 + jnp.minimum(lax.shift_right_logical(mantissa, shift), BINS - 1))
    return jnp.zeros(1 + BINS, jnp.uint32).at[index].add(jnp.uint32(1), out_sharding=_whole(array))


def _whole(array: jax.Array) -> jax.sharding.NamedSharding | None:
    """The sharding of a replicated result if the array's mesh has explicit axes; else None."""
    mesh = jax.typeof(array).sharding.mesh
    explicit = jax.sharding.AxisType.Explicit in (mesh.axis_types or ())
    return jax.sharding.NamedSharding(mesh, jax.P()) if explicit else None


# On the host.


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A histogram of magnitudes.

    Attributes:
        level: the range is 2**(level - 126).
        zeros: number of elements that are exactly zero.
        counts: int64[BINS], number of other elements per bin.
        absmax: the largest magnitude.

    >>> seen = Histogram.of_counts(np.ones(1 + BINS, np.uint32), level=127, absmax=2.0)  # one zero, and one a bin
    >>> seen.zeros, seen.width * BINS, seen.used, (seen + seen).zeros, seen.grown(128).used
    (1, 2.0, 2048, 2, 1024)
    """

    level: int = 0
    zeros: int = 0
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))
    absmax: float = 0.0

    @classmethod
    def of_counts(cls, counted: np.ndarray, level: int, absmax: float) -> Histogram:
        """Make a histogram from the result of `count` at a level."""
        return cls(int(level), int(counted[0]), counted[1:].astype(np.int64), float(absmax))

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0 ** (self.level - 126 - BINS_LOG2)

    @property
    def used(self) -> int:
        """Number of bins up to the last one that is not empty."""
        filled = np.flatnonzero(self.counts)
        return int(filled[-1]) + 1 if filled.size else 0

    def grown(self, level: int) -> Histogram:
        """Return the histogram at the same or a higher level; each doubling of the range merges pairs of bins."""
        counts = self.counts
        for _ in range(min(level - self.level, BINS_LOG2)):
            counts = np.concatenate([counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
        return dataclasses.replace(self, level=level, counts=counts)

    def __add__(self, other: Histogram) -> Histogram:
        level = max(self.level, other.level)
        first, second = self.grown(level), other.grown(level)
        return Histogram(level, self.zeros + other.zeros, first.counts + second.counts, max(self.absmax, other.absmax))


def code_magnitudes(target: Format) -> np.ndarray:
    """The magnitudes that a symmetric format represents at scale 1: float64, ascending from 0.

    Raises:
        CalibrationError: if the format is neither integer nor an eight-bit float.

    >>> from lepton_xla.quant import FORMATS
    >>> code_magnitudes(FORMATS["int4"]).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    dtype = jnp.dtype(target.dtype)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return np.arange(int(target.largest) + 1, dtype=np.float64)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
        values = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float64)
        return np.unique(values[values <= target.largest])
    raise CalibrationError(f"a static range cannot be chosen for {target.name!r}: its codes are not symmetric")


def mse_range(seen: Histogram, codes: np.ndarray) -> float:
    """The upper edge of a bin with the smallest mean squared error of rounding and saturation.

    Values count as the centre of their bin, so the choice is exact to within a bin.

    Args:
        seen: what the range is for, not all zero.
        codes: the result of `code_magnitudes`; the largest is mapped to the range.

    References:
        Nahshan et al., Loss aware post-training quantization, 2019, arXiv:1911.07190, section 3.

    >>> from lepton_xla.quant import FORMATS
    >>> seen = Histogram(level=127, counts=np.geomspace(1e6, 1, BINS).astype(int), absmax=2.0)  # few large ones
    >>> round(mse_range(seen, code_magnitudes(FORMATS["int4"])), 1)
    0.7
    """
    filled = np.flatnonzero(seen.counts)
    centres, weights = (filled + 0.5) * seen.width, seen.counts[filled].astype(np.float64)
    ranges = np.minimum(np.arange(1, seen.used + 1) * seen.width, seen.absmax)
    rounded = _rounder(codes)
    errors = [
        np.dot(weights, (centres - rounded(centres * (codes[-1] / top)) * (top / codes[-1])) ** 2) for top in ranges
    ]
    return float(ranges[int(np.argmin(errors))])


def _rounder(codes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Round magnitudes to the nearest code, saturating."""
    if np.array_equal(codes, np.arange(codes.size)):
        return lambda values: np.minimum(np.rint(values), codes[-1])
    middles = (codes[1:] + codes[:-1]) / 2
    return lambda values: codes[np.searchsorted(middles, values)]


def entropy_range(seen: Histogram, levels: int) -> float:
    """The range with the smallest Kullback-Leibler divergence between values and codes.

    For each number of kept bins, the reference is the distribution with everything above added to the last kept bin.
    The candidate is the distribution without that, its bins merged into `levels` groups, and the mass of each group
    spread evenly over its non-empty bins. Exact zeros, which every symmetric format represents, are excluded from both.
    Ties go to the largest range.

    Args:
        seen: the magnitudes, not all zero.
        levels: number of magnitudes that the format distinguishes: 128 for int8.

    References:
        Migacz, 8-bit inference with TensorRT, GTC 2017.

    >>> seen = Histogram(level=127, counts=np.geomspace(1e6, 1, BINS).astype(int), absmax=2.0)  # few large ones
    >>> round(entropy_range(seen, levels=8), 1)
    0.9
    """
    counts = seen.counts.astype(np.float64)
    kept = np.arange(max(levels, int(np.flatnonzero(counts)[0]) + 1), seen.used + 1)
    if kept.size == 0:
        return seen.absmax
    total = counts.sum()
    mass, filled, ordered = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts > 0, _times_log(counts))
    )
    # Group g holds the bins b with floor(b * levels / kept) = g, which begin at ceil(g * kept / levels).
    edges = -(-np.arange(levels + 1) * kept[:, None] // levels)
    group_mass, group_filled = (np.diff(part[edges], axis=1) for part in (mass, filled))
    even = np.divide(group_mass, group_filled, out=np.ones_like(group_mass), where=group_filled > 0)
    above = total - mass[kept]
    reference = ordered[kept - 1] + _times_log(counts[kept - 1] + above)
    group_mass[:, -1] += above
    divergence = (reference - np.sum(group_mass * np.log(even), axis=1)) / total + np.log(mass[kept] / total)
    divergence[(counts[kept - 1] == 0) & (above > 0)] = np.inf
    best = np.flatnonzero(divergence <= divergence.min() + _TIE)[-1]
    return float(min(kept[best] * seen.width, seen.absmax))


def _times_log(values: np.ndarray) -> np.ndarray:
    """`values * log(values)`, 0 at 0."""
    return values * np.log(np.where(values > 0, values, 1.0))


def percentile_range(seen: Histogram, percentile: float) -> float:
    """The magnitude below which `percentile` per cent of all elements lie, zeros included.

    Nearest rank, exact to within a bin.

    Args:
        seen: the magnitudes.
        percentile: in (0, 100]; 100 is exactly the largest magnitude.

    >>> seen = Histogram(level=127, counts=np.ones(BINS, np.int64), absmax=2.0)  # magnitudes evenly in [0, 2)
    >>> round(percentile_range(seen, 90), 2), percentile_range(seen, 100)
    (1.8, 2.0)
    """
    if percentile == 100:
        return seen.absmax
    rank = percentile / 100 * (seen.zeros + int(seen.counts.sum()) - 1) - seen.zeros + 0.5
    if rank <= 0:
        return 0.0
    ends = np.cumsum(seen.counts)
    at = min(int(np.searchsorted(ends, rank)), BINS - 1)
    inside = (rank - (ends[at] - seen.counts[at])) / max(int(seen.counts[at]), 1)
    return float(min((at + inside) * seen.width, seen.absmax))


def counts_needed(method: str) -> bool:
    """Tell whether a method needs a histogram, and not only the largest magnitude.

    >>> counts_needed("absmax"), counts_needed("percentile:99.9")
    (False, True)
    """
    return method not in ("absmax", "percentile:100")


def estimate_range(method: str, seen: Histogram, target: Format) -> float:
    """Compute the range by a recipe's `calibration` method.

    Args:
        method: `absmax`, `percentile:P`, `mse` or `entropy`.
        seen: the magnitudes; only its `absmax` is used if `counts_needed(method)` is False.
        target: the format of the codes.

    Returns:
        The range; 0 if all values were zero, or `percentile:P` falls on zeros.

    Raises:
        CalibrationError: if `mse` or `entropy` is not defined for the format.

    >>> from lepton_xla.quant import FORMATS
    >>> estimate_range("absmax", Histogram(absmax=3.0), FORMATS["int8"])
    3.0
    """
    name, _, argument = method.partition(":")
    if seen.absmax == 0 or not np.isfinite(seen.absmax) or not counts_needed(method):
        return seen.absmax
    if name == "percentile":
        return percentile_range(seen, float(argument))
    if name == "mse":
        return mse_range(seen, code_magnitudes(target))
    assert name == "entropy"
    if not jnp.issubdtype(jnp.dtype(target.dtype), jnp.signedinteger):
        raise CalibrationError(f"calibration = 'entropy' needs evenly spaced codes; those of {target.name!r} are not")
    return entropy_range(seen, int(target.largest) + 1)


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """Combines the ranges of several batches into one.

    Attributes:
        method: `max`, `mean`, or `ema:M`: `M * old + (1 - M) * new`. A range of 0 is ignored, so a scan step that no
            batch reaches keeps 0.
        value: float64, the range so far, any shape.
        number: number of ranges combined so far, same shape.

    >>> ranges = Aggregate.empty("ema:0.75", ())
    >>> for seen in (4.0, 8.0):
    ...     ranges = ranges.add(np.float64(seen))
    >>> float(ranges.value)
    5.0
    """

    method: str
    value: np.ndarray
    number: np.ndarray

    @classmethod
    def empty(cls, method: str, shape: tuple[int, ...]) -> Aggregate:
        """Begin with no range."""
        return cls(method, np.zeros(shape), np.zeros(shape, np.int64))

    def add(self, value: np.ndarray) -> Aggregate:
        """Add the range of one more batch."""
        said = value != 0  # NaN counts, so that it shows in the result
        number = self.number + said
        name, _, argument = self.method.partition(":")
        if name == "max":
            merged = np.maximum(self.value, value)
        else:
            share = (
                1 / np.maximum(number, 1) if name == "mean" else np.where(number == 1, 1.0, 1 - float(argument or 0))
            )
            merged = self.value + share * (value - self.value)
        return Aggregate(self.method, np.where(said, merged, self.value), number)
