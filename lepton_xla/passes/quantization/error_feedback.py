"""How GPTQ and SparseGPT correct later rows for the errors of earlier ones: by a factor of the inverse Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# If a Gram matrix cannot be factored with the requested damping, retry with ten times as much, from this minimum, this
# often.
LEAST_DAMPING, DAMPING_TRIES = 1e-6, 8
# Matrices up to this size are factored by LAPACK. Larger ones are halved recursively, so that nearly all work is matrix
# products: on a busy machine the BLAS threads of a Cholesky factorization wait for each other, up to a second for 768
# rows that take 10 ms alone.
LEAF = 128


def sweep(
    rows: jax.Array,
    factor: jax.Array,
    block: int,
    settle: Callable[[jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]],
    blank: Any,
) -> Any:
    """Settle the rows of a weight a block at a time, and correct all later rows for each block's errors.

    Args:
        rows: `[K, N]`, a whole number of blocks.
        factor: `[K, K]`, upper triangular, from `inverse_factor`.
        block: rows of a block.
        settle: `settle(start, part, corner)` gives the settled rows of a block, each array `[block, N]`, and their
            errors `[block, N]` divided by the diagonal of `corner`; `part` has its rows, corrected so far, and `corner`
            is the `[block, block]` of `factor` on the diagonal.
        blank: arrays `[K, N]` that the settled rows replace.
    """
    later = jnp.arange(rows.shape[0])

    def settle_block(number: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        rest, done = state
        start = number * block
        part = lax.dynamic_slice(rest, (start, 0), (block, rows.shape[1]))
        influence = lax.dynamic_slice(factor, (start, 0), (block, factor.shape[1]))
        settled, errors = settle(start, part, lax.dynamic_slice(influence, (0, start), (block, block)))
        influence = jnp.where(later[None, :] >= start + block, influence, jnp.zeros_like(influence))
        done = jax.tree.map(lambda whole, new: lax.dynamic_update_slice(whole, new, (start, 0)), done, settled)
        return rest - _product(influence.T, errors), done

    return lax.fori_loop(0, rows.shape[0] // block, settle_block, (rows, blank))[1]


def inverse_factor(gram: jax.Array, mean: jax.Array, damping: float) -> jax.Array:
    """The upper triangular `U` with `U^T U = (gram + damping * mean * I)^-1`; damping grows until it exists.

    `gram = R R^T` with an upper `R`, the Cholesky factor of the reversed matrix; `U = R^-1`. The inverse itself, which
    would lose digits, is never formed.
    """

    def wanting(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[0] == 0) | ((state[0] <= DAMPING_TRIES) & ~jnp.all(jnp.isfinite(state[2])))

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        more = jnp.where(state[0] == 0, state[1], jnp.maximum(10 * state[1], LEAST_DAMPING))
        return state[0] + 1, more, factor_once(gram, mean, more)

    # The first attempt is an iteration of the loop too, so that XLA compiles the factorization only once.
    return lax.while_loop(wanting, again, (jnp.int32(0), jnp.asarray(damping, gram.dtype), jnp.zeros_like(gram)))[2]


def factor_once(gram: jax.Array, mean: jax.Array, damping: jax.Array) -> jax.Array:
    """The `inverse_factor` with this damping; not finite if it does not exist."""
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    damped = gram + damping * jnp.where(mean > 0, mean, jnp.ones_like(mean)) * eye
    return _inverse_of_cholesky(damped[::-1, ::-1])[::-1, ::-1]


def _inverse_of_cholesky(matrix: jax.Array) -> jax.Array:
    """`L^-1` with `matrix = L L^T`, both `[K, K]`, L lower triangular; not finite if L does not exist.

    With `matrix = [[A, B^T], [B, C]]` and `P = B L_A^-T`, `L = [[L_A, 0], [P, L_S]]`, where `S = C - P P^T`.
    """
    size = matrix.shape[0]
    if size <= LEAF:
        lower = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        return lax.linalg.triangular_solve(lower, jnp.eye(size, dtype=matrix.dtype), left_side=True, lower=True)
    half = LEAF
    while 2 * half < size:
        half *= 2
    first = _inverse_of_cholesky(matrix[:half, :half])
    below = _product(matrix[half:, :half], first.T)
    last = _inverse_of_cholesky(matrix[half:, half:] - _product(below, below.T))
    corner = -_product(last, _product(below, first))
    return jnp.block([[first, jnp.zeros((half, size - half), matrix.dtype)], [corner, last]])


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
