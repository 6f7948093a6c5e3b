"""Keeps a search to its minutes: no step begins that would not end in what is left, by the last one of its kind."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator

from lepton_xla.errors import TuningError

# Shares of what is left of the time in which weights are stored in all formats, sites scored and products timed, and
# how far a step that has begun may go beyond the whole.
STORES, SCORES, TIMES, BEYOND = 0.15, 0.2, 0.25, 1.1


class TimeUpError(TuningError):
    """A step was given up, because the time was up; nothing of it is kept."""


class Pace:
    """What is left of a budget of time, how long steps took, and what there was no time for.

    >>> seconds = iter([0.0, 0.0, 20.0, 20.0, 50.0])
    >>> pace = Pace(1, lambda: next(seconds))
    >>> with pace.step("trial"):
    ...     pass
    >>> pace.fits("trial"), pace.fits("trial")  # after 20 s of 60, and after 50
    (True, False)

    Attributes:
        skipped: a line for each thing that there was no time for.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._whole_s, self._began = now, 60 * minutes, now()
        self._took: dict[str, float] = {}
        self.skipped: list[str] = []

    @property
    def minutes(self) -> float:
        """The whole time."""
        return self._whole_s / 60

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began

    def share_of_rest(self, share: float, until: float = 1.0) -> float:
        """The share of the whole time at which a share of what is left until another will be over."""
        if math.isinf(self._whole_s):
            return until
        gone = self.seconds / self._whole_s
        return gone + share * max(until - gone, 0.0)

    def fits(self, kind: str, until: float = 1.0, *, reserve_s: float = 0.0) -> bool:
        """Whether a step of a kind will end, by the last one, before a share of the time is over.

        Args:
            kind: as of `step`. The first of its kind fits if any time is left.
            until: share of the time.
            reserve_s: seconds that are needed afterwards.
        """
        left = self._whole_s * until - self.seconds - reserve_s
        return left > 0 and self._took.get(kind, 0.0) <= left

    def took(self, kind: str, seconds: float) -> None:
        """Take how long a step took."""
        self._took[kind] = seconds

    @contextlib.contextmanager
    def step(self, kind: str) -> Generator[None]:
        """A step, whose time the next of its kind is expected to take."""
        began = self._now()
        yield
        self.took(kind, self._now() - began)

    def check(self, *, reserve_s: float = 0.0, rest_s: float = 0.0) -> None:
        """Check a step that has begun.

        Args:
            reserve_s: seconds that are needed afterwards.
            rest_s: seconds that it will still take.

        Raises:
            TimeUpError: if it will end too far beyond the time.
        """
        if self.seconds + rest_s + reserve_s > BEYOND * self._whole_s:
            raise TimeUpError("the time was up")

    def left_s(self, reserve_s: float = 0.0) -> float:
        """Seconds that are left, less those that are needed afterwards."""
        return self._whole_s - self.seconds - reserve_s

    def check_left(self) -> None:
        """Check that something may begin.

        Raises:
            TimeUpError: if no time is left.
        """
        if self.seconds >= self._whole_s:
            raise TimeUpError("the time was up")

    def skip(self, line: str) -> None:
        """Note what there was no time for."""
        self.skipped.append(line)

    @staticmethod
    def endless() -> Pace:
        """A pace that leaves time for everything."""
        return Pace(math.inf)
