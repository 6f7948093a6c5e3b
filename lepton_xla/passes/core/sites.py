"""Sites: products of a weight with an activation, found by data flow and named by the weight's path.

A weight is followed from the program's input through layout operations (convert, transpose, reshape, a step of a
scanned stack, ...), into and out of every container, until it reaches a product. A value that is computed from weights
and constants alone and reaches a product is a computed weight, named by what it is computed from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lepton_xla.arguments import takes
from lepton_xla.passes.core import expressions
from lepton_xla.passes.core.computed import CUTS, Computed, ComputedWeight, choose_computed
from lepton_xla.passes.core.expressions import Expression
from lepton_xla.passes.core.layouts import Layout, LayoutOp, Step
from lepton_xla.passes.core.names import Key, SiteNames
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.tracking import (
    GIVEN,
    IDENTITIES,
    LAYOUT_PRIMITIVES,
    Escapes,
    Known,
    Made,
    Tracked,
    compute_from_weights,
    cut_weight,
    follow_layout,
    hand_on,
)
from lepton_xla.passes.core.walker import Context, Rule, Values, materialize
from lepton_xla.program import Program, TensorSpec, probe_sizes
from lepton_xla.trees import abstract, name_leaves

# `rule(site, context, equation, operands) -> outputs`, or None to leave the equation unchanged.
type SiteRule = Callable[["Site", Context, Any, Values], Values | None]


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


SITE_PRIMITIVES = ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")


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

    compute = compute_from_weights(known, noted, along)

    def after_computing(move: Rule) -> Rule:
        """Wrap a rule of the pass, so that it is not applied to computed weights."""

        def asked(context: Context, eqn: Any, values: Values) -> Values | None:
            outs = compute(context, eqn, values) if known.weights else None
            if outs is not None and any(isinstance(out, Tracked) for out in outs):
                return outs
            return move(context, eqn, values)

        return asked

    moves = {**dict.fromkeys(LAYOUT_PRIMITIVES, follow_layout), **dict.fromkeys(IDENTITIES, hand_on)}
    if known.weights:
        moves |= dict.fromkeys(CUTS, cut_weight(known, noted, along))
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
    elif all(isinstance(value, Known) for value in values[:2]):
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


def operand_value(value: Any) -> Any:
    """The array, or replacement, of an operand of a site; this use of a weight is no escape."""
    return value.value if isinstance(value, Tracked) else materialize(value)
