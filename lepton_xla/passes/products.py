"""The arithmetic of a site with a weight: which axes share a scale, and the product in float and in int8.

Used by every pass that quantizes, so that what is trained and what is compiled are the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla import _compat
from lepton_xla.errors import CalibrationError
from lepton_xla.passes.sites import LayoutOp, Site, Tracked, layout_key
from lepton_xla.quant import FORMATS, QTensor, absmax_scale, encode, magnitude, quantize

if TYPE_CHECKING:
    from lepton_xla.recipe import QuantizeRule


def unsupported(site: Site) -> str | None:
    """Why the site cannot be quantized, or None if it can."""
    if site.weight_operand is None:
        return f"{site.kind} of two activations"
    if site.kind == "dot_general":
        return _float_reason(site)
    if site.kind == "conv_general_dilated":
        if site.weight_operand != 1:
            return "convolution whose weight is the left operand"
        if site.params["batch_group_count"] != 1:
            return "convolution with batch groups"
        return _float_reason(site)
    return f"{site.kind} is not lowered"


def unstorable(sites: Sequence[Site]) -> str | None:
    """Why the weight that these sites share cannot be stored as an integer, or None if it can."""
    first = sites[0]
    for site in sites:
        if not site.exclusive:
            return "its weight is also used where no product is"
        if _compat.is_manual(site.eqn):
            return "it is inside shard_map, where the weight is one shard"
        if layout_key(site.layout) != layout_key(first.layout) or site.params.get("dimension_numbers") != (
            first.params.get("dimension_numbers")
        ):
            return f"its weight is used in another layout at {first.name!r}"
        if any(op.resizes for op in site.layout if isinstance(op, LayoutOp)):
            return "its weight is broadcast or cut before use"
    return None


def _float_reason(site: Site) -> str | None:
    if not jnp.issubdtype(site.weight.dtype, jnp.floating):
        return f"its weight is {site.weight.dtype} already"
    if not jnp.issubdtype(site.activation.dtype, jnp.floating):
        return f"its activation is {site.activation.dtype}"
    return None


@dataclasses.dataclass(frozen=True)
class _Dims:
    """Axes of both operands of a dot_general, by role."""

    act_contract: tuple[int, ...]
    act_batch: tuple[int, ...]
    act_free: tuple[int, ...]
    weight_contract: tuple[int, ...]
    weight_batch: tuple[int, ...]
    weight_free: tuple[int, ...]


def _dims(site: Site) -> _Dims:
    (contract, batch) = site.params["dimension_numbers"]
    weight = site.weight_operand
    assert weight is not None
    act = 1 - weight
    free = [
        tuple(axis for axis in range(len(site.operands[k].shape)) if axis not in (*contract[k], *batch[k]))
        for k in range(2)
    ]
    return _Dims(
        tuple(contract[act]), tuple(batch[act]), free[act], tuple(contract[weight]), tuple(batch[weight]), free[weight]
    )


def weight_axes(site: Site, granularity: str) -> tuple[int, ...] | None:
    """Axes of the weight operand that share a scale: all but the output channels, or all (None) per tensor."""
    if granularity == "tensor":
        return tuple(range(len(site.weight.shape)))
    if site.kind == "dot_general":
        return _dims(site).weight_contract
    out_channel = site.params["dimension_numbers"].rhs_spec[0]
    return tuple(axis for axis in range(len(site.weight.shape)) if axis != out_channel)


def activation_axes(site: Site) -> tuple[int, ...]:
    """Axes of the activation operand that share a dynamic scale: one scale a row (dot) or an example (convolution)."""
    if site.kind == "dot_general":
        return _dims(site).act_contract
    batch = site.params["dimension_numbers"].lhs_spec[0]
    return tuple(axis for axis in range(len(site.activation.shape)) if axis != batch)


def activation_scale(site: Site, activation: jax.Array, name: str, absmax: jax.Array | None) -> jax.Array:
    """The activation's scale, broadcastable to it: static from a calibrated `absmax`, else dynamic."""
    if absmax is not None:
        return absmax_scale(jnp.reshape(absmax, (1,) * activation.ndim), FORMATS[name])
    return absmax_scale(magnitude(activation, activation_axes(site)), FORMATS[name])


def row_count(site: Site) -> Any:
    """How many rows of activations one product takes; 0 where rows are not the unit (a convolution)."""
    if site.kind != "dot_general":
        return 0
    return _product(site.activation.shape[axis] for axis in _dims(site).act_free)


def store(site: Site, weight: jax.Array, name: str, granularity: str) -> QTensor:
    """Quantizes a weight and lays it out for the fast path.

    Args:
        site: the site, as found.
        weight: the operand as the site sees it (one step of a stack; `vmap` over stacked axes).
        name: the format.
        granularity: `channel` or `tensor`.

    Returns:
        For a dot, codes `[batch..., K, N]`, row-major with the contracted axes first, so that no transpose is left at
        run time, and scale `[batch..., 1, N]`. For a convolution the operand's own layout.
    """
    quantized = quantize(weight, name, weight_axes(site, granularity))
    if site.kind != "dot_general":
        return quantized
    dims = _dims(site)
    scale = jnp.broadcast_to(
        quantized.scale, [1 if k in dims.weight_contract else size for k, size in enumerate(weight.shape)]
    )
    return QTensor(_matrix(quantized.values, dims), _matrix(scale, dims), name)


def _matrix(array: jax.Array, dims: _Dims) -> jax.Array:
    batch = tuple(array.shape[axis] for axis in dims.weight_batch)
    moved = jnp.transpose(array, (*dims.weight_batch, *dims.weight_contract, *dims.weight_free))
    rows = _product(array.shape[axis] for axis in dims.weight_contract)
    return jnp.reshape(moved, (*batch, rows, _product(array.shape[axis] for axis in dims.weight_free)))


def restore(site: Site, stored: QTensor) -> jax.Array:
    """The float weight operand that a stored weight stands for, in the layout and dtype the site's primitive takes."""
    weight = stored.dequantize(site.weight.dtype)
    if site.kind != "dot_general":
        return weight
    dims = _dims(site)
    order = (*dims.weight_batch, *dims.weight_contract, *dims.weight_free)
    inverse = [order.index(axis) for axis in range(len(order))]
    return jnp.transpose(jnp.reshape(weight, [site.weight.shape[axis] for axis in order]), inverse)


def integer_product(
    site: Site, activation: jax.Array, stored: QTensor, absmax: jax.Array | None, *, pad_single: bool
) -> jax.Array:
    """The site's product in int8, accumulated in int32, rescaled after.

    Args:
        site: the site, with the operands' shapes as they are here.
        activation: the float operand.
        stored: the weight, as `store` made it.
        absmax: the calibrated range for static scales, or None for dynamic ones.
        pad_single: whether a single row is padded to two, since one row misses XLA's int8 kernels on CPU.
    """
    scale = activation_scale(site, activation, stored.format, absmax)
    codes = encode(activation, scale, FORMATS[stored.format])
    if site.kind == "conv_general_dilated":
        return _convolve(site, codes, scale, stored).astype(site.output.dtype)
    return _multiply(site, codes, scale, stored, pad_single).astype(site.output.dtype)


def _multiply(site: Site, codes: jax.Array, scale: jax.Array, stored: QTensor, pad_single: bool) -> jax.Array:
    dims = _dims(site)
    batch = tuple(codes.shape[axis] for axis in dims.act_batch)
    rows = tuple(codes.shape[axis] for axis in dims.act_free)
    order = (*dims.act_batch, *dims.act_free, *dims.act_contract)
    depth = _product(codes.shape[axis] for axis in dims.act_contract)
    count = _product(rows)
    left = jnp.reshape(jnp.transpose(codes, order), (*batch, count, depth))
    single = pad_single and isinstance(count, int) and count == 1
    if single:
        left = jnp.concatenate([left, jnp.zeros_like(left)], axis=-2)
    lead = tuple(range(len(batch)))
    numbers = (((left.ndim - 1,), (left.ndim - 2,)), (lead, lead))
    out = lax.dot_general(left, stored.values, numbers, preferred_element_type=jnp.int32)
    out = out[..., :1, :] if single else out
    row_shape = tuple(1 if scale.shape[axis] == 1 else size for axis, size in zip(dims.act_free, rows, strict=True))
    row_scale = jnp.reshape(
        jnp.transpose(scale, order), (*(scale.shape[axis] for axis in dims.act_batch), _product(row_shape), 1)
    )
    out = out.astype(jnp.float32) * (row_scale * stored.scale)
    columns = tuple(site.weight.shape[axis] for axis in dims.weight_free)
    out = jnp.reshape(out, (*batch, *rows, *columns))
    if site.weight_operand == 0:  # the primitive puts the left operand's free axes first
        lead_axes = len(batch)
        moved = (
            *range(lead_axes),
            *range(lead_axes + len(rows), out.ndim),
            *range(lead_axes, lead_axes + len(rows)),
        )
        out = jnp.transpose(out, moved)
    return out


def _convolve(site: Site, codes: jax.Array, scale: jax.Array, stored: QTensor) -> jax.Array:
    params = site.params
    numbers = params["dimension_numbers"]
    out = lax.conv_general_dilated(
        codes,
        stored.values,
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
    per_channel[numbers.out_spec[1]] = stored.scale.shape[numbers.rhs_spec[0]]
    factor = jnp.reshape(scale, per_example) * jnp.reshape(stored.scale, per_channel)
    return out.astype(jnp.float32) * factor


def _product(sizes: Any) -> Any:
    """Product that keeps symbolic sizes symbolic."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def static_range(site: Site, decision: QuantizeRule, weight: Any) -> jax.Array | None:
    """The calibrated range that travels beside a site's weight; None where scales are dynamic.

    Raises:
        CalibrationError: if the site is static and has none.
    """
    if decision.dynamic:
        return None
    return range_of(site, weight.beside if isinstance(weight, Tracked) else None)


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


def ranges_beside(sites: Iterable[Site], ranges: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Calibrated ranges by weight path and site name, as `rewrite_sites` takes them."""
    grouped: dict[str, dict[str, jax.Array]] = {}
    for site in sites:
        if site.path is not None and site.name in ranges:
            grouped.setdefault(site.path, {})[site.name] = ranges[site.name]
    return grouped
