"""Selection: which sites are computed from codes, by the times of their products and of the whole program."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.quantization.measurement import Timing, Way
from lepton_xla.passes.quantization.storing import PlannedSite
from lepton_xla.passes.quantization.whole_program import WORTH_RATIO, WholeTiming, loses

_LOG = logging.getLogger(__name__)
# A product that alone takes at least this share of float's time is not tried in the whole program.
HOPELESS_RATIO = 1.2
# Kernels that together take less than this share of the time without them win among their neighbours too.
CLEAR_RATIO = 1 / 3
# Maximum number of non-empty sets of integer sites that are tried in the whole program.
MAX_SETS = 4
# Maximum number of sizes at which the whole program is timed.
MAX_SIZES = 4


def wrong_reason(name: str, timings: Sequence[Timing], target: Target) -> str:
    """Why a product of codes with a wrong result is not used; also logged, because it is a fault of the platform."""
    worst = next(timing for timing in timings if timing.wrong)
    at = "".join(f", {symbol} {size}" for symbol, size in worst.sizes.items())
    whose = "XLA's" if worst.kernel_us is None else "XLA's or a kernel's"
    how = f"is wrong by {worst.error:.0%} of the largest value" if math.isfinite(worst.error) else "is not finite"
    reason = f"{whose} product of codes {how} on this {target.platform}{at}, so it is computed in float"
    _LOG.warning("%s: %s", name, reason)
    return reason


type Ways = Mapping[int, Way]
"""The fastest way to compute a site's product of codes, by number of rows."""


def ways(timings: Sequence[Timing]) -> Ways:
    """The fastest way for each number of rows; empty if nothing was timed."""
    found: dict[int, dict[Way, float]] = {}
    for timing in timings:
        total = found.setdefault(timing.rows, {})
        for way, time in timing.us.items():
            total[way] = total.get(way, 0.0) + time
    return {rows: min(total, key=lambda way: total[way]) for rows, total in found.items()}


def way_at(ways: Ways, rows: Any) -> Way:
    """The way for a number of rows: that for the nearest one that was timed; XLA's, if none was or it is symbolic.

    >>> way_at({1: "kernel", 512: "XLA"}, 8), way_at({}, 8)
    ('kernel', 'XLA')
    """
    if not ways or not isinstance(rows, int):
        return "XLA"
    return ways[min(ways, key=lambda timed: abs(math.log((timed + 1) / (rows + 1))))]


def ways_of(
    names: Collection[str], timings: Mapping[str, Sequence[Timing]], passing: frozenset[str] = frozenset()
) -> dict[str, Ways]:
    """The fastest way of each site; the kernel for those in `passing`, if all of these are among the sites.

    >>> timings = {name: [Timing({}, 9.0, 2.0, None, kernel_us=3.0)] for name in "ab"}
    >>> ways_of("ab", timings), ways_of("ab", timings, frozenset("b"))
    ({'a': {0: 'XLA'}, 'b': {0: 'XLA'}}, {'a': {0: 'XLA'}, 'b': {0: 'kernel'}})
    """
    found = {name: ways(timings[name]) for name in names}
    for name in passing if passing <= found.keys() else ():
        if all(timing.kernel_us is not None for timing in timings[name]):
            found[name] = dict.fromkeys(found[name], "kernel")
    return found


def passing(candidates: Sequence[PlannedSite], timings: Mapping[str, Sequence[Timing]]) -> frozenset[str]:
    """Convolutions by kernels whose static scales let those before them round for them, whatever they take alone."""
    return frozenset(
        planned.site.name
        for planned in candidates
        if planned.site.kind == "conv_general_dilated"
        and planned.rule.activations != "none"
        and not planned.rule.dynamic
        and (found := timings[planned.site.name])
        and all(timing.kernel_us is not None for timing in found)
    )


def ratio(timings: Sequence[Timing], by: Ways | None = None) -> float:
    """Time in codes over time in float, geometric mean over sizes; 0 if nothing was timed.

    Args:
        timings: of one site.
        by: the way for each number of rows; None: the fastest.
    """
    if not timings:
        return 0.0
    taken = ways(timings) if by is None else by
    return statistics.geometric_mean([timing.us[taken[timing.rows]] / timing.float_us for timing in timings])


def without_kernels(
    timings: Mapping[str, Sequence[Timing]], rows: Collection[int] | None = None
) -> dict[str, list[Timing]]:
    """The timings without kernels for some numbers of rows; None: for all."""
    return {
        name: [
            dataclasses.replace(timing, kernel_us=None) if rows is None or timing.rows in rows else timing
            for timing in found
        ]
        for name, found in timings.items()
    }


def wins_clearly(timings: Sequence[Timing]) -> bool:
    """Whether kernels take so much less time than XLA's products of codes that the whole program need not tell.

    >>> several = [Timing({}, 9.0, integer_us, None, kernel_us=2.0) for integer_us in (3.0, 12.0)]
    >>> wins_clearly(several), wins_clearly(several[:1])
    (True, False)
    """
    without = sum(min(dataclasses.replace(timing, kernel_us=None).us.values()) for timing in timings)
    return sum(timing.us["kernel"] for timing in timings) < CLEAR_RATIO * without


def losing_rows(timed: Sequence[WholeTiming], rows: Sequence[Collection[int]]) -> frozenset[int]:
    """The numbers of rows at which the whole program is slower with kernels, by geometric mean over its sizes.

    Args:
        timed: times with kernels, and without.
        rows: the numbers of rows that kernels multiply at each of these sizes.

    >>> timed = [WholeTiming({"batch": at}, 9.0, times) for at, times in ((1, (2.0, 3.0)), (8, (5.0, 4.0)))]
    >>> losing_rows(timed, [{1}, {8}])
    frozenset({8})
    """
    ratios: dict[int, list[float]] = {}
    for each, numbers in zip(timed, rows, strict=True):
        for number in numbers:
            ratios.setdefault(number, []).append(each.set_us[1] / each.set_us[0])
    return frozenset(number for number, found in ratios.items() if statistics.geometric_mean(found) < WORTH_RATIO)


def candidate_sets(timings: Mapping[str, Sequence[Timing]]) -> list[frozenset[str]]:
    """Sets of sites to try in integers: the empty set, then growing sets, the most promising sites first."""
    ratios = {name: ratio(found) for name, found in timings.items()}
    if not any(ratios.values()):
        return [frozenset(ratios)]  # nothing was timed, so follow the plan
    promising = sorted({share for share in ratios.values() if share < HOPELESS_RATIO})
    # Alike sites share a ratio, so they enter a set together.
    limits = [promising[(len(promising) * (k + 1) - 1) // MAX_SETS] for k in range(MAX_SETS)] if promising else []
    sets = [frozenset(name for name, share in ratios.items() if share <= limit) for limit in sorted(set(limits))]
    return [frozenset[str](), *sets]


def fastest(sets: Sequence[frozenset[str]], whole: Sequence[WholeTiming]) -> frozenset[str]:
    """The fastest set, by geometric mean over the sizes, among those that are slower than the empty set at no size.

    A larger set must win by more than noise.
    """
    if not whole:
        return sets[-1]
    best, best_score = 0, statistics.geometric_mean([timed.set_us[0] for timed in whole])
    for index in range(1, len(sets)):
        if any(loses(timed.set_us[index], timed.set_us[0]) for timed in whole):
            continue
        score = statistics.geometric_mean([timed.set_us[index] for timed in whole])
        if score < WORTH_RATIO * best_score:
            best, best_score = index, score
    return sets[best]


def spread(sizes: Sequence[Mapping[str, int]]) -> list[Mapping[str, int]]:
    """At most `MAX_SIZES` of the sizes, including the first and the last."""
    if len(sizes) <= MAX_SIZES:
        return list(sizes)
    return [sizes[round(k * (len(sizes) - 1) / (MAX_SIZES - 1))] for k in range(MAX_SIZES)]
