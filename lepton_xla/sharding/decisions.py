"""The partition spec of one weight, from the logical names of its axes or from its size, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from lepton_xla.sharding.specs import Part, as_spec, axes_of, pieces
from lepton_xla.tables import size


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a decision is made from.

    Attributes:
        path: name of the weight.
        shape: its shape.
        size_bytes: its bytes.
        names: logical names of its first axes; empty if it has none.
    """

    path: str
    shape: tuple[int, ...]
    size_bytes: int
    names: tuple[Part, ...] = ()


def by_names(logical: Mapping[str, Part], leaf: Leaf, sizes: Mapping[str, int]) -> tuple[PartitionSpec, str]:
    """Find the spec that the logical names of a weight's axes give; the first of two equal mesh axes wins.

    >>> by_names({"mlp": "model"}, Leaf("w", (4, 8), 32, ("embed", "mlp")), {"model": 2})
    (P(None, 'model'), "logical axis 'mlp'")
    """
    if not leaf.names or len(leaf.names) > len(leaf.shape):
        return as_spec([]), ""
    parts: list[tuple[str, ...]] = []
    cut: list[str] = []
    for name in leaf.names:
        axes = [
            axis
            for known in axes_of(name)
            for axis in axes_of(logical.get(known, known if known in sizes else None))
            if axis not in (used for part in parts for used in part)
        ]
        parts.append(tuple(dict.fromkeys(axes)))
        cut += map(repr, axes_of(name) if axes else ())
    named = ", ".join("+".join(axes_of(name)) or "-" for name in leaf.names)
    return as_spec(parts), f"logical axis {', '.join(cut)}" if cut else f"nothing cuts its logical axes ({named})"


def by_size(axes: tuple[str, ...], least_bytes: int, leaf: Leaf, sizes: Mapping[str, int]) -> tuple[PartitionSpec, str]:
    """Cut the largest axis that these mesh axes divide, if the weight has at least so many bytes.

    >>> by_size(("data",), 0, Leaf("w", (3, 8, 4), 96), {"data": 2})
    (P(None, 'data'), 'fallback: largest axis')
    """
    if not axes:
        return as_spec([]), "no rule matches, and there is no fallback"
    if leaf.size_bytes < least_bytes:
        return as_spec([]), f"{size(leaf.size_bytes)}; the fallback begins at {size(least_bytes)}"
    count = pieces(axes, sizes)
    divisible = [length for length in leaf.shape if length % count == 0 and length > 0]
    if not divisible:
        cut = " and ".join(f"{axis}={sizes[axis]}" for axis in axes)
        return as_spec([]), f"{cut} divides none of its axes" if leaf.shape else "a scalar"
    place = leaf.shape.index(max(divisible))
    return as_spec([axes if axis == place else None for axis in range(len(leaf.shape))]), "fallback: largest axis"
