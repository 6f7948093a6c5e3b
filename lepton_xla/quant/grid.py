"""Where the values lie that a format can hold: scales, zero points and levels, and rounding to them.

One rounding rule is used everywhere, in training, calibration and the lowered program: nearest code, ties to even,
saturating. So a fake-quantized and a lowered model differ by float rounding of their products only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.errors import RecipeError
from lepton_xla.quant.codebook import learn_levels, nearest_level
from lepton_xla.quant.formats import FORMATS, Format

_TINY = np.finfo(np.float32).tiny
_BFLOAT16_MAX = np.float32(jnp.finfo(jnp.bfloat16).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """What the codes of a matrix [..., K, N] stand for.

    Attributes:
        scale: float32, or bfloat16 for groups: [..., G, N], one for each of G groups of rows; [..., 1, 1] for one.
        zero_point: uint8 like `scale`, the code of zero, for affine formats; else None.
        codebook: float32 [..., levels], ascending, for learned formats; else None.
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None


def group_size(granularity: str) -> int:
    """Rows that share a scale for `group:g`, else 0."""
    return int(granularity.removeprefix("group:")) if granularity.startswith("group:") else 0


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
    scale = jnp.maximum(scale.astype(jnp.float32), _TINY)
    if not group_size(granularity):
        return scale
    # Not a cast there and back, which XLA may drop.
    return lax.reduce_precision(jnp.minimum(scale, _BFLOAT16_MAX), exponent_bits=8, mantissa_bits=7)


def make_grid(
    matrix: jax.Array,
    target: Format,
    granularity: str,
    *,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
) -> Grid:
    """The grid that covers a matrix's whole range, in the parts that are not given.

    Args:
        matrix: float [..., K, N]; leading axes have grids of their own.
        target: the format.
        granularity: `channel`: a scale for each of the N columns; `tensor`: one; `group:g`: one for each g rows of
            each column.
        scale: [..., G, N] or [..., 1, 1], where something else has found one.
        zero_point: likewise, for affine formats; needs `scale`.
        codebook: likewise [..., levels], for learned formats.

    Raises:
        RecipeError: if g does not divide K.
    """
    matrix = lax.stop_gradient(matrix.astype(jnp.float32))
    blocks = as_blocks(matrix, _group_count(matrix.shape[-2], granularity))
    axes = (-3, -2, -1) if granularity == "tensor" else (-2,)
    if scale is None and target.kind == "affine":
        low = jnp.min(blocks, axes, keepdims=True, initial=0)
        high = jnp.max(blocks, axes, keepdims=True, initial=0)
        # Halves are exact and never overflow: one rounding, the same however a compiler fuses it.
        block_scale = settle(_usable((high * 0.5 - low * 0.5) * np.float32(2 / target.largest)), granularity)
        zero_point = jnp.clip(jnp.round(-low / block_scale), 0, target.largest).astype(target.dtype)[..., :, 0, :]
    elif scale is None:
        block_scale = settle(absmax_scale(magnitude(blocks, axes), target), granularity)
    else:
        block_scale = settle(scale, granularity)[..., :, None, :]
    if target.learned and codebook is None:
        lead = matrix.shape[:-2]
        scaled = (blocks / block_scale).reshape((math.prod(lead), -1))
        levels = jax.vmap(lambda part: learn_levels(part, 2**target.bits))(scaled)
        codebook = levels.reshape((*lead, -1))
    stored = block_scale[..., :, 0, :].astype(jnp.bfloat16 if group_size(granularity) else jnp.float32)
    return Grid(stored, zero_point if target.kind == "affine" else None, codebook if target.learned else None)


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
        return jnp.clip(jnp.round(scaled), -target.largest, target.largest).astype(target.dtype)
    if target.kind == "affine":
        assert zero_point is not None
        codes = jnp.round(scaled) + zero_point.astype(jnp.float32)
        return jnp.clip(codes, 0, target.largest).astype(target.dtype)
    if target.kind == "float":
        return jnp.clip(scaled, -target.largest, target.largest).astype(target.dtype)
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


def _group_count(rows: int, granularity: str) -> int:
    size = group_size(granularity)
    if size and rows % size:
        raise RecipeError(f"granularity = 'group:{size}' does not divide the {rows} rows that are summed over")
    return rows // size if size else 1


def _usable(scale: jax.Array) -> jax.Array:
    """1 in the place of zero, and never less than the smallest normal number; a NaN stays one."""
    return jnp.where(scale == 0, jnp.float32(1), jnp.maximum(scale, _TINY))


def get_format(name: str) -> Format:
    """The format of this name.

    Raises:
        RecipeError: if there is none.
    """
    if name not in FORMATS:
        raise RecipeError(f"there is no number format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
