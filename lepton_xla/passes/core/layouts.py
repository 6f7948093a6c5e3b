"""Layouts: the operations between a stored weight and the product that uses it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.core.computed import CUTS


@dataclasses.dataclass(frozen=True)
class Step:
    """Marks in a layout that a `scan` takes one step of a stacked weight here."""


@dataclasses.dataclass(frozen=True)
class LayoutOp:
    """A layout operation on a weight: an equation and the index of the output that was used."""

    eqn: Any
    output: int = 0

    @property
    def resizes(self) -> bool:
        """Whether it changes the number of elements."""
        before, after = self.eqn.invars[0].aval.shape, self.eqn.outvars[self.output].aval.shape
        return math.prod(before) != math.prod(after)

    @property
    def cuts(self) -> bool:
        """Whether it selects a part of the elements."""
        return self.resizes and self.eqn.primitive.name in CUTS

    def __call__(self, array: jax.Array) -> jax.Array:
        with _compat.equation_context(self.eqn):
            return _compat.bind(self.eqn, [array])[self.output]


type Layout = tuple[LayoutOp | Step, ...]


def lay_out(array: jax.Array, layout: Sequence[LayoutOp | Step]) -> jax.Array:
    """Apply a layout to a stored weight; return the operand of its site, with stacked axes leading."""
    for index, op in enumerate(layout):
        if isinstance(op, Step):
            return jax.vmap(lambda step, rest=layout[index + 1 :]: lay_out(step, rest))(array)
        array = op(array)
    return jnp.asarray(array)


def layout_key(layout: Layout) -> tuple[Any, ...]:
    """A key that is equal for equivalent layouts."""
    return tuple(
        "step" if isinstance(op, Step) else (op.eqn.primitive.name, op.output, str(op.eqn.params)) for op in layout
    )
