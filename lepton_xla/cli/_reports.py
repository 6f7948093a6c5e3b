"""Tables of pass reports. They may come from an artifact made elsewhere, so every field may be missing."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_xla.cli import _common

# Name of the report about weights; all others are about sites.
WEIGHTS = "weights"


def passes_table(reports: Sequence[Mapping[str, Any]]) -> _common.Table:
    """One row per pass: time, number of sites, bytes of their weights; and one row for each part of its time."""
    rows = []
    for report in reports:
        if report.get("name") == WEIGHTS:
            continue
        sites = _sites(report)
        actions = collections.Counter(str(site.get("action", "")) for site in sites)
        before, after = (sum(_number(site.get(f"bytes_{when}")) for site in sites) for when in ("before", "after"))
        rows.append(
            (
                report.get("name", ""),
                _common.seconds(_number(report.get("seconds"))),
                ", ".join(f"{count} x {action}" for action, count in actions.items()),
                f"{_common.size(before)} -> {_common.size(after)}" if before else "",
            )
        )
        metrics = report.get("metrics")
        parts = metrics.get("seconds") if isinstance(metrics, Mapping) else None
        for part, seconds in parts.items() if isinstance(parts, Mapping) else ():
            rows.append((f"  {part}", _common.seconds(_number(seconds)), "", ""))
        times = metrics.get("times") if isinstance(metrics, Mapping) else None
        if isinstance(times, Mapping):
            rows.append(("  times", "", ", ".join(f"{_number(count)} {source}" for source, count in times.items()), ""))
    return _common.table("passes", ("pass", ">time", "sites", ">weights of these sites"), rows)


def sites_table(reports: Sequence[Mapping[str, Any]]) -> _common.Table:
    """One row per pass and site: the action and its reason."""
    rows = [
        (report.get("name", ""), site.get("site", ""), site.get("action", ""), _why(site))
        for report in reports
        if report.get("name") != WEIGHTS
        for site in _sites(report)
    ]
    return _common.table("sites", ("pass", "site", "action", "why"), rows)


def weights_table(reports: Sequence[Mapping[str, Any]]) -> _common.Table:
    """What became of the weights, grouped by fate; the bytes add up to those of the model, before and after."""
    fates: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        for site in _sites(report) if report.get("name") == WEIGHTS else []:
            fates.setdefault(str(site.get("metrics", {}).get("fate", site.get("action", ""))), []).append(site)
    rows = [(fate, len(sites), *_bytes(sites)) for fate, sites in fates.items()]
    every = [site for sites in fates.values() for site in sites]
    total = ("total", len(every), *_bytes(every))
    return _common.table("weights", ("what became of them", ">weights", ">before", ">after"), rows, total=total)


def fates_table(reports: Sequence[Mapping[str, Any]]) -> _common.Table:
    """One row per weight: what became of it."""
    rows = [
        (
            site.get("site", ""),
            "; ".join(str(site[key]) for key in ("action", "reason") if site.get(key)),
            *_bytes([site]),
        )
        for report in reports
        if report.get("name") == WEIGHTS
        for site in _sites(report)
    ]
    return _common.table("what became of each weight", ("weight", "what became of it", ">before", ">after"), rows)


def _why(site: Mapping[str, Any]) -> str:
    notes = site.get("notes")
    said = [site.get("reason"), *(notes if isinstance(notes, list | tuple) else ())]
    return "; ".join(str(part) for part in said if part)


def _bytes(sites: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    before, after = (sum(_number(site.get(f"bytes_{when}")) for site in sites) for when in ("before", "after"))
    return f"{before:,}", f"{after:,}"


def remarks(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each request of the recipe that was not, or only partly, fulfilled."""
    lines: list[str] = []
    for report in reports:
        metrics = report.get("metrics")
        if not isinstance(metrics, Mapping):
            continue
        if report.get("name") == "skipped":
            lines += [f"{key}: {value}" for key, value in metrics.items()]
        elif metrics.get("not_reached"):
            lines.append(f"{report.get('name', '')}: {metrics['not_reached']}")
    return lines


def _sites(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sites = report.get("sites")
    return [site for site in sites if isinstance(site, Mapping)] if isinstance(sites, list | tuple) else []


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0
