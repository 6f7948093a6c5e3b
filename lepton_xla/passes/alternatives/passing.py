"""Lets a convolution of codes hand codes to the next one, which would round its floats to them.

They are the same codes. Where kernels add a bias or compute a SiLU, what lies near the middle between two codes may
become either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lepton_xla import _compat
from lepton_xla.kernels.convolution import PRIMITIVES, Operands
from lepton_xla.passes.core.activations import Graph
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Rule, Values, materialize

_NAME = PRIMITIVES["integer_convolution"].name


def pass_codes(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let convolutions of codes by kernels write what those that read them would round it to.

    That is so where they alone read it, with one static scale.

    Args:
        fn: any function, for inference, after `fuse`.
    """
    return rewrite(fn, _rules, inline=True, on_unknown="keep")


def _rules(closed: Any) -> Mapping[str, Rule]:
    jaxpr, _ = _compat.open_jaxpr(closed)
    passed = dict(_passed(jaxpr))

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        notes = context.walk.notes
        maker = passed.get(id(eqn.invars[0]))
        if maker is None and id(eqn.outvars[0]) not in passed:
            return None
        image, *others = values
        given = Operands(image if maker is not None else materialize(image), *map(materialize, others))
        if maker is not None:
            key = f"codes {id(maker)}"
            if key not in notes:  # its scale is known only now
                before = notes[f"operands {id(maker)}"]
                notes[key] = before._replace(result=given.static).bind(maker.params)
            given = given._replace(x=notes[key])
        if id(eqn.outvars[0]) in passed:
            notes[f"operands {id(eqn)}"] = given
            return [None]
        return [given.bind(eqn.params)]

    return {_NAME: rule} if passed else {}


def _passed(jaxpr: Any) -> Iterator[tuple[int, Any]]:
    """The results that are handed on as codes, and the equations that make them."""
    equations, _ = _compat.live(jaxpr)
    graph = Graph(equations, jaxpr.outvars)
    for eqn in equations:
        out = eqn.outvars[0]
        if eqn.primitive.name != _NAME or out in jaxpr.outvars:
            continue
        readers = graph.readers.get(out, [])
        scales = {id(Operands(*reader.invars).static) if _rounds(reader, out) else None for reader in readers}
        if len(scales) == 1 and None not in scales and not Operands(*eqn.invars).result.aval.shape[0]:
            yield id(out), eqn


def _rounds(reader: Any, image: Any) -> bool:
    """Whether an equation rounds an image with a static scale, and does nothing else with it."""
    if reader.primitive.name != _NAME:
        return False
    given = Operands(*reader.invars)
    gated = given.gate.aval.ndim > 1
    return given.x is image and given.static.aval.shape == (1,) and given.residual is not image and not gated
