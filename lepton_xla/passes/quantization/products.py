"""Quantized arithmetic of a site: which axes share a scale, and the product of codes.

Every pass that quantizes uses this module, so that training and the compiled program compute the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla import _compat
from lepton_xla.errors import CalibrationError
from lepton_xla.kernels import convolution, integer_product, weight_only
from lepton_xla.kernels.integer_product import SAFE_DEPTH
from lepton_xla.passes.alternatives import convolving, shifted
from lepton_xla.passes.core.matrix import code_matrix, code_operand, operand_order, weight_order
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.tracking import Tracked
from lepton_xla.quant import FORMATS, QTensor, absmax_scale, encode, magnitude, quantize
from lepton_xla.recipe import QuantizeRule

# Names of an activation's static range and trained scale.
RANGE, SCALE = "act_absmax", "act_scale"


# Platforms where, from this number of rows on, a library multiplies integers instead of a Triton kernel that also
# rescales.
LIBRARY_PLATFORMS = ("gpu",)
LIBRARY_ROWS = 1024
# With fewer than about 100 values in both matrices, XLA multiplies fp8 in float16 there, which overflows to NaN.
SAFE_FP8_VALUES = 256


def activation_axes(site: Site) -> tuple[int, ...]:
    """Axes of the activation operand that share a dynamic scale: one scale per row (dot) or example (convolution)."""
    if site.kind == "dot_general":
        assert site.weight_operand is not None
        return operand_order(site, 1 - site.weight_operand)[1]
    batch = site.params["dimension_numbers"].lhs_spec[0]
    return tuple(axis for axis in range(len(site.activation.shape)) if axis != batch)


def activation_scale(site: Site, activation: jax.Array, name: str, static: jax.Array | None) -> jax.Array:
    """The activation's scale, broadcastable to it: the static one if given, else a dynamic one."""
    if static is not None:
        return jnp.reshape(static, (1,) * activation.ndim)
    return absmax_scale(magnitude(activation, activation_axes(site)), FORMATS[name])


def as_weighted(site: Site) -> Site:
    """Treat the right operand of a product of two activations as a weight; a site with a weight is unchanged."""
    return site if site.weight_operand is not None else dataclasses.replace(site, weight_operand=1)


def pair_scales(site: Site, left: jax.Array, right: jax.Array, name: str) -> list[jax.Array]:
    """Dynamic scales of both operands of a product of two activations, each broadcastable to its operand.

    One for each row of the left and each column of the right operand, over the contracted axes, masked positions
    included.
    """
    contract, _ = site.params["dimension_numbers"]
    operands = zip((left, right), contract, strict=True)
    return [absmax_scale(magnitude(operand, axes), FORMATS[name]) for operand, axes in operands]


def row_count(site: Site) -> Any:
    """Number of rows of activations of a product; 0 for a convolution."""
    if site.kind != "dot_general":
        return 0
    site = as_weighted(site)
    assert site.weight_operand is not None
    return _product(site.activation.shape[axis] for axis in operand_order(site, 1 - site.weight_operand)[2])


def store(
    site: Site,
    weight: jax.Array,
    name: str,
    granularity: str,
    given: Mapping[str, jax.Array] | None = None,
    weight_range: str = "absmax",
) -> QTensor:
    """Quantize a weight and lay it out for the product of codes.

    Args:
        site: the site, as found.
        weight: the operand as the site sees it (one step of a stack; `vmap` over stacked axes).
        name: the format.
        granularity: `channel`, `tensor` or `group:g`.
        given: parts of the grid that another pass has found: `scale`, `zero_point`, `codebook`.
        weight_range: how to choose a scale that is not given: `absmax` or `mse`.

    Returns:
        A matrix `[batch..., K, N]`, row-major.
    """
    return quantize(code_matrix(site, weight), name, granularity, weight_range, **(given or {}))


def for_product(stored: QTensor) -> QTensor:
    """Lay out the stored weight of a `dot_general` of codes: column-major, unless its codes are packed."""
    return stored.by_columns() if FORMATS[stored.format].bits == 8 else stored


def restore(site: Site, stored: QTensor) -> jax.Array:
    """Dequantize a stored weight to the float operand, in the layout and dtype of the site's primitive."""
    return code_operand(site, stored.dequantize(site.weight.dtype))


def weight_only_dot(site: Site, activation: jax.Array, stored: QTensor) -> jax.Array:
    """The product of a float activation and a stored weight by a kernel, which reads no more than the codes.

    Args:
        site: a `dot_general` without batch axes, with the shapes of these operands.
        activation: the float operand.
        stored: the weight, row-major, in a format that the kernel has.
    """
    matrix, rows = _as_rows(site, activation)
    return _as_output(site, weight_only.multiply(matrix, stored), (), rows).astype(site.output.dtype)


def kernel_dot(site: Site, activation: jax.Array, stored: QTensor, static: jax.Array | None) -> jax.Array:
    """As `quantized_dot`, by a kernel that rounds, multiplies and scales in one go.

    Args:
        site: a `dot_general` without batch axes, or a convolution that `convolving` has a geometry for, with the
            shapes of these operands.
        activation: the float operand.
        stored: the int8 weight, column-major; of a convolution row-major.
        static: the activation's scale, or None for dynamic ones.
    """
    if site.kind == "conv_general_dilated":
        geometry = convolving.geometry_of(site.params, *site.operands)
        assert geometry is not None
        out = convolution.convolve_codes(activation.astype(jnp.float32), stored, geometry, static)
        return out.astype(site.output.dtype)
    matrix, rows = _as_rows(site, activation)
    return _as_output(site, integer_product.multiply(matrix, stored, static), (), rows).astype(site.output.dtype)


def _as_rows(site: Site, activation: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    """The activation of a `dot_general` without batch axes as float32 [M, K], and the axes that M is the product of."""
    assert site.weight_operand is not None
    _, contracted, free = operand_order(site, 1 - site.weight_operand)
    rows = tuple(activation.shape[axis] for axis in free)
    depth = _product(activation.shape[axis] for axis in contracted)
    matrix = jnp.reshape(jnp.transpose(activation, (*free, *contracted)), (_product(rows), depth))
    return matrix.astype(jnp.float32), rows


def look_up(site: Site, stored: QTensor, index: jax.Array) -> jax.Array:
    """Look up rows of a stored table; only these are dequantized.

    Args:
        site: a `gather` of whole rows.
        stored: the table [V, D] as the matrix [D, V].
        index: indices of the gather: [..., 1], or [..., 2] if it also indexes columns, of which it takes all.

    Returns:
        The result of the gather, also for indices outside of the table.
    """
    params, size = site.params, site.weight.shape[0]
    numbers = params["dimension_numbers"]
    at = {axis: index[..., place].astype(jnp.int32) for place, axis in enumerate(numbers.start_index_map)}
    rows = at[0]
    clipped = jnp.clip(rows, 0, size - 1)
    found = stored.columns(jnp.reshape(clipped, (-1,))).dequantize(site.weight.dtype)
    found = jnp.reshape(found, (found.shape[0], *rows.shape))
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = params["fill_value"]
        fill = jnp.asarray(jnp.nan if fill is None else fill, found.dtype)
        inside = rows == clipped
        if 1 in at:  # all columns are taken, so only index 0 is valid
            inside &= at[1] == 0
        found = jnp.where(inside[None], found, fill)
    if numbers.collapsed_slice_dims:
        return jnp.moveaxis(found, 0, numbers.offset_dims[0])
    kept, columns = numbers.offset_dims  # ascending, like the table's axes
    return jnp.expand_dims(jnp.moveaxis(found, 0, columns - 1), kept)


def quantized_dot(
    site: Site,
    activation: jax.Array,
    stored: QTensor,
    name: str,
    static: jax.Array | None,
    *,
    pad_single: bool,
    target: Target,
) -> jax.Array:
    """The site's quantized product: integers accumulate in int32, fp8 in float32; scales are applied afterwards.

    Args:
        site: the site, with the shapes of these operands.
        activation: the float operand.
        stored: the weight, row-major or column-major, with one scale per channel or tensor.
        name: the activation's format, of the same kind as the weight's.
        static: the activation's scale, or None for dynamic ones.
        pad_single: whether to pad a single row to two, because XLA's int8 kernels on the CPU need two.
        target: where it will run.
    """
    scale = activation_scale(site, activation, name, static)
    codes = encode(activation, scale, FORMATS[name])
    if site.kind == "conv_general_dilated":
        return _convolve(site, codes, scale, stored).astype(site.output.dtype)
    weight = (stored.values, -1) if stored.transposed else (stored.codes(), -2)
    return _multiply(site, codes, scale, *weight, stored.scale, pad_single, target).astype(site.output.dtype)


def quantized_dot_pair(
    site: Site, left: jax.Array, right: jax.Array, name: str, *, pad_single: bool, target: Target
) -> jax.Array:
    """The quantized product of two activations, both with dynamic scales.

    Args:
        site: a `dot_general` of two activations, with the shapes of these operands.
        left, right: the float operands.
        name: the format of both.
        pad_single, target: as in `quantized_dot`.
    """
    weighted, form = as_weighted(site), FORMATS[name]
    scale, _ = pair_scales(site, left, right, name)
    # Transpose the right operand before rounding, because XLA does not fuse a transpose of codes.
    matrix = code_matrix(weighted, right)
    columns = absmax_scale(magnitude(matrix, (-2,)), form)
    codes = encode(left, scale, form), encode(matrix, columns, form)
    return _multiply(weighted, codes[0], scale, codes[1], -2, columns, pad_single, target).astype(site.output.dtype)


def code_order(site: Site) -> tuple[int, int] | None:
    """The order of operands in which the product of codes is fast; None if float is faster on a CPU.

    XLA's integer kernels need the first operand contracted over its last axes; otherwise they take ten times as long.
    """
    contract, _ = site.params["dimension_numbers"]
    ranks = [len(operand.shape) for operand in site.operands]
    last = [sorted(axes) == list(range(rank - len(axes), rank)) for axes, rank in zip(contract, ranks, strict=True)]
    if last[0]:
        return (0, 1)
    # A requested sharding refers to the result in its original order.
    return (1, 0) if last[1] and site.params["out_sharding"] is None else None


def multiply_in_place(
    site: Site, codes: Sequence[jax.Array], scales: Sequence[jax.Array], order: tuple[int, int]
) -> jax.Array:
    """A `dot_general` of codes in the original layout of the operands: for training, and any sharding.

    Args:
        site: the `dot_general`, of a weight or of two activations.
        codes: codes of the left and the right operand, integers whose products fit into int32 sums.
        scales: their scales, float32, broadcastable to the operands, of size 1 along contracted axes.
        order: from `code_order`.

    Returns:
        The same numbers as `quantized_dot`: integers are exact, and the result is scaled once by the product of both
        scales.
    """
    contract, batch = site.params["dimension_numbers"]
    numbers = tuple(tuple(axes[side] for side in order) for axes in (contract, batch))
    changes = {"dimension_numbers": numbers, "preferred_element_type": jnp.dtype("int32"), "precision": None}
    operands = [_deepened(codes[side], contract[side]) for side in order]
    (total,) = _compat.bind(site.eqn, operands, **changes)
    if order == (1, 0):
        lead, split = len(batch[0]), total.ndim - (len(site.operands[0].shape) - len(contract[0]) - len(batch[0]))
        total = jnp.transpose(total, (*range(lead), *range(split, total.ndim), *range(lead, split)))
    left, right = (_at_output(site, scale, side) for side, scale in enumerate(scales))
    return (total.astype(jnp.float32) * (left * right)).astype(site.output.dtype)


def _at_output(site: Site, scale: jax.Array, side: int) -> jax.Array:
    """Reshape an operand's scale for broadcasting to the result, whose axes are batch, left and right."""
    batch, contract, free = operand_order(site, side)
    kept = (*batch, *free)
    own = jnp.squeeze(jnp.transpose(scale, (*kept, *contract)), tuple(range(len(kept), scale.ndim)))
    first = own.ndim if side == 0 else len(batch)
    return jnp.expand_dims(own, tuple(range(first, first + len(operand_order(site, 1 - side)[2]))))


def _multiply(
    site: Site,
    codes: jax.Array,
    scale: jax.Array,
    matrix: jax.Array,
    summed: int,
    columns_scale: jax.Array,
    pad_single: bool,
    target: Target,
) -> jax.Array:
    """Multiply codes of activations by those of a weight with K at axis `summed` and scales `[batch..., 1, N or 1]`."""
    assert site.weight_operand is not None
    batch_axes, contracted, free = operand_order(site, 1 - site.weight_operand)
    batch = tuple(codes.shape[axis] for axis in batch_axes)
    rows = tuple(codes.shape[axis] for axis in free)
    order = (*batch_axes, *free, *contracted)
    depth = _product(codes.shape[axis] for axis in contracted)
    count = _product(rows)
    left = jnp.reshape(jnp.transpose(codes, order), (*batch, count, depth))
    single = pad_single and isinstance(count, int) and count == 1
    if single:
        left = jnp.concatenate([left, jnp.zeros_like(left)], axis=-2)
    lead = tuple(range(len(batch)))
    contract = ((left.ndim - 1,), (left.ndim + summed,))
    numbers = (contract, (lead, lead))
    if jnp.issubdtype(codes.dtype, jnp.integer):
        left, matrix = (_deepened(operand, axes) for operand, axes in zip((left, matrix), contract, strict=True))
        out = lax.dot_general(left, matrix, numbers, preferred_element_type=jnp.int32)
        if target.platform in LIBRARY_PLATFORMS and isinstance(count, int) and count >= LIBRARY_ROWS:
            # Without the barrier XLA fuses the following conversion into a Triton kernel; if it then uses a library
            # kernel instead, the conversion remains as a pass of its own (4096 cubed: 190 us instead of 153).
            out = lax.optimization_barrier(out)
    else:
        out = _float_product(left, matrix, numbers, site.output.dtype)
    out = out[..., :1, :] if single else out
    row_shape = tuple(1 if scale.shape[axis] == 1 else size for axis, size in zip(free, rows, strict=True))
    row_scale = jnp.reshape(
        jnp.transpose(scale, order), (*(scale.shape[axis] for axis in batch_axes), _product(row_shape), 1)
    )
    return _as_output(site, out.astype(jnp.float32) * (row_scale * columns_scale), batch, rows)


def _as_output(site: Site, out: jax.Array, batch: tuple[Any, ...], rows: tuple[Any, ...]) -> jax.Array:
    """Give a product [*batch, M, N] the axes of the site's result; M is the product of `rows`."""
    columns = tuple(site.weight.shape[axis] for axis in weight_order(site)[2])
    out = jnp.reshape(out, (*batch, *rows, *columns))
    if site.weight_operand == 0:  # the primitive puts the left operand's free axes first
        first = len(batch)
        out = jnp.moveaxis(out, range(first, first + len(rows)), range(out.ndim - len(rows), out.ndim))
    return out


def _deepened(codes: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Pad integer codes with zeros along the first contracted axis, to a sum over at least `SAFE_DEPTH` elements.

    On all platforms, because a program may be exported on one and run on another. A symbolic length gets enough zeros
    for any size.
    """
    if not axes:
        return codes
    size, others = codes.shape[axes[0]], _product(codes.shape[axis] for axis in axes[1:])
    if not isinstance(others, int):
        others = 1
    added = max(0, -(-SAFE_DEPTH // max(1, others)) - size) if isinstance(size, int) else SAFE_DEPTH - 1
    if not added:
        return codes
    widths = [(0, added if axis == axes[0] else 0) for axis in range(codes.ndim)]
    return jnp.pad(codes, widths)


def _float_product(left: jax.Array, right: jax.Array, numbers: Any, dtype: jnp.dtype) -> jax.Array:
    """The product of fp8 matrices `[..., M, K]` and `[..., K, N]` or `[..., N, K]`, correct at every size.

    If they are, or may be, smaller than `SAFE_FP8_VALUES`, they are converted to bfloat16, which represents the same
    numbers. A bfloat16 model gets a bfloat16 result: sums are float32 anyway, and half the bytes are written.
    """
    values = sum(math.prod(size for size in codes.shape[-2:] if isinstance(size, int)) for codes in (left, right))
    if values < SAFE_FP8_VALUES:
        # Without the barrier XLA may skip the rounding to fp8, because it may keep excess precision.
        left, right = (codes.astype(jnp.bfloat16) for codes in lax.optimization_barrier((left, right)))
        return lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)
    accumulator = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    return lax.dot_general(left, right, numbers, preferred_element_type=accumulator)


def _convolve(site: Site, codes: jax.Array, scale: jax.Array, stored: QTensor) -> jax.Array:
    params = site.params
    numbers = params["dimension_numbers"]
    # The codes stay a matrix of (positions, input channels) by output channels.
    window = len(numbers.rhs_spec) - 2
    matrix_spec = (window + 1, window, *range(window))
    shape = [site.weight.shape[axis] for axis in (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])]
    depthwise = site.weight.shape[numbers.rhs_spec[1]] == 1 and shifted.fits(site.eqn)
    numbers = lax.ConvDimensionNumbers(numbers.lhs_spec, matrix_spec, numbers.out_spec)
    kernel = jnp.reshape(stored.codes(), shape)
    if depthwise:  # XLA:CPU is slow at these in float, and several times slower in integers
        out = shifted.convolve({**params, "dimension_numbers": numbers}, codes, kernel, jnp.int32)
    else:
        out = lax.conv_general_dilated(
            codes,
            kernel,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=numbers,
            feature_group_count=params["feature_group_count"],
            preferred_element_type=jnp.int32,
        )
    per_example = [1] * out.ndim
    per_example[numbers.out_spec[0]] = scale.shape[numbers.lhs_spec[0]]
    per_channel = [1] * out.ndim
    per_channel[numbers.out_spec[1]] = stored.scale.shape[-1]
    factor = jnp.reshape(scale, per_example) * jnp.reshape(stored.scale, per_channel)
    return out.astype(jnp.float32) * factor


def _product(sizes: Any) -> Any:
    """Product that keeps symbolic sizes symbolic."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def static_scale(site: Site, decision: QuantizeRule, weight: Any) -> jax.Array | None:
    """The static activation scale from the side inputs of a site's weight, given as a scale or a range; None if
    dynamic.

    Raises:
        CalibrationError: if the site is static and has none.
    """
    side_inputs = weight.side_inputs if isinstance(weight, Tracked) else {}
    if (site.name, SCALE) in side_inputs:
        return side_inputs[site.name, SCALE]
    if decision.dynamic:
        return None
    found = side_inputs.get((site.name, RANGE))
    return absmax_scale(range_of(site, {} if found is None else {site.name: found}), FORMATS[decision.activations])


def range_of(site: Site, ranges: Mapping[str, jax.Array] | None) -> jax.Array:
    """A static site's calibrated range.

    Raises:
        CalibrationError: if it has none.
    """
    if ranges is None or site.name not in ranges:
        raise CalibrationError(
            f"site {site.name!r} has static activation scales (dynamic = false), which need calibration data"
        )
    return ranges[site.name]


def arrange_side_inputs(sites: Iterable[Site], arrays: Mapping[Key, jax.Array]) -> dict[str, dict[Key, jax.Array]]:
    """Arrange arrays of sites by the path of their weight, as side inputs for `rewrite_sites`."""
    paths = {site.name: site.path for site in sites}
    grouped: dict[str, dict[Key, jax.Array]] = {}
    for key, array in arrays.items():
        if (path := paths.get(key[0])) is not None:
            grouped.setdefault(path, {})[key] = array
    return grouped
