"""Chains: a product, followed by operations that scale or shift its channels, or move its axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core.dtypes import wider
from lepton_xla.passes.core.layouts import Layout, LayoutOp
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.walker import Context, TracedValue, Values, materialize
from lepton_xla.passes.folding.simplification import identity

type ArraysByPath = Mapping[str, Any]
# A vector over output channels (or a scalar), float32 or wider, as a function of the weights.
type Vector = Callable[[ArraysByPath], jax.Array]


@dataclasses.dataclass(eq=False, repr=False)
class WeightEquation:
    """An equation on weights alone, evaluated when one of its outputs is read."""

    eqn: Any
    operands: tuple[Any, ...]


@dataclasses.dataclass(eq=False, repr=False)
class WeightExpression(TracedValue):
    """An expression in weights alone: a weight, or an output of an equation on expressions.

    Attributes:
        aval: its shape and dtype.
        given: the weights of this walk.
        known: values computed in this walk.
        path: path of the weight, for a weight or an expression in it alone.
        layout: the operations between that weight and this value.
        source: the equation; None for a weight.
        output: index among the equation's outputs.
    """

    crosses = False
    aval: Any
    given: ArraysByPath
    known: dict[WeightEquation, Values]
    path: str | None = None
    layout: Layout = ()
    source: WeightEquation | None = None
    output: int = 0

    def materialize(self) -> jax.Array:
        return self.evaluate(self.given, self.known)

    def evaluate(self, weights: ArraysByPath, known: dict[WeightEquation, Values]) -> jax.Array:
        """Evaluate the expression; `known` caches values for these weights."""
        if self.source is None:
            assert self.path is not None
            return weights[self.path]
        if self.source not in known:
            operands = [
                value.evaluate(weights, known) if isinstance(value, WeightExpression) else value
                for value in self.source.operands
            ]
            with _compat.equation_context(self.source.eqn):
                known[self.source] = _compat.bind(self.source.eqn, operands)
        return known[self.source][self.output]


@dataclasses.dataclass(eq=False, repr=False)
class ScaledProduct(TracedValue):
    """A site's product after `steps` operations that scale or shift its channels, or move its axes.

    Attributes:
        site: the site.
        eqn: its equation in this walk.
        weight: its weight.
        activation: its activation.
        aval: shape and dtype after these operations.
        value: the array, computed by the original program; None if it is to be computed from the folded weight.
        scale: the product of all scales, or None.
        shift: the combined shift, or None.
        steps: number of operations.
        axis: the axis of the channels in this value.
        moves: the operations that move axes.
        read: whether any other operation reads this value.
        following: the values of such operations on this one.
    """

    crosses = False
    site: Site
    eqn: Any
    weight: WeightExpression
    activation: jax.Array
    aval: Any
    value: jax.Array | None
    axis: int
    scale: Vector | None = None
    shift: Vector | None = None
    steps: int = 0
    moves: tuple[Any, ...] = ()
    read: bool = False
    following: list[ScaledProduct] = dataclasses.field(default_factory=list)

    def materialize(self) -> jax.Array:
        if self.value is None:
            raise UnsupportedError(
                f"site {self.site.name!r}: at these sizes the program continues differently than at the sizes it was "
                "folded at; set fold = false"
            )
        self.read = True
        return self.value

    def last(self) -> ScaledProduct:
        """The end of the chain, up to the first value that is read more than once."""
        product = self
        while not product.read and len(product.following) == 1:
            product = product.following[0]
        return product


def track_product(eqn: Any, site: Site, values: Values, found: list[ScaledProduct]) -> ScaledProduct:
    """Start a chain with the product of the original program."""
    activation, weight = materialize(values[0]), values[1]
    value = _compat.bind(eqn, [activation, weight.materialize()])[0]
    found.append(ScaledProduct(site, eqn, weight, activation, eqn.outvars[0].aval, value, axis_of(site, 0)))
    return found[-1]


def follow_expressions(context: Context, eqn: Any, values: Values) -> Values:
    """The outputs of an equation on weights alone, as expressions; equal equations are shared."""
    first = next(value for value in values if isinstance(value, WeightExpression))
    alone = len(values) == 1 and first.path is not None
    key = identity(eqn, values)
    known: dict[Any, WeightEquation] = context.walk.notes.setdefault("arithmetic", {})
    source = known.setdefault(key, WeightEquation(eqn, tuple(values))) if key is not None else None
    source = source or WeightEquation(eqn, tuple(values))
    made: dict[WeightEquation, Values] = context.walk.notes.setdefault("expressions", {})
    if source not in made:
        made[source] = [
            WeightExpression(
                var.aval,
                first.given,
                first.known,
                first.path if alone else None,
                (*first.layout, LayoutOp(eqn, index)) if alone else (),
                source,
                index,
            )
            for index, var in enumerate(eqn.outvars)
        ]
    return list(made[source])


def extended(eqn: Any, product: ScaledProduct, side: int, values: Values, literal: list[bool]) -> ScaledProduct | None:
    """Extend a chain by an operation that scales or shifts channels; None if the operation does not."""
    name = eqn.primitive.name
    aval = eqn.outvars[0].aval
    scale, shift, axis, moves = product.scale, product.shift, product.axis, product.moves
    if name in ("reshape", "squeeze", "transpose"):
        moved = _moved(eqn, product)
        if moved is None or len(values) != 1:
            return None
        axis, moves = moved, (*moves, eqn)
    elif name == "convert_element_type":
        if not (jnp.issubdtype(aval.dtype, jnp.floating) and jnp.issubdtype(product.aval.dtype, jnp.floating)):
            return None
    elif name in ("add", "sub", "mul", "div"):
        vector = _channel_vector(values[1 - side], axis, literal[1 - side])
        alike = (aval.shape, aval.dtype) == (product.aval.shape, product.aval.dtype)
        if vector is None or not alike or (name == "div" and side == 1):
            return None
        if name in ("mul", "div"):
            factor = vector if name == "mul" else mapped(lambda by: 1 / by, vector)
            scale = factor if scale is None else mapped(jnp.multiply, scale, factor)
            shift = None if shift is None else mapped(jnp.multiply, shift, factor)
        else:
            if name == "sub" and side == 1:  # vector - product
                scale = (lambda _weights: jnp.float32(-1)) if scale is None else mapped(jnp.negative, scale)
                shift = None if shift is None else mapped(jnp.negative, shift)
            elif name == "sub":
                vector = mapped(jnp.negative, vector)
            shift = vector if shift is None else mapped(jnp.add, shift, vector)
    else:
        return None
    value = None
    if product.value is not None:
        value = _compat.bind(eqn, [product.value if k == side else materialize(v) for k, v in enumerate(values)])[0]
    return dataclasses.replace(
        product,
        aval=aval,
        value=value,
        axis=axis,
        scale=scale,
        shift=shift,
        steps=product.steps + 1,
        moves=moves,
        read=False,
        following=[],
    )


def _moved(eqn: Any, product: ScaledProduct) -> int | None:
    """The axis of the channels after an operation that moves axes; None if they no longer form one axis."""
    if eqn.primitive.name == "transpose":
        return eqn.params["permutation"].index(product.axis)
    before, after = product.aval.shape, eqn.outvars[0].aval.shape
    channels = before[product.axis]
    if channels == 1:
        return None
    lead = math.prod(before[: product.axis])
    places = [k for k, size in enumerate(after) if size == channels and math.prod(after[:k]) == lead]
    return places[0] if places else None


def mapped(operation: Callable[..., jax.Array], *vectors: Vector) -> Vector:
    """Make the vector that an operation computes from others, once the weights are known."""
    return lambda weights: operation(*(vector(weights) for vector in vectors))


def _channel_vector(value: Any, axis: int, literal: bool) -> Vector | None:
    """A value that varies along the given axis only, as a vector (or a scalar); else None."""
    if not isinstance(value, WeightExpression):
        return (lambda _weights: _widened(jnp.asarray(value))) if literal and jnp.ndim(value) == 0 else None
    if all(size == 1 for k, size in enumerate(value.aval.shape) if k != axis):
        return lambda weights: _widened(jnp.ravel(value.evaluate(weights, {})))
    if value.source is None or value.source.eqn.primitive.name != "broadcast_in_dim":
        return None
    inner, places = value.source.operands[0], value.source.eqn.params["broadcast_dimensions"]
    return _channel_vector(inner, places.index(axis) if axis in places else -1, literal=True)


def _widened(vector: jax.Array) -> jax.Array:
    return vector.astype(wider(vector.dtype))


def axis_of(site: Site, operand: int) -> int:
    """The axis of the output channels in a product's result (`operand` 0) or weight (1)."""
    axes = channel_axes(site)
    assert axes is not None
    return axes[operand]


def channel_axes(site: Site) -> tuple[int, int] | None:
    """The axis of the output channels in the result and in the weight operand; None if it is not a single axis."""
    numbers = site.params["dimension_numbers"]
    if site.kind == "conv_general_dilated":
        return numbers.out_spec[1], numbers.rhs_spec[0]
    (_, contract), (_, batch) = numbers
    free = [axis for axis in range(len(site.weight.shape)) if axis not in (*contract, *batch)]
    return (len(site.output.shape) - 1, free[0]) if len(free) == 1 and not batch else None
