"""Factors that the weights they go into can hold.

A factor is multiplied into weights of some dtype and rounded there. It must push nothing over the largest number of
that dtype, nor a whole channel below its normal numbers. On floats of fewer than 32 bits it is a power of two, which
rounds nothing: a bfloat16 weight has eight bits, and two roundings of them are worse than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_xla.passes import matrix
from lepton_xla.passes.sites import LayoutOp, Site

if TYPE_CHECKING:
    from lepton_xla.passes.flow import Absorber
    from lepton_xla.passes.scaling import Group


def usable(factor: jax.Array, *, limit: float = 1e4) -> jax.Array:
    """A factor without what cannot be divided by: 1 for what is not finite or not positive, within limits."""
    safe = jnp.where(jnp.isfinite(factor) & (factor > 0), factor, jnp.ones_like(factor))
    return jnp.clip(safe, 1 / limit, limit)


def fitted(weights: Mapping[str, Any], sites: Mapping[str, Site], group: Group, factor: jax.Array) -> jax.Array:
    """The factor nearest to this one that all weights of a group hold.

    Args:
        weights: all weights, by path.
        sites: all products, by name.
        group: the group; its products are multiplied by the factor, what stands before them is divided by it.
        factor: `[*steps, channels]`, positive.

    Returns:
        Likewise; a power of two where a weight, or the activation between, has fewer bits than float32.
    """
    low, high = jnp.zeros_like(factor), jnp.full_like(factor, jnp.inf)
    narrow = any(_is_narrow(site.activation.dtype) for site in group.sites)
    for site in group.sites:
        dtypes = _dtypes(site, weights[str(site.path)])
        largest = row_absmax(site, weights[str(site.path)])
        low, high = jnp.maximum(low, _least(largest, dtypes)), jnp.minimum(high, _most(largest, dtypes))
        narrow = narrow or any(map(_is_narrow, dtypes))
    for absorber in group.absorbers:
        stored = weights[absorber.path]
        dtypes = _dtypes(sites[absorber.site], stored) if absorber.axis is not None else [stored.dtype]
        if absorber.axis is None:
            largest = jnp.reshape(jnp.abs(stored.astype(jnp.float32)), factor.shape)
        else:
            largest = column_absmax(sites[absorber.site], absorber, stored)
        # What is divided by the factor holds the inverse of each bound.
        low = jnp.maximum(low, 1 / _most(largest, dtypes))
        high = jnp.minimum(high, 1 / _least(largest, dtypes))
        narrow = narrow or any(map(_is_narrow, dtypes))
    # A channel that is out of bounds already stays as it is.
    low, high = jnp.minimum(low, 1), jnp.maximum(high, 1)
    if not narrow:
        return jnp.clip(factor, low, high)
    return jnp.exp2(jnp.clip(jnp.round(jnp.log2(factor)), jnp.ceil(jnp.log2(low)), jnp.floor(jnp.log2(high))))


def row_absmax(site: Site, stored: jax.Array) -> jax.Array:
    """The largest magnitude that each input channel of a product meets in its weight: `[*steps, channels]`."""
    rows = jnp.max(jnp.abs(matrix.stored_matrix(site, stored).astype(jnp.float32)), axis=-1)
    reduced = matrix.input_channels(site, rows, jnp.max)
    return jnp.reshape(reduced, (*reduced.shape[:-2], -1))


def column_absmax(site: Site, absorber: Absorber, stored: jax.Array) -> jax.Array:
    """The largest magnitude of each output channel along the absorber's axis: `[*steps, channels]`."""
    matrices = matrix.stored_matrix(site, stored)
    assert absorber.axis is not None
    axes = tuple(axis for axis in range(len(site.weight.shape)) if axis != absorber.axis)

    def of_step(part: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(matrix.weight_operand(site, part).astype(jnp.float32)), axis=axes)

    return matrix.each_step(site, of_step)(matrices)


def multiplied(array: jax.Array, factor: jax.Array) -> jax.Array:
    """An array times a factor, multiplied in float32 or wider, in the array's own dtype."""
    wide = wider(array.dtype)
    return (array.astype(wide) * factor.astype(wide)).astype(array.dtype)


def wider(*dtypes: Any) -> Any:
    """The widest of these dtypes and float32."""
    return max((jnp.dtype("float32"), *map(jnp.dtype, dtypes)), key=lambda dtype: dtype.itemsize)


def _dtypes(site: Site, stored: Any) -> list[Any]:
    """The dtypes that a weight has from where it is stored to its product."""
    return [stored.dtype, *(op.eqn.outvars[op.output].aval.dtype for op in site.layout if isinstance(op, LayoutOp))]


def _is_narrow(dtype: Any) -> bool:
    return jnp.finfo(dtype).bits < 32


def _most(largest: jax.Array, dtypes: Sequence[Any]) -> jax.Array:
    """What a channel of this magnitude can be multiplied by; half of the largest number is left for rounding."""
    top = min(float(jnp.finfo(dtype).max) for dtype in dtypes) / 2
    return jnp.where(largest > 0, top / largest, jnp.inf)


def _least(largest: jax.Array, dtypes: Sequence[Any]) -> jax.Array:
    bottom = max(float(jnp.finfo(dtype).tiny) for dtype in dtypes)
    return jnp.where(largest > 0, bottom / largest, 0.0)
