"""What passes reported, as tables; also of an artifact made elsewhere, so that nothing is taken for granted."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_xla.cli import _common


def passes_table(reports: Sequence[Mapping[str, Any]]) -> _common.Table:
    """One row a pass: what it did, how often, and what that did to the weights."""
    rows = []
    for report in reports:
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
    return _common.table("passes", ("pass", ">time", "sites", ">weights of these sites"), rows)


def sites_table(reports: Sequence[Mapping[str, Any]]) -> _common.Table:
    """One row a pass and site: what was done there and why."""
    rows = [
        (report.get("name", ""), site.get("site", ""), site.get("action", ""), site.get("reason", ""))
        for report in reports
        for site in _sites(report)
    ]
    return _common.table("sites", ("pass", "site", "action", "why"), rows)


def _sites(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sites = report.get("sites")
    return [site for site in sites if isinstance(site, Mapping)] if isinstance(sites, list | tuple) else []


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0
