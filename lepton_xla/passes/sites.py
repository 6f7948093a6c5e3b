"""Sites: the places where a weight meets an activation, found by following data, named by the weight's path.

A weight is followed from the program's input through operations that only lay it out anew (convert, transpose, reshape,
a step of a scanned stack, ...), in and out of every container, until it reaches a product.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.rewrite import Carried, Context, Rule, Values, materialize, rewrite
from lepton_xla.program import Program, TensorSpec, abstract, name_leaves, probe_sizes

type SiteRule = Callable[["Site", Context, Any, Values], Values | None]
"""`rule(site, context, equation, operands) -> outputs`, or None to leave the equation as it is."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Marks, in a layout, where a `scan` takes one step of a stacked weight."""


@dataclasses.dataclass(frozen=True)
class LayoutOp:
    """One layout-only operation on a weight: an equation and which of its outputs was taken."""

    eqn: Any
    output: int = 0

    @property
    def resizes(self) -> bool:
        """Whether it changes how many elements there are."""
        before, after = self.eqn.invars[0].aval.shape, self.eqn.outvars[self.output].aval.shape
        return math.prod(before) != math.prod(after)

    def __call__(self, array: jax.Array) -> jax.Array:
        with _compat.equation_context(self.eqn):
            return _compat.bind(self.eqn, [array])[self.output]


type Layout = tuple[LayoutOp | Step, ...]


class Escapes:
    """Paths of the weights that were used, in one walk, at something that is not a site."""

    def __init__(self) -> None:
        self.paths: set[str] = set()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "beside"],
    meta_fields=["path", "layout", "escapes"],
)
@dataclasses.dataclass(frozen=True)
class Tracked(Carried):
    """A weight on its way to its site.

    Attributes:
        value: the array as laid out here; or, where a pass has replaced the weight, what it put in its place.
        beside: site name -> array that travels with the weight without being laid out; a stacked weight's has the
            same leading axes, so that each step of a scan sees its own.
        path: the weight's path in the program.
        layout: the operations between the program's input and here.
        escapes: where uses that are not sites are noted.
    """

    value: Any
    beside: dict[str, jax.Array]
    path: str
    layout: Layout
    escapes: Escapes

    def materialize(self) -> jax.Array:
        self.escapes.paths.add(self.path)
        return self.value

    def at_step(self) -> Tracked:
        return dataclasses.replace(self, layout=(*self.layout, Step()))

    def in_specs(self, spec: Any) -> Any:
        # Every device has all that travels beside the weight, however the weight itself is cut.
        return dataclasses.replace(self, value=spec, beside=dict.fromkeys(self.beside, jax.P()))

    def through(self, eqn: Any) -> Values:
        """This weight after a layout-only operation; a replaced one is not touched, only its layout noted."""
        plain = isinstance(self.value, jax.Array)
        outs = _compat.bind(eqn, [self.value]) if plain else [self.value] * len(eqn.outvars)
        return [
            dataclasses.replace(self, value=out, layout=(*self.layout, LayoutOp(eqn, k))) for k, out in enumerate(outs)
        ]


@dataclasses.dataclass(frozen=True)
class Site:
    """One product in a program.

    Attributes:
        name: the weight's path, with `#1`, `#2` for further uses; or `scope/primitive#ordinal` without a weight.
        path: the weight's path, None for a product of two activations.
        kind: the primitive: `dot_general`, `conv_general_dilated`, `ragged_dot_general` or `gather` (an embedding).
        weight_operand: which operand the weight is, None for a product of two activations.
        operands: shape and dtype of both operands, at the sizes the program was looked at.
        output: shape and dtype of the result, likewise.
        layout: operations between the stored weight and the operand.
        eqn: the equation.
        scope: names of the modules and scopes around it, joined by `/`.
        repeats: how often it runs in one call.
        container: the innermost control flow around it, empty at the top.
        exclusive: whether its weight is used at sites only (as far as `find_sites` saw).
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

    @property
    def params(self) -> Mapping[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def weight(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the weight as the primitive sees it, one step of a stack."""
        assert self.weight_operand is not None
        return self.operands[self.weight_operand]

    @property
    def activation(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the other operand (of the left one in a product of two activations)."""
        return self.operands[1 - self.weight_operand if self.weight_operand is not None else 0]

    @property
    def stacked(self) -> int:
        """How many leading axes the stored weight has that a scan steps over."""
        return sum(isinstance(op, Step) for op in self.layout)


# What only moves or retypes a weight. `split` and `unstack` have several outputs.
_LAYOUT = (
    "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p",
    "slice", "split", "unstack", "sharding_constraint", "pvary", "pcast", "reduce_precision",
)  # fmt: skip
SITE_PRIMITIVES = ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")


def _follow(context: Context, eqn: Any, values: Values) -> Values | None:
    del context
    return values[0].through(eqn) if len(values) == 1 and isinstance(values[0], Tracked) else None


def rewrite_sites(
    fn: Callable[..., Any],
    rule: SiteRule,
    *,
    inline: bool = False,
    on_unknown: Literal["error", "keep"] = "error",
    like: Any = None,
    beside: Mapping[str, Mapping[str, jax.Array]] | None = None,
    escapes: Escapes | None = None,
    with_taps: bool = False,
    follow: Mapping[str, Rule] | None = None,
) -> Callable[..., Any]:
    """Transforms a function by replacing what it does at its sites.

    Args:
        fn: `fn(weights, *inputs)`; weights are the first argument, any pytree; its paths name the sites.
        rule: asked once for each site each time the function is traced.
        inline: as in `rewrite`.
        on_unknown: as in `rewrite`.
        like: the weights' shapes that `fn` was written for, where the new function takes other ones. A weight's place
            may then hold anything; the rule gets it as `Tracked.value`.
        beside: weight path -> site name -> array that reaches the rule as `Tracked.beside`.
        escapes: notes the weights that are used at something that is not a site.
        with_taps: as in `rewrite`.
        follow: how a weight moves through primitives that are no layout.

    Returns:
        A function with the signature of `fn`.
    """

    def visit(context: Context, eqn: Any, values: Values) -> Values | None:
        site = _site(context, eqn, values)
        return None if site is None else rule(site, context, eqn, values)

    def prepare(weights: Any, *inputs: Any) -> tuple[Any, ...]:
        shapes = weights if like is None else like
        names = list(name_leaves(shapes, prefix="weights"))
        treedef = jax.tree.structure(shapes)
        leaves = treedef.flatten_up_to(weights)
        noted = escapes or Escapes()
        tracked = [
            Tracked(leaf, dict((beside or {}).get(name, {})), name, (), noted)
            for leaf, name in zip(leaves, names, strict=True)
        ]
        return (jax.tree.unflatten(treedef, tracked), *inputs)

    return rewrite(
        fn,
        dict.fromkeys(SITE_PRIMITIVES, visit),
        follow={**dict.fromkeys(_LAYOUT, _follow), **(follow or {})},
        inline=inline,
        on_unknown=on_unknown,
        example=None if like is None else (lambda _weights, *inputs: (like, *inputs)),
        prepare=prepare,
        with_taps=with_taps,
    )


def find_sites(program: Program, *, sizes: Mapping[str, int] | None = None) -> tuple[Site, ...]:
    """Every site of a program, in the order of execution.

    Args:
        program: any program.
        sizes: sizes of the symbolic dimensions to look at; some at which the program can be traced by default.
    """
    return trace_sites(program.fn, program.weights, program.inputs, sizes)


def trace_sites(
    fn: Callable[..., Any], weights: Any, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, int] | None = None
) -> tuple[Site, ...]:
    """Every site of `fn(weights, *inputs)`, in the order of execution."""
    chosen = sizes if sizes is not None else probe_sizes(fn, weights, inputs)[0]
    found: dict[str, Site] = {}
    escapes = Escapes()

    def record(site: Site, context: Context, eqn: Any, values: Values) -> Values:
        found[site.name] = site
        return context.bind(eqn, [operand_value(value) for value in values])

    looked = rewrite_sites(fn, record, inline=True, on_unknown="keep", escapes=escapes)
    jax.eval_shape(looked, abstract(weights), *(spec.at(chosen) for spec in inputs.values()))
    return tuple(dataclasses.replace(site, exclusive=site.path not in escapes.paths) for site in found.values())


def _site(context: Context, eqn: Any, values: Values) -> Site | None:
    kind = eqn.primitive.name
    tracked = [index for index, value in enumerate(values[:2]) if isinstance(value, Tracked)]
    if len(tracked) == 2:
        return None  # a product of two weights is arithmetic on weights, not a site
    if kind == "gather" and (tracked != [0] or not takes_rows(eqn)):
        return None
    operand = tracked[0] if tracked else None
    weight = values[operand] if operand is not None else None
    base = weight.path if weight is not None else "/".join(part for part in (context.scope, kind) if part)
    name = numbered(context, base, weighted=weight is not None)
    return Site(
        name=name,
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
    )


def numbered(context: Context, base: str, *, weighted: bool) -> str:
    """The site's name: the same each time its equation is traced in one walk."""
    names: dict[Any, str] = context.walk.notes.setdefault("site_names", {})
    counts: dict[str, int] = context.walk.notes.setdefault("site_counts", {})
    if context.key not in names:
        ordinal = counts.get(base, 0)
        counts[base] = ordinal + 1
        names[context.key] = base if weighted and ordinal == 0 else f"{base}#{ordinal}"
    return names[context.key]


def takes_rows(eqn: Any) -> bool:
    """Whether a gather looks up whole rows of a table: an embedding."""
    table = eqn.invars[0].aval.shape
    return len(table) == 2 and tuple(eqn.params["slice_sizes"]) == (1, table[1])


def _aval(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def lay_out(array: jax.Array, layout: Sequence[LayoutOp | Step]) -> jax.Array:
    """Applies a weight's layout to the stored weight: the operand as its site sees it, stacked axes leading."""
    for index, op in enumerate(layout):
        if isinstance(op, Step):
            return jax.vmap(lambda step, rest=layout[index + 1 :]: lay_out(step, rest))(array)
        array = op(array)
    return jnp.asarray(array)


def step_lengths(site: Site, stored: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the scans that step over a site's weight, of which `stored` is the shape as the program holds it."""
    shape, lengths = tuple(stored), list[int]()
    for op in site.layout:
        if isinstance(op, Step):
            lengths.append(shape[0])
            shape = shape[1:]
        else:
            shape = op.eqn.outvars[op.output].aval.shape
    return tuple(lengths)


def layout_key(layout: Layout) -> tuple[Any, ...]:
    """Equal for two layouts that do the same."""
    return tuple(
        "step" if isinstance(op, Step) else (op.eqn.primitive.name, op.output, str(op.eqn.params)) for op in layout
    )


def operand_value(value: Any) -> Any:
    """The array, or replacement, at an operand of a site; taking it there does not count as an escape."""
    return value.value if isinstance(value, Tracked) else materialize(value)
