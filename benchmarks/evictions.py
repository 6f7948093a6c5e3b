"""Loads under a budget of memory by policies on paper, a request at a time: what `crowding.py` compares with."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence


def best_loads(sequence: Sequence[str], room: int) -> int:
    """Loads of the best policy that knows what will come (Belady, 1966), with room for so many models of one size.

    >>> best_loads("abcabc", 2)
    4
    """
    later: dict[str, collections.deque[int]] = collections.defaultdict(collections.deque)
    for index, name in enumerate(sequence):
        later[name].append(index)
    held: set[str] = set()
    loads = 0
    for name in sequence:
        later[name].popleft()
        if name not in held:
            loads += 1
            if len(held) >= room:
                held.remove(max(held, key=lambda each: later[each][0] if later[each] else len(sequence)))
            held.add(name)
    return loads


def recent_loads(sequence: Sequence[str], room: int) -> int:
    """Loads where the model goes that was asked for longest ago, with room for so many, and one request at a time.

    >>> recent_loads("abcabc", 2)
    6
    """
    held: dict[str, None] = {}  # in the order in which they were asked for
    loads = 0
    for name in sequence:
        loads += name not in held
        held.pop(name, None)
        held[name] = None
        if len(held) > room:
            del held[next(iter(held))]
    return loads


def known_loads(sequence: Sequence[str], room: int, shares: Mapping[str, float]) -> int:
    """Loads where the model goes that is asked for with the smallest probability, if these are known.

    >>> known_loads("abacad", 2, {"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1})
    4
    """
    held: set[str] = set()
    loads = 0
    for name in sequence:
        if name not in held:
            loads += 1
            if len(held) >= room:
                held.remove(min(held, key=lambda each: shares[each]))
            held.add(name)
    return loads
