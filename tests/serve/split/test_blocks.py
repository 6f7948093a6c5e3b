"""The allocator of shared memory against a map of every byte."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from lepton_xla.serve.split.blocks import SMALLEST, Blocks, order_of

ORDER = 14
orders = st.integers(SMALLEST, ORDER)
# What to do: take a block of an order, or free one of those held.
steps = st.lists(st.tuples(st.booleans(), orders, st.integers(0, 2**16)), max_size=300)


@hypothesis.given(steps)
def test_blocks_never_overlap_and_nothing_is_lost(script):
    blocks = Blocks(ORDER)
    owner = np.zeros(1 << (ORDER - SMALLEST), np.int64)
    held = {}
    for number, (take, order, which) in enumerate(script, 1):
        if take:
            offset = blocks.take(order)
            if offset is None:
                # Only if there is no free block of that size, whatever was freed in whatever order.
                free = (owner == 0).reshape(-1, 1 << (order - SMALLEST)).all(axis=1)
                assert not free.any()
                continue
            assert offset % (1 << order) == 0
            span = slice(offset >> SMALLEST, (offset + (1 << order)) >> SMALLEST)
            assert (owner[span] == 0).all()
            assert span.stop <= len(owner)
            owner[span] = number
            held[number] = (offset, order)
        elif held:
            offset, order = held.pop(list(held)[which % len(held)])
            blocks.give(offset, order)
            owner[offset >> SMALLEST : (offset + (1 << order)) >> SMALLEST] = 0
    for offset, order in held.values():
        blocks.give(offset, order)
    assert blocks.take(ORDER) == 0
    assert blocks.take(SMALLEST) is None


def test_memory_is_used_again_for_ever():
    """Sizes in turn, each freed out of order, through the memory a hundred times over."""
    blocks = Blocks(ORDER)
    waiting, taken = [], 0
    for turn in range(10_000):
        order = SMALLEST + turn % 4
        while (offset := blocks.take(order)) is None:
            blocks.give(*waiting.pop(turn % len(waiting)))
        waiting.append((offset, order))
        taken += 1 << order
    assert taken > 100 << ORDER


def test_many_free_blocks_of_a_size_become_larger_ones_without_a_search():
    blocks = Blocks(20)
    held = [blocks.take(SMALLEST) for _ in range(1 << (20 - SMALLEST))]
    assert None not in held
    assert sorted(held) == list(range(0, 1 << 20, 1 << SMALLEST))
    for offset in held:
        blocks.give(offset, SMALLEST)
    assert len(blocks._free[SMALLEST]) + len(blocks._kept[SMALLEST]) <= 65
    assert blocks.take(20) == 0


def test_the_order_is_of_the_smallest_block_that_holds_so_much():
    sizes = (0, 1, 255, 256, 257, 3136, 4096, 4097)
    assert [order_of(size) for size in sizes] == [8, 8, 8, 8, 9, 12, 12, 13]
