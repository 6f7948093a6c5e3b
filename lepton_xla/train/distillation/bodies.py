"""The bodies of a traced function: which values leave a scope, and where attentions are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.core.containers import CONTAINERS
from lepton_xla.passes.core.sites import SITE_PRIMITIVES
from lepton_xla.passes.core.walker import Frame


@dataclasses.dataclass(frozen=True)
class Value:
    """An output of an equation; `key` is that of the walker's `Context`."""

    key: tuple[int, ...]
    index: int
    primitive: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Body:
    """One jaxpr of a function: its own, or that of a container in it.

    Attributes:
        frame: the surrounding calls.
        equations: the equations that count.
        scopes: the scope of each.
        outvars: what the body returns.
    """

    frame: Frame
    equations: tuple[Any, ...]
    scopes: tuple[str, ...]
    outvars: tuple[Any, ...]

    def value(self, position: int, index: int) -> Value:
        """An output of an equation."""
        eqn = self.equations[position]
        aval = eqn.outvars[index].aval
        return Value((*self.frame.key, id(eqn)), index, eqn.primitive.name, tuple(aval.shape))


@dataclasses.dataclass(frozen=True)
class Attention:
    """Probabilities that are multiplied by values.

    Attributes:
        scope: the scope of the product.
        value: the probabilities, as softmax returns them.
        axes: their axes in the order rows, heads, queries, keys; there may be several axes of heads, or none.
    """

    scope: str
    value: Value
    axes: tuple[int, ...]

    def arranged(self, probabilities: jax.Array) -> jax.Array:
        """Arrange as `[rows, heads, queries, keys]`."""
        moved = jnp.transpose(probabilities, self.axes)
        rows, *heads, queries, keys = moved.shape
        return jnp.reshape(moved, (rows, math.prod(heads), queries, keys))


def bodies(jaxpr: Any, frame: Frame | None = None) -> Iterator[Body]:
    """All bodies of a jaxpr, outermost first."""
    frame = frame or Frame()
    inner, _ = _compat.open_jaxpr(jaxpr)
    equations, _ = _compat.live(inner)
    scopes = tuple("/".join(part for part in (frame.scope, _compat.scope(eqn)) if part) for eqn in equations)
    yield Body(frame, tuple(equations), scopes, tuple(inner.outvars))
    for eqn in equations:
        for branch, held in enumerate(_held(eqn)):
            yield from bodies(held, frame.enter(eqn, branch))


def _held(eqn: Any) -> Sequence[Any]:
    """The jaxprs of a container, in the order in which the walker numbers them."""
    name, params = eqn.primitive.name, eqn.params
    if name not in CONTAINERS:
        return ()
    if name == "cond":
        return params["branches"]
    if name == "while":
        return (params["cond_jaxpr"], params["body_jaxpr"])
    return (params.get("call_jaxpr") or params["jaxpr"],)


def prefixes(scope: str) -> list[str]:
    """The scopes around a scope, itself included.

    >>> prefixes("net/layer_0/attention")
    ['net', 'net/layer_0', 'net/layer_0/attention']
    """
    parts = scope.split("/") if scope else []
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def in_scope(scope: str, outer: str) -> bool:
    """Whether a scope is another, or inside of it; every scope is inside of the empty one.

    >>> in_scope("net/layer_1/mlp", "net/layer_1"), in_scope("net/layer_10", "net/layer_1")
    (True, False)
    """
    return not outer or scope == outer or scope.startswith(f"{outer}/")


def output_of(scope: str, within: Iterable[Body]) -> Value | None:
    """The last value of a scope that is used outside of it; of the last body, if several enter the scope."""
    found: Value | None = None
    for body in within:
        if in_scope(body.frame.scope, scope):
            continue  # a container in the scope, whose outputs count in the body around it
        outside = {atom for atom in body.outvars if not isinstance(atom, _compat.LITERAL)}
        for eqn, own in zip(body.equations, body.scopes, strict=True):
            if not in_scope(own, scope):
                outside.update(atom for atom in eqn.invars if not isinstance(atom, _compat.LITERAL))
        for position, (eqn, own) in enumerate(zip(body.equations, body.scopes, strict=True)):
            if in_scope(own, scope):
                used = [index for index, var in enumerate(eqn.outvars) if var in outside]
                found = body.value(position, used[-1]) if used else found
    return found


def attentions(within: Iterable[Body]) -> list[Attention]:
    """All attentions: batched products one of whose operands comes from a softmax, in the order of execution."""
    found: list[Attention] = []
    for body in within:
        makers = {
            var: (position, index)
            for position, eqn in enumerate(body.equations)
            for index, var in enumerate(eqn.outvars)
        }
        for position, eqn in enumerate(body.equations):
            if eqn.primitive.name != "dot_general":
                continue
            contracted, batch = eqn.params["dimension_numbers"]
            for operand in (0, 1):
                if not batch[operand] or len(contracted[operand]) != 1:
                    continue
                made = _softmax_behind(eqn.invars[operand], body, makers)
                if made is None:
                    continue
                value = body.value(*made)
                shape = tuple(eqn.invars[operand].aval.shape)
                if value.shape == shape:
                    fixed = {*batch[operand], *contracted[operand]}
                    free = [axis for axis in range(len(shape)) if axis not in fixed]
                    axes = (*batch[operand], *free, *contracted[operand])
                    found.append(Attention(body.scopes[position], value, tuple(int(axis) for axis in axes)))
    return found


def _softmax_behind(atom: Any, body: Body, makers: dict[Any, tuple[int, int]]) -> tuple[int, int] | None:
    """The place of the softmax that a value comes from without a product in between, or None."""
    todo, seen = [atom], set[Any]()
    while todo:
        atom = todo.pop(0)
        if isinstance(atom, _compat.LITERAL) or atom not in makers or atom in seen:
            continue
        seen.add(atom)
        eqn = body.equations[makers[atom][0]]
        name = eqn.primitive.name
        if name in SITE_PRIMITIVES:
            continue
        if name == "div" and _is_exponential(eqn.invars[0], body, makers):
            return makers[atom]
        inner = _compat.inner_jaxprs(eqn)
        if inner and name != "scan" and _holds(inner, {"exp"}):
            if _holds(inner, set(SITE_PRIMITIVES)):
                continue
            return makers[atom]
        todo += eqn.invars
    return None


def _is_exponential(atom: Any, body: Body, makers: dict[Any, tuple[int, int]]) -> bool:
    while not isinstance(atom, _compat.LITERAL) and atom in makers:
        eqn = body.equations[makers[atom][0]]
        if eqn.primitive.name in ("exp", "exp2"):
            return True
        if eqn.primitive.name not in ("convert_element_type", "select_n", "mul", "copy"):
            return False
        atom = eqn.invars[-1] if eqn.primitive.name == "select_n" else eqn.invars[0]
    return False


def _holds(jaxprs: Sequence[Any], primitives: set[str]) -> bool:
    return any(
        eqn.primitive.name in primitives or _holds(_compat.inner_jaxprs(eqn), primitives)
        for jaxpr in jaxprs
        for eqn in _compat.open_jaxpr(jaxpr)[0].eqns
    )
