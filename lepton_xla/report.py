"""Reports of passes, as data: printed as tables, stored as JSON in the artifact."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

type Outcome = Literal["changed", "kept", "codes", "multiplied"]
"""What a pass did, for programs: `changed` something; `kept` the site as it was; made its product one of `codes`; or
`multiplied` its activation by a factor on each call. `SiteReport.action` says it to people."""


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What one pass did at one site.

    Attributes:
        site: the site's name.
        action: the action, such as `int8 x int8`, `pruned`, `kept`.
        reason: the reason, unless the action is as planned: an unsupported primitive, a measured loss.
        bytes_before: bytes of the site's weight before the pass.
        bytes_after: bytes after the pass.
        metrics: further results of the pass, such as `sparsity` or `float_us`.
        outcome: what was done, for programs; none may read `action` or `reason` to find out.
        notes: further remarks.

    >>> site = lx.SiteReport("dense/kernel", "int8 x int8", bytes_before=4096, bytes_after=1088)
    >>> print(lx.PassReport("quantize", 0.25, (site,)))
    quantize: 1 sites, 0.25 s
      dense/kernel: int8 x int8  4096 -> 1088 bytes
    """

    site: str
    action: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    outcome: Outcome = "changed"
    notes: tuple[str, ...] = ()


def unchanged(site: str, reason: str, action: str = "kept", **more: Any) -> SiteReport:
    """The report of a site that was left as it was.

    Args:
        site, reason, action: as `SiteReport` has them.
        more: its other fields.
    """
    return SiteReport(site, action, reason, outcome="kept", **more)


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did to a program.

    Attributes:
        name: name of the pass.
        seconds: time that it took.
        sites: one entry per site that the pass considered.
        metrics: results for the whole program.

    >>> report = lx.PassReport("prune", 0.5, (lx.SiteReport("dense/kernel", "pruned", metrics={"sparsity": 0.5}),))
    >>> print(report)
    prune: 1 sites, 0.50 s
      dense/kernel: pruned  sparsity=0.5
    >>> report.to_json()["sites"][0]["action"]
    'pruned'
    """

    name: str
    seconds: float = 0.0
    sites: tuple[SiteReport, ...] = ()
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.sites)} sites, {self.seconds:.2f} s" + _figures(self.metrics)]
        for site in self.sites:
            size = f"  {site.bytes_before} -> {site.bytes_after} bytes" if site.bytes_before else ""
            said = "; ".join(filter(None, (site.reason, *site.notes)))
            reason = f"  ({said})" if said else ""
            lines.append(f"  {site.site}: {site.action}{size}{_figures(site.metrics)}{reason}")
        return "\n".join(lines)


def _figures(metrics: dict[str, Any]) -> str:
    """Format the plain numbers and words among the metrics; lists and tables are in `to_json` only."""
    shown = {key: value for key, value in metrics.items() if isinstance(value, (bool, int, float, str))}
    return "".join(
        f"  {key}={value:.4g}" if isinstance(value, float) else f"  {key}={value}" for key, value in shown.items()
    )
