"""Partition specs: which mesh axes cut which axis of an array."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lepton_xla.deferred import jax
from lepton_xla.errors import ShardingError

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

type Part = str | Sequence[str] | None
"""What cuts one axis of an array: a mesh axis, several (the first is outermost), or nothing (None, `""`, `()`)."""


def axes_of(part: Part) -> tuple[str, ...]:
    """The mesh axes that cut one axis of an array.

    >>> axes_of("data"), axes_of(("data", "model")), axes_of(None), axes_of("")
    (('data',), ('data', 'model'), (), ())
    """
    return tuple(part.split() if isinstance(part, str) else part or ())


def as_spec(parts: Iterable[Part]) -> PartitionSpec:
    """Make a `PartitionSpec`; trailing axes that nothing cuts are left out.

    >>> as_spec(["", "model"]), as_spec([("data", "model"), None])
    (P(None, 'model'), P(('data', 'model'),))
    """
    cut = [axes_of(part) for part in parts]
    while cut and not cut[-1]:
        cut.pop()
    return jax.sharding.PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in cut))


def spec_text(spec: PartitionSpec) -> str:
    """Write a spec as one word for each axis.

    >>> spec_text(as_spec(["", ("data", "model")])), spec_text(as_spec([]))
    ('-, data+model', 'whole')
    """
    return ", ".join("+".join(axes_of(part)) or "-" for part in spec) or "whole"


def pieces(part: Part, sizes: Mapping[str, int]) -> int:
    """Count the pieces that one axis of an array is cut into.

    >>> pieces(("data", "model"), {"data": 4, "model": 2}), pieces(None, {})
    (8, 1)
    """
    return math.prod(sizes[axis] for axis in axes_of(part))


def check_spec(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int], where: str) -> None:
    """Check that a spec fits an array and a mesh.

    Args:
        spec: the spec.
        shape: the shape of the array.
        sizes: size of each mesh axis.
        where: what the spec is of, for messages.

    Raises:
        ShardingError: if the spec has more entries than the array has axes, names an axis that the mesh lacks, names
            one twice, or cuts an axis into pieces that are not equal.

    >>> check_spec(as_spec(["", "model"]), (8, 6), {"model": 4}, "weight 'w'")
    Traceback (most recent call last):
    lepton_xla.errors.ShardingError: weight 'w': axis 1 of (8, 6) cannot be cut by model=4: 4 does not divide 6
    """
    if len(spec) > len(shape):
        raise ShardingError(
            f"{where}: spec ({spec_text(spec)}) has {len(spec)} entries, the shape {tuple(shape)} fewer"
        )
    check_axes(spec, sizes, where)
    for axis, part in enumerate(spec):
        if shape[axis] % pieces(part, sizes):
            cut = " and ".join(f"{name}={sizes[name]}" for name in axes_of(part))
            raise ShardingError(
                f"{where}: axis {axis} of {tuple(shape)} cannot be cut by {cut}: {pieces(part, sizes)} does not divide "
                f"{shape[axis]}"
            )


def fits(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Whether a spec cuts an array into equal parts.

    >>> fits(as_spec(["model"]), (6,), {"model": 4})
    False
    """
    return all(length % pieces(part, sizes) == 0 for length, part in zip(shape, spec, strict=False))


def check_axes(parts: Iterable[Any], sizes: Mapping[str, int], where: str) -> None:
    """Check that a mesh has the axes of a spec, and that the spec names none twice.

    Raises:
        ShardingError: if not.

    >>> check_axes(["modle"], {"model": 4}, "batch")
    Traceback (most recent call last):
    lepton_xla.errors.ShardingError: batch: the mesh has no axis 'modle'; its axes are model=4
    """
    named = [axis for part in parts for axis in axes_of(part)]
    for axis in named:
        if axis not in sizes:
            has = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ShardingError(f"{where}: the mesh has no axis {axis!r}; its axes are {has}")
        if named.count(axis) > 1:
            raise ShardingError(f"{where}: the mesh axis {axis!r} occurs twice; it can cut one axis of an array only")
