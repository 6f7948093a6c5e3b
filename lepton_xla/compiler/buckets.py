"""Buckets: the sizes of each symbolic dimension that a model is compiled for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lepton_xla.errors import CompileError
from lepton_xla.program import as_sizes

type BucketSizes = dict[str, tuple[int, ...]]
"""Symbolic dimension -> its sizes, ascending."""


def check_bucket_sizes(symbols: Sequence[str], buckets: Mapping[str, Iterable[int]]) -> BucketSizes:
    """Validate buckets and returns them in the order of `symbols`.

    Raises:
        CompileError: if a symbol has no sizes, sizes belong to no symbol, or sizes are not ascending and at least 1.

    >>> check_bucket_sizes(["batch"], {"batch": [1, 8, 32]})
    {'batch': (1, 8, 32)}
    """
    for name in buckets:
        if name not in symbols:
            known = f"its symbolic dimensions are {', '.join(symbols)}" if symbols else "it has no symbolic dimension"
            raise CompileError(f"buckets name {name!r}, which is not a dimension of any input; {known}")
    bucket_sizes: BucketSizes = {}
    for name in symbols:
        if name not in buckets:
            raise CompileError(f"buckets lack the dimension {name!r}: give its sizes, such as {{{name!r}: (1, 8, 32)}}")
        sizes = as_sizes(name, buckets[name])
        if any(before >= after for before, after in itertools.pairwise(sizes)):
            raise CompileError(f"buckets[{name!r}] is {sizes}; sizes must ascend without repeats")
        bucket_sizes[name] = sizes
    return bucket_sizes


def combinations(bucket_sizes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """All combinations of sizes, one per executable; a single empty one for a model without symbols.

    >>> combinations({"batch": (1, 8), "seq": (64,)})
    [{'batch': 1, 'seq': 64}, {'batch': 8, 'seq': 64}]
    """
    return [dict(zip(bucket_sizes, sizes, strict=True)) for sizes in itertools.product(*bucket_sizes.values())]


def bucket_name(sizes: Mapping[str, int]) -> str:
    """A name for files and logs.

    >>> bucket_name({"batch": 8, "seq": 128})
    'batch=8,seq=128'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items()) or "fixed"


def next_size(compiled_sizes: Sequence[int], size: int) -> int | None:
    """The smallest compiled size that is at least `size`; None if there is none.

    >>> next_size((1, 8, 32), 5)
    8
    """
    index = bisect.bisect_left(compiled_sizes, size)
    return compiled_sizes[index] if index < len(compiled_sizes) else None


def pad(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Pad an array with zeros at the ends to the given shape.

    >>> pad(np.ones((1, 2)), (2, 2)).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    if array.shape == tuple(shape):
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded
