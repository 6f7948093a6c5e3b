"""Packs codes of fewer than eight bits into bytes, so that unpacking concatenates whole blocks of rows.

A byte of row r holds the codes of rows r, r + R, r + 2R, ... of its column, from the low bits up, where R is the number
of packed rows. The codes of a byte are never neighbours, so a vector unit unpacks with shifts alone.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla.quant.formats import Format


def packed_rows(rows: int, target: Format) -> int:
    """Number of rows of bytes that hold `rows` rows of codes.

    >>> from lepton_xla.quant import FORMATS
    >>> packed_rows(5, FORMATS["int4"]), packed_rows(5, FORMATS["int8"])
    (3, 5)
    """
    return -(-rows // target.per_byte)


def pack(codes: jax.Array, target: Format) -> jax.Array:
    """Pack codes for storage.

    Args:
        codes: [..., K, N] of the format's dtype.
        target: the format.

    Returns:
        uint8 [..., ceil(K / codes per byte), N]; codes of eight bits are returned unchanged.

    >>> from lepton_xla.quant import FORMATS
    >>> pack(jnp.array([[1], [2], [-1]], jnp.int8), FORMATS["int4"]).tolist()  # rows 0 and 2 share a byte
    [[241], [2]]
    """
    count = target.per_byte
    if count == 1:
        return codes
    width, part = 8 // count, packed_rows(codes.shape[-2], target)
    low = lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8((1 << width) - 1)
    padding = [(0, 0)] * (codes.ndim - 2) + [(0, part * count - codes.shape[-2]), (0, 0)]
    padded = jnp.pad(low, padding)
    blocks = [
        lax.slice_in_dim(padded, place * part, (place + 1) * part, axis=-2) << jnp.uint8(place * width)
        for place in range(count)
    ]
    return functools.reduce(operator.or_, blocks)


def unpack(stored: jax.Array, target: Format, rows: int) -> jax.Array:
    """Unpack what `pack` stored.

    Args:
        stored: uint8 [..., packed rows, N].
        target: the format.
        rows: K, the number of rows of codes.

    Returns:
        Codes [..., K, N] of the format's dtype.

    >>> from lepton_xla.quant import FORMATS
    >>> unpack(jnp.array([[241], [2]], jnp.uint8), FORMATS["int4"], rows=3).tolist()
    [[1], [2], [-1]]
    """
    count = target.per_byte
    if count == 1:
        return stored
    width = 8 // count
    blocks = []
    for place in range(count):
        high = stored << jnp.uint8(8 - (place + 1) * width)  # sign bit of the code = sign bit of the byte
        shifted = lax.bitcast_convert_type(high, target.dtype) >> jnp.asarray(8 - width, target.dtype)
        blocks.append(shifted)
    return lax.slice_in_dim(jnp.concatenate(blocks, axis=-2), 0, rows, axis=-2)
