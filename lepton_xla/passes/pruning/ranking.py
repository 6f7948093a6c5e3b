"""Finds the largest of many scores by counting.

The threshold is found bit by bit, by counting the scores below it. Counts are integer sums, which are the same for any
sharding, and each device only needs its own shard.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Counts are uint32, which limits the number of scores in a ranking.
LARGEST_RANKING = 2**32 - 1

_MAGNITUDE_BITS = 31


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scores", "dropped"], meta_fields=["lead"])
@dataclasses.dataclass(frozen=True)
class Ranking:
    """A set of scores that are ranked together.

    Attributes:
        scores: float arrays, not negative; NaN counts as the largest, so that it stays visible.
        dropped: number of smallest scores to prune: an int, or an integer array of the shape of the leading axes.
        lead: number of leading axes, the same for all scores; each of their steps is ranked on its own.
    """

    scores: Sequence[jax.Array]
    dropped: Any
    lead: int = 0

    @property
    def steps(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple(self.scores[0].shape[: self.lead])

    @property
    def elements(self) -> int:
        """Number of scores per step."""
        return sum(math.prod(part.shape[self.lead :]) for part in self.scores)


type Masks = list[list[jax.Array]]
"""For each ranking, a bool array for each of its score arrays; True is kept."""


def keep_largest(rankings: Sequence[Ranking]) -> Masks:
    """Masks of the scores to keep, computed on the device; works inside `jit` on sharded arrays.

    Each iteration of a loop over the bits of float32 reads all scores once and counts; nothing is sorted, gathered or
    scattered. Masks are bit-identical on any mesh.

    Args:
        rankings: each with at most `LARGEST_RANKING` scores per step.

    Returns:
        In each ranking, and each step of its leading axes, exactly `dropped` are False: the smallest, the first in a
        tie.
    """
    keys = [[_keys(part) for part in ranking.scores] for ranking in rankings]
    wanted = [jnp.broadcast_to(jnp.asarray(ranking.dropped, jnp.uint32), ranking.steps) for ranking in rankings]

    def below(thresholds: Sequence[jax.Array]) -> list[jax.Array]:
        return [
            sum((_count(part < _expanded(at, part), at.ndim) for part in parts), jnp.zeros_like(dropped))
            for parts, at, dropped in zip(keys, thresholds, wanted, strict=True)
        ]

    def narrow(number: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        bit = jnp.int32(1) << (_MAGNITUDE_BITS - 1 - number)
        tried = [at | bit for at in found]
        return [
            jnp.where(count < dropped, higher, at)
            for count, dropped, higher, at in zip(below(tried), wanted, tried, found, strict=True)
        ]

    # The largest threshold with fewer than `dropped` scores below it, which is the largest pruned score.
    start = [jnp.zeros(dropped.shape, jnp.int32) for dropped in wanted]
    thresholds = lax.fori_loop(0, _MAGNITUDE_BITS, narrow, start)
    left = [dropped - count for dropped, count in zip(wanted, below(thresholds), strict=True)]
    equal = [[part == _expanded(at, part) for part in parts] for parts, at in zip(keys, thresholds, strict=True)]
    firsts = _first_of_equal(equal, left)
    return [
        [(part > _expanded(at, part)) | (same & ~first) for part, same, first in zip(*each, strict=True)]
        for at, *each in zip(thresholds, keys, equal, firsts, strict=True)
    ]


def _first_of_equal(equal: list[list[jax.Array]], left: Sequence[jax.Array]) -> Masks:
    """Mark the first `left` of the marked places, over the arrays of each ranking in order."""
    counts = [[_count(part, each.ndim) for part in parts] for parts, each in zip(equal, left, strict=True)]
    quotas: list[list[jax.Array]] = []
    for each, remaining in zip(counts, left, strict=True):
        quotas.append([])
        for count in each:
            quotas[-1].append(jnp.minimum(count, remaining))
            remaining = remaining - quotas[-1][-1]
    places = [[_places(part.shape, each.ndim) for part in parts] for parts, each in zip(equal, left, strict=True)]
    # If all or none are marked, which is nearly always, no bound is needed.
    split = jax.tree.map(lambda quota, count: (quota > 0) & (quota < count), quotas, counts)
    any_split = jnp.any(jnp.stack([jnp.any(part) for part in jax.tree.leaves(split)]))
    everything = jnp.uint32(LARGEST_RANKING)
    bounds = jax.tree.map(
        lambda quota, part: jnp.where((quota == 0) | part, jnp.zeros_like(quota), everything), quotas, split
    )

    def narrow(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        number, found = state
        bit = jnp.uint32(1) << number.astype(jnp.uint32)

        def one(at: jax.Array, quota: jax.Array, searched: jax.Array, part: jax.Array, place: jax.Array) -> jax.Array:
            higher = at | bit
            count = _count(part & (place < _expanded(higher, part)), at.ndim)
            return jnp.where(searched & (count <= quota), higher, at)

        return number - 1, jax.tree.map(one, found, quotas, split, equal, places)

    longest = max(math.prod(part.shape[each.ndim :]) for parts, each in zip(equal, left, strict=True) for part in parts)
    top = jnp.int32(longest.bit_length() - 1)
    _, bounds = lax.while_loop(lambda state: (state[0] >= 0) & any_split, narrow, (top, bounds))
    return jax.tree.map(lambda part, place, at: part & (place < _expanded(at, part)), equal, places, bounds)


def keep_largest_on_host(rankings: Sequence[Ranking]) -> Masks:
    """The same masks as `keep_largest`, by NumPy's partition.

    For one-shot use: it needs no compile, and takes a quarter of the time of 31 passes over the scores.

    Args:
        rankings: as for `keep_largest`; `dropped` are ints.
    """
    return [_keep_on_host(ranking) for ranking in rankings]


def _keep_on_host(ranking: Ranking) -> list[jax.Array]:
    rows, dropped = math.prod(ranking.steps), int(ranking.dropped)
    sizes = [math.prod(part.shape[ranking.lead :]) for part in ranking.scores]
    # The bits of magnitudes sort like the magnitudes, with NaN as the largest.
    keys = [np.abs(np.asarray(part, np.float32)).reshape(rows, -1) for part in ranking.scores]
    flat = np.concatenate(keys, axis=1).view(np.uint32)
    keep = np.ones(flat.shape, bool)
    if dropped:
        threshold = np.partition(flat, dropped - 1, axis=1)[:, dropped - 1 : dropped]
        below = flat < threshold
        keep[below] = False
        for row in range(rows):
            equal = np.flatnonzero(flat[row] == threshold[row])
            keep[row, equal[: dropped - np.count_nonzero(below[row])]] = False
    parts = np.split(keep, np.cumsum(sizes)[:-1], axis=1)
    return [jnp.asarray(part.reshape(score.shape)) for part, score in zip(parts, ranking.scores, strict=True)]


@functools.partial(jax.jit, static_argnames=("axes", "lead"))
def exact_mean(values: jax.Array, axes: tuple[int, ...], lead: int = 0) -> jax.Array:
    """The mean over some axes, bit-identical for any order of summation and any number of devices.

    Args:
        values: float32, not negative. Summed in fixed point, in steps of 2^-31 of the largest.
        axes: the axes, with at most 2^31 elements in total.
        lead: number of leading axes; each of their steps has its own largest value.

    Returns:
        float32 without these axes; infinite where a value is not finite.

    >>> exact_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), (1,)).tolist()
    [2.0, 6.0]
    """
    count = math.prod(values.shape[axis] for axis in axes)
    if count == 1:
        return jnp.reshape(values, [size for axis, size in enumerate(values.shape) if axis not in axes])
    finite = jnp.isfinite(values)
    values = jnp.where(finite, values, jnp.zeros_like(values))
    largest = jnp.max(values, axis=tuple(range(lead, values.ndim)), keepdims=True, initial=0)
    # The power of two at or below the largest value; dividing by it is exact.
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & jnp.int32(0x7F800000)
    unit = lax.bitcast_convert_type(jnp.maximum(exponent, jnp.int32(0x00800000)), jnp.float32)
    fixed = (values / unit * 2.0**30).astype(jnp.uint32)
    width = 32 - (count - 1).bit_length()
    total = jnp.float32(0)
    for shift in range(0, 31, width):
        digits = (fixed >> jnp.uint32(shift)) & jnp.uint32(2**width - 1)
        total = total + jnp.sum(digits, axis=axes, dtype=jnp.uint32).astype(jnp.float32) * 2.0**shift
    scale = jnp.max(jnp.broadcast_to(unit, values.shape), axis=axes)
    mean = total / count * 2.0**-30 * scale
    return jnp.where(jnp.all(finite, axis=axes), mean, jnp.full_like(mean, jnp.inf))


def largest_of_each(scores: jax.Array, lead: int) -> jax.Array:
    """Mark the largest score of each step of the leading axes, the last in a tie: the one that is pruned last.

    Args:
        scores: as in a `Ranking`, at least one per step.
        lead: number of leading axes.

    Returns:
        A bool array of their shape, bit-identical on any mesh.

    >>> largest_of_each(jnp.array([[1.0, 3.0], [7.0, 5.0]]), lead=1).tolist()
    [[False, True], [True, False]]
    """
    axes, keys = tuple(range(lead, scores.ndim)), _keys(scores)
    most = keys == _expanded(jnp.max(keys, axis=axes), keys)
    places = _places(scores.shape, lead)
    last = jnp.max(places * most.astype(jnp.uint32), axis=axes)
    return most & (places == _expanded(last, places))


def _keys(scores: jax.Array) -> jax.Array:
    """The bits of float32 magnitudes, which sort like the magnitudes, with NaN as the largest."""
    return lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32) & jnp.int32(2**_MAGNITUDE_BITS - 1)


def _count(marked: jax.Array, lead: int) -> jax.Array:
    return jnp.sum(marked, axis=tuple(range(lead, marked.ndim)), dtype=jnp.uint32)


def _expanded(at: jax.Array, part: jax.Array) -> jax.Array:
    """Reshape a per-step value for comparison with all elements of the step."""
    return jnp.reshape(at, at.shape + (1,) * (part.ndim - at.ndim))


def _places(shape: Sequence[int], lead: int) -> jax.Array:
    """The row-major index of each element in its step."""
    place = jnp.zeros(tuple(shape), jnp.uint32)
    for axis in range(lead, len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        place = place + lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * stride
    return place
