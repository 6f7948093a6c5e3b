"""Joins a convolution of one position by a kernel to the depthwise one that alone reads its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lepton_xla import _compat
from lepton_xla.kernels import expanding
from lepton_xla.kernels.convolution import FLOAT, FloatOperands, Geometry
from lepton_xla.passes.core.activations import Graph
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Rule, Values, materialize


def join(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compute pairs of convolutions by one kernel.

    Args:
        fn: any function, for inference, after `fusing.fuse`.
    """
    return rewrite(fn, _rules, inline=True, on_unknown="keep")


def joins(closed: Any) -> bool:
    """Whether a jaxpr that `join` made has such a pair."""
    return any(eqn.primitive is expanding.PRIMITIVE for eqn in closed.jaxpr.eqns)


def _rules(closed: Any) -> Mapping[str, Rule]:
    jaxpr, _ = _compat.open_jaxpr(closed)
    equations, _ = _compat.live(jaxpr)
    graph = Graph(equations, jaxpr.outvars)
    firsts: dict[int, Any] = {}
    for eqn in equations:
        reader = graph.only_reader(eqn.outvars[0]) if _widens(eqn) else None
        if reader is not None and _filters(reader) and reader.invars[0] is eqn.outvars[0]:
            firsts[id(reader)] = eqn
    members = {id(eqn) for eqn in firsts.values()}

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        notes = context.walk.notes
        if id(eqn) in members:
            notes[str(id(eqn))] = values
            return [None]
        first = firsts.get(id(eqn))
        if first is None:
            return None
        widening = FloatOperands(*(materialize(value) for value in notes[str(id(first))]))
        filters = FloatOperands(None, *(materialize(value) for value in values[1:]))
        return [
            expanding.expand(
                widening.x,
                (widening.weight, widening.bias, first.params["epilogue"]),
                (filters.weight, filters.bias, eqn.params["epilogue"]),
                eqn.params["geometry"],
            )
        ]

    return {FLOAT: rule}


def _plain(eqn: Any) -> bool:
    """Whether an equation is a convolution in float by a kernel, without a gate and a residual."""
    if eqn.primitive.name != FLOAT:
        return False
    given = FloatOperands(*(atom.aval for atom in eqn.invars))
    return given.gate.shape == given.residual.shape == (0,)


def _widens(eqn: Any) -> bool:
    return _plain(eqn) and eqn.params["geometry"] == Geometry((1, 1)) and not _filters(eqn)


def _filters(eqn: Any) -> bool:
    return _plain(eqn) and eqn.invars[1].aval.shape[2] == 1 and eqn.invars[0].aval.shape[3] != 1
