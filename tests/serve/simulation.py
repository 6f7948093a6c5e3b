"""A made-up clock, arrivals and an engine around a `Batcher`, which check what must hold of any schedule.

The simulation does with the batcher what the scheduler does: it adds, asks for a batch when something came or
finished, tells the end of each, and rings at the next deadline.
"""

import collections
import dataclasses
import heapq
import math
from collections import Counter
from typing import Any

import numpy as np

from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.batching.tickets import Reason, Ticket

INF = math.inf


class Request(Ticket, kw_only=True, eq=False):
    """A ticket that knows what has become of it.

    Attributes:
        number: its own.
        outcome: None while it waits or runs; "ok", "failed", "cancelled" or a `Reason`.
        done: rows that ran well.
        poison: whether every batch that holds it fails.
    """

    number: int
    poison: bool
    outcome: Any = None
    done: int = 0


@dataclasses.dataclass
class Arrivals:
    """What comes: one entry a request, in order of time."""

    times: np.ndarray
    rows: np.ndarray
    keys: list[tuple[int, ...]]
    levels: np.ndarray
    timeouts: np.ndarray
    cancel_after: np.ndarray
    poison: np.ndarray

    @classmethod
    def mixed(cls, rng, times, *, rows=((1, 1.0),), keys=((),), levels=(1.0,), timeouts=((INF, 1.0),), cancel=0.0,
              poison=0.0):  # fmt: skip
        """Draws everything but the times; `rows` and `timeouts` are pairs of a value and its share."""
        count = len(times)

        def draw(pairs):
            values, shares = zip(*pairs, strict=True)
            return rng.choice(np.array(values), count, p=np.array(shares))

        leaves = rng.random(count) < cancel
        return cls(
            times=times,
            rows=draw(rows),
            keys=[keys[index] for index in rng.integers(0, len(keys), count)],
            levels=rng.choice(len(levels), count, p=np.array(levels)),
            timeouts=draw(timeouts),
            cancel_after=np.where(leaves, rng.exponential(0.003, count), INF),
            poison=rng.random(count) < poison,
        )


def poisson(rng, count, rate):
    """Times of arrivals at a constant rate."""
    return np.cumsum(rng.exponential(1 / rate, count))


def bursty(rng, count, rate, together=40):
    """Times of arrivals in bursts, of `together` on average, that come within nothing."""
    sizes = rng.geometric(1 / together, count)
    starts = np.cumsum(rng.exponential(together / rate, count))
    return np.repeat(starts, sizes)[:count]


def diurnal(rng, count, mean_rate, peak, days=4):
    """Times of arrivals whose rate swings like a day's around its mean, up to `peak` times as much."""
    length = count / mean_rate / days
    times = poisson(rng, count, mean_rate)
    swing = peak - 1
    # Time is stretched where the rate is low: t -> t - swing * length / (2 pi) * sin(2 pi t / length), inverted.
    grid = np.linspace(0, times[-1], 200_000)
    warped = grid - min(swing, 0.999) * length / (2 * math.pi) * np.sin(2 * math.pi * grid / length)
    return np.interp(times, warped, grid)


class Simulation:
    """Runs arrivals through a batcher and one engine.

    Attributes:
        outcomes: how many requests came to which end.
        batches: executions.
        busy_s: seconds the engine ran.
        waits: seconds from arrival to result, by level.
        heads: how many batches each level headed while a lower one waited.
    """

    def __init__(self, arrivals, costs, rng, *, bucket_sizes=(1, 4, 16, 64), noise=0.0, broken=0.0, **options):
        self.arrivals = arrivals
        self.costs = costs
        self.batcher = Batcher(bucket_sizes, costs=Costs(bucket_sizes, costs), **options)
        self.rng = rng
        self.noise = noise
        self.broken = broken
        self.outcomes = Counter()
        self.batches = 0
        self.busy_s = 0.0
        self.rows_done = 0
        self.waits = collections.defaultdict(list)
        self._batch = None
        self._end = INF
        self._alarm = INF
        self._leaving = []
        self._factors = iter(())
        self._added = 0

    def run(self):
        """Runs to the end; every request has one outcome then."""
        arrivals = self.arrivals
        entries = zip(
            arrivals.times.tolist(), arrivals.rows.tolist(), arrivals.keys, arrivals.levels.tolist(),
            arrivals.timeouts.tolist(), arrivals.cancel_after.tolist(), arrivals.poison.tolist(),
            strict=True,
        )  # fmt: skip
        entry = next(entries, None)
        while True:
            now = min(self._end, self._alarm, self._leaving[0][0] if self._leaving else INF)
            if entry is not None and entry[0] <= now:
                now = entry[0]
                self._arrive(*entry)
                entry = next(entries, None)
            elif now == INF:
                break
            elif now == self._end:
                self._finish(now)
            elif now == self._alarm:
                self._ring(now)
            else:
                self._leave(heapq.heappop(self._leaving)[2])
            if self._batch is None:
                self._pump(now)
            if self.batcher.dropped:
                self._tell(now)
        self._check_end()
        return self

    def _arrive(self, now, rows, key, level, timeout, cancel_after, poison):
        request = Request(rows, key, now, now + timeout, level, 100 * rows, number=self._added, poison=poison)
        self._added += 1
        reason = self.batcher.add(request)
        if reason is not None:
            self._close(request, reason)
            return
        if request.deadline_s < self._alarm:
            self._alarm = request.deadline_s
        if cancel_after != INF:
            heapq.heappush(self._leaving, (now + cancel_after, request.number, request))

    def _leave(self, request):
        if request.outcome is None:
            self.batcher.cancel(request)
            self._close(request, "cancelled")

    def _ring(self, now):
        self.batcher.expire(now)
        self._alarm = self.batcher.next_deadline()
        assert self._alarm > now

    def _pump(self, now):
        batcher = self.batcher
        batch = batcher.next_batch(now)
        if batch is None:
            if batcher.wake_at is not None:
                assert batcher.wake_at > now
                self._alarm = min(self._alarm, batcher.wake_at)
            else:
                # Work-conserving: an engine that is free has nothing to do.
                assert batcher.rows == 0
                assert not batcher.pending
            return
        assert 0 < batch.rows <= batch.size
        assert batch.size in batcher.bucket_sizes
        offset = 0
        for part in batch.parts:
            request = part.ticket
            # Nobody who has gone, or has an answer, or whose time is over, is run.
            assert request.outcome is None
            assert not request.closed
            assert now < request.deadline_s
            assert part.offset == offset
            offset += part.rows
        assert offset == batch.rows
        self._batch = batch
        self.batches += 1
        seconds = self.costs[batch.key][batch.size] * self._factor()
        self.busy_s += seconds
        self._end = now + seconds
        self._started = now

    def _factor(self):
        if not self.noise:
            return 1.0
        factor = next(self._factors, None)
        if factor is None:
            factors = self.rng.lognormal(0.0, self.noise, 4096)
            factors[self.rng.random(4096) < 1e-3] *= 30
            self._factors = iter(factors.tolist())
            factor = next(self._factors)
        return factor

    def _finish(self, now):
        batch, self._batch, self._end = self._batch, None, INF
        if any(part.ticket.poison for part in batch.parts) or (self.broken and self.rng.random() < self.broken):
            for request in self.batcher.fail(batch, now):
                self._close(request, "failed")
            return
        self.batcher.finish(batch, now, now - self._started)
        self.rows_done += batch.rows
        for part in batch.parts:
            request = part.ticket
            if request.closed:
                continue
            request.done += part.rows
            assert request.done <= request.rows
            if request.done == request.rows:
                assert now < request.deadline_s
                self._close(request, "ok")
                self.waits[request.level].append(now - request.arrival_s)

    def _tell(self, now):
        for request, reason in self.batcher.dropped:
            assert reason is Reason.OUTRANKED or (reason is Reason.EXPIRED and now <= request.deadline_s)
            self._close(request, reason)
        self.batcher.dropped.clear()

    def _close(self, request, outcome):
        assert request.outcome is None, f"answered twice: {request.outcome}, {outcome}"
        request.outcome = outcome
        self.outcomes[outcome] += 1

    def _check_end(self):
        assert self.outcomes.total() == self._added == len(self.arrivals.times), "a request was lost"
        batcher = self.batcher
        assert batcher.rows == batcher.nbytes == 0
        assert batcher.next_deadline() == INF
        assert not batcher.pending
        assert not batcher.dropped
