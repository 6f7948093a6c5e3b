"""Replaces patterns: equations of which nothing but the last one's result is read elsewhere, by one computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from lepton_xla import _compat
from lepton_xla.passes.core.activations import Graph
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


def find[P: Pattern](closed: Any, start: str, match: Callable[[Graph, Any], P | None]) -> Iterator[P]:
    """Find patterns in a jaxpr and in all jaxprs inside it.

    One that shares an equation with one before is none: each of two products that are added may have the other as bias.

    Args:
        closed: the jaxpr.
        start: the primitive of the equation that a pattern is found from, which is one of its members.
        match: gives the pattern that is found from such an equation; None if there is none.
    """
    jaxpr, _ = _compat.open_jaxpr(closed)
    equations, _ = _compat.live(jaxpr)
    graph = Graph(equations, jaxpr.outvars)
    taken: set[int] = set()
    for eqn in equations:
        if eqn.primitive.name == start and id(eqn) not in taken:
            pattern = match(graph, eqn)
            found = set() if pattern is None else {id(each) for each in (*pattern.members, pattern.last)}
            if pattern is not None and taken.isdisjoint(found):
                taken |= found
                yield pattern
        for inner in _compat.inner_jaxprs(eqn):
            yield from find(inner, start, match)


def without_calls(fn: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """The function without the calls around equations of these primitives."""
    return rewrite(fn, dict.fromkeys(names, _leave), inline=True, on_unknown="keep")


def _leave(_context: Context, _eqn: Any, _values: Values) -> None:
    """Leaves an equation."""
