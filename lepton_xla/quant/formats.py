"""Number formats that weights and activations can be stored in."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Format:
    """A symmetric integer format: value = code * scale.

    Attributes:
        name: as recipes spell it.
        dtype: the dtype of the codes.
        largest: the largest code; codes run from `-largest` to `largest`, so that zero is a code and negation is exact.
    """

    name: str
    dtype: jnp.dtype
    largest: int


FORMATS = {"int8": Format("int8", jnp.dtype("int8"), 127)}
