"""Folds what follows a product channel by channel, above all batch norm, into the product's weight; drops double work.

`scale * (x @ W) + shift = x @ (scale * W) + shift` (Jacob et al. 2018, arXiv:1712.05877, section 3.2), where scale and
shift depend on weights alone. It takes two walks. The first follows each product through the operations that scale and
shift its channels, up to the first value that something else reads; the second computes that value from the folded
weight. What to fold is settled at one set of sizes, and holds at all of them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core.dtypes import wider
from lepton_xla.passes.core.names import fresh
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.sites import Layout, LayoutOp, Site, find_sites, lay_out
from lepton_xla.passes.core.walker import Carried, Context, Values, materialize
from lepton_xla.program import Program, probe_sizes
from lepton_xla.report import PassReport, SiteReport
from lepton_xla.trees import abstract, leaf_bytes, tree_bytes

# What the folded shift of a weight is called.
BIAS = "bias"


type _Weights = Mapping[str, Any]
type _Vector = Callable[[_Weights], jax.Array]
"""A vector over output channels (or a scalar), float32 or wider, as a function of the weights."""


@dataclasses.dataclass(eq=False, repr=False)
class _Arithmetic:
    """An equation on weights alone, evaluated when one of its outputs is read."""

    eqn: Any
    operands: tuple[Any, ...]


@dataclasses.dataclass(eq=False, repr=False)
class _Expression(Carried):
    """An expression in weights alone: a weight, or an output of an equation on expressions.

    Attributes:
        aval: its shape and dtype.
        given: the weights of this walk.
        known: what has been computed of them in this walk.
        path: the weight's path, for a weight and what is made of it alone.
        layout: the operations between that weight and here.
        source: the equation; None for a weight.
        output: which of the equation's outputs this is.
    """

    crosses = False
    aval: Any
    given: _Weights
    known: dict[_Arithmetic, Values]
    path: str | None = None
    layout: Layout = ()
    source: _Arithmetic | None = None
    output: int = 0

    def materialize(self) -> jax.Array:
        return self.evaluate(self.given, self.known)

    def evaluate(self, weights: _Weights, known: dict[_Arithmetic, Values]) -> jax.Array:
        """The expression's value; `known` is what is known already for these weights, and grows."""
        if self.source is None:
            assert self.path is not None
            return weights[self.path]
        if self.source not in known:
            operands = [
                value.evaluate(weights, known) if isinstance(value, _Expression) else value
                for value in self.source.operands
            ]
            with _compat.equation_context(self.source.eqn):
                known[self.source] = _compat.bind(self.source.eqn, operands)
        return known[self.source][self.output]


@dataclasses.dataclass(frozen=True)
class _Fold:
    """What one folded weight becomes.

    Attributes:
        site: the product.
        layout: operations between the stored weight and the product.
        scale: what the weight is multiplied by.
        shift: what is added to the product, or None.
        bias: the path of the shift among the weights, or None.
        steps: how many operations after the product are folded.
        dtype: the dtype of the last one.
    """

    site: Site
    layout: Layout
    scale: _Vector
    shift: _Vector | None
    bias: str | None
    steps: int
    dtype: Any


@dataclasses.dataclass(eq=False, repr=False)
class _Product(Carried):
    """A site's product after `steps` operations that scale or shift its channels, or move axes.

    Attributes:
        site: the site.
        eqn: its equation in this walk.
        weight: its weight.
        activation: its activation.
        aval: shape and dtype after these operations.
        value: the array, computed as the program does; None where it is to be computed from the folded weight.
        scale: the operations' scale, or None.
        shift: the operations' shift, or None.
        steps: how many operations.
        axis: the axis of the channels here.
        moves: those of the operations that move axes.
        read: whether something that is no such operation reads this value.
        following: the values that such operations make of this one.
    """

    crosses = False
    site: Site
    eqn: Any
    weight: _Expression
    activation: jax.Array
    aval: Any
    value: jax.Array | None
    axis: int
    scale: _Vector | None = None
    shift: _Vector | None = None
    steps: int = 0
    moves: tuple[Any, ...] = ()
    read: bool = False
    following: list[_Product] = dataclasses.field(default_factory=list)

    def materialize(self) -> jax.Array:
        if self.value is None:
            raise UnsupportedError(
                f"site {self.site.name!r}: the program goes on from it otherwise at these sizes than at those it was "
                f"folded at; set fold = false"
            )
        self.read = True
        return self.value

    def last(self) -> _Product:
        """The end of the chain of operations in which no value is read twice."""
        product = self
        while not product.read and len(product.following) == 1:
            product = product.following[0]
        return product


def fold(program: Program) -> Program:
    """Folds batch norms (any per-channel affine) into the weights before them and drops dead and repeated code.

    A weight is folded where it is used at one site only, outside control flow, and nothing else reads the product.

    Returns:
        The program, precomputed, with fewer weights and operations; a folded weight keeps its path, laid out as its
        site takes it, and what is added after it is `path:bias`.
    """
    program = precompute(program)  # else a weight that others are computed from would change for them too
    start = time.perf_counter()
    found = find_sites(program)
    uses = [site.path for site in found]
    sites = {site.path: site for site in found if _foldable(site) and uses.count(site.path) == 1}
    sizes = probe_sizes(program.fn, program.weights, program.inputs)[0]

    like = abstract(program.weights)
    products: list[_Product] = []
    jax.eval_shape(_walk(program.fn, like, sites, found=products), like, *program.abstract_inputs(sizes))
    taken = set(like)
    folds = {_path(fold.site): fold for product in products if (fold := _folded(product.last(), taken)) is not None}

    weights: dict[str, Any] = dict(program.weights)
    masks = dict(program.masks)
    reports = []
    for path, entry in list(folds.items()):
        made = _made(program.weights, entry)
        if not made:
            del folds[path]
            continue
        weights |= made
        if path in masks:
            # A layout may hold a conversion to a float dtype, which a mask must not keep.
            masks[path] = lay_out(masks[path].astype(like[path].dtype), entry.layout) != 0
        before, after = (leaf_bytes(leaf.shape, leaf.dtype) for leaf in (like[path], weights[path]))
        reports.append(SiteReport(entry.site.name, "scale and shift folded in", "", before, after))

    fn = _walk(program.fn, like, sites, folds=folds)
    used = _used_weights(fn, weights, program, sizes)
    kept = {name: value for name, value in weights.items() if name in used}
    masks = {name: mask for name, mask in masks.items() if name in used}
    metrics = {
        "equations_before": _count(program.jaxpr(sizes)),
        "equations_after": _count(jax.make_jaxpr(fn)(abstract(kept), *program.abstract_inputs(sizes))),
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": tree_bytes(kept),
        "weights": _taken(like, [path for path in like if path not in kept], folds),
    }
    report = PassReport("fold", time.perf_counter() - start, tuple(reports), metrics)
    return program.replace(fn=fn, weights=kept, masks=masks, history=(*program.history, report))


def _taken(like: _Weights, gone: Sequence[str], folds: Mapping[str, _Fold]) -> dict[str, str]:
    """Into what the weights that are gone were folded; the others of them are read by nothing."""
    into: dict[str, list[str]] = {path: [] for path in gone}
    names = [name for name in sorted(like) for _ in jax.tree.leaves(like[name])]
    for path, entry in folds.items():
        vectors = [vector for vector in (entry.scale, entry.shift) if vector is not None]
        closed = jax.make_jaxpr(lambda weights, vectors=vectors: [vector(weights) for vector in vectors])(dict(like))
        jaxpr, _ = _compat.open_jaxpr(closed)
        used = _compat.inputs_read(jaxpr, [True] * len(jaxpr.outvars))
        for name in dict.fromkeys(name for name, flag in zip(names, used, strict=True) if flag and name in into):
            into[name].append(path)
    return {name: f"folded into {', '.join(paths)}" for name, paths in into.items() if paths}


def _foldable(site: Site) -> bool:
    if site.container or not site.exclusive or site.weight_operand != 1:
        return False
    if site.not_float or site.stacked:
        return False
    if any(op.resizes for op in site.layout if isinstance(op, LayoutOp)):
        return False
    return site.kind == "conv_general_dilated" or (site.kind == "dot_general" and _channel_axes(site) is not None)


def _channel_axes(site: Site) -> tuple[int, int] | None:
    """The output channel's axis in the result and in the weight operand, where there is one such axis."""
    numbers = site.params["dimension_numbers"]
    if site.kind == "conv_general_dilated":
        return numbers.out_spec[1], numbers.rhs_spec[0]
    (_, contract), (_, batch) = numbers
    free = [axis for axis in range(len(site.weight.shape)) if axis not in (*contract, *batch)]
    return (len(site.output.shape) - 1, free[0]) if len(free) == 1 and not batch else None


def _path(site: Site) -> str:
    assert site.path is not None
    return site.path


def _axis_of(site: Site, operand: int) -> int:
    axes = _channel_axes(site)
    assert axes is not None
    return axes[operand]


def _folded(end: _Product, taken: set[str]) -> _Fold | None:
    """What the product's weight becomes, its bias named as nothing that is taken; None where nothing scales it."""
    if end.scale is None:
        return None
    bias = None
    if end.shift is not None:
        bias = fresh(_path(end.site), BIAS, taken)
        taken.add(bias)
    return _Fold(end.site, end.weight.layout, end.scale, end.shift, bias, end.steps, end.aval.dtype)


def _made(weights: _Weights, entry: _Fold) -> dict[str, jax.Array]:
    """The weight with its scale folded in, multiplied in float32 or wider, and its bias; empty if these lose something.

    A narrow dtype may overflow, or lose a channel that falls below its normal numbers.
    """
    laid = lay_out(weights[_path(entry.site)], entry.layout)
    scale, axis = entry.scale(weights), _axis_of(entry.site, 1)
    wide = wider(laid.dtype, scale.dtype)
    exact = laid.astype(wide) * _along(scale.astype(wide), axis, laid.ndim)
    made = {_path(entry.site): exact.astype(laid.dtype)}
    if entry.shift is not None and entry.bias is not None:
        made[entry.bias] = entry.shift(weights).astype(entry.dtype)
    largest = jnp.max(jnp.abs(exact), axis=[k for k in range(exact.ndim) if k != axis], initial=0)
    lost = jnp.any((largest > 0) & (largest < float(jnp.finfo(laid.dtype).tiny)))
    finite = all(bool(jnp.all(jnp.isfinite(array))) for array in made.values())
    return made if finite and not bool(lost) else {}


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    """The vector, or scalar, as an array of the given rank that varies along one axis."""
    return jnp.reshape(vector, [-1 if k == axis else 1 for k in range(ndim)])


def _walk(
    fn: Callable[..., Any],
    like: Mapping[str, Any],
    sites: Mapping[str | None, Site],
    *,
    found: list[_Product] | None = None,
    folds: Mapping[str, _Fold] | None = None,
) -> Callable[..., Any]:
    """`fn` with its foldable products noted in `found`, or those of `folds` computed from folded weights."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        if eqn.effects or _compat.inner_jaxprs(eqn):
            return None
        literal = [isinstance(atom, _compat.LITERAL) for atom in eqn.invars]
        expression = [isinstance(value, _Expression) for value in values]
        if any(expression) and all(a or b for a, b in zip(expression, literal, strict=True)):
            return _expressions(context, eqn, values)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated") and expression[1] and not context.container:
            path = values[1].path
            if found is not None and path in sites:
                return [_product(eqn, sites[path], values, found)]
            if folds is not None and path in folds:
                activation = materialize(values[0])
                axis = _axis_of(folds[path].site, 0)
                return [_Product(folds[path].site, eqn, values[1], activation, eqn.outvars[0].aval, None, axis)]
        for side, value in enumerate(values):
            if isinstance(value, _Product):
                extended = _extended(eqn, value, side, values, literal)
                if extended is not None:
                    value.following.append(extended)
                    entry = (folds or {}).get(_path(value.site))
                    return [_finish(entry, extended) if entry and extended.steps == entry.steps else extended]
        return _once(context, eqn, values)

    def prepare(weights: Mapping[str, Any], *inputs: Any) -> tuple[Any, ...]:
        known: dict[_Arithmetic, Values] = {}
        flat = {
            name: _Expression(leaf, weights, known, name) if isinstance(leaf, jax.ShapeDtypeStruct) else weights[name]
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


def _product(eqn: Any, site: Site, values: Values, found: list[_Product]) -> _Product:
    """The start of a chain, computed as the program does."""
    activation, weight = materialize(values[0]), values[1]
    value = _compat.bind(eqn, [activation, weight.materialize()])[0]
    found.append(_Product(site, eqn, weight, activation, eqn.outvars[0].aval, value, _axis_of(site, 0)))
    return found[-1]


def _finish(entry: _Fold, product: _Product) -> jax.Array:
    """The end of a chain, computed from the folded weight."""
    given = product.weight.given
    out = _compat.bind(product.eqn, [product.activation, given[_path(entry.site)]])[0]
    if entry.bias is not None:
        wide = wider(out.dtype, entry.dtype)
        bias = _along(given[entry.bias].astype(wide), _axis_of(entry.site, 0), out.ndim)
        out = out.astype(wide) + bias
    out = out.astype(entry.dtype)
    for move in product.moves:
        out = _compat.bind(move, [out])[0]
    return out


def _expressions(context: Context, eqn: Any, values: Values) -> Values:
    """The outputs of an equation on weights alone, as expressions; equal equations are one."""
    first = next(value for value in values if isinstance(value, _Expression))
    alone = len(values) == 1 and first.path is not None
    key = _identity(eqn, values)
    known: dict[Any, _Arithmetic] = context.walk.notes.setdefault("arithmetic", {})
    source = known.setdefault(key, _Arithmetic(eqn, tuple(values))) if key is not None else None
    source = source or _Arithmetic(eqn, tuple(values))
    made: dict[_Arithmetic, Values] = context.walk.notes.setdefault("expressions", {})
    if source not in made:
        made[source] = [
            _Expression(
                var.aval,
                first.given,
                first.known,
                first.path if alone else None,
                (*first.layout, LayoutOp(eqn, index)) if alone else (),
                source,
                index,
            )
            for index, var in enumerate(eqn.outvars)
        ]
    return list(made[source])


def _extended(eqn: Any, product: _Product, side: int, values: Values, literal: list[bool]) -> _Product | None:
    """The product after one more operation that scales or shifts its channels, or None if this is none."""
    name = eqn.primitive.name
    aval = eqn.outvars[0].aval
    scale, shift, axis, moves = product.scale, product.shift, product.axis, product.moves
    if name in ("reshape", "squeeze", "transpose"):
        moved = _moved(eqn, product)
        if moved is None or len(values) != 1:
            return None
        axis, moves = moved, (*moves, eqn)
    elif name == "convert_element_type":
        if not (jnp.issubdtype(aval.dtype, jnp.floating) and jnp.issubdtype(product.aval.dtype, jnp.floating)):
            return None
    elif name in ("add", "sub", "mul", "div"):
        vector = _channel_vector(values[1 - side], axis, literal[1 - side])
        alike = (aval.shape, aval.dtype) == (product.aval.shape, product.aval.dtype)
        if vector is None or not alike or (name == "div" and side == 1):
            return None
        if name in ("mul", "div"):
            factor = vector if name == "mul" else _map(lambda by: 1 / by, vector)
            scale = factor if scale is None else _map(jnp.multiply, scale, factor)
            shift = None if shift is None else _map(jnp.multiply, shift, factor)
        else:
            if name == "sub" and side == 1:  # vector - product
                scale = (lambda _weights: jnp.float32(-1)) if scale is None else _map(jnp.negative, scale)
                shift = None if shift is None else _map(jnp.negative, shift)
            elif name == "sub":
                vector = _map(jnp.negative, vector)
            shift = vector if shift is None else _map(jnp.add, shift, vector)
    else:
        return None
    value = None
    if product.value is not None:
        value = _compat.bind(eqn, [product.value if k == side else materialize(v) for k, v in enumerate(values)])[0]
    return dataclasses.replace(
        product,
        aval=aval,
        value=value,
        axis=axis,
        scale=scale,
        shift=shift,
        steps=product.steps + 1,
        moves=moves,
        read=False,
        following=[],
    )


def _moved(eqn: Any, product: _Product) -> int | None:
    """The axis of the channels after an operation that moves axes; None where they do not stay one axis."""
    if eqn.primitive.name == "transpose":
        return eqn.params["permutation"].index(product.axis)
    before, after = product.aval.shape, eqn.outvars[0].aval.shape
    channels = before[product.axis]
    if channels == 1:
        return None
    lead = math.prod(before[: product.axis])
    places = [k for k, size in enumerate(after) if size == channels and math.prod(after[:k]) == lead]
    return places[0] if places else None


def _map(operation: Callable[..., jax.Array], *vectors: _Vector) -> _Vector:
    return lambda weights: operation(*(vector(weights) for vector in vectors))


def _channel_vector(value: Any, axis: int, literal: bool) -> _Vector | None:
    """A value that varies along one axis only, as a vector along it (or a scalar); None if it varies otherwise."""
    if not isinstance(value, _Expression):
        return (lambda _weights: _widened(jnp.asarray(value))) if literal and jnp.ndim(value) == 0 else None
    if all(size == 1 for k, size in enumerate(value.aval.shape) if k != axis):
        return lambda weights: _widened(jnp.ravel(value.evaluate(weights, {})))
    if value.source is None or value.source.eqn.primitive.name != "broadcast_in_dim":
        return None
    inner, places = value.source.operands[0], value.source.eqn.params["broadcast_dimensions"]
    return _channel_vector(inner, places.index(axis) if axis in places else -1, literal=True)


def _widened(vector: jax.Array) -> jax.Array:
    return vector.astype(wider(vector.dtype))


def _once(context: Context, eqn: Any, values: Values) -> Values:
    """Evaluates an equation, or gives what the same one on the same operands gave before (common subexpressions)."""
    operands = [materialize(value) for value in values]
    # A body of control flow may be traced several times, and a value of one trace must not reach another.
    key = _identity(eqn, operands) if not context.container else None
    if key is None:
        return _compat.bind(eqn, operands)
    seen: dict[Any, tuple[Values, Values]] = context.walk.notes.setdefault("seen", {})
    if key not in seen:
        seen[key] = operands, _compat.bind(eqn, operands)  # the operands are held so that their ids stay theirs
    return list(seen[key][1])


def _identity(eqn: Any, operands: Values) -> tuple[Any, ...] | None:
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
