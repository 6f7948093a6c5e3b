"""A recipe applied to a program: every pass in its order, each leaving a report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lepton_xla.errors import CalibrationError, CompileError
from lepton_xla.passes.calibrate import calibrate, needs_range
from lepton_xla.passes.fold import fold
from lepton_xla.passes.lower import lower
from lepton_xla.passes.prune import prune
from lepton_xla.program import Program
from lepton_xla.recipe import Plan, Recipe
from lepton_xla.report import PassReport, SiteReport

# Sizes of a symbolic dimension at which arithmetic is timed where the caller gives no buckets: one request, a batch.
DEFAULT_LADDER = (1, 32)


def optimize(
    program: Program,
    recipe: Recipe,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    buckets: Mapping[str, Iterable[int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Makes a program small and fast: fold, prune, calibrate, lower.

    Args:
        program: a trained model.
        recipe: what to do.
        calibration: input dicts, such as `[{"image": array}]`; needed where the recipe has `dynamic = false`.
        buckets: symbolic dimension -> sizes the program will be compiled for; arithmetic is timed at all of them.
        progress: called with a line as each step begins.

    Returns:
        The optimized program; `history` has one report a pass.

    Raises:
        RecipeError: if the recipe does not fit the program.
        UnsupportedError: if a pass cannot handle a site and the recipe says `error`.
        CalibrationError: if calibration data is needed and missing, or unusable.
    """
    say = progress or (lambda _line: None)
    if recipe.fold:
        say("fold")
    program, plan = plan_for(program, recipe)
    return apply_plan(program, plan, calibration=calibration, buckets=buckets, progress=progress)


def plan_for(program: Program, recipe: Recipe) -> tuple[Program, Plan]:
    """The first half of `optimize`: what is done to each site, decided on the folded program.

    Returns:
        The program, folded where the recipe says so, and the plan for it.

    Raises:
        RecipeError, UnsupportedError: as `optimize`.
    """
    if recipe.fold:
        program = fold(program)
    return program, recipe.resolve(program)


def apply_plan(
    program: Program,
    plan: Plan,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    buckets: Mapping[str, Iterable[int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Program:
    """The second half of `optimize`: prune, calibrate, lower, as far as the plan asks for it.

    Args:
        program: the program that the plan was made for, as `plan_for` gives it.
        plan: what each site gets.
        calibration, buckets, progress: as in `optimize`.

    Raises:
        CalibrationError: as `optimize`.
    """
    say = progress or (lambda _line: None)
    recipe = plan.recipe
    sizes = grid(program, buckets) if recipe.measure else []
    if any(planned.prune or planned.not_pruned for planned in plan.sites):
        say("prune")
        program = prune(program, plan)
    ranges = None
    if any(planned.quantize is not None and needs_range(planned.quantize) for planned in plan.sites):
        if calibration is None:
            raise CalibrationError(
                f"recipe {recipe.name!r} has static activation scales (dynamic = false), which need calibration data"
            )
        say("calibrate")
        program, ranges = _calibrated(program, plan, calibration)
    if any(planned.quantize or planned.not_quantized for planned in plan.sites):
        program = lower(program, plan, ranges, sizes=sizes, progress=lambda site: say(f"lower {site}"))
    return program


def _calibrated(program: Program, plan: Plan, batches: Iterable[Mapping[str, Any]]) -> tuple[Program, dict[str, Any]]:
    start = time.perf_counter()
    ranges = calibrate(program, plan, batches)
    sites = tuple(
        SiteReport(name, "range measured", metrics={"absmax": value.tolist()}) for name, value in ranges.items()
    )
    report = PassReport("calibrate", time.perf_counter() - start, sites)
    return program.replace(history=(*program.history, report)), ranges


def grid(program: Program, buckets: Mapping[str, Iterable[int]] | None) -> list[dict[str, int]]:
    """Every combination of sizes of a program's symbolic dimensions, `DEFAULT_LADDER` where none are given.

    Raises:
        CompileError: if `buckets` names no dimension of the program, or gives it no sizes of at least 1.
    """
    ladders: dict[str, tuple[int, ...]] = dict.fromkeys(program.symbols, DEFAULT_LADDER)
    for name, sizes in (buckets or {}).items():
        if name not in ladders:
            raise CompileError(f"buckets name {name!r}; the model's symbolic dimensions are {list(ladders)}")
        ladders[name] = tuple(sizes)
        if not ladders[name] or min(ladders[name]) < 1:
            raise CompileError(f"buckets[{name!r}] is {ladders[name]}; expected sizes of at least 1")
    return [dict(zip(ladders, sizes, strict=True)) for sizes in itertools.product(*ladders.values())]
