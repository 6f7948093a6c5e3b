"""Where the tensors of requests lie in a piece of memory: an allocator of blocks, pure logic.

Source: the lazy buddy system (Barkley and Lee, 1989). Blocks are powers of two; a freed one merges with its buddy only
where plenty of its size are free already, or when an allocation would fail otherwise. Requests of a client are alike,
so nearly every block is the one that was freed last, as it was.
"""

from __future__ import annotations

SMALLEST = 8
"""Order of the smallest block: 256 bytes."""

# Free blocks of a size that are kept as they are.
_KEPT = 64


def order_of(size: int) -> int:
    """The order of the blocks that hold `size` bytes: they have 2**order."""
    return max(size - 1, 0).bit_length() if size > 1 << SMALLEST else SMALLEST


class Blocks:
    """Which blocks are free.

    Args:
        order: of all the memory: it has 2**order bytes.

    Attributes:
        used: where the highest block ended that was ever taken.
    """

    def __init__(self, order: int) -> None:
        self._top = order
        self.used = 0
        # Of each order: blocks that were merged as far as they go, and those that nobody tried to merge.
        self._free: list[dict[int, None]] = [{} for _ in range(order + 1)]
        self._kept: list[list[int]] = [[] for _ in range(order + 1)]
        self._free[order][0] = None

    def take(self, order: int) -> int | None:
        """The offset of a free block of 2**order bytes; None where there is none."""
        if order > self._top:
            return None
        kept = self._kept[order]
        if kept:
            return kept.pop()
        offset = self._split(order)
        if offset is None and any(self._kept):
            self._merge_kept()
            offset = self._split(order)
        return offset

    def give(self, offset: int, order: int) -> None:
        """Frees a block that `take` gave."""
        kept = self._kept[order]
        if len(kept) < _KEPT:
            kept.append(offset)
        else:
            self._merge(offset, order)

    def _split(self, order: int) -> int | None:
        for larger in range(order, self._top + 1):
            if self._free[larger]:
                offset, _ = self._free[larger].popitem()
                for half in range(larger - 1, order - 1, -1):
                    self._free[half][offset + (1 << half)] = None
                self.used = max(self.used, offset + (1 << order))
                return offset
        return None

    def _merge(self, offset: int, order: int) -> None:
        while order < self._top:
            buddy = offset ^ (1 << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            offset &= buddy
            order += 1
        self._free[order][offset] = None

    def _merge_kept(self) -> None:
        for order, kept in enumerate(self._kept):
            while kept:
                self._merge(kept.pop(), order)
