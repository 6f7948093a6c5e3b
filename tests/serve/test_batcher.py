import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.serve.batcher import Batcher, Ticket


class Named(Ticket):
    def __init__(self, name, *args):
        super().__init__(*args)
        self.name = name


COSTS = {(): {1: 1.0, 4: 2.0, 8: 3.0}}


def sizes_of(batch):
    return [(part.ticket.name, part.start, part.rows, part.offset) for part in batch.parts]


def test_nothing_waits_then_a_request_runs_at_once_when_the_engine_is_idle():
    batcher = Batcher((1, 4, 8))
    assert batcher.next_batch(0.0, True) is None
    batcher.add(Named("a", 1, (), 0.0))
    assert batcher.next_batch(0.0, False) is None
    assert batcher.wake_at is None
    batch = batcher.next_batch(0.0, True)
    assert (batch.rows, batch.size, sizes_of(batch)) == (1, 1, [("a", 0, 1, 0)])
    assert batcher.rows == len(batcher) == 0


def test_delay_is_measured_from_the_oldest_request():
    batcher = Batcher((1, 4, 8), max_delay_s=1.0)
    batcher.add(Named("a", 1, (), 10.0))
    assert batcher.next_batch(10.0, True) is None
    assert batcher.wake_at == 11.0
    batcher.add(Named("b", 1, (), 10.9))
    assert batcher.next_batch(10.9, True) is None
    assert batcher.wake_at == 11.0
    assert batcher.next_batch(11.0, True).rows == 2


def test_a_full_batch_does_not_wait():
    batcher = Batcher((1, 4, 8), max_delay_s=1.0)
    for name in "abcdefgh":
        batcher.add(Named(name, 1, (), 0.0))
    assert batcher.next_batch(0.0, True).size == 8


def test_a_request_of_another_key_ends_the_wait_and_the_batch():
    batcher = Batcher((1, 4, 8), max_delay_s=1.0)
    batcher.add(Named("a", 1, (4,), 0.0))
    batcher.add(Named("b", 1, (8,), 0.0))
    batcher.add(Named("c", 1, (4,), 0.0))
    batch = batcher.next_batch(0.0, True)
    assert (batch.key, sizes_of(batch)) == ((4,), [("a", 0, 1, 0)])
    assert batcher.next_batch(0.0, True).key == (8,)


@pytest.mark.parametrize(
    ("costs", "rows", "size"),
    [
        ({1: 1.0, 4: 2.0, 8: 2.4}, 5, 8),  # 2.4/5 < 2/4
        ({1: 1.0, 4: 2.0, 8: 3.0}, 3, 4),
        ({1: 1.0, 4: 2.0, 8: 6.0}, 5, 4),  # 6/5 > 2/4: two runs are cheaper
        ({1: 1.0, 4: 9.0, 8: 18.0}, 8, 1),  # only single rows pay
        ({1: 1.0, 4: 4.0, 8: 8.0}, 4, 4),  # equal cost per row: the larger
    ],
)
def test_size_is_the_one_with_the_least_cost_per_real_row(costs, rows, size):
    batcher = Batcher((1, 4, 8), costs={(): costs})
    for index in range(rows):
        batcher.add(Named(index, 1, (), 0.0))
    batch = batcher.next_batch(0.0, True)
    assert batch.size == size
    assert batch.rows == min(rows, size)


def test_an_oversized_request_is_split_and_shares_its_last_batch():
    batcher = Batcher((1, 4, 8))
    batcher.add(Named("big", 18, (), 0.0))
    batcher.add(Named("small", 2, (), 0.0))
    batches = [batcher.next_batch(0.0, True) for _ in range(3)]
    assert [sizes_of(batch) for batch in batches] == [
        [("big", 0, 8, 0)],
        [("big", 8, 8, 0)],
        [("big", 16, 2, 0), ("small", 0, 2, 2)],
    ]


def test_the_queue_is_bounded_by_rows_and_cancelling_makes_room():
    batcher = Batcher((1, 4), max_rows=4)
    first = Named("a", 3, (), 0.0)
    assert batcher.add(first)
    assert not batcher.add(Named("b", 2, (), 0.0))
    assert batcher.add(Named("c", 1, (), 0.0))
    batcher.cancel(first)
    batcher.cancel(first)
    assert batcher.rows == 1
    assert sizes_of(batcher.next_batch(0.0, True)) == [("c", 0, 1, 0)]


def test_a_request_cancelled_after_a_part_ran_gives_no_more_parts():
    batcher = Batcher((1, 4))
    ticket = Named("a", 6, (), 0.0)
    batcher.add(ticket)
    assert batcher.next_batch(0.0, True).rows == 4
    batcher.cancel(ticket)
    assert batcher.rows == 0
    assert batcher.next_batch(0.0, True) is None


def test_cancelled_requests_do_not_pile_up_behind_a_busy_engine():
    batcher = Batcher((1, 4), max_rows=10)
    batcher.add(Named("first", 1, (), 0.0))
    for index in range(10_000):
        ticket = Named(index, 1, (), 0.0)
        assert batcher.add(ticket)
        batcher.cancel(ticket)
    assert len(batcher) < 200
    assert batcher.rows == 1


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 20), st.integers(0, 1)),
            st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0)),
            st.tuples(st.just("run"), st.just(0), st.just(0)),
        ),
        max_size=60,
    )
)
def test_every_row_that_is_not_cancelled_runs_once_and_in_order(actions):
    """Against a plain list of rows: what a batch holds is the head of the list."""
    batcher = Batcher((1, 4, 8), max_rows=64)
    tickets, rows = [], []

    def run():
        batch = batcher.next_batch(0.0, True)
        if batch is None:
            assert not rows
            return
        got = [(part.ticket.name, part.start + index) for part in batch.parts for index in range(part.rows)]
        assert got == rows[: len(got)]
        del rows[: len(got)]
        assert batch.rows == len(got) <= batch.size <= 8
        assert [part.offset for part in batch.parts] == [
            sum(part.rows for part in batch.parts[:index]) for index in range(len(batch.parts))
        ]
        assert {part.ticket.key for part in batch.parts} == {batch.key}

    for action, number, key in actions:
        if action == "add":
            ticket = Named(len(tickets), number, (key,), 0.0)
            accepted = batcher.add(ticket)
            assert accepted == (len(rows) + number <= 64)
            if accepted:
                tickets.append(ticket)
                rows += [(ticket.name, index) for index in range(number)]
        elif action == "cancel" and tickets:
            ticket = tickets[number % len(tickets)]
            batcher.cancel(ticket)
            rows = [row for row in rows if row[0] != ticket.name]
        else:
            run()
        assert batcher.rows == len(rows)
    while rows:
        run()
    assert batcher.next_batch(0.0, True) is None


@pytest.mark.parametrize("max_delay_s", [0.0, 0.002])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_delay_bound_in_short_simulations(max_delay_s, seed):
    simulate(300, max_delay_s, random.Random(seed))


@pytest.mark.parametrize("max_delay_s", [0.0, 0.002])
def test_a_hundred_thousand_arrivals(max_delay_s):
    batches = simulate(100_000, max_delay_s, random.Random(7))
    # A load at two thirds of capacity is only carried if requests really share executions.
    assert batches < 60_000


def simulate(arrivals, max_delay_s, rng):
    """Runs a queue and one engine on a made-up clock; checks what must hold of any schedule."""
    cost = {1: 0.0010, 4: 0.0015, 8: 0.0020}
    batcher = Batcher((1, 4, 8), max_delay_s=max_delay_s, max_rows=200, costs={(): cost})
    now, free_at, last = 0.0, 0.0, None
    served, order, refused, cancelled, added = {}, [], 0, set(), 0
    events = []  # (time, kind, payload): 0 finished, 1 arrival, 2 cancel, 3 wake
    serial = 0

    def push(when, kind, payload=None):
        nonlocal serial
        serial += 1
        heapq.heappush(events, (when, kind, serial, payload))

    push(0.0, 1)
    batches = 0
    while events:
        now, kind, _, payload = heapq.heappop(events)
        if kind == 1:
            rows = 1 if rng.random() < 0.95 else rng.randint(2, 20)
            ticket = Named(added + refused, rows, (), now)
            if batcher.add(ticket):
                added += 1
                if rng.random() < 0.02:
                    push(now + rng.random() * 0.003, 2, ticket)
            else:
                refused += 1
            if added + refused < arrivals:
                burst = rng.random() < 0.3
                push(now if burst else now + rng.expovariate(1000.0), 1)
        elif kind == 2 and payload.name not in served:
            batcher.cancel(payload)
            cancelled.add(payload.name)
        idle = now >= free_at
        batch = batcher.next_batch(now, idle)
        if batch is not None:
            assert idle
            batches += 1
            assert 1 <= batch.rows <= batch.size <= 8
            for part in batch.parts:
                name = part.ticket.name
                assert name not in cancelled
                assert served.get(name, 0) == part.start
                served[name] = part.start + part.rows
                if part.start == 0:
                    order.append(name)
                    # While the engine is free, nobody waits longer than the delay.
                    assert now <= max(part.ticket.arrival_s + max_delay_s, free_at) + 1e-9
                last = part
            free_at = now + cost[batch.size]
            push(free_at, 0)
        elif batcher.wake_at is not None:
            assert idle
            push(batcher.wake_at, 3)
    assert last is not None
    assert order == sorted(order)
    assert batcher.rows == 0
    complete = {name for name in served if name not in cancelled}
    assert len(complete) + len(cancelled) == added
    return batches
