"""Pruning patterns: which elements of a weight are pruned together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which elements of a matrix `[K, N]` are pruned together.

    Attributes:
        kind: `unstructured`: single elements; `n_m`: all but `kept` of each `rows` neighbours along K; `block`:
            blocks of `rows` by `columns`; `channel`: columns.
        rows, columns: the size of a group or block.
        kept: number of elements kept in each group, for `n_m`.

    >>> Pattern.parse("2:4").sparsity, Pattern.parse("block:4x1").rows
    (0.5, 4)
    """

    kind: Literal["unstructured", "n_m", "block", "channel"]
    rows: int = 1
    columns: int = 1
    kept: int = 0

    @staticmethod
    @functools.cache
    def parse(text: str) -> Pattern:
        """Read `unstructured`, `N:M`, `block:RxC` or `channel`."""
        if text in ("unstructured", "channel"):
            return Pattern("unstructured" if text == "unstructured" else "channel")
        if text.startswith("block:"):
            rows, columns = map(int, text.removeprefix("block:").split("x"))
            return Pattern("block", rows, columns)
        kept, rows = map(int, text.split(":"))
        return Pattern("n_m", rows, kept=kept)

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern implies; None if it implies none."""
        return 1 - self.kept / self.rows if self.kind == "n_m" else None
