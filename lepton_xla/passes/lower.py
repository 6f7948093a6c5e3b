"""Turns planned sites into real integer arithmetic on stored int8 weights, and takes back what does not pay.

A candidate is judged by the clock, not by hope. Each integer product is timed against float at the sizes the program
will be compiled for; then the whole program is timed with ever more of the promising ones, since what a product costs
beside its neighbours differs from what it costs alone. A site that does not make the whole faster keeps float
arithmetic, with its weight still stored in int8 (a quarter of the bytes).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from lepton_xla.passes import products
from lepton_xla.passes.calibrate import needs_range
from lepton_xla.passes.measure import Timing, WholeTiming, compare, time_programs
from lepton_xla.passes.rewrite import Context, Values, materialize
from lepton_xla.passes.sites import Site, find_sites, lay_out, rewrite_sites
from lepton_xla.program import Program, abstract, leaf_bytes, tree_bytes
from lepton_xla.report import PassReport, SiteReport

if TYPE_CHECKING:
    from lepton_xla.quant import QTensor
    from lepton_xla.recipe import Plan, QuantizeRule

# Calibrated ranges travel in the program's weights under the site's name and this suffix, so that they can be updated.
RANGE_SUFFIX = ":act_absmax"
# A candidate must win by more than the clock's noise.
WORTH_RATIO = 0.97
# Alone at this share of float's time or more, a product is not tried in the whole program.
HOPELESS_RATIO = 1.2
# How many sets of integer sites are tried in the whole program, the empty one not counted.
MAX_SETS = 4


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A site that is to be quantized, and by which rule."""

    site: Site
    rule: QuantizeRule


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
        CalibrationError: if a static site has no range.
    """
    start = time.perf_counter()
    say = progress or (lambda _line: None)
    weights: dict[str, Any] = dict(program.weights)
    like = abstract(program.weights)
    reports: list[SiteReport] = []
    stored: list[_Planned] = []
    for path, group in _by_weight(plan).items():
        weights[path] = _store(group[0], program.weights[path])
        stored += group
    candidates = [planned for planned in stored if planned.rule.activations != "none"]
    values = {
        planned.site.name + RANGE_SUFFIX: products.range_of(planned.site, ranges)
        for planned in candidates
        if needs_range(planned.rule)
    }
    timings = _time_sites(program, candidates, sizes, say)

    def build(integer: frozenset[str]) -> Callable[..., Any]:
        return _lowered(program.fn, like, stored, integer, {name: _padded(timings[name]) for name in integer})

    sets = _candidate_sets(candidates, timings)
    whole = _time_sets(program, weights | values, build, sets, sizes, say) if len(sets) > 1 else []
    integer = _fastest(sets, whole)
    kept = {name: value for name, value in values.items() if name.removesuffix(RANGE_SUFFIX) in integer}
    weights |= kept
    for planned in stored:
        path = planned.site.path
        assert path is not None
        reports.append(_report(planned, integer, timings.get(planned.site.name, []), like[path], weights[path]))
    reports += [
        SiteReport(entry.site.name, "kept float", entry.not_quantized, entry.weight_bytes, entry.weight_bytes)
        for entry in plan.sites
        if entry.not_quantized
    ]
    metrics: dict[str, Any] = {
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": tree_bytes(weights),
    }
    if whole:
        chosen = sets.index(integer)
        metrics["whole_program"] = [
            {"sizes": timed.sizes, "float_us": timed.float_us, "lowered_us": timed.set_us[chosen]} for timed in whole
        ]
    report = PassReport("lower", time.perf_counter() - start, tuple(reports), metrics)
    return program.replace(fn=build(integer), weights=weights, history=(*program.history, report))


def _lowered(
    fn: Callable[..., Any],
    like: Any,
    stored: Sequence[_Planned],
    integer: frozenset[str],
    pad_single: Mapping[str, bool],
) -> Callable[..., Any]:
    """The function on stored weights, the sites named in `integer` in integer arithmetic."""
    by_name = {planned.site.name: planned.rule for planned in stored}
    static_sites = [planned.site for planned in stored if planned.site.name in integer and needs_range(planned.rule)]

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        planned = by_name.get(site.name)
        if planned is None or site.weight_operand is None:
            return None
        tracked = values[site.weight_operand]
        activation = materialize(values[1 - site.weight_operand])
        if site.name in integer:
            absmax = products.static_range(site, planned, tracked)
            pad = pad_single[site.name]
            return [products.integer_product(site, activation, tracked.value, absmax, pad_single=pad)]
        weight = products.restore(site, tracked.value)
        return context.bind(eqn, (activation, weight) if site.weight_operand == 1 else (weight, activation))

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


def _time_sites(
    program: Program, candidates: Sequence[_Planned], sizes: Sequence[Mapping[str, int]], say: Callable[[str], None]
) -> dict[str, list[Timing]]:
    """Float against integer arithmetic at each site and size; empty lists where there is no size to time at."""
    found = [(at, {site.name: site for site in find_sites(program, sizes=at)}) for at in sizes]
    timings: dict[str, list[Timing]] = {}
    for planned in candidates:
        name = planned.site.name
        if found:
            say(name)
        # A program may take another way at some sizes.
        timings[name] = [compare(by_name[name], planned.rule, at) for at, by_name in found if name in by_name]
    return timings


def _padded(timings: Sequence[Timing]) -> bool:
    """Whether single rows are better padded to two."""
    return any(timing.padded_us is not None and timing.padded_us < timing.integer_us for timing in timings)


def _ratio(timings: Sequence[Timing]) -> float:
    """Integer time over float time, the geometric mean over sizes; 0 where nothing was timed."""
    if not timings:
        return 0.0
    pad = _padded(timings)
    return statistics.geometric_mean([timing.best_us(pad) / timing.float_us for timing in timings])


def _candidate_sets(candidates: Sequence[_Planned], timings: Mapping[str, Sequence[Timing]]) -> list[frozenset[str]]:
    """Sets of sites to try in integers: none, then ever more, the most promising first."""
    ratios = {planned.site.name: _ratio(timings[planned.site.name]) for planned in candidates}
    if all(ratio == 0 for ratio in ratios.values()):
        return [frozenset(ratios)]  # nothing was timed, so everything is done as planned
    promising = sorted({ratio for ratio in ratios.values() if ratio < HOPELESS_RATIO})
    # Sites that look the same share a ratio, so they come in together.
    limits = [promising[(len(promising) * (k + 1) - 1) // MAX_SETS] for k in range(MAX_SETS)] if promising else []
    sets = [frozenset(name for name, ratio in ratios.items() if ratio <= limit) for limit in sorted(set(limits))]
    return [frozenset[str](), *sets]


def _time_sets(
    program: Program,
    weights: Mapping[str, Any],
    build: Callable[[frozenset[str]], Callable[..., Any]],
    sets: Sequence[frozenset[str]],
    sizes: Sequence[Mapping[str, int]],
    say: Callable[[str], None],
) -> list[WholeTiming]:
    """Times the whole program at the smallest and the largest sizes, with each set of sites in integers."""
    kept = {chosen: dict(weights) for chosen in sets}
    for chosen, leaves in kept.items():
        for name in [name for name in leaves if name.endswith(RANGE_SUFFIX)]:
            if name.removesuffix(RANGE_SUFFIX) not in chosen:
                del leaves[name]
    functions = [(program.fn, program.weights), *((build(chosen), kept[chosen]) for chosen in sets)]
    timed = []
    for at in (sizes[0], sizes[-1]) if len(sizes) > 1 else sizes:
        say(f"the whole program at {', '.join(f'{name} {size}' for name, size in at.items()) or 'its size'}")
        times = time_programs(functions, program.abstract_inputs(at))
        timed.append(WholeTiming(dict(at), times[0], tuple(times[1:])))
    return timed


def _fastest(sets: Sequence[frozenset[str]], whole: Sequence[WholeTiming]) -> frozenset[str]:
    """The set with the best time over the sizes; a larger set must earn its place."""
    if not whole:
        return sets[-1]
    scores = [statistics.geometric_mean([timed.set_us[index] for timed in whole]) for index in range(len(sets))]
    best = 0
    for index, score in enumerate(scores):
        if score < WORTH_RATIO * scores[best]:
            best = index
    return sets[best]


def _report(
    planned: _Planned, integer: frozenset[str], timings: Sequence[Timing], like: jax.ShapeDtypeStruct, stored: QTensor
) -> SiteReport:
    rule = planned.rule
    metrics: dict[str, Any] = {"timings": [timing.to_json() for timing in timings]} if timings else {}
    ratio = _ratio(timings)
    if timings:
        metrics["integer_over_float"] = ratio
    action, reason = f"{rule.weights} weights", ""
    if planned.site.name in integer:
        action = f"{rule.weights} x {rule.activations}"
    elif rule.activations != "none":
        reason = f"integer arithmetic takes {ratio:.2f} of float's time here, so only the weight is stored small"
        if ratio < HOPELESS_RATIO:
            reason = f"integer arithmetic ({ratio:.2f} of float's time alone) does not make the whole program faster"
    before, after = leaf_bytes(like.shape, like.dtype), tree_bytes(stored)
    return SiteReport(planned.site.name, action, reason, before, after, metrics)
