"""Where the values lie that a format can hold: scales, zero points and levels, and rounding to them.

One rounding rule is used everywhere, in training, calibration and the lowered program: nearest code, ties to even,
saturating. So a fake-quantized and a lowered model differ by float rounding of their products only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.errors import RecipeError
from lepton_xla.quant.codebook import learn_levels, nearest_level
from lepton_xla.quant.formats import Format

# What `mse` tries: scales as shares of the one that covers the range, 1.1 (in small groups chance decides) to 0.05.
# At four bits the error is within 0.3 % of that of 1200 shares.
SHARES = np.linspace(1.05, 0.22, 48, dtype=np.float32) ** 2
# Of an affine format, also how much of what a smaller scale does not reach is left out at the lower end.
LOWER_SHARES = np.linspace(0, 1, 5, dtype=np.float32)
# How often the best scale is then fitted to its own codes.
FITS = 3

_TINY = np.finfo(np.float32).tiny
# What a grid covers at most: twice as much is a number still, so that the last code is, whatever rounding and a search
# for scales make of it.
_COVERED = np.float32(np.finfo(np.float32).max / 2)
_BFLOAT16_MAX = np.float32(jnp.finfo(jnp.bfloat16).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """What the codes of a matrix [..., K, N] stand for.

    Attributes:
        scale: float32, or bfloat16 for groups: [..., G, N], one for each of G groups of rows; [..., 1, 1] for one. It
            may be negative where a format reaches further below zero than above.
        zero_point: uint8 like `scale`, the code of zero, for affine formats; else None.
        codebook: float32 [..., levels], ascending, for learned formats; else None.
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None


def group_size(granularity: str) -> int:
    """Rows that share a scale for `group:g`, else 0."""
    return int(granularity.removeprefix("group:")) if granularity.startswith("group:") else 0


def nearest_group(rows: int, size: int) -> int:
    """The size of groups of about `size` that divides `rows`.

    The largest divisor from 5/8 of `size` up to it; else the smallest above it; else all rows. Smaller groups would
    need more scales than asked for: at four bits and a size of 64, codes and scales take at most 0.1375 of float32's
    bytes, of any number of rows that is at least 40 and even.

    >>> [nearest_group(rows, 64) for rows in (768, 784, 400, 300, 25, 134, 1009)]
    [64, 56, 50, 60, 25, 67, 1009]
    """
    divisors = [part for part in range(1, rows + 1) if rows % part == 0]
    below = [part for part in divisors if 8 * part >= 5 * size and part <= size]
    above = [part for part in divisors if part > size]
    return below[-1] if below else (above[0] if above else rows)


def magnitude(array: jax.Array, axes: Sequence[int] | None) -> jax.Array:
    """Largest absolute value along `axes` (all of them for None), kept as size 1."""
    return jnp.max(jnp.abs(array), axis=None if axes is None else tuple(axes), keepdims=True, initial=0)


def absmax_scale(absmax: jax.Array, target: Format) -> jax.Array:
    """Scale that maps `absmax` onto the largest code.

    Args:
        absmax: largest magnitude of what shares a scale, any shape, float, not negative.
        target: the format.

    Returns:
        float32 of the same shape: never zero or subnormal, and finite where `absmax` is; 1 where that is 0. A NaN stays
        one, so that it shows in the result.
    """
    # XLA divides by a constant as it likes; multiplying is the same number in every program.
    return _usable(absmax.astype(jnp.float32) * np.float32(1 / target.largest))


def settle(scale: jax.Array, granularity: str) -> jax.Array:
    """A scale as it is stored, still float32 and differentiable: normal, and of bfloat16's precision for groups.

    Groups have many scales: at float32 they would be an eighth of the bytes of 4-bit codes in groups of 64.
    """
    scale = scale.astype(jnp.float32)
    size = jnp.maximum(jnp.abs(scale), _TINY)
    if group_size(granularity):
        # Not a cast there and back, which XLA may drop.
        size = lax.reduce_precision(jnp.minimum(size, _BFLOAT16_MAX), exponent_bits=8, mantissa_bits=7)
    return jnp.where(scale < 0, -size, size)


def make_grid(
    matrix: jax.Array,
    target: Format,
    granularity: str,
    weight_range: str = "absmax",
    *,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
) -> Grid:
    """The grid for a matrix, in the parts that are not given.

    Args:
        matrix: float [..., K, N]; leading axes have grids of their own. Magnitudes above half of float32's largest
            saturate, so that no code stands for infinity.
        target: the format.
        granularity: `channel`: a scale for each of the N columns; `tensor`: one; `group:g`: one for each g rows of
            each column.
        weight_range: `absmax` covers the whole range; `mse` searches the scale, and zero point, of the smallest
            squared error of rounding and saturation. Learned levels have that of themselves.
        scale: [..., G, N] or [..., 1, 1], where something else has found one.
        zero_point: likewise, for affine formats; needs `scale`.
        codebook: likewise [..., levels], for learned formats, in any order.

    Raises:
        RecipeError: if g does not divide K.
    """
    matrix = lax.stop_gradient(matrix.astype(jnp.float32))
    blocks = as_blocks(jnp.clip(matrix, -_COVERED, _COVERED), _group_count(matrix.shape[-2], granularity))
    axes = _shared_axes(granularity)
    if scale is None and target.kind == "affine":
        low = jnp.min(blocks, axes, keepdims=True, initial=0)
        high = jnp.max(blocks, axes, keepdims=True, initial=0)
        # Halves are exact and never overflow: one rounding, the same however a compiler fuses it.
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
        scaled = (blocks / block_scale).reshape((math.prod(lead), -1))
        levels = jax.vmap(lambda part: learn_levels(part, 2**target.bits))(scaled)
        codebook = levels.reshape((*lead, -1))
    elif codebook is not None:
        # Trained levels may pass each other. The one that is zero, as pruned weights are, has no gradient and stays.
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
    """The scale and zero point of the smallest squared error of rounding and saturation, as far as a search finds them.

    Shares of the scale that covers the range are tried (Choukroun et al. 2019, arXiv:1902.06822, section 3); then the
    best is fitted to its codes by least squares, and its codes to it, a few times. Errors are of values as they will be
    stored, with a scale that is rounded already, so that none is larger than that of the scale given.

    Args:
        blocks: float32 [..., G, K / G, N].
        scale: [..., G, 1, N] or [..., 1, 1, 1], settled.
        zero_point: likewise, for affine formats.
        target: a format whose levels are not learned.
        granularity: tells what shares a scale, and how a scale is stored.
    """
    axes = _shared_axes(granularity)
    unit = jnp.abs(scale)  # all sums are in it, so that none overflows or vanishes
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
    """Codes of a matrix [..., K, N] on a grid, not yet packed."""
    return _by_blocks(encode, matrix, grid, target)


def matrix_values(codes: jax.Array, grid: Grid, target: Format) -> jax.Array:
    """The float32 matrix [..., K, N] that codes stand for."""
    return _by_blocks(decode, codes, grid, target)


def encode(
    array: jax.Array,
    scale: jax.Array,
    target: Format,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
) -> jax.Array:
    """Codes of `array`, saturating.

    Args:
        array: float, any shape.
        scale: float32, broadcastable to `array`.
        target: the format.
        zero_point: broadcastable to `array`, for affine formats.
        codebook: float32 [..., levels] whose leading axes are those of `array`, for learned formats.

    Returns:
        Codes of the format's dtype, not packed.
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
    codes: jax.Array,
    scale: jax.Array,
    target: Format,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
) -> jax.Array:
    """The float32 values that codes stand for; arguments as `encode`'s."""
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
    """[..., K, N] as [..., G, K / G, N]."""
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
        raise RecipeError(f"granularity = 'group:{size}' does not divide the {rows} rows that are summed over")
    return rows // size if size else 1


def _usable(scale: jax.Array) -> jax.Array:
    """1 in the place of zero, and never less than the smallest normal number; a NaN stays one."""
    return jnp.where(scale == 0, jnp.float32(1), jnp.maximum(scale, _TINY))
