"""What stands for a weight, or for a value made of weights, while the walker carries it to its site."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core import expressions
from lepton_xla.passes.core.computed import Computed
from lepton_xla.passes.core.expressions import Expression
from lepton_xla.passes.core.layouts import Layout, LayoutOp, Step
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.walker import Context, Rule, TracedValue, Values

# Side input that holds a given computed weight of a stack.
GIVEN = "given"


class Escapes:
    """Weights that one walk found used outside of sites.

    Attributes:
        paths: paths of weights.
        pieces: slices of weights that were used outside of sites.
    """

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.pieces: list[Expression] = []


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "side_inputs"],
    meta_fields=["path", "layout", "escapes", "expression", "source"],
)
@dataclasses.dataclass(frozen=True)
class Tracked(TracedValue):
    """A weight on its way to its site.

    Attributes:
        value: the array after its layout operations; or the pass's replacement of the weight.
        side_inputs: values that follow the weight to its sites without layout operations, by `Key`. Those of a
            stacked weight have its leading axes, so each step of a scan gets its own.
        path: the weight's path in the program.
        layout: the operations from the program's input to this value.
        escapes: records uses outside of sites.
        expression: this value as an expression in the program's weights.
        source: the expression of a computed weight; None for a weight of the program.
    """

    value: Any
    side_inputs: dict[Key, jax.Array]
    path: str
    layout: Layout
    escapes: Escapes
    expression: Expression
    source: Expression | None = None

    def materialize(self) -> jax.Array:
        self.escapes.paths.add(self.path)
        if self.is_cut:
            self.escapes.pieces.append(self.expression)
        return _present(self.value, self.expression)

    @property
    def is_cut(self) -> bool:
        """Whether this is a slice of the weight."""
        return any(op.cuts for op in self.layout if isinstance(op, LayoutOp))

    def at_step(self, scan: int) -> Tracked:
        return dataclasses.replace(self, layout=(*self.layout, Step()), expression=self.expression.step(scan))

    def in_specs(self, spec: Any) -> Any:
        # Side inputs are replicated, however the weight itself is sharded.
        return dataclasses.replace(self, value=spec, side_inputs=dict.fromkeys(self.side_inputs, jax.P()))

    def through(self, eqn: Any) -> Values:
        """Apply a layout operation; for a replaced weight only record it."""
        plain = isinstance(self.value, jax.Array)
        outs = _compat.bind(eqn, [self.value]) if plain else [self.value] * len(eqn.outvars)
        made = expressions.call(eqn, [self.expression]) or [self.expression] * len(outs)
        return [
            dataclasses.replace(self, value=out, layout=(*self.layout, LayoutOp(eqn, k)), expression=made[k])
            for k, out in enumerate(outs)
        ]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "side_inputs"],
    meta_fields=["expression", "escapes"],
)
@dataclasses.dataclass(frozen=True)
class Made(TracedValue):
    """A constant, or a value that is computed from weights and constants alone and is not (yet) a weight.

    Attributes:
        value: the array; None if weights that it is computed from are missing.
        side_inputs: the side inputs of those weights.
        expression: its expression.
        escapes: records uses outside of sites.
    """

    value: Any
    side_inputs: dict[Key, jax.Array]
    expression: Expression
    escapes: Escapes

    def materialize(self) -> jax.Array:
        self.escapes.paths.update(self.expression.weights)
        return _present(self.value, self.expression)

    def at_step(self, scan: int) -> Made:
        return dataclasses.replace(self, expression=self.expression.step(scan))

    def in_specs(self, spec: Any) -> Any:
        return dataclasses.replace(self, value=spec, side_inputs=dict.fromkeys(self.side_inputs, jax.P()))


def _present(value: Any, expression: Expression) -> Any:
    if value is None:
        raise UnsupportedError(
            f"at these sizes the program reads {', '.join(expression.weights)}, which it did not at the sizes of "
            "precompute; pass these sizes too, as buckets or precompute(sizes=...)"
        )
    return value


# Primitives that only move or convert a weight. `split` and `unstack` have several outputs.
LAYOUT_PRIMITIVES = (
    "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p",
    "slice", "split", "unstack", "sharding_constraint", "pvary", "pcast", "reduce_precision",
)  # fmt: skip
# Primitives that return their operands unchanged, one output each.
IDENTITIES = ("name", "stop_gradient", "optimization_barrier", "device_put")
# Containers whose bodies run once; they are entered instead of treated as one operation.
_ENTERED = ("jit", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint")


def follow_layout(context: Context, eqn: Any, values: Values) -> Values | None:
    """Carry a tracked weight through an equation that only moves its elements; None if it is not one."""
    del context
    return values[0].through(eqn) if len(values) == 1 and isinstance(values[0], Tracked) else None


def hand_on(context: Context, eqn: Any, values: Values) -> Values | None:
    """Pass values on unchanged; arrays are bound again."""
    del context
    arrays = [value.value if isinstance(value, Known) else value for value in values]
    outs = _compat.bind(eqn, arrays) if all(isinstance(array, jax.Array) for array in arrays) else arrays
    return [
        dataclasses.replace(value, value=out) if isinstance(value, Known) else out
        for value, out in zip(values, outs, strict=True)
    ]


Known = (Tracked, Made)


def cut_weight(computed: Computed, escapes: Escapes, side_inputs: Mapping[str, Mapping[Key, Any]]) -> Rule:
    """Make the rule for equations that slice a weight: a slice may be a computed weight."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        outs = follow_layout(context, eqn, values)
        if outs is None:
            return None
        names = [computed.names.get(out.expression.key) for out in outs]
        return [
            out
            if name is None
            else _computed_weight(
                computed, name, out.expression, out.value, out.side_inputs, side_inputs.get(name, {}), escapes
            )
            for name, out in zip(names, outs, strict=True)
        ]

    return rule


def compute_from_weights(computed: Computed, escapes: Escapes, side_inputs: Mapping[str, Mapping[Key, Any]]) -> Rule:
    """Make the rule for equations on weights and constants alone, whose results may be computed weights."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        operands = [expression_of(atom, value) for atom, value in zip(eqn.invars, values, strict=True)]
        parts = [operand for operand in operands if operand is not None]
        if len(parts) < len(operands) or (eqn.primitive.name in _ENTERED and any(operand.weights for operand in parts)):
            return None
        made = expressions.call(eqn, parts)
        if made is None:
            return None
        travelling: dict[Key, jax.Array] = {}
        for value in values:
            travelling |= value.side_inputs if isinstance(value, Known) else {}
        names = [computed.names.get(part.key) if part.weights and computed.names else None for part in made]
        outs: Sequence[Any] = [None] * len(made)
        arrays = [value.value if isinstance(value, Known) else value for value in values]
        if not any(array is None for array in arrays) and not (computed.given and all(names)):
            outs = context.bind(eqn, arrays)
        return [
            Made(out, travelling, part, escapes)
            if name is None
            else _computed_weight(computed, name, part, out, travelling, side_inputs.get(name, {}), escapes)
            for name, part, out in zip(names, made, outs, strict=True)
        ]

    return rule


def _computed_weight(
    computed: Computed,
    name: str,
    expression: Expression,
    value: Any,
    travelling: Mapping[Key, jax.Array],
    own: Mapping[Key, Any],
    escapes: Escapes,
) -> Tracked:
    """Turn a computed value into a weight; its side inputs came with the weights that it is computed from."""
    side_inputs = {key: travelling.get(key, array) if expression.steps else array for key, array in own.items()}
    if computed.given:
        value = travelling[name, GIVEN] if expression.steps else computed.given[name]
    return Tracked(value, side_inputs, name, (Step(),) * len(expression.steps), escapes, expression, expression)


def expression_of(atom: Any, value: Any) -> Expression | None:
    """Give the expression of an operand: of a tracked or made value, or of a literal; None if it has none."""
    if isinstance(value, Known):
        return value.expression
    return Expression.of_constant(value) if isinstance(atom, _compat.LITERAL) else None
