"""Applies a recipe to a program: all passes in order, each with a report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.callbacks import without_callbacks
from lepton_xla.environment.flags import warn_of_slow_flags
from lepton_xla.errors import (
    CalibrationError,
    CompileError,
    ExecutionError,
    ModelError,
    RecipeError,
    UnsupportedError,
    first_line,
)
from lepton_xla.optimization.caching import store_cache
from lepton_xla.passes.alternatives.autotuning import autotune
from lepton_xla.passes.core import memory
from lepton_xla.passes.core.calibration import as_batches, calibrate, needs_range
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.statistics import Statistics
from lepton_xla.passes.core.timing import Timer, time_programs
from lepton_xla.passes.folding.norms import fold
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.pruning.magnitude import prune
from lepton_xla.passes.pruning.sparsegpt import sparsegpt
from lepton_xla.passes.pruning.wanda import wanda
from lepton_xla.passes.quantization.bias_correction import correct_bias
from lepton_xla.passes.quantization.casting import cast
from lepton_xla.passes.quantization.gptq import Rounded, gptq
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.passes.quantization.rounding import GivenGrids, round_to_nearest
from lepton_xla.passes.rescaling.awq import awq
from lepton_xla.passes.rescaling.equalization import equalize
from lepton_xla.passes.rescaling.smoothquant import smooth
from lepton_xla.passes.shrinking.removal import shrink
from lepton_xla.program import Program, abstract_outputs, as_sizes, probe_sizes
from lepton_xla.quant import QTensor
from lepton_xla.recipe import Recipe
from lepton_xla.recipe.rules import DATA_METHODS
from lepton_xla.report import PassReport, SiteReport
from lepton_xla.rows import check_rows_lead

_LOG = logging.getLogger(__name__)
# Sizes of a symbolic dimension at which arithmetic is timed if the caller gives no buckets: one request, and a batch.
DEFAULT_SIZES = (1, 32)
# A shrunk program is slower if it takes more than this share of the original's time; noise is less.
SLOWER = 1.03


def told_by_xla[**P, T](fn: Callable[P, T]) -> Callable[P, T]:
    """Convert XLA's errors of compiling or running in `fn` to `ExecutionError`; other errors pass through."""

    @functools.wraps(fn)
    def bounded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return fn(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            raise ExecutionError(f"XLA failed in the last step that began: {first_line(error)}") from error

    return bounded


@takes(program=Program, recipe=Recipe, buckets=Mapping, progress=Callable)
def optimize(
    program: Program,
    recipe: Recipe,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    buckets: Mapping[str, Iterable[int]] | None = None,
    timer: Timer | None = None,
    progress: Callable[[str], None] | None = None,
    keep_master: bool = False,
) -> Program:
    """Make a program small and fast.

    In this order: precompute, fold, shrink, prune, equalize, rescale, round, correct, calibrate, quantize, cast,
    autotune.

    Args:
        program: a trained model.
        recipe: how to optimize it.
        calibration: input dicts, such as `[{"image": array}]`; needed if the recipe has `dynamic = false`, `rescale`,
            `rounding = "gptq"`, `correct_bias` or `shrink.importance = "activation"`.
        buckets: symbolic dimension -> sizes the program will be compiled for; arithmetic is timed at all of them.
        timer: times calls, for its target; by default a new one for this process's device, which reuses measurements
            from the disk cache.
        progress: called with a line when a step begins.
        keep_master: whether the result keeps the float weights in memory, and how its own came of them, for
            `compile(..., keep_master=True)`.

    Returns:
        The optimized program; `history` has one report per pass.

    Raises:
        RecipeError: if the recipe does not fit the program.
        UnsupportedError: if a pass cannot handle a site and the recipe says `error`.
        CalibrationError: if calibration data is needed and missing, or unusable.
        CompileError: if `buckets` does not fit the program, it calls back into Python, or an output has no rows.
        ExecutionError: if XLA cannot compile or run a step, for example for lack of memory.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> small = lx.optimize(program, lx.Recipe.load("int8"), buckets={"batch": (1, 8)})
    >>> program.weights_bytes, small.weights_bytes, "quantize" in [report.name for report in small.history]
    (64, 32, True)
    """
    batches, timer = _as_list(calibration), timer or Timer()
    program, plan = plan_for(program, recipe, calibration=batches, buckets=buckets, timer=timer, progress=progress)
    return apply_plan(
        program, plan, calibration=batches, buckets=buckets, timer=timer, progress=progress, keep_master=keep_master
    )


@takes(program=Program, recipe=Recipe, buckets=Mapping, progress=Callable)
@told_by_xla
def plan_for(
    program: Program,
    recipe: Recipe,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    buckets: Mapping[str, Iterable[int]] | None = None,
    timer: Timer | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Program, Plan]:
    """Plan the first half of `optimize`: precompute, fold and shrink, then decide what to do at each site.

    Args:
        program, recipe, calibration, buckets, timer, progress: as in `optimize`.

    Returns:
        The precomputed program, folded and shrunk if the recipe says so, and the plan for it.

    Raises:
        RecipeError, UnsupportedError, CalibrationError, CompileError: as `optimize`.

    >>> from lepton_xla.optimization import plan_for
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> folded, plan = plan_for(program, lx.Recipe.load("int4-weight-only"))
    >>> plan["w"].describe()
    'int4 weights in groups of 4, range by mse'
    """
    say = progress or (lambda _line: None)
    timer = timer or Timer()
    warn_of_slow_flags(_LOG, timer.target.platform)
    # The model may not accept the default sizes.
    asked = grid(program, buckets)[0] if buckets else probe_sizes(program.fn, program.weights, program.inputs)[0]
    program = without_callbacks(program, asked)
    if buckets:
        check_rows_lead(program.inputs, program.outputs)
    if recipe.fold or recipe.shrink is not None or recipe.prune or recipe.quantize:
        say("precompute")
        program = precompute(program, sizes=_ends(grid(program, buckets)) if buckets else ())
    if recipe.fold:
        say("fold")
        program = fold(program)
    if recipe.shrink is not None:
        program = _shrunk(_Run(_as_list(calibration), grid(program, buckets), say, timer), program, recipe)
    return program, resolve(recipe, program)


@takes(program=Program, plan=Plan, buckets=Mapping, progress=Callable)
@told_by_xla
def apply_plan(
    program: Program,
    plan: Plan,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    buckets: Mapping[str, Iterable[int]] | None = None,
    timer: Timer | None = None,
    progress: Callable[[str], None] | None = None,
    keep_master: bool = False,
) -> Program:
    """Run the second half of `optimize`: the passes that the plan asks for.

    Args:
        program: the program of the plan, from `plan_for`.
        plan: the plan.
        calibration, buckets, timer, progress, keep_master: as in `optimize`.

    Raises:
        CalibrationError, UnsupportedError: as `optimize`.

    >>> from lepton_xla.optimization import apply_plan, plan_for
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> apply_plan(*plan_for(program, lx.Recipe.load("int8-weight-only"))).weights["w"].format
    'int8'
    """
    say = progress or (lambda _line: None)
    recipe = plan.recipe
    timer = timer or Timer()
    sizes = grid(program, buckets) if recipe.measure else []
    run = _Run(_as_list(calibration), sizes, say, timer)
    if not plan.sites and (asked := [kind for kind in ("prune", "quantize") if getattr(recipe, kind)]):
        program = _noted(program, "left out, as the program has no product", ", ".join(asked))
    if any(planned.prune or planned.not_pruned for planned in plan.sites):
        program = _pruned(run, program, plan)
    if any(planned.quantize for planned in plan.sites):
        program = _in_rounds(run, program, plan)
    elif any(planned.not_quantized for planned in plan.sites):
        program = quantize(program, plan, sizes=sizes, timer=timer)
    if recipe.cast != "none":
        say(f"cast to {recipe.cast}")
        program = cast(program, recipe.cast, on_unsupported=recipe.on_unsupported)
    program = autotune(program, sizes=sizes if buckets else _traceable(program, sizes), timer=timer, progress=say)
    if recipe.cache != "float":
        say(f"store the cache in {recipe.cache}")
        program = store_cache(program, min((buckets or {}).get("length", (1,))))
    memory.give_back()
    return program.replace(derivation=program.derived() if keep_master else None)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the passes of one run share.

    Attributes:
        batches: calibration data; None if there is none.
        sizes: where arithmetic is timed; empty if it is not.
        say: called when a step begins.
        timer: times calls.
    """

    batches: Sequence[Mapping[str, Any]] | None
    sizes: Sequence[Mapping[str, int]]
    say: Callable[[str], None]
    timer: Timer


@dataclasses.dataclass
class _Known:
    """Results of the first of two rounds, so that the second computes only the differences.

    Attributes:
        activations: statistics of the float program's activations, by site.
        rounded: rounded weights, by path.
        stored: stored weights, by path.
    """

    activations: dict[str, Statistics] = dataclasses.field(default_factory=dict[str, Statistics])
    rounded: dict[str, Rounded] = dataclasses.field(default_factory=dict[str, Rounded])
    stored: dict[str, tuple[jax.Array, QTensor]] = dataclasses.field(
        default_factory=dict[str, tuple[jax.Array, QTensor]]
    )


def _in_rounds(run: _Run, program: Program, plan: Plan) -> Program:
    """Quantize; repeat without multiplying the activations of products that stay in float."""
    known = _Known()
    lowered = _quantized(run, program, plan, known)
    vain = _multiplied_in_vain(lowered)
    if not vain:
        return lowered
    run.say(f"once more, without multiplying the activations of {len(vain)} products that are computed in float")
    first = lowered.history[len(program.history) :]
    report = next(report for report in first if report.name == "quantize")
    # Without those multiplications, the chosen sites gain as much over float as before, so nothing is timed again.
    integer = frozenset(site.site for site in report.sites if site.outcome == "codes")
    chosen = integer, lowered.expansion is not None, frozenset[int](report.metrics.get("rows_without_kernels", ()))
    again = _quantized(run, program, plan, known, in_float=vain, chosen=chosen if run.sizes else None)
    return _with_first_round(again, first, len(program.history))


def _with_first_round(program: Program, before: Sequence[PassReport], start: int) -> Program:
    """The program with seconds of a round before added to the reports from `start` of its history, and its timings."""
    spent = {report.name: report for report in before}

    def both(report: PassReport) -> PassReport:
        first = spent.get(report.name)
        if first is None:
            return report
        metrics = dict(report.metrics)
        for key in ("seconds", "times"):
            one, other = first.metrics.get(key, {}), report.metrics.get(key, {})
            if one or other:
                metrics[key] = {part: one.get(part, 0) + other.get(part, 0) for part in {**one, **other}}
        for key in ("whole_program", "kernels", "rows_without_kernels"):
            if key in first.metrics:
                metrics.setdefault(key, first.metrics[key])
        return dataclasses.replace(report, seconds=report.seconds + first.seconds, metrics=metrics)

    history = (*program.history[:start], *map(both, program.history[start:]))
    return program.replace(history=history)


def _traceable(program: Program, sizes: Sequence[Mapping[str, int]]) -> list[Mapping[str, int]]:
    """Filter default sizes to those that the model accepts."""

    def taken(at: Mapping[str, int]) -> bool:
        try:
            return bool(abstract_outputs(program.fn, program.weights, program.inputs, at))
        except ModelError:
            return False

    return [at for at in sizes if taken(at)]


def _ends(sizes: Sequence[Mapping[str, int]]) -> list[Mapping[str, int]]:
    """The first and the last of the sizes."""
    return [sizes[0], sizes[-1]] if len(sizes) > 1 else list(sizes)


def _shrunk(run: _Run, program: Program, recipe: Recipe) -> Program:
    """Shrink by the recipe's rule; of several multiples, choose the one that measures fastest.

    That is the one that is slower than the original program at the fewest sizes, and of those the one with the smallest
    share of its time.
    """
    assert recipe.shrink is not None
    say, sizes, timer = run.say, run.sizes, run.timer
    rule: dict[str, Any] = msgspec.structs.asdict(recipe.shrink)
    multiples: tuple[int, ...] = recipe.shrink.multiples if recipe.measure else recipe.shrink.multiples[:1]
    found: dict[Any, Program] = {}
    refusal: RecipeError | UnsupportedError | None = None
    for multiple in multiples:
        say("shrink" if len(multiples) == 1 else f"shrink to multiples of {multiple}")
        rule["round_to"] = multiple
        try:
            small = shrink(program, **rule, calibration=run.batches, sizes=sizes[0], timer=timer)
        except (RecipeError, UnsupportedError) as error:  # a larger multiple may make the target unreachable
            refusal = refusal or error.with_traceback(None)
        else:
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(small.weights))
            found.setdefault(shapes, small)
    try:
        if refusal is not None and not found:
            if recipe.on_unsupported == "error":
                raise refusal
            if isinstance(refusal, UnsupportedError):
                return _noted(program, "shrink left out", str(refusal))
            say("shrink as far as can be")
            rule["round_to"] = min(multiples)  # the smallest multiple allows to remove most
            return shrink(program, **rule, calibration=run.batches, sizes=sizes[0], on_unsupported="keep", timer=timer)
    finally:
        refusal = None  # break the cycle: its traceback has this frame, which holds programs
    if len(found) == 1:
        return next(iter(found.values()))
    say("time what was shrunk")
    functions = [(each.fn, each.weights) for each in (program, *found.values())]
    times = np.array([time_programs(functions, program.abstract_inputs(at), timer) for at in sizes])
    shares = times[:, 1:] / times[:, :1]
    ranks = zip((shares > SLOWER).sum(0).tolist(), np.log(shares).mean(0).tolist(), range(len(found)), strict=True)
    return list(found.values())[min(ranks)[-1]]


def _quantized(
    run: _Run,
    program: Program,
    plan: Plan,
    known: _Known,
    *,
    in_float: Mapping[str, str] | None = None,
    chosen: tuple[frozenset[str], bool, frozenset[int]] | None = None,
) -> Program:
    """Prepare weights, calibrate activation ranges, and quantize; `in_float` and `chosen` as in `quantize`."""
    program, grids = _prepare(run, program, plan, known, unmultiplied=tuple(in_float or ()))
    ranges = None
    if any(planned.quantize is not None and needs_range(planned.quantize) for planned in plan.sites):
        if run.batches is None:
            raise _needs_data(plan.recipe, "static activation scales (dynamic = false), which need")
        run.say("calibrate")
        program, ranges = _calibrated(program, plan, run.batches)
    tell = lambda site: run.say(f"quantize {site}")  # noqa: E731
    return quantize(
        program, plan, ranges, scales=grids, sizes=run.sizes, in_float=in_float, chosen=chosen, known=known.stored,
        timer=run.timer, progress=tell,
    )  # fmt: skip


def _multiplied_in_vain(program: Program) -> dict[str, str]:
    """Products whose activations SmoothQuant multiplies although they stay in float, with the reasons for float.

    They are known only after all timings.
    """
    reports = {report.name: report for report in program.history}
    if "smoothquant" not in reports:
        return {}
    multiplied = {site.site for site in reports["smoothquant"].sites if site.outcome == "multiplied"}
    return {
        site.site: site.reason
        for site in reports["quantize"].sites
        if site.site in multiplied and site.outcome != "codes"
    }


def _pruned(run: _Run, program: Program, plan: Plan) -> Program:
    """Prune each rule's weights by its method; by magnitude if the method needs data and the recipe may skip it."""
    recipe = plan.recipe
    methods = {rule.method for rule in recipe.prune}
    wanted = sorted(methods & set(DATA_METHODS))
    if wanted and run.batches is None:
        if recipe.without_calibration == "error":
            raise _needs_data(recipe, f"prune.method = {wanted[0]!r}, which needs")
        plain = [msgspec.structs.replace(r, method="magnitude") if r.method in wanted else r for r in recipe.prune]
        plan = resolve(msgspec.structs.replace(recipe, prune=tuple(plain)), program)
        program = _noted(program, "by magnitude, for want of calibration data", ", ".join(wanted))
        methods, wanted = {"magnitude"}, []
    if methods - set(wanted) or any(planned.not_pruned for planned in plan.sites):
        run.say("prune")
        program = prune(program, plan)
    for method in wanted:
        run.say(f"prune by {method}")
        program = (wanda if method == "wanda" else sparsegpt)(program, plan, run.batches or ())
    return program


def _prepare(
    run: _Run, program: Program, plan: Plan, known: _Known, unmultiplied: Collection[str]
) -> tuple[Program, GivenGrids]:
    """Run the passes that change float weights to reduce rounding errors, in order.

    Returns:
        The program, which keeps the sites of the plan, and the grids of its weights.
    """
    recipe, say = plan.recipe, run.say
    if recipe.equalize:
        say("equalize")
        program = equalize(program, plan)
    asked = {
        f"rescale = {recipe.rescale!r}": recipe.rescale != "none",
        "rounding = 'gptq'": recipe.rounding == "gptq",
        "correct_bias": recipe.correct_bias,
    }
    wanted = [key for key, flag in asked.items() if flag]
    if wanted and run.batches is None:
        if recipe.without_calibration == "error":
            raise _needs_data(recipe, f"{wanted[0]}, which needs")
        return _noted(program, "left out, for want of calibration data", ", ".join(wanted)), {}
    data = run.batches or ()
    if recipe.rescale != "none":
        say(f"rescale {recipe.rescale}")
        alpha = recipe.rescale.partition(":")[2]
        if alpha:
            program = smooth(
                program, plan, data, alpha=float(alpha), unmultiplied=unmultiplied, known=known.activations
            )
        else:
            program = awq(program, plan, data)
    if not (recipe.rounding == "gptq" or recipe.correct_bias):
        return program, {}
    say(f"round to {'least change of outputs (gptq)' if recipe.rounding == 'gptq' else 'nearest'}")
    rounded, grids = (
        gptq(program, plan, data, known=known.rounded) if recipe.rounding == "gptq" else round_to_nearest(program, plan)
    )
    if recipe.correct_bias:
        say("correct biases")
        rounded = correct_bias(program, rounded, plan, data)
    return rounded, grids


def _noted(program: Program, why: str, what: str) -> Program:
    """Note in the history that something the recipe asks for was not done, or otherwise."""
    return program.replace(history=(*program.history, PassReport("skipped", metrics={why: what})))


def _as_list(calibration: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    return None if calibration is None else list(as_batches(calibration))


def _needs_data(recipe: Recipe, what: str) -> CalibrationError:
    return CalibrationError(f"recipe {recipe.name!r} has {what} calibration data")


def _calibrated(program: Program, plan: Plan, batches: Iterable[Mapping[str, Any]]) -> tuple[Program, dict[str, Any]]:
    start = time.perf_counter()
    ranges = calibrate(program, plan, batches)
    sites = tuple(
        SiteReport(name, "range measured", metrics={"absmax": value.tolist()}) for name, value in ranges.items()
    )
    report = PassReport("calibrate", time.perf_counter() - start, sites)
    return program.replace(history=(*program.history, report)), ranges


def grid(program: Program, buckets: Mapping[str, Iterable[int]] | None) -> list[dict[str, int]]:
    """All combinations of sizes of a program's symbolic dimensions; `DEFAULT_SIZES` if none are given.

    Raises:
        CompileError: if `buckets` names a dimension that the program lacks, or gives invalid sizes.
    """
    bucket_sizes: dict[str, tuple[int, ...]] = dict.fromkeys(program.symbols, DEFAULT_SIZES)
    for name, sizes in (buckets or {}).items():
        if name not in bucket_sizes:
            raise CompileError(f"buckets name {name!r}; the model's symbolic dimensions are {list(bucket_sizes)}")
        bucket_sizes[name] = as_sizes(name, sizes)
    return [dict(zip(bucket_sizes, sizes, strict=True)) for sizes in itertools.product(*bucket_sizes.values())]
