"""Attention of all heads in one pass: the scores of queries are never in memory as a whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels import installation

# With more keys and values than this a head no longer fits the second-level cache.
_MOST_FLOATS = 1 << 18


def fits(keys: int, depth: int, width: int) -> bool:
    """Whether a head of so many keys, of `depth`, and values, of `width`, is short enough for the kernel.

    >>> fits(512, 64, 64), fits(4096, 64, 64)
    (True, False)
    """
    return keys * (depth + width) <= _MOST_FLOATS


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float = 1.0,
    masks: bool = False,
) -> jax.Array:
    """Compute `softmax(query @ key^T * scale + bias) @ value` of each head of each example.

    Args:
        query: float32 [B, Q, H, D].
        key: float32 [B, K, H, D].
        value: float32 [B, K, H, E].
        bias: float32 [B, H, Q, K], or 1 instead of H, Q and K; None: none.
        scale: of the scores.
        masks: whether a bias other than zero takes the place of a score.

    Returns:
        float32 [B, Q, H, E].

    >>> same = jnp.zeros((1, 2, 1, 4))
    >>> attend(same, same, jnp.array([1.0, 3.0]).reshape((1, 2, 1, 1)))[0, :, 0, 0].tolist()
    [2.0, 2.0]
    """
    assert query.dtype == key.dtype == value.dtype == jnp.float32
    bias = jnp.zeros((0, 0, 0, 0), jnp.float32) if bias is None else bias
    return PRIMITIVE.bind(query, key, value, bias, scale=float(scale), masks=masks)


def _shape(query: Any, _key: Any, value: Any, _bias: Any, **_params: Any) -> tuple[tuple[Any, ...], Any]:
    return (*query.shape[:3], value.shape[3]), jnp.dtype("float32")


def by_xla(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, *, scale: float, masks: bool
) -> jax.Array:
    """The same in XLA's own operations."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if 0 not in bias.shape:
        scores = jnp.where(bias == 0, scores, bias) if masks else scores + bias
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores, axis=-1), value)


def _call(
    query: Any, key: Any, value: Any, bias: Any, *, scale: float, masks: bool
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    if not installation.usable():
        return None
    attributes = {"scale": np.float32(scale), "masks": np.bool_(masks)}
    return f"{installation.PREFIX}attention", (query, key, value, bias), attributes


PRIMITIVE = _compat.row_primitive("attention", _shape, by_xla, _call, by_row=(0, 1, 2, 3))
