"""What `tune` found, in a few sentences: for the terminal and for the page."""

from __future__ import annotations

import math

from lepton_xla.tables import short, size
from lepton_xla.tuning.constraints import OBJECTIVES
from lepton_xla.tuning.results import Tuning

_ENDS = {
    "done": "There was nothing left to try.",
    "time": "The time was up.",
    "trials": "All trials were spent.",
    "interrupted": "Interrupted; this is what was found so far.",
}


def summary(found: Tuning) -> list[str]:
    """A sentence or two a line.

    >>> from lepton_xla.tuning import Constraints, Trial, Tuning
    >>> trial = Trial("small", "", "chosen", {}, {"accuracy": 0.9}, 0.1, None, 0.01, 100, 200)
    >>> for line in summary(Tuning(Constraints(0.5), "bytes", "accuracy", {"accuracy": 0.9}, 400, trial, trial, ())):
    ...     print(line)
    Asked for: the least bytes on disk; max_drop 0.5.
    The best is small: +0.10 points lost on the rows that chose it; 100 B on disk, 200 B in memory, ...
    The float model has accuracy 0.9 and takes 400 B on disk. time: of a call, float's is 1.
    There was nothing left to try. It took 0.0 s.
    """
    limits = ", ".join(f"{name} {value}" for name, value in found.constraints.given().items())
    lines = [
        f"Asked for: the least {OBJECTIVES[found.objective]}; {limits or 'no limits'}.",
        _best(found),
        *_doubts(found),
    ]
    metric = found.float_metrics.get(found.metric, math.nan)
    lines.append(
        f"The float model has {found.metric} {metric:.6g} and takes {size(found.float_bytes)} on disk. time: of a "
        "call, float's is 1."
    )
    if found.float_operations:
        lines.append(
            "operations: multiply-adds of a call by weights that are not zero; in float "
            f"{short(found.float_operations)}."
        )
    lines.append(f"{_ENDS[found.stopped]} It took {found.seconds:.1f} s.")
    if found.skipped:
        lines.append(f"There was no time for: {'; '.join(found.skipped)}.")
    if found.correlations:
        ranks = ", ".join(f"{kind} {value:.2f}" for kind, value in found.correlations.items())
        lines.append(f"Rank correlation of estimates and measurements: {ranks}.")
    return lines


def _best(found: Tuning) -> str:
    shown = found.nearest
    if shown is None:
        return "Nothing was measured."
    figures = (
        f"{shown.judged:+.2f} points lost on the rows that chose it; {size(shown.bytes)} on disk, "
        f"{size(shown.memory)} in memory, {shown.latency:.2f} of float's time"
    )
    if found.best is None:
        return f"No recipe keeps to all of it. The nearest is {shown.name}: {figures}."
    return f"The best is {shown.name}: {figures}."


def _doubts(found: Tuning) -> list[str]:
    """What a reader of the best's figures must know besides."""
    best, allowed = found.best, found.constraints.max_drop
    if best is None:
        return []
    lines: list[str] = []
    drop = best.reported
    if drop is not None and allowed is not None and drop.points > allowed:
        chance = "which may be chance" if drop.low <= allowed else "which is more than chance"
        lines.append(f"On the rows held back it lost {drop.points:+.2f} points, more than was asked for, {chance}.")
    if drop is not None and drop.enough:
        lines.append(f"The rows are too few to be sure of the best's drop: about {drop.enough:,} would do.")
    if best.training:
        how = ", ".join(f"{name} {value:.3g}" for name, value in best.training.items())
        lines.append(f"The best was trained ({how}), so its recipe alone does not make it: --artifact does.")
    return lines
