"""Limits factors to what the weights that absorb them can represent.

A factor is multiplied into weights of some dtype and rounded there. It must not overflow that dtype, nor push a whole
channel below its normal numbers. In floats of fewer than 32 bits it is a power of two, which rounds nothing: a bfloat16
weight has only eight bits, and a second rounding would add error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.dtypes import wider
from lepton_xla.passes.core.flow import Absorber
from lepton_xla.passes.core.layouts import LayoutOp
from lepton_xla.passes.core.sites import Site


@dataclasses.dataclass(frozen=True)
class FactorGroup:
    """Products that share an activation, and therefore its factors.

    Attributes:
        sites: the products; their weights are multiplied by the factor.
        absorbers: preceding weights that are divided by it; empty if the activation is multiplied instead.
        reason: why the activation is multiplied; empty if it is not.
    """

    sites: tuple[Site, ...]
    absorbers: tuple[Absorber, ...] = ()
    reason: str = ""


def usable(factor: jax.Array, *, limit: float = 1e4) -> jax.Array:
    """Make a factor safe to divide by: 1 where it is not finite or not positive, clipped to limits.

    >>> usable(jnp.array([2.0, 0.0, jnp.inf])).tolist()
    [2.0, 1.0, 1.0]
    """
    safe = jnp.where(jnp.isfinite(factor) & (factor > 0), factor, jnp.ones_like(factor))
    return jnp.clip(safe, 1 / limit, limit)


def fitted(weights: Mapping[str, Any], sites: Mapping[str, Site], group: FactorGroup, factor: jax.Array) -> jax.Array:
    """The nearest factor that all weights of a group can represent.

    Args:
        weights: all weights, by path.
        sites: all products, by name.
        group: the group; its products are multiplied by the factor, its absorbers divided by it.
        factor: `[*steps, channels]`, positive.

    Returns:
        `[*steps, channels]`; powers of two if a weight, or the activation between, has fewer bits than float32.
    """
    before = tuple((None if a.axis is None else Alike(sites[a.site]), a.axis) for a in group.absorbers)
    return _fitted(
        factor,
        [weights[str(site.path)] for site in group.sites],
        [weights[absorber.path] for absorber in group.absorbers],
        tuple(Alike(site) for site in group.sites),
        before,
    )


@functools.partial(jax.jit, static_argnames=("products", "before"))
def _fitted(
    factor: jax.Array,
    stored: Sequence[jax.Array],
    stored_before: Sequence[jax.Array],
    products: tuple[Alike, ...],
    before: tuple[tuple[Alike | None, int | None], ...],
) -> jax.Array:
    low, high = jnp.zeros_like(factor), jnp.full_like(factor, jnp.inf)
    narrow = any(_is_narrow(like.site.activation.dtype) for like in products)
    for like, weight in zip(products, stored, strict=True):
        dtypes = _dtypes(like.site, weight)
        largest = row_absmax(like.site, weight)
        low, high = jnp.maximum(low, _least(largest, dtypes)), jnp.minimum(high, _most(largest, dtypes))
        narrow = narrow or any(map(_is_narrow, dtypes))
    for (like, axis), weight in zip(before, stored_before, strict=True):
        if like is None or axis is None:
            dtypes = [weight.dtype]
            largest = jnp.reshape(jnp.abs(weight.astype(jnp.float32)), factor.shape)
        else:
            dtypes = _dtypes(like.site, weight)
            largest = _column_absmax(weight, like, axis)
        # Absorbers are divided by the factor, so their bounds are inverted.
        low = jnp.maximum(low, 1 / _most(largest, dtypes))
        high = jnp.minimum(high, 1 / _least(largest, dtypes))
        narrow = narrow or any(map(_is_narrow, dtypes))
    # A channel that is out of bounds already is not changed.
    low, high = jnp.minimum(low, 1), jnp.maximum(high, 1)
    if not narrow:
        return jnp.clip(factor, low, high)
    return jnp.exp2(jnp.clip(jnp.round(jnp.log2(factor)), jnp.ceil(jnp.log2(low)), jnp.floor(jnp.log2(high))))


def row_absmax(site: Site, stored: jax.Array) -> jax.Array:
    """Largest magnitude of the weight for each input channel of a product: `[*steps, channels]`."""
    return _row_absmax(stored, Alike(site))


@functools.partial(jax.jit, static_argnames="like")
def _row_absmax(stored: jax.Array, like: Alike) -> jax.Array:
    rows = jnp.max(jnp.abs(matrix.stored_matrix(like.site, stored).astype(jnp.float32)), axis=-1)
    reduced = matrix.input_channels(like.site, rows, jnp.max)
    return jnp.reshape(reduced, (*reduced.shape[:-2], -1))


def column_absmax(site: Site, absorber: Absorber, stored: jax.Array) -> jax.Array:
    """Largest magnitude of each output channel along the absorber's axis: `[*steps, channels]`."""
    assert absorber.axis is not None
    return _column_absmax(stored, Alike(site), absorber.axis)


@functools.partial(jax.jit, static_argnames=("like", "axis"))
def _column_absmax(stored: jax.Array, like: Alike, axis: int) -> jax.Array:
    site = like.site
    axes = tuple(other for other in range(len(site.weight.shape)) if other != axis)

    def of_step(part: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(matrix.weight_operand(site, part).astype(jnp.float32)), axis=axes)

    return matrix.each_step(site, of_step)(matrix.stored_matrix(site, stored))


def multiplied(array: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply an array by a factor, in float32 or wider; return the array's dtype."""
    wide = wider(array.dtype)
    return (array.astype(wide) * factor.astype(wide)).astype(array.dtype)


def _dtypes(site: Site, stored: Any) -> list[Any]:
    """The dtypes of a weight on its way from storage to its product."""
    return [stored.dtype, *(op.eqn.outvars[op.output].aval.dtype for op in site.layout if isinstance(op, LayoutOp))]


def _is_narrow(dtype: Any) -> bool:
    return jnp.finfo(dtype).bits < 32


def _most(largest: jax.Array, dtypes: Sequence[Any]) -> jax.Array:
    """The largest factor for a channel of this magnitude; leaves half of the largest number for rounding."""
    top = min(float(jnp.finfo(dtype).max) for dtype in dtypes) / 2
    return jnp.where(largest > 0, top / largest, jnp.inf)


def _least(largest: jax.Array, dtypes: Sequence[Any]) -> jax.Array:
    bottom = max(float(jnp.finfo(dtype).tiny) for dtype in dtypes)
    return jnp.where(largest > 0, bottom / largest, 0.0)
