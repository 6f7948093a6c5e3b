"""Times the whole program with some of its sites in integers, and its weights unpacked once or on each call."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lepton_xla.program import Program

# A candidate must win by more than the noise of measurement.
WORTH_RATIO = 0.97

type Variant = tuple[Callable[..., Any], Any]
"""`fn(weights, *inputs)` and its weights."""


@dataclasses.dataclass(frozen=True)
class WholeTiming:
    """Median times of one call of the whole program, in microseconds.

    Attributes:
        sizes: sizes of the symbolic dimensions.
        float_us: time of the float program.
        set_us: times with each tried set of sites in integers.
    """

    sizes: dict[str, int]
    float_us: float
    set_us: tuple[float, ...]


class WholeProgram:
    """Times variants of a program.

    Attributes:
        seconds: total time spent on timing.
    """

    def __init__(
        self,
        program: Program,
        floating: Variant,
        variant: Callable[[frozenset[str], bool], Variant],
        time_programs: Callable[[Sequence[Variant], Any], list[float]],
        say: Callable[[str], None],
    ) -> None:
        """Make the timer of variants.

        Args:
            program: the float program.
            floating: the float program as a variant.
            variant: `variant(sites, unpacked)`: the program with these sites computed from codes, and the weights of
                the others unpacked beforehand or on each call.
            time_programs: measures variants, in microseconds.
            say: called with a line for each size.
        """
        self.seconds = 0.0
        self._program = program
        self._floating = floating
        self._variant = variant
        self._time_programs = time_programs
        self._say = say

    def sets(
        self, sets: Sequence[frozenset[str]], sizes: Sequence[Mapping[str, int]], unpacked: bool
    ) -> list[WholeTiming]:
        """Time sets of sites in integers, the empty one first; a set that lost at a size is infinite at later ones."""
        left, found = list(range(len(sets))), list[WholeTiming]()
        for at in sizes:
            timed = self._time(at, [self._variant(sets[index], unpacked) for index in left])
            by_set = dict(zip(left, timed.set_us, strict=True))
            left = [index for index in left if not loses(by_set[index], by_set[0])]
            set_us = tuple(by_set.get(index, math.inf) for index in range(len(sets)))
            found.append(dataclasses.replace(timed, set_us=set_us))
        return found

    def compare(self, variants: Sequence[Variant], sizes: Sequence[Mapping[str, int]]) -> list[WholeTiming]:
        """Time variants at all sizes."""
        return [self._time(at, variants) for at in sizes]

    def unpacking(
        self,
        integer: frozenset[str],
        sizes: Sequence[Mapping[str, int]],
        tried: Sequence[WholeTiming],
        lowered_us: Mapping[int, float],
    ) -> tuple[bool, list[WholeTiming], dict[int, float]]:
        """Tell whether unpacking weights once is faster than on each call.

        A gain at one size decides. The other sizes are then timed only if they were not before.

        Args:
            integer: the sites that are computed from codes.
            sizes: sizes at which to time.
            tried: results of `sets` at these sizes with unpacked weights, if any.
            lowered_us: its times of this set, by index of the size.

        Returns:
            Whether it is; all timings; and the times of the better variant.
        """
        again: dict[int, WholeTiming] = {}
        once = False
        for number, at in enumerate(sizes):
            if once and number < len(tried):
                break
            variants = [self._variant(integer, True)] + ([] if once else [self._variant(integer, False)])
            again[number] = self._time(at, variants)
            once = once or again[number].set_us[0] < WORTH_RATIO * again[number].set_us[1]
        chosen = {number: timed.set_us[0 if once else 1] for number, timed in again.items()}
        found = {**dict(enumerate(tried)), **again}
        return once, [found[number] for number in range(len(sizes))], {**lowered_us, **chosen}

    def _time(self, at: Mapping[str, int], variants: Sequence[Variant]) -> WholeTiming:
        start = time.perf_counter()
        self._say(f"the whole program at {', '.join(f'{name} {size}' for name, size in at.items()) or 'its size'}")
        times = self._time_programs([self._floating, *variants], self._program.abstract_inputs(at))
        self.seconds += time.perf_counter() - start
        return WholeTiming(dict(at), times[0], tuple(times[1:]))


def loses(set_us: float, empty_us: float) -> bool:
    """Tell whether a set of sites is out, however fast it is at other sizes; the empty one never is.

    >>> loses(30.0, 20.0), loses(10.0, 20.0)
    (True, False)
    """
    return set_us != empty_us and WORTH_RATIO * set_us > empty_us
