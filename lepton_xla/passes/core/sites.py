"""Sites: products of a weight with an activation, found by data flow and named by the weight's path.

A weight is followed from the program's input through layout operations (convert, transpose, reshape, a step of a
scanned stack, ...), into and out of every container, until it reaches a product. A value that is computed from weights
and constants alone and reaches a product is a computed weight, named by what it is computed from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core import expressions
from lepton_xla.passes.core.computed import CUTS, Computed, ComputedWeight, choose_computed
from lepton_xla.passes.core.expressions import Expression
from lepton_xla.passes.core.names import Key, SiteNames
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Rule, TracedValue, Values, materialize
from lepton_xla.program import Program, TensorSpec, probe_sizes
from lepton_xla.trees import abstract, name_leaves

type SiteRule = Callable[["Site", Context, Any, Values], Values | None]
"""`rule(site, context, equation, operands) -> outputs`, or None to leave the equation unchanged."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Marks in a layout that a `scan` takes one step of a stacked weight here."""


@dataclasses.dataclass(frozen=True)
class LayoutOp:
    """A layout operation on a weight: an equation and the index of the output that was used."""

    eqn: Any
    output: int = 0

    @property
    def resizes(self) -> bool:
        """Whether it changes the number of elements."""
        before, after = self.eqn.invars[0].aval.shape, self.eqn.outvars[self.output].aval.shape
        return math.prod(before) != math.prod(after)

    @property
    def cuts(self) -> bool:
        """Whether it selects a part of the elements."""
        return self.resizes and self.eqn.primitive.name in CUTS

    def __call__(self, array: jax.Array) -> jax.Array:
        with _compat.equation_context(self.eqn):
            return _compat.bind(self.eqn, [array])[self.output]


type Layout = tuple[LayoutOp | Step, ...]


# Side input that holds a given computed weight of a stack.
GIVEN = "given"


class Escapes:
    """Weights that one walk found used outside of sites.

    Attributes:
        paths: paths of weights.
        pieces: slices of weights that were used outside of sites.
    """

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.pieces: list[Expression] = []


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "side_inputs"],
    meta_fields=["path", "layout", "escapes", "expression", "source"],
)
@dataclasses.dataclass(frozen=True)
class Tracked(TracedValue):
    """A weight on its way to its site.

    Attributes:
        value: the array after its layout operations; or the pass's replacement of the weight.
        side_inputs: values that follow the weight to its sites without layout operations, by `Key`. Those of a
            stacked weight have its leading axes, so each step of a scan gets its own.
        path: the weight's path in the program.
        layout: the operations from the program's input to this value.
        escapes: records uses outside of sites.
        expression: this value as an expression in the program's weights.
        source: the expression of a computed weight; None for a weight of the program.
    """

    value: Any
    side_inputs: dict[Key, jax.Array]
    path: str
    layout: Layout
    escapes: Escapes
    expression: Expression
    source: Expression | None = None

    def materialize(self) -> jax.Array:
        self.escapes.paths.add(self.path)
        if self.is_cut:
            self.escapes.pieces.append(self.expression)
        return _present(self.value, self.expression)

    @property
    def is_cut(self) -> bool:
        """Whether this is a slice of the weight."""
        return any(op.cuts for op in self.layout if isinstance(op, LayoutOp))

    def at_step(self, scan: int) -> Tracked:
        return dataclasses.replace(self, layout=(*self.layout, Step()), expression=self.expression.step(scan))

    def in_specs(self, spec: Any) -> Any:
        # Side inputs are replicated, however the weight itself is sharded.
        return dataclasses.replace(self, value=spec, side_inputs=dict.fromkeys(self.side_inputs, jax.P()))

    def through(self, eqn: Any) -> Values:
        """Apply a layout operation; for a replaced weight only record it."""
        plain = isinstance(self.value, jax.Array)
        outs = _compat.bind(eqn, [self.value]) if plain else [self.value] * len(eqn.outvars)
        made = expressions.call(eqn, [self.expression]) or [self.expression] * len(outs)
        return [
            dataclasses.replace(self, value=out, layout=(*self.layout, LayoutOp(eqn, k)), expression=made[k])
            for k, out in enumerate(outs)
        ]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "side_inputs"],
    meta_fields=["expression", "escapes"],
)
@dataclasses.dataclass(frozen=True)
class Made(TracedValue):
    """A constant, or a value that is computed from weights and constants alone and is not (yet) a weight.

    Attributes:
        value: the array; None if weights that it is computed from are missing.
        side_inputs: the side inputs of those weights.
        expression: its expression.
        escapes: records uses outside of sites.
    """

    value: Any
    side_inputs: dict[Key, jax.Array]
    expression: Expression
    escapes: Escapes

    def materialize(self) -> jax.Array:
        self.escapes.paths.update(self.expression.weights)
        return _present(self.value, self.expression)

    def at_step(self, scan: int) -> Made:
        return dataclasses.replace(self, expression=self.expression.step(scan))

    def in_specs(self, spec: Any) -> Any:
        return dataclasses.replace(self, value=spec, side_inputs=dict.fromkeys(self.side_inputs, jax.P()))


def _present(value: Any, expression: Expression) -> Any:
    if value is None:
        raise UnsupportedError(
            f"at these sizes the program reads {', '.join(expression.weights)}, which it did not at the sizes of "
            "precompute; pass these sizes too, as buckets or precompute(sizes=...)"
        )
    return value


@dataclasses.dataclass(frozen=True)
class Site:
    """One product in a program.

    Attributes:
        name: the weight's path, with `#1`, `#2` for further uses; or `scope/primitive#0` without a weight.
        path: the weight's path, None for a product of two activations.
        kind: the primitive: `dot_general`, `conv_general_dilated`, `ragged_dot_general` or `gather` (an embedding).
        weight_operand: index of the weight operand; None for a product of two activations.
        operands: shape and dtype of both operands, at the sizes of the trace.
        output: shape and dtype of the result, at the sizes of the trace.
        layout: operations between the stored weight and the operand.
        eqn: the equation.
        scope: names of the surrounding modules and scopes, joined by `/`.
        repeats: number of runs in one call.
        container: the innermost surrounding control flow; empty at the top level.
        exclusive: whether its weight is used at sites only (at the sizes that `find_sites` traced).
        source: the expression of a computed weight.
        made: for a product without a weight, the operand that is computed from weights or constants, if any.
        why_made: why that operand is not a computed weight.
    """

    name: str
    path: str | None
    kind: str
    weight_operand: int | None
    operands: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    output: jax.ShapeDtypeStruct
    layout: Layout
    eqn: Any
    scope: str
    repeats: int
    container: str
    exclusive: bool = True
    source: Expression | None = None
    made: Expression | None = None
    why_made: str = ""

    @property
    def params(self) -> Mapping[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def weight(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the weight operand, one step of a stack."""
        assert self.weight_operand is not None
        return self.operands[self.weight_operand]

    @property
    def activation(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the other operand (the left one in a product of two activations)."""
        return self.operands[1 - self.weight_operand if self.weight_operand is not None else 0]

    @property
    def not_float(self) -> str:
        """The first non-float dtype of the weight on its way from storage to this site; empty if there is none."""
        ops = [op for op in self.layout if isinstance(op, LayoutOp)]
        dtypes = [*(op.eqn.invars[0].aval.dtype for op in ops), self.weight.dtype]
        return next((dtype.name for dtype in dtypes if not jnp.issubdtype(dtype, jnp.floating)), "")

    @property
    def stacked(self) -> int:
        """Number of leading axes of the stored weight that scans step over."""
        return sum(isinstance(op, Step) for op in self.layout)


# Primitives that only move or convert a weight. `split` and `unstack` have several outputs.
_LAYOUT = (
    "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p",
    "slice", "split", "unstack", "sharding_constraint", "pvary", "pcast", "reduce_precision",
)  # fmt: skip
# Primitives that return their operands unchanged, one output each.
_IDENTITIES = ("name", "stop_gradient", "optimization_barrier", "device_put")
SITE_PRIMITIVES = ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")
# Containers whose bodies run once; they are entered instead of treated as one operation.
_ENTERED = ("jit", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint")


def _follow(context: Context, eqn: Any, values: Values) -> Values | None:
    del context
    return values[0].through(eqn) if len(values) == 1 and isinstance(values[0], Tracked) else None


def _hand_on(context: Context, eqn: Any, values: Values) -> Values | None:
    """Pass values on unchanged; arrays are bound again."""
    del context
    arrays = [value.value if isinstance(value, _Known) else value for value in values]
    outs = _compat.bind(eqn, arrays) if all(isinstance(array, jax.Array) for array in arrays) else arrays
    return [
        dataclasses.replace(value, value=out) if isinstance(value, _Known) else out
        for value, out in zip(values, outs, strict=True)
    ]


_Known = (Tracked, Made)


def _cut(computed: Computed, escapes: Escapes, side_inputs: Mapping[str, Mapping[Key, Any]]) -> Rule:
    """Make the rule for equations that slice a weight: a slice may be a computed weight."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        outs = _follow(context, eqn, values)
        if outs is None:
            return None
        names = [computed.names.get(out.expression.key) for out in outs]
        return [
            out
            if name is None
            else _computed_weight(
                computed, name, out.expression, out.value, out.side_inputs, side_inputs.get(name, {}), escapes
            )
            for name, out in zip(names, outs, strict=True)
        ]

    return rule


def _compute(computed: Computed, escapes: Escapes, side_inputs: Mapping[str, Mapping[Key, Any]]) -> Rule:
    """Make the rule for equations on weights and constants alone, whose results may be computed weights."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        operands = [_expression(atom, value) for atom, value in zip(eqn.invars, values, strict=True)]
        parts = [operand for operand in operands if operand is not None]
        if len(parts) < len(operands) or (eqn.primitive.name in _ENTERED and any(operand.weights for operand in parts)):
            return None
        made = expressions.call(eqn, parts)
        if made is None:
            return None
        travelling: dict[Key, jax.Array] = {}
        for value in values:
            travelling |= value.side_inputs if isinstance(value, _Known) else {}
        names = [computed.names.get(part.key) if part.weights and computed.names else None for part in made]
        outs: Sequence[Any] = [None] * len(made)
        arrays = [value.value if isinstance(value, _Known) else value for value in values]
        if not any(array is None for array in arrays) and not (computed.given and all(names)):
            outs = context.bind(eqn, arrays)
        return [
            Made(out, travelling, part, escapes)
            if name is None
            else _computed_weight(computed, name, part, out, travelling, side_inputs.get(name, {}), escapes)
            for name, part, out in zip(names, made, outs, strict=True)
        ]

    return rule


def _computed_weight(
    computed: Computed,
    name: str,
    expression: Expression,
    value: Any,
    travelling: Mapping[Key, jax.Array],
    own: Mapping[Key, Any],
    escapes: Escapes,
) -> Tracked:
    """Turn a computed value into a weight; its side inputs came with the weights that it is computed from."""
    side_inputs = {key: travelling.get(key, array) if expression.steps else array for key, array in own.items()}
    if computed.given:
        value = travelling[name, GIVEN] if expression.steps else computed.given[name]
    return Tracked(value, side_inputs, name, (Step(),) * len(expression.steps), escapes, expression, expression)


def _expression(atom: Any, value: Any) -> Expression | None:
    if isinstance(value, _Known):
        return value.expression
    return Expression.of_constant(value) if isinstance(atom, _compat.LITERAL) else None


@takes(fn=Callable, side_inputs=Mapping, follow=Mapping)
def rewrite_sites(
    fn: Callable[..., Any],
    rule: SiteRule,
    *,
    inline: bool = False,
    on_unknown: Literal["error", "keep"] = "error",
    like: Any = None,
    side_inputs: Mapping[str, Mapping[Key, jax.Array]] | None = None,
    escapes: Escapes | None = None,
    with_taps: bool = False,
    follow: Mapping[str, Rule] | None = None,
    computed: Computed | None = None,
) -> Callable[..., Any]:
    """Transform a function by replacing its sites.

    Args:
        fn: `fn(weights, *inputs)`; weights are the first argument, any pytree; its paths name the sites.
        rule: called once per site each time the function is traced.
        inline: as in `rewrite`.
        on_unknown: as in `rewrite`.
        like: shapes of the weights of `fn`, if the new function takes others. A weight may then be replaced by
            anything, which the rule gets as `Tracked.value`.
        side_inputs: weight path -> site name and what of it -> array that reaches the rule as `Tracked.side_inputs`.
        escapes: records the weights that are used outside of sites.
        with_taps: as in `rewrite`.
        follow: rules for weights at other primitives than layout operations.
        computed: the computed weights.

    Returns:
        A function with the signature of `fn`.

    >>> rule = lambda site, context, equation, operands: [2 * operands[0]]
    >>> fn = lx.passes.rewrite_sites(lambda w, x: x @ w["w"], rule)
    >>> fn({"w": jnp.eye(4)}, jnp.ones((1, 4))).tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """
    noted, known = escapes or Escapes(), computed or Computed()
    along: dict[str, dict[Key, jax.Array]] = {path: dict(arrays) for path, arrays in (side_inputs or {}).items()}
    for weight in known.weights:
        # Side inputs of a computed weight of a stack follow a weight that the same scans step over.
        if weight.expression.steps:
            given = {(weight.name, GIVEN): known.given[weight.name]} if known.given else {}
            along.setdefault(weight.expression.carrier, {}).update(along.get(weight.name, {}) | given)

    paths: set[str] = set()

    def visit(context: Context, eqn: Any, values: Values) -> Values | None:
        site = _site(context, eqn, values, known.found, paths)
        return None if site is None else rule(site, context, eqn, values)

    def constant(value: Any) -> Any:
        expression = Expression.of_constant(value)
        return value if expression is None else Made(value, {}, expression, noted)

    compute = _compute(known, noted, along)

    def after_computing(move: Rule) -> Rule:
        """Wrap a rule of the pass, so that it is not applied to computed weights."""

        def asked(context: Context, eqn: Any, values: Values) -> Values | None:
            outs = compute(context, eqn, values) if known.weights else None
            if outs is not None and any(isinstance(out, Tracked) for out in outs):
                return outs
            return move(context, eqn, values)

        return asked

    moves = {**dict.fromkeys(_LAYOUT, _follow), **dict.fromkeys(_IDENTITIES, _hand_on)}
    if known.weights:
        moves |= dict.fromkeys(CUTS, _cut(known, noted, along))
    moves |= {name: after_computing(move) for name, move in (follow or {}).items()}

    def prepare(weights: Any, *inputs: Any) -> tuple[Any, ...]:
        shapes = weights if like is None else like
        names = list(name_leaves(shapes, prefix="weights"))
        paths.clear()
        paths.update(names, known.names.values())
        treedef = jax.tree.structure(shapes)
        leaves = treedef.flatten_up_to(weights)
        tracked = [
            Tracked(leaf, dict(along.get(name, {})), name, (), noted, Expression.weight(name, shape))
            for leaf, shape, name in zip(leaves, jax.tree.leaves(shapes), names, strict=True)
        ]
        return (jax.tree.unflatten(treedef, tracked), *inputs)

    return rewrite(
        fn,
        dict.fromkeys(SITE_PRIMITIVES, visit),
        follow={**moves, "*": compute},
        inline=inline,
        on_unknown=on_unknown,
        example=None if like is None else (lambda _weights, *inputs: (like, *inputs)),
        prepare=prepare,
        with_taps=with_taps,
        constant=constant,
    )


@takes(program=Program, sizes=Mapping)
def find_sites(program: Program, *, sizes: Mapping[str, int] | None = None) -> tuple[Site, ...]:
    """Find every site of a program, in the order of execution.

    Args:
        program: any program.
        sizes: sizes of the symbolic dimensions at which to trace the program; chosen by default.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> [(site.name, site.kind, site.path) for site in lx.find_sites(program)]
    [('w', 'dot_general', 'w')]
    """
    return trace_sites(program.fn, program.weights, program.inputs, sizes)


def trace_sites(
    fn: Callable[..., Any], weights: Any, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, int] | None = None
) -> tuple[Site, ...]:
    """Find every site of `fn(weights, *inputs)`, in the order of execution."""
    chosen = sizes if sizes is not None else probe_sizes(fn, weights, inputs)[0]
    _, reasons, found, escapes = _computed(fn, weights, inputs, chosen)
    return tuple(
        dataclasses.replace(
            site,
            exclusive=site.path not in escapes.paths,
            why_made="" if site.made is None else reasons.get(site.made.key, ""),
        )
        for site in found
    )


def find_computed(program: Program) -> tuple[ComputedWeight, ...]:
    """Find the computed weights of a program: those of its sites, and other slices of weights with slices among them.

    Without the latter, the sliced weight would have to stay in the program.
    """
    probed = probe_sizes(program.fn, program.weights, program.inputs)[0]
    return _computed(program.fn, program.weights, program.inputs, probed)[0].weights


def _computed(
    fn: Callable[..., Any], weights: Any, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> tuple[Computed, dict[str, str], list[Site], Escapes]:
    """Find computed weights, the reasons for values that are none, and the sites and escapes at these sizes."""
    computed = Computed()
    found, escapes = _walk_sites(fn, weights, inputs, sizes, computed)
    if not any(expression.weights for expression in computed.found):
        return Computed(), {}, found, escapes
    probed, unit = probe_sizes(fn, weights, inputs)
    seen: list[list[Expression]] = []
    pieces: list[Expression] = []
    # Probed sizes come first, so that names do not depend on the given sizes.
    for at in (probed, {name: size + unit for name, size in probed.items()}):
        other = Computed()
        _, used = _walk_sites(fn, weights, inputs, at, other)
        seen.append(other.found)
        pieces += used.pieces
    known, reasons = choose_computed([*seen, computed.found], weights, [*pieces, *escapes.pieces])
    if not known.weights:
        return known, reasons, found, escapes
    # A weight that is also read as a whole stays in the program, so slices of it would only add bytes.
    whole: set[str] | None = None
    while whole is None or whole:
        known = known.without_parts_of(whole or ())
        found, escapes = _walk_sites(fn, weights, inputs, probed, known)
        whole = {path for path in known.cut if path in escapes.paths or any(site.path == path for site in found)}
    if sizes != probed:
        found, escapes = _walk_sites(fn, weights, inputs, sizes, known)
    return known, reasons, found, escapes


def _walk_sites(
    fn: Callable[..., Any],
    weights: Any,
    inputs: Mapping[str, TensorSpec],
    sizes: Mapping[str, int],
    computed: Computed,
) -> tuple[list[Site], Escapes]:
    found: dict[str, Site] = {}
    escapes = Escapes()

    def record(site: Site, context: Context, eqn: Any, values: Values) -> Values:
        found[site.name] = site
        return context.bind(eqn, [operand_value(value) for value in values])

    looked = rewrite_sites(fn, record, inline=True, on_unknown="keep", escapes=escapes, computed=computed)
    jax.eval_shape(looked, abstract(weights), *(spec.at(sizes) for spec in inputs.values()))
    return list(found.values()), escapes


def _site(context: Context, eqn: Any, values: Values, computed: list[Expression], paths: Container[str]) -> Site | None:
    kind = eqn.primitive.name
    tracked = [index for index, value in enumerate(values[:2]) if isinstance(value, Tracked)]
    made = [value.expression if isinstance(value, Made) else None for value in values[:2]]
    if kind == "gather":
        # Lookups at constant indices are embeddings too.
        if 1 in tracked or (made[1] is not None and made[1].weights) or not takes_rows(eqn):
            return None
        if made[0] is not None:
            computed.append(made[0])
        if not tracked:
            return None
    elif all(isinstance(value, _Known) for value in values[:2]):
        return None  # a product of two weights is not a site
    operand = tracked[0] if tracked else None
    if kind != "gather":
        computed += [part for part in made if part is not None]
    computed += [values[index].expression for index in tracked if values[index].is_cut]
    weight = values[operand] if operand is not None else None
    return Site(
        name=site_name(context, kind, weight.path if weight is not None else None, paths),
        path=weight.path if weight is not None else None,
        kind=kind,
        weight_operand=operand,
        operands=(_aval(eqn.invars[0]), _aval(eqn.invars[1])),
        output=_aval(eqn.outvars[0]),
        layout=weight.layout if weight is not None else (),
        eqn=eqn,
        scope=context.scope,
        repeats=context.repeats,
        container=context.container,
        source=weight.source if weight is not None else None,
        made=None if weight is not None else next((part for part in made if part is not None), None),
    )


def site_name(context: Context, kind: str, path: str | None, paths: Container[str]) -> str:
    """The name of a site; the same each time its equation is traced in one walk.

    Args:
        context: its context.
        kind: its primitive.
        path: the weight's path; None for a product of activations.
        paths: paths of all weights.
    """
    given: dict[Any, str] = context.walk.notes.setdefault("site_names", {})
    names: SiteNames = context.walk.notes.setdefault("names", SiteNames(paths))
    if context.key not in given:
        given[context.key] = names.of_activations(context.scope, kind) if path is None else names.of_weight(path)
    return given[context.key]


def takes_rows(eqn: Any) -> bool:
    """Whether a gather looks up whole rows of a table (an embedding), with or without keeping the row dimension."""
    table, numbers = eqn.invars[0].aval.shape, eqn.params["dimension_numbers"]
    whole = len(table) == 2 and tuple(eqn.params["slice_sizes"]) == (1, table[1])
    return whole and 0 in numbers.start_index_map and not numbers.operand_batching_dims


def _aval(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def lay_out(array: jax.Array, layout: Sequence[LayoutOp | Step]) -> jax.Array:
    """Apply a layout to a stored weight; return the operand of its site, with stacked axes leading."""
    for index, op in enumerate(layout):
        if isinstance(op, Step):
            return jax.vmap(lambda step, rest=layout[index + 1 :]: lay_out(step, rest))(array)
        array = op(array)
    return jnp.asarray(array)


def stored_like(site: Site, weights: Mapping[str, Any]) -> Any:
    """Shape and dtype of a site's stored weight; for a computed weight, those that it would have."""
    assert site.path is not None
    if site.source is None or site.path in weights:
        return weights[site.path]
    return expressions.stored_shape(site.source, weights)


def stored_weight(site: Site, weights: Mapping[str, Any]) -> Any:
    """A site's stored weight; a computed weight is evaluated if it is not stored."""
    assert site.path is not None
    if site.source is None or site.path in weights:
        return weights[site.path]
    return expressions.evaluate([site.source], weights)[0]


def made_of(site: Site) -> tuple[str, ...]:
    """Paths of the weights behind a site's weight: its own, or those that it is computed from."""
    return site.source.weights if site.source is not None else (site.path,) if site.path is not None else ()


def step_lengths(site: Site, stored: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the scans that step over a site's weight; `stored` is the shape of the stored weight."""
    shape, lengths = tuple(stored), list[int]()
    for op in site.layout:
        if isinstance(op, Step):
            lengths.append(shape[0])
            shape = shape[1:]
        else:
            shape = op.eqn.outvars[op.output].aval.shape
    return tuple(lengths)


def layout_key(layout: Layout) -> tuple[Any, ...]:
    """A key that is equal for equivalent layouts."""
    return tuple(
        "step" if isinstance(op, Step) else (op.eqn.primitive.name, op.output, str(op.eqn.params)) for op in layout
    )


def operand_value(value: Any) -> Any:
    """The array, or replacement, of an operand of a site; this use of a weight is no escape."""
    return value.value if isinstance(value, Tracked) else materialize(value)
