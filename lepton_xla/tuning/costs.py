"""What each choice costs: bytes exactly, and time as its product alone measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.compiler.weights import stored_bytes
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.passes.core.spreading import is_spread
from lepton_xla.passes.core.timing import AT_ONCE, Timer
from lepton_xla.passes.pruning.magnitude import prune
from lepton_xla.passes.quantization import eligibility
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.passes.quantization.measurement import Timing, compare
from lepton_xla.program import Program
from lepton_xla.trees import name_leaves, tree_bytes
from lepton_xla.tuning.choices import Group
from lepton_xla.tuning.pacing import STORES, TIMES, Pace

type PerGroup = list[np.ndarray]
"""For each group float64 [choices]."""


def stored_weights(
    program: Program,
    groups: Sequence[Group],
    plans: Mapping[str, Plan],
    progress: Callable[[str, int, int], None] | None = None,
    pace: Pace | None = None,
) -> dict[str, dict[str, Any]]:
    """Store every weight in every format.

    Args:
        program, groups, plans: as from `find_groups`.
        progress: called as each format begins.
        pace: stops where there is no time for more formats; float and one other are always stored.

    Returns:
        Name of a choice -> weight path -> what it becomes.

    >>> from lepton_xla.tuning.choices import CHOICES, find_groups
    >>> x = lx.TensorSpec(("batch", 64), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(64)}, {"x": x})
    >>> groups, plans = find_groups(program, CHOICES[:3])
    >>> stored_weights(program, groups, plans)["int8"]["w"].format
    'int8'
    """
    paths = [path for group in groups for path in group.paths]
    wanted = {choice.name for group in groups for choice in group.choices}
    names = [name for name in plans if name in wanted]  # the most promising first: the last may find no time
    found: dict[str, dict[str, Any]] = {}
    pace = pace or Pace.endless()
    until = pace.share_of_rest(STORES)
    for number, name in enumerate(names):
        if number > 1 and not pace.fits("format", until):
            pace.skip(f"choices, which no weight gets: {', '.join(map(repr, names[number:]))}")
            break
        if progress is not None:
            progress(f"store weights as {name}", number, len(names))
        plan, small = plans[name], program
        with pace.step("format"):
            if plan.pruned:
                small = prune(small, plan)
            if plan.quantized:
                small = quantize(small, plan)
        found[name] = {path: small.weights[path] for path in paths}
    return found


def bytes_of_choices(groups: Sequence[Group], stored: Mapping[str, Mapping[str, Any]]) -> tuple[PerGroup, PerGroup]:
    """Count the bytes of every choice on disk and in memory; on disk as where all weights get this choice.

    >>> from lepton_xla.tuning.choices import CHOICES, find_groups
    >>> x = lx.TensorSpec(("batch", 64), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(64)}, {"x": x})
    >>> groups, plans = find_groups(program, CHOICES[:3])
    >>> _, (memory,) = bytes_of_choices(groups, stored_weights(program, groups, plans))
    >>> memory[:2].tolist()  # float; int8 with a scale for each column
    [16384.0, 4352.0]
    """
    own = [[{path: stored[choice.name][path] for path in group.paths} for choice in group.choices] for group in groups]
    whole = {name: tree_bytes(weights) for name, weights in stored.items()}
    on_disk = [
        np.array(
            [
                stored_bytes(name_leaves(each), whole[choice.name])
                for choice, each in zip(group.choices, weights, strict=True)
            ],
            np.float64,
        )
        for group, weights in zip(groups, own, strict=True)
    ]
    return on_disk, [np.array([tree_bytes(each) for each in weights], np.float64) for weights in own]


def times_of_choices(
    program: Program,
    groups: Sequence[Group],
    plans: Mapping[str, Plan],
    sizes: Sequence[Mapping[str, int]],
    timer: Timer,
    *,
    unpacks: bool,
    progress: Callable[[str, int, int], None],
    pace: Pace | None = None,
) -> list[PerGroup]:
    """Time the product of every site with every choice that changes its arithmetic.

    Args:
        program, groups, plans: as from `find_groups`.
        sizes: where to time.
        timer: times, and keeps what it measured on disk.
        unpacks: whether weights that are multiplied in float are unpacked once, on loading, instead of on each call.
        progress: called as each size begins.
        pace: stops where there is no time for more; what was not timed is expected to take as long as in float.

    Returns:
        For each size and group, microseconds that each choice adds to float's, mostly below zero. What does not pay is
        computed in float, so no choice that may be unpacked costs time.
    """
    found: list[PerGroup] = []
    pace, left_out = pace or Pace.endless(), 0
    until = pace.share_of_rest(TIMES)
    for number, at in enumerate(sizes):
        progress("time products", number, len(sizes))
        sites = {site.name: site for site in find_sites(program, sizes=at)}
        # XLA would gather a weight on several devices for a kernel, so it has none.
        spread = {name for name, site in sites.items() if site.path and is_spread(program.weights[site.path])}
        extra = [np.zeros(len(group.choices)) for group in groups]
        wanted: list[tuple[int, int, Any]] = []
        for index, group in enumerate(groups):
            for choice_index, choice in enumerate(group.choices):
                for name in group.sites:
                    entry, site = plans[choice.name][name], sites.get(name)
                    if entry is None or entry.quantize is None or site is None or site.kind == "gather":
                        continue
                    rule = entry.quantize
                    if eligibility.float_reason(site, rule, timer.target):
                        continue
                    kernel = eligibility.has_kernel(site, rule, timer.target) and name not in spread
                    if rule.activations != "none" or kernel or not unpacks:
                        wanted.append((index, choice_index, (site, rule, at)))
        timings: list[Timing] = []
        for start in range(0, len(wanted), AT_ONCE):
            if not pace.fits("products", until):
                break
            with pace.step("products"):
                timings += compare([each for _, _, each in wanted[start : start + AT_ONCE]], timer)
        left_out += len(wanted) - len(timings)
        for (index, choice_index, (site, rule, _)), timing in zip(wanted, timings, strict=False):
            if site.name in spread:
                timing = dataclasses.replace(timing, kernel_us=None)
            added = _added_us(timing, is_float=rule.activations == "none", unpacks=unpacks)
            extra[index][choice_index] += added * site.repeats
        found.append(extra)
    if left_out:
        pace.skip(f"times of {left_out} products, which are taken to be those of float")
    return found


def _added_us(timing: Timing, *, is_float: bool, unpacks: bool) -> float:
    """Microseconds that a choice adds to a product in float."""
    ways = [] if timing.wrong else [us for way, us in timing.us.items() if not is_float or way == "kernel"]
    ways.append(timing.integer_us if is_float and not unpacks else timing.float_us)
    return min(ways) - timing.float_us


def refit(prior: Sequence[np.ndarray], picks: Sequence[Sequence[int]], measured: Sequence[float]) -> PerGroup:
    """Correct what choices cost by what whole programs were measured to cost: ridge regression towards the prior.

    Args:
        prior: costs of each choice for each group.
        picks: for each measured program, the choice of each group.
        measured: what each cost in all.

    >>> before = [np.array([4.0, 1.0]), np.array([8.0, 2.0])]
    >>> after = refit(before, [(1, 1)], [5.0])  # 2 more than expected, shared by both
    >>> [round(float(each[1]), 1) for each in after]
    [2.0, 3.0]
    """
    if not picks:
        return [np.array(each, np.float64) for each in prior]
    ends = np.cumsum([len(each) for each in prior])
    starts = ends - [len(each) for each in prior]
    flat = np.concatenate([np.asarray(each, np.float64) for each in prior])
    design = np.zeros((len(picks), len(flat)))
    for row, picked in enumerate(picks):
        design[row, starts + np.asarray(picked)] = 1
    apart = np.asarray(measured) - design @ flat
    kernel = design @ design.T + 1e-3 * np.eye(len(picks))
    flat = flat + design.T @ np.linalg.solve(kernel, apart)
    return np.split(flat, ends[:-1])
