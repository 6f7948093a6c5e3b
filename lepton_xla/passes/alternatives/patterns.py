"""Replaces patterns: equations of which nothing but the last one's result is read elsewhere, by one computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Rule, Values, materialize

type Place = tuple[Any, int]
"""An equation, and which of its operands."""


class Pattern(Protocol):
    """Equations in a jaxpr.

    Attributes:
        last: the equation whose result it is.
        members: all equations before it that nothing else reads.
        places: where its operands are read.
    """

    last: Any
    members: list[Any]

    @property
    def places(self) -> Sequence[Place]: ...

    def compute(self, read: Callable[[Place], jax.Array]) -> jax.Array:
        """The result, of what `read` gives for each place."""
        ...


def replace[P: Pattern](
    fn: Callable[..., Any], find: Callable[[Any], Iterable[P]], wanted: Callable[[P], bool]
) -> Callable[..., Any]:
    """Compute patterns by their own `compute`.

    Args:
        fn: any function, for inference, without calls around parts of patterns.
        find: gives the patterns of a jaxpr.
        wanted: whether to replace a pattern.
    """

    def rules(closed: Any) -> Mapping[str, Rule]:
        patterns = [pattern for pattern in find(closed) if wanted(pattern)]
        last = {id(pattern.last): pattern for pattern in patterns}
        members = {id(eqn) for pattern in patterns for eqn in pattern.members}
        places = {id(eqn) for pattern in patterns for eqn, _ in pattern.places}

        def rule(context: Context, eqn: Any, values: Values) -> Values | None:
            notes = context.walk.notes
            if id(eqn) in places:
                notes[f"operands {id(eqn)}"] = values
            if id(eqn) in members:
                return [None] * len(eqn.outvars)
            pattern = last.get(id(eqn))
            if pattern is None:
                return None
            return [pattern.compute(lambda place: materialize(notes[f"operands {id(place[0])}"][place[1]]))]

        names = {eqn.primitive.name for pattern in patterns for eqn in (*pattern.members, pattern.last)}
        names |= {eqn.primitive.name for pattern in patterns for eqn, _ in pattern.places}
        return dict.fromkeys(names, rule)

    return rewrite(fn, rules, inline=True, on_unknown="keep")


def apart[P: Pattern](patterns: Iterable[P]) -> Iterator[P]:
    """Those that share no equation with one before: each of two products that are added may have the other as bias."""
    taken: set[int] = set()
    for pattern in patterns:
        equations = {id(eqn) for eqn in (*pattern.members, pattern.last)}
        if taken.isdisjoint(equations):
            taken |= equations
            yield pattern


def without_calls(fn: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """The function without the calls around equations of these primitives."""
    return rewrite(fn, dict.fromkeys(names, _leave), inline=True, on_unknown="keep")


def _leave(_context: Context, _eqn: Any, _values: Values) -> None:
    """Leaves an equation."""
