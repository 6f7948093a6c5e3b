"""Patterns: which elements of a weight are dropped together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What is dropped together.

    Attributes:
        kind: `unstructured`; `groups`: all but `kept` of each `rows` neighbours along K; `block`: `rows` by `columns`
            of `[K, N]`; `channel`: a column.
        rows, columns: the size of a group or block.
        kept: how many of each group are kept, for `groups`.
    """

    kind: Literal["unstructured", "groups", "block", "channel"]
    rows: int = 1
    columns: int = 1
    kept: int = 0

    @staticmethod
    @functools.cache
    def parse(text: str) -> Pattern:
        """Reads `unstructured`, `N:M`, `block:RxC` or `channel`."""
        if text in ("unstructured", "channel"):
            return Pattern("unstructured" if text == "unstructured" else "channel")
        if text.startswith("block:"):
            rows, columns = map(int, text.removeprefix("block:").split("x"))
            return Pattern("block", rows, columns)
        kept, rows = map(int, text.split(":"))
        return Pattern("groups", rows, kept=kept)

    @property
    def sparsity(self) -> float | None:
        """The share that is dropped, where the pattern says so."""
        return 1 - self.kept / self.rows if self.kind == "groups" else None
