"""Products of one row that XLA:CPU is slow at.

Those of 16-bit floats are padded to two rows, or computed in float32. Those with the transpose of a matrix, such as the
logits of a tied embedding `[V, D]`, contract the matrix itself: XLA:CPU reads a fused transpose an element at a time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.core.walker import TracedValue

_NARROW = ("bfloat16", "float16")


def fits(eqn: Any) -> bool:
    """Whether an equation is a product of 16-bit floats where one operand has a single row per batch."""
    if eqn.primitive.name != "dot_general":
        return False
    operands = [var.aval for var in eqn.invars]
    narrow = all(operand.dtype.name in _NARROW for operand in operands)
    return narrow and eqn.params["out_sharding"] is None and single(eqn) is not None


def padded(eqn: Any, left: jax.Array, right: jax.Array) -> jax.Array:
    """Compute a product that `fits` with a second row of zeros, which is dropped from the result.

    Args:
        eqn: the `dot_general`.
        left: its left operand.
        right: its right operand.
    """
    side = single(eqn)
    assert side is not None
    operands = [left, right]
    _, batch = eqn.params["dimension_numbers"]
    free = _free_axes(eqn, side)
    axis = free[0] if free else operands[side].ndim
    widened = operands[side] if free else jnp.expand_dims(operands[side], axis)
    widths = [(0, int(index == axis)) for index in range(widened.ndim)]
    operands[side] = jnp.pad(widened, widths)
    (out,) = _compat.bind(eqn, operands)
    first = len(batch[0]) + (len(_free_axes(eqn, 0)) if side else 0)
    return jnp.reshape(jax.lax.slice_in_dim(out, 0, 1, axis=first), eqn.outvars[0].aval.shape)


def widened(eqn: Any, left: jax.Array, right: jax.Array) -> jax.Array:
    """Compute a product that `fits` in float32, which represents the operands exactly.

    Args:
        eqn: the `dot_general`.
        left: its left operand.
        right: its right operand.
    """
    wide = jnp.dtype("float32")
    operands = [operand.astype(wide) for operand in (left, right)]
    (out,) = _compat.bind(eqn, operands, preferred_element_type=wide, precision=None)
    return out.astype(eqn.outvars[0].aval.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(TracedValue):
    """The transpose of a matrix."""

    matrix: jax.Array
    crosses = False

    def materialize(self) -> jax.Array:
        """The transpose as an array."""
        return self.matrix.T


def takes_transpose(eqn: Any) -> bool:
    """Whether an equation is a product of a float32 row, on the left, and a matrix, which may be a transpose."""
    if eqn.primitive.name != "dot_general":
        return False
    operands = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    batch = eqn.params["dimension_numbers"][1][0]
    plain = not batch and operands[1].ndim == 2 and all(each.dtype == jnp.float32 for each in operands)
    return plain and eqn.params["out_sharding"] is None and single(eqn) == 0


def untransposed(eqn: Any, row: jax.Array, matrix: jax.Array) -> jax.Array:
    """Compute a product that `takes_transpose`.

    Args:
        eqn: the `dot_general`.
        row: its left operand.
        matrix: the transpose of its right operand.
    """
    contract, batch = eqn.params["dimension_numbers"]
    numbers = (contract[0], tuple(1 - axis for axis in contract[1])), batch
    return _compat.bind(eqn, [row, matrix], dimension_numbers=numbers)[0]


def single(eqn: Any) -> int | None:
    """Which operand of a `dot_general` has a single row; None if neither or both have (a dot of vectors)."""
    rows = [[eqn.invars[side].aval.shape[axis] for axis in _free_axes(eqn, side)] for side in (0, 1)]
    one = [all(isinstance(size, int) for size in sizes) and math.prod(sizes) == 1 for sizes in rows]
    return one.index(True) if sum(one) == 1 else None


def _free_axes(eqn: Any, side: int) -> list[int]:
    """Axes of an operand that are neither contracted nor batch axes."""
    contract, batch = eqn.params["dimension_numbers"]
    return [axis for axis in range(eqn.invars[side].aval.ndim) if axis not in (*contract[side], *batch[side])]
