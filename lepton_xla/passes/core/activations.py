"""Finds activations that follow a value, by what they compute and not by how they are written.

The operations that depend on the value alone are evaluated in NumPy at points all over the line, and compared with the
activations that kernels have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.walker import TRANSPARENT

# More operations than any spelling of an activation has.
_MOST_OPERATIONS = 24
# They are traced one after the other; what is between them is little.
_NEAR = 100
_TOLERANCE = 2e-6

_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])
ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "abs": np.abs, "add": np.add, "copy": np.copy, "copy_p": np.copy, "div": np.divide, "eq": np.equal, "erf": _erf,
    "erfc": _erfc, "exp": np.exp, "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal,
    "log1p": np.log1p, "logistic": lambda x: 1 / (1 + np.exp(-x)), "lt": np.less, "max": np.maximum,
    "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative, "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x), "select_n": lambda which, *cases: np.where(which, cases[-1], cases[0]),
    "sqrt": np.sqrt, "square": np.square, "sub": np.subtract, "tanh": np.tanh,
}  # fmt: skip


def _points() -> np.ndarray:
    far = np.geomspace(1e-6, 3e38, 180)  # a bound far away is one too
    return np.concatenate([-far, [0.0], far, np.linspace(-9, 9, 181), [np.nan]])


def _expected() -> dict[str, np.ndarray]:
    x = _points()
    with np.errstate(over="ignore"):
        return {
            "relu": np.maximum(x, 0),
            "silu": x / (1 + np.exp(-x)),
            "gelu": x * 0.5 * _erfc(-x / math.sqrt(2)),
            "gelu_tanh": 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        }


_EXPECTED = _expected()


class Graph:
    """Who makes and who reads the values of a jaxpr."""

    def __init__(self, equations: Sequence[Any], outvars: Sequence[Any]) -> None:
        self.equations = equations
        self.makers = {var: eqn for eqn in equations for var in eqn.outvars}
        self.readers: dict[Any, list[Any]] = {}
        for eqn in equations:
            for atom in dict.fromkeys(_read(eqn)):
                self.readers.setdefault(atom, []).append(eqn)
        self.outputs = {atom for atom in outvars if not isinstance(atom, _compat.LITERAL)}

    def only_reader(self, var: Any) -> Any:
        """The equation that reads a value, if it alone does, as one operand, and the value is no result; else None."""
        readers = self.readers.get(var, [])
        once = len(readers) == 1 and _read(readers[0]).count(var) == 1
        return readers[0] if once and var not in self.outputs else None

    def following(self, var: Any) -> Sequence[Any]:
        """The equations among which those that compute an activation of a value are."""
        readers = {id(eqn) for eqn in self.readers.get(var, [])}
        first = next((at for at, eqn in enumerate(self.equations) if id(eqn) in readers), len(self.equations))
        return self.equations[first : first + _NEAR]

    def made_by(self, atom: Any) -> Any:
        """The equation that makes a value; None for an input or a constant."""
        return None if isinstance(atom, _compat.LITERAL) else self.makers.get(atom)


def find_activation(graph: Graph, start: Any) -> tuple[str, list[Any]] | None:
    """The longest activation that begins at a value, and its equations in order."""
    values: dict[Any, Any] = {start: _points()}
    found: tuple[str, list[Any]] | None = None
    with np.errstate(all="ignore"):
        for eqn in graph.following(start):
            out = eqn.outvars[0]
            if len(eqn.outvars) > 1 or out.aval.shape != start.aval.shape or values.keys().isdisjoint(_read(eqn)):
                continue
            value = _evaluate(graph, eqn, values)
            if value is None:
                continue
            values[out] = value
            name = _named(value) if out.aval.dtype == jnp.float32 else None
            if name is not None and _closed(graph, start, out):
                found = name, _ancestors(graph, start, out)
            if len(values) > _MOST_OPERATIONS:
                break
    return found


def _read(eqn: Any) -> list[Any]:
    return [atom for atom in eqn.invars if not isinstance(atom, _compat.LITERAL)]


def _evaluate(graph: Graph, eqn: Any, values: Mapping[Any, Any]) -> np.ndarray | None:
    """The value of an equation at the points; None if it does not depend on the product alone, or not elementwise."""
    operands: list[Any] = [
        constant_of(graph, atom) if isinstance(atom, _compat.LITERAL) or atom not in values else values[atom]
        for atom in eqn.invars
    ]
    if any(operand is None for operand in operands):
        return None
    name = eqn.primitive.name
    if name in TRANSPARENT and len(eqn.outvars) == 1:
        return _evaluate_body(eqn, operands)
    if name == "integer_pow":
        return operands[0] ** float(eqn.params["y"])
    if name == "convert_element_type":
        return operands[0] if eqn.outvars[0].aval.dtype == jnp.float32 else None
    if name == "broadcast_in_dim":
        return operands[0] if np.ndim(operands[0]) == 0 else None
    function = ELEMENTWISE.get(name)
    return None if function is None else np.asarray(function(*operands), np.float64)


def _evaluate_body(eqn: Any, operands: Sequence[Any]) -> np.ndarray | None:
    """The value of a call, such as `jax.nn.silu`, at the points."""
    bodies = _compat.inner_jaxprs(eqn)
    if len(bodies) != 1:
        return None
    body, consts = _compat.open_jaxpr(bodies[0])
    if len(body.invars) != len(operands) or len(consts):
        return None
    graph = Graph(body.eqns, body.outvars)
    values = dict(zip(body.invars, operands, strict=True))
    for inner in body.eqns:
        value = _evaluate(graph, inner, values) if len(inner.outvars) == 1 else None
        if value is not None:
            values[inner.outvars[0]] = value
    (out,) = body.outvars
    return None if isinstance(out, _compat.LITERAL) else values.get(out)


def constant_of(graph: Graph, atom: Any) -> float | None:
    """The value of a number, also of one that is broadcast, or computed from numbers; None if it is none."""
    if isinstance(atom, _compat.LITERAL):
        return float(atom.val) if np.ndim(atom.val) == 0 else None
    maker = graph.makers.get(atom)
    if maker is not None and maker.primitive.name in ("broadcast_in_dim", "convert_element_type"):
        return constant_of(graph, maker.invars[0])
    if maker is None or maker.primitive.name not in ELEMENTWISE or maker.outvars[0].aval.ndim:
        return None
    operands = [constant_of(graph, each) for each in maker.invars]
    return None if None in operands else float(ELEMENTWISE[maker.primitive.name](*operands))


def _named(value: np.ndarray) -> str | None:
    """The activation with these values."""
    bound = _TOLERANCE * (1 + np.abs(_points()))
    for name, expected in _EXPECTED.items():
        if np.all((np.abs(value - expected) <= bound) | (np.isnan(value) & np.isnan(expected))):
            return name
    return None


def _ancestors(graph: Graph, start: Any, out: Any) -> list[Any]:
    """The equations between two values, in order."""
    found: list[Any] = []

    def visit(var: Any) -> None:
        eqn = graph.made_by(var)
        if var is start or eqn is None or eqn in found or constant_of(graph, var) is not None:
            return
        for atom in eqn.invars:
            if not isinstance(atom, _compat.LITERAL):
                visit(atom)
        found.append(eqn)

    visit(out)
    return found


def _closed(graph: Graph, start: Any, out: Any) -> bool:
    """Whether nothing else reads what is between two values, nor the first of them."""
    equations = _ancestors(graph, start, out)
    between = [start, *(eqn.outvars[0] for eqn in equations[:-1])]
    return all(
        var not in graph.outputs and all(eqn in equations for eqn in graph.readers.get(var, [])) for var in between
    )
