"""Elements that earlier masks hold at zero: they go first, count towards what is dropped, and do not come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.passes.pruning.targets import Target

# The least score of what is not held. It is a normal number, because XLA takes smaller ones for zero.
_LEAST = float(np.finfo(np.float32).tiny)


def held_last(scores: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Scores by which what is held is worth least of all, less than a zero that is not held.

    Args:
        scores: float32, not negative.
        kept: bool of their shape, False where held; None where nothing is.
    """
    if kept is None:
        return scores
    return jnp.where(kept, jnp.maximum(scores, jnp.float32(_LEAST)), jnp.zeros_like(scores))


def held_units(target: Target, kept: jax.Array) -> jax.Array:
    """Of the units of a target, which have an element that is not held: bool of the shape of `target.units`.

    Args:
        target: the weight.
        kept: bool of the stored weight's shape.
    """
    return target.units(kept.astype(jnp.float32)) > 0


def held_matrices(target: Target, kept: jax.Array) -> jax.Array:
    """A mask of the stored weight as `[*steps, B, K, N]`."""
    return target.matrices(kept.astype(jnp.float32)) != 0


def earlier_masks(targets: Sequence[Target], masks: Mapping[str, jax.Array]) -> dict[str, jax.Array] | None:
    """Path -> the mask that each target has so far, all True where it has none; None where no target has one."""
    if not any(target.path in masks for target in targets):
        return None
    return {target.path: masks.get(target.path, jnp.ones(target.like.shape, bool)) for target in targets}


def dropped_so_far(units: Sequence[jax.Array], lead: int) -> jax.Array:
    """How many units are dropped, uint32, one count for each step of the leading axes.

    Args:
        units: of weights that are ranked together, False where dropped.
        lead: leading axes, the same of all.
    """
    counts = [jnp.sum(~part, axis=tuple(range(lead, part.ndim)), dtype=jnp.uint32) for part in units]
    return sum(counts[1:], counts[0])


def dropped_of_each_group(kept: jax.Array, rows: int) -> jax.Array:
    """How many of each `rows` neighbours have to be dropped so that no fewer are dropped in all, int32.

    Args:
        kept: bool `[..., K, N]`, `rows` dividing K.
    """
    groups = max(1, math.prod(kept.shape) // rows)
    dropped = jnp.sum(~kept, dtype=jnp.uint32)
    return ((dropped + jnp.uint32(groups - 1)) // jnp.uint32(groups)).astype(jnp.int32)


def block_quotas(kept: jax.Array, sparsity: float, block: int) -> jax.Array:
    """How many elements go in each block of rows, uint32: those held, and of the rest the same share in each.

    Args:
        kept: bool `[K, N]`, False where held.
        sparsity: the share of all elements that goes in the end; more where more is held.
        block: rows of a block; it need not divide K.
    """
    depth, columns = kept.shape
    sizes = np.float32(np.minimum(block, depth - np.arange(0, depth, block)) * columns)
    rows = jnp.pad(jnp.sum(kept, axis=1, dtype=jnp.float32), (0, -depth % block))
    free = jnp.sum(jnp.reshape(rows, (-1, block)), axis=1)
    ends = jnp.cumsum(free)
    more = jnp.maximum(round(sparsity * depth * columns) - (depth * columns - ends[-1]), 0)
    split = jnp.round(more * ends / jnp.maximum(ends[-1], 1))
    quotas = sizes - free + jnp.diff(split, prepend=jnp.zeros((1,), split.dtype))
    return jnp.minimum(quotas, sizes).astype(jnp.uint32)
