"""Whose turn it is: against schedules worked by hand, an ideal fluid share, and a theorem."""

import itertools

import numpy as np
import pytest

from lepton_xla.serve.batching.shares import Share, Shares


def share(weight=1.0, **options):
    return Share(lambda on_loop: 0.0, lambda: None, weight, **options)


def schedule(weights, seconds, turns):
    """Who has each turn, of shares that always wait."""
    shares = Shares()
    members = [share(weight) for weight in weights]
    for member in members:
        shares.ask(member)
    order = ""
    for _ in range(turns):
        member = shares.next()
        index = members.index(member)
        order += "ABCDEFGH"[index]
        shares.ask(member)  # during its own turn
        shares.charge(seconds[index])
    return order


@pytest.mark.parametrize(
    ("weights", "seconds", "order"),
    [
        # Accounts of A, B before each turn: 0 0, 1 0, 1 3, 2 3, 3 3 (B has waited longer), 3 6, ...
        ((1, 1), (1, 3), "ABAABAAABAAAB"),
        # 0 0, .5 0, .5 1, 1 1 (B), 1 2, 1.5 2, 2 2 (B), ...
        ((2, 1), (1, 1), "ABABAABAABAAB"),
        ((1, 1, 1), (1, 1, 1), "ABCABCABC"),
        # C pays 4 for each of its batches: 0 0 0, 1 0 0, 1 1 0, 1 1 4, then A and B in turn up to 4, then C.
        ((1, 1, 0.25), (1, 1, 1), "ABCABABABCABABABABC"),
    ],
)
def test_the_schedule_worked_by_hand(weights, seconds, order):
    assert schedule(weights, seconds, len(order)) == order


def test_who_always_waits_is_never_further_than_a_batch_from_the_ideal_fluid_share():
    rng = np.random.default_rng(1)
    for count in (2, 3, 7, 50):
        weights = rng.choice([0.25, 1.0, 2.0, 8.0], count)
        longest = rng.uniform(1e-4, 2e-2, count)
        shares, members = Shares(), [share(weight) for weight in weights]
        for member in members:
            shares.ask(member)
        had, slack = np.zeros(count), (longest / weights).max()
        for _ in range(1000):
            index = members.index(shares.next())
            seconds = rng.uniform(0, longest[index])
            had[index] += seconds
            shares.ask(members[index])
            shares.charge(seconds)
            # The fluid share of all time so far, over weight, is the same number for each.
            fluid = had.sum() / weights.sum()
            assert np.abs(had / weights - fluid).max() <= slack + 1e-9
        np.testing.assert_allclose([member.used_s for member in members], had)
        np.testing.assert_allclose(had / had.sum(), weights / weights.sum(), atol=slack / fluid)


def test_shares_that_come_and_go_get_no_more_than_a_batch_each_out_of_proportion_while_both_wait():
    # Goyal, Vin and Cheng (1997), theorem 1: over any time in which i and j wait, served time over weight differs by at
    # most a longest batch of i over its weight and one of j over its own.
    rng = np.random.default_rng(2)
    count = 5
    weights, longest = np.array([1.0, 1.0, 2.0, 4.0, 0.5]), np.array([1e-3, 2e-2, 5e-3, 1e-2, 1e-4])
    shares, members = Shares(), [share(weight) for weight in weights]
    left, wakes, now = np.zeros(count, int), np.zeros(count), 0.0
    served = np.zeros(count)
    events = []  # after each turn: time served to each, and who waited all through it
    for _ in range(10_000):
        for index in np.flatnonzero((left == 0) & (wakes <= now)):
            left[index] = rng.geometric(0.02)
            shares.ask(members[index])
        member = shares.next()
        if member is None:
            now = wakes[left == 0].min()
            continue
        index = members.index(member)
        waited = left > 0
        seconds = rng.uniform(0.2, 1) * longest[index]
        now += seconds
        served[index] += seconds
        left[index] -= 1
        if left[index]:
            shares.ask(member)
        else:
            wakes[index] = now + rng.exponential(0.3)
        shares.charge(seconds)
        events.append((served / weights, waited & (left > 0)))
    normalized, waiting = (np.array(each) for each in zip(*events, strict=True))
    for i, j in itertools.combinations(range(count), 2):
        both, gap = waiting[:, i] & waiting[:, j], normalized[:, i] - normalized[:, j]
        bound = longest[i] / weights[i] + longest[j] / weights[j] + 1e-9
        at = np.flatnonzero(both)
        for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
            assert np.ptp(gap[run]) <= bound, (i, j, run[0])
    assert waiting.sum(axis=1).max() == count


def test_who_comes_new_waits_for_the_batch_that_runs_and_no_other():
    shares, members = Shares(), [share() for _ in range(8)]
    for member in members:
        shares.ask(member)
    for _ in range(21):
        shares.ask(shares.next())
        shares.charge(1.0)
    running, newcomer = shares.next(), share()
    shares.ask(newcomer)
    shares.ask(running)
    shares.charge(1.0)
    assert shares.next() is newcomer


def test_nobody_saves_up_time_by_being_idle_nor_owes_for_having_been_alone():
    shares, idle, busy = Shares(), share(), share()
    for _ in range(1000):
        shares.ask(busy)
        assert shares.next() is busy
        shares.charge(1.0)
    order = ""
    shares.ask(busy)
    shares.ask(idle)
    for _ in range(8):
        member = shares.next()
        order += "IB"[member is busy]
        shares.ask(member)
        shares.charge(1.0)
    assert order in ("BIBIBIBI", "IBIBIBIB")


def test_one_has_the_turn_at_a_time_and_asking_twice_is_asking_once():
    shares, one, two = Shares(), share(short=True), share()
    assert shares.next() is None
    for member in (one, one, two):
        shares.ask(member)
    assert (len(shares.waiting), shares.long) == (2, 1)
    assert shares.next() is one
    assert shares.next() is None
    shares.charge(1.0)
    assert not one.waiting
    assert two.waiting
    assert (one.used_s, one.turns) == (1.0, 1)
    assert shares.next() is two
    shares.charge(0.0)
    assert shares.next() is None


def test_who_has_left_gets_no_turn():
    shares, one, two = Shares(), share(), share()
    shares.ask(one)
    shares.ask(two)
    shares.leave(one)
    assert shares.next() is two
    shares.ask(two)
    shares.leave(two)
    shares.charge(1.0)
    shares.ask(two)
    assert shares.next() is None
    assert shares.long == 0
