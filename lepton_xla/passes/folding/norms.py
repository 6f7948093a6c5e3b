"""Folds per-channel operations after a product, such as batch norm, into its weight; removes duplicate work.

`scale * (x @ W) + shift = x @ (scale * W) + shift` (Jacob et al. 2018, arXiv:1712.05877, section 3.2), where scale and
shift depend on weights alone. There are two walks. The first follows each product through the operations that scale and
shift its channels, up to the first value that another operation reads. The second computes that value from the folded
weight. What to fold is decided at one set of sizes and holds for all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.passes.core.dtypes import wider
from lepton_xla.passes.core.executables import Compilation, Lowered
from lepton_xla.passes.core.layouts import Layout, LayoutOp, lay_out
from lepton_xla.passes.core.names import fresh
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.sites import Site, find_sites
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.passes.folding.chains import (
    ArraysByPath,
    ScaledProduct,
    Vector,
    WeightEquation,
    WeightExpression,
    axis_of,
    channel_axes,
    extended,
    follow_expressions,
    track_product,
)
from lepton_xla.passes.folding.simplification import count_equations, evaluate_once, used_weights
from lepton_xla.program import Program, probe_sizes
from lepton_xla.report import PassReport, SiteReport
from lepton_xla.trees import abstract, leaf_bytes, tree_bytes

# Name of the folded shift of a weight.
BIAS = "bias"


@dataclasses.dataclass(frozen=True)
class _Fold:
    """A folded weight.

    Attributes:
        site: the product.
        layout: operations between the stored weight and the product.
        scale: factor of the weight.
        shift: added to the product, or None.
        bias: the path of the shift among the weights, or None.
        steps: number of folded operations after the product.
        dtype: the dtype of the last operation.
    """

    site: Site
    layout: Layout
    scale: Vector
    shift: Vector | None
    bias: str | None
    steps: int
    dtype: Any


@takes(program=Program)
def fold(program: Program) -> Program:
    """Fold batch norms (any per-channel affine) into the preceding weights; remove dead code and common
    subexpressions.

    A weight is folded if it is used at one site only, outside control flow, and nothing else reads the product.

    Returns:
        The program, precomputed, with fewer weights and operations. A folded weight keeps its path and has the layout
        of its site; its shift is the weight `path:bias`.

    >>> weights = {"w": jnp.eye(4), "scale": jnp.full((1, 4), 2.0)}
    >>> fn = lambda w, x: x @ w["w"] * w["scale"]
    >>> program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> lx.passes.fold(program).weights["w"][0].tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    program = precompute(program)  # otherwise folding would also change weights that are computed from a folded one
    start = time.perf_counter()
    found = find_sites(program)
    uses = [site.path for site in found]
    sites = {site.path: site for site in found if _foldable(site) and uses.count(site.path) == 1}
    sizes = probe_sizes(program.fn, program.weights, program.inputs)[0]

    like = abstract(program.weights)
    products: list[ScaledProduct] = []
    jax.eval_shape(_walk(program.fn, like, sites, found=products), like, *program.abstract_inputs(sizes))
    taken = set(like)
    folds = {_path(fold.site): fold for product in products if (fold := _folded(product.last(), taken)) is not None}

    weights: dict[str, Any] = dict(program.weights)
    masks = dict(program.masks)
    reports = []
    steps: list[Step] = []
    found_folds = _all_made(program.weights, list(folds.values()))
    for (path, entry), (made, step) in zip(list(folds.items()), found_folds, strict=True):
        if not made:
            del folds[path]
            continue
        weights |= made
        steps.append(step)
        if path in masks:
            # A layout may convert to a float dtype; the mask must stay bool.
            masks[path] = lay_out(masks[path].astype(like[path].dtype), entry.layout) != 0
        before, after = (leaf_bytes(leaf.shape, leaf.dtype) for leaf in (like[path], weights[path]))
        reports.append(SiteReport(entry.site.name, "scale and shift folded in", "", before, after))

    fn = _walk(program.fn, like, sites, folds=folds)
    used = used_weights(fn, weights, program, sizes)
    kept = {name: value for name, value in weights.items() if name in used}
    masks = {name: mask for name, mask in masks.items() if name in used}
    metrics = {
        "equations_before": count_equations(program.jaxpr(sizes)),
        "equations_after": count_equations(jax.make_jaxpr(fn)(abstract(kept), *program.abstract_inputs(sizes))),
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": tree_bytes(kept),
        "weights": _taken(like, [path for path in like if path not in kept], folds),
    }
    report = PassReport("fold", time.perf_counter() - start, tuple(reports), metrics)
    history = (*program.history, report)
    return program.replace(fn=fn, weights=kept, masks=masks, history=history, derivation=program.derived(*steps))


def _taken(like: ArraysByPath, gone: Sequence[str], folds: Mapping[str, _Fold]) -> dict[str, str]:
    """For each removed weight that was folded: what it was folded into. The other removed weights are unused."""
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
    return site.kind == "conv_general_dilated" or (site.kind == "dot_general" and channel_axes(site) is not None)


def _path(site: Site) -> str:
    assert site.path is not None
    return site.path


def _folded(end: ScaledProduct, taken: set[str]) -> _Fold | None:
    """Make the fold of a chain, with an unused name for its bias; None if nothing scales or shifts the product."""
    if end.scale is None:
        return None
    bias = None
    if end.shift is not None:
        bias = fresh(_path(end.site), BIAS, taken)
        taken.add(bias)
    return _Fold(end.site, end.weight.layout, end.scale, end.shift, bias, end.steps, end.aval.dtype)


class _Recorder(dict[str, Any]):
    """Weights that note which of them are read."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__(weights)
        self.read: dict[str, None] = {}

    def __getitem__(self, path: str) -> Any:
        self.read[path] = None
        return super().__getitem__(path)


def _all_made(weights: Mapping[str, Any], folds: Sequence[_Fold]) -> list[tuple[dict[str, jax.Array], Step]]:
    """Compute each folded weight and its bias; empty where folding loses something. Equal folds are compiled once."""
    steps: list[Step] = []
    waiting: list[Callable[[], list[Any]]] = []
    leaves: list[list[Any]] = []
    with Compilation() as compilation:
        for entry in folds:
            recorders: list[_Recorder] = []

            def recorded(given: Mapping[str, Any], entry: _Fold = entry, recorders: list[_Recorder] = recorders) -> Any:
                recorders.append(_Recorder(given))
                return _made(recorders[-1], entry)

            jax.eval_shape(recorded, abstract(weights))
            names = tuple(recorders[-1].read)

            def made(*read: Any, entry: _Fold = entry, names: tuple[str, ...] = names) -> Any:
                return _made(dict(zip(names, read, strict=True)), entry)

            def given(*read: Any, made: Callable[..., Any] = made) -> list[Any]:
                return [each for each in made(*read) if each is not None]

            gives = (_path(entry.site),) + (() if entry.bias is None else (entry.bias,))
            steps.append(Step("fold", names, gives, given))
            leaves.append([weights[name] for name in names])
            waiting.append(compilation.start([Lowered.of(made, *leaves[-1])]))
    found: list[tuple[dict[str, jax.Array], Step]] = []
    for entry, executable, read, step in zip(folds, waiting, leaves, steps, strict=True):
        (run,) = executable()
        weight, bias, exact = run(*read)
        both = {_path(entry.site): weight} | ({} if entry.bias is None else {entry.bias: bias})
        found.append((both if bool(exact) else {}, step))
    return found


def _made(weights: ArraysByPath, entry: _Fold) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Compute the folded weight, in float32 or wider, its bias, and whether these lose nothing.

    A narrow dtype may overflow, or lose a channel that falls below its normal numbers.
    """
    laid = lay_out(weights[_path(entry.site)], entry.layout)
    scale, axis = entry.scale(weights), axis_of(entry.site, 1)
    wide = wider(laid.dtype, scale.dtype)
    exact = laid.astype(wide) * _along(scale.astype(wide), axis, laid.ndim)
    weight, bias = exact.astype(laid.dtype), None
    fine = jnp.all(jnp.isfinite(weight))
    if entry.shift is not None and entry.bias is not None:
        bias = entry.shift(weights).astype(entry.dtype)
        fine &= jnp.all(jnp.isfinite(bias))
    largest = jnp.max(jnp.abs(exact), axis=[k for k in range(exact.ndim) if k != axis], initial=0)
    lost = jnp.any((largest > 0) & (largest < float(jnp.finfo(laid.dtype).tiny)))
    return weight, bias, fine & ~lost


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Reshape a vector, or scalar, to an array of the given rank that varies along one axis."""
    return jnp.reshape(vector, [-1 if k == axis else 1 for k in range(ndim)])


def _walk(
    fn: Callable[..., Any],
    like: Mapping[str, Any],
    sites: Mapping[str | None, Site],
    *,
    found: list[ScaledProduct] | None = None,
    folds: Mapping[str, _Fold] | None = None,
) -> Callable[..., Any]:
    """Make `fn` record its foldable products in `found`, or compute those of `folds` from folded weights."""

    def rule(context: Context, eqn: Any, values: Values) -> Values | None:
        if eqn.effects or _compat.inner_jaxprs(eqn):
            return None
        literal = [isinstance(atom, _compat.LITERAL) for atom in eqn.invars]
        expression = [isinstance(value, WeightExpression) for value in values]
        if any(expression) and all(a or b for a, b in zip(expression, literal, strict=True)):
            return follow_expressions(context, eqn, values)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated") and expression[1] and not context.container:
            path = values[1].path
            if found is not None and path in sites:
                return [track_product(eqn, sites[path], values, found)]
            if folds is not None and path in folds:
                activation = materialize(values[0])
                axis = axis_of(folds[path].site, 0)
                return [ScaledProduct(folds[path].site, eqn, values[1], activation, eqn.outvars[0].aval, None, axis)]
        for side, value in enumerate(values):
            if isinstance(value, ScaledProduct):
                after = extended(eqn, value, side, values, literal)
                if after is not None:
                    value.following.append(after)
                    entry = (folds or {}).get(_path(value.site))
                    return [_finish(entry, after) if entry and after.steps == entry.steps else after]
        return evaluate_once(context, eqn, values)

    def prepare(weights: Mapping[str, Any], *inputs: Any) -> tuple[Any, ...]:
        known: dict[WeightEquation, Values] = {}
        flat = {
            name: WeightExpression(leaf, weights, known, name)
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


def _finish(entry: _Fold, product: ScaledProduct) -> jax.Array:
    """Compute the end of a chain from the folded weight."""
    given = product.weight.given
    out = _compat.bind(product.eqn, [product.activation, given[_path(entry.site)]])[0]
    if entry.bias is not None:
        wide = wider(out.dtype, entry.dtype)
        bias = _along(given[entry.bias].astype(wide), axis_of(entry.site, 0), out.ndim)
        out = out.astype(wide) + bias
    out = out.astype(entry.dtype)
    for move in product.moves:
        out = _compat.bind(move, [out])[0]
    return out
