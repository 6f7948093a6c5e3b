"""Computed weights: which values that depend on weights alone count as weights, and their names."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lepton_xla.passes.core.expressions import Expression, stored_shape
from lepton_xla.trees import leaf_bytes

# A computed value may have at most this many times the bytes of its weights. A product of two low-rank matrices, or an
# outer product, is better computed on each call than stored.
MOST_GROWTH = 2.0
# Maximum number of weights in a name.
_NAMED = 4
# Primitives that only rearrange values; they may as well come after the computed weight.
_LAID_OUT = (
    "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p", "convert_element_type",
    "reduce_precision", "sharding_constraint",
)  # fmt: skip
CUTS = ("slice", "split", "unstack")


@dataclasses.dataclass(frozen=True)
class ComputedWeight:
    """A value that is computed from weights and constants alone, and multiplies an activation.

    Attributes:
        name: the folder of its weights, the last operation, and the weights, such as
            `params/cell/concatenate:hi/kernel+hf/kernel`.
        expression: its expression in the weights.
    """

    name: str
    expression: Expression


@dataclasses.dataclass(frozen=True)
class Computed:
    """The computed weights of a program, for one walk.

    Attributes:
        weights: the computed weights.
        given: name -> array, for weights that were computed before; empty if the walk computes them.
        found: expressions that the walk has seen reach a product without being among them.
    """

    weights: tuple[ComputedWeight, ...] = ()
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    found: list[Expression] = dataclasses.field(default_factory=list[Expression])

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Key of an expression -> name."""
        return {weight.expression.key: weight.name for weight in self.weights}

    @property
    def cut(self) -> set[str]:
        """Paths of the weights that have parts among the computed weights."""
        return {path for weight in self.weights if (path := _cut_from(weight.expression))}

    def without_parts_of(self, paths: Collection[str]) -> Computed:
        """Return the computed weights without parts of these weights."""
        kept = tuple(weight for weight in self.weights if _cut_from(weight.expression) not in paths)
        return dataclasses.replace(self, weights=kept)


def choose_computed(
    found: Sequence[Sequence[Expression]], weights: Mapping[str, Any], pieces: Sequence[Expression] = ()
) -> tuple[Computed, dict[str, str]]:
    """Choose the computed weights of a program.

    Args:
        found: expressions that reached a product, at several input sizes. An expression that is not the same at all
            sizes depends on them, and is no computed weight.
        weights: path -> array, or its shape.
        pieces: parts of weights that reach no product; they are computed weights if other parts of the weight are.

    Returns:
        The computed weights; and for other expressions the reason, by key.
    """
    common = set[str].intersection(*({part.key for each in some for part in _candidates(each)} for some in found))
    chosen: dict[str, Expression] = {}
    reasons: dict[str, str] = {}
    for expression in itertools.chain(*found):
        if not expression.weights or not all(path in weights for path in expression.weights):
            continue
        candidates = _candidates(expression)
        usable = [part for part in candidates if part.key in common]
        if not usable:
            reasons[expression.key] = f"{_listed(expression)} and the sizes of the inputs"
        elif growth := _growth(usable[0], weights):
            reasons[expression.key] = (
                f"{_listed(expression)}: computed ahead it would take {growth:.3g} times their bytes"
            )
        else:
            chosen.setdefault(usable[0].key, usable[0])
    cut = {path for part in chosen.values() if (path := _cut_from(part))}
    for expression in pieces:
        for part in _candidates(expression)[:1] if set(expression.weights) <= cut else ():
            chosen.setdefault(part.key, part)
    for path in cut:  # parts may overlap
        parts = [part for part in chosen.values() if _cut_from(part) == path]
        if sum(_stored_bytes(part, weights) for part in parts) > MOST_GROWTH * _bytes([path], weights):
            chosen = {key: part for key, part in chosen.items() if _cut_from(part) != path}
    names: dict[str, Expression] = {}
    for expression in chosen.values():
        names[_name(expression, weights, {*names, *weights})] = expression
    return Computed(tuple(ComputedWeight(name, part) for name, part in names.items())), reasons


def _candidates(expression: Expression) -> list[Expression]:
    """Candidates for the computed weight behind an operand, best first, without final layout operations."""
    parts: list[Expression] = []
    part, cut = expression, False
    while True:
        name = "" if part.eqn is None else part.eqn.primitive.name
        follows = name in (*_LAID_OUT, *CUTS) or (part.eqn is None and bool(part.operands))
        if not follows and part.eqn is not None and part.weights:
            return [*parts, part]
        if not follows:
            return parts
        if name in CUTS and not cut:
            parts.append(part)
            cut = True
        part = part.operands[0]


def _cut_from(expression: Expression) -> str:
    """The weight that a computed weight is a slice of; empty if it is more than a slice."""
    part = expression
    while not part.path:
        if part.eqn is not None and part.eqn.primitive.name not in (*_LAID_OUT, *CUTS):
            return ""
        if part.constant is not None:
            return ""
        part = part.operands[0]
    return part.path


def _growth(expression: Expression, weights: Mapping[str, Any]) -> float:
    """How many times the bytes of its weights it takes, if that is too many; else 0."""
    before = _bytes(expression.weights, weights)
    ratio = _stored_bytes(expression, weights) / before if before else math.inf
    return ratio if ratio > MOST_GROWTH else 0.0


def _stored_bytes(expression: Expression, weights: Mapping[str, Any]) -> int:
    stored = stored_shape(expression, weights)
    return leaf_bytes(stored.shape, stored.dtype)


def _bytes(paths: Iterable[str], weights: Mapping[str, Any]) -> int:
    return sum(leaf_bytes(weights[path].shape, weights[path].dtype) for path in paths)


def _listed(expression: Expression) -> str:
    paths = expression.weights
    more = f" and {len(paths) - _NAMED} more weights" if len(paths) > _NAMED else ""
    return f"computed on each call from {', '.join(paths[:_NAMED])}{more}"


def _name(expression: Expression, weights: Mapping[str, Any], taken: Collection[str]) -> str:
    sizes = {path: math.prod(weights[path].shape) for path in expression.weights}
    paths = sorted(sizes, key=lambda path: -sizes[path])  # ties in the order of occurrence
    folders = [path.split("/")[:-1] for path in paths]
    folder = folders[0]
    while folder and any(other[: len(folder)] != folder for other in folders):
        folder = folder[:-1]
    folder = folder or folders[0]
    lead = "".join(f"{part}/" for part in folder)
    rest = [path.removeprefix(lead) for path in paths]
    more = f"+{len(rest) - _NAMED} more" if len(rest) > _NAMED else ""
    operation = expression.eqn.primitive.name.removesuffix("_call")
    number = 1
    while (name := f"{lead}{operation}{'' if number == 1 else f'.{number}'}:{'+'.join(rest[:_NAMED])}{more}") in taken:
        number += 1
    return name
