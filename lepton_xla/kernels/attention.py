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
# Up to so many queries, keys and values are read where they are, once.
_FEW_QUERIES = 4
FLOATS = ("float32", "bfloat16")


def fits(queries: int | None, keys: int, depth: int, width: int) -> bool:
    """Whether a head of so many keys, of `depth`, and values, of `width`, is short enough for the kernel.

    Args:
        queries: their number; None if it is not known.
        keys: the number of keys and values.
        depth: elements of a key.
        width: elements of a value.

    >>> fits(512, 512, 64, 64), fits(512, 4096, 64, 64), fits(1, 4096, 64, 64)
    (True, False, True)
    """
    return keys * (depth + width) <= _MOST_FLOATS or (queries is not None and queries <= _FEW_QUERIES)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float = 1.0,
    masks: bool = False,
    heads_first: bool = False,
    rounds: bool = False,
    dtype: Any = None,
) -> jax.Array:
    """Compute `softmax(query @ key^T * scale + bias) @ value` of each head of each example.

    Everything is computed in float32, also of bfloat16, unless `rounds`. Of few queries, values that have no weight are
    not read, not even NaN.

    Args:
        query: [B, Q, H, D], float32 or bfloat16.
        key: [B, K, H, D], of the same type.
        value: [B, K, H, E], of the same type.
        bias: float32 [B, H, Q, K], or 1 instead of H, Q and K; None: none.
        scale: of the scores.
        masks: whether a bias other than zero takes the place of a score.
        heads_first: whether key and value are [B, H, K, D] and [B, H, K, E] instead.
        rounds: whether AVX-512 VNNI may round operands, of more than four queries and up to 512 keys: queries, and the
            keys of a head, to 1 / 5792 of the largest magnitude (for a depth of 64), values to 1 / 2047 of it, and the
            weights of a query to 1 / 32767 of the largest, or, where they add up to over 32 of it, to a millionth of
            their sum. That is little where operands come of numbers of eight bits.
        dtype: of the result, float32 or bfloat16; None: that of the operands.

    Returns:
        [B, Q, H, E].

    >>> same = jnp.zeros((1, 2, 1, 4))
    >>> attend(same, same, jnp.array([1.0, 3.0]).reshape((1, 2, 1, 1)))[0, :, 0, 0].tolist()
    [2.0, 2.0]
    """
    assert query.dtype == key.dtype == value.dtype
    name = query.dtype.name if dtype is None else jnp.dtype(dtype).name
    assert {query.dtype.name, name} <= set(FLOATS)
    bias = jnp.zeros((0, 0, 0, 0), jnp.float32) if bias is None else bias
    params = {
        "scale": float(scale), "masks": masks, "heads_first": heads_first, "rounds": rounds, "dtype": name
    }  # fmt: skip
    return PRIMITIVE.bind(query, key, value, bias, **params)


def _shape(query: Any, _key: Any, value: Any, _bias: Any, *, dtype: str, **_params: Any) -> tuple[tuple[Any, ...], Any]:
    return (*query.shape[:3], value.shape[3]), jnp.dtype(dtype)


def by_xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    scale: float,
    masks: bool,
    heads_first: bool,
    dtype: str,
    **_rounds: Any,
) -> jax.Array:
    """The same in XLA's own operations, which round nothing."""
    rows = "bhk" if heads_first else "bkh"
    scores = jnp.einsum(f"bqhd,{rows}d->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if 0 not in bias.shape:
        scores = jnp.where(bias == 0, scores, bias) if masks else scores + bias
    exact = jnp.float32 if "float32" in (value.dtype.name, dtype) else value.dtype  # of the weights as of the result
    weights, value = jax.nn.softmax(scores, axis=-1).astype(exact), value.astype(exact)
    return jnp.einsum(f"bhqk,{rows}e->bqhe", weights, value, preferred_element_type=jnp.float32).astype(dtype)


def _call(
    query: Any, key: Any, value: Any, bias: Any, *, scale: float, dtype: str, **flags: bool
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    if not installation.usable():
        return None
    attributes = {"scale": np.float32(scale)} | {name: np.bool_(flag) for name, flag in flags.items()}
    return f"{installation.PREFIX}attention", (query, key, value, bias), attributes


def _axes(*, heads_first: bool, **_params: Any) -> str:
    return f"bqhd,{'bhkd,bhke' if heads_first else 'bkhd,bkhe'},bhqk->bqhe"


PRIMITIVE = _compat.row_primitive("attention", _shape, by_xla, _call, by_row=(0, 1, 2, 3), axes=_axes)
