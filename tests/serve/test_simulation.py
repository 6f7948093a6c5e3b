"""A million arrivals (a quarter of them by default), and small cases beside the best of all schedules."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
from simulation import Arrivals, Simulation, bursty, diurnal, poisson

from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.batching.tickets import Reason, Ticket

INF = math.inf
# 64 rows in 2 ms: 32,000 rows a second at most.
COSTS = {(): {1: 0.0002, 4: 0.0003, 16: 0.0007, 64: 0.002}}
CAPACITY = 64 / 0.002
sizes = pytest.mark.parametrize("size", [0.25, pytest.param(1, marks=pytest.mark.slow)])
KEYED = {(length,): {size: seconds * length / 128 for size, seconds in COSTS[()].items()} for length in (32, 64, 128)}


@sizes
def test_poisson(size):
    rng = np.random.default_rng(0)
    times = poisson(rng, int(280_000 * size), 0.7 * CAPACITY)
    run = Simulation(Arrivals.mixed(rng, times, cancel=0.01), COSTS, rng, noise=0.1).run()
    assert set(run.outcomes) == {"ok", "cancelled"}
    assert run.outcomes["ok"] > 0.98 * len(times)
    # First come, first served, and each request in the next batch or the one after.
    assert max(run.waits[1 - 1]) < 0.2
    assert np.median(run.waits[0]) < 0.006


@sizes
def test_bursts_of_everything_mixed(size):
    rng = np.random.default_rng(1)
    times = bursty(rng, int(200_000 * size), 0.35 * CAPACITY)
    arrivals = Arrivals.mixed(
        rng, times, rows=((1, 0.8), (3, 0.15), (20, 0.04), (150, 0.01)), keys=tuple(KEYED), levels=(0.1, 0.6, 0.3),
        timeouts=((INF, 0.5), (0.002, 0.1), (0.02, 0.2), (0.5, 0.2)), cancel=0.03, poison=1e-4,
    )  # fmt: skip
    run = Simulation(arrivals, KEYED, rng, noise=0.2, levels=3, max_rows=3000, max_bytes=250_000).run()
    expected = {"ok", "cancelled", "failed", *Reason}
    assert set(run.outcomes) == expected
    assert run.outcomes["ok"] > 0.5 * len(times)
    assert run.outcomes["failed"] <= 2 * arrivals.poison.sum()


@sizes
def test_days_with_peaks_of_twice_the_capacity(size):
    """Deadlines of 50 ms: at the peaks goodput stays at the capacity, and what is refused is refused at once."""
    rng = np.random.default_rng(2)
    times = diurnal(rng, int(200_000 * size), CAPACITY, peak=1.99, days=int(4 * size))
    arrivals = Arrivals.mixed(rng, times, timeouts=((0.05, 1.0),))
    run = Simulation(arrivals, COSTS, rng, noise=0.05).run()
    # Half of the time the load is over the capacity, on average 1 + 2 / pi of it.
    possible = 0.5 + 0.5 * (1 - 2 / math.pi)
    assert run.outcomes["ok"] > 0.9 * possible * len(times)
    assert run.outcomes[Reason.OVERLOADED] > 0.9 * (len(times) - run.outcomes["ok"])


@sizes
def test_no_deadlines_and_three_times_the_capacity(size):
    """The queue stays full: refusals only, and the lower levels get their share."""
    rng = np.random.default_rng(3)
    times = poisson(rng, int(120_000 * size), 3 * CAPACITY)
    arrivals = Arrivals.mixed(rng, times, rows=((1, 0.9), (10, 0.1)), keys=((32,), (128,)), levels=(0.3, 0.4, 0.3))
    run = Simulation(arrivals, KEYED, rng, levels=3, max_rows=2000).run()
    assert set(run.outcomes) == {"ok", Reason.FULL, Reason.OUTRANKED}
    assert run.rows_done / run.busy_s > 0.9 * CAPACITY
    assert min(len(run.waits[level]) for level in range(3)) > 500 * size


@sizes
def test_batches_that_fail(size):
    rng = np.random.default_rng(4)
    times = poisson(rng, int(100_000 * size), 0.3 * CAPACITY)
    arrivals = Arrivals.mixed(rng, times, rows=((1, 0.99), (100, 0.01)), timeouts=((INF, 0.5), (0.1, 0.5)), poison=1e-3)
    arrivals.rows[arrivals.poison] = 1
    run = Simulation(arrivals, COSTS, rng, max_rows=100_000).run()
    poisoned = int(arrivals.poison.sum())
    assert 0.9 * poisoned < run.outcomes["failed"] <= poisoned
    # Halving costs at most four runs for each doubling of the size.
    assert set(run.outcomes) <= {"ok", "failed", Reason.EXPIRED, Reason.OVERLOADED}
    broken = Simulation(arrivals, COSTS, rng, broken=0.02, max_rows=100_000).run()
    assert broken.outcomes["failed"] < 0.02 * len(times)


@sizes
def test_waiting_for_company(size):
    rng = np.random.default_rng(5)
    times = poisson(rng, int(100_000 * size), 0.1 * CAPACITY)
    arrivals = Arrivals.mixed(rng, times, timeouts=((INF, 0.8), (0.01, 0.2)), cancel=0.01)
    prompt = Simulation(arrivals, COSTS, rng).run()
    patient = Simulation(arrivals, COSTS, rng, max_delay_s=0.002).run()
    assert patient.batches < 0.7 * prompt.batches
    assert max(patient.waits[0]) < 0.002 + 2 * COSTS[()][16]
    assert set(patient.outcomes) == {"ok", "cancelled"}


# Small cases beside the best schedule.


def cost_of(bucket_sizes, costs, arrivals):
    """Engine seconds that the batcher spends."""
    batcher = Batcher(bucket_sizes, costs=Costs(bucket_sizes, {(): costs}))
    coming = iter(arrivals)
    entry = next(coming, None)
    now = total = 0.0
    while True:
        while entry is not None and entry[0] <= now:
            batcher.add(Ticket(entry[1], (), entry[0]))
            entry = next(coming, None)
        batch = batcher.next_batch(now)
        if batch is not None:
            total += costs[batch.size]
            now += costs[batch.size]
            batcher.finish(batch, now, None)
        elif entry is None:
            return total
        else:
            now = entry[0]


def least_cost(bucket_sizes, costs, arrivals):
    """Engine seconds of the best schedule that knows what will come.

    All schedules are tried that start a run whenever the engine is free and a row waits: every compiled size at every
    start, filled with the rows that wait. (Rows are alike, so which of them go first changes nothing.)
    """

    @functools.cache
    def least(now, coming, waiting):
        while coming < len(arrivals) and arrivals[coming][0] <= now:
            waiting += arrivals[coming][1]
            coming += 1
        if waiting:
            return min(cost + least(now + cost, coming, waiting - min(size, waiting)) for size, cost in costs.items())
        return least(arrivals[coming][0], coming, 0) if coming < len(arrivals) else 0.0

    return least(0.0, 0, 0)


def small_case(rng, load, shape):
    """A bucket_sizes, costs, and up to eight arrivals of up to ten rows at a share of what the engine can do."""
    bucket_sizes = rng.choice([(1, 4, 8), (1, 2, 4, 8), (2, 8), (1, 8), (1, 2, 4)])
    if shape == "affine":
        fixed, each = rng.random() * 3, rng.choice([0.1, 0.3, 1.0])
        costs = {size: fixed + each * size for size in bucket_sizes}
    elif shape == "concave":
        power = rng.uniform(0.2, 1)
        costs = {size: size**power for size in bucket_sizes}
    else:
        steps = itertools.accumulate(rng.random() * size for size in bucket_sizes)
        costs = dict(zip(bucket_sizes, steps, strict=True))
    rate = load * bucket_sizes[-1] / costs[bucket_sizes[-1]] / 2.6  # 2.6 rows a request on average
    now, arrivals = 0.0, []
    for _ in range(rng.randint(1, 8)):
        arrivals.append((now, 1 if rng.random() < 0.7 else rng.randint(2, 10)))
        now += rng.expovariate(rate) if load < INF else 0.0
    return bucket_sizes, costs, tuple(arrivals)


@pytest.mark.parametrize("shape", ["affine", "concave", "steps"])
@pytest.mark.parametrize("load", [0.2, 0.5, 0.8, 1.5, INF])
def test_cost_is_near_that_of_the_best_schedule(load, shape):
    """Over a hundred random cases, at most a tenth more engine time than the best schedules take."""
    rng = random.Random(f"{load} {shape}")
    cases = [small_case(rng, load, shape) for _ in range(100)]
    spent = [cost_of(*case) for case in cases]
    best = [least_cost(*case) for case in cases]
    assert all(ours >= least - 1e-9 for ours, least in zip(spent, best, strict=True))
    assert sum(spent) <= 1.1 * sum(best)
    assert sum(ours / least for ours, least in zip(spent, best, strict=True)) <= 1.1 * len(cases)
