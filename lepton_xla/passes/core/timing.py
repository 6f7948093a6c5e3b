"""Times compiled functions, each only once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import operator
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.kernels.keeping import Kept
from lepton_xla.passes.core.executables import Compilation, Lowered
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing_cache import Times, TimingCache

ROUNDS = 21
MIN_ROUNDS = 3
# Time budgets of all rounds together: for whole programs, and for single operations, of which there are many.
BUDGET_S = 2.0
OPERATION_BUDGET_S = 0.5
# A function that takes this many times as long as the fastest is not timed any further: after a single call if that is
# long enough to rule out noise, else after the minimum number of rounds.
LOST = 3.0
LONG_S = 0.02
# What a single call may take too long because the machine did something else; what lost by no more is called again.
MOMENT_S, AGAIN = 0.1, 2
# Shortest round that is timed; it amortizes the clock and, where calls only queue work, the device synchronization.
ROUND_S = 2e-4
QUEUED_ROUND_S = 1e-2
# Number of measurements whose programs are compiled together.
AT_ONCE = 16
# Number of random values that are drawn for an operand, then repeated: drawing all of a large one would take longer
# than timing it. A prime.
DRAWN = 1_048_573


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Programs to be timed against each other.

    Attributes:
        programs: what is timed.
        measure: gives the times of their executables, which those of `untimed` follow.
        untimed: gives further programs that measuring needs.
    """

    programs: Sequence[Lowered]
    measure: Callable[[list[Any]], Times]
    untimed: Callable[[], Sequence[Lowered]] = tuple


class Timer:
    """Times functions on a target, and remembers the results.

    Each `optimize`, or each pass that is called directly, makes one and passes it to everything that measures.

    >>> timer = Timer(cache=TimingCache(None))  # takes nothing from the disk
    >>> timer.once("a name", lambda: 2.5), timer.once("a name", lambda: 7.5)
    (2.5, 2.5)

    Attributes:
        target: the target that it times on.
        cache: measurements of other processes.
        measured: number of times that were measured.
        recalled: number of times that came from the cache.
    """

    def __init__(self, target: Target | None = None, cache: TimingCache | None = None) -> None:
        self.target = target or Target.here()
        self.cache = cache or TimingCache.default()
        self.measured = 0
        self.recalled = 0
        self._known: dict[Hashable, Any] = {}

    def once[T](self, key: Hashable, measure: Callable[[], T]) -> T:
        """Return the result of `measure`, which is called only the first time for each key."""
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def once_all[K: Hashable](self, keys: Sequence[K], measure: Callable[[list[K]], Iterable[Any]]) -> list[Any]:
        """Return the results of `measure` for all keys; it gets those that have none yet, each once.

        >>> timer = Timer(cache=TimingCache(None))
        >>> timer.once_all("abca", lambda keys: map(ord, keys))
        [97, 98, 99, 97]
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        self._known |= zip(missing, measure(missing), strict=True)
        return [self._known[key] for key in keys]

    def recall(self, wanted: Iterable[Measurement]) -> list[Times]:
        """Return the times of each measurement from the cache, or measure them.

        They are compiled while the next ones are lowered, `AT_ONCE` of them before the first is measured, so that
        nothing else runs while calls are timed.

        >>> timer = Timer(cache=TimingCache(None))
        >>> double = Lowered.of(lambda x: 2 * x, jnp.ones(4))
        >>> timer.recall([Measurement([double], lambda executables: Times([len(executables) * 1.5]))])[0].us
        [1.5]
        """
        rest, found = iter(wanted), list[Times]()
        while part := self._compiled(itertools.islice(rest, AT_ONCE)):
            found += [self._times(each, executables) for each, executables in part]
            part.clear()  # executables are freed before the next are made
        return found

    def _compiled(self, wanted: Iterable[Measurement]) -> list[tuple[Measurement, Callable[[], list[Any]]]]:
        """Measurements with their executables, as far as their times are not in the cache."""
        with Compilation() as compilation:
            return [
                (each, compilation.start([] if self._cached(each) else [*each.programs, *each.untimed()]))
                for each in wanted
            ]

    def _times(self, wanted: Measurement, executables: Callable[[], list[Any]]) -> Times:
        times = self._cached(wanted)
        if times is not None:
            self.recalled += len(wanted.programs)
            return times
        times = wanted.measure(executables())
        self.measured += len(wanted.programs)
        self.cache.put(self._key(wanted), times)
        return times

    def _cached(self, wanted: Measurement) -> Times | None:
        return self.cache.get(self._key(wanted), len(wanted.programs))

    def _key(self, wanted: Measurement) -> str:
        names = [self.target.digest, *(program.digest for program in wanted.programs)]
        return hashlib.sha256(" ".join(names).encode()).hexdigest()[:40]

    def medians_us(self, calls: Sequence[Callable[[], Any]], budget_s: float = BUDGET_S) -> list[float]:
        """Time calls in turn, so that a slow moment of the machine falls on all alike.

        The first has its median over rounds; the others have the same, times the median of their ratios to it within
        rounds. If the first was lost, the first that was not takes its place.

        If calls only queue work for a device, a turn waits only for its last call: waiting for each would add the time
        to start a program, which can hide the time of the product.

        >>> sleep, nothing = lx.passes.Timer().medians_us([lambda: time.sleep(1e-3), lambda: None], budget_s=0.01)
        >>> sleep > nothing
        True
        """
        return _medians_us(calls, budget_s, queued=self.target.queues)

    def counts(self) -> tuple[int, int]:
        """Tell how many times were measured so far, and how many came from the cache.

        >>> lx.passes.Timer().counts()
        (0, 0)
        """
        return self.measured, self.recalled

    def since(self, counts: tuple[int, int]) -> dict[str, dict[str, int]]:
        """Count for the metrics of a report: what was measured and recalled since then; empty where nothing was.

        >>> lx.passes.Timer().since((0, 0))
        {}
        """
        measured, recalled = self.measured - counts[0], self.recalled - counts[1]
        return {"times": {"measured": measured, "from the cache": recalled}} if measured or recalled else {}


def time_programs(
    functions: Sequence[tuple[Callable[..., Any], Any]],
    inputs: Sequence[jax.ShapeDtypeStruct],
    timer: Timer | None = None,
    budget_s: float = BUDGET_S,
) -> list[float]:
    """Time functions of weights and the same inputs in turn, paired as by `Timer.medians_us`; return microseconds.

    Args:
        functions: pairs of `fn(weights, *inputs)` and its weights; a `Candidate` is not compiled again if an equal one
            was.
        inputs: shapes and dtypes; floats are drawn at random, anything else is zero.
        timer: times calls and remembers results; a new one by default.
        budget_s: approximate limit in seconds; each function is called at least twice.
    """
    timer = timer or Timer()

    def measure(executables: list[Any]) -> Times:
        arrays = [
            random_array(number, leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jax.device_put(np.zeros(leaf.shape, leaf.dtype))
            for number, leaf in enumerate(inputs)
        ]
        calls = {
            id(executable): functools.partial(executable, weights, *arrays)
            for executable, (_, weights) in zip(executables, functions, strict=True)
        }
        with Kept(jax.tree.leaves([weights for _, weights in functions])):
            times = dict(zip(calls, timer.medians_us(list(calls.values()), budget_s), strict=True))
        return Times([times[id(executable)] for executable in executables])  # of equal programs, one was timed

    (times,) = timer.recall([Measurement([Lowered.of(fn, weights, *inputs) for fn, weights in functions], measure)])
    return times.us


def random_array(seed: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Draw normal values on the host; JAX would compile its generator, and a cast, for each shape."""
    return jax.device_put(random_values(seed, like.shape, lambda drawn: drawn.astype(like.dtype)))


def random_values(seed: int, shape: Sequence[int], made: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Draw normal values in float32 and pass them through `made`, before they repeat.

    After `DRAWN` values they repeat; the count is odd, so that no two rows are equal.
    """
    drawn = np.random.default_rng(seed).standard_normal(min(math.prod(shape), DRAWN), np.float32)
    return np.resize(made(drawn), shape)


def _medians_us(calls: Sequence[Callable[[], Any]], budget_s: float, *, queued: bool) -> list[float]:
    once: list[float] = []
    for call in calls:
        jax.block_until_ready(call())
        once.append(_seconds(call))
    lost = max(LONG_S, LOST * min(once))
    for index, call in enumerate(calls):
        if lost <= once[index] < lost + MOMENT_S:
            once[index] = min(once[index], *(_seconds(call) for _ in range(AGAIN)))
    round_s = QUEUED_ROUND_S if queued else ROUND_S
    counts = [max(1, min(50, int(round_s / seconds))) for seconds in once]
    left = [index for index, seconds in enumerate(once) if seconds < max(LONG_S, LOST * min(once))]
    number = max(MIN_ROUNDS, min(ROUNDS, int(budget_s / sum(once[index] for index in left))))
    rounds: list[list[float]] = [[] for _ in calls]
    result = None
    for done in range(number):
        if done == MIN_ROUNDS:
            fastest = min(min(rounds[index]) for index in left)
            left = [index for index in left if min(rounds[index]) < LOST * fastest]
        for index in left:
            start = time.perf_counter()
            for _ in range(counts[index]):
                result = calls[index]()
                if not queued:
                    jax.block_until_ready(result)
            jax.block_until_ready(result)
            rounds[index].append((time.perf_counter() - start) / counts[index] * 1e6)
    # A slow moment falls on all of a round, so ratios within rounds are steadier than medians of each.
    paired = rounds[left[0]]
    first_us = statistics.median(paired)
    return [
        first_us * statistics.median(map(operator.truediv, times, paired)) if times else seconds * 1e6
        for times, seconds in zip(rounds, once, strict=True)
    ]


def _seconds(call: Callable[[], Any]) -> float:
    """The time of a single call."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return max(time.perf_counter() - start, 1e-7)
