"""Quantization grids: scales, zero points and levels, and rounding to them.

Training, calibration and the quantized program share one rounding rule: nearest code, ties to even, saturating. So a
fake-quantized and a quantized model differ only by float rounding of their products.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.errors import RecipeError
from lepton_xla.quant.codebook import learn_levels, nearest_level
from lepton_xla.quant.formats import Format

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Num, Shaped, UInt8

# Candidates of the `mse` search: scales as fractions of the absmax scale, from 1.1 (better for some small groups) to
# 0.05. At four bits the error is within 0.3 % of that of 1200 candidates.
SHARES = np.linspace(1.05, 0.22, 48, dtype=np.float32) ** 2
# For affine formats, also the share of the uncovered range that is cut off at the lower end.
LOWER_SHARES = np.linspace(0, 1, 5, dtype=np.float32)
# Number of least-squares fits of the best scale to its codes.
FITS = 3

_TINY = np.finfo(np.float32).tiny
# Clip at half of the largest float, so that the last code stays finite under any rounding and searched scale.
_COVERED = np.float32(np.finfo(np.float32).max / 2)
_BFLOAT16_MAX = np.float32(jnp.finfo(jnp.bfloat16).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a matrix [..., K, N]: `value[k, n] = scale[g, n] * (code[k, n] - zero_point[g, n])`, `g = k // (K //
    G)`.

    Attributes:
        scale: float32, or bfloat16 for groups: [..., G, N], one for each of G groups of rows; [..., 1, 1] for one. It
            may be negative if the format reaches further below zero than above.
        zero_point: uint8, the code of zero, shaped like `scale`, for affine formats; else None.
        codebook: float32 [..., levels], ascending, for learned formats; else None.

    >>> from lepton_xla.quant import FORMATS, make_grid
    >>> make_grid(jnp.array([[1.0, -254.0], [127.0, 0.0]]), FORMATS["int8"], "channel").scale.tolist()
    [[1.0, 2.0]]
    """

    scale: Float[Array, "*batch g n"]
    zero_point: UInt8[Array, "*batch g n"] | None = None
    codebook: Float32[Array, "*batch levels"] | None = None


def group_size(granularity: str) -> int:
    """g for `group:g`, the number of rows that share a scale; else 0.

    >>> group_size("group:64"), group_size("channel")
    (64, 0)
    """
    return int(granularity.removeprefix("group:")) if granularity.startswith("group:") else 0


def nearest_group(rows: int, size: int) -> int:
    """Find a group size near `size` that divides `rows`.

    It is the largest divisor from 5/8 of `size` up to `size`, else the smallest above, else `rows`. Smaller groups
    would need more scales than requested: at four bits and size 64, codes and scales take at most 0.1375 of float32's
    bytes for every even number of rows from 40 on.

    >>> [nearest_group(rows, 64) for rows in (768, 784, 400, 300, 25, 134, 1009)]
    [64, 56, 50, 60, 25, 67, 1009]
    """
    divisors = [part for part in range(1, rows + 1) if rows % part == 0]
    below = [part for part in divisors if 8 * part >= 5 * size and part <= size]
    above = [part for part in divisors if part > size]
    return below[-1] if below else (above[0] if above else rows)


def magnitude(array: Float[Array, "*_"], axes: Sequence[int] | None) -> Float[Array, "*_"]:
    """Largest absolute value along `axes` (None: all axes), which are kept with size 1; NaN if one is not finite.

    >>> from lepton_xla.quant import magnitude
    >>> magnitude(jnp.array([[1.0, -5.0], [3.0, 2.0]]), [0]).tolist()
    [[3.0, 5.0]]
    """
    sizes = jnp.abs(array)
    sizes = jnp.where(sizes < jnp.inf, sizes, jnp.inf)  # XLA:CPU's maximum may lose a NaN, but no infinity
    largest = jnp.max(sizes, axis=None if axes is None else tuple(axes), keepdims=True, initial=0)
    return jnp.where(largest < jnp.inf, largest, jnp.nan)


def absmax_scale(absmax: Float[Array, "*shape"], target: Format) -> Float32[Array, "*shape"]:
    """The scale that maps `absmax` onto the largest code.

    Args:
        absmax: largest magnitude of the values that share a scale, any shape, float, not negative.
        target: the format.

    Returns:
        float32 of the same shape: never zero or subnormal, finite where `absmax` is, 1 where it is 0. NaN stays NaN, so
            that it shows in the result.

    >>> from lepton_xla.quant import FORMATS, absmax_scale
    >>> absmax_scale(jnp.array([254.0, 0.0]), FORMATS["int8"]).tolist()
    [2.0, 1.0]
    """
    # XLA may rewrite a division by a constant; a multiplication gives the same number in every program.
    return _usable(absmax.astype(jnp.float32) * np.float32(1 / target.largest))


def settle(scale: jax.Array, granularity: str) -> jax.Array:
    """Round a scale to what can be stored: normal, and with bfloat16's precision for groups. Stays float32 and
    differentiable.

    Groups have many scales; in float32 they would take an eighth of the bytes of 4-bit codes in groups of 64.

    >>> float(settle(jnp.float32(1.001), "group:64")), float(settle(jnp.float32(0), "channel")) > 0
    (1.0, True)
    """
    scale = scale.astype(jnp.float32)
    size = jnp.maximum(jnp.abs(scale), _TINY)
    if group_size(granularity):
        # Not two casts, which XLA may remove.
        size = lax.reduce_precision(jnp.minimum(size, _BFLOAT16_MAX), exponent_bits=8, mantissa_bits=7)
    return jnp.where(scale < 0, -size, size)


def make_grid(
    matrix: Float[Array, "*batch k n"],
    target: Format,
    granularity: str,
    weight_range: str = "absmax",
    *,
    scale: Float[Array, "*batch _ _"] | None = None,
    zero_point: Num[Array, "*batch _ _"] | None = None,
    codebook: Float[Array, "*batch levels"] | None = None,
) -> Grid:
    """Make the grid for a matrix; parts that are given are used as they are.

    Args:
        matrix: float [..., K, N]; each index of the leading axes has its own grid. Magnitudes above half of the largest
            float32 saturate, so that no code stands for infinity.
        target: the format.
        granularity: `channel`: one scale per column; `tensor`: one scale; `group:g`: one per g rows of each column.
        weight_range: `absmax` covers the whole range; `mse` searches for the scale (and zero point) with the smallest
            squared error of rounding and saturation. Learned levels minimize it anyway.
        scale: [..., G, N] or [..., 1, 1], if another pass has found one.
        zero_point: likewise, for affine formats; needs `scale`.
        codebook: likewise [..., levels], for learned formats, in any order.

    Raises:
        RecipeError: if g does not divide K.

    >>> from lepton_xla.quant import FORMATS, make_grid
    >>> grid = make_grid(jnp.array([[0.0, -10.0], [510.0, 245.0]]), FORMATS["uint8"], "channel")
    >>> np.round(grid.scale, 4).tolist(), grid.zero_point.tolist()
    ([[2.0, 1.0]], [[0, 10]])
    """
    matrix = lax.stop_gradient(matrix.astype(jnp.float32))
    blocks = as_blocks(jnp.clip(matrix, -_COVERED, _COVERED), _group_count(matrix.shape[-2], granularity))
    axes = _shared_axes(granularity)
    if scale is None and target.kind == "affine":
        low = jnp.min(blocks, axes, keepdims=True, initial=0)
        high = jnp.max(blocks, axes, keepdims=True, initial=0)
        # Halving is exact and avoids overflow: a single rounding, however a compiler fuses it.
        block_scale = settle(_usable((high * 0.5 - low * 0.5) * np.float32(2 / target.largest)), granularity)
        zero_point = jnp.clip(jnp.round(-low / block_scale), 0, target.largest).astype(target.dtype)
    elif scale is None:
        block_scale = settle(absmax_scale(magnitude(blocks, axes), target), granularity)
    else:
        block_scale = settle(scale, granularity)[..., :, None, :]
        zero_point = None if zero_point is None else zero_point[..., :, None, :]
    if scale is None and weight_range == "mse" and not target.learned:
        block_scale, zero_point = _least_error(blocks, block_scale, zero_point, target, granularity)
    if target.learned and codebook is None:
        lead = matrix.shape[:-2]
        # Not flattened further: a sharded matrix would be gathered.
        scaled = (blocks / block_scale).reshape((math.prod(lead), *blocks.shape[len(lead) :]))
        levels = jax.vmap(lambda part: learn_levels(part, 2**target.bits))(scaled)
        codebook = levels.reshape((*lead, -1))
    elif codebook is not None:
        # Trained levels may change their order. A level of zero (for pruned weights) has no gradient and stays zero.
        codebook = jnp.sort(jnp.where(codebook == 0, jnp.zeros_like(codebook), codebook))
    stored = block_scale[..., :, 0, :].astype(jnp.bfloat16 if group_size(granularity) else jnp.float32)
    if target.kind == "affine":
        assert zero_point is not None
        return Grid(stored, zero_point[..., :, 0, :].astype(target.dtype))
    return Grid(stored, None, codebook if target.learned else None)


type _Choice = tuple[jax.Array, jax.Array, jax.Array | None]
"""Squared error, scale, zero point."""


@functools.partial(jax.jit, static_argnames=("target", "granularity"))
def _least_error(
    blocks: jax.Array, scale: jax.Array, zero_point: jax.Array | None, target: Format, granularity: str
) -> tuple[jax.Array, jax.Array | None]:
    """Search for the scale and zero point with the smallest squared error of rounding and saturation.

    Tries fractions of the covering scale (Choukroun et al. 2019, arXiv:1902.06822, section 3), then alternates a few
    times between fitting the scale to its codes by least squares and rounding to it. Errors are measured with the scale
    as it will be stored, so the result is never worse than the given scale.

    Args:
        blocks: float32 [..., G, K / G, N].
        scale: [..., G, 1, N] or [..., 1, 1, 1], settled.
        zero_point: likewise, for affine formats.
        target: a format whose levels are not learned.
        granularity: determines which values share a scale, and how the scale is stored.
    """
    axes = _shared_axes(granularity)
    unit = jnp.abs(scale)  # sums are in this unit, so that none overflows or underflows
    zero = None if zero_point is None else zero_point.astype(jnp.float32)
    below = -jnp.min(blocks, axes, keepdims=True, initial=0)

    def better(best: _Choice, scale: jax.Array, zero: jax.Array | None) -> _Choice:
        values = decode(encode(blocks, scale, target, zero), scale, target, zero)
        error = jnp.sum(jnp.square((values - blocks) / unit), axes, keepdims=True)
        return jax.tree.map(lambda new, old: jnp.where(error < best[0], new, old), (error, scale, zero), best)

    def attempt(index: jax.Array, best: _Choice) -> _Choice:
        share, side = tried[index, 0], tried[index, 1]
        if zero is None:
            return better(best, settle(scale * share * side, granularity), None)
        tight = settle(scale * share, granularity)
        missing = jnp.maximum(target.largest * (scale / tight - 1), 0)
        shifted = jnp.clip(jnp.round(below / tight - side * missing), 0, target.largest)
        return better(best, tight, shifted)

    def fit(_: jax.Array, best: _Choice) -> _Choice:
        codes = encode(blocks, best[1], target, best[2])
        levels = decode(codes, jnp.ones_like(scale), target, best[2])
        size = jnp.maximum(jnp.sum(jnp.square(levels), axes, keepdims=True), _TINY)
        fitted = unit * (jnp.sum(blocks / unit * levels, axes, keepdims=True) / size)
        return better(best, settle(fitted, granularity), best[2])

    sides = LOWER_SHARES if zero is not None else np.asarray([1] if target.symmetric else [1, -1], np.float32)
    tried = jnp.asarray(np.stack(np.meshgrid(SHARES, sides, indexing="ij"), axis=-1).reshape(-1, 2))
    covering = better((jnp.full_like(scale, jnp.inf), scale, zero), scale, zero)
    best = lax.fori_loop(0, tried.shape[0], attempt, covering)
    _, scale, zero = lax.fori_loop(0, FITS, fit, best)
    return scale, zero


def matrix_codes(matrix: jax.Array, grid: Grid, target: Format) -> jax.Array:
    """Round a matrix [..., K, N] to codes on a grid; the codes are not packed.

    >>> from lepton_xla.quant import FORMATS
    >>> matrix_codes(jnp.array([[0.6], [-1.6]]), Grid(jnp.ones((1, 1))), FORMATS["int8"]).tolist()
    [[1], [-2]]
    """
    return _by_blocks(encode, matrix, grid, target)


def matrix_values(codes: jax.Array, grid: Grid, target: Format) -> jax.Array:
    """Dequantize codes to a float32 matrix [..., K, N].

    >>> from lepton_xla.quant import FORMATS
    >>> matrix_values(jnp.array([[3], [-2]], jnp.int8), Grid(jnp.full((1, 1), 0.5)), FORMATS["int8"]).tolist()
    [[1.5], [-1.0]]
    """
    return _by_blocks(decode, codes, grid, target)


def encode(
    array: Float[Array, "*shape"],
    scale: Float[Array, "*#shape"],
    target: Format,
    zero_point: Num[Array, "*#shape"] | None = None,
    codebook: Float[Array, "*batch levels"] | None = None,
) -> Shaped[Array, "*shape"]:
    """Round `array` to codes, saturating.

    Args:
        array: float, any shape.
        scale: float32, broadcastable to `array`.
        target: the format.
        zero_point: broadcastable to `array`, for affine formats.
        codebook: float32 [..., levels] whose leading axes are those of `array`, for learned formats.

    Returns:
        Codes of the format's dtype, not packed.

    >>> from lepton_xla.quant import FORMATS, encode
    >>> encode(jnp.array([0.5, 1.5, -3.0, 1000.0]), jnp.float32(1), FORMATS["int8"]).tolist()
    [0, 2, -3, 127]
    """
    scaled = array.astype(jnp.float32) / scale.astype(jnp.float32)
    if target.kind == "int":
        return jnp.clip(jnp.round(scaled), target.lowest, target.largest).astype(target.dtype)
    if target.kind == "affine":
        assert zero_point is not None
        codes = jnp.round(scaled) + zero_point.astype(jnp.float32)
        return jnp.clip(codes, target.lowest, target.largest).astype(target.dtype)
    if target.kind == "float":
        return jnp.clip(scaled, target.lowest, target.largest).astype(target.dtype)
    levels = jnp.asarray(target.levels, jnp.float32) if codebook is None else codebook
    if levels.ndim == 1:
        return nearest_level(scaled, levels).astype(target.dtype)
    lead = levels.shape[:-1]
    flat = scaled.reshape((math.prod(lead), -1))
    codes = jax.vmap(nearest_level)(flat, levels.reshape((math.prod(lead), -1)))
    return codes.reshape(array.shape).astype(target.dtype)


def decode(
    codes: Shaped[Array, "*shape"],
    scale: Float[Array, "*#shape"],
    target: Format,
    zero_point: Num[Array, "*#shape"] | None = None,
    codebook: Float[Array, "*batch levels"] | None = None,
) -> Float32[Array, "*shape"]:
    """Dequantize codes to float32; the arguments are those of `encode`.

    >>> from lepton_xla.quant import FORMATS
    >>> decode(jnp.array([0, 2, -3], jnp.int8), jnp.float32(0.5), FORMATS["int8"]).tolist()
    [0.0, 1.0, -1.5]
    """
    scale = scale.astype(jnp.float32)
    if target.kind == "affine":
        assert zero_point is not None
        return (codes.astype(jnp.float32) - zero_point.astype(jnp.float32)) * scale
    if target.kind != "codebook":
        return codes.astype(jnp.float32) * scale
    levels = jnp.asarray(target.levels, jnp.float32) if codebook is None else codebook
    index = codes.astype(jnp.int32)
    if levels.ndim == 1:
        return levels.at[index].get(mode="promise_in_bounds") * scale
    lead = levels.shape[:-1]
    flat = index.reshape((*lead, -1))
    return jnp.take_along_axis(levels, flat, axis=-1, mode="promise_in_bounds").reshape(codes.shape) * scale


def as_blocks(matrix: jax.Array, groups: int) -> jax.Array:
    """Reshape [..., K, N] to [..., G, K / G, N].

    >>> as_blocks(jnp.zeros((8, 3)), 2).shape
    (2, 4, 3)
    """
    *lead, rows, columns = matrix.shape
    return matrix.reshape((*lead, groups, rows // groups, columns))


def _by_blocks(function: Callable[..., jax.Array], matrix: jax.Array, grid: Grid, target: Format) -> jax.Array:
    zero = None if grid.zero_point is None else grid.zero_point[..., :, None, :]
    blocks = as_blocks(matrix, grid.scale.shape[-2])
    return function(blocks, grid.scale[..., :, None, :], target, zero, grid.codebook).reshape(matrix.shape)


def _shared_axes(granularity: str) -> tuple[int, ...]:
    """Axes of blocks [..., G, K / G, N] that share a scale."""
    return (-3, -2, -1) if granularity == "tensor" else (-2,)


def _group_count(rows: int, granularity: str) -> int:
    size = group_size(granularity)
    if size and rows % size:
        raise RecipeError(f"granularity = 'group:{size}' does not divide the {rows} rows of the contracted dimension")
    return rows // size if size else 1


def _usable(scale: jax.Array) -> jax.Array:
    """Replace zero by 1 and subnormals by the smallest normal number; NaN stays NaN."""
    return jnp.where(scale == 0, jnp.float32(1), jnp.maximum(scale, _TINY))
