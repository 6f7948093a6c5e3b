"""Removes duplicate and unused work: common subexpressions and dead weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_xla import _compat
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.program import Program
from lepton_xla.trees import abstract


def evaluate_once(context: Context, eqn: Any, values: Values) -> Values:
    """Evaluate an equation, or reuses the result of the same equation on the same operands."""
    operands = [materialize(value) for value in values]
    # Bodies of control flow may be traced several times, and values of one trace must not leak into another.
    key = identity(eqn, operands) if not context.container else None
    if key is None:
        return _compat.bind(eqn, operands)
    seen: dict[Any, tuple[Values, Values]] = context.walk.notes.setdefault("seen", {})
    if key not in seen:
        seen[key] = operands, _compat.bind(eqn, operands)  # keep the operands alive, so that their ids are not reused
    return list(seen[key][1])


def identity(eqn: Any, operands: Values) -> tuple[Any, ...] | None:
    """A key that is equal for equations that compute the same; None if that cannot be determined."""
    values = tuple(
        (str(value), str(atom.aval)) if isinstance(atom, _compat.LITERAL) else id(value)
        for atom, value in zip(eqn.invars, operands, strict=True)
    )
    key = (eqn.primitive.name, values, tuple(sorted(eqn.params.items(), key=lambda item: item[0])), str(eqn.ctx))
    try:
        hash(key)
    except TypeError:
        return None
    # Do not share equations without operands: they are cheap, and their results may be large.
    return key if any(isinstance(part, int) for part in values) else None


def used_weights(
    fn: Callable[..., Any], weights: dict[str, Any], program: Program, sizes: Mapping[str, int]
) -> set[str]:
    """Names of the weights that the function reads."""
    jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(fn)(abstract(weights), *program.abstract_inputs(sizes)))
    _, read = _compat.live(jaxpr)
    # The weights' variables come first, in the order in which JAX flattens a dict: by key.
    names = [name for name in sorted(weights) for _ in jax.tree.leaves(weights[name])]
    kept = {name for name, var in zip(names, jaxpr.invars, strict=False) if var in read}
    # Keep leaves that are no plain arrays: an earlier pass made them, and its function expects them.
    return kept | {name for name, leaf in weights.items() if not isinstance(leaf, jax.Array)}


def count_equations(jaxpr: Any) -> int:
    """Number of equations of a jaxpr, nested ones included."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    return sum(1 + sum(map(count_equations, _compat.inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
