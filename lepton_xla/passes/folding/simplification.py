"""Work that is done twice or for nothing: common subexpressions, dead weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_xla import _compat
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.program import Program
from lepton_xla.trees import abstract


def evaluate_once(context: Context, eqn: Any, values: Values) -> Values:
    """Evaluates an equation, or gives what the same one on the same operands gave before (common subexpressions)."""
    operands = [materialize(value) for value in values]
    # A body of control flow may be traced several times, and a value of one trace must not reach another.
    key = identity(eqn, operands) if not context.container else None
    if key is None:
        return _compat.bind(eqn, operands)
    seen: dict[Any, tuple[Values, Values]] = context.walk.notes.setdefault("seen", {})
    if key not in seen:
        seen[key] = operands, _compat.bind(eqn, operands)  # the operands are held so that their ids stay theirs
    return list(seen[key][1])


def identity(eqn: Any, operands: Values) -> tuple[Any, ...] | None:
    """Equal for two equations that compute the same; None where that cannot be told."""
    values = tuple(
        (str(value), str(atom.aval)) if isinstance(atom, _compat.LITERAL) else id(value)
        for atom, value in zip(eqn.invars, operands, strict=True)
    )
    key = (eqn.primitive.name, values, tuple(sorted(eqn.params.items(), key=lambda item: item[0])), str(eqn.ctx))
    try:
        hash(key)
    except TypeError:
        return None
    # What takes no operands is cheap, and may be large.
    return key if any(isinstance(part, int) for part in values) else None


def used_weights(
    fn: Callable[..., Any], weights: dict[str, Any], program: Program, sizes: Mapping[str, int]
) -> set[str]:
    """Names of the weights that the function reads."""
    jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(fn)(abstract(weights), *program.abstract_inputs(sizes)))
    _, read = _compat.live(jaxpr)
    # The variables of the weights come first, in the order in which JAX flattens a dict: by key.
    names = [name for name in sorted(weights) for _ in jax.tree.leaves(weights[name])]
    kept = {name for name, var in zip(names, jaxpr.invars, strict=False) if var in read}
    # What is not a plain array was made by an earlier pass, whose function expects to find it.
    return kept | {name for name, leaf in weights.items() if not isinstance(leaf, jax.Array)}


def count_equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of those inside it."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    return sum(1 + sum(map(count_equations, _compat.inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
