"""Reports what became of each weight of the original program, with its bytes before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.arguments import takes
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import COMPUTED
from lepton_xla.passes.core.sites import find_sites, made_of
from lepton_xla.program import Program
from lepton_xla.quant import QTensor
from lepton_xla.report import PassReport, SiteReport
from lepton_xla.trees import abstract, tree_bytes

# Name of the report, and the key in a pass's metrics that says what became of the weights that it removed.
WEIGHTS = "weights"
NOT_MULTIPLIED = "not multiplied"
ADDED = "added by a pass"
ON_EACH_CALL = "computed on each call"
# Fate of the weights that a pass removed, in general terms.
GONE = {"precompute": f"part of a weight that is {COMPUTED}", "fold": "folded into others"}


@takes(program=Program, plan=Plan, sizes=Mapping)
def weights_report(program: Program, plan: Plan | None = None, *, sizes: Mapping[str, int] | None = None) -> PassReport:
    """Report what became of each weight of the original program, and which weights passes have added.

    Args:
        program: the program after all passes.
        plan: a plan that is still to be applied; its decisions are then reported for its weights.
        sizes: sizes of the symbolic dimensions at which to trace the program; chosen by default.

    Returns:
        One entry per weight: `action` is its present form (`int8`, `float32`, `part of ...`, `folded into ...`,
        `removed`), `reason` explains it or lists what else was done; `metrics["fate"]` is a general form, without names
        and numbers, by which weights can be grouped. `bytes_before` add up to those of the original weights,
        `bytes_after` to `program.weights_bytes`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> small = lx.passes.quantize(program, lx.passes.resolve(lx.Recipe.load("int8"), program))
    >>> (weight,) = lx.passes.weights_report(small).sites
    >>> weight.action, weight.bytes_before, weight.bytes_after
    ('int8', 64, 32)
    """
    start = time.perf_counter()
    origin: Mapping[str, Any] = program.origin if program.origin is not None else abstract(program.weights)
    sites = [entry.site for entry in plan.sites] if plan is not None else find_sites(program, sizes=sizes)
    multiplied: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}  # weights that are computed on each call
    for site in sites:
        if site.path is not None:
            multiplied.setdefault(site.path, []).append(site.name)
        for path in made_of(site):
            if site.path is not None and path != site.path:
                parts.setdefault(path, []).append(site.path)
    taken, gone, made, kept, folded = _told(program)
    lines: list[SiteReport] = []
    for path in (*origin, *(path for path in program.weights if path not in origin)):
        before = tree_bytes(origin[path]) if path in origin else 0
        if path not in program.weights:
            action, reason = taken.get(path, "removed: nothing reads it"), ""
            fate = [gone.get(path, action)]
        else:
            leaf = program.weights[path]
            action = leaf.format if isinstance(leaf, QTensor) else _dtypes(leaf)
            said = [made.get(path, "") if path not in origin else _shrunk(origin[path], leaf)]
            fate = [action, *((COMPUTED,) if path in made and path not in origin else ())]
            if path not in origin and path not in made:
                said.append(ADDED)
                fate.append(ADDED)
            said.append("scale and shift folded in" if path in folded else "")
            if path in program.masks:
                said.append(f"{1 - float(jnp.mean(program.masks[path])):.3g} of it pruned")
            if plan is not None:
                planned = _planned(plan, multiplied.get(path, []))
                said += [part for each in planned for part in each]
                fate += [decision for decision, _ in planned]
            elif not isinstance(leaf, QTensor):
                said += [kept[name] for name in multiplied.get(path, []) if name in kept]
            if path in parts:
                said.append(f"{ON_EACH_CALL} into {', '.join(dict.fromkeys(parts[path]))}")
                fate.append(ON_EACH_CALL)
            elif path in origin and path not in multiplied and not isinstance(leaf, QTensor):
                said.append(NOT_MULTIPLIED)
                fate.append(NOT_MULTIPLIED)
            reason = "; ".join(dict.fromkeys(part for part in said if part))
        after = tree_bytes(program.weights[path]) if path in program.weights else 0
        metrics = {"fate": ", ".join(dict.fromkeys(fate))}
        lines.append(SiteReport(path, action, reason, before, after, metrics))
    totals = {
        "weights_bytes_before": sum(line.bytes_before for line in lines),
        "weights_bytes_after": sum(line.bytes_after for line in lines),
    }
    return PassReport(WEIGHTS, time.perf_counter() - start, tuple(lines), totals)


def _told(program: Program) -> tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, str], set[str]]:
    """Collect from reports: fates of removed weights (specific, general), made weights, kept sites, folded sites."""
    taken, gone, made, kept = dict[str, str](), dict[str, str](), dict[str, str](), dict[str, str]()
    folded: set[str] = set()
    for report in program.history:
        told = report.metrics.get(WEIGHTS, {})
        taken |= told
        gone |= dict.fromkeys(told, GONE[report.name]) if report.name in GONE else {}
        for site in report.sites:
            if site.outcome == "kept" and site.reason:
                kept[site.site] = site.reason
            if report.name == "precompute":
                made[site.site] = f"{site.action} {site.reason}"
            if report.name == "fold":
                folded.add(site.site)
    return taken, gone, made, kept, folded


def _planned(plan: Plan, names: list[str]) -> list[tuple[str, str]]:
    """For each site: what is planned, and why something is not."""
    entries = [entry for name in names if (entry := plan[name]) is not None]
    return [(f"to be {entry.describe()}", entry.kept) for entry in entries]


def _shrunk(before: Any, leaf: Any) -> str:
    if not isinstance(before, jax.ShapeDtypeStruct) or math.prod(before.shape) == math.prod(leaf.shape):
        return ""
    return f"shrunk to {math.prod(leaf.shape) / math.prod(before.shape):.3g} of its {math.prod(before.shape)} elements"


def _dtypes(leaf: Any) -> str:
    return ", ".join(dict.fromkeys(str(part.dtype) for part in jax.tree.leaves(leaf)))
