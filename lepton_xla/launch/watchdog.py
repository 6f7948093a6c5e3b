"""Decides from the beats of all processes whether a run hangs, and on which one. Pure: the caller gives the time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lepton_xla.errors import LaunchError
from lepton_xla.launch.heartbeat import DATA, STEP, Beat

_SEVERAL = 10.0
_STEPPING = (DATA, STEP)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a process may stay at one step, in seconds.

    Attributes:
        step_s: in the phases `data` and `step`.
        compile_s: before the first beat, and in `start` and `compile`. By default ten times `step_s`.
        evaluate_s: in `evaluate` and `save`. By default ten times `step_s`.

    Raises:
        LaunchError: if a limit is not positive.

    >>> Limits(60.0).of("compile")
    600.0
    """

    step_s: float
    compile_s: float = 0.0
    evaluate_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("compile_s", "evaluate_s"):
            object.__setattr__(self, name, getattr(self, name) or _SEVERAL * self.step_s)
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise LaunchError(f"the watchdog's limit {field.name} must be above 0, not {getattr(self, field.name)}")

    @property
    def least_s(self) -> float:
        """The shortest of them."""
        return min(self.step_s, self.compile_s, self.evaluate_s)

    def of(self, phase: str) -> float:
        """The limit of a phase."""
        if phase in _STEPPING:
            return self.step_s
        return self.evaluate_s if phase in ("evaluate", "save") else self.compile_s


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The last beat of a process, and since when it has been the last."""

    beat: Beat
    since_s: float


_SILENT = Beat(-1, -1, "start")


class Watchdog:
    """Follows the beats of the processes of one attempt.

    Args:
        limits: how long each phase may stay at one step.
        numbers: the number of each in its run, for messages.
        now_s: the present time.
    """

    def __init__(self, limits: Limits, numbers: Sequence[int], now_s: float) -> None:
        self._limits = limits
        self._numbers = numbers
        self._seen = [_Seen(_SILENT, now_s) for _ in numbers]
        self._excused_until_s = now_s

    def look(self, now_s: float, beats: Sequence[Beat | None], running: Sequence[bool]) -> str:
        """Who hangs, as text for people; empty if nobody does.

        Processes wait for each other in collectives. So while one is in a slower phase, within its limit, the time of
        those that train does not count, and nobody hangs who waits for one with fewer steps that is not late. Of those
        that are late, the one with the fewest steps is named, and at one step the one that has no batch: the rest wait
        for it.
        """
        for rank, beat in enumerate(beats):
            last = self._seen[rank].beat
            if beat is not None and (beat.step, beat.phase) != (last.step, last.phase):
                self._seen[rank] = _Seen(beat, now_s)
        alive = [rank for rank, runs in enumerate(running) if runs]
        late = [rank for rank in alive if self._is_late(rank, now_s)]
        if any(self._seen[rank].beat.phase not in _STEPPING for rank in alive if rank not in late):
            self._excused_until_s = now_s
            late = [rank for rank in late if self._seen[rank].beat.phase not in _STEPPING]
        behind = min((self._seen[rank].beat.step for rank in alive if rank not in late), default=None)
        late = [rank for rank in late if behind is None or self._seen[rank].beat.step <= behind]
        if not late:
            return ""
        worst = min(late, key=self._order)
        others = [f"rank {self._numbers[rank]} {self._state(rank)}" for rank in alive if rank != worst]
        stayed_s = now_s - self._seen[worst].since_s
        return (
            f"rank {self._numbers[worst]} hangs: no progress for {stayed_s:.1f} s, the limit is "
            f"{self._limit(worst):g} s; it {self._state(worst)}{'; ' if others else ''}{', '.join(others)}"
        )

    def _order(self, rank: int) -> tuple[int, bool, float]:
        """The rank that is behind all others comes first."""
        seen = self._seen[rank]
        return seen.beat.step, seen.beat.phase != DATA, seen.since_s

    def _is_late(self, rank: int, now_s: float) -> bool:
        seen = self._seen[rank]
        from_s = max(seen.since_s, self._excused_until_s) if seen.beat.phase in _STEPPING else seen.since_s
        return now_s - from_s > self._limit(rank)

    def forgive(self, slept_s: float) -> None:
        """Leave out a time in which the launcher itself did not run, as in a paused container."""
        self._seen = [_Seen(seen.beat, seen.since_s + slept_s) for seen in self._seen]

    def _limit(self, rank: int) -> float:
        return self._limits.of(self._seen[rank].beat.phase)

    def _state(self, rank: int) -> str:
        beat = self._seen[rank].beat
        return "has not told any progress yet" if beat is _SILENT else f"is at step {beat.step} in phase {beat.phase}"
