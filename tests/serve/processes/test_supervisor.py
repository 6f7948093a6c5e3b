"""The supervisor's own decisions, without its processes."""

import asyncio
import errno
import os

import pytest

from lepton_xla.serve import Options
from lepton_xla.serve.processes import control, supervisor
from lepton_xla.serve.processes.supervisor import Supervisor


class Process:
    killed = False

    def kill(self):
        self.killed = True


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_says_nothing_for_a_minute_is_killed_and_no_other(monkeypatch, which):
    """Its event loop will not turn again, so neither health of its own nor a message to it would help."""
    now = 1000.0
    monkeypatch.setattr(supervisor, "monotonic", lambda: now)
    keeper = Supervisor("x.lepton", Options(port=0), 2)
    children = keeper._workers
    for child in children:
        child.process, child.ready = Process(), True
        keeper._told(child, control.Counts({}))
    silent, other = children[which], children[1 - which]
    for _ in range(120):
        now += 0.5
        keeper._told(other, control.Counts({}))
        keeper._end_silent(now, 0.5)
        assert not silent.process.killed
    keeper._end_silent(now + 0.5, 0.5)
    assert silent.process.killed
    assert not other.process.killed
    assert "said nothing for 60 s" in silent.reason


def test_who_has_not_been_heard_from_for_a_second_gets_no_connections(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(supervisor, "monotonic", lambda: now)
    keeper = Supervisor("x.lepton", Options(port=0), 2)
    first, second = keeper._workers
    for child in (first, second):
        child.ready = True
        keeper._told(child, control.Connections(0))
    first.open = 5
    assert keeper._open_workers() == [second, first]
    now += 0.9
    keeper._told(first, control.Connections(5))
    now += 0.2
    assert keeper._open_workers() == [first]
    now += 1.0
    assert keeper._open_workers() == []
    keeper._told(second, control.Connections(0))
    assert keeper._open_workers() == [second]


def test_nobody_is_silent_who_could_not_be_heard(monkeypatch):
    """A container that was paused for two minutes: all stood still."""
    monkeypatch.setattr(supervisor, "monotonic", lambda: 1000.0)
    keeper = Supervisor("x.lepton", Options(port=0), 2)
    for child in keeper._workers:
        child.process, child.ready = Process(), True
        keeper._told(child, control.Counts({}))
    keeper._end_silent(1120.0, 120.0)
    keeper._end_silent(1120.5, 0.5)
    assert not any(child.process.killed for child in keeper._workers)
    keeper._end_silent(1180.5, 0.5)
    assert all(child.process.killed for child in keeper._workers)


def test_a_process_that_is_being_started_may_take_its_time():
    keeper = Supervisor("x.lepton", Options(port=0), 2)
    for child in keeper._workers:
        child.process = Process()
    keeper._end_silent(1e9, 0.5)
    assert not any(child.process.killed for child in keeper._workers)


@pytest.mark.parametrize("begun", [True, False])
def test_a_process_that_the_machine_has_no_room_for_is_tried_again(monkeypatch, begun):
    """But not the first time: then the command ends, and says why."""
    monkeypatch.setattr(supervisor, "_FIRST_WAIT_S", 0.0)
    keeper = Supervisor("x.lepton", Options(port=0), 2)
    tries = []

    async def once(child):
        tries.append(child)
        if len(tries) == 3:
            keeper._ending.add(child)
            return 0
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async def main():
        keeper._once = once
        keeper._begun = asyncio.get_running_loop().create_future()
        if begun:
            keeper._begun.set_result(None)
        code = await asyncio.wait_for(keeper._keep(keeper._workers[0]), 5)
        return code, keeper._begun.exception()

    code, failure = asyncio.run(main())
    if begun:
        assert (len(tries), code, failure) == (3, 0, None)
    else:
        assert (len(tries), str(failure)) == (1, "worker 1 could not be started: Resource temporarily unavailable")
