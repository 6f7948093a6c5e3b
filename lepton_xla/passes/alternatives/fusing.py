"""Gives convolutions by kernels what is around them, so that it costs no pass of its own.

That is bias, activation and residual after them, and before them a factor for each channel of an example, as
squeeze-excite has it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla import _compat
from lepton_xla.kernels import convolution
from lepton_xla.kernels.convolution import OPERANDS, Epilogue
from lepton_xla.passes.core.activations import Graph, find_activation
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Rule, Values, materialize

_AROUND = ("add", "max", "min", "clamp", "logistic", "mul")


@dataclasses.dataclass
class _Chain:
    """A convolution and the equations around it that it can compute.

    Attributes:
        start: the convolution.
        epilogue: what it computes in the end.
        end: the last of the equations.
        members: all of them but the last, `start` included.
        bias: the equation that adds a bias, and which of its operands that is.
        residual: likewise.
        gate: the equation before it that multiplies its images by factors, and which of its operands these are.
    """

    start: Any
    end: Any
    epilogue: Epilogue
    members: list[Any] = dataclasses.field(default_factory=list[Any])
    bias: tuple[Any, int] | None = None
    residual: tuple[Any, int] | None = None
    gate: tuple[Any, int] | None = None

    @property
    def free(self) -> bool:
        """Whether no activation and no residual is there yet."""
        return self.epilogue.activation == "none" and not self.added

    @property
    def added(self) -> bool:
        """Whether a residual is."""
        return self.residual is not None or self.start.invars[-1].aval.ndim > 1

    @property
    def biased(self) -> bool:
        """Whether a bias is."""
        return self.bias is not None or self.start.invars[-2].aval.shape != (0,)


def fuse(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let convolutions by kernels compute the bias, the activation and the residual that follow them, and gates.

    Args:
        fn: any function, for inference.
    """
    flat = rewrite(fn, dict.fromkeys((*convolution.PRIMITIVES, *_AROUND), _leave), inline=True, on_unknown="keep")
    return rewrite(flat, _rules, inline=True, on_unknown="keep")


def biased(out: jax.Array, bias: jax.Array) -> jax.Array:
    """The result of a convolution with a bias and a ReLU6, as most have them; computed by a kernel if it is one's.

    Args:
        out: float32 [N, H, W, C].
        bias: float32 [C].
    """
    return lax.min(lax.max(out + jnp.reshape(bias, (1, 1, 1, -1)), 0.0), 6.0)


def _leave(_context: Context, _eqn: Any, _values: Values) -> None:
    """Leaves an equation; asking for it inlines what it is in."""


def _rules(closed: Any) -> Mapping[str, Rule]:
    jaxpr, _ = _compat.open_jaxpr(closed)
    chains = [chain for chain in _chains(jaxpr) if chain.members]
    ends = {id(chain.end): chain for chain in chains}
    members = {id(eqn) for chain in chains for eqn in chain.members}

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        notes = context.walk.notes
        if id(eqn) in members:
            notes[str(id(eqn))] = values
            return [None] * len(eqn.outvars)
        chain = ends.get(id(eqn))
        if chain is None:
            return None
        notes[str(id(eqn))] = values
        values = notes[str(id(chain.start))]
        if chain.gate is not None:
            gate, place = chain.gate
            factors = notes[str(id(gate))]
            named = OPERANDS[chain.start.primitive.name](*values)
            values = list(named._replace(x=factors[1 - place], gate=factors[place]))
        operands = [materialize(value) for value in values]

        def operand(place: tuple[Any, int] | None) -> jax.Array | None:
            return None if place is None else materialize(notes[str(id(place[0]))][place[1]])

        bias = operand(chain.bias)
        if bias is not None:
            bias = jnp.reshape(bias, (-1,))
        params = chain.start.params
        return [
            convolution.followed(
                chain.start.primitive.name, operands, bias, operand(chain.residual), params["geometry"], chain.epilogue
            )
        ]

    names = {eqn.primitive.name for chain in chains for eqn in (*chain.members, chain.end)}
    return dict.fromkeys(names, rule)


def _chains(jaxpr: Any) -> list[_Chain]:
    equations, _ = _compat.live(jaxpr)
    graph = Graph(equations, jaxpr.outvars)
    found: list[_Chain] = []
    taken: set[int] = set()  # an addition of two convolutions belongs to one of them
    for eqn in equations:
        if eqn.primitive.name in convolution.PRIMITIVES:
            chain = _Chain(eqn, eqn, eqn.params["epilogue"])
            _gate(chain, graph, taken)
            while _extend(chain, graph, taken):
                pass
            taken |= {id(each) for each in (*chain.members, chain.end)}
            found.append(chain)
    return found


def _gate(chain: _Chain, graph: Graph, taken: set[int]) -> None:
    """Take the equation before a convolution in, if it multiplies each channel of an example by a factor."""
    start = chain.start
    eqn = graph.made_by(start.invars[0])
    if eqn is None or id(eqn) in taken:
        return
    if eqn.primitive.name != "mul" or graph.only_reader(eqn.outvars[0]) is not start:
        return
    shape = eqn.outvars[0].aval.shape
    images, factors = shape, (shape[0], 1, 1, shape[3])
    shapes = [atom.aval.shape for atom in eqn.invars]
    given = OPERANDS[start.primitive.name](*(atom.aval for atom in start.invars))
    fit = factors != images and shapes in ([images, factors], [factors, images])
    if fit and given.may_be_gated(start.params["geometry"]):
        chain.gate = (eqn, shapes.index(factors))
        chain.members.append(eqn)


def _extend(chain: _Chain, graph: Graph, taken: set[int]) -> bool:
    """Take the next equations in, if there are some that the kernel can compute."""
    out = chain.end.outvars[0]
    if any(id(eqn) in taken for eqn in graph.readers.get(out, [])):
        return False
    before = not chain.added or chain.epilogue.add_first
    if chain.epilogue.activation == "none" and before:
        name, equations = find_activation(graph, out) or ("", [])
        if name == "silu":
            return _take(chain, equations, activation="silu")
    eqn = graph.only_reader(out)
    if eqn is None:
        return False
    name = eqn.primitive.name
    if eqn.outvars[0].aval.shape != out.aval.shape or eqn.outvars[0].aval.dtype != jnp.float32:
        return False
    if name == "add":
        return _add(chain, eqn, 1 if eqn.invars[0] is out else 0)
    bounds = _bounds(eqn, out)
    if bounds is None or not before or chain.epilogue.activation == "silu":
        return False
    low, high = bounds
    old = chain.epilogue
    if name != "min" and old.activation == "clamp" and old.high < low:
        return False  # the kernel bounds from below first
    return _take(chain, [eqn], activation="clamp", low=max(old.low, low), high=min(old.high, high))


def _take(chain: _Chain, equations: Sequence[Any], **changes: Any) -> bool:
    chain.members += [chain.end, *equations[:-1]]
    chain.end = equations[-1]
    chain.epilogue = dataclasses.replace(chain.epilogue, **changes)
    return True


def _add(chain: _Chain, eqn: Any, place: int) -> bool:
    other, out = eqn.invars[place].aval, eqn.outvars[0].aval
    if isinstance(eqn.invars[place], _compat.LITERAL) or other.dtype != jnp.float32 or other.ndim != 4:
        return False
    if chain.free and not chain.biased and other.shape == (1, 1, 1, out.shape[3]):
        chain.bias = (eqn, place)
        return _take(chain, [eqn])
    if not chain.added and other.shape == out.shape:
        chain.residual = (eqn, place)
        return _take(chain, [eqn], add_first=chain.epilogue.activation == "none")
    return False


def _bounds(eqn: Any, out: Any) -> tuple[float, float] | None:
    """What a `max`, `min` or `clamp` by constants bounds to."""
    name = eqn.primitive.name
    if name not in ("max", "min", "clamp"):
        return None
    literals = [_constant(atom) for atom in eqn.invars]
    if name == "clamp":
        low, _, high = literals
        return None if low is None or high is None or eqn.invars[1] is not out or not low <= high else (low, high)
    bound = next((value for value in literals if value is not None), None)
    if bound is None or math.isnan(bound):
        return None
    return (bound, math.inf) if name == "max" else (-math.inf, bound)


def _constant(atom: Any) -> float | None:
    value: Any = atom.val if isinstance(atom, _compat.LITERAL) else None
    return float(value) if value is not None and np.ndim(value) == 0 else None
