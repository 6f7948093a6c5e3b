"""Times compiled functions, each only once."""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.passes.core.executables import Lowered, compile_all
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
# Shortest round that is timed; it amortizes the clock and, where calls only queue work, the device synchronization.
ROUND_S = 2e-4
QUEUED_ROUND_S = 1e-2
# Number of random values that are drawn for an operand, then repeated: drawing all of a large one would take longer
# than timing it. A prime.
DRAWN = 1_048_573


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

    def recall(
        self,
        programs: Sequence[Lowered],
        measure: Callable[[list[Any]], Times],
        untimed: Callable[[], Sequence[Lowered]] = tuple,
    ) -> Times:
        """Return the times of programs from the cache, or measure their executables.

        Args:
            programs: what is timed.
            measure: gives the times of their executables, which those of `untimed` follow.
            untimed: gives further programs that measuring needs; they are compiled in parallel with the others.

        >>> timer = Timer(cache=TimingCache(None))
        >>> double = Lowered.of(lambda x: 2 * x, jnp.ones(4))
        >>> timer.recall([double], lambda executables: Times([len(executables) * 1.5])).us
        [1.5]
        """
        names = [self.target.digest, *(program.digest for program in programs)]
        key = hashlib.sha256(" ".join(names).encode()).hexdigest()[:40]
        times = self.cache.get(key, len(programs))
        if times is not None:
            self.recalled += len(programs)
            return times
        times = measure(compile_all([*programs, *untimed()]))
        self.measured += len(programs)
        self.cache.put(key, times)
        return times

    def medians_us(self, calls: Sequence[Callable[[], Any]], budget_s: float = BUDGET_S) -> list[float]:
        """Time calls in turn, so that a slow moment of the machine falls on all alike; medians over rounds.

        If calls only queue work for a device, a turn waits only for its last call: waiting for each would add the time
        to start a program, which can hide the time of the product.

        >>> sleep, nothing = lx.passes.Timer().medians_us([lambda: time.sleep(1e-3), lambda: None], budget_s=0.01)
        >>> sleep > 1000 > nothing
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
    """Time functions of weights and the same inputs in turn; return medians in microseconds.

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
            else jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
            for number, leaf in enumerate(inputs)
        ]
        calls = [
            functools.partial(executable, weights, *arrays)
            for executable, (_, weights) in zip(executables, functions, strict=True)
        ]
        return Times(timer.medians_us(calls, budget_s))

    return timer.recall([Lowered.of(fn, weights, *inputs) for fn, weights in functions], measure).us


def random_array(seed: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Draw normal values on the host; JAX would compile its generator, and a cast, for each shape.

    After `DRAWN` values they repeat; the count is odd, so that no two rows are equal.
    """
    size = math.prod(like.shape)
    drawn = np.random.default_rng(seed).standard_normal(min(size, DRAWN), np.float32).astype(like.dtype)
    return jnp.asarray(np.resize(drawn, like.shape))


def _medians_us(calls: Sequence[Callable[[], Any]], budget_s: float, *, queued: bool) -> list[float]:
    once: list[float] = []
    for call in calls:
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once.append(max(time.perf_counter() - start, 1e-7))
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
    return [statistics.median(times or [seconds * 1e6]) for times, seconds in zip(rounds, once, strict=True)]
