"""A program's StableHLO as plain data, for what writes it in other formats."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Shape, None where a size is symbolic, and dtype, as NumPy names it."""

    shape: tuple[int | None, ...]
    dtype: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape, if nothing in it is symbolic."""
        known = tuple(size for size in self.shape if size is not None)
        if len(known) != len(self.shape):
            raise ValueError(f"{self.shape} has symbolic sizes")
        return known


@dataclasses.dataclass(frozen=True)
class Region:
    """Operations in order, from arguments to results; all values are numbers that are unique in the program."""

    arguments: tuple[int, ...]
    types: tuple[ArrayType, ...]
    operations: tuple[Operation, ...]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: such as `stablehlo.add`.
        operands: the values that it reads.
        results: the values that it makes, of these `types`.
        attributes: plain Python and NumPy; text of what is neither.
        regions: bodies, such as of a loop.
    """

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    types: tuple[ArrayType, ...]
    attributes: dict[str, Any]
    regions: tuple[Region, ...] = ()


@dataclasses.dataclass(frozen=True)
class Module:
    """Functions by name; the program is `main`."""

    functions: dict[str, Region]
