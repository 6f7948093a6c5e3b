"""Finds what follows a product of codes and gives it to the kernel: bias, activation, sum with another activation.

A kernel computes these while its result is in the cache; XLA cannot fuse anything into a custom call. An activation is
found by its values, not by how it is written: the operations that depend on the product alone are evaluated in NumPy at
points all over the line, and compared with the activations that kernels have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels import integer_product, weight_only
from lepton_xla.kernels.epilogue import Epilogue
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import TRANSPARENT, Context, Values

# Kernels with epilogues, by the name of their primitive; the last three operands and parameters are an epilogue's.
_KERNELS = {each.name: each for each in (integer_product.PRIMITIVE, weight_only.PRIMITIVE)}
_SITE = "site="
# More operations than any spelling of an activation has.
_MOST_OPERATIONS = 24
# They are traced one after the other; what is between them is little.
_NEAR = 100
_TOLERANCE = 2e-6

_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])
_ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "abs": np.abs, "add": np.add, "copy": np.copy, "copy_p": np.copy, "div": np.divide, "eq": np.equal, "erf": _erf,
    "erfc": _erfc, "exp": np.exp, "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal,
    "log1p": np.log1p, "logistic": lambda x: 1 / (1 + np.exp(-x)), "lt": np.less, "max": np.maximum,
    "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative, "pow": np.power,
    "select_n": lambda which, *cases: np.where(which, cases[-1], cases[0]), "square": np.square,
    "sub": np.subtract, "tanh": np.tanh,
}  # fmt: skip
_SAME_ROWS = ("reshape", "squeeze", "expand_dims", "copy", "copy_p", "broadcast_in_dim")


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


@dataclasses.dataclass
class Pattern:
    """A product and what follows it, in one jaxpr.

    Attributes:
        product: the kernel's equation.
        last: the equation whose result replaces all.
        inside: the equations between them, whose results nothing else reads.
        bias: the equation that reads the bias, and the index of that operand; None if there is no bias.
        activation: a key of `ACTIVATIONS`.
        residual: the equation, and the index of the operand, that is added last.
    """

    product: Any
    last: Any
    inside: list[Any] = dataclasses.field(default_factory=list[Any])
    bias: tuple[Any, int] | None = None
    activation: str = ""
    residual: tuple[Any, int] | None = None

    def __str__(self) -> str:
        parts = ["bias" if self.bias else "", self.activation, "residual" if self.residual else ""]
        return " + ".join(filter(None, parts))


def of_site(name: str) -> contextlib.AbstractContextManager[Any]:
    """Mark the products in a block as those of a site."""
    return jax.named_scope(_SITE + urllib.parse.quote(name, safe=""))


def _site_of(eqn: Any) -> str | None:
    marks = [part for part in _compat.scope(eqn).split("/") if part.startswith(_SITE)]
    return urllib.parse.unquote(marks[-1].removeprefix(_SITE)) if marks else None


def fuse(fn: Callable[..., Any], fused: dict[str, str] | None = None) -> Callable[..., Any]:
    """Give what follows products by kernels to the kernels.

    Args:
        fn: any function.
        fused: gets what was found, by name of the site, when the function is traced.
    """

    def rules(closed: Any) -> Mapping[str, Any]:
        roles: dict[int, Pattern] = {}
        reads: dict[int, list[tuple[Pattern, str, int]]] = {}  # several patterns may read one bias
        for pattern in find(closed):
            site = _site_of(pattern.product)
            if fused is not None and site is not None:
                fused[site] = str(pattern)
            for eqn in (pattern.product, *pattern.inside, pattern.last):
                roles[id(eqn)] = pattern
            for name, place in (("bias", pattern.bias), ("residual", pattern.residual)):
                if place is not None:
                    reads.setdefault(id(place[0]), []).append((pattern, name, place[1]))
        held: dict[tuple[int, str], Any] = {}

        def rule(_context: Context, eqn: Any, values: Values) -> Values | None:
            for reader, name, index in reads.get(id(eqn), ()):
                held[id(reader), name] = values[index]
            pattern = roles.get(id(eqn))
            if pattern is None:
                return None
            if eqn is pattern.product:
                held[id(pattern), "product"] = values
            if eqn is pattern.last:
                operands = {name: held.pop((id(pattern), name), None) for name in ("product", "bias", "residual")}
                return [_compute(pattern, eqn, **operands)]
            if eqn is pattern.product or any(eqn is each for each in pattern.inside):
                return [_REPLACED]
            return None

        names = {eqn.primitive.name for each in roles.values() for eqn in (each.product, each.last, *each.inside)}
        names |= {each.bias[0].primitive.name for each in roles.values() if each.bias}
        return dict.fromkeys(names, rule)

    return rewrite(fn, rules, inline=True, on_unknown="keep")


_REPLACED = object()
"""Stands for a result that only equations of a pattern read."""


def _compute(pattern: Pattern, last: Any, product: Values, bias: Any, residual: Any) -> jax.Array:
    rows, columns = pattern.product.outvars[0].aval.shape
    epilogue = Epilogue(
        None if bias is None else jnp.reshape(bias, (columns,)),
        pattern.activation,
        None if residual is None else jnp.reshape(residual, (rows, columns)),
    )
    *others, _, _ = product
    bias, residual, activation = epilogue.operands()
    params = {**pattern.product.params, "activation": activation}
    out = _KERNELS[pattern.product.primitive.name].bind(*others, bias, residual, **params)
    return jnp.reshape(out, last.outvars[0].aval.shape)


def find(closed: Any) -> Iterator[Pattern]:
    """Find the patterns of a jaxpr and of all jaxprs inside it."""
    jaxpr, _ = _compat.open_jaxpr(closed)
    equations, _ = _compat.live(jaxpr)
    graph = _Graph(equations, jaxpr.outvars)
    taken: set[int] = set()  # a sum of two products belongs to one of them
    for eqn in equations:
        if eqn.primitive.name in _KERNELS and eqn.params["activation"] == 0:
            pattern = _match(graph, eqn, taken)
            if pattern is not None:
                taken |= {id(each) for each in (*pattern.inside, pattern.last)}
                yield pattern
        for inner in _compat.inner_jaxprs(eqn):
            yield from find(inner)


class _Graph:
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
        readers = self.readers.get(var, [])
        return readers[0] if len(readers) == 1 and var not in self.outputs else None

    def following(self, var: Any) -> Sequence[Any]:
        """The equations among which those that compute an activation of a value are."""
        readers = {id(eqn) for eqn in self.readers.get(var, [])}
        first = next((at for at, eqn in enumerate(self.equations) if id(eqn) in readers), len(self.equations))
        return self.equations[first : first + _NEAR]

    def made_by(self, atom: Any) -> Any:
        return None if isinstance(atom, _compat.LITERAL) else self.makers.get(atom)


def _match(graph: _Graph, product: Any, taken: set[int]) -> Pattern | None:
    columns = product.outvars[0].aval.shape[1]
    pattern = Pattern(product, product)
    passed: list[Any] = []  # since `last`
    var = product.outvars[0]

    def advance(equations: Sequence[Any]) -> Any:
        if pattern.last is not product:
            pattern.inside.append(pattern.last)
        pattern.inside += [*passed, *equations[:-1]]
        passed.clear()
        pattern.last = equations[-1]
        return equations[-1].outvars[0]

    while True:
        eqn = graph.only_reader(var)
        if eqn is not None and id(eqn) in taken:
            break
        if eqn is not None and _keeps_rows(eqn, columns):
            passed.append(eqn)
            var = eqn.outvars[0]
            continue
        if eqn is not None and eqn.primitive.name == "add" and len({*map(id, eqn.invars)}) == 2:
            side = next(index for index, atom in enumerate(eqn.invars) if atom is not var)
            bias = _bias(graph, eqn, side, columns)
            if bias is not None and pattern.bias is None and not pattern.activation:
                pattern.bias = bias
                var = advance([eqn])
                continue
            # Of a single row a matrix may look like a vector.
            if (bias is None or pattern.bias or pattern.activation) and _is_matrix(graph, eqn.invars[side], var):
                pattern.residual = (eqn, side)
                advance([eqn])
                break
        activation = None if pattern.activation else _activation(graph, var)
        if activation is None:
            break
        pattern.activation, equations = activation
        var = advance(equations)
    return pattern if pattern.last is not product else None


def _keeps_rows(eqn: Any, columns: Any) -> bool:
    """Whether an equation keeps all values in order, and the last axis."""
    if eqn.primitive.name not in _SAME_ROWS:
        return False
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if before.size != after.size or not after.shape or after.shape[-1] != columns or before.dtype != after.dtype:
        return False
    return eqn.primitive.name != "broadcast_in_dim" or _ascends(eqn.params["broadcast_dimensions"])


def _ascends(axes: Sequence[int]) -> bool:
    return list(axes) == sorted(axes)


def _bias(graph: _Graph, eqn: Any, side: int, columns: Any) -> tuple[Any, int] | None:
    """Where a vector is read that is added to each row, if this operand is one."""
    where, atom = (eqn, side), eqn.invars[side]
    while atom.aval.size != columns or atom.aval.ndim != 1:
        maker = graph.made_by(atom)
        if maker is None or maker.primitive.name not in _SAME_ROWS:
            break
        before = maker.invars[0].aval
        if maker.primitive.name == "broadcast_in_dim":
            axes = maker.params["broadcast_dimensions"]
            if not axes or axes[-1] != atom.aval.ndim - 1 or before.shape[-1] != columns:
                return None
        elif before.size != atom.aval.size:
            return None
        where, atom = (maker, 0), maker.invars[0]
    fits = isinstance(columns, int) and columns > 1 and atom.aval.size == columns and atom.aval.shape[-1] == columns
    return where if fits and atom.aval.dtype == jnp.float32 and not isinstance(atom, _compat.LITERAL) else None


def _is_matrix(graph: _Graph, atom: Any, like: Any) -> bool:
    """Whether an operand has values of its own for each element of the product."""
    if isinstance(atom, _compat.LITERAL) or atom.aval.shape != like.aval.shape or atom.aval.dtype != jnp.float32:
        return False
    maker = graph.made_by(atom)
    return maker is None or maker.primitive.name != "broadcast_in_dim"


def _activation(graph: _Graph, start: Any) -> tuple[str, list[Any]] | None:
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


def _evaluate(graph: _Graph, eqn: Any, values: Mapping[Any, Any]) -> np.ndarray | None:
    """The value of an equation at the points; None if it does not depend on the product alone, or not elementwise."""
    operands: list[Any] = [
        _constant(graph, atom) if isinstance(atom, _compat.LITERAL) or atom not in values else values[atom]
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
    function = _ELEMENTWISE.get(name)
    return None if function is None else np.asarray(function(*operands), np.float64)


def _evaluate_body(eqn: Any, operands: Sequence[Any]) -> np.ndarray | None:
    """The value of a call, such as `jax.nn.silu`, at the points."""
    bodies = _compat.inner_jaxprs(eqn)
    if len(bodies) != 1:
        return None
    body, consts = _compat.open_jaxpr(bodies[0])
    if len(body.invars) != len(operands) or len(consts):
        return None
    graph = _Graph(body.eqns, body.outvars)
    values = dict(zip(body.invars, operands, strict=True))
    for inner in body.eqns:
        value = _evaluate(graph, inner, values) if len(inner.outvars) == 1 else None
        if value is not None:
            values[inner.outvars[0]] = value
    (out,) = body.outvars
    return None if isinstance(out, _compat.LITERAL) else values.get(out)


def _constant(graph: _Graph, atom: Any) -> float | None:
    """The value of a number, also of one that is broadcast; None if it is none."""
    if isinstance(atom, _compat.LITERAL):
        return float(atom.val) if np.ndim(atom.val) == 0 else None
    maker = graph.makers.get(atom)
    if maker is not None and maker.primitive.name in ("broadcast_in_dim", "convert_element_type"):
        return _constant(graph, maker.invars[0])
    return None


def _named(value: np.ndarray) -> str | None:
    """The activation with these values."""
    bound = _TOLERANCE * (1 + np.abs(_points()))
    for name, expected in _EXPECTED.items():
        if np.all((np.abs(value - expected) <= bound) | (np.isnan(value) & np.isnan(expected))):
            return name
    return None


def _ancestors(graph: _Graph, start: Any, out: Any) -> list[Any]:
    """The equations between two values, in order."""
    found: list[Any] = []

    def visit(var: Any) -> None:
        eqn = graph.made_by(var)
        if var is start or eqn is None or eqn in found or _constant(graph, var) is not None:
            return
        for atom in eqn.invars:
            if not isinstance(atom, _compat.LITERAL):
                visit(atom)
        found.append(eqn)

    visit(out)
    return found


def _closed(graph: _Graph, start: Any, out: Any) -> bool:
    """Whether nothing else reads what is between two values, nor the first of them."""
    equations = _ancestors(graph, start, out)
    between = [start, *(eqn.outvars[0] for eqn in equations[:-1])]
    return all(
        var not in graph.outputs and all(eqn in equations for eqn in graph.readers.get(var, [])) for var in between
    )
