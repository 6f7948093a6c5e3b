"""Evaluates what a program computes from its weights alone, and stores the results as weights (constant folding)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.passes.core.computed import Computed, ComputedWeight
from lepton_xla.passes.core.expressions import evaluate, support
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import Site, find_computed, rewrite_sites
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.program import Program, abstract_outputs, probe_sizes
from lepton_xla.report import PassReport, SiteReport
from lepton_xla.trees import abstract, leaf_bytes, tree_bytes

# Text for computed weights in reports.
COMPUTED = "computed ahead"


@takes(program=Program)
def precompute(program: Program, *, sizes: Sequence[Mapping[str, int]] = ()) -> Program:
    """Evaluate once what the program computes on each call from weights and constants alone and then multiplies.

    Concatenated kernels (Flax's `OptimizedLSTMCell`), normalized (weight or spectral norm), masked, flipped, scaled, or
    merged (LoRA) kernels become weights, which other passes can prune, quantize and shrink. Unused weights are dropped.
    Values that depend on input sizes, draw random numbers, or would take more than `MOST_GROWTH` times the bytes of
    their weights are left in the program, and the reports of sites say so. Values that are not multiplied, only added
    for example, are left too.

    Masks are kept if zeros of the weights are certainly zeros of the computed weight, through layout, concatenation,
    sums and products. The report names lost masks.

    Args:
        program: any program.
        sizes: sizes of the symbolic dimensions at which the program will run; needed if it reads other weights at some.

    Returns:
        The program with computed weights; the same program if nothing is computed from weights alone.

    >>> weights = {"q": jnp.ones((4, 2)), "k": jnp.ones((4, 2))}
    >>> fn = lambda w, x: x @ jnp.concatenate([w["q"], w["k"]], axis=1)
    >>> program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> jax.tree.map(jnp.shape, lx.passes.precompute(program).weights)
    {'concatenate:q+k': (4, 4)}
    """
    start = time.perf_counter()
    computed = find_computed(program)
    if not computed:
        return program
    like = abstract(program.weights)
    used = {path: program.weights[path] for weight in computed for path in weight.expression.weights}
    evaluated = _evaluated(computed, tuple(used))
    values = jax.jit(evaluated)(*used.values())
    step = Step("precompute", tuple(used), tuple(weight.name for weight in computed), evaluated)
    masks, reports = dict(program.masks), list[SiteReport]()
    weights: dict[str, Any] = dict(program.weights)
    for weight, value in zip(computed, values, strict=True):
        weights[weight.name] = value
        kept = _mask(weight, program)
        masks |= {} if kept is None else {weight.name: kept}
        reports.append(_report(weight, value, program, kept))
    fn = _on_computed(program.fn, like, computed)
    gone = set(used) - _read(fn, weights, program, sizes)
    weights = {path: leaf for path, leaf in weights.items() if path not in gone}
    masks = {path: mask for path, mask in masks.items() if path not in gone}
    metrics = {
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": tree_bytes(weights),
        "weights": {path: f"part of {_whole(path, computed)}" for path in used if path in gone},
    }
    report = PassReport("precompute", time.perf_counter() - start, tuple(reports), metrics)
    history = (*program.history, report)
    return program.replace(fn=fn, weights=weights, masks=masks, history=history, derivation=program.derived(step))


def _evaluated(computed: Sequence[ComputedWeight], used: Sequence[str]) -> Callable[..., Sequence[jax.Array]]:
    """Make a function from the used weights to the computed ones."""

    def evaluated(*arrays: jax.Array) -> Sequence[jax.Array]:
        return evaluate([weight.expression for weight in computed], dict(zip(used, arrays, strict=True)))

    return evaluated


def computed_weights(sites: Sequence[Site]) -> tuple[ComputedWeight, ...]:
    """The computed weights of sites."""
    found = {site.path: ComputedWeight(site.path, site.source) for site in sites if site.path and site.source}
    return tuple(found.values())


def for_plan(program: Program, plan: Plan) -> Program:
    """Evaluate the computed weights that a plan names, if the program does not have them yet."""
    wanted = {entry.site.path for entry in plan.sites if entry.site.source is not None}
    return precompute(program) if wanted - set(program.weights) else program


def _on_computed(
    fn: Callable[..., Any], like: Mapping[str, Any], computed: Sequence[ComputedWeight]
) -> Callable[..., Any]:
    """Make a function of weights that include the computed ones, and may lack those that they are computed from."""

    def rule(_site: Site, context: Context, eqn: Any, values: Values) -> Values:
        return context.bind(eqn, values)

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        given = {weight.name: weights[weight.name] for weight in computed}
        own = {path: weights.get(path) for path in like}
        known = Computed(tuple(computed), given)
        return rewrite_sites(fn, rule, inline=True, on_unknown="keep", like=like, computed=known)(own, *inputs)

    return run


def _read(
    fn: Callable[..., Any], weights: Mapping[str, Any], program: Program, sizes: Sequence[Mapping[str, int]]
) -> set[str]:
    """Paths of the weights that a function reads, at the given sizes and at probed ones."""
    shapes = abstract(weights)
    probed, unit = probe_sizes(program.fn, program.weights, program.inputs)
    # The weights' variables come first, in the order in which JAX flattens a dict: by key.
    names = [path for path in sorted(weights) for _ in jax.tree.leaves(weights[path])]
    read: set[str] = set()
    for at in sizes:
        abstract_outputs(
            program.fn, program.weights, program.inputs, at
        )  # raises if the program does not accept these sizes
    for at in (probed, {name: size + unit for name, size in probed.items()}, *sizes):
        jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(fn)(shapes, *program.abstract_inputs(at)))
        used = _compat.inputs_read(jaxpr, [True] * len(jaxpr.outvars))
        read |= {path for path, flag in zip(names, used, strict=False) if flag}
    return read


def _whole(path: str, computed: Sequence[ComputedWeight]) -> str:
    """Names of the computed weights that a weight is part of."""
    return ", ".join(weight.name for weight in computed if path in weight.expression.weights)


def _mask(weight: ComputedWeight, program: Program) -> jax.Array | None:
    """The mask of a computed weight; None if no weight that it is computed from has one, or it is lost."""
    masks = {path: program.masks[path] for path in weight.expression.weights if path in program.masks}
    if not masks:
        return None
    mask = support(weight.expression, masks, program.weights)
    return None if bool(mask.all()) else jax.numpy.asarray(mask)


def _report(weight: ComputedWeight, value: jax.Array, program: Program, mask: jax.Array | None) -> SiteReport:
    paths = weight.expression.weights
    before = sum(leaf_bytes(program.weights[path].shape, program.weights[path].dtype) for path in paths)
    lost = [path for path in paths if path in program.masks] if mask is None else []
    reason = f"from {', '.join(paths)}" + (
        f"; the mask of {', '.join(lost)} is not kept: its zeros are not zero here" if lost else ""
    )
    return SiteReport(weight.name, COMPUTED, reason, before, leaf_bytes(value.shape, value.dtype))
