"""Finds what is around a product of codes and gives it to the kernel: bias, activation, sum with another activation
after it, and the factors of its columns before it.

A kernel computes these while its rows are in the cache; XLA cannot fuse anything into a custom call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.kernels import integer_product, weight_only
from lepton_xla.kernels.epilogue import Epilogue
from lepton_xla.passes.core.activations import Graph, find_activation
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Values

# Kernels with epilogues, by the name of their primitive; the last three operands and parameters are an epilogue's.
_KERNELS = {each.name: each for each in (integer_product.PRIMITIVE, weight_only.PRIMITIVE)}
_SITE = "site="
_SAME_ROWS = ("reshape", "squeeze", "expand_dims", "copy", "copy_p", "broadcast_in_dim")


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
        factor: where the factors of the columns of the activation are read, if it is multiplied by some.
        rows: where the activation is read before that.
    """

    product: Any
    last: Any
    inside: list[Any] = dataclasses.field(default_factory=list[Any])
    bias: tuple[Any, int] | None = None
    activation: str = ""
    residual: tuple[Any, int] | None = None
    factor: tuple[Any, int] | None = None
    rows: tuple[Any, int] | None = None

    @property
    def read(self) -> Mapping[str, tuple[Any, int]]:
        """Where operands are read that the product does not have, by their names."""
        named = {"bias": self.bias, "residual": self.residual, "factor": self.factor, "rows": self.rows}
        return {name: place for name, place in named.items() if place is not None}

    def __str__(self) -> str:
        parts = ["factors" if self.factor else "", "bias" if self.bias else "", self.activation]
        parts.append("residual" if self.residual else "")
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
            for name, place in pattern.read.items():
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
                operands = {name: held.pop((id(pattern), name)) for name in ("product", *pattern.read)}
                return [_compute(pattern, eqn, **operands)]
            if eqn is pattern.product or any(eqn is each for each in pattern.inside):
                return [_REPLACED]
            return None

        names = {eqn.primitive.name for each in roles.values() for eqn in (each.product, each.last, *each.inside)}
        names |= {eqn.primitive.name for each in roles.values() for eqn, _ in each.read.values()}
        return dict.fromkeys(names, rule)

    return rewrite(fn, rules, inline=True, on_unknown="keep")


_REPLACED = object()
"""Stands for a result that only equations of a pattern read."""


def _compute(
    pattern: Pattern,
    last: Any,
    product: Values,
    bias: Any = None,
    residual: Any = None,
    factor: Any = None,
    rows: Any = None,
) -> jax.Array:
    count, columns = pattern.product.outvars[0].aval.shape
    epilogue = Epilogue(
        None if bias is None else jnp.reshape(bias, (columns,)),
        pattern.activation,
        None if residual is None else jnp.reshape(residual, (count, columns)),
    )
    *others, _, _ = product
    if factor is not None:
        others = integer_product.with_factor(others, jnp.reshape(rows, others[0].shape), jnp.reshape(factor, (-1,)))
    bias, residual, activation = epilogue.operands()
    params = {**pattern.product.params, "activation": activation}
    out = _KERNELS[pattern.product.primitive.name].bind(*others, bias, residual, **params)
    return jnp.reshape(out, last.outvars[0].aval.shape)


def find(closed: Any) -> Iterator[Pattern]:
    """Find the patterns of a jaxpr and of all jaxprs inside it."""
    jaxpr, _ = _compat.open_jaxpr(closed)
    equations, _ = _compat.live(jaxpr)
    graph = Graph(equations, jaxpr.outvars)
    taken: set[int] = set()  # a sum of two products belongs to one of them
    for eqn in equations:
        if eqn.primitive.name in _KERNELS and eqn.params["activation"] == 0:
            pattern = _match(graph, eqn, taken)
            if pattern is not None:
                taken |= {id(each) for each in (*pattern.inside, pattern.last)}
                yield pattern
        for inner in _compat.inner_jaxprs(eqn):
            yield from find(inner)


def _match(graph: Graph, product: Any, taken: set[int]) -> Pattern | None:
    columns = product.outvars[0].aval.shape[1]
    pattern = Pattern(product, product)
    if product.primitive is integer_product.PRIMITIVE:
        found = _factor(graph, product)
        # Of a single row what an activation multiplies by itself looks like factors.
        if found is not None and id(found[0][0]) not in taken:
            pattern.rows, pattern.factor = found
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
        if eqn is not None and eqn.primitive.name == "add":
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
        activation = None if pattern.activation else find_activation(graph, var)
        if activation is None:
            break
        pattern.activation, equations = activation
        var = advance(equations)
    return pattern if pattern.last is not product or pattern.factor else None


def _factor(graph: Graph, product: Any) -> tuple[tuple[Any, int], tuple[Any, int]] | None:
    """Where an activation is read, and the factors of its columns, if it is multiplied by some before the product."""
    atom = product.invars[0]
    columns = atom.aval.shape[1]
    while (maker := graph.made_by(atom)) is not None and _keeps_rows(maker, columns):
        atom = maker.invars[0]
    if maker is None or maker.primitive.name != "mul" or atom.aval.dtype != jnp.float32:
        return None
    for side in (0, 1):
        factor = _bias(graph, maker, side, columns)
        other = maker.invars[1 - side]
        if factor is not None and other.aval.shape == atom.aval.shape and not isinstance(other, _compat.LITERAL):
            return (maker, 1 - side), factor
    return None


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


def _bias(graph: Graph, eqn: Any, side: int, columns: Any) -> tuple[Any, int] | None:
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


def _is_matrix(graph: Graph, atom: Any, like: Any) -> bool:
    """Whether an operand has values of its own for each element of the product."""
    if isinstance(atom, _compat.LITERAL) or atom.aval.shape != like.aval.shape or atom.aval.dtype != jnp.float32:
        return False
    maker = graph.made_by(atom)
    return maker is None or maker.primitive.name != "broadcast_in_dim"
