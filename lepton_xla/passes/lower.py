"""Turns planned sites into real integer arithmetic on stored int8 weights, and takes back what does not pay.

A candidate is judged by the clock, not by hope: integer products are timed against float at the sizes the program will
be compiled for, and where they are not faster the site keeps float arithmetic with its weight still stored in int8
(a quarter of the bytes).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from lepton_xla.errors import UnsupportedError
from lepton_xla.passes import products
from lepton_xla.passes.calibrate import needs_range
from lepton_xla.passes.measure import Timing, compare
from lepton_xla.passes.rewrite import Context, Values, materialize
from lepton_xla.passes.sites import LayoutOp, Site, find_sites, lay_out, layout_key, rewrite_sites
from lepton_xla.program import Program, abstract, leaf_bytes, tree_bytes
from lepton_xla.report import PassReport, SiteReport

if TYPE_CHECKING:
    from lepton_xla.quant import QTensor
    from lepton_xla.recipe import Plan, QuantizeRule

# Calibrated ranges travel in the program's weights under the site's name and this suffix, so that they can be updated.
RANGE_SUFFIX = ":act_absmax"
# A candidate must win by more than the clock's noise.
WORTH_RATIO = 0.97


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A site that is to be quantized, and by which rule."""

    site: Site
    rule: QuantizeRule


@dataclasses.dataclass(frozen=True)
class _Decision:
    """How one site is computed."""

    planned: _Planned
    integer: bool
    pad_single: bool = False


def lower(
    program: Program,
    plan: Plan,
    ranges: Mapping[str, jax.Array] | None = None,
    *,
    sizes: Sequence[Mapping[str, int]] = (),
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Stores planned weights as integers and computes with them.

    Args:
        program: the float program that the plan was made for.
        plan: which sites get what.
        ranges: site name -> range, from `calibrate`; needed for static sites.
        sizes: sizes of the symbolic dimensions, such as `[{"batch": 1}, {"batch": 32}]`, at which integer products are
            timed against float. Empty: nothing is timed and every planned site is computed as planned.
        progress: called with a line as each site is looked at.

    Returns:
        A program whose planned weights are `QTensor`s, and whose history says what each site became and why.

    Raises:
        UnsupportedError: if a planned weight cannot be stored as an integer and the plan says `error`.
        CalibrationError: if a static site has no range.
    """
    start = time.perf_counter()
    weights: dict[str, Any] = dict(program.weights)
    like = abstract(program.weights)
    reports: list[SiteReport] = []
    decisions: dict[str, _Decision] = {}
    found = {tuple(sorted(at.items())): _by_name(find_sites(program, sizes=at)) for at in sizes}
    for path, group in _by_weight(plan).items():
        reason = _keep_reason(group)
        if reason is not None:
            if plan.recipe.on_unsupported == "error":
                raise UnsupportedError(f"site {group[0].site.name!r} cannot be lowered: {reason}")
            size = leaf_bytes(like[path].shape, like[path].dtype)
            reports += [SiteReport(entry.site.name, "kept float", reason, size, size) for entry in group]
            continue
        if progress is not None:
            progress(path)
        weights[path] = _store(group[0], program.weights[path])
        for planned in group:
            static = needs_range(planned.rule)
            if static:
                weights[planned.site.name + RANGE_SUFFIX] = products.range_of(planned.site, ranges)
            timings = _time_site(planned, found) if planned.rule.activations != "none" else []
            decision, report = _decide(planned, timings, like[path], weights[path])
            decisions[planned.site.name] = decision
            reports.append(report)
            if static and not decision.integer:
                del weights[planned.site.name + RANGE_SUFFIX]
    reports += [
        SiteReport(entry.site.name, "kept float", entry.kept)
        for entry in plan.sites
        if entry.quantize is None and "not quantized" in entry.kept
    ]
    static_sites = [d.planned.site for d in decisions.values() if d.integer and needs_range(d.planned.rule)]
    report = PassReport("lower", time.perf_counter() - start, tuple(reports), _totals(program, weights))
    return program.replace(
        fn=_lowered(program.fn, like, decisions, static_sites),
        weights=weights,
        history=(*program.history, report),
    )


def _lowered(
    fn: Callable[..., Any], like: Any, decisions: Mapping[str, _Decision], static_sites: Sequence[Site]
) -> Callable[..., Any]:
    """The function on stored weights."""

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        decision = decisions.get(site.name)
        if decision is None or site.weight_operand is None:
            return None
        tracked = values[site.weight_operand]
        activation = materialize(values[1 - site.weight_operand])
        if decision.integer:
            absmax = products.static_range(site, decision.planned.rule, tracked)
            return [products.integer_product(site, activation, tracked.value, absmax, pad_single=decision.pad_single)]
        weight = products.restore(site, tracked.value)
        operands = (activation, weight) if site.weight_operand == 1 else (weight, activation)
        return context.bind(eqn, operands)

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        ranges = {site.name: weights[site.name + RANGE_SUFFIX] for site in static_sites}
        own = {name: leaf for name, leaf in weights.items() if name in like}
        beside = products.ranges_beside(static_sites, ranges)
        return rewrite_sites(fn, rule, inline=True, on_unknown="keep", like=like, beside=beside)(own, *inputs)

    return run


def _store(planned: _Planned, weight: jax.Array) -> QTensor:
    """Quantizes one stored weight, stacked axes and all, in its site's layout."""
    site, rule = planned.site, planned.rule
    laid = lay_out(weight, site.layout)
    quantize = lambda step: products.store(site, step, rule.weights, rule.granularity)  # noqa: E731
    for _ in range(site.stacked):
        quantize = jax.vmap(quantize)
    return quantize(laid)


def _by_weight(plan: Plan) -> dict[str, list[_Planned]]:
    """Planned sites by the weight they share."""
    groups: dict[str, list[_Planned]] = {}
    for planned in plan.sites:
        if planned.quantize is not None and planned.site.path is not None:
            groups.setdefault(planned.site.path, []).append(_Planned(planned.site, planned.quantize))
    return groups


def _keep_reason(group: Sequence[_Planned]) -> str | None:
    """Why a weight cannot be stored as an integer, or None."""
    first = group[0].site
    for site in (entry.site for entry in group):
        if not site.exclusive:
            return "its weight is also used where no product is"
        if site.container == "shard_map":
            return "it is inside shard_map, where the weight is one shard"
        if layout_key(site.layout) != layout_key(first.layout) or site.params.get("dimension_numbers") != (
            first.params.get("dimension_numbers")
        ):
            return f"its weight is used in another layout at {first.name!r}"
        if any(_grows(op) for op in site.layout if isinstance(op, LayoutOp)):
            return "its weight is broadcast or cut before use"
    return None


def _grows(op: LayoutOp) -> bool:
    """Whether a layout operation changes how many elements there are."""
    before, after = op.eqn.invars[0].aval.shape, op.eqn.outvars[op.output].aval.shape
    return math.prod(before) != math.prod(after)


def _by_name(sites: Iterable[Site]) -> dict[str, Site]:
    return {site.name: site for site in sites}


def _time_site(planned: _Planned, found: Mapping[Any, Mapping[str, Site]]) -> list[Timing]:
    """Float against integer arithmetic at each size, or nothing to measure."""
    return [compare(by_name[planned.site.name], planned.rule, dict(at)) for at, by_name in found.items()]


def _decide(
    planned: _Planned, timings: Sequence[Timing], like: jax.ShapeDtypeStruct, stored: QTensor
) -> tuple[_Decision, SiteReport]:
    """Keeps the integer product where it is faster over the sizes as a whole."""
    rule = planned.rule
    before, after = leaf_bytes(like.shape, like.dtype), tree_bytes(stored)
    metrics: dict[str, Any] = {"timings": [timing.to_json() for timing in timings]} if timings else {}
    formats = f"{rule.weights} weights"
    reason = ""
    if rule.activations == "none":
        chosen = _Decision(planned, integer=False)
    else:
        pad = any(timing.padded_us is not None and timing.padded_us < timing.integer_us for timing in timings)
        ratios = [timing.best_us(pad) / timing.float_us for timing in timings]
        ratio = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
        chosen = _Decision(planned, integer=ratio < WORTH_RATIO, pad_single=pad)
        if ratios:
            metrics["integer_over_float"] = ratio
        if chosen.integer:
            formats = f"{rule.weights} x {rule.activations}"
        else:
            reason = f"integer arithmetic takes {ratio:.2f} of float's time here, so only the weight is stored small"
    return chosen, SiteReport(planned.site.name, formats, reason, before, after, metrics)


def _totals(program: Program, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {"weights_bytes_before": program.weights_bytes, "weights_bytes_after": tree_bytes(dict(weights))}
