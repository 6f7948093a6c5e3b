"""What was counted, over time: the difference between now and a moment ago, or the last so many rows.

Counters only grow, so a window needs no data of its own, and what several processes have counted can be added first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Snapshots are kept for an hour, fewer the older: (from this age in seconds, this far apart).
_THINNING = ((0.0, 0.0), (120.0, 10.0), (1200.0, 60.0))
# They are thinned when so many have come, since every one is looked at then.
_BETWEEN = 60
KEEP_S = 3600.0

type Counts = Mapping[str, Any]
"""Name -> number, list of numbers, or a mapping like these. All but what is called `now` only grows."""


class History:
    """Snapshots of the counters of one model version.

    >>> history = History()
    >>> for second in range(10):
    ...     _ = history.add(second, {"requests": 100 * second})
    >>> history.over(5.0)
    ({'requests': 500}, 5)
    >>> history.last(250, lambda counts: counts["requests"])["requests"]
    300
    """

    def __init__(self) -> None:
        self._snapshots: list[tuple[float, Counts]] = []
        self._thin_at = _BETWEEN

    @property
    def now(self) -> Counts:
        """The latest snapshot."""
        return self._snapshots[-1][1] if self._snapshots else {}

    def add(self, now_s: float, counts: Counts) -> bool:
        """Takes a snapshot; returns whether it differs from the one before."""
        snapshots = self._snapshots
        same = bool(snapshots) and snapshots[-1][1] == counts
        if same and len(snapshots) > 1 and snapshots[-2][1] == counts:
            snapshots.pop()  # the same for long needs two
        snapshots.append((now_s, counts))
        if len(snapshots) >= self._thin_at:
            self._snapshots = _thinned(snapshots, now_s)
            self._thin_at = len(self._snapshots) + _BETWEEN
        return not same

    def over(self, seconds: float) -> tuple[dict[str, Any], float] | None:
        """What was counted in the last seconds, and in how many; None before there are two snapshots."""
        if len(self._snapshots) < 2:
            return None
        now_s, latest = self._snapshots[-1]
        then_s, before = next(
            (each for each in reversed(self._snapshots[:-1]) if now_s - each[0] >= seconds), self._snapshots[0]
        )
        return difference(latest, before), now_s - then_s

    def last(self, least: int, count: Callable[[Counts], float]) -> dict[str, Any] | None:
        """What was counted while the last `least` of something were; None if there were not so many yet.

        Args:
            least: how many.
            count: how many a snapshot has.
        """
        if not self._snapshots:
            return None
        latest = self._snapshots[-1][1]
        total = count(latest)
        if total < least:
            return None
        for _, before in reversed(self._snapshots):
            if total - count(before) >= least:
                return difference(latest, before)
        return difference(latest, {})


def difference(latest: Counts, before: Counts) -> dict[str, Any]:
    """What was counted between two snapshots."""
    found: dict[str, Any] = {}
    for name, value in latest.items():
        old = before.get(name)
        if old is None or name == "now":
            found[name] = value
        elif isinstance(value, Mapping):
            found[name] = difference(value, old)
        elif isinstance(value, list):
            found[name] = [new - past for new, past in zip(value, old, strict=True)]
        else:
            found[name] = value - old
    return found


def _thinned(snapshots: list[tuple[float, Counts]], now_s: float) -> list[tuple[float, Counts]]:
    kept: list[tuple[float, Counts]] = []
    for index, (time_s, counts) in enumerate(snapshots):
        age = now_s - time_s
        apart = next(far for start, far in reversed(_THINNING) if age >= start)
        recent = index >= len(snapshots) - 2
        if recent or (age <= KEEP_S and (not kept or time_s - kept[-1][0] >= apart)):
            kept.append((time_s, counts))
    return kept
