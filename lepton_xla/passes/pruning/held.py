"""Elements that earlier masks hold at zero: they are pruned first, count towards the target, and do not come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.passes.pruning.targets import Target

# The least score of an element that is not held. A normal number, because XLA flushes subnormal ones to zero.
_LEAST = float(np.finfo(np.float32).tiny)


def held_last(scores: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Make the scores of held elements the lowest, below zeros that are not held.

    Args:
        scores: float32, not negative.
        kept: bool of their shape, False where held; None if nothing is.

    >>> scores = held_last(jnp.array([0.0, 2.0, 3.0]), jnp.array([True, False, True]))
    >>> np.argsort(scores).tolist()
    [1, 0, 2]
    """
    if kept is None:
        return scores
    return jnp.where(kept, jnp.maximum(scores, jnp.float32(_LEAST)), jnp.zeros_like(scores))


def held_units(target: Target, kept: jax.Array) -> jax.Array:
    """Which units of a target have an element that is not held: bool of the shape of `target.units`.

    Args:
        target: the weight.
        kept: bool of the stored weight's shape.
    """
    return target.units(kept.astype(jnp.float32)) > 0


def held_matrices(target: Target, kept: jax.Array) -> jax.Array:
    """Reshape a mask of the stored weight to `[*steps, B, K, N]`."""
    return target.matrices(kept.astype(jnp.float32)) != 0


def earlier_masks(targets: Sequence[Target], masks: Mapping[str, jax.Array]) -> dict[str, jax.Array] | None:
    """Path -> the earlier mask of each target, all True if it has none; None if no target has one."""
    if not any(target.path in masks for target in targets):
        return None
    return {target.path: masks.get(target.path, jnp.ones(target.like.shape, bool)) for target in targets}


def dropped_so_far(units: Sequence[jax.Array], lead: int) -> jax.Array:
    """Number of pruned units, uint32, for each step of the leading axes.

    Args:
        units: units of weights that are ranked together, False where pruned.
        lead: number of leading axes, the same for all.

    >>> int(dropped_so_far([jnp.array([True, False]), jnp.array([False, False])], lead=0))
    3
    """
    counts = [jnp.sum(~part, axis=tuple(range(lead, part.ndim)), dtype=jnp.uint32) for part in units]
    return sum(counts[1:], counts[0])


def dropped_of_each_group(kept: jax.Array, rows: int) -> jax.Array:
    """How many of each `rows` neighbours to prune so that the total does not fall, int32.

    Args:
        kept: bool `[..., K, N]`, `rows` dividing K.

    >>> int(dropped_of_each_group(jnp.array([[True], [False], [True], [True]]), rows=2))
    1
    """
    groups = max(1, math.prod(kept.shape) // rows)
    dropped = jnp.sum(~kept, dtype=jnp.uint32)
    return ((dropped + jnp.uint32(groups - 1)) // jnp.uint32(groups)).astype(jnp.int32)


def block_quotas(kept: jax.Array, sparsity: float, block: int) -> jax.Array:
    """Number of elements to prune in each block of rows, uint32: the held ones, and an equal share of the rest.

    Args:
        kept: bool `[K, N]`, False where held.
        sparsity: final share of all elements to prune; more if more are held.
        block: rows per block; need not divide K.
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
