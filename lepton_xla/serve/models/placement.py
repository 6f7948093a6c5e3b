"""On which device a model goes, and what goes elsewhere or away for it: decided without loading anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A model that is loaded.

    Attributes:
        name: the model's.
        nbytes: what all its loaded versions take of each of its devices.
        devices: the numbers of these.
        used_s: when it was last used.
        idle: whether it may be evicted: neither pinned nor busy.
        moves: whether it may go to another device.
        popularity: how often it was asked for of late, in any unit.
    """

    name: str
    nbytes: int
    devices: tuple[int, ...]
    used_s: float
    idle: bool
    moves: bool = True
    popularity: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Put:
    """There is room on these devices."""

    devices: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """A model goes to another device, which has room for it."""

    name: str
    device: int


@dataclasses.dataclass(frozen=True, slots=True)
class Evict:
    """A model goes."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """There is room once what is on its way out is gone, or else once something has become idle.

    Attributes:
        leaves: whether what is on its way out is enough.
    """

    leaves: bool


type Step = Put | Move | Evict | Wait


def next_step(
    need: int, span: int, held: Sequence[Held], leaving: Sequence[int], budget: int, only: int | None = None
) -> Step:
    """What to do next so that a model finds room: put it where most is free, else move one, else evict.

    The smallest model that makes room by moving is moved, since moving takes a load. Evicted are the least
    popular ones, of equally popular ones the one used least recently, on the device where these are least popular.

    Args:
        need: bytes that the model takes of each of its devices.
        span: how many devices it runs on together; if several, the first ones.
        held: what is loaded.
        leaving: by device, bytes that are on their way out.
        budget: bytes of each device.
        only: a device that it has to be on; None for any.

    >>> next_step(3, 1, [Held("a", 4, (0,), 1.0, True)], [0, 0], 6)
    Put(devices=(1,))
    >>> next_step(6, 1, [Held("a", 4, (0,), 1.0, True), Held("b", 1, (1,), 2.0, True)], [0, 0], 6)
    Move(name='b', device=0)
    """
    places = [tuple(range(span))] if span > 1 else [(number,) for number in range(len(leaving))]
    places = [place for place in places if only is None or only in place]
    taken = [sum(each.nbytes for each in held if number in each.devices) for number in range(len(leaving))]
    soon = [budget - each for each in taken]  # what is free once all is gone that leaves
    now = [free - gone for free, gone in zip(soon, leaving, strict=True)]

    def free(amounts: Sequence[int], place: Iterable[int]) -> int:
        return min(amounts[number] for number in place)

    best = max(places, key=lambda place: free(now, place))
    if free(now, best) >= need:
        return Put(best)
    if any(free(soon, place) >= need for place in places):
        return Wait(leaves=True)
    moves = _moves(need, places, held, soon, now)
    if (smallest := min(moves, default=None)) is not None:
        return Move(*smallest[1:])
    return _evicted(need, places, held, soon)


def _moves(
    need: int, places: Sequence[tuple[int, ...]], held: Sequence[Held], soon: Sequence[int], now: Sequence[int]
) -> Iterator[tuple[int, str, int]]:
    """Moves that make room: the bytes, the model, and the device that it goes to."""
    for place in places:
        short = [number for number in place if soon[number] < need]
        if len(short) != 1:
            continue
        for each in held:
            if each.moves and each.devices == tuple(short) and soon[short[0]] + each.nbytes >= need:
                for number in range(len(now)):
                    if number not in place and now[number] >= each.nbytes:
                        yield each.nbytes, each.name, number


def _evicted(need: int, places: Sequence[tuple[int, ...]], held: Sequence[Held], soon: Sequence[int]) -> Step:
    """Whom to evict first, on the devices where room costs the least popular ones."""
    found: tuple[tuple[float, float], str] | None = None
    for place in places:
        free = {number: soon[number] for number in place}
        first, last = "", (-math.inf, -math.inf)
        for each in sorted((each for each in held if each.idle), key=_worth):
            if min(free.values()) >= need:
                break
            if any(free.get(number, need) < need for number in each.devices):
                first, last = first or each.name, _worth(each)
                for number in free.keys() & set(each.devices):
                    free[number] += each.nbytes
        if min(free.values()) >= need and (found is None or last < found[0]):
            found = last, first
    return Wait(leaves=False) if found is None else Evict(found[1])


def _worth(held: Held) -> tuple[float, float]:
    return held.popularity, held.used_s
