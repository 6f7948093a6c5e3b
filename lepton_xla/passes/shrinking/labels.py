"""Labels of arrays in the dependency analysis, and its findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.walker import Context, TracedValue
from lepton_xla.passes.shrinking.dimensions import (
    Dimension,
    Kept,
    is_protected,
    leaf,
    protect,
    unify,
)

type Axes = tuple[Dimension, ...]
# Computes the changed parameters of an equation when some units are removed.
type Change = Callable[[Kept], dict[str, Any]]
type Handler = Callable[["Findings", Context, Any, list["Labelled"]], list["Labelled"]]


@dataclasses.dataclass(frozen=True)
class Labelled(TracedValue):
    """An array in the analysis.

    Attributes:
        axes: one dimension per axis.
        zero: for each axis, whether the value is zero at the removed units of that axis.
        path: path of the weight, if this is a weight after layout operations only.
        means: dimensions that were summed over to compute this, and the number of summed elements.
    """

    axes: Axes
    zero: tuple[bool, ...]
    path: str | None = None
    means: tuple[tuple[Axes, int], ...] = ()

    def zero_at(self, axis: int) -> bool:
        """Whether the value is zero at the removed units of an axis, or the axis cannot lose units."""
        return self.zero[axis] or is_protected(self.axes[axis])


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with a weight.

    Attributes:
        path: the weight's path.
        made: dimensions of the result that stem from the weight.
        convolution: whether it is a convolution.
    """

    path: str
    made: Axes
    convolution: bool


@dataclasses.dataclass
class Findings:
    """The findings of one walk of a jaxpr.

    Attributes:
        weights: path -> the dimensions of the weight's axes.
        changes: equation (`Context.key`) -> how its parameters change.
        constants: equation and operand -> the dimensions of a constant array.
        products: products with a weight, in the order of execution.
        batched: batch dimensions of products of two activations, such as heads.
        scales: dimension and path of each weight vector that an activation is multiplied by.
        derivatives: equation with a custom derivative -> the dimensions of its operands and results; None for constant
            arrays.
    """

    weights: dict[str, Axes] = dataclasses.field(default_factory=dict[str, Axes])
    changes: dict[tuple[int, ...], Change] = dataclasses.field(default_factory=dict[tuple[int, ...], Change])
    constants: dict[tuple[tuple[int, ...], int], Axes] = dataclasses.field(
        default_factory=dict[tuple[tuple[int, ...], int], Axes]
    )
    products: list[Product] = dataclasses.field(default_factory=list[Product])
    batched: list[Dimension] = dataclasses.field(default_factory=list[Dimension])
    scales: list[tuple[Dimension, str]] = dataclasses.field(default_factory=list[tuple[Dimension, str]])
    derivatives: dict[tuple[int, ...], list[Axes | None]] = dataclasses.field(
        default_factory=dict[tuple[int, ...], list[Axes | None]]
    )


def fixed(var: Any, reason: str) -> Labelled:
    """A value whose axes are all protected."""
    return Labelled(tuple(leaf(size, reason) for size in var.aval.shape), (False,) * len(var.aval.shape))


def guard(axes: Sequence[Dimension], reason: str) -> None:
    """Protect several dimensions."""
    for dimension in axes:
        protect(dimension, reason)


def pair(first: Sequence[Dimension], second: Sequence[Dimension], eqn: Any) -> None:
    """Unify the axes of two values."""
    for a, b in zip(first, second, strict=True):
        unify(a, b, f"axes that do not line up meet in `{eqn.primitive.name}`")


def every(values: Sequence[Labelled]) -> tuple[bool, ...]:
    """For each axis, whether all values are zero at its removed units."""
    return tuple(all(value.zero_at(axis) for value in values) for axis in range(len(values[0].axes)))


def opaque(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Handler of unknown primitives: protects all their axes."""
    del study, context
    reason = f"`{eqn.primitive.name}` depends on it"
    for operand in operands:
        guard(operand.axes, reason)
    return [fixed(var, reason) for var in eqn.outvars]


def literal(atom: Any) -> float | None:
    """The value of a scalar literal."""
    if not isinstance(atom, _compat.LITERAL) or np.ndim(atom.val):
        return None
    value = np.asarray(atom.val)
    return None if np.iscomplexobj(value) else float(value)
