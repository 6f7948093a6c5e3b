"""Learned codebooks: one-dimensional k-means, on the device.

Han, Mao, Dally 2016, Deep Compression, arXiv:1510.00149, section 3: linear initialization, since few large weights
matter more than many small ones, then Lloyd's iterations.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

MAX_ITERATIONS = 50
# Iterations stop when no level moves by more than this share of the values' range.
SETTLED = 1e-5
# Up to this many levels, comparing with every boundary is faster than searching.
_COMPARE_ALL = 16


def nearest_level(values: jax.Array, levels: jax.Array) -> jax.Array:
    """Index of the level nearest to each value; the lower one in a tie.

    Args:
        values: float32, any shape.
        levels: float32 [n], ascending.

    Returns:
        int32 of the values' shape.

    >>> nearest_level(jnp.array([-1.0, 0.5, 0.6]), jnp.array([0.0, 1.0])).tolist()
    [0, 0, 1]
    """
    halves = levels * 0.5  # halved first, so that the sum cannot overflow
    boundaries = halves[1:] + halves[:-1]
    method = "compare_all" if levels.shape[0] <= _COMPARE_ALL else "scan_unrolled"
    return jnp.searchsorted(boundaries, values, method=method)


@functools.partial(jax.jit, static_argnums=1)
def learn_levels(values: jax.Array, count: int) -> jax.Array:
    """Find levels with a small squared rounding error, by Lloyd's iterations.

    Args:
        values: float32, any shape, not empty, finite.
        count: number of levels, at least 2.

    Returns:
        float32 [count], ascending. If any value is exactly zero, one level is too and stays so: pruned weights stay
            pruned.

    >>> learn_levels(jnp.array([0.0, 2.0, 2.5, 5.0]), 3).tolist()
    [0.0, 2.25, 5.0]
    """
    values = lax.stop_gradient(values)
    low, high = jnp.min(values), jnp.max(values)
    levels = low + (high - low) * jnp.linspace(0.0, 1.0, count, dtype=jnp.float32)
    fixed = jnp.any(values == 0) & (jnp.arange(count) == jnp.argmin(jnp.abs(levels)))
    levels = jnp.where(fixed, jnp.float32(0), levels)

    def going(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        step, _, moved = state
        return (step < MAX_ITERATIONS) & (moved > SETTLED * (high - low))

    def iterate(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        step, levels, _ = state
        nearest = nearest_level(values, levels)
        # Sum differences from the level instead of values: the sums stay small, so float32 loses no precision.
        away = jnp.zeros(count, jnp.float32).at[nearest].add(values - levels[nearest])
        members = jnp.zeros(count, jnp.int32).at[nearest].add(1)
        shift = away / jnp.maximum(members, 1).astype(jnp.float32)
        shift = jnp.where(fixed, jnp.float32(0), shift)
        return step + 1, levels + shift, jnp.max(jnp.abs(shift))

    _, levels, _ = lax.while_loop(going, iterate, (jnp.int32(0), levels, high - low))
    return jnp.sort(levels)  # already ascending, except for rounding
