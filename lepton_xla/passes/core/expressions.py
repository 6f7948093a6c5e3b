"""Values that are computed from weights and constants alone, as expressions that can be compared and evaluated."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat

# Equations that are not the same each time, or that reach outside of the program.
_NEVER = re.compile(r"random_|rng_|threefry|.*callback|infeed|outfeed|.*debug|axis_index|shard_map|p(sum|max|min)\b")
# Where a function is printed with its address, which differs from trace to trace.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|\bid=\d+")


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
    """A weight, a constant, a step of a stack, or an output of an equation on such.

    Two are equal where they compute the same from the same, also when they come from two traces.

    Attributes:
        shape: of one step, where scans step over it.
        dtype: its dtype.
        path: the weight's path; empty for anything else.
        constant: the array, for a constant.
        eqn: the equation; None for a weight, a constant and a step of a stack.
        output: which of the equation's outputs this is.
        operands: the equation's operands; the stack, for a step of one.
        steps: the scans that step over it, outermost first.
    """

    shape: tuple[int, ...]
    dtype: Any
    path: str = ""
    constant: Any = None
    eqn: Any = None
    output: int = 0
    operands: tuple[Expression, ...] = ()
    steps: tuple[int, ...] = ()

    @staticmethod
    def weight(path: str, like: Any) -> Expression:
        """The weight at a path."""
        return Expression(tuple(like.shape), like.dtype, path=path)

    @staticmethod
    def of_constant(value: Any) -> Expression | None:
        """A constant of the program; None for what is none, or cannot be compared."""
        if _compat.is_traced(value) or not hasattr(value, "dtype"):
            return None
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return None
        return Expression(tuple(np.shape(value)), value.dtype, constant=value)

    def step(self, scan: int) -> Expression:
        """One step of this stack, inside the body of a scan."""
        return Expression(self.shape[1:], self.dtype, operands=(self,), steps=(*self.steps, scan))

    @functools.cached_property
    def call_key(self) -> str:
        """Equal for the outputs of one equation."""
        if self.path:
            said: tuple[Any, ...] = ("weight", self.path)
        elif self.constant is not None:
            value = np.asarray(self.constant)
            said = ("constant", value.dtype.name, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
        elif self.eqn is None:
            said = ("step", self.operands[0].key)
        else:
            shapes = [(var.aval.shape, str(var.aval.dtype)) for var in self.eqn.outvars]
            operands = [operand.key for operand in self.operands]
            said = (self.eqn.primitive.name, _spelled(self.eqn.params), shapes, operands)
        return hashlib.sha256(repr(said).encode()).hexdigest()

    @functools.cached_property
    def key(self) -> str:
        """Equal for equal expressions."""
        return f"{self.call_key}:{self.output}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @functools.cached_property
    def weights(self) -> tuple[str, ...]:
        """Paths of the weights it is computed from, in the order in which they are met."""
        return tuple(dict.fromkeys(part.path for part in _parts([self]) if part.path))

    @property
    def carrier(self) -> str:
        """A weight that all the scans step over which step over this."""
        part = self
        while not part.path:
            inside = [operand for operand in part.operands if operand.weights]
            part = max(inside, key=lambda operand: len(operand.steps))
        return part.path


def call(eqn: Any, operands: Sequence[Expression]) -> list[Expression] | None:
    """The outputs of an equation on expressions; None where it must run each time."""
    if eqn.effects or _compat.is_manual(eqn) or _NEVER.match(eqn.primitive.name):
        return None
    steps = max((operand.steps for operand in operands), key=len, default=())
    if any(operand.steps != steps[: len(operand.steps)] for operand in operands):
        return None  # the steps of two scans, each inside another body
    if any(jnp.issubdtype(var.aval.dtype, jax.dtypes.extended) for var in eqn.outvars):
        return None
    if any(_runs_each_time(inner) for inner in _compat.inner_jaxprs(eqn)):
        return None
    return [
        Expression(tuple(var.aval.shape), var.aval.dtype, eqn=eqn, output=k, operands=tuple(operands), steps=steps)
        for k, var in enumerate(eqn.outvars)
    ]


def evaluate(expressions: Iterable[Expression], weights: Mapping[str, Any]) -> list[jax.Array]:
    """Values of expressions, the axes that scans step over leading.

    Args:
        expressions: what to compute; what several have in common is computed once.
        weights: path -> array, of the weights that they are made of at least.
    """
    wanted = list(expressions)
    known: dict[str, list[Any]] = {}
    for part in _parts(wanted):
        if part.call_key in known:
            continue
        if part.path:
            known[part.call_key] = [weights[part.path]]
        elif part.constant is not None:
            known[part.call_key] = [part.constant]
        elif part.eqn is None:
            known[part.call_key] = [_value(known, part.operands[0])]
        else:
            known[part.call_key] = _bind(part, [_value(known, operand) for operand in part.operands])
    return [jnp.asarray(_value(known, expression)) for expression in wanted]


def stored_shape(expression: Expression, weights: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an expression's value, the axes that scans step over leading."""
    used = {path: weights[path] for path in expression.weights}
    return jax.eval_shape(lambda own: evaluate([expression], own)[0], used)


def support(expression: Expression, masks: Mapping[str, Any], weights: Mapping[str, Any]) -> jax.Array:
    """Where an expression may differ from zero, given where weights may: False only where it is zero for certain.

    Zeros are followed through layout, concatenation, sums, products and what maps zero to zero; anything else may make
    any value of them.

    Args:
        expression: what is computed.
        masks: path -> bool array, False where the weight is zero; other weights have no zeros.
        weights: path -> array or its shape.
    """
    known: dict[str, list[Any]] = {}
    for part in _parts([expression]):
        if part.call_key in known:
            continue
        if part.path:
            leaf = weights[part.path]
            known[part.call_key] = [jnp.asarray(masks.get(part.path, np.ones(leaf.shape, bool)))]
        elif part.constant is not None:
            known[part.call_key] = [np.asarray(part.constant) != 0]
        elif part.eqn is None:
            known[part.call_key] = [_value(known, part.operands[0])]
        else:
            known[part.call_key] = _supports(part, [_value(known, operand) for operand in part.operands])
    return _value(known, expression)


_MOVES = (
    "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p", "slice", "split", "unstack",
    "concatenate", "rev", "sharding_constraint", "device_put", "optimization_barrier", "name", "stop_gradient",
)  # fmt: skip
_KEEPS_ZERO = (
    "neg",
    "abs",
    "sign",
    "convert_element_type",
    "reduce_precision",
    "sqrt",
    "integer_pow",
    "square",
    "tanh",
)


def only_moves(expression: Expression) -> bool:
    """Whether each element of an expression is an element of a weight, and weights and it are floats."""
    parts = [part for part in _parts([expression]) if part.weights]
    calls = [part.eqn.primitive.name for part in parts if part.eqn is not None]
    moves = all(name in (*_MOVES, "convert_element_type", "reduce_precision") for name in calls)
    constants = any(part.constant is not None for part in _parts([expression]))
    return moves and not constants and all(jnp.issubdtype(part.dtype, jnp.floating) for part in parts)


def _supports(part: Expression, values: Sequence[Any]) -> list[Any]:
    name = part.eqn.primitive.name
    if name in _MOVES:
        aval_dtypes = [operand.dtype for operand in part.operands]
        moved = _bind(part, [jnp.asarray(v).astype(d) for v, d in zip(values, aval_dtypes, strict=True)])
        return [out != 0 for out in moved]
    if name in _KEEPS_ZERO and not (name == "integer_pow" and part.eqn.params["y"] <= 0):
        return list(values)
    if name == "div":
        return [_each(part, lambda a, _b: a, values)]
    if name == "mul":
        return [_each(part, jnp.logical_and, values)]
    if name in ("add", "sub", "add_any"):
        return [_each(part, jnp.logical_or, values)]
    lead = tuple(_lead(part, values))
    return [np.ones((*lead, *var.aval.shape), bool) for var in part.eqn.outvars]


def _each(part: Expression, function: Any, values: Sequence[Any]) -> Any:
    """A function of two operands that may be broadcast to one another, one step at a time."""
    shape = part.shape
    return _over_steps(
        part, lambda *pair: jnp.broadcast_to(function(*(jnp.broadcast_to(v, shape) for v in pair)), shape)
    )(*values)


def _lead(part: Expression, values: Sequence[Any]) -> tuple[int, ...]:
    deepest = max(range(len(values)), key=lambda k: len(part.operands[k].steps), default=None)
    return () if deepest is None else tuple(np.shape(values[deepest])[: len(part.steps)])


def _over_steps(part: Expression, function: Any) -> Any:
    """A function of one step's operands, for all steps at once."""
    for level in reversed(range(len(part.steps))):
        function = jax.vmap(function, in_axes=tuple(0 if len(o.steps) > level else None for o in part.operands))
    return function


def _bind(part: Expression, values: Sequence[Any]) -> list[Any]:
    def run(*operands: Any) -> list[Any]:
        with _compat.equation_context(part.eqn):
            return _compat.bind(part.eqn, operands)

    return _over_steps(part, run)(*values)


def _value(known: Mapping[str, list[Any]], part: Expression) -> Any:
    outs = known[part.call_key]
    return outs[part.output if part.eqn is not None else 0]


def _parts(expressions: Iterable[Expression]) -> Iterator[Expression]:
    """Everything that expressions are made of, and they themselves, each after its operands."""
    seen: set[int] = set()
    waiting = [(expression, False) for expression in reversed(list(expressions))]
    while waiting:
        part, ready = waiting.pop()
        if ready:
            yield part
        elif id(part) not in seen:
            seen.add(id(part))
            waiting.append((part, True))
            waiting += [(operand, False) for operand in reversed(part.operands)]


def _spelled(value: Any) -> str:
    """Parameters of an equation as text that is the same in each trace."""
    if isinstance(value, Mapping):
        return str([(str(key), _spelled(entry)) for key, entry in sorted(value.items(), key=lambda item: str(item[0]))])
    if _compat.is_jaxpr(value):
        jaxpr, consts = _compat.open_jaxpr(value)
        digests = [
            hashlib.sha256(np.asarray(c).tobytes()).hexdigest() if Expression.of_constant(c) is not None else id(c)
            for c in consts
        ]
        return _ADDRESS.sub("", str(jaxpr)) + str(digests)
    if isinstance(value, np.ndarray | jax.Array) and not _compat.is_traced(value):
        return f"{value.dtype}{value.shape}{hashlib.sha256(np.asarray(value).tobytes()).hexdigest()}"
    if isinstance(value, tuple | list):
        return str([_spelled(entry) for entry in value])
    return _ADDRESS.sub("", str(value))


def _runs_each_time(jaxpr: Any) -> bool:
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    return any(
        bool(eqn.effects)
        or _NEVER.match(eqn.primitive.name) is not None
        or any(_runs_each_time(inner) for inner in _compat.inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )
