"""Stores planned weights in their formats, computes with their codes, and reverts what does not pay.

Each integer product is timed against float at the sizes to be compiled. Then the whole program is timed with growing
sets of the promising sites, because a product costs more or less among its neighbours than alone. A site that does not
make the whole program faster returns to float arithmetic. Its weight is still stored small, and unpacked once on
loading if unpacking on each call costs time.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.passes.alternatives import exciting, fusing
from lepton_xla.passes.alternatives.autotuning import choose, times_us
from lepton_xla.passes.alternatives.passing import pass_codes
from lepton_xla.passes.core import memory
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.calibration import needs_range
from lepton_xla.passes.core.executables import Candidate
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.names import Key, fresh_names
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site, find_sites, rewrite_sites
from lepton_xla.passes.core.spreading import is_spread
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing import Timer, time_programs
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.passes.quantization import eligibility, epilogues, products, selection
from lepton_xla.passes.quantization.measurement import Timing, compare
from lepton_xla.passes.quantization.products import RANGE, SCALE
from lepton_xla.passes.quantization.rounding import ROUNDINGS
from lepton_xla.passes.quantization.selection import Ways, way_at
from lepton_xla.passes.quantization.storing import (
    PlannedSite,
    finite_range,
    store_weight,
    storing_step,
    zero_channels,
)
from lepton_xla.passes.quantization.whole_program import WholeProgram, WholeTiming
from lepton_xla.program import Expansion, Program
from lepton_xla.quant import QTensor
from lepton_xla.quant.grid import settle
from lepton_xla.quant.learned import raw_scales
from lepton_xla.report import PassReport, SiteReport, unchanged
from lepton_xla.trees import abstract, leaf_bytes, tree_bytes

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Note in the report for weights that are unpacked on loading.
_AT_LOAD = "unpacked once, on loading: on each call it is slower"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operand"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Unpacked:
    """A weight that was unpacked on loading to the float operand of its product; its layout is already applied."""

    operand: jax.Array


@takes(program=Program, plan=Plan, ranges=Mapping, scales=Mapping, in_float=Mapping, progress=Callable)
def quantize(
    program: Program,
    plan: Plan,
    ranges: Mapping[str, Float[Array, "*steps"]] | None = None,
    *,
    scales: Mapping[str, Mapping[str, Float[Array, "*_"]]] | None = None,
    sizes: Sequence[Mapping[str, int]] = (),
    in_float: Mapping[str, str] | None = None,
    chosen: tuple[frozenset[str], bool, frozenset[int]] | None = None,
    known: dict[str, tuple[jax.Array, QTensor]] | None = None,
    timer: Timer | None = None,
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Quantize a program: store planned weights in their formats, and compute with their codes.

    Args:
        program: the float program that the plan was made for.
        plan: which sites get what.
        ranges: site name -> range, from `calibrate`; needed for static sites.
        scales: scales from training or another pass, instead of those from ranges: weight path -> any of `scale`,
            `zero_point`, `codebook`, with the stacked axes leading, as in `QTensor`; and site name -> `activation`, a
            static scale of its activation. Logarithms are accepted too, as from `initial_scales`.
        sizes: sizes of the symbolic dimensions, such as `[{"batch": 1}, {"batch": 32}]`, at which integer products are
            timed against float. If empty, nothing is timed and every planned site is computed as planned.
        in_float: site name -> why its product must be computed in float although an integer one is planned.
        chosen: what an earlier measurement of a similar program chose: names of the integer sites, whether other
            weights are unpacked on loading, and numbers of rows without kernels. None: the whole program is timed.
        known: cache of stored weights: path -> float weight and what it was stored as.
        timer: times calls, for its target; by default a new one for this process's device.
        progress: called with a line for each site.

    Returns:
        A program whose planned weights are `QTensor`s; its history says what each site became and why.

    Raises:
        CalibrationError: if a static site has no range, or one that is not finite.
        ModelError: if a planned weight, or a scale, is not finite.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> small = lx.passes.quantize(program, lx.passes.resolve(lx.Recipe.load("int8"), program))
    >>> small.weights["w"].values.dtype.name, program.weights_bytes, small.weights_bytes
    ('int8', 64, 32)
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    say = progress or (lambda _line: None)
    timer = timer or Timer()
    counts = timer.counts()
    given = raw_scales(scales)
    weights: dict[str, Any] = dict(program.weights)
    like = abstract(program.weights)
    reports: list[SiteReport] = []
    groups = {
        path: [PlannedSite(entry.site, entry.quantize) for entry in entries if entry.quantize is not None]
        for path, entries in plan.quantized.items()
    }
    stored = [planned for group in groups.values() for planned in group]
    pairs = [
        PlannedSite(entry.site, entry.quantize)
        for entry in plan.sites
        if entry.quantize is not None and entry.site.path is None
    ]
    every = [*stored, *pairs]
    reasons = {
        planned.site.name: eligibility.float_reason(planned.site, planned.rule, timer.target) for planned in every
    }
    reasons |= {name: reason for name, reason in (in_float or {}).items() if name in reasons}
    candidates = [planned for planned in every if planned.rule.activations != "none" and not reasons[planned.site.name]]
    if sizes:  # what was not timed is computed as planned, and a plan knows of no kernels
        candidates += [
            planned
            for planned in stored
            if not reasons[planned.site.name]
            and planned.site.path is not None
            and eligibility.has_kernel(planned.site, planned.rule, timer.target)
            and not is_spread(program.weights[planned.site.path])
        ]
    multiplied = {
        planned.site.path
        for planned in candidates
        if planned.site.kind == "dot_general" and planned.rule.activations != "none"
    }
    known = {} if known is None else known
    for path, group in groups.items():
        weight = program.weights[path]
        if path not in known or known[path][0] is not weight:
            # A row of a table is looked up as it is stored, in one piece.
            looked_up = all(planned.site.kind == "gather" for planned in group)
            known[path] = weight, store_weight(group[0], weight, given.get(path, {}), looked_up or path in multiplied)
        weights[path] = known[path][1]
    values: dict[Key, jax.Array] = {}
    for planned in candidates:
        trained = given.get(planned.site.name, {}).get("activation")
        if trained is not None:
            values[planned.site.name, SCALE] = settle(trained, "tensor")
        elif needs_range(planned.rule):
            values[planned.site.name, RANGE] = finite_range(planned.site, ranges)
    names = fresh_names(values, like)
    memory.give_back()  # free memory of earlier passes, and below of large operands: timing needs memory too
    began = time.perf_counter()
    choices = choose(program, sizes if candidates else (), say, timer)
    timings = _time_sites(program, candidates, sizes, say, timer)
    memory.give_back()
    timed_s = time.perf_counter() - began
    reasons |= {
        name: selection.wrong_reason(name, found, timer.target)
        for name, found in timings.items()
        if any(t.wrong for t in found)
    }
    candidates = [planned for planned in candidates if not reasons[planned.site.name]]

    prepared_s = time.perf_counter() - start - timed_s
    passing = selection.passing(candidates, timings)

    fused: dict[str, str] = {}

    def build(integer: frozenset[str], kernels: bool = True) -> Callable[..., Any]:
        side_inputs = {key: name for key, name in names.items() if key[0] in integer}
        ways = selection.ways_of(integer, timings if kernels else selection.without_kernels(timings), passing)
        lowered = _lowered(program.fn, like, every, side_inputs, ways, timer.target, fused)
        by_kernel = {each.site.kind for each in every if "kernel" in ways.get(each.site.name, {}).values()}
        passed = exciting.excite(pass_codes(fusing.fuse(lowered)), lambda pattern: pattern.codes)
        return passed if "conv_general_dilated" in by_kernel else lowered

    compiled: dict[str, Any] = {}
    laid: dict[str, jax.Array] = {}

    def variant(integer: frozenset[str], unpacked: bool, kernels: bool = True) -> tuple[Callable[..., Any], Any]:
        """The program with these sites computed from codes, and its weights.

        The original float weight stands for an unpacked weight: it takes no extra memory, and its operations the same
        time.
        """
        own = weights | _own(values, names, integer)
        for path, site in _unpackable(stored, integer).items():
            if unpacked and path not in laid:
                laid[path] = _laid(program.weights[path], Alike(site)) if site.layout else program.weights[path]
            own[path] = laid[path] if unpacked else weights[path].by_rows()
        return Candidate(choices.apply(build(integer, kernels)), compiled), own  # as `autotune` will leave it

    floating = (Candidate(choices.apply(program.fn), compiled), program.weights)
    whole = WholeProgram(program, floating, variant, functools.partial(time_programs, timer=timer), say)
    may_unpack = plan.recipe.unpack == "measured"
    if chosen is None:
        sets = selection.candidate_sets({planned.site.name: timings[planned.site.name] for planned in candidates})
        if passing and (joined := sets[-1] | passing) not in sets:  # what loses alone may win among its neighbours
            sets.append(joined)
    else:
        sets = [chosen[0] & set(timings)]
    tried = whole.sets(sets, selection.spread(sizes), may_unpack) if len(sets) > 1 else []
    integer = selection.fastest(sets, tried)
    lowered_us = {at: timed.set_us[sets.index(integer)] for at, timed in enumerate(tried)}
    by_rows: list[WholeTiming] = []
    if chosen is not None:
        refused = chosen[2]
    else:  # a kernel that wins alone may lose among its neighbours
        kernel_rows = {
            at: rows for at in range(len(tried)) if (rows := _kernel_rows(integer, timings, passing, tried[at].sizes))
        }
        if kernel_rows:
            both = [variant(integer, may_unpack), variant(integer, may_unpack, kernels=False)]
            by_rows = whole.compare(both, [tried[at].sizes for at in kernel_rows])
        refused = selection.losing_rows(by_rows, list(kernel_rows.values()))
        for (at, rows), timed in zip(kernel_rows.items(), by_rows, strict=True):
            lowered_us[at] = timed.set_us[1 if rows <= refused else 0]
    timings = selection.without_kernels(timings, refused)
    unpackable = _unpackable(stored, integer)
    weights |= {path: weights[path].by_rows() for path in unpackable}
    expansion = None
    if unpackable and may_unpack and sizes:
        if chosen is None:
            once, tried, lowered_us = whole.unpacking(integer, selection.spread(sizes), tried, lowered_us)
        else:
            once = chosen[1]
        expansion = Expansion(functools.partial(_unpack, unpackable), build(integer)) if once else None
    weights |= _own(values, names, integer)
    counted: set[str] = set()
    for planned in every:
        name, path = planned.site.name, planned.site.path
        passes = name in passing <= integer
        entry = _report(planned, reasons[name], integer, timings.get(name, []), fused.get(name, ""), passes)
        if path is not None:
            before = leaf_bytes(like[path].shape, like[path].dtype)
            notes = [zero_channels(planned.site, program.weights[path])]
            notes += [_AT_LOAD] if expansion is not None and path in unpackable else []
            after = tree_bytes(weights[path])
            entry = dataclasses.replace(entry, notes=tuple(filter(None, notes)))
            if path not in counted:  # if several sites share a weight, its bytes are reported once
                entry = dataclasses.replace(entry, bytes_before=before, bytes_after=after)
            counted.add(path)
        reports.append(entry)
    for entry in plan.sites:
        if entry.not_quantized:
            size = 0 if entry.site.path in counted else entry.weight_bytes
            counted.add(entry.site.path or "")
            reports.append(
                unchanged(entry.site.name, entry.not_quantized, "kept float", bytes_before=size, bytes_after=size)
            )
    metrics: dict[str, Any] = {
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": tree_bytes(weights),
    }
    if tried:
        metrics["whole_program"] = [
            {"sizes": timed.sizes, "float_us": timed.float_us, "lowered_us": lowered_us[at]}
            for at, timed in enumerate(tried)
        ]
    if by_rows:
        metrics["kernels"] = [
            {"sizes": timed.sizes, "with_us": timed.set_us[0], "without_us": timed.set_us[1]} for timed in by_rows
        ]
        metrics["rows_without_kernels"] = sorted(refused)
    metrics |= timer.since(counts)
    metrics["seconds"] = {
        "store weights": prepared_s,
        "time products": timed_s,
        "time the whole program": whole.seconds,
    }
    report = PassReport("quantize", time.perf_counter() - start, tuple(reports), metrics)
    history = (*program.history, report)
    rounded = (
        {path for step in program.derivation.steps for path in step.gives if step.name in ROUNDINGS}
        if (program.derivation is not None)
        else set[str]()
    )
    steps = [
        # Grids of passes that round are those of the weights before, which are to be found anew.
        storing_step(groups[path][0], {} if path in rounded else given.get(path, {}), weights[path].transposed)
        for path in groups
    ]
    steps += [Step("quantize", gives=(name,), data=(weights[name],)) for name in _own(values, names, integer)]
    return program.replace(
        fn=build(integer),
        weights=weights,
        history=history,
        expansion=expansion,
        derivation=program.derived(*steps),
    )


@functools.partial(jax.jit, static_argnames="like")
def _laid(weight: jax.Array, like: Alike) -> jax.Array:
    return lay_out(weight, like.site.layout)


def _lowered(
    fn: Callable[..., Any],
    like: Any,
    every: Sequence[PlannedSite],
    side_inputs: Mapping[Key, str],
    ways: Mapping[str, Ways],
    target: Target,
    fused: dict[str, str],
) -> Callable[..., Any]:
    """Make the function of stored weights; the sites in `ways` are computed from codes.

    Args:
        fn: the function of the float program.
        like: shapes of its weights.
        every: the sites whose weights are stored small, and the products of two activations.
        side_inputs: site and what of it -> name of a static range or scale among the new function's weights.
        ways: site name -> how its product is computed, by number of rows.
        target: what it is for.
        fused: gets what the kernels of sites compute after their products, by name of the site.
    """
    by_name = {planned.site.name: planned.rule for planned in every}
    sites = [planned.site for planned in every]
    small = {site.path for site in sites if site.path is not None}

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        planned = by_name.get(site.name)
        if planned is None:
            return None
        if site.weight_operand is None:
            # At other sizes than the plan's, a different product may have this name.
            unfit = eligibility.unsupported(site, planned) or eligibility.float_reason(site, planned, target)
            if site.name not in ways or unfit:
                return None
            left, right = (materialize(value) for value in values)
            pad = way_at(ways[site.name], products.row_count(site)) == "padded"
            return [products.quantized_dot_pair(site, left, right, planned.activations, pad_single=pad, target=target)]
        tracked = values[site.weight_operand]
        activation = materialize(values[1 - site.weight_operand])
        if site.kind == "gather":
            return [products.look_up(site, tracked.value, activation)]
        way = way_at(ways.get(site.name, {}), products.row_count(site))
        if site.name in ways and planned.activations == "none":
            if way == "kernel":
                with epilogues.of_site(site.name):
                    return [products.weight_only_dot(site, activation, tracked.value)]
        elif site.name in ways:
            scale = products.static_scale(site, planned, tracked)
            if way == "kernel":
                with epilogues.of_site(site.name):
                    return [products.kernel_dot(site, activation, tracked.value, scale)]
            pad, name = way == "padded", planned.activations
            out = products.quantized_dot(site, activation, tracked.value, name, scale, pad_single=pad, target=target)
            return [out]
        stored = tracked.value
        weight = stored.operand if isinstance(stored, _Unpacked) else products.restore(site, stored)
        return context.bind(eqn, (activation, weight) if site.weight_operand == 1 else (weight, activation))

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        arrays = {key: weights[name] for key, name in side_inputs.items()}
        own = {name: leaf for name, leaf in weights.items() if name in like}
        own |= {name: _Unpacked(own[name]) for name in small if not isinstance(own[name], QTensor)}
        travelling = products.arrange_side_inputs(sites, arrays)
        return rewrite_sites(fn, rule, inline=True, on_unknown="keep", like=like, side_inputs=travelling)(own, *inputs)

    return epilogues.fuse(run, fused)


def _time_sites(
    program: Program,
    candidates: Sequence[PlannedSite],
    sizes: Sequence[Mapping[str, int]],
    say: Callable[[str], None],
    timer: Timer,
) -> dict[str, list[Timing]]:
    """Time float and integer arithmetic at each site and size; empty lists if no sizes are given.

    A weight on several devices has no kernel: XLA would gather it.
    """
    found = [(at, {site.name: site for site in find_sites(program, sizes=at)}) for at in sizes]
    rules = {planned.site.name: planned.rule for planned in candidates}
    # A program may have other sites at some sizes.
    wanted = [(by_name[name], rules[name], at) for name in rules for at, by_name in found if name in by_name]
    for name in rules if wanted else ():
        say(name)
    timings: dict[str, list[Timing]] = {name: [] for name in rules}
    for (site, _, _), timing in zip(wanted, compare(wanted, timer), strict=True):
        gathered = site.path is not None and is_spread(program.weights[site.path])
        # Among the float alternatives.
        fastest = min([timing.float_us, *times_us(site.eqn, timer, kernels=not gathered)])
        kernel_us = None if gathered else timing.kernel_us
        timings[site.name].append(dataclasses.replace(timing, float_us=fastest, kernel_us=kernel_us))
    return timings


def _own(values: Mapping[Key, jax.Array], names: Mapping[Key, str], integer: frozenset[str]) -> dict[str, jax.Array]:
    """The static ranges and scales of the integer sites, by name."""
    return {names[key]: value for key, value in values.items() if key[0] in integer}


def _kernel_rows(
    integer: frozenset[str], timings: Mapping[str, Sequence[Timing]], passing: frozenset[str], sizes: Mapping[str, int]
) -> frozenset[int]:
    """The numbers of rows that a kernel multiplies at a size, without those where it wins too clearly to lose.

    Without its kernels, a program of weights in codes unpacks all of them on each call, and XLA may do so at once: of a
    large model that would take as much memory again as its float weights.
    """
    ways = selection.ways_of(integer, timings, passing)
    by_rows: dict[int, list[Timing]] = {}
    for name in integer:
        for timing in timings[name]:
            if timing.sizes == sizes and ways[name][timing.rows] == "kernel":
                by_rows.setdefault(timing.rows, []).append(timing)
    return frozenset(rows for rows, found in by_rows.items() if not selection.wins_clearly(found))


def _unpackable(stored: Sequence[PlannedSite], integer: frozenset[str]) -> dict[str, Site]:
    """Weights that are multiplied in float, with a site of each; lookup tables are not unpacked."""
    kept = {planned.site.path for planned in stored if planned.site.name in integer or planned.site.kind == "gather"}
    return {
        planned.site.path: planned.site
        for planned in stored
        if planned.site.path is not None and planned.site.path not in kept
    }


def _unpack(sites: Mapping[str, Site], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Unpack the weights of these sites to the float operands of their products."""

    def operand(site: Site, stored: Any) -> jax.Array:
        restore = functools.partial(products.restore, site)
        for _ in range(site.stacked):
            restore = jax.vmap(restore)
        return restore(stored)

    return {name: operand(sites[name], leaf) if name in sites else leaf for name, leaf in weights.items()}


def _report(
    planned: PlannedSite,
    reason: str,
    integer: frozenset[str],
    timings: Sequence[Timing],
    fused: str,
    passes: bool,
) -> SiteReport:
    rule = planned.rule
    metrics: dict[str, Any] = {"timings": [timing.to_json() for timing in timings]} if timings else {}
    name = planned.site.name
    ways = selection.ways_of([name], {name: timings}, frozenset([name] if passes else []))[name]
    ratio = selection.ratio(timings, ways)
    if timings:
        metrics["integer_over_float"] = ratio
        metrics["way"] = {str(rows): way for rows, way in ways.items()}
    if rule.group:
        metrics["group"] = rule.group
    paired = planned.site.path is None
    action, outcome = f"{rule.weights} weights", "changed"
    if paired:
        action, outcome = "kept float", "kept"
    if name in integer:
        action, outcome = f"{rule.weights} x {rule.activations}", "codes"
        if rule.activations == "none":
            action = f"{rule.weights} weights, multiplied as they are stored"
        if any(timing.padded_us is not None for timing in timings):
            metrics["single_rows_padded"] = "padded" in ways.values()
        if "kernel" in ways.values():
            rows = [str(rows) for rows, way in ways.items() if way == "kernel"]
            some = "" if len(rows) == len(ways) else f" at {', '.join(rows)} rows"
            with_others = f" with {fused}" if fused else ""
            reason = f"by a kernel{with_others}{some}: {ratio:.2f} of float's time"
            if passes:
                reason += " alone; it takes and gives codes where its neighbours do"
            metrics["fused"] = fused
    elif timings and rule.activations == "none" and not reason:
        reason = f"multiplying it as it is stored ({ratio:.2f} of float's time alone) makes the whole program no faster"
    elif rule.activations != "none" and not reason:
        kept = "it stays float" if paired else "only the weight is stored small"
        reason = f"integer arithmetic takes {ratio:.2f} of float's time here, so {kept}"
        if ratio < selection.HOPELESS_RATIO:
            reason = f"integer arithmetic ({ratio:.2f} of float's time alone) does not make the whole program faster"
    return SiteReport(name, action, reason, metrics=metrics, outcome=outcome)
