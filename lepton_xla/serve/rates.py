"""How often something may happen."""

from __future__ import annotations

import math


class Rate:
    """A token bucket as one number: when it would be full again if nothing more were taken (GCRA, ITU-T I.371).

    Args:
        per_s: how often a second; None for as often as you like.
        burst: how many at once; None for those of one second.

    >>> rate = Rate(2.0)
    >>> [rate.take(now) for now in (0.0, 0.0, 0.0, 0.5, 0.5)]  # seconds to wait
    [0.0, 0.0, 0.5, 0.0, 0.5]
    """

    __slots__ = ("_ahead_s", "_full_at", "_interval_s")

    def __init__(self, per_s: float | None, burst: int | None = None) -> None:
        self._interval_s = 0.0 if per_s is None else 1.0 / per_s
        self._ahead_s = ((1 if per_s is None else burst or max(1, round(per_s))) - 1) * self._interval_s
        self._full_at = -math.inf

    def follow(self, other: Rate) -> None:
        """Goes on where another one is."""
        self._full_at = other._full_at

    def take(self, now: float) -> float:
        """Takes one out of the bucket and returns 0; or returns how many seconds there is none, and takes nothing.

        Args:
            now: the time on any one monotonic clock, in seconds.
        """
        interval = self._interval_s
        if interval:
            full_at = max(self._full_at, now)
            early = full_at - now - self._ahead_s
            # A nanosecond's grace, because sums of intervals are rounded.
            if early > 1e-9:
                return early
            self._full_at = full_at + interval
        return 0.0
