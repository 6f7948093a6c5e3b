"""Layer norm and RMS norm of rows in one pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels import installation


def normalize(
    x: jax.Array,
    gain: jax.Array | None = None,
    shift: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
    centered: bool = True,
) -> jax.Array:
    """Compute `(x - mean) / sqrt(variance + epsilon) * gain + shift` of each row.

    Args:
        x: float32 [M, K].
        gain, shift: float32 [K]; None: none.
        epsilon: what is added to the variance.
        centered: whether the mean is subtracted, as in layer norm; if not, as in RMS norm, the mean of the squares
            takes the place of the variance.

    Returns:
        float32 [M, K].

    >>> normalize(jnp.array([[1.0, 3.0], [5.0, 5.0]]), epsilon=1e-9).round(3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    assert x.dtype == jnp.float32
    none = jnp.zeros(0, jnp.float32)
    operands = x, none if gain is None else gain, none if shift is None else shift
    return PRIMITIVE.bind(*operands, epsilon=float(epsilon), centered=centered)


def _shape(x: Any, *_: Any, **_params: Any) -> tuple[tuple[Any, ...], Any]:
    return x.shape, jnp.dtype("float32")


def by_xla(x: jax.Array, gain: jax.Array, shift: jax.Array, *, epsilon: float, centered: bool) -> jax.Array:
    """The same in XLA's own operations."""
    different = x - jnp.mean(x, axis=1, keepdims=True) if centered else x
    out = different * jax.lax.rsqrt(jnp.mean(different * different, axis=1, keepdims=True) + epsilon)
    out = out * gain[None] if gain.shape[0] else out
    return out + shift[None] if shift.shape[0] else out


def _call(*operands: Any, epsilon: float, centered: bool) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    if not installation.usable():
        return None
    attributes = {"epsilon": np.float32(epsilon), "centered": np.bool_(centered)}
    return f"{installation.PREFIX}norm", operands, attributes


PRIMITIVE = _compat.row_primitive("norm", _shape, by_xla, _call)
