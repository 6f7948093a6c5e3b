"""Replaces operations that XLA is slow at by alternatives that measure faster.

Alternatives are `shifted` for grouped convolutions, `convolving` for convolutions by a kernel, `attending`, `norming`
and `exciting` for attention, norms and squeeze-excite by a kernel, and `single_row` for products of a single row. Each
is timed against XLA's own operation at the sizes to be compiled. Then the whole program is timed with all winners,
because an operation costs more or less among its neighbours than alone; if it is slower, with each kind of operation in
turn, so that what one of them loses does not cost the others' gain. At last it is timed with all convolutions by
kernels, joined where `expanding` can: these leave out what XLA would do in between, so they may win together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.passes.alternatives import attending, exciting, expanding, fusing, norming
from lepton_xla.passes.alternatives.choices import CONVOLUTION, KERNEL, XLA, Choices, Timing, kind_of, ways
from lepton_xla.passes.core.layouts import Step
from lepton_xla.passes.core.sites import Site, trace_sites
from lepton_xla.passes.core.spreading import is_spread
from lepton_xla.passes.core.timing import OPERATION_BUDGET_S, Timer, time_programs
from lepton_xla.program import Expansion, Program
from lepton_xla.report import PassReport, SiteReport
from lepton_xla.trees import abstract

# An alternative must win by more than the noise of measurement.
WORTH_RATIO = 0.97
# Maximum number of sizes at which the whole program is timed.
MAX_SIZES = 2
_TOGETHER = "alone XLA's own is as fast, but not in the whole program with all convolutions by kernels"
type _Pattern = attending.Pattern | norming.Pattern | exciting.Pattern


@takes(program=Program, progress=Callable)
def autotune(
    program: Program,
    *,
    sizes: Sequence[Mapping[str, int]],
    timer: Timer | None = None,
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Compute convolutions, attention, norms, squeeze-excite and some products of one row in the fastest measured way.

    Args:
        program: any program.
        sizes: sizes of the symbolic dimensions, such as `[{"batch": 1}, {"batch": 32}]`, at which to time.
        timer: times calls, for its target; by default a new one for this process's device.
        progress: called with a line before each measurement.

    Returns:
        The program with the operations replaced for which an alternative is faster at all sizes, by more than noise;
        its history has the times. The same program if it has no such operation.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> lx.passes.autotune(program, sizes=[{"batch": 1}]) is program  # it has no such operation
    True
    """
    start, say = time.perf_counter(), progress or (lambda _line: None)
    timer = timer or Timer()
    counts = timer.counts()
    choices = choose(program, sizes, say, timer)
    if not choices.way:
        return program
    metrics: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    whole: list[dict[str, Any]] = []
    if choices.any:
        choices, reasons, whole = _keep(program, choices, sizes, say, timer)
    alone = choices
    choices, more = _with_all(program, choices, sizes, say, timer)
    metrics |= {"whole_program": [*whole, *more]} if whole or more else {}
    metrics |= {"joined": choices.joined} if more else {}

    def reason(kind: Any) -> str:
        return _TOGETHER if choices.way[kind] != alone.way[kind] else reasons.get(kind[0], "")

    reports = tuple(
        _report(site, choices.way[kind], reason(kind), [timing for timing in timings if timing.site == site])
        for kind, timings in choices.timings.items()
        for site in dict.fromkeys(timing.site for timing in timings)
    )
    metrics |= timer.since(counts)
    history = (*program.history, PassReport("autotune", time.perf_counter() - start, reports, metrics))
    if not choices.any:
        return program.replace(history=history)
    expansion = program.expansion and Expansion(program.expansion.expand, choices.apply(program.expansion.fn))
    return program.replace(fn=choices.apply(program.fn), expansion=expansion, history=history)


def choose(program: Program, sizes: Sequence[Mapping[str, int]], say: Callable[[str], None], timer: Timer) -> Choices:
    """Time all alternatives of each operation at all sizes, and choose.

    Args:
        program: the program; with unpacked weights, if it unpacks them on loading.
        sizes: as in `autotune`.
        say: called with a line before each measurement.
        timer: times calls.
    """
    fn, weights = _as_loaded(program)
    timings: dict[Any, list[Timing]] = {}
    spread = any(is_spread(leaf) for leaf in jax.tree.leaves(program.weights))  # XLA does not cut what a kernel does
    # A single row occurs at the smallest size. A program without candidates there needs no further traces.
    for at in sorted(sizes, key=lambda at: math.prod(at.values())):
        for site in trace_sites(fn, weights, program.inputs, at):
            transposed = _is_transposed(site)
            if _timed_ways(site.eqn, timer, transposed=transposed):
                say(f"ways to compute {site.name}")
                times = _timed(_Operation(site.eqn, transposed=transposed), timer)
                if spread:
                    times = {way: time for way, time in times.items() if way != KERNEL}
                timings.setdefault(kind_of(site.eqn, transposed=transposed), []).append(
                    Timing(site.name, dict(at), times)
                )
        if timer.target.has_kernels and not spread:
            for name, pattern in _patterns(fn, weights, program.abstract_inputs(at)).items():
                say(f"ways to compute {name}")
                times = timer.once(_Facts.of(pattern), functools.partial(_time_pattern, pattern, timer))
                note = pattern.note if isinstance(pattern, attending.Pattern) else ""
                timings.setdefault(pattern.kind, []).append(Timing(name, dict(at), times, note))
        if not timings:
            break
    return Choices({kind: _fastest(found) for kind, found in timings.items()}, timings)


def times_us(eqn: Any, timer: Timer, *, kernels: bool = True) -> list[float]:
    """Microseconds of an operation with every alternative, including XLA's own; empty if there is none.

    Args:
        eqn: the operation.
        timer: times calls.
        kernels: whether a kernel is among the alternatives, if there is one.
    """
    if not _timed_ways(eqn, timer):
        return []
    return [us for way, us in _timed(_Operation(eqn), timer).items() if kernels or way != KERNEL]


def _timed_ways(eqn: Any, timer: Timer, *, transposed: bool = False) -> dict[str, Callable[..., jax.Array]]:
    """The alternatives that there are here."""
    found = ways(eqn, transposed=transposed)
    if not timer.target.has_kernels:
        found.pop(KERNEL, None)
    return found


class _Operation:
    """The properties of an equation that determine its time."""

    def __init__(self, eqn: Any, *, transposed: bool = False) -> None:
        self.eqn, self.transposed = eqn, transposed
        operands = tuple((var.aval.shape, var.aval.dtype.name) for var in (*eqn.invars, *eqn.outvars))
        self.facts = (
            eqn.primitive.name,
            transposed,
            operands,
            str(sorted(eqn.params.items(), key=lambda item: item[0])),
        )

    def __hash__(self) -> int:
        return hash(self.facts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Operation) and self.facts == other.facts


def _timed(operation: _Operation, timer: Timer) -> dict[str, float]:
    """Microseconds by alternative, without those that XLA cannot run here."""
    return timer.once(operation, functools.partial(_time_ways, operation, timer))


def _time_ways(operation: _Operation, timer: Timer) -> dict[str, float]:
    eqn, transposed = operation.eqn, operation.transposed
    inputs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]
    if transposed:
        inputs[1] = jax.ShapeDtypeStruct(inputs[1].shape[::-1], inputs[1].dtype)
    others = _timed_ways(eqn, timer, transposed=transposed)

    def plain(left: jax.Array, right: jax.Array) -> jax.Array:
        return _compat.bind(eqn, [left, right.T if transposed else right])[0]

    # What follows a convolution costs a kernel nothing, and others mostly a pass over the result.
    after: Callable[..., Any] = fusing.biased if KERNEL in others else lambda out: out
    inputs += [jax.ShapeDtypeStruct(eqn.outvars[0].aval.shape[-1:], jnp.float32)] if KERNEL in others else []

    def timed(chosen: Iterable[str]) -> dict[str, float]:
        candidates: dict[str, Callable[..., Any]] = {XLA: plain} | {name: others[name] for name in chosen}
        made = {name: functools.partial(_followed, fn, after, len(eqn.invars)) for name, fn in candidates.items()}
        functions = [(fusing.fuse(fn) if name == KERNEL else fn, ()) for name, fn in made.items()]
        return dict(zip(candidates, time_programs(functions, inputs, timer, OPERATION_BUDGET_S), strict=True))

    try:
        return timed(others)
    except jax.errors.JaxRuntimeError:
        return timed([name for name in others if _runs(others[name], inputs[: len(eqn.invars)])])


def _followed(fn: Callable[..., Any], after: Callable[..., Any], count: int, _weights: Any, *operands: Any) -> Any:
    return after(fn(*operands[:count]), *operands[count:])


def _runs(fn: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> bool:
    """Whether XLA can compile and run a function here; its 16-bit float products do not support every layout."""
    try:
        jax.block_until_ready(jax.jit(fn)(*(jnp.zeros(leaf.shape, leaf.dtype) for leaf in inputs)))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Facts:
    """The properties of a pattern that determine its time."""

    kind: Any
    shapes: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, pattern: _Pattern) -> _Facts:
        return cls(pattern.kind, tuple(each.shape for each in pattern.shapes))


def _patterns(fn: Callable[..., Any], weights: Any, inputs: Sequence[Any]) -> dict[str, _Pattern]:
    """The attention, the norms and the squeeze-excite of a program, by name."""
    found: dict[str, _Pattern] = {}
    for module in (attending, norming, exciting):
        closed = jax.make_jaxpr(module.flat(fn))(weights, *inputs)
        for number, pattern in enumerate(module.find(closed)):
            scope = _compat.scope(pattern.first)
            found[f"{scope and scope + '/'}{pattern.kind[0]}#{number}"] = pattern
    return found


def _time_pattern(pattern: _Pattern, timer: Timer) -> dict[str, float]:
    functions = [(functools.partial(_weightless, way), ()) for way in pattern.ways]
    return dict(zip((XLA, KERNEL), time_programs(functions, pattern.shapes, timer, OPERATION_BUDGET_S), strict=True))


def _weightless(way: Callable[..., jax.Array], _weights: Any, *operands: Any) -> jax.Array:
    return way(*operands)


def _is_transposed(site: Site) -> bool:
    """Whether the right operand of a product is a weight, transposed."""
    if site.weight_operand != 1 or len(site.layout) != 1 or isinstance(site.layout[0], Step):
        return False
    eqn = site.layout[0].eqn
    return eqn.primitive.name == "transpose" and eqn.params["permutation"] == (1, 0)


def _fastest(timings: Sequence[Timing]) -> str:
    """The alternative with the least total time among those that are faster than XLA's own at every size."""
    best, least = XLA, 1.0
    for way in dict.fromkeys(way for timing in timings for way in timing.way_us):
        shares = [timing.share(way) for timing in timings]
        if max(shares) < WORTH_RATIO and statistics.geometric_mean(shares) < least:
            best, least = way, statistics.geometric_mean(shares)
    return best


def _keep(
    program: Program, choices: Choices, sizes: Sequence[Mapping[str, int]], say: Callable[[str], None], timer: Timer
) -> tuple[Choices, dict[str, str], list[dict[str, Any]]]:
    """The choices that the whole program is not slower with, reasons by primitive against the others, and the times.

    Those are all of them, or else those of each primitive that cost nothing beside the ones kept before it.
    """
    whole: list[dict[str, Any]] = []

    def refused(before: Choices, after: Choices, facts: Mapping[str, Any]) -> str:
        try:
            times = _time_whole(program, before, after, sizes, say, timer)
        except jax.errors.JaxRuntimeError:  # among its neighbours an operation may get a layout that XLA cannot run
            return "alone another way is faster, but XLA cannot run the whole program with it"
        whole.extend({**timed, **facts} for timed in times)
        if any(WORTH_RATIO * timed["autotuned_us"] > timed["before_us"] for timed in times):
            return "alone another way is faster, but not in the whole program"
        return ""

    reason = refused(choices.only(()), choices, {})
    if not reason:
        return choices, {}, whole
    kept: list[str] = []
    reasons = dict.fromkeys((kind[0] for kind in choices.way), reason)
    for primitive in choices.primitives if len(choices.primitives) > 1 else ():
        now = [*kept, primitive]
        reasons[primitive] = refused(choices.only(kept), choices.only(now), {"operations": now})
        kept = kept if reasons[primitive] else now
    return choices.only(kept), reasons, whole


def _as_loaded(program: Program) -> tuple[Callable[..., Any], Any]:
    """A program's function and abstract weights, as an artifact runs it."""
    if program.expansion is None:
        return program.fn, abstract(program.weights)
    return program.expansion.fn, jax.eval_shape(program.expansion.expand, program.weights)


def _with_all(
    program: Program, choices: Choices, sizes: Sequence[Mapping[str, int]], say: Callable[[str], None], timer: Timer
) -> tuple[Choices, list[dict[str, Any]]]:
    """All convolutions by kernels, if the whole program is faster with them at every size, and the times."""
    whole: list[dict[str, Any]] = []
    best, least = choices, 1.0
    if CONVOLUTION not in choices.together(joined=False).primitives:
        return choices, whole
    fn, weights = _as_loaded(program)
    for joined in (True, False):
        all_of_them = choices.together(joined=joined)
        if all_of_them.way == choices.way and not joined:
            break
        if joined:
            made = jax.make_jaxpr(all_of_them.apply(fn))(weights, *program.abstract_inputs(sizes[0]))
            if not expanding.joins(made):
                continue
        try:
            times = _time_whole(program, choices, all_of_them, sizes, say, timer)
        except jax.errors.JaxRuntimeError:  # beside kernels an operation may get a layout that XLA cannot run
            continue
        whole.extend({**timed, "operations": ["convolutions together"], "joined": joined} for timed in times)
        shares = [timed["autotuned_us"] / timed["before_us"] for timed in times]
        if max(shares) < WORTH_RATIO and math.prod(shares) < least:
            best, least = all_of_them, math.prod(shares)
    return best, whole


def _time_whole(
    program: Program,
    earlier: Choices,
    choices: Choices,
    sizes: Sequence[Mapping[str, int]],
    say: Callable[[str], None],
    timer: Timer,
) -> list[dict[str, Any]]:
    """Time the whole program, as loaded, with earlier choices and with these."""
    fn, weights = program.fn, program.weights
    if program.expansion is not None:
        fn, weights = program.expansion.fn, jax.jit(program.expansion.expand)(program.weights)
    timed: list[dict[str, Any]] = []
    for at in (sizes[0], sizes[-1])[: min(len(sizes), MAX_SIZES)]:
        say(f"the whole program{_named(at, ' at ')}")
        both = [(earlier.apply(fn), weights), (choices.apply(fn), weights)]
        before, after = time_programs(both, program.abstract_inputs(at), timer)
        timed.append({"sizes": dict(at), "before_us": before, "autotuned_us": after})
    return timed


def _report(site: str, way: str, reason: str, timings: Sequence[Timing]) -> SiteReport:
    metrics = {"timings": [{"sizes": timing.sizes, "float_us": timing.way_us} for timing in timings]}
    return SiteReport(site, way, reason or _why(way, timings), metrics=metrics)


def _why(way: str, timings: Sequence[Timing]) -> str:
    """The gain of the chosen alternative; or, for the best rejected one, its largest loss."""
    others = [name for name in timings[0].way_us if name != XLA and all(name in timing.way_us for timing in timings)]
    if not others:
        return "XLA cannot run another way here"
    shown = way if way != XLA else min(others, key=lambda name: _mean_share(timings, name))
    if way != XLA:
        gain = f"{_mean_share(timings, shown):.2f} of the time of XLA's own"
        note = timings[0].note if way == KERNEL else ""
        return f"{gain}; {note}" if note else gain
    worst = max(timings, key=lambda timing: timing.share(shown))
    return f"{shown} would take {worst.share(shown):.2f} of the time{_named(worst.sizes, ' at ')}"


def _mean_share(timings: Sequence[Timing], way: str) -> float:
    return statistics.geometric_mean([timing.share(way) for timing in timings])


def _named(sizes: Mapping[str, int], before: str = "") -> str:
    """Format sizes for a message, such as `batch 8`; empty if there are none."""
    named = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return named and before + named
