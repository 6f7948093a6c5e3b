import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.batching.tickets import PATIENCE_S, Reason, Ticket

SIZES = (1, 4, 8)


class NamedTicket(Ticket, kw_only=True, eq=False):
    name: str

    def __repr__(self):
        return f"<{self.name}>"


def named(name, rows=1, key=(), arrival_s=0.0, **more):
    return NamedTicket(rows, key, arrival_s, name=name, **more)


def make(costs=None, bucket_sizes=SIZES, **options):
    """A batcher whose executions cost what a dict of sizes, or of keys of dicts of sizes, says."""
    if costs is not None and not isinstance(next(iter(costs)), tuple):
        costs = {(): costs}
    return Batcher(bucket_sizes, costs=Costs(bucket_sizes, costs), **options)


def fill(batcher, *tickets):
    for ticket in tickets:
        assert batcher.add(ticket) is None
    return tickets


def run(batcher, now=0.0):
    """Runs the next batch to its end, in no time: names, first row, rows and offset of its parts."""
    batch = batcher.next_batch(now)
    if batch is None:
        return None
    batcher.finish(batch, now, None)
    return [(part.ticket.name, part.start, part.rows, part.offset) for part in batch.parts]


def names(batcher, now=0.0):
    """Names in each batch until nothing waits."""
    batches = []
    while (parts := run(batcher, now)) is not None:
        batches.append("".join(part[0] for part in parts))
    return batches


def dropped(batcher):
    """What was dropped and why, since the last call."""
    found = [(ticket.name, reason) for ticket, reason in batcher.dropped]
    batcher.dropped.clear()
    return found


# When.


def test_nothing_waits_then_a_request_runs_at_once_and_the_next_when_that_has_finished():
    batcher = make()
    assert batcher.next_batch(0.0) is None
    fill(batcher, named("a"))
    batch = batcher.next_batch(0.0)
    assert (batch.rows, batch.size, batch.parts[0].ticket.name) == (1, 1, "a")
    assert batcher.rows == len(batcher) == 0
    fill(batcher, named("b"))
    assert batcher.next_batch(0.0) is None
    assert batcher.wake_at is None
    batcher.finish(batch, 1.0, 1.0)
    assert names(batcher) == ["b"]


def test_delay_is_measured_from_the_oldest_request():
    batcher = make(max_delay_s=1.0)
    fill(batcher, named("a", arrival_s=10.0))
    assert batcher.next_batch(10.0) is None
    assert batcher.wake_at == 11.0
    fill(batcher, named("b", arrival_s=10.9))
    assert batcher.next_batch(10.9) is None
    assert batcher.wake_at == 11.0
    assert batcher.next_batch(11.0).rows == 2


def test_delay_leaves_time_to_meet_a_deadline():
    batcher = make({1: 0.1, 4: 0.2, 8: 0.3}, max_delay_s=1.0)
    fill(batcher, named("a"), named("b", deadline_s=0.7))
    assert batcher.next_batch(0.0) is None
    assert batcher.wake_at == pytest.approx(0.4)
    assert names(batcher, 0.4) == ["ba"]
    assert not batcher.dropped


def test_a_full_batch_and_one_that_another_key_ends_do_not_wait():
    batcher = make(max_delay_s=1.0)
    fill(batcher, *(named(name) for name in "abcdefgh"))
    assert run(batcher) is not None
    fill(batcher, named("a", key=(4,)))
    assert run(batcher) is None
    fill(batcher, named("b", key=(8,)))
    assert run(batcher) is not None


# Size.


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
    batcher = make(costs)
    fill(batcher, *(named(index) for index in range(rows)))
    batch = batcher.next_batch(0.0)
    assert batch.size == size
    assert batch.rows == min(rows, size)


def test_size_follows_what_executions_take():
    batcher = make({1: 1.0, 4: 2.0, 8: 2.4})
    for _ in range(100):
        fill(batcher, *(named(index) for index in range(8)))
        batch = batcher.next_batch(0.0)
        batcher.finish(batch, 0.0, 10.0 if batch.size == 8 else 2.0)
        while run(batcher):
            pass
    fill(batcher, *(named(index) for index in range(8)))
    assert batcher.next_batch(0.0).size == 4


def test_an_oversized_request_is_split_and_shares_its_last_batch():
    batcher = make()
    fill(batcher, named("big", 18), named("small", 2))
    assert run(batcher) == [("big", 0, 8, 0)]
    assert run(batcher) == [("big", 8, 8, 0)]
    assert run(batcher) == [("big", 16, 2, 0), ("small", 0, 2, 2)]


# Order.


def test_the_earliest_deadline_goes_first_and_equal_ones_as_they_came():
    batcher = make(bucket_sizes=(1,))
    for name, deadline in (("a", 9.0), ("b", 3.0), ("c", 9.0), ("d", 3.0), ("e", 5.0)):
        fill(batcher, named(name, deadline_s=deadline))
    assert names(batcher) == list("bdeac")


def test_requests_without_a_deadline_keep_their_order_and_are_due_after_a_while():
    batcher = make(bucket_sizes=(1,))
    fill(batcher, named("late", arrival_s=5.0, deadline_s=5.1 + PATIENCE_S))
    fill(batcher, named("a", arrival_s=5.0), named("b", arrival_s=5.2))
    fill(batcher, named("soon", arrival_s=5.3, deadline_s=4.9 + PATIENCE_S))
    assert names(batcher, 5.3) == ["soon", "a", "late", "b"]


def test_the_highest_level_goes_first():
    batcher = make(bucket_sizes=(1,), levels=3)
    fill(batcher, named("c", level=2), named("b", level=1), named("a"), named("d", level=2), named("e"))
    assert names(batcher) == list("aebcd")


def test_what_room_is_left_goes_to_lower_levels_that_can_share_it():
    costs = {1: 1.0, 4: 2.0, 8: 3.0}
    batcher = make({(4,): costs, (2,): {1: 0.1, 4: 0.2, 8: 0.3}}, levels=3)
    fill(batcher, named("c", key=(4,), level=2), named("x", key=(2,), level=1))
    fill(batcher, named("a", key=(4,)), named("b", key=(4,), level=1))
    batch = batcher.next_batch(0.0)
    assert [part.ticket.name for part in batch.parts] == ["a", "b", "c", "x"]
    batcher = make(costs, levels=3)
    fill(batcher, named("c", level=2), named("a"), named("b", level=1))
    assert names(batcher) == ["abc"]


def test_a_lower_level_heads_every_eighth_batch():
    batcher = make(bucket_sizes=(1,), levels=3)
    fill(batcher, *(named("a") for _ in range(30)), *(named("b", level=1) for _ in range(9)))
    fill(batcher, named("c", level=2, arrival_s=-1.0))
    order = "".join(names(batcher))
    assert order[:32] == "aaaaaaac" + "aaaaaaab" * 3


def test_a_lower_level_with_company_of_its_key_takes_its_turn_first():
    batcher = make({1: 1.0}, bucket_sizes=(1,), levels=2)
    fill(batcher, *(named("a") for _ in range(8)), named("b", level=1))
    assert "".join(names(batcher)) == "aaaaaaaba"


# Deadlines.


def test_a_deadline_shorter_than_a_run_is_refused_at_once():
    batcher = make({1: 1.0, 4: 2.0, 8: 3.0})
    assert batcher.add(named("a", deadline_s=0.9)) is Reason.TOO_SHORT
    assert batcher.add(named("b", rows=4, deadline_s=1.9)) is Reason.TOO_SHORT
    assert batcher.add(named("c", rows=12, deadline_s=4.9)) is Reason.TOO_SHORT
    assert batcher.add(named("d", rows=12, deadline_s=5.1)) is None
    assert batcher.rows == 12


def test_what_is_ahead_decides_whether_a_deadline_can_be_met():
    batcher = make({1: 0.1, 4: 0.2, 8: 0.3}, levels=2)
    fill(batcher, named("r", 8))
    running = batcher.next_batch(0.0)  # until 0.3
    # Level 1 is not ahead of level 0, however long it has waited.
    fill(batcher, named("x", 8, arrival_s=-1.0, level=1), named("y", 8, deadline_s=0.9))
    # Before y: alone after what runs.
    assert batcher.add(named("a", arrival_s=0.2, deadline_s=0.39)) is Reason.OVERLOADED
    assert batcher.add(named("a", arrival_s=0.2, deadline_s=0.41)) is None
    # After both: ten rows take 0.5.
    assert batcher.add(named("b", arrival_s=0.2, deadline_s=0.79)) is None
    assert batcher.add(named("c", arrival_s=0.2, deadline_s=0.95)) is None
    batcher.cancel(batcher._queues[0].dated[-1])
    # The level behind waits for all of the first, ten rows and eight that are due later, and its own eight.
    fill(batcher, named("z", 8, deadline_s=9.0))
    assert batcher.add(named("d", arrival_s=0.2, deadline_s=1.39, level=1)) is Reason.OVERLOADED
    assert batcher.add(named("d", arrival_s=0.2, deadline_s=1.41, level=1)) is None
    # The batch takes longer than predicted.
    assert batcher.add(named("e", arrival_s=0.5, deadline_s=0.59)) is Reason.TOO_SHORT
    assert batcher.add(named("e", arrival_s=0.5, deadline_s=0.69)) is Reason.OVERLOADED
    batcher.finish(running, 0.6, 0.6)
    assert not batcher.dropped


def test_requests_without_a_deadline_are_ahead_of_those_that_are_due_later():
    batcher = make({1: 0.1}, bucket_sizes=(1,))
    fill(batcher, *(named(index, arrival_s=index * 0.1) for index in range(10)))  # due from 1.0 to 1.9
    # Due at 1.5: after half of them, which take until 1.4.
    assert batcher.add(named("a", arrival_s=0.9, deadline_s=1.501)) is None
    assert batcher.add(named("b", arrival_s=0.9, deadline_s=1.45)) is Reason.OVERLOADED


def test_what_has_expired_is_dropped_and_the_rest_is_told_when():
    batcher = make(bucket_sizes=(1,))
    fill(batcher, named("a", deadline_s=5.0), named("b", arrival_s=3.0))
    fill(batcher, named("c", deadline_s=2.0), named("d", rows=3, deadline_s=3.0))
    batch = batcher.next_batch(0.0)  # c
    assert batcher.next_deadline() == 2.0
    batcher.expire(1.9)
    assert not batcher.dropped
    batcher.expire(2.0)
    assert dropped(batcher) == [("c", Reason.EXPIRED)]
    assert not batch.wanted
    batcher.finish(batch, 2.1, None)
    assert not batcher.dropped
    assert run(batcher, 2.2) == [("d", 0, 1, 0)]
    assert batcher.next_deadline() == 3.0
    batcher.expire(3.5)
    assert dropped(batcher) == [("d", Reason.EXPIRED)]
    assert batcher.rows == 2
    assert batcher.next_deadline() == 5.0
    assert names(batcher, 4.0) == ["b", "a"]
    assert batcher.next_deadline() == math.inf


def test_a_batch_is_wanted_while_one_of_its_requests_is():
    batcher = make()
    first, second = fill(batcher, named("a"), named("b"))
    batch = batcher.next_batch(0.0)
    batcher.cancel(first)
    assert batch.wanted
    batcher.cancel(second)
    assert not batch.wanted


def test_a_split_request_is_not_begun_if_it_cannot_be_ended_in_time():
    batcher = make({1: 0.1, 4: 0.2, 8: 0.3})
    fill(batcher, named("a", 12, deadline_s=0.6), named("b"))
    assert names(batcher, 0.2) == ["b"]
    assert dropped(batcher) == [("a", Reason.EXPIRED)]


def test_a_split_request_that_expires_between_its_parts_gives_no_more():
    batcher = make(bucket_sizes=(4,))
    fill(batcher, named("a", 8, deadline_s=1.0))
    batch = batcher.next_batch(0.0)
    batcher.finish(batch, 0.5, None)
    assert batcher.next_deadline() == 1.0
    batcher.expire(1.0)
    assert dropped(batcher) == [("a", Reason.EXPIRED)]
    assert batcher.rows == 0


def test_a_result_that_comes_too_late_is_none():
    batcher = make(bucket_sizes=(1,))
    fill(batcher, named("a", deadline_s=5.0))
    batch = batcher.next_batch(0.0)
    batcher.finish(batch, 5.0, 5.0)
    assert dropped(batcher) == [("a", Reason.EXPIRED)]
    assert batcher.next_deadline() == math.inf


def test_a_smaller_size_is_taken_for_an_urgent_request_if_there_is_time():
    costs = {1: 0.1, 4: 0.2, 8: 0.3}
    batcher = make(costs)
    fill(batcher, *(named(name) for name in "abcdefg"), named("u", deadline_s=0.25))
    assert names(batcher) == ["uabc", "defg"]
    # With more than one batch can hold, there is not: it is dropped.
    fill(batcher, *(named(name) for name in "abcdefgh"), named("u", deadline_s=0.25))
    assert names(batcher) == ["abcdefgh"]
    assert dropped(batcher) == [("u", Reason.EXPIRED)]


def test_nothing_is_taken_along_that_the_batch_is_too_late_for():
    batcher = make({1: 1.0, 4: 2.0, 8: 3.0}, levels=2)
    fill(batcher, named("l", level=1, deadline_s=2.0), named("m", level=1, deadline_s=9.0))
    fill(batcher, named("a"))
    assert names(batcher) == ["am"]
    assert dropped(batcher) == [("l", Reason.EXPIRED)]


# Bounds.


def test_the_queue_is_bounded_by_rows_and_cancelling_makes_room():
    batcher = make(max_rows=4)
    first, _ = named("a", 3), None
    fill(batcher, first)
    assert batcher.add(named("b", 2)) is Reason.FULL
    fill(batcher, named("c"))
    batcher.cancel(first)
    batcher.cancel(first)
    assert batcher.rows == 1
    assert run(batcher) == [("c", 0, 1, 0)]


def test_the_queue_is_bounded_by_bytes_but_for_the_only_one():
    batcher = make(max_bytes=100)
    fill(batcher, named("a", nbytes=150))
    assert batcher.add(named("b", nbytes=1)) is Reason.FULL
    assert run(batcher) is not None
    assert batcher.nbytes == 0
    fill(batcher, named("c", nbytes=60), named("d", nbytes=40))
    assert batcher.add(named("e", nbytes=1)) is Reason.FULL
    batcher.cancel(batcher._queues[0].plain[0])
    fill(batcher, named("f", nbytes=60))
    assert batcher.nbytes == 100


def test_a_full_queue_makes_room_for_a_higher_level():
    batcher = make(levels=3, max_rows=8)
    fill(batcher, named("a", 2, level=1), named("b", 2, level=1), *(named(name, level=2) for name in "cdef"))
    assert batcher.add(named("y", level=2)) is Reason.FULL
    assert batcher.add(named("x", 3)) is None
    assert dropped(batcher) == [(name, Reason.OUTRANKED) for name in "fed"]
    assert batcher.add(named("w", level=1)) is Reason.FULL  # the last of its level stays
    # All or nothing: what would not suffice is not thrown out.
    assert batcher.add(named("z", 4)) is Reason.FULL
    assert not batcher.dropped
    assert batcher.add(named("v", 2)) is None
    assert dropped(batcher) == [("b", Reason.OUTRANKED)]
    assert batcher.rows == 8


def test_an_eighth_of_a_full_queue_is_left_to_lower_levels():
    batcher = make(levels=2, max_rows=16)
    fill(batcher, *(named(index, level=1) for index in range(16)))
    assert [batcher.add(named("x")) for _ in range(16)] == [None] * 14 + [Reason.FULL] * 2
    assert [name for name, _ in dropped(batcher)] == list(range(15, 1, -1))


def test_drain_time_counts_what_runs_and_what_waits():
    batcher = make({1: 1.0, 4: 2.0, 8: 3.0}, levels=2)
    fill(batcher, named("a", 8))
    batcher.next_batch(0.0)
    fill(batcher, named("b", 9), named("c", 8, level=1))
    assert batcher.drain_s(1.0) == pytest.approx(2.0 + 3.0 + 3.0 + 1.0)


def test_a_request_cancelled_after_a_part_ran_gives_no_more_parts():
    batcher = make(bucket_sizes=(1, 4))
    (ticket,) = fill(batcher, named("a", 6))
    assert batcher.next_batch(0.0).rows == 4
    batcher.cancel(ticket)
    assert batcher.rows == 0
    assert batcher.next_batch(0.0) is None


@pytest.mark.parametrize("deadline_s", [math.inf, 9.0])
def test_cancelled_requests_do_not_pile_up_behind_a_busy_engine(deadline_s):
    batcher = make(max_rows=10)
    fill(batcher, named("first"))
    for index in range(10_000):
        (ticket,) = fill(batcher, named(index, deadline_s=deadline_s))
        batcher.cancel(ticket)
    assert len(batcher) < 200
    assert batcher.rows == 1


# Keys.


KEYED = {(4,): {1: 1.0, 4: 2.0, 8: 3.0}, (8,): {1: 1.5, 4: 3.0, 8: 5.0}}


def test_a_shorter_request_joins_a_longer_one_if_that_is_less_time():
    batcher = make(KEYED)
    fill(batcher, named("a", key=(4,)), named("b", 3, key=(8,)))
    batch = batcher.next_batch(0.0)  # 3.0 together; 1.0 + 3.0 apart
    assert (batch.key, batch.size, [part.ticket.name for part in batch.parts]) == ((8,), 4, ["a", "b"])


def test_keys_stay_apart_if_together_is_not_less():
    batcher = make(KEYED)
    fill(batcher, named("a", 4, key=(4,)), named("b", 4, key=(8,)))
    batch = batcher.next_batch(0.0)  # 5.0 together; 2.0 + 3.0 apart
    assert (batch.key, batch.size) == ((4,), 4)
    batcher.finish(batch, 0.0, None)
    assert batcher.next_batch(0.0).key == (8,)


def test_the_padding_of_a_longer_batch_is_filled_by_shorter_requests():
    batcher = make(KEYED)
    fill(batcher, named("long", 6, key=(8,)), *(named(index, key=(4,)) for index in range(8)))
    batch = batcher.next_batch(0.0)
    assert (batch.key, batch.size, batch.rows) == ((8,), 8, 8)
    assert [part.ticket.name for part in batch.parts] == ["long", 0, 1]


def test_keys_of_which_neither_is_larger_never_join():
    costs = {(4, 8): {1: 9.0, 4: 9.0, 8: 9.0}, (8, 4): {1: 9.0, 4: 9.0, 8: 9.0}, (8, 8): {1: 9.0, 4: 9.0, 8: 9.0}}
    batcher = make(costs)
    fill(batcher, named("a", key=(4, 8)), named("b", key=(8, 4)))
    assert names(batcher) == ["a", "b"]


def test_joining_does_not_cost_the_head_its_deadline():
    tenths = {key: {size: cost / 10 for size, cost in costs.items()} for key, costs in KEYED.items()}
    for deadline_s, key in ((0.29, (4,)), (0.31, (8,))):
        batcher = make(tenths)
        fill(batcher, named("a", key=(4,), deadline_s=deadline_s), named("b", 3, key=(8,)))
        assert batcher.next_batch(0.0).key == key


# Failures.


def run_poisoned(batcher, poison):
    """Runs everything; what holds a poisoned ticket fails. Names that failed, names that ran, and the batches."""
    failed, ran, batches = [], [], []
    while (batch := batcher.next_batch(0.0)) is not None:
        held = [part.ticket.name for part in batch.parts]
        batches.append(held)
        assert batch.rows == sum(part.rows for part in batch.parts) <= batch.size
        assert [part.offset for part in batch.parts] == [
            sum(part.rows for part in batch.parts[:index]) for index in range(len(batch.parts))
        ]
        if poison & set(held):
            failed += [ticket.name for ticket in batcher.fail(batch, 0.0)]
        else:
            batcher.finish(batch, 0.0, 1.0)
            ran += held
    return failed, ran, batches


def test_only_the_poisoned_request_of_a_batch_fails():
    for culprit in range(8):
        batcher = make()
        fill(batcher, *(named(index) for index in range(8)))
        failed, ran, batches = run_poisoned(batcher, {culprit})
        assert failed == [culprit]
        assert sorted(ran) == [index for index in range(8) if index != culprit]
        assert len(batches) == 1 + 2 * 3


def test_clearing_closes_and_gives_every_request_once():
    """Running, half handed out, waiting with and without a deadline, of a failed batch; not what was closed before."""
    batcher = make(levels=2)
    fill(batcher, *(named(name) for name in "abcdefgh"))
    batcher.fail(batcher.next_batch(0.0), 0.0)
    gone, *_ = fill(batcher, named("gone"), named("x", 3, deadline_s=9.0), named("y", 2, level=1), named("z", key=(4,)))
    batcher.cancel(gone)
    running = batcher.next_batch(0.0)
    assert running.rows == 4
    cleared = batcher.clear()
    assert sorted(ticket.name for ticket in cleared) == sorted("abcdefghxyz")
    assert all(ticket.closed for ticket in cleared)
    assert (batcher.rows, batcher.nbytes, batcher.pending, batcher.running) == (0, 0, False, True)
    for ticket in cleared:
        batcher.cancel(ticket)  # by whoever asked for it
    assert batcher.fail(running, 1.0) == []
    assert batcher.next_batch(1.0) is None
    fill(batcher, named("new"))
    assert names(batcher, 1.0) == ["new"]


def test_a_request_that_fails_alone_fails_at_once():
    batcher = make()
    (ticket,) = fill(batcher, named("a", 20))
    assert run_poisoned(batcher, {"a"}) == (["a"], [], [["a"]])
    assert ticket.closed
    assert batcher.rows == 0


def test_the_runs_after_a_failure_are_bounded():
    bucket_sizes = (1, 64)
    batcher = make(bucket_sizes=bucket_sizes)
    fill(batcher, *(named(index) for index in range(64)))
    failed, ran, batches = run_poisoned(batcher, set(range(64)))
    assert sorted(failed) == list(range(64))
    assert not ran
    assert len(batches) <= 1 + 4 * 6
    # Nothing is run twice any more, until something has run well.
    fill(batcher, *(named(index) for index in range(64)))
    assert len(run_poisoned(batcher, {5})[2]) == 1
    fill(batcher, named("good"))
    run_poisoned(batcher, set())
    fill(batcher, *(named(index) for index in range(64)))
    assert run_poisoned(batcher, {5})[0] == [5]


def test_halves_leave_out_who_has_gone_and_go_before_the_queue():
    batcher = make()
    tickets = fill(batcher, *(named(name) for name in "abcdefgh"))
    batch = batcher.next_batch(0.0)
    fill(batcher, named("next"))
    assert batcher.fail(batch, 0.0) == []
    assert batcher.pending
    batcher.cancel(tickets[1])
    assert run(batcher) == [("a", 0, 1, 0), ("c", 0, 1, 1), ("d", 0, 1, 2)]
    for ticket in tickets[4:]:
        batcher.cancel(ticket)
    assert run(batcher) == [("next", 0, 1, 0)]


def test_a_deadline_passes_between_the_halves():
    batcher = make(bucket_sizes=(4,))
    fill(batcher, named("a", deadline_s=3.0), named("b", deadline_s=2.0))
    assert batcher.fail(batcher.next_batch(0.0), 1.0) == []
    assert run(batcher, 1.0) == [("b", 0, 1, 0)]
    batcher.expire(3.0)
    assert dropped(batcher) == [("a", Reason.EXPIRED)]
    assert run(batcher, 3.0) is None


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
    """Against plain lists of rows, one a key: what a batch holds is the head of the list of the oldest."""
    batcher = make(max_rows=64)
    tickets, rows = [], {0: [], 1: []}

    def check_run():
        batch = batcher.next_batch(0.0)
        if batch is None:
            assert not any(rows.values())
            return
        got = [(part.ticket.name, part.start + index) for part in batch.parts for index in range(part.rows)]
        line = min((line for line in rows.values() if line), key=min)
        assert got == line[: len(got)]
        del line[: len(got)]
        assert batch.rows == len(got) <= batch.size <= 8
        assert [part.offset for part in batch.parts] == [
            sum(part.rows for part in batch.parts[:index]) for index in range(len(batch.parts))
        ]
        assert {part.ticket.key for part in batch.parts} == {batch.key}
        batcher.finish(batch, 0.0, None)

    for action, number, key in actions:
        if action == "add":
            ticket = named(len(tickets), number, (key,), len(tickets) * 1e-3)
            accepted = batcher.add(ticket) is None
            assert accepted == (sum(map(len, rows.values())) + number <= 64)
            if accepted:
                tickets.append(ticket)
                rows[key] += [(ticket.name, index) for index in range(number)]
        elif action == "cancel" and tickets:
            ticket = tickets[number % len(tickets)]
            batcher.cancel(ticket)
            for key in rows:
                rows[key] = [row for row in rows[key] if row[0] != ticket.name]
        elif action == "run":
            check_run()
        assert batcher.rows == sum(map(len, rows.values()))
    while any(rows.values()):
        check_run()
    assert batcher.next_batch(0.0) is None
    assert not batcher.pending
