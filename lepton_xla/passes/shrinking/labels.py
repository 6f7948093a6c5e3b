"""Labels: what stands for an array in the walk that finds dependencies, and what the walk finds."""

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
# The parameters of an equation that must change once some units are gone.
type Change = Callable[[Kept], dict[str, Any]]
type Handler = Callable[["Findings", Context, Any, list["Labelled"]], list["Labelled"]]


@dataclasses.dataclass(frozen=True)
class Labelled(TracedValue):
    """What stands for an array in the walk.

    Attributes:
        axes: one dimension an axis.
        zero: for each axis, whether the value is zero at the removed units of that axis.
        path: the weight's path, where this is a weight that was only laid out anew.
        means: dimensions that were summed over to get here, and over how many elements.
    """

    axes: Axes
    zero: tuple[bool, ...]
    path: str | None = None
    means: tuple[tuple[Axes, int], ...] = ()

    def zero_at(self, axis: int) -> bool:
        """Whether the value is zero at the removed units of an axis, or there can be none."""
        return self.zero[axis] or is_protected(self.axes[axis])


@dataclasses.dataclass(frozen=True)
class Product:
    """A product in which a weight takes part.

    Attributes:
        path: the weight's path.
        made: dimensions of the result that come from the weight.
        convolution: whether it is a convolution.
    """

    path: str
    made: Axes
    convolution: bool


@dataclasses.dataclass
class Findings:
    """What one walk of a jaxpr found.

    Attributes:
        weights: path -> the dimensions of the weight's axes.
        changes: equation (`Context.key`) -> how its parameters change.
        constants: equation and operand -> the dimensions of the constant array there.
        products: products with a weight, in the order of execution.
        batched: dimensions that a product of two activations is batched over, such as heads.
        scales: dimension and path of each weight vector that an activation is multiplied by.
        derivatives: equation with a derivative of its own -> the dimensions of its operands and results; None for
            constant arrays.
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
    """A value none of whose axes may lose anything."""
    return Labelled(tuple(leaf(size, reason) for size in var.aval.shape), (False,) * len(var.aval.shape))


def guard(axes: Sequence[Dimension], reason: str) -> None:
    """Protects several dimensions."""
    for dimension in axes:
        protect(dimension, reason)


def pair(first: Sequence[Dimension], second: Sequence[Dimension], eqn: Any) -> None:
    """Makes the axes of two values the same."""
    for a, b in zip(first, second, strict=True):
        unify(a, b, f"axes that do not line up meet in `{eqn.primitive.name}`")


def every(values: Sequence[Labelled]) -> tuple[bool, ...]:
    """Where all values are zero."""
    return tuple(all(value.zero_at(axis) for value in values) for axis in range(len(values[0].axes)))


def opaque(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Of a primitive about which nothing is known, nothing may change."""
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
