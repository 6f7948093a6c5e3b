"""Folds what follows a product channel by channel, above all batch norm, into the product's weight; drops double work.

`scale * (x @ W) + shift = x @ (scale * W) + shift` (Jacob et al. 2018, arXiv:1712.05877, section 3.2), where scale and
shift depend on weights alone. The walk carries two kinds of value: expressions in weights, not computed until needed,
and products whose scale and shift are still being collected.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.rewrite import Carried, Context, Values, materialize, rewrite
from lepton_xla.passes.sites import Layout, LayoutOp, Site, find_sites, lay_out
from lepton_xla.program import Program, abstract, leaf_bytes, probe_sizes, tree_bytes
from lepton_xla.report import PassReport, SiteReport

# The folded shift of the weight at `path` is the weight `path:bias`.
BIAS_SUFFIX = ":bias"


type _Weights = Mapping[str, Any]
type _Vector = Callable[[_Weights], jax.Array]
"""A vector over output channels (or a scalar) as a function of the weights."""


@dataclasses.dataclass(eq=False)
class _Expression(Carried):
    """An expression in weights alone: a weight, or an equation on expressions."""

    crosses = False
    aval: Any
    evaluate: Callable[[_Weights], jax.Array]
    given: _Weights
    path: str | None = None
    layout: Layout = ()
    eqn: Any = None
    operands: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self._value: jax.Array | None = None

    def materialize(self) -> jax.Array:
        if self._value is None:
            self._value = self.evaluate(self.given)
        return self._value


@dataclasses.dataclass(eq=False)
class _Product(Carried):
    """A site's product times `scale` plus `shift`, a vector over output channels each, not computed yet."""

    crosses = False
    path: str
    axis: int
    aval: Any
    replay: Callable[[], jax.Array]
    finish: Callable[[_Product], jax.Array]
    scale: _Vector | None = None
    shift: _Vector | None = None

    def __post_init__(self) -> None:
        self._value: jax.Array | None = None

    def materialize(self) -> jax.Array:
        if self._value is None:
            self._value = self.replay() if self.scale is None else self.finish(self)
        return self._value


@dataclasses.dataclass(frozen=True)
class _Fold:
    """What one folded weight becomes."""

    site: str
    layout: Layout
    weight_channel: int
    scale: _Vector
    shift: _Vector | None


def fold(program: Program) -> Program:
    """Folds batch norms (any per-channel affine) into the weights before them and drops dead and repeated code.

    A weight is folded where it is used at one site only, outside control flow, and nothing else reads the product.

    Returns:
        The program with fewer weights and operations; a folded weight keeps its path, laid out as its site takes it,
        and what is added after it is `path:bias`.
    """
    start = time.perf_counter()
    every = find_sites(program)
    uses = collections.Counter(site.path for site in every)
    sites = {site.path: site for site in every if _foldable(site) and uses[site.path] == 1}
    sizes = probe_sizes(program.fn, program.weights, program.inputs)[0]

    found: dict[str, _Fold] = {}
    like = abstract(program.weights)
    walk = _walk(program.fn, like, sites, found=found)
    jax.eval_shape(walk, like, *program.abstract_inputs(sizes))
    weights: dict[str, Any] = dict(program.weights)
    folded: dict[str, bool] = {}
    reports = []
    for path, entry in found.items():
        laid = lay_out(program.weights[path], entry.layout)
        channels = [1] * laid.ndim
        channels[entry.weight_channel] = -1
        weights[path] = laid * jnp.reshape(entry.scale(program.weights), channels).astype(laid.dtype)
        folded[path] = entry.shift is not None
        if entry.shift is not None:
            weights[path + BIAS_SUFFIX] = entry.shift(program.weights)
        size = leaf_bytes(laid.shape, laid.dtype)
        reports.append(SiteReport(entry.site, "scale and shift folded in", "", size, size))

    fn = _walk(program.fn, like, sites, folded=folded)
    used = _used_weights(fn, weights, program, sizes)
    kept = {name: value for name, value in weights.items() if name in used}
    metrics = {
        "equations_before": _count(program.jaxpr(sizes)),
        "equations_after": _count(jax.make_jaxpr(fn)(abstract(kept), *program.abstract_inputs(sizes))),
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": tree_bytes(kept),
    }
    report = PassReport("fold", time.perf_counter() - start, tuple(reports), metrics)
    masks = {path: lay_out(mask, found[path].layout) if path in found else mask for path, mask in program.masks.items()}
    return program.replace(fn=fn, weights=kept, masks=masks, history=(*program.history, report))


def _foldable(site: Site) -> bool:
    if site.container or not site.exclusive or site.weight_operand != 1:
        return False
    if not jnp.issubdtype(site.weight.dtype, jnp.floating) or site.stacked:
        return False
    if any(_resizes(op) for op in site.layout if isinstance(op, LayoutOp)):
        return False
    return site.kind == "conv_general_dilated" or (site.kind == "dot_general" and _channel_axes(site) is not None)


def _resizes(op: LayoutOp) -> bool:
    before, after = op.eqn.invars[0].aval.shape, op.eqn.outvars[op.output].aval.shape
    return math.prod(before) != math.prod(after)


def _channel_axes(site: Site) -> tuple[int, int] | None:
    """The output channel's axis in the result and in the weight operand, where there is one such axis."""
    numbers = site.params["dimension_numbers"]
    if site.kind == "conv_general_dilated":
        return numbers.out_spec[1], numbers.rhs_spec[0]
    (_, contract), (_, batch) = numbers
    free = [axis for axis in range(len(site.weight.shape)) if axis not in (*contract, *batch)]
    return (len(site.output.shape) - 1, free[0]) if len(free) == 1 and not batch else None


def _walk(
    fn: Callable[..., Any],
    like: Mapping[str, Any],
    sites: Mapping[str | None, Site],
    *,
    found: dict[str, _Fold] | None = None,
    folded: Mapping[str, bool] | None = None,
) -> Callable[..., Any]:
    """`fn` with its foldable products collected: noted in `found`, or computed from `folded` weights."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        if eqn.effects or _compat.inner_jaxprs(eqn):
            return None
        literal = [isinstance(atom, _compat.LITERAL) for atom in eqn.invars]
        weight = [isinstance(value, _Expression) for value in values]
        if any(weight) and all(map(operator.or_, weight, literal)):
            return _expressions(eqn, values, given)
        # What a product is added to or multiplied by is folded only if nothing else reads the product.
        name = eqn.primitive.name
        if name in _AFFINE:
            for side in range(2):
                product, other = values[side], values[1 - side]
                if isinstance(product, _Product) and context.uses[eqn.invars[side]] == 1:
                    extended = _extended(eqn, product, side, other, literal[1 - side])
                    if extended is not None:
                        return [extended]
        if name in ("dot_general", "conv_general_dilated") and isinstance(values[1], _Expression):
            site = sites.get(values[1].path)
            if site is not None and not context.container:
                return [_product(eqn, site, values)]
        return _once(context, eqn, values)

    def _product(eqn: Any, site: Site, values: Values) -> _Product:
        activation, weight = values
        axes = _channel_axes(site)
        assert site.path is not None
        assert axes is not None

        def finish(product: _Product) -> jax.Array:
            assert product.scale is not None
            if found is not None:
                found[product.path] = _Fold(site.name, weight.layout, axes[1], product.scale, product.shift)
                return product.replay()
            out = _compat.bind(eqn, [materialize(activation), given[product.path]])[0]
            if not (folded or {})[product.path]:
                return out
            channels = [1] * out.ndim
            channels[product.axis] = -1
            return out + jnp.reshape(given[product.path + BIAS_SUFFIX], channels).astype(out.dtype)

        replay = lambda: _compat.bind(eqn, [materialize(activation), weight.materialize()])[0]  # noqa: E731
        return _Product(site.path, axes[0], eqn.outvars[0].aval, replay, finish)

    given: dict[str, Any] = {}

    def prepare(weights: Mapping[str, Any], *inputs: Any) -> tuple[Any, ...]:
        given.clear()
        given.update(weights)
        flat = {
            name: _Expression(leaf, lambda given, name=name: given[name], given, name)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else weights[name]
            for name, leaf in like.items()
        }
        return (flat, *inputs)

    return rewrite(
        fn,
        {"*": rule},
        inline=True,
        on_unknown="keep",
        example=lambda _weights, *inputs: (like, *inputs),
        prepare=prepare,
    )


def _expressions(eqn: Any, values: Values, given: _Weights) -> Values:
    """The outputs of an equation on weights alone, as expressions."""
    first = values[0]
    follows = len(values) == 1 and first.path is not None

    def evaluate(weights: _Weights, index: int) -> jax.Array:
        operands = [value.evaluate(weights) if isinstance(value, _Expression) else value for value in values]
        return _compat.bind(eqn, operands)[index]

    return [
        _Expression(
            var.aval,
            lambda weights, index=index: evaluate(weights, index),
            given,
            first.path if follows else None,
            (*first.layout, LayoutOp(eqn, index)) if follows else (),
            eqn,
            tuple(values),
        )
        for index, var in enumerate(eqn.outvars)
    ]


_AFFINE = ("add", "sub", "mul", "div")


def _extended(eqn: Any, product: _Product, side: int, other: Any, literal: bool) -> _Product | None:
    """The product after one more operation with an expression, or None if it does not fold."""
    name = eqn.primitive.name
    if name == "div" and side == 1:
        return None
    vector = _channel_vector(other, product.axis, literal)
    if vector is None or eqn.outvars[0].aval.dtype != product.aval.dtype:
        return None
    scale, shift = product.scale, product.shift
    if name in ("mul", "div"):
        factor = vector if name == "mul" else _map(lambda by: 1 / by, vector)
        scale = factor if scale is None else _map(jnp.multiply, scale, factor)
        shift = None if shift is None else _map(jnp.multiply, shift, factor)
    else:
        if name == "sub" and side == 1:  # vector - product
            scale = _map(jnp.negative, scale) if scale is not None else (lambda _weights: jnp.float32(-1))
            shift = None if shift is None else _map(jnp.negative, shift)
        elif name == "sub":
            vector = _map(jnp.negative, vector)
        shift = vector if shift is None else _map(jnp.add, shift, vector)

    def replay() -> jax.Array:
        operands = [product.materialize(), materialize(other)]
        return _compat.bind(eqn, operands if side == 0 else operands[::-1])[0]

    return _Product(product.path, product.axis, eqn.outvars[0].aval, replay, product.finish, scale, shift)


def _map(operation: Callable[..., jax.Array], *vectors: _Vector) -> _Vector:
    return lambda weights: operation(*(vector(weights) for vector in vectors))


def _channel_vector(value: Any, axis: int, literal: bool) -> _Vector | None:
    """A value that varies along one axis only, as a vector along it (or a scalar); None if it varies otherwise."""
    if not isinstance(value, _Expression):
        return (lambda _weights: jnp.asarray(value)) if literal and jnp.ndim(value) == 0 else None
    shape = value.aval.shape
    if all(size == 1 for k, size in enumerate(shape) if k != axis):
        return lambda weights: jnp.ravel(value.evaluate(weights))
    if value.eqn is None or value.eqn.primitive.name != "broadcast_in_dim":
        return None
    inner = value.operands[0]
    inner_shape = jnp.shape(inner) if not isinstance(inner, _Expression) else inner.aval.shape
    places = value.eqn.params["broadcast_dimensions"]
    for k, size in enumerate(inner_shape):
        if size != 1 and places[k] != axis:
            return None
    return lambda weights: jnp.ravel(inner.evaluate(weights) if isinstance(inner, _Expression) else inner)


def _once(context: Context, eqn: Any, values: Values) -> Values | None:
    """Evaluates an equation, or gives what the same one on the same operands gave before (common subexpressions)."""
    operands = [materialize(value) for value in values]
    identity = tuple(
        (str(value), str(atom.aval)) if isinstance(atom, _compat.LITERAL) else id(value)
        for atom, value in zip(eqn.invars, operands, strict=True)
    )
    if not any(isinstance(part, int) for part in identity):
        return _compat.bind(eqn, operands)
    seen: dict[Any, tuple[Values, Values]] = context.walk.notes.setdefault("seen", {})
    key = (context.body, eqn.primitive.name, identity, str(eqn.params), str(eqn.ctx))
    if key not in seen:
        seen[key] = operands, _compat.bind(eqn, operands)  # the operands are held so that their ids stay theirs
    return list(seen[key][1])


def _used_weights(
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


def _count(jaxpr: Any) -> int:
    """Equations of a jaxpr and of those inside it."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    return sum(1 + sum(map(_count, _compat.inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
