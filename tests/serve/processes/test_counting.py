"""Counts of many models, which do not fit into one packet, and what is left of them when a worker ends."""

import asyncio

import msgspec

from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import Child
from lepton_xla.serve.processes.packets import MOST_BYTES
from lepton_xla.serve.processes.tally import Tally


def counted(models, requests=1):
    server = ServerMetrics()
    for number in range(models):
        one = server.opened(f"model{number}", "1")
        for _ in range(requests):
            one.answered(0.001, 100, 200)
        one.now = {"queue_rows": 2}
    server.codes[503] += 1
    return server


def test_counts_come_whole_in_packets_that_are_small_enough():
    counts = counted(200).counts()
    messages = control.in_pieces(counts, 7)
    assert len(messages) > 3
    assert [message.last for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].number == 7
    child = Child("worker 1")
    for message in messages:
        line = msgspec.json.encode(message)
        assert len(line) < MOST_BYTES
        child.count(msgspec.json.decode(line, type=control.Counts))
    assert child.counts == msgspec.json.decode(msgspec.json.encode(counts))
    for message in control.in_pieces(counted(1).counts()):
        child.count(message)
    assert set(child.counts) == {"", "model0/1"}, "a report replaces the one before"


def test_a_worker_that_ends_leaves_what_it_counted_and_no_gauges():
    """And one that is asked for the total gets that of all others, in pieces too."""

    async def main():
        first, second = Child("worker 1"), Child("worker 2")
        told = []
        first.send = told.append
        tally = Tally([first, second])
        for message in control.in_pieces(counted(100, requests=3).counts()):
            second.count(message)
        tally.retire(second)
        for message in control.in_pieces(counted(100).counts()):
            second.count(message)
        tally.count(first, 5)
        return told

    told = asyncio.run(main())
    assert len(told) > 2
    others = {}
    for message in told:
        others |= message.counts
    total = counted(100, requests=2).plus(others)
    one = total.of("model7", "1")
    assert (one.requests, one.now) == (6, {"queue_rows": 4})
    assert total.all_codes() == {200: 600, 503: 3}
