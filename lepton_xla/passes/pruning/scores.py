"""Scores: the importance of the elements of a weight."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from lepton_xla.errors import RecipeError
from lepton_xla.passes.pruning.targets import Target
from lepton_xla.recipe.rules import DATA_METHODS


def element_scores(
    target: Target, weight: jax.Array, *, gradient: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """Score each element of a stored weight by the rule's method, float32; signed for `deviation` only.

    Raises:
        RecipeError: if the method needs something that is missing.
    """
    method = target.rule.method
    if method.startswith("deviation"):
        return weight.astype(jnp.float32)
    if method == "magnitude":
        return jnp.abs(weight.astype(jnp.float32))
    if method == "saliency" and gradient is not None:
        return jnp.abs(weight.astype(jnp.float32) * gradient.astype(jnp.float32))
    if method == "random" and key is not None:  # zeros are pruned first
        return random_scores(target, key) * (weight != 0).astype(jnp.float32)
    raise RecipeError(f"weight {target.path!r}: method = {method!r} {_ELSEWHERE.get(method, 'is not known here')}")


_ELSEWHERE = {
    "saliency": "needs gradients: train with lx.train.sparsify",
    **dict.fromkeys(DATA_METHODS, "prunes a trained model once, with calibration data: use lx.optimize"),
}


def random_scores(target: Target, key: jax.Array) -> jax.Array:
    """Nonzero random scores of the stored weight's elements, determined by key and path."""
    own = jax.random.fold_in(key, zlib.crc32(target.path.encode()))
    return jax.random.uniform(own, target.like.shape, jnp.float32, minval=jnp.finfo(jnp.float32).tiny)
