"""Dtypes that passes compute in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def wider(*dtypes: Any) -> Any:
    """The widest of these dtypes and float32.

    >>> wider("bfloat16", "float16")
    dtype('float32')
    """
    return max((jnp.dtype("float32"), *map(jnp.dtype, dtypes)), key=lambda dtype: dtype.itemsize)
