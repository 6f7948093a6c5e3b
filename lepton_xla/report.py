"""What a pass did, as data: printed as a table for people, stored as JSON in the artifact."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What one pass did at one site.

    Attributes:
        site: the site's name.
        action: what was done, such as `int8 x int8`, `pruned`, `kept`.
        reason: why, where it is not the plain case: an unsupported primitive, a measured loss.
        bytes_before: bytes of the site's weight before the pass.
        bytes_after: the same after it.
        metrics: figures of the pass's own, such as `sparsity` or `float_us`.
    """

    site: str
    action: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did to a program.

    Attributes:
        name: the pass.
        seconds: the time it took.
        sites: one entry a site the pass looked at.
        metrics: figures of the whole pass.
    """

    name: str
    seconds: float = 0.0
    sites: tuple[SiteReport, ...] = ()
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.sites)} sites, {self.seconds:.2f} s" + _figures(self.metrics)]
        for site in self.sites:
            size = f"  {site.bytes_before} -> {site.bytes_after} bytes" if site.bytes_before else ""
            reason = f"  ({site.reason})" if site.reason else ""
            lines.append(f"  {site.site}: {site.action}{size}{_figures(site.metrics)}{reason}")
        return "\n".join(lines)


def _figures(metrics: dict[str, Any]) -> str:
    """The plain numbers and words among the figures; lists and tables are for `to_json`."""
    shown = {key: value for key, value in metrics.items() if isinstance(value, (bool, int, float, str))}
    return "".join(
        f"  {key}={value:.4g}" if isinstance(value, float) else f"  {key}={value}" for key, value in shown.items()
    )
