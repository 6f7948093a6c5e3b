"""Axes of arrays as expressions over factors, related by unification; they determine which slices go together.

An axis is a leaf of `n` units, a product of axes (a flattened axis, the first factor slowest) or a concatenation of
axes. Axes that must be equal, as in an addition, are unified, as type inference unifies types: a leaf takes the other
axis's structure, and two structures are refined until they align. So a reshape of 768 channels to 12 heads of 64 turns
the leaf of 768 into a product of leaves of 12 and 64 wherever it occurs; from then on a removable unit is a head, or a
position in all heads. Axes that cannot be aligned are protected: they lose no units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

type Size = Any
"""An int, or a symbolic size of `jax.export`."""
type Scans = tuple[Any, ...]
"""The scans around a part of a program, outermost first."""
type Kept = Mapping["Dimension", np.ndarray]
"""Leaf -> which units stay, bool `[*steps, units]`, the same number in each step. Other leaves keep all units."""


class Dimension:
    """One axis, as an expression. Compare with `resolve(a) is resolve(b)`.

    Attributes:
        size: number of positions.
        kind: kind of expression.
        parts: parts of a product or a concatenation.
        reason: why the leaf is protected; empty if its units may be removed.
        scans: the scans in which each step may lose different units of this leaf; None before its first use.
    """

    __slots__ = ("_same", "kind", "parts", "reason", "scans", "size")

    def __init__(
        self,
        size: Size,
        kind: Literal["leaf", "product", "concat"] = "leaf",
        parts: Sequence[Dimension] = (),
        reason: str = "",
        scans: Scans | None = None,
    ) -> None:
        self.size = int(size) if isinstance(size, np.integer) else size
        self.kind = kind
        self.parts = tuple(parts)
        self.reason = reason
        self.scans = scans
        self._same: Dimension | None = None

    def __repr__(self) -> str:
        found = resolve(self)
        if found.kind == "leaf":
            return f"{found.size}{'!' if found.reason else ''}"
        return "(" + (" * " if found.kind == "product" else " + ").join(map(repr, found.parts)) + ")"

    def become(self, other: Dimension) -> None:
        """Replace this leaf by an expression of the same size, whose leaves inherit its protection and scans."""
        for leaf in leaves(other):
            leaf.reason = leaf.reason or self.reason
            if self.scans is not None:
                leaf.scans = _meet(leaf.scans, self.scans)
        self._same = other

    def found(self) -> Dimension:
        """The dimension that this one was replaced by, or itself."""
        while self._same is not None:
            if self._same._same is not None:
                self._same = self._same._same
            self = self._same
        return self


class _MisalignedError(Exception):
    """Two expressions cannot be aligned."""


UNIT = Dimension(1, "product")


def leaf(size: Size, reason: str = "") -> Dimension:
    """A new, unconstrained axis."""
    return UNIT if _same(size, 1) else Dimension(size, reason=reason)


def product(parts: Sequence[Dimension]) -> Dimension:
    """Axes flattened into one, the first the slowest."""
    flat = [factor for part in parts for factor in factors(part)]
    if len(flat) == 1:
        return flat[0]
    return Dimension(math.prod(factor.size for factor in flat), "product", flat) if flat else UNIT


def concat(parts: Sequence[Dimension]) -> Dimension:
    """Axes one after the other."""
    flat = [segment for part in parts for segment in segments(part) if not _same(segment.size, 0)]
    return flat[0] if len(flat) == 1 else Dimension(sum(segment.size for segment in flat), "concat", flat)


def resolve(dimension: Dimension) -> Dimension:
    """The current expression of a dimension."""
    return dimension.found()


def factors(dimension: Dimension) -> list[Dimension]:
    """The factors of a product, slowest first; the dimension itself if it is no product; empty for size 1."""
    dimension = resolve(dimension)
    if dimension.kind == "product":
        return [factor for part in dimension.parts for factor in factors(part)]
    return [] if _same(dimension.size, 1) else [dimension]


def segments(dimension: Dimension) -> list[Dimension]:
    """The parts of a concatenation in order; the dimension itself if it is none."""
    dimension = resolve(dimension)
    if dimension.kind == "concat":
        return [segment for part in dimension.parts for segment in segments(part)]
    return [dimension]


def leaves(dimension: Dimension) -> list[Dimension]:
    """The leaves, each once, in order."""
    dimension = resolve(dimension)
    if dimension.kind == "leaf":
        return [dimension]
    return list(dict.fromkeys(found for part in dimension.parts for found in leaves(part)))


def is_protected(dimension: Dimension) -> bool:
    """Whether no unit of a dimension may be removed: all its leaves are protected."""
    return all(found.reason or _same(found.size, 1) for found in leaves(dimension))


def protect(dimension: Dimension, reason: str) -> None:
    """Protect a dimension; the first reason given is reported."""
    for found in leaves(dimension):
        found.reason = found.reason or reason


def touch(dimension: Dimension, scans: Scans) -> None:
    """Note a use of a dimension within some scans: only in these may each step lose different units."""
    for found in leaves(dimension):
        found.scans = _meet(found.scans, scans)


def unify(a: Dimension, b: Dimension, why: str) -> None:
    """Unify two dimensions of the same size; `why` is the reason for protecting them if they cannot be aligned."""
    try:
        _unify(a, b)
    except _MisalignedError:
        protect(a, why)
        protect(b, why)


def split_off(dimension: Dimension, start: int, why: str) -> tuple[Dimension, Dimension]:
    """The positions before `start`, and the rest; both are protected if they cannot be separated."""
    try:
        return _split(dimension, start)
    except _MisalignedError:
        protect(dimension, why)
        return leaf(start, why), leaf(dimension.size - start, why)


def reshaped(dimension: Dimension, sizes: Sequence[Size], why: str) -> list[Dimension]:
    """Split a dimension into several of the given sizes, the first the slowest."""
    rest, outs = dimension, list[Dimension]()
    try:
        for size in reversed(sizes[1:]):
            rest, minor = _factorize(rest, size)
            outs.append(minor)
        return [rest, *reversed(outs)]
    except _MisalignedError:
        protect(dimension, why)
        return [leaf(size, why) for size in sizes]


def size_of(dimension: Dimension, kept: Kept) -> Size:
    """Number of positions that stay."""
    dimension = resolve(dimension)
    if dimension.kind == "leaf":
        mask = kept.get(dimension)
        return dimension.size if mask is None else int(np.count_nonzero(mask)) // math.prod(mask.shape[:-1])
    sizes = [size_of(part, kept) for part in dimension.parts]
    return math.prod(sizes) if dimension.kind == "product" else sum(sizes)


def mask_of(dimension: Dimension, kept: Kept) -> np.ndarray:
    """Which positions stay, bool `[*steps, size]`."""
    dimension = resolve(dimension)
    if dimension.kind == "leaf":
        mask = kept.get(dimension)
        return np.ones(dimension.size, bool) if mask is None else mask
    masks = [mask_of(part, kept) for part in dimension.parts]
    rank = max((mask.ndim for mask in masks), default=1)
    masks = [np.expand_dims(mask, tuple(range(mask.ndim - 1, rank - 1))) for mask in masks]
    steps = np.broadcast_shapes(*(mask.shape[:-1] for mask in masks))
    masks = [np.broadcast_to(mask, (*steps, mask.shape[mask.ndim - 1])) for mask in masks]
    if dimension.kind == "concat":
        return np.concatenate(masks, -1)
    whole = np.ones((*steps, 1), bool)
    for mask in masks:
        whole = (whole[..., :, None] & mask[..., None, :]).reshape((*steps, -1))
    return whole


def units_of(dimension: Dimension, unit_of: Dimension) -> np.ndarray:
    """The unit of a leaf that each position belongs to, int `[size]`; -1 for positions of other leaves."""
    dimension = resolve(dimension)
    if dimension.kind == "leaf":
        return np.arange(dimension.size) if dimension is unit_of else np.full(dimension.size, -1)
    parts = [units_of(part, unit_of) for part in dimension.parts]
    if dimension.kind == "concat":
        return np.concatenate(parts)
    whole = np.full(1, -1)
    for part in parts:
        whole = np.maximum(whole[:, None], part[None, :]).reshape(-1)
    return whole


def unit_sums(values: np.ndarray, units: np.ndarray, count: int) -> np.ndarray:
    """Sum over the positions of each unit along the last axis, `[..., count]`; `units` is a result of `units_of`."""
    total = np.zeros((*values.shape[:-1], count))
    own = units >= 0
    places: Any = (..., units[own])
    np.add.at(total, places, values[..., own])
    return total


def inner_size(dimension: Dimension, unit_of: Dimension) -> int:
    """Number of neighbouring positions of a flattened axis that form a unit of a leaf; 0 if the leaf is not in it."""
    dimension = resolve(dimension)
    if dimension.kind == "leaf":
        return int(dimension is unit_of)
    found = [inner_size(part, unit_of) for part in dimension.parts]
    if dimension.kind == "concat":
        return math.gcd(*found)
    at = next((k for k, size in enumerate(found) if size), None)
    return 0 if at is None else found[at] * math.prod(part.size for part in dimension.parts[at + 1 :])


def _meet(a: Scans | None, b: Scans) -> Scans:
    """The common scans."""
    if a is None:
        return b
    shared = [x for x, y in zip(a, b, strict=False) if x == y]
    return tuple(shared) if a[: len(shared)] == b[: len(shared)] else ()


def _same(a: Size, b: Size) -> bool:
    return bool(a == b)


def _divides(size: Size, whole: Size) -> bool:
    return isinstance(size, int) and isinstance(whole, int) and size > 0 and whole % size == 0


def _unify(a: Dimension, b: Dimension) -> None:
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if not _same(a.size, b.size):
        raise _MisalignedError
    if a.kind == "leaf" or b.kind == "leaf":
        single, other = (a, b) if a.kind == "leaf" else (b, a)
        if other.kind != "leaf" and single in leaves(other):
            raise _MisalignedError
        single.become(other)
    elif len(segments(a)) > 1 or len(segments(b)) > 1:
        _unify_segments(segments(a), segments(b))
    else:
        _unify_factors(factors(a), factors(b))


def _unify_segments(first: list[Dimension], second: list[Dimension]) -> None:
    while first and second:
        # An earlier step may have split the next segments.
        first, second = [*segments(first[0]), *first[1:]], [*segments(second[0]), *second[1:]]
        (a, *first), (b, *second) = first, second
        if _same(a.size, b.size):
            _unify(a, b)
        elif not (isinstance(a.size, int) and isinstance(b.size, int)):
            raise _MisalignedError
        elif a.size < b.size:
            head, tail = _split(b, a.size)
            _unify(a, head)
            second = [tail, *second]
        else:
            head, tail = _split(a, b.size)
            _unify(head, b)
            first = [tail, *first]


def _unify_factors(first: list[Dimension], second: list[Dimension]) -> None:
    while first and second:
        first, second = [*first[:-1], *factors(first[-1])], [*second[:-1], *factors(second[-1])]
        (*first, a), (*second, b) = first, second
        if _same(a.size, b.size):
            _unify(a, b)
            continue
        if not (isinstance(a.size, int) and isinstance(b.size, int)):
            raise _MisalignedError
        shared = math.gcd(a.size, b.size)
        if shared == 1:
            raise _MisalignedError
        (major_a, minor_a), (major_b, minor_b) = _factorize(a, shared), _factorize(b, shared)
        _unify(minor_a, minor_b)
        first, second = [*first, *factors(major_a)], [*second, *factors(major_b)]


def _factorize(dimension: Dimension, minor: Size) -> tuple[Dimension, Dimension]:
    """Factorize a dimension into two, the second of a given size."""
    dimension = resolve(dimension)
    if _same(minor, 1):
        return dimension, UNIT
    if _same(dimension.size, minor):
        return UNIT, dimension
    if dimension.kind == "product":
        *rest, last = factors(dimension)
        if _same(last.size, minor):
            return product(rest), last
        if _divides(minor, last.size):
            head, tail = _factorize(last, minor)
            return product([*rest, head]), tail
        if _divides(last.size, minor):
            head, tail = _factorize(product(rest), minor // last.size)
            return head, product([tail, last])
        raise _MisalignedError
    if not _divides(minor, dimension.size):
        raise _MisalignedError
    if dimension.kind == "leaf":
        head, tail = leaf(dimension.size // minor), leaf(minor)
        dimension.become(product([head, tail]))
        return head, tail
    if not all(_divides(minor, segment.size) for segment in segments(dimension)):
        raise _MisalignedError
    pairs = [_factorize(segment, minor) for segment in segments(dimension)]
    for _, tail in pairs[1:]:
        _unify(pairs[0][1], tail)
    return concat([head for head, _ in pairs]), pairs[0][1]


def _split(dimension: Dimension, start: int) -> tuple[Dimension, Dimension]:
    """Split a dimension at `start` into two non-empty parts."""
    dimension = resolve(dimension)
    if not (isinstance(dimension.size, int) and 0 < start < dimension.size):
        raise _MisalignedError
    if dimension.kind == "leaf":
        head, tail = leaf(start), leaf(dimension.size - start)
        dimension.become(concat([head, tail]))
        return head, tail
    if dimension.kind == "concat":
        before, after = list[Dimension](), segments(dimension)
        while start >= after[0].size:
            start -= after[0].size
            before.append(after.pop(0))
        if start:
            head, tail = _split(after[0], start)
            before, after = [*before, head], [tail, *after[1:]]
        return concat(before), concat(after)
    first, *rest = factors(dimension)
    minor = math.prod(factor.size for factor in rest)
    whole, part = divmod(start, minor)
    before, after = _split(first, whole) if whole else (None, first)
    if not part:
        assert before is not None
        return product([before, *rest]), product([after, *rest])
    # The split goes through a unit of the first factor, which becomes a segment of its own.
    after = _split(after, 1)[1] if after.size > 1 else None
    head, tail = _split(product(rest), part)
    return (
        concat([product([before, *rest]), head]) if before is not None else head,
        concat([tail, product([after, *rest])]) if after is not None else tail,
    )
