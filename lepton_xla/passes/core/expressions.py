"""Values computed from weights and constants alone, as expressions that can be compared and evaluated."""

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

# Primitives that are not deterministic, or that reach outside of the program.
_NEVER = re.compile(r"random_|rng_|threefry|.*callback|infeed|outfeed|.*debug|axis_index|shard_map|p(sum|max|min)\b")
# Addresses in the text of functions, which differ between traces.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|\bid=\d+")


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
    """A weight, a constant, a step of a stack, or an output of an equation on expressions.

    Two expressions are equal if they compute the same from the same inputs, even if they come from different traces.

    Attributes:
        shape: shape of one step, if scans step over it.
        dtype: its dtype.
        path: path of a weight; empty for anything else.
        constant: the array of a constant.
        eqn: the equation; None for a weight, a constant and a step of a stack.
        output: index among the equation's outputs.
        operands: operands of the equation; for a step, the stack.
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
        """Make a constant; None if the value is none, or cannot be compared."""
        if _compat.is_traced(value) or not hasattr(value, "dtype"):
            return None
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return None
        return Expression(tuple(np.shape(value)), value.dtype, constant=value)

    def step(self, scan: int) -> Expression:
        """Take one step of this stack, inside the body of a scan."""
        return Expression(self.shape[1:], self.dtype, operands=(self,), steps=(*self.steps, scan))

    @functools.cached_property
    def call_key(self) -> str:
        """A key that is equal for the outputs of one equation."""
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
        """A key that is equal for equal expressions."""
        return f"{self.call_key}:{self.output}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @functools.cached_property
    def weights(self) -> tuple[str, ...]:
        """Paths of its weights, in the order of occurrence."""
        return tuple(dict.fromkeys(part.path for part in _parts([self]) if part.path))

    @property
    def carrier(self) -> str:
        """The path of a weight that the same scans step over."""
        part = self
        while not part.path:
            inside = [operand for operand in part.operands if operand.weights]
            part = max(inside, key=lambda operand: len(operand.steps))
        return part.path


def call(eqn: Any, operands: Sequence[Expression]) -> list[Expression] | None:
    """Apply an equation to expressions; None if it must run on each call."""
    if eqn.effects or _compat.is_manual(eqn) or _NEVER.match(eqn.primitive.name):
        return None
    steps = max((operand.steps for operand in operands), key=len, default=())
    if any(operand.steps != steps[: len(operand.steps)] for operand in operands):
        return None  # steps of two scans in different bodies
    if any(jnp.issubdtype(var.aval.dtype, jax.dtypes.extended) for var in eqn.outvars):
        return None
    if any(_runs_each_time(inner) for inner in _compat.inner_jaxprs(eqn)):
        return None
    return [
        Expression(tuple(var.aval.shape), var.aval.dtype, eqn=eqn, output=k, operands=tuple(operands), steps=steps)
        for k, var in enumerate(eqn.outvars)
    ]


def evaluate(expressions: Iterable[Expression], weights: Mapping[str, Any]) -> list[jax.Array]:
    """Evaluate expressions; axes that scans step over are leading.

    Args:
        expressions: the expressions; common parts are computed once.
        weights: path -> array, with at least their weights.
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
    """Shape and dtype of an expression's value; axes that scans step over are leading."""
    used = {path: weights[path] for path in expression.weights}
    return jax.eval_shape(lambda own: evaluate([expression], own)[0], used)


def support(expression: Expression, masks: Mapping[str, Any], weights: Mapping[str, Any]) -> jax.Array:
    """Where an expression may be nonzero, given where weights may be: False only where it is certainly zero.

    Zeros are tracked through layout, concatenation, sums, products and functions with f(0) = 0. Other operations may
    return anything.

    Args:
        expression: the expression.
        masks: path -> bool array, False where the weight is zero; other weights count as nonzero.
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
    """Whether each element of an expression is an element of a weight, and it and the weights are floats."""
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
    """Apply a function of two broadcastable operands, one step at a time."""
    shape = part.shape
    return _over_steps(
        part, lambda *pair: jnp.broadcast_to(function(*(jnp.broadcast_to(v, shape) for v in pair)), shape)
    )(*values)


def _lead(part: Expression, values: Sequence[Any]) -> tuple[int, ...]:
    deepest = max(range(len(values)), key=lambda k: len(part.operands[k].steps), default=None)
    return () if deepest is None else tuple(np.shape(values[deepest])[: len(part.steps)])


def _over_steps(part: Expression, function: Any) -> Any:
    """Vectorize a function of one step's operands over all steps."""
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
    """All parts of expressions and the expressions themselves, each after its operands."""
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
    """Parameters of an equation as text that is equal in each trace."""
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
